"""What the limiter's meters hold in Redis (`rate_limit.lua`)."""

import struct
from typing import Any

import pytest

from llmtasks.guards import meters

STATE = struct.Struct("<13d")
SUM = 4


def ask_once(redis: Any) -> None:
    """Have the server know the limiter's script: else it would be taken for just started."""
    meters.run("room", (), {"places": (), "horizon": 0})
    redis.delete(meters.PLACE)


def settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent later: what a test looks at next is there."""
    monkeypatch.setattr(
        meters,
        "later",
        lambda operation, keys, given, heard: heard(meters.run(operation, keys, given)),
    )


def used(redis: Any, key: str | bytes) -> int:
    """What a rate's meter counts in its window; 0 where there is none."""
    state = redis.hget(key, "state")
    return int(STATE.unpack(state)[SUM]) if state else 0
