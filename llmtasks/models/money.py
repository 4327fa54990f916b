"""Money: prices, the spend ledger, corrections. Always Decimal, always US dollars."""

from decimal import Decimal

from django.core.validators import MinValueValidator
from django.db import models
from django.db.models.functions import Now
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks.models.tenancy import Tenant
from llmtasks.models.work import Task


class CostState(models.TextChoices):
    """How sure a cost is."""

    FINAL = "final", "final"
    ESTIMATED = "estimated", "estimated"  # the vendor's usage is not known (yet)
    UNPRICED = "unpriced", "unpriced"  # no price: the cost is unknown, not 0


class Price(models.Model):
    """Dollars per million tokens of each kind, from a moment on. For prompts of at least
    `from_input_tokens` tokens (tiers). A row is never changed or deleted (by a trigger): the
    attempts that were billed at it refer to it. `pricing` says which row holds."""

    class Source(models.TextChoices):
        IMPORTED = "imported", "genai-prices"
        MANUAL = "manual", "manual"

    family = models.CharField(max_length=60, help_text="openai, anthropic, sandbox …")
    model = models.CharField(max_length=200)
    effective_from = models.DateTimeField(default=timezone.now)
    from_input_tokens = models.PositiveIntegerField(default=0)
    source = models.CharField(max_length=10, choices=Source, default=Source.MANUAL)

    input = models.DecimalField(
        max_digits=16, decimal_places=8, validators=[MinValueValidator(Decimal(0))]
    )
    cached_input = models.DecimalField(
        max_digits=16, decimal_places=8, validators=[MinValueValidator(Decimal(0))]
    )
    cache_write_5m = models.DecimalField(
        max_digits=16, decimal_places=8, validators=[MinValueValidator(Decimal(0))]
    )
    cache_write_1h = models.DecimalField(
        max_digits=16, decimal_places=8, validators=[MinValueValidator(Decimal(0))]
    )
    output = models.DecimalField(
        max_digits=16, decimal_places=8, validators=[MinValueValidator(Decimal(0))]
    )
    reasoning = models.DecimalField(
        max_digits=16, decimal_places=8, validators=[MinValueValidator(Decimal(0))]
    )
    per_request = models.DecimalField(
        max_digits=16,
        decimal_places=8,
        default=Decimal(0),
        validators=[MinValueValidator(Decimal(0))],
        help_text="Dollars for each request, whatever its tokens.",
    )

    class Meta:
        ordering = ("family", "model", "-effective_from", "from_input_tokens")
        constraints = (
            models.UniqueConstraint(
                fields=("family", "model", "effective_from", "from_input_tokens", "source"),
                name="price_once",
            ),
        )

    def __str__(self) -> str:
        return f"{self.family}/{self.model} from {self.effective_from:%Y-%m-%d %H:%M}"


class Attempt(models.Model):
    """One call to one vendor: the spend ledger. Settled once, then immutable (by a trigger)."""

    class State(models.TextChoices):
        SENT = "sent", "sent"
        UNKNOWN = "unknown", "unknown"  # its process died: billed or not, nobody can tell
        SETTLED = "settled", "settled"

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    task = models.ForeignKey(
        Task, models.DO_NOTHING, db_constraint=False, db_index=False, related_name="attempt_rows"
    )
    tenant = models.ForeignKey(Tenant, models.DO_NOTHING, db_constraint=False, db_index=False)
    step = models.IntegerField(default=0)
    number = models.IntegerField()
    provider = models.CharField(max_length=40)
    model = models.CharField(max_length=200)
    state = models.CharField(max_length=8, choices=State, default=State.SENT)
    started_at = models.DateTimeField(db_default=Now())
    finished_at = models.DateTimeField(null=True, blank=True)
    latency_ms = models.IntegerField(null=True, blank=True)
    first_token_ms = models.IntegerField(null=True, blank=True)
    http_status = models.SmallIntegerField(null=True, blank=True)
    error_class = models.CharField(max_length=40, blank=True)
    error_message = models.TextField(blank=True)
    vendor_request_id = models.CharField(max_length=200, blank=True)

    input_tokens = models.BigIntegerField(default=0)
    cached_input_tokens = models.BigIntegerField(default=0)
    cache_write_5m_tokens = models.BigIntegerField(default=0)
    cache_write_1h_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0)
    reasoning_tokens = models.BigIntegerField(default=0)
    raw_usage = models.JSONField(null=True, blank=True)
    price = models.ForeignKey(
        Price, models.DO_NOTHING, db_constraint=False, db_index=False, null=True, blank=True
    )
    # While `sent`, what the call may cost at the most likely; afterwards, what it did cost.
    cost = models.DecimalField(max_digits=20, decimal_places=10, null=True, blank=True)
    cost_state = models.CharField(max_length=10, choices=CostState, default=CostState.ESTIMATED)

    class Meta:
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(fields=("task", "step", "number"), name="attempt_once"),
        )
        indexes = (
            models.Index(fields=("tenant", "id"), name="attempt_by_tenant"),
            models.Index(fields=("provider", "id"), name="attempt_by_provider"),
            models.Index(
                fields=("task",), name="attempt_open", condition=~models.Q(state="settled")
            ),
        )

    def __str__(self) -> str:
        return f"{self.task_id} #{self.number}"


class Adjustment(models.Model):
    """A correction of what was spent: a row of its own, never an edit of the ledger."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(Tenant, models.PROTECT)
    attempt = models.ForeignKey(
        Attempt, models.DO_NOTHING, db_constraint=False, null=True, blank=True
    )
    amount = models.DecimalField(
        max_digits=20, decimal_places=10, help_text="US dollars; negative gives money back."
    )
    reason = models.TextField()
    created_by = models.CharField(max_length=150, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.amount} {self.tenant}"
