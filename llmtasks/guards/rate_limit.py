"""The limiter: all limits of a call at once or none, before it is sent.

    need → acquire → (freshen, right before the call) → settle

The rules are `rules.py`, the arithmetic is `rate_limit.lua`, one step on Redis's clock for a call
and one after it. A call reserves what it may use (`estimates.py`) and is settled to what it did
use. While Redis is away each process keeps to its own share (`shares.py`) for those who wait, and
background work pauses.
"""

import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from llmtasks.guards import breaker, estimates, meters, rules, seeds, shares
from llmtasks.guards.estimates import NONE, Need, Used, need_of, stats_of
from llmtasks.guards.leases import Leases, times
from llmtasks.guards.meters import Away
from llmtasks.guards.rooms import rooms
from llmtasks.guards.rules import UNTOLD, Rule

__all__ = [
    "Grant",
    "Leases",
    "Meter",
    "Need",
    "Refusal",
    "Told",
    "Used",
    "acquire",
    "freshen",
    "grant_for",
    "is_degraded",
    "need_of",
    "rooms",
    "settle",
    "stats_of",
]

# A grant is remembered for so long beyond its call's deadline.
REMEMBERED_S = 60.0
AWAY_WAIT_S = 1.0
# Waits shorter than this gain nothing.
LEAST_WAIT_S = 0.002
# What the script packs: when a call was let through and how long ago that is (us); what each meter
# gave it (need, pace, left, reset_us); what was learnt of its model, as `Stats` has it.
SINCE, GIVEN, LEARNT = struct.Struct("<2d"), struct.Struct("<4d"), struct.Struct("<4d")


@dataclass(frozen=True, slots=True)
class Told:
    """What a vendor's headers say of one unit: its limit a minute, and what is left of it."""

    unit: str
    limit: int
    left: int


@dataclass(slots=True)
class Meter:
    """One rule's meter in a grant. `left` and `reset_s` are as the grant found them."""

    rule: Rule
    key: str
    need: int
    pace: int
    left: int = 0
    reset_s: float = 0.0


@dataclass(slots=True)
class Grant:
    """What one call asks for, and once it is granted what it holds. `patience_s` is how long its
    caller would wait. A call that goes out after `fresh_until` (monotonic) must be freshened."""

    attempt_id: UUID
    provider: str
    model: str
    need: Need
    meters: list[Meter]
    is_urgent: bool
    is_again: bool
    left_s: float
    patience_s: float
    has_waited: bool = False
    at: int = 0
    fresh_until: float = float("inf")
    is_local: bool = False
    is_probe: bool = False

    @property
    def place(self) -> str:
        return f"{self.provider}/{self.model}"

    @property
    def life_ms(self) -> int:
        return int((max(self.left_s, 0.0) + REMEMBERED_S) * 1000)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not before `wait_s`. `why`: `limit` (then which), `gate` (the vendor's Retry-After),
    `breaker`, `retries` (too many calls again), `away` (Redis)."""

    wait_s: float
    why: str
    rule: Rule | None = None


def grant_for(
    attempt_id: UUID,
    provider: str,
    model: str,
    tenant_id: UUID,
    key_id: UUID | None,
    need: Need,
    *,
    is_urgent: bool,
    is_again: bool,
    left_s: float,
    patience_s: float | None = None,
    has_waited: bool = False,
) -> Grant:
    """What a call has to ask for. `is_urgent`: somebody waits for it. `is_again`: it repeats one
    that failed. `patience_s` is `left_s` where it is not given. `has_waited`: it was refused
    before, and asks again when it was told to."""
    held = [
        Meter(rule, key, *need.of(rule.unit))
        for rule, key in rules.holding(provider, model, tenant_id, key_id)
    ]
    patience_s = left_s if patience_s is None else patience_s
    return Grant(
        attempt_id, provider, model, need, held, is_urgent, is_again, left_s, patience_s, has_waited
    )  # fmt: skip


def acquire(grant: Grant) -> Refusal | None:
    """Take all limits of the call, or none: then when to ask again. Asking twice for one attempt
    takes once."""
    arguments, keys, wires = asked(grant), keys_of(grant), reserved(grant)
    began = time.monotonic()
    try:
        answer = meters.run("take", keys, arguments, wires)
        while "seed" in answer:
            seed(grant.meters[answer["seed"] - 1])
            answer = meters.run("take", keys, arguments, wires)
    except Away:
        return acquire_locally(grant)
    if "wait" in answer:
        return refusal(grant, answer)
    put_granted(grant, answer, began)
    return None


def asked(grant: Grant) -> dict[str, Any]:
    """What the script is asked for a call."""
    return {
        "attempt": str(grant.attempt_id),
        "place": grant.place,
        "provider": grant.provider,
        "urgent": grant.is_urgent,
        "again": grant.is_again,
        "waited": grant.has_waited,
        "life": grant.life_ms,
        "patience": int(max(grant.patience_s, 0.0) * 1e6),
        # After that every settlement tells them.
        "stats": not estimates.has_stats(grant.place),
        **times(),
    }


def keys_of(grant: Grant) -> list[str]:
    return [meter.key for meter in grant.meters]


def reserved(grant: Grant) -> list[bytes]:
    return [meter.rule.wire(meter.need, meter.pace) for meter in grant.meters]


def seed(meter: Meter) -> None:
    """Tell Redis what Postgres knows of a meter's use. Raises `Away`, `OperationalError`."""
    known = seeds.used(meter.rule, meter.key)
    meters.run("seed", [meter.key], known, [meter.rule.wire(meter.need, meter.pace)])


def refusal(grant: Grant, answer: dict[str, Any]) -> Refusal:
    index = answer.get("index")
    rule = None if index is None else grant.meters[index - 1].rule
    return Refusal(max(answer["wait"] / 1e6, LEAST_WAIT_S), answer["why"], rule)


def put_granted(grant: Grant, answer: dict[str, Any], began: float) -> None:
    packed = answer["packed"]
    grant.is_probe = answer.get("probe", False)
    given = GIVEN.iter_unpack(packed[SINCE.size :])
    for meter, (need, pace, left, reset_us) in zip(grant.meters, given, strict=True):
        meter.need, meter.pace, meter.left = int(need), int(pace), int(left)
        meter.reset_s = reset_us / 1e6
    put_at(grant, packed, began)
    if stats := answer.get("stats"):
        estimates.put_stats(grant.place, stats)
    leases.hold(grant.attempt_id, (m.key for m in grant.meters if not m.rule.per_us))
    if event := answer.get("event"):
        breaker.record(grant.provider, grant.model, event)


def put_at(grant: Grant, packed: bytes, began: float) -> None:
    """When it was let through, and for how long it is fresh: half of what a limit allows for may
    pass until the call goes out, half of it on the way."""
    at, age_us = SINCE.unpack_from(packed)
    grant.at = int(at)
    # An answer that was lost had let it through before.
    began -= age_us / 1e6
    slack_us = min((m.rule.slack_us for m in grant.meters if m.rule.per_us), default=0)
    grant.fresh_until = began + slack_us / 2e6 if slack_us else float("inf")


def acquire_locally(grant: Grant) -> Refusal | None:
    """This process's share of each limit, while Redis is away."""
    if not (grant.is_urgent and meters.outage.is_away):
        return Refusal(meters.AGAIN_S if grant.is_urgent else AWAY_WAIT_S, "away")
    wait_s = shares.take(grant.attempt_id, [(m.key, m.rule, m.pace) for m in grant.meters])
    if wait_s > 0:
        return Refusal(wait_s, "limit")
    grant.is_local = True
    return None


def freshen(grant: Grant) -> Refusal | None:
    """Right before the call: one that was held up since it was let through counts from now. Only
    where so much time has passed that its window is another one can it be refused."""
    began = time.monotonic()
    if began < grant.fresh_until or not grant.at:
        return None
    arguments = {"attempt": str(grant.attempt_id), "life": grant.life_ms}
    try:
        answer = meters.run("move", keys_of(grant), arguments, reserved(grant))
    except Away:
        return None
    if "wait" in answer:
        return refusal(grant, answer)
    put_at(grant, answer["packed"], began)
    return None


def settle(
    grant: Grant,
    used: Used,
    *,
    health: str = "",
    error: str = "",
    is_retried: bool = False,
    gate_s: float = 0.0,
    told: Sequence[Told] = (),
    ms: float | None = None,
    input_bytes: int = 0,
) -> None:
    """Replace what the call reserved by what it used, and tell how it went. Never raises.

    `health` is `ok` or `fault`, or empty for what says nothing of the vendor. `gate_s` closes the
    vendor's gate. `ms` (how long it took) and `input_bytes` are learnt from, where it succeeded.
    """
    if grant.is_local:
        shares.give_back(grant.attempt_id)
        return
    if not grant.at:
        return
    leases.drop(grant.attempt_id)
    # Nothing is learnt of what is 0.
    is_known = ms is not None and used.input_tokens is not None
    arguments = {
        "attempt": str(grant.attempt_id),
        "place": grant.place,
        "at": grant.at,
        "urgent": grant.is_urgent,
        "health": health,
        "gate": int(gate_s * 1e6),
        "error": error,
        "retried": is_retried,
        "ms": NONE if ms is None else ms,
        "ratio": (used.input_tokens or 0) / input_bytes if is_known and input_bytes else 0,
        "output": (used.output_tokens or 0) if is_known else 0,
    }
    keys, wires = keys_of(grant), [settled(grant, meter, used, told) for meter in grant.meters]

    def heard(answer: dict[str, Any]) -> None:
        if packed := answer["packed"]:
            estimates.put_stats(grant.place, LEARNT.unpack(packed))
        if event := answer.get("event"):
            breaker.record(grant.provider, grant.model, event, error)

    if not (error or gate_s or health == "fault" or grant.is_probe):
        meters.later("settle", keys, arguments, wires, heard)
        return
    # What may keep others from calling is told before anything else is done. Where it can't be,
    # the reservation falls out of its window and the lease runs out.
    with suppress(Away):
        heard(meters.run("settle", keys, arguments, wires))


def settled(grant: Grant, meter: Meter, used: Used, told: Sequence[Told]) -> bytes:
    rule = meter.rule
    limit = UNTOLD
    if rule.is_told:
        for said in told:
            if said.unit == rule.unit:
                limit = said.limit, said.left
    return rule.wire(meter.need, meter.pace, used.of(rule.unit, meter.need, grant.need), limit)


leases = Leases()


def is_degraded() -> bool:
    """Whether this process keeps to its local share since Redis is away."""
    return meters.outage.is_away


def lease_us() -> int:
    return int(times()["lease"])


def usual(rule: Rule) -> float:
    """What a call uses of a limit before anybody knows."""
    return estimates.usual(rule.unit)
