"""What operators configure: vendor accounts, their models, and the names that clients use."""

import re

from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator, RegexValidator, URLValidator
from django.db import models

from providers import registry

CREDENTIAL = re.compile(r"(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+)\Z")


def validate_credential(value: str) -> None:
    if not CREDENTIAL.match(value):
        raise ValidationError(
            "Give a reference, env:NAME or file:/path, never the key itself.", code="credential"
        )


class Provider(models.Model):
    """A vendor account that we call. Its name is part of queue names, and so never changes."""

    name = models.CharField(
        max_length=40,
        unique=True,
        validators=[RegexValidator(r"^[a-z][a-z0-9-]*\Z", "Lower-case letters, digits and -.")],
    )
    adapter = models.CharField(max_length=40, help_text="compatible, anthropic, openai, vllm …")
    base_url = models.CharField(
        max_length=500, validators=[URLValidator(schemes=["http", "https"])]
    )
    credential = models.CharField(
        max_length=500,
        blank=True,
        validators=[validate_credential],
        help_text="env:NAME or file:/path: where the vendor's key is found, never the key itself.",
    )
    options = models.JSONField(default=dict, blank=True)
    price_family = models.CharField(
        max_length=60,
        blank=True,
        help_text="Whose prices hold (openai, anthropic, azure …); empty: the provider's own name.",
    )
    is_paused = models.BooleanField(
        default=False, help_text="On: queued work waits; inline work goes to the next candidate."
    )
    connect_timeout_s = models.FloatField(default=5.0, validators=[MinValueValidator(0.1)])
    read_timeout_s = models.FloatField(default=120.0, validators=[MinValueValidator(0.1)])
    total_timeout_s = models.FloatField(default=600.0, validators=[MinValueValidator(0.1)])
    # Set when the vendor refused the credential: nothing is sent until a person says so.
    refused_at = models.DateTimeField(null=True, blank=True, editable=False)
    refused_reason = models.TextField(blank=True, editable=False)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        if self.name in ("tools", "workflows"):
            raise ValidationError({"name": f"This name stands for the {self.name}' own queues."})
        if self.adapter not in registry.adapters():
            known = ", ".join(sorted(registry.adapters()))
            raise ValidationError({"adapter": f"Unknown adapter; there are {known}."})
        try:
            registry.check_options(self.adapter, self.options)
        except (ValueError, TypeError) as error:
            raise ValidationError({"options": str(error)}) from None


class ProviderModel(models.Model):
    """A model as its vendor names it, at one provider."""

    provider = models.ForeignKey(Provider, models.CASCADE, related_name="models")
    name = models.CharField(max_length=200)
    context_window = models.PositiveIntegerField(
        null=True, blank=True, help_text="Tokens; decides where a prompt goes that is too long."
    )
    max_output_tokens = models.PositiveIntegerField(null=True, blank=True)
    # Set when the vendor refused this model alone to the account.
    refused_at = models.DateTimeField(null=True, blank=True, editable=False)
    refused_reason = models.TextField(blank=True, editable=False)
    # Unit → amount per minute, as the vendor's answers told last.
    vendor_limits = models.JSONField(default=dict, blank=True, editable=False)

    class Meta:
        ordering = ("provider__name", "name")
        constraints = (
            models.UniqueConstraint(fields=("provider", "name"), name="model_once_per_provider"),
        )

    def __str__(self) -> str:
        return f"{self.provider.name}/{self.name}"


class Route(models.Model):
    """A model name that clients use; its candidates are tried in order."""

    class Kind(models.TextChoices):
        CHAT = "chat", "chat"
        EMBEDDING = "embedding", "embedding"

    name = models.CharField(max_length=100, unique=True)
    kind = models.CharField(max_length=16, choices=Kind, default=Kind.CHAT)
    is_active = models.BooleanField(default=True)
    fallback = models.ForeignKey(
        "self",
        models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
        help_text="Its candidates come after this route's own.",
    )
    hedges = models.BooleanField(
        default=False,
        help_text="On: where no answer came in the time of 95 % of the calls, a second candidate is"
        " called beside the first. The faster answers; both are billed.",
    )

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        seen, route = {self.pk}, self.fallback
        while route is not None:
            if route.kind != self.kind:
                raise ValidationError(
                    {
                        "fallback": f"{route.name!r} is for {route.kind}, not for {self.kind}:"
                        " choose another, or none."
                    }
                )
            if route.pk in seen:
                where = "this route" if route.pk == self.pk else repr(route.name)
                raise ValidationError(
                    {"fallback": f"It leads back to {where}: choose another, or none."}
                )
            seen.add(route.pk)
            route = route.fallback
        others = Route.objects.filter(fallback_id=self.pk).exclude(kind=self.kind)
        if self.pk is not None and (other := others.first()) is not None:
            raise ValidationError(
                {"kind": f"{other.name!r} falls back to this route: it must stay {other.kind}."}
            )


class RouteCandidate(models.Model):
    route = models.ForeignKey(Route, models.CASCADE, related_name="candidates")
    position = models.PositiveSmallIntegerField(default=0)
    model = models.ForeignKey(ProviderModel, models.PROTECT, related_name="candidacies")

    class Meta:
        ordering = ("position", "id")
        constraints = (
            models.UniqueConstraint(fields=("route", "model"), name="candidate_once_per_route"),
        )

    def __str__(self) -> str:
        return f"{self.route.name} → {self.model}"


class Config(models.Model):
    """One row. A trigger raises `version` on every change of configuration, keys or prices, and
    every process's pulse reads it: an edit is in force everywhere within a second."""

    id = models.SmallIntegerField(primary_key=True, default=1)
    version = models.BigIntegerField(default=1)
    # The dispatcher's lease: one leader; `epoch` counts leaderships.
    leader = models.UUIDField(null=True, blank=True)
    leader_until = models.DateTimeField(null=True, blank=True)
    epoch = models.BigIntegerField(default=0)

    class Meta:
        verbose_name_plural = "config"

    def __str__(self) -> str:
        return f"version {self.version}"
