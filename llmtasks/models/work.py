"""Work: tasks, their bodies, and the processes that run them.

A task's columns of configuration are names, not foreign keys: history outlives configuration,
and an insert on the hot path takes no lock on a shared row.
"""

from datetime import UTC, datetime

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from uuid_utils.compat import uuid7

from llmtasks.models.tenancy import ApiKey, Tenant

# Before any task. Said of a time by the statements that are to use the index on it.
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Kind(models.TextChoices):
    """What a task does."""

    CHAT = "chat", "chat"
    EMBEDDING = "embedding", "embedding"
    TOOL = "tool", "tool"
    AGENT = "agent", "agent"
    WORKFLOW = "workflow", "workflow"


class Mode(models.TextChoices):
    """Where a task runs: in the caller's request, or in a worker."""

    INLINE = "inline", "inline"
    QUEUED = "queued", "queued"


class Lane(models.TextChoices):
    """How urgent queued work is. Each lane has workers of its own."""

    INTERACTIVE = "interactive", "interactive"
    DEFAULT = "default", "default"
    BULK = "bulk", "bulk"


class Status(models.TextChoices):
    """The states; `docs/states.md` draws the arrows."""

    WAITING = "waiting", "waiting"  # a row that nobody was told of yet, or again
    QUEUED = "queued", "queued"  # a hint is in the broker
    RUNNING = "running", "running"  # `owner` runs it, under `fence`
    BLOCKED = "blocked", "blocked"  # waits for its children, its tools or a person
    SUCCEEDED = "succeeded", "succeeded"
    FAILED = "failed", "failed"
    CANCELLED = "cancelled", "cancelled"
    EXPIRED = "expired", "expired"  # its deadline passed before it ran


FINAL = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.EXPIRED)


class OnUnknown(models.TextChoices):
    """What happens to queued work whose process died during a call."""

    RETRY = "retry", "run again"
    FAIL = "fail", "fail"


class Worker(models.Model):
    """A running process and the lease that says that it is alive. Never reused: a process whose
    lease lapsed drops its calls and takes a new id."""

    class Role(models.TextChoices):
        WEB = "web", "web"
        WORKER = "worker", "Celery worker"
        DISPATCHER = "dispatcher", "dispatcher"
        COMMAND = "command", "command"

    id = models.UUIDField(primary_key=True, default=uuid7)
    role = models.CharField(max_length=16, choices=Role)
    lane = models.CharField(max_length=16, choices=Lane, blank=True)
    host = models.CharField(max_length=255)
    pid = models.IntegerField()
    # How many tasks it runs at a time, and the Celery queues that it takes them from.
    slots = models.IntegerField(default=0)
    queues = models.JSONField(default=list)
    started_at = models.DateTimeField(db_default=Now())
    lease_until = models.DateTimeField()

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.role} {self.lane} {self.host}:{self.pid}"


class Task(models.Model):
    """One piece of work that a client asked for. The row is the truth; a Celery message is only
    a hint that names it. Changed by conditional UPDATEs alone (`ledger.py`), never by `save()`."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(Tenant, models.DO_NOTHING, db_constraint=False, db_index=False)
    key = models.ForeignKey(
        ApiKey, models.DO_NOTHING, db_constraint=False, db_index=False, null=True, blank=True
    )
    kind = models.CharField(max_length=16, choices=Kind)
    mode = models.CharField(max_length=8, choices=Mode)
    lane = models.CharField(max_length=16, choices=Lane, default=Lane.DEFAULT)
    status = models.CharField(max_length=10, choices=Status, default=Status.WAITING)
    route = models.CharField(max_length=100)
    # The provider whose queue it goes to, then the one that answered.
    provider = models.CharField(max_length=40, blank=True)
    # The version of a prompt that ran, `name@number`; versions never change.
    prompt = models.CharField(max_length=80, blank=True, default="", db_default="")
    user = models.CharField(max_length=200, blank=True)
    metadata = models.JSONField(default=dict, blank=True)
    request_id = models.CharField(max_length=100, blank=True)
    on_unknown = models.CharField(max_length=5, choices=OnUnknown, default=OnUnknown.RETRY)
    # Whether deltas are published while it runs in a worker.
    streams = models.BooleanField(default=False)

    created_at = models.DateTimeField(db_default=Now())
    run_at = models.DateTimeField(null=True, blank=True)
    # Not released before this time: `run_at`, then whatever a retry waits for.
    not_before = models.DateTimeField(db_default=Now())
    deadline = models.DateTimeField()
    queued_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    cancel_requested_at = models.DateTimeField(null=True, blank=True)

    # Which release of the task a hint belongs to, which claim a write belongs to, whose claim.
    seq = models.IntegerField(default=0)
    fence = models.IntegerField(default=0)
    owner_id = models.UUIDField(null=True, blank=True)

    attempts = models.IntegerField(default=0)
    input_tokens = models.BigIntegerField(default=0)
    cached_input_tokens = models.BigIntegerField(default=0)
    cache_write_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0)
    reasoning_tokens = models.BigIntegerField(default=0)
    cost = models.DecimalField(max_digits=20, decimal_places=10, null=True, blank=True)
    cost_state = models.CharField(max_length=10, blank=True)

    error_class = models.CharField(max_length=40, blank=True)
    error_message = models.TextField(blank=True)
    error_status = models.SmallIntegerField(null=True, blank=True)
    error_param = models.CharField(max_length=100, blank=True)
    retry_after = models.FloatField(null=True, blank=True)

    parent_id = models.UUIDField(null=True, blank=True)
    # While blocked: the children whose end it waits for.
    waits_for = ArrayField(models.UUIDField(), null=True, blank=True, editable=False)
    # It is woken once so many of them, or fewer, are left open.
    may_be_open = models.IntegerField(default=0, db_default=0, editable=False)
    retry_of = models.UUIDField(null=True, blank=True)

    # What an unsaved task carries until it is written: the request as JSON text, and the row of
    # its Idempotency-Key.
    body: bytes = b""
    key_row: "IdempotencyKey | None" = None

    class Meta:
        ordering = ("-id",)
        permissions = (("view_bodies", "Can read prompts and answers"),)
        # In a quiet hour those by status are empty, and statistics say so for long after: the
        # planner then takes any of them that a statement may use for one that is read in no time.
        # So that a burst is not read whole for one row, those on a time hold for statements alone
        # that name EPOCH, and what is found by its id asks for `status || ''`, which no index has.
        indexes = (
            # The waiting room: the tenants of each provider, lane and route, the oldest due first.
            models.Index(
                fields=("provider", "lane", "route", "tenant", "not_before"),
                name="task_waiting_room",
                condition=Q(status="waiting"),
            ),
            # What became due of late.
            models.Index(
                fields=("not_before",),
                name="task_due",
                condition=Q(status="waiting", not_before__gt=EPOCH),
            ),
            # Small by construction: the dispatcher bounds what is released.
            models.Index(
                fields=("status", "provider", "lane"),
                name="task_under_way",
                condition=Q(status__in=("queued", "running")),
            ),
            models.Index(fields=("owner_id",), name="task_owned", condition=Q(status="running")),
            models.Index(
                fields=("deadline",),
                name="task_late",
                condition=Q(status__in=("waiting", "queued", "blocked"), deadline__gt=EPOCH),
            ),
            models.Index(fields=("tenant", "id"), name="task_by_tenant"),
            models.Index(fields=("tenant", "status", "id"), name="task_by_status"),
            models.Index(
                fields=("tenant", "user", "id"), name="task_by_user", condition=~Q(user="")
            ),
            models.Index(
                fields=("tenant", "prompt", "id"), name="task_by_prompt", condition=~Q(prompt="")
            ),
            models.Index(fields=("status", "id"), name="task_all_by_status"),
            models.Index(
                fields=("parent_id", "id"),
                name="task_children",
                condition=Q(parent_id__isnull=False),
            ),
            # What ends with its parent.
            models.Index(
                fields=("parent_id", "id"),
                name="task_open_children",
                condition=Q(
                    parent_id__isnull=False,
                    status__in=("waiting", "queued", "running", "blocked"),
                ),
            ),
            # Whose parents may have to be woken.
            models.Index(
                fields=("finished_at",),
                name="task_child_ended",
                condition=Q(parent_id__isnull=False, finished_at__isnull=False),
            ),
        )

    def __str__(self) -> str:
        return str(self.id)


class TaskPayload(models.Model):
    """A task's request and answer, in our vocabulary (`providers.types`), with a version. Kept
    apart from the task since prompts are deleted sooner than bills."""

    task = models.OneToOneField(
        Task, models.DO_NOTHING, primary_key=True, db_constraint=False, related_name="payload"
    )
    version = models.SmallIntegerField(default=1)
    request = models.JSONField()
    response = models.JSONField(null=True, blank=True)

    class Meta:
        verbose_name = "task body"
        verbose_name_plural = "task bodies"

    def __str__(self) -> str:
        return str(self.task_id)


class IdempotencyKey(models.Model):
    """What a client's Idempotency-Key was used for: the same body gets the same task."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(Tenant, models.CASCADE, db_constraint=False, db_index=False)
    endpoint = models.CharField(max_length=60)
    key = models.CharField(max_length=255)
    body_hash = models.CharField(max_length=64)
    task_id = models.UUIDField()
    expires_at = models.DateTimeField(db_index=True)

    class Meta:
        constraints = (
            models.UniqueConstraint(
                fields=("tenant", "endpoint", "key"), name="idempotency_key_once"
            ),
        )

    def __str__(self) -> str:
        return f"{self.endpoint} {self.key}"
