"""What may be used of what in which time, and what became of providers."""

from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator
from django.db import models
from django.db.models.functions import Now

from llmtasks.models.config import Provider, ProviderModel
from llmtasks.models.tenancy import ApiKey, Tenant

# Seconds of each window, by its name.
WINDOWS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}


class Limit(models.Model):
    """So much of a unit in any window of time, or so many calls at once.

    It counts the calls that match every selector that is given (provider, model, tenant, key), all
    of them together, or with `each` every tenant or key by itself.
    """

    class Unit(models.TextChoices):
        REQUESTS = "requests", "requests"
        TOKENS = "tokens", "tokens (input and output)"
        INPUT_TOKENS = "input_tokens", "input tokens"
        OUTPUT_TOKENS = "output_tokens", "output tokens"
        CONCURRENCY = "concurrency", "calls at once"

    class Window(models.TextChoices):
        SECOND = "second", "per second"
        MINUTE = "minute", "per minute"
        HOUR = "hour", "per hour"
        DAY = "day", "per day"

    class Each(models.TextChoices):
        TENANT = "tenant", "each tenant by itself"
        KEY = "key", "each API key by itself"

    provider = models.ForeignKey(
        Provider, models.CASCADE, related_name="limits", null=True, blank=True
    )
    model = models.CharField(
        max_length=200, blank=True, help_text="The vendor's model; empty: all of the provider's."
    )
    tenant = models.ForeignKey(Tenant, models.CASCADE, related_name="limits", null=True, blank=True)
    key = models.ForeignKey(
        ApiKey, models.CASCADE, related_name="limits", null=True, blank=True, verbose_name="API key"
    )
    each = models.CharField(max_length=8, choices=Each, blank=True, verbose_name="counted for")
    unit = models.CharField(max_length=16, choices=Unit)
    window = models.CharField(
        max_length=8, choices=Window, blank=True, help_text="Empty for calls at once."
    )
    amount = models.PositiveBigIntegerField(validators=[MinValueValidator(1)])
    burst = models.PositiveBigIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1)],
        help_text="How much may be used at once after a pause; empty: 2 % of the requests, 5 % of"
        " the tokens, all of a day.",
    )
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ("provider__name", "model", "tenant__name", "unit", "id")
        constraints = (
            models.UniqueConstraint(
                fields=("provider", "model", "tenant", "key", "each", "unit", "window"),
                name="limit_once",
                nulls_distinct=False,
                violation_error_message="There is a limit of this unit and window for the same"
                " calls already: edit that one.",
            ),
        )

    def __str__(self) -> str:
        whose = [str(part) for part in (self.provider, self.model, self.tenant, self.key) if part]
        per = f" per {self.window}" if self.window else " at once"
        unit = "calls" if self.unit == self.Unit.CONCURRENCY else self.unit.replace("_", " ")
        each = f", {self.get_each_display()}" if self.each else ""
        return f"{' / '.join(whose) or 'all'}: {self.amount:,} {unit}{per}{each}"

    @property
    def is_sound(self) -> bool:
        """Whether it can be held at all. The admin makes no other."""
        windows = [""] if self.unit == self.Unit.CONCURRENCY else list(WINDOWS)
        return self.amount >= 1 and self.unit in self.Unit.values and self.window in windows

    def clean(self) -> None:
        wrong = {field: text for is_wrong, field, text in self.checks() if is_wrong}
        if errors := wrong or self.contradictions():
            raise ValidationError(dict(errors))

    def checks(self) -> list[tuple[bool, str, str]]:
        """(is wrong, field, what to do) of what this row alone tells."""
        at_once = self.unit == self.Unit.CONCURRENCY
        no_window = not at_once and self.window not in WINDOWS
        amount = self.amount or 0
        foreign = bool(self.key and self.tenant and self.key.tenant_id != self.tenant_id)
        is_one = bool(self.key or (self.each == self.Each.TENANT and self.tenant))
        return [
            (amount < 1, "amount", "At least 1; to stop all calls, pause the provider."),
            (at_once and bool(self.window), "window", "Calls at once have no window: empty it."),
            (at_once and self.burst is not None, "burst", "Calls at once have no burst: empty it."),
            (no_window, "window", "Choose the window of the amount."),
            ((self.burst or 0) > amount, "burst", f"At most the amount, {amount}."),
            (bool(self.model) and not self.provider, "provider", "Choose whose model this is."),
            (not self.knows_model(), "model", "The provider has no such model: add it there."),
            (foreign, "key", f"This key is not one of {self.tenant}'s."),
            (bool(self.each) and is_one, "each", "The limit is for one already: empty this."),
        ]

    def knows_model(self) -> bool:
        if not (self.model and self.provider):
            return True
        return ProviderModel.objects.filter(provider=self.provider, name=self.model).exists()

    def contradictions(self) -> dict[str, str]:
        """Where a neighbour's window makes this one pointless, or the vendor allows less."""
        if self.window not in WINDOWS:
            return {}
        # A vendor's minute may be used up within a second.
        per_minute = self.amount * 60 // max(60, WINDOWS[self.window])
        most = self.vendor_limit()
        if most is not None and per_minute > most:
            return {
                "amount": f"The vendor allows {most} a minute, by its answers' headers: not more."
            }
        same = Limit.objects.filter(
            provider=self.provider, model=self.model, tenant=self.tenant, key=self.key,
            each=self.each, unit=self.unit,
            window__in=WINDOWS,
        ).exclude(pk=self.pk).exclude(window=self.window)  # fmt: skip
        for other in same:
            short, long = sorted((self, other), key=lambda limit: WINDOWS[limit.window])
            if short.amount > long.amount:
                return {
                    "amount": f"{short.amount} per {short.window} can never be reached under"
                    f" {long.amount} per {long.window}: lower the one or raise the other."
                }
        return {}

    def vendor_limit(self) -> int | None:
        """What the vendor allows a minute, where it told so for this model."""
        known = ProviderModel.objects.filter(provider=self.provider, name=self.model).first()
        return None if known is None else known.vendor_limits.get(self.unit)


class ProviderEvent(models.Model):
    """What became of a provider's health: one row for each change, for people to look back at."""

    class Event(models.TextChoices):
        OPENED = "opened", "breaker opened"
        HALF_OPEN = "half_open", "breaker probes"
        CLOSED = "closed", "breaker closed"
        REFUSED = "refused", "credential refused"
        RECOVERED = "recovered", "credential in use again"

    at = models.DateTimeField(db_default=Now())
    provider = models.CharField(max_length=40)
    model = models.CharField(max_length=200, blank=True)
    event = models.CharField(max_length=10, choices=Event)
    detail = models.TextField(blank=True)

    class Meta:
        ordering = ("-id",)
        indexes = (models.Index(fields=("provider", "-id"), name="event_by_provider"),)

    def __str__(self) -> str:
        return f"{self.provider} {self.model}: {self.get_event_display()}"
