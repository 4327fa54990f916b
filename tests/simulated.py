"""The limiter's script on a clock of the test's own, and a vendor that counts what comes in.

Only the time is simulated: the script is the product's, but for the line that reads the clock, and
it runs in the real server. Nothing of it expires by itself meanwhile.
"""

import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from django.conf import settings
from redis import Redis
from uuid_utils.compat import uuid7

from llmtasks.guards import meters, rate_limit, rules
from llmtasks.guards.estimates import Need, Used
from llmtasks.guards.rate_limit import Grant
from llmtasks.guards.rules import Rule
from llmtasks.models import WINDOWS, Limit
from tests.meters import remember, settle_at_once

CLOCK = "{limits}:clock"
SCRIPT = meters.SCRIPT.replace(
    b"redis.call('TIME')", f"redis.call('HMGET', '{CLOCK}', 's', 'us')".encode()
).replace(b"m.life = (", b"m.life = 1000 * (")
START_US = 1_800_000_000_000_000


def rule(
    unit: str, amount: int, window: str = "", burst: int | None = None, number: int = 1
) -> Rule:
    """A limit of the provider `vendor`, without a row."""
    made = datetime.fromtimestamp(0, UTC)
    row = Limit(id=number, unit=unit, amount=amount, window=window, burst=burst, created_at=made)
    return rules.rule_of(row)


@dataclass
class Vendor:
    """Counts calls by their arrival, and knows the most that any window ever held."""

    calls: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    def arrive(self, at_us: int, used: dict[str, int]) -> dict[str, int]:
        """A call; what it returns may be changed until the windows are looked at."""
        bisect.insort(self.calls, (at_us, used), key=lambda call: call[0])
        return used

    def peak(self, unit: str, window_us: int) -> int:
        """The highest sum of a window (t - window, t]."""
        highest = held = first = 0
        for at, used in self.calls:
            held += used[unit]
            while self.calls[first][0] <= at - window_us:
                held -= self.calls[first][1][unit]
                first += 1
            highest = max(highest, held)
        return highest

    def total(self, unit: str, since_us: int, until_us: int) -> int:
        return sum(used[unit] for at, used in self.calls if since_us < at <= until_us)


def units(given: int, made: int) -> dict[str, int]:
    return {"requests": 1, "tokens": given + made, "input_tokens": given, "output_tokens": made}


class Limiter:
    """The limiter under some rules, at a time that the test sets."""

    def __init__(self, redis: Any, held: Sequence[Rule], monkeypatch: pytest.MonkeyPatch) -> None:
        self.redis = redis
        self.rules = held
        self.now_us = START_US
        redis.flushdb()
        name, library = meters.library(SCRIPT)
        monkeypatch.setattr(meters, "NAME", name)
        monkeypatch.setattr(meters, "LIBRARY", library)
        keyed = tuple((one, f"{{limits}}:meter:{one.id}") for one in held)
        monkeypatch.setattr(rules, "holding", lambda *_: keyed)
        # Its clock stands still meanwhile: a slow machine is no outage.
        patient = Redis.from_url(settings.REDIS_URL, socket_timeout=60.0)
        monkeypatch.setattr(meters, "client", lambda: patient)
        monkeypatch.setattr(meters, "_idle", deque())
        settle_at_once(monkeypatch)
        self.set(START_US)
        remember(redis)

    def set(self, now_us: int) -> None:
        assert now_us >= self.now_us
        self.now_us = now_us
        seconds, us = divmod(now_us, 1_000_000)
        self.redis.hset(CLOCK, mapping={"s": seconds, "us": us})

    def grant(
        self,
        need: Need,
        *,
        urgent: bool = False,
        patience_s: float = 2.0,
        has_waited: bool = False,
    ) -> Grant:
        return rate_limit.grant_for(
            uuid7(), "vendor", "m", uuid7(), None, need,
            is_urgent=urgent, is_again=False, left_s=60.0, patience_s=patience_s,
            has_waited=has_waited,
        )  # fmt: skip

    def wait_us(self, grant: Grant) -> int:
        """0 where the call was let through, else how long until it may ask again."""
        answer = meters.run(
            "take", rate_limit.keys_of(grant), rate_limit.asked(grant), rate_limit.reserved(grant)
        )
        if "wait" in answer:
            assert answer["why"] == "limit"
            return int(answer["wait"])
        rate_limit.put_granted(grant, answer, 0.0)
        return 0

    def settle(self, grant: Grant, given: int | None, made: int | None, sent: bool = True) -> None:
        rate_limit.settle(grant, Used(sent, given, made))

    def used(self, one: Rule) -> int:
        """What the meter of a rule holds now."""
        arguments = {"places": [], "horizon": 0}
        answer = meters.run("room", [f"{{limits}}:meter:{one.id}"], arguments, [one.wire()])
        return int(answer["rooms"][0][1])


def window_us(one: Rule) -> int:
    return WINDOWS[one.window] * 1_000_000


def need(given: int, made: int, expected: float = 1.0) -> Need:
    """A reservation of so much, of which a share is expected to be used."""
    return Need(given, made, max(1, int(given * expected)), max(1, int(made * expected)))
