"""What the limiter's meters hold in Redis (`rate_limit.lua`)."""

import struct
from typing import Any

import pytest

from llmtasks.guards import meters

STATE = struct.Struct("<13d")
SUM = 4
BREAKER = struct.Struct("<4d")
OPEN, COOLDOWN_US = 1, 10e6
LEARNT = struct.Struct("<4d")
NONE, OUTPUT, P95 = -1, 1, 2
LONG_AGO = 1


def remember(redis: Any, since_us: int = LONG_AGO) -> None:
    """Redis remembers since then, in this run of the server: nothing waits for what was lost."""
    redis.set(meters.PLACE, f"{redis.info('server')['run_id']} {since_us}")


def remembers_since(redis: Any) -> int:
    """Microseconds of the server's clock."""
    _, since = redis.get(meters.PLACE).split()
    return int(since)


def settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent later: what a test looks at next is there."""

    def at_once(operation: str, *given: Any) -> None:
        *asked, heard = given
        heard(meters.run(operation, *asked))

    monkeypatch.setattr(meters, "later", at_once)


def used(redis: Any, key: str | bytes) -> int:
    """What a rate's meter counts in its window; 0 where there is none."""
    state = redis.hget(key, "state")
    return int(STATE.unpack(state)[SUM]) if state else 0


def open_breaker(redis: Any, place: str, until_us: float) -> None:
    """For a provider's model; where that is over, it lets its first probe through."""
    redis.set(f"{{limits}}:circuit:{place}", BREAKER.pack(OPEN, until_us, COOLDOWN_US, 0))


def learnt(redis: Any, place: str) -> tuple[float, ...]:
    """Tokens a byte, the tokens of an answer, p95 (ms) and the highest tokens a byte of a model;
    `NONE` for what nobody knows."""
    kept = redis.get(f"{{limits}}:learnt:{place}")
    return LEARNT.unpack(kept) if kept else (NONE,) * 4


def put_p95(redis: Any, place: str, ms: float) -> None:
    redis.set(f"{{limits}}:learnt:{place}", LEARNT.pack(NONE, NONE, ms, NONE))
