"""The steps of an agent or a workflow: what was done is never done again."""

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from uuid_utils.compat import uuid7

from llmtasks.models.tenancy import Tenant


class Step(models.Model):
    """One thing that a task did: a model's turn, or a tool's call. Numbered from 0 within its
    task; a task that was interrupted goes on after the steps that are there."""

    class Kind(models.TextChoices):
        MODEL = "model", "model"
        TOOL = "tool", "tool"
        WAIT = "wait", "waits for results"
        # Of workflows: the block that it is.
        PROMPT = "prompt", "prompt"
        AGENT = "agent", "agent"
        TRANSFORM = "transform", "transform"
        WORKFLOW = "workflow", "workflow"
        PIPELINE = "pipeline", "pipeline"
        PARALLEL = "parallel", "parallel"
        ROUTE = "route", "route"
        ORCHESTRATOR = "orchestrator", "orchestrator"
        EVALUATE = "evaluate", "evaluate"
        DECISION = "decision", "decision"

    class Status(models.TextChoices):
        RUNNING = "running", "running"  # begun; after its process's death nobody knows how far
        OPEN = "open", "open"  # waits for its child task
        APPROVAL = "approval", "waits for a person"
        APPROVED = "approved", "approved, not begun"
        DONE = "done", "done"
        FAILED = "failed", "failed"  # its error is its result: the model sees it
        SKIPPED = "skipped", "skipped"  # it failed, and the workflow goes on without it
        UNKNOWN = "unknown", "interrupted"  # may have happened: a person decides

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    task_id = models.UUIDField()
    tenant = models.ForeignKey(Tenant, models.DO_NOTHING, db_constraint=False, db_index=False)
    number = models.IntegerField()
    kind = models.CharField(max_length=12, choices=Kind)
    # The tool (`name@version`) or the model's route; in a workflow the step's own name.
    name = models.CharField(max_length=100, blank=True)
    status = models.CharField(max_length=8, choices=Status)
    # A tool's arguments; a model's turn has the steps before it for its input. A workflow's step
    # has its input in its task.
    input = models.JSONField(null=True, blank=True)
    # The model's answer in our vocabulary, or {"content": …} of a tool. A workflow's step has its
    # answer in its task; here is what it has none for, or why it failed.
    output = models.JSONField(null=True, blank=True)
    error_class = models.CharField(max_length=40, blank=True)
    # The model's id of the call, and the task that it became where it runs in the background, the
    # last one where it was tried again.
    call_id = models.CharField(max_length=200, blank=True)
    child_id = models.UUIDField(null=True, blank=True)
    tries = models.SmallIntegerField(default=1, db_default=1)
    started_at = models.DateTimeField(db_default=Now())
    finished_at = models.DateTimeField(null=True, blank=True)
    decided_by = models.CharField(max_length=150, blank=True)
    comment = models.TextField(blank=True)

    class Meta:
        ordering = ("task_id", "number")
        constraints = (models.UniqueConstraint(fields=("task_id", "number"), name="step_once"),)
        indexes = (
            models.Index(
                fields=("task_id",),
                name="step_undecided",
                condition=Q(status__in=("approval", "unknown")),
            ),
            # What a workflow looks at when it is woken, however many steps are done.
            models.Index(
                fields=("task_id", "status", "number"),
                name="step_to_look_at",
                condition=Q(status__in=("open", "approval", "approved", "failed")),
            ),
        )

    def __str__(self) -> str:
        return f"{self.task_id} step {self.number}"
