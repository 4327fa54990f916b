"""Stored workflows: a name, and versions that never change."""

from django.core.validators import RegexValidator
from django.db import models
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks.models.tenancy import Tenant


class Workflow(models.Model):
    """A name. It belongs to a tenant; without one it is shared: operators make it in the admin, all
    tenants use it, and a tenant's own of the same name comes first."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(
        Tenant,
        models.CASCADE,
        null=True,
        blank=True,
        help_text="Empty: shared by all tenants.",
    )
    name = models.CharField(
        max_length=64,
        validators=[RegexValidator(r"^[a-z][a-z0-9-]*\Z", "Lower-case letters, digits and -.")],
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ("name",)
        constraints = (
            models.UniqueConstraint(
                fields=("tenant", "name"),
                name="workflow_once",
                nulls_distinct=False,
                violation_error_message="There is a workflow of this name already.",
            ),
        )

    def __str__(self) -> str:
        return self.name


class WorkflowVersion(models.Model):
    """One declaration (`workflows/spec.py`). Kept for ever as it is, by a database trigger: which
    one a task ran can be told from its `name@number`."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    workflow = models.ForeignKey(Workflow, models.CASCADE, related_name="versions")
    number = models.PositiveIntegerField()
    spec = models.JSONField()
    comment = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    # Who made it: an API key's prefix or an admin's name.
    created_by = models.CharField(max_length=150, blank=True, editable=False)

    class Meta:
        ordering = ("workflow", "-number")
        constraints = (
            models.UniqueConstraint(fields=("workflow", "number"), name="workflow_version_once"),
        )

    def __str__(self) -> str:
        return f"{self.workflow}@{self.number}"
