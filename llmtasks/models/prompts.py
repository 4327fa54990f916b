"""Prompts: texts with variables in versions that never change, and what was thought of answers."""

from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models.functions import Now
from uuid_utils.compat import uuid7

from llmtasks.models.tenancy import Tenant

NAME = RegexValidator(
    r"^[a-z][a-z0-9-]{0,62}\Z", "A small letter, then small letters, digits and -: 63 at most."
)
LABEL = RegexValidator(
    r"^[a-z][a-z0-9-]{0,31}\Z", "A small letter, then small letters, digits and -: 32 at most."
)


class Prompt(models.Model):
    """A name for versions of a text. Neither is ever deleted: tasks name them."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(Tenant, models.PROTECT)
    name = models.CharField(max_length=63, validators=[NAME])
    description = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ("name",)
        constraints = (models.UniqueConstraint(fields=("tenant", "name"), name="prompt_once"),)

    def __str__(self) -> str:
        return self.name


class PromptVersion(models.Model):
    """What a prompt says. Never changed or deleted (by a trigger): a task says which one ran.

    `messages` are {"role", "content"}, whose content holds `{{ variable }}`. `variables` is a JSON
    schema of an object. `model` and `parameters` hold where the caller gives none.
    """

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    prompt = models.ForeignKey(Prompt, models.PROTECT, related_name="versions")
    number = models.PositiveIntegerField()
    messages = models.JSONField()
    variables = models.JSONField(default=dict, blank=True)
    model = models.CharField(max_length=100, blank=True, help_text="The route, where none is given")
    parameters = models.JSONField(default=dict, blank=True)
    note = models.CharField(max_length=500, blank=True, help_text="What changed, and why")
    created_by = models.CharField(max_length=150, blank=True, editable=False)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ("prompt", "-number")
        constraints = (
            models.UniqueConstraint(fields=("prompt", "number"), name="prompt_version_once"),
        )

    def __str__(self) -> str:
        return f"{self.prompt.name}@{self.number}"


class PromptLabel(models.Model):
    """A name that stands for a version until it is moved: `production` is what runs where none is
    named, and `canary` takes a share of that."""

    PRODUCTION = "production"
    CANARY = "canary"

    prompt = models.ForeignKey(Prompt, models.CASCADE, related_name="labels")
    name = models.CharField(max_length=32, validators=[LABEL])
    version = models.ForeignKey(PromptVersion, models.PROTECT)
    share = models.PositiveSmallIntegerField(
        default=0,
        validators=[MinValueValidator(0), MaxValueValidator(100)],
        help_text="Of the canary alone: percent of production's use",
    )
    changed_by = models.CharField(max_length=150, blank=True, editable=False)
    changed_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ("prompt", "-name")
        constraints = (
            models.UniqueConstraint(fields=("prompt", "name"), name="prompt_label_once"),
            models.CheckConstraint(
                condition=models.Q(share=0) | models.Q(name="canary", share__lte=100),
                name="prompt_label_share",
            ),
        )

    def __str__(self) -> str:
        return f"{self.prompt.name}@{self.name}"


class Feedback(models.Model):
    """What somebody thought of a task's answer; one row for each source, which it may replace.
    `score` is from -1 (bad) to 1 (good)."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(Tenant, models.DO_NOTHING, db_constraint=False, db_index=False)
    task_id = models.UUIDField()
    source = models.CharField(max_length=64)
    score = models.FloatField(null=True, blank=True)
    label = models.CharField(max_length=64, blank=True)
    comment = models.TextField(blank=True)
    created_at = models.DateTimeField(db_default=Now())
    updated_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ("-id",)
        verbose_name_plural = "feedback"
        constraints = (
            # Its order is that of an export: a tenant's tasks by time.
            models.UniqueConstraint(
                fields=("tenant", "task_id", "source"), name="feedback_once_a_source"
            ),
            models.CheckConstraint(
                condition=models.Q(score__isnull=True) | models.Q(score__gte=-1.0, score__lte=1.0),
                name="feedback_score",
            ),
        )
        indexes = (models.Index(fields=("task_id",), name="feedback_of_task"),)

    def __str__(self) -> str:
        return f"{self.source} on {self.task_id}"
