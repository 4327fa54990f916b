"""What must be true before anything runs: the stores' versions.

Run by `migrate`, `check --database default`, and at the start of workers and dispatcher.
"""

from collections.abc import Sequence
from typing import Any

import redis
from django.apps import AppConfig
from django.core.checks import CheckMessage, Error, Tags, register
from django.db import connection

from llmtasks.stores import redis_client

OLDEST_POSTGRES = (15,)
OLDEST_REDIS = (6, 2)
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
    return f"{name} {info[name]} is too old: use {wanted} or newer (Redis 6.2, Valkey 7.2)"
