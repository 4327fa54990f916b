"""Who asks and who pays."""

import hashlib
import hmac
import secrets
from datetime import datetime

from django.contrib.postgres.fields import ArrayField
from django.core.validators import (
    MaxValueValidator,
    MinValueValidator,
    RegexValidator,
    URLValidator,
)
from django.db import models
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks.models.config import validate_credential

PREFIX_LENGTH = 12


class Scope(models.TextChoices):
    """What an API key may do."""

    WRITE = "write", "create and cancel work"
    READ = "read", "read tasks, models and usage"
    TOOLS = "tools", "use tools and agents"
    PROMPTS = "prompts", "add prompts' versions and move their labels"


def all_scopes() -> list[str]:
    return [str(value) for value in Scope.values]


def all_tools() -> list[str]:
    return ["*"]


def tool_names(about: str) -> "ArrayField[list[str], list[str]]":
    """A list of the tools that somebody may use."""
    name = models.CharField(
        max_length=80,
        validators=[
            RegexValidator(
                r"^(\*|[a-zA-Z][a-zA-Z0-9_-]*(\*|@[1-9][0-9]{0,7})?)\Z",
                "Give a tool's name, name@version, or a beginning and * at the end.",
            )
        ],
    )
    return ArrayField(name, default=all_tools, blank=True, help_text=about)


class Tenant(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    name = models.SlugField(max_length=64, unique=True)
    is_active = models.BooleanField(default=True, help_text="Off: its keys are refused.")
    weight = models.PositiveSmallIntegerField(
        default=1,
        validators=[MinValueValidator(1), MaxValueValidator(1000)],
        help_text="Its share of turns while others wait too: 2 gets twice as many as 1.",
    )
    tools = tool_names(
        "The tools that its keys may use at the most: names, name@version, shop_*; * is all,"
        " nothing is none."
    )
    webhook_url = models.CharField(
        max_length=500,
        blank=True,
        validators=[URLValidator(schemes=["http", "https"])],
        help_text="Told of each step that waits for a person; empty: nobody is told.",
    )
    webhook_secret = models.CharField(
        max_length=500,
        blank=True,
        validators=[validate_credential],
        help_text="env:NAME or file:/path: where the secret is found that signs what is sent,"
        " whsec_… or any text. Never the secret itself.",
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class ApiKey(models.Model):
    """A key `lt_<prefix>_<secret>`. Only the prefix and the secret's SHA-256 are stored: the
    secret has 256 bits of its own, so that a slow hash would add nothing."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(Tenant, models.CASCADE, related_name="keys")
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=PREFIX_LENGTH, unique=True, editable=False)
    secret_hash = models.CharField(max_length=64, editable=False)
    # One of `Scope`, or a word of its own that a tool asks for.
    scopes = ArrayField(models.CharField(max_length=40), default=all_scopes)
    tools = tool_names(
        "Of those that its tenant may use and its scopes allow: names, name@version, shop_*;"
        " * is all, nothing is none."
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        ordering = ("-created_at",)
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.name} (lt_{self.prefix}_…)"

    @classmethod
    def issue(
        cls, tenant: Tenant, name: str, secret: str = "", **fields: object
    ) -> "tuple[ApiKey, str]":
        """A new, unsaved key and its secret text, which is never to be had again.

        `secret` (for a seed that must be repeatable) is a whole `lt_<prefix>_<secret>` text.
        """
        text = secret or f"lt_{secrets.token_hex(PREFIX_LENGTH // 2)}_{secrets.token_urlsafe(32)}"
        prefix, hashed = split(text)
        return cls(tenant=tenant, name=name, prefix=prefix, secret_hash=hashed, **fields), text

    def matches(self, hashed: str) -> bool:
        return hmac.compare_digest(self.secret_hash, hashed)

    def is_usable(self, now: datetime) -> bool:
        expired = self.expires_at is not None and self.expires_at <= now
        return self.revoked_at is None and not expired and self.tenant.is_active


def split(text: str) -> tuple[str, str]:
    """The prefix of a key's text and the SHA-256 of its secret; ValueError for no such text."""
    kind, prefix, secret = text.split("_", 2)
    if kind != "lt" or len(prefix) != PREFIX_LENGTH or len(secret) < 20:
        raise ValueError("not an llmtasks key")
    return prefix, hashlib.sha256(secret.encode()).hexdigest()
