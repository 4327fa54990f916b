"""What must be true before anything runs: the stores' versions, a configuration that makes sense.

Run by `migrate` and `check --database default`; Redis's version at the start of workers and
dispatcher.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis
from django.apps import AppConfig
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ValidationError
from django.db import ProgrammingError, connection

from llmtasks.models import Limit, Route, RouteCandidate
from llmtasks.stores import redis_client

OLDEST_POSTGRES = (15,)
OLDEST_REDIS = (7, 0)
OLDEST_VALKEY = (7, 2)


@register(Tags.database)
def postgres_version(
    *, app_configs: Sequence[AppConfig] | None, databases: Sequence[str] | None, **_: Any
) -> list[CheckMessage]:
    if not databases:
        return []
    found = connection.cursor().connection.info.server_version // 10_000
    if (found,) >= OLDEST_POSTGRES:
        return []
    return [
        Error(
            f"PostgreSQL {found} is too old", hint="Use PostgreSQL 15 or newer.", id="llmtasks.E001"
        )
    ]


@register(Tags.database)
def configuration(
    *, app_configs: Sequence[AppConfig] | None, databases: Sequence[str] | None, **_: Any
) -> list[CheckMessage]:
    """Routes and limits that can't work as they are, by name. The admin makes none, but may have
    deleted what they need."""
    if not databases:
        return []
    try:
        return [*routes_found(), *limits_found()]
    except ProgrammingError:
        # Before the first migration, or a later one, there are no such tables.
        return []


def routes_found() -> Iterator[CheckMessage]:
    rows = {row.pk: row for row in Route.objects.filter(is_active=True)}
    filled = set(RouteCandidate.objects.values_list("route_id", flat=True))
    for row in rows.values():
        chain, wrong = followed(row, rows)
        if wrong:
            yield Warning(
                f"route {row.name!r}: {wrong}",
                hint="Choose another fallback for one of them, or none.",
                id="llmtasks.W002",
            )
        if not filled & {route.pk for route in chain}:
            yield Warning(
                f"route {row.name!r} has no candidates",
                hint="Add one in the admin, or switch the route off: its calls are refused.",
                id="llmtasks.W001",
            )


def followed(row: Route, rows: Mapping[int, Route]) -> tuple[list[Route], str]:
    """The route and what it falls back to, and what is wrong with that."""
    chain = [row]
    while (next_ := rows.get(chain[-1].fallback_id or 0)) is not None:
        names = " → ".join(route.name for route in [*chain, next_])
        if next_ in chain:
            return chain, f"its fallback leads back: {names}"
        if next_.kind != row.kind:
            return chain, f"it is for {row.kind}, its fallback for {next_.kind}: {names}"
        chain.append(next_)
    return chain, ""


def limits_found() -> Iterator[CheckMessage]:
    for row in Limit.objects.select_related("provider", "tenant", "key"):
        try:
            row.clean()
        except ValidationError as error:
            for field, messages in error.message_dict.items():
                yield Warning(
                    f"limit {row.pk} ({row}): {field}",
                    hint=" ".join(messages),
                    id="llmtasks.W003",
                )


def redis_version() -> str | None:
    """What is wrong with the Redis or Valkey server, or None. A server that is away is not
    wrong: work waits for it."""
    try:
        info: Any = redis_client().info("server")
    except redis.RedisError:
        return None
    name, oldest = "redis_version", OLDEST_REDIS
    if "valkey_version" in info:
        name, oldest = "valkey_version", OLDEST_VALKEY
    found = tuple(int(part) for part in str(info[name]).split(".")[:2])
    if found >= oldest:
        return None
    wanted = ".".join(map(str, oldest))
    return f"{name} {info[name]} is too old: use {wanted} or newer (Redis 7.0, Valkey 7.2)"
