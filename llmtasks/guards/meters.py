"""The limiter's script in Redis, and what takes its place while Redis is away.

A command waits 100 ms at the most and is sent once. After a failure nobody asks for a second; then
one caller tries again while the others go on without.
"""

import logging
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

TIMEOUT_S = 0.1
AWAY_S = 1.0
# A command's way through a cluster: every key of ours has this tag.
PLACE = "{limits}:epoch"
SCRIPT = (Path(__file__).parent / "rate_limit.lua").read_text(encoding="utf-8")


class Away(Exception):
    """Redis gave no answer in time."""


@cache
def client() -> redis.Redis:
    """Not the one of `stores`: here nobody waits, and nothing is sent twice."""
    return redis.Redis.from_url(
        settings.REDIS_URL,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        max_connections=1000,
    )


@cache
def script() -> Any:
    return client().register_script(SCRIPT)


class Outage:
    """Whether Redis is taken for away, and who tries next."""

    def __init__(self) -> None:
        self.is_away = False
        self.again_at = float("-inf")
        self.lock = threading.Lock()

    def may_ask(self) -> bool:
        if not self.is_away:
            return True
        with self.lock:
            if time.monotonic() < self.again_at:
                return False
            # This caller tries; the others wait for what it finds.
            self.again_at = time.monotonic() + AWAY_S
            return True

    def found(self, error: Exception | None) -> None:
        was_away, self.is_away = self.is_away, error is not None
        if error is not None:
            self.again_at = time.monotonic() + AWAY_S
        if error is not None and not was_away:
            log.error("the limiter can't reach Redis: local shares", extra={"error": str(error)})
        elif error is None and was_away:
            log.warning("the limiter reaches Redis again")


outage = Outage()


def run(operation: str, keys: Sequence[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """One operation of `rate_limit.lua`. Raises `Away`."""
    if not outage.may_ask():
        raise Away
    # To the script null is not nil.
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        answer = script()(keys=[*keys, PLACE], args=[operation, orjson.dumps(given)])
    except redis.ResponseError as error:
        if not is_passing(error):
            raise
        outage.found(error)
        raise Away from error
    except (redis.RedisError, OSError) as error:
        outage.found(error)
        raise Away from error
    outage.found(None)
    return orjson.loads(answer)  # type: ignore[no-any-return]


def is_passing(error: redis.ResponseError) -> bool:
    """Whether the server says so for a while only: it loads its data, is full, or a replica."""
    return str(error).split(" ")[0] in ("LOADING", "OOM", "READONLY", "MASTERDOWN", "BUSY")
