"""Tools that are rows: operations of HTTP APIs, and what MCP servers offer."""

import re
from typing import Any

from django.contrib.postgres.fields import ArrayField
from django.core.exceptions import ValidationError
from django.core.validators import (
    MaxValueValidator,
    MinValueValidator,
    RegexValidator,
    URLValidator,
)
from django.db import models

from llmtasks.models.config import validate_credential

NAME = RegexValidator(
    r"^[a-zA-Z][a-zA-Z0-9_-]{0,59}\Z", "A letter, then letters, digits, _ and - (60 at most)."
)
HEADER = RegexValidator(r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}\Z", "Give a header's name.")
SCHEME = RegexValidator(r"^[A-Za-z0-9-]*\Z", "One word, like Bearer.")


class Reached(models.Model):
    """What is reached over HTTP, with a credential that is a reference."""

    credential = models.CharField(
        max_length=500,
        blank=True,
        validators=[validate_credential],
        help_text="env:NAME or file:/path: where the secret is found, never the secret itself.",
    )
    auth_header = models.CharField(
        max_length=100,
        default="Authorization",
        validators=[HEADER],
        help_text="The header that carries the secret.",
    )
    auth_scheme = models.CharField(
        max_length=40,
        default="Bearer",
        blank=True,
        validators=[SCHEME],
        help_text="The word before the secret; empty: the secret alone.",
    )
    is_active = models.BooleanField(default=True, help_text="Off: there is no such tool.")
    timeout_s = models.FloatField(
        default=30.0, validators=[MinValueValidator(0.1), MaxValueValidator(3600.0)]
    )
    max_result_bytes = models.PositiveIntegerField(
        default=100_000,
        validators=[MinValueValidator(100), MaxValueValidator(10_000_000)],
        help_text="A larger result is an error that the model sees.",
    )

    class Meta:
        abstract = True


class Handled(models.Model):
    """How runs of a tool are handled."""

    critical = models.BooleanField(
        default=True, help_text="On: whoever asked waits for it. Off: it is queued."
    )
    idempotent = models.BooleanField(
        default=False, help_text="On: it may be run again where nobody knows how far it came."
    )
    needs_approval = models.BooleanField(
        default=False, help_text="On: a person lets each call through."
    )
    retries = models.PositiveSmallIntegerField(
        default=0, validators=[MaxValueValidator(10)], help_text="Idempotent tools only."
    )
    per_minute = models.PositiveIntegerField(
        null=True, blank=True, validators=[MinValueValidator(1)]
    )
    concurrency = models.PositiveIntegerField(
        null=True, blank=True, validators=[MinValueValidator(1)]
    )
    scopes = ArrayField(
        models.CharField(max_length=40),
        default=list,
        blank=True,
        help_text="What the caller's key must have beside tools.",
    )

    class Meta:
        abstract = True


class HttpTool(Reached, Handled):
    """An operation of an HTTP API that an OpenAPI document describes."""

    name = models.CharField(max_length=60, validators=[NAME])
    version = models.PositiveIntegerField(default=1, validators=[MinValueValidator(1)])
    description = models.TextField(
        blank=True, help_text="What the model is told; empty: what the document says."
    )
    document = models.JSONField(help_text="OpenAPI 3, as JSON.")
    operation_id = models.CharField(max_length=200, verbose_name="operationId")
    base_url = models.CharField(
        max_length=500, validators=[URLValidator(schemes=["http", "https"])]
    )

    class Meta:
        ordering = ("name", "version")
        verbose_name = "HTTP tool"
        constraints = (models.UniqueConstraint(fields=("name", "version"), name="http_tool_once"),)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def validate_command(value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
        raise ValidationError('Give a list of texts: ["program", "argument", …].')


def validate_environment(value: Any) -> None:
    if not isinstance(value, dict):
        raise ValidationError('Give an object: {"NAME": "env:NAME"}.')
    for name, reference in value.items():
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValidationError(f"{name!r} is no name of a variable.")
        validate_credential(reference if isinstance(reference, str) else "")


class McpServer(Reached):
    """A server of the Model Context Protocol. Its tools are listed as `<server>_<tool>`."""

    class Transport(models.TextChoices):
        HTTP = "http", "streamable HTTP"
        STDIO = "stdio", "a program, over stdin and stdout"

    name = models.CharField(
        max_length=30,
        unique=True,
        validators=[RegexValidator(r"^[a-z][a-z0-9-]*\Z", "Lower-case letters, digits and -.")],
        help_text="What the names of its tools begin with.",
    )
    transport = models.CharField(max_length=8, choices=Transport, default=Transport.HTTP)
    url = models.CharField(
        max_length=500, blank=True, validators=[URLValidator(schemes=["http", "https"])]
    )
    command = models.JSONField(
        default=list,
        blank=True,
        validators=[validate_command],
        help_text='["program", "argument", …]: run for each call, without a shell.',
    )
    environment = models.JSONField(
        default=dict,
        blank=True,
        validators=[validate_environment],
        help_text='{"NAME": "env:NAME" or "file:/path"}: what the program gets beside PATH, HOME'
        " and the like. References, never secrets.",
    )
    # The last look at what it offers, and what was wrong with it.
    discovered_at = models.DateTimeField(null=True, blank=True, editable=False)
    looked_at = models.DateTimeField(null=True, blank=True, editable=False)
    fault = models.TextField(blank=True, editable=False)

    class Meta:
        ordering = ("name",)
        verbose_name = "MCP server"

    def __str__(self) -> str:
        return self.name


class McpTool(Handled):
    """A tool of an MCP server. What is `pinned` is what models see; it is used while the server
    `offers` the same, told by their hashes."""

    class State(models.TextChoices):
        ON = "on", "on"
        OFF = "off", "switched off"
        NEW = "new", "new: waits for a person"
        CHANGED = "changed", "changed: waits for a person"
        GONE = "gone", "not offered any more"

    server = models.ForeignKey(McpServer, models.CASCADE, related_name="tools")
    # As its server names it.
    name = models.CharField(max_length=128, editable=False)
    state = models.CharField(max_length=8, choices=State, editable=False)
    # {"description", "parameters", "result_schema"}
    pinned = models.JSONField(default=dict, editable=False)
    pinned_hash = models.CharField(max_length=64, blank=True, editable=False)
    offered = models.JSONField(default=dict, editable=False)
    offered_hash = models.CharField(max_length=64, editable=False)
    confirmed_by = models.CharField(max_length=150, blank=True, editable=False)
    confirmed_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        ordering = ("server__name", "name")
        verbose_name = "MCP tool"
        constraints = (models.UniqueConstraint(fields=("server", "name"), name="mcp_tool_once"),)

    def __str__(self) -> str:
        return f"{self.server.name}: {self.name}"
