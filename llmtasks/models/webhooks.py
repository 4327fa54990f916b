"""What tenants are told: an outbox, written in the transaction of what it tells of."""

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from uuid_utils.compat import uuid7

from llmtasks.models.tenancy import Tenant


class Delivery(models.Model):
    """One event on its way to a tenant's URL. The id is the receiver's to tell repetitions by."""

    class State(models.TextChoices):
        PENDING = "pending", "on its way"
        DELIVERED = "sent", "delivered"
        DROPPED = "dropped", "dropped: a person decided meanwhile"
        FAILED = "failed", "given up"

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(Tenant, models.DO_NOTHING, db_constraint=False, db_index=False)
    event = models.CharField(max_length=40)
    task_id = models.UUIDField()
    step_id = models.UUIDField()
    state = models.CharField(max_length=8, choices=State, default=State.PENDING)
    tries = models.SmallIntegerField(default=0)
    http_status = models.SmallIntegerField(null=True, blank=True)
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(db_default=Now())
    # When it is tried next; while it is being tried, when it counts as lost.
    due_at = models.DateTimeField(db_default=Now())
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-id",)
        verbose_name = "webhook"
        indexes = (
            models.Index(fields=("due_at",), name="delivery_due", condition=Q(state="pending")),
            models.Index(fields=("tenant", "id"), name="delivery_by_tenant"),
        )

    def __str__(self) -> str:
        return f"{self.event} {self.id}"
