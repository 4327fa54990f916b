"""The limiter: all limits of a call at once or none, before it is sent.

    need → acquire → (the call) → settle

The rules are `rules.py`, the arithmetic is `rate_limit.lua`, one step on Redis's clock for a call
and one after it. A call reserves what it may use and is settled to what it did use. While Redis is
away each process keeps to its own share for those who wait, and background work pauses.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from django.conf import settings

from llmtasks.guards import breaker, meters, rules, seeds, shares
from llmtasks.guards.meters import Away
from llmtasks.guards.rules import Rule
from llmtasks.models import Limit

log = logging.getLogger(__name__)

# Before a model's calls told better: tokens a byte of JSON, and the length of an answer.
TOKENS_PER_BYTE = 0.3
ASSUMED_OUTPUT = 1024
# How much more than expected is reserved where the caller set no limit of its own.
INPUT_MARGIN = 1.1
OUTPUT_MARGIN = 2.0
# A grant is remembered for so long beyond its call's deadline.
REMEMBERED_S = 60.0
AWAY_WAIT_S = 1.0
# Waits shorter than this gain nothing.
LEAST_WAIT_S = 0.002


@dataclass(frozen=True, slots=True)
class Stats:
    """What was learnt of a model from its calls; None before the first."""

    tokens_per_byte: float | None = None
    output_tokens: float | None = None
    p95_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What a call reserves, and what it is expected to use."""

    input_tokens: int
    output_tokens: int
    expected_input: int
    expected_output: int

    def of(self, unit: str) -> tuple[int, int]:
        """(reserved, expected) of a limit's unit."""
        if unit == Limit.Unit.TOKENS:
            return (
                self.input_tokens + self.output_tokens,
                self.expected_input + self.expected_output,
            )
        if unit == Limit.Unit.INPUT_TOKENS:
            return self.input_tokens, self.expected_input
        if unit == Limit.Unit.OUTPUT_TOKENS:
            return self.output_tokens, self.expected_output
        return 1, 1


@dataclass(frozen=True, slots=True)
class Used:
    """What a call did use. `is_sent`: whether anything reached the vendor; where nothing did,
    all is given back. Tokens are None where nobody knows: the reservation stands."""

    is_sent: bool = True
    input_tokens: int | None = None
    output_tokens: int | None = None

    def of(self, unit: str, reserved: int) -> int:
        if not self.is_sent:
            return 0
        known = {
            Limit.Unit.REQUESTS: 1,
            Limit.Unit.INPUT_TOKENS: self.input_tokens,
            Limit.Unit.OUTPUT_TOKENS: self.output_tokens,
            Limit.Unit.TOKENS: None
            if self.input_tokens is None or self.output_tokens is None
            else self.input_tokens + self.output_tokens,
        }.get(Limit.Unit(unit))
        return reserved if known is None else known


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
    """What one call asks for, and once it is granted what it holds."""

    attempt_id: UUID
    provider: str
    model: str
    meters: list[Meter]
    is_urgent: bool
    is_again: bool
    left_s: float
    at: str = ""
    is_local: bool = False
    is_probe: bool = False

    @property
    def place(self) -> str:
        return f"{self.provider}/{self.model}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not before `wait_s`. `why`: `limit` (then which), `gate` (the vendor's Retry-After),
    `breaker`, `retries` (too many calls again), `away` (Redis)."""

    wait_s: float
    why: str
    rule: Rule | None = None


_stats: dict[str, Stats] = {}


def stats_of(provider: str, model: str) -> Stats:
    """What was learnt of the model, as the last grant in this process told."""
    return _stats.get(f"{provider}/{model}", Stats())


def need_of(provider: str, model: str, input_bytes: int, max_output: int | None) -> Need:
    """What a call of so many bytes reserves; `max_output` is the caller's own limit."""
    known = stats_of(provider, model)
    expected_input = int(input_bytes * (known.tokens_per_byte or TOKENS_PER_BYTE)) + 1
    usual = known.output_tokens or ASSUMED_OUTPUT
    expected_output = int(usual if max_output is None else min(usual, max_output))
    return Need(
        input_tokens=int(expected_input * INPUT_MARGIN),
        output_tokens=int(usual * OUTPUT_MARGIN) if max_output is None else max_output,
        expected_input=expected_input,
        expected_output=expected_output,
    )


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
) -> Grant:
    """What a call has to ask for. `is_urgent`: somebody waits for it. `is_again`: it repeats one
    that failed."""
    held = [
        Meter(rule, rule.meter(tenant_id, key_id), *need.of(rule.unit))
        for rule in rules.matching(provider, model, tenant_id, key_id)
    ]
    return Grant(attempt_id, provider, model, held, is_urgent, is_again, left_s)


def acquire(grant: Grant) -> Refusal | None:
    """Take all limits of the call, or none: then when to ask again. Asking twice for one attempt
    takes once."""
    arguments = {
        "attempt": str(grant.attempt_id),
        "place": grant.place,
        "provider": grant.provider,
        "urgent": grant.is_urgent,
        "again": grant.is_again,
        "life": int((max(grant.left_s, 0.0) + REMEMBERED_S) * 1e6),
        "lease": lease_us(),
        "meters": [meter.rule.wire(meter.need, meter.pace) for meter in grant.meters],
    }
    keys = [meter.key for meter in grant.meters]
    try:
        answer = meters.run("take", keys, arguments)
        while "seed" in answer:
            seed(grant, arguments, answer["seed"] - 1)
            answer = meters.run("take", keys, arguments)
    except Away:
        return acquire_locally(grant)
    if "wait" in answer:
        return refusal(grant, answer)
    put_granted(grant, answer)
    return None


def lease_us() -> int:
    return int(settings.LLMTASKS["LEASE_S"] * 1e6)


def seed(grant: Grant, arguments: dict[str, Any], index: int) -> None:
    """Tell Redis what Postgres knows of a day's use. Raises `Away`, `OperationalError`."""
    meter = grant.meters[index]
    used = seeds.used(meter.rule, meter.key)
    meters.run("seed", [meter.key], {"meters": [arguments["meters"][index]], "used": used})


def refusal(grant: Grant, answer: dict[str, Any]) -> Refusal:
    index = answer.get("index")
    rule = None if index is None else grant.meters[index - 1].rule
    return Refusal(max(answer["wait"] / 1e6, LEAST_WAIT_S), answer["why"], rule)


def put_granted(grant: Grant, answer: dict[str, Any]) -> None:
    grant.at = answer["at"]
    grant.is_probe = bool(answer["probe"])
    for meter, (need, pace, left, reset_us) in zip(
        grant.meters, answer["meters"] or (), strict=False
    ):
        meter.need, meter.pace, meter.left, meter.reset_s = need, pace, left, reset_us / 1e6
    _stats[grant.place] = Stats(*(float(value) if value else None for value in answer["stats"]))
    leases.hold(grant)
    if event := answer.get("event"):
        breaker.record(grant.provider, grant.model, event)


def acquire_locally(grant: Grant) -> Refusal | None:
    """This process's share of each limit, while Redis is away."""
    if not (grant.is_urgent and meters.outage.is_away):
        return Refusal(meters.AGAIN_S if grant.is_urgent else AWAY_WAIT_S, "away")
    wait_s = shares.take(grant.attempt_id, [(m.key, m.rule, m.pace) for m in grant.meters])
    if wait_s > 0:
        return Refusal(wait_s, "limit")
    grant.is_local = True
    return None


def settle(
    grant: Grant,
    used: Used,
    *,
    health: str = "",
    error: str = "",
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
    is_known = ms is not None and used.input_tokens is not None
    arguments = {
        "attempt": str(grant.attempt_id),
        "place": grant.place,
        "at": grant.at,
        "lease": lease_us(),
        "meters": [settled(meter, used, told) for meter in grant.meters],
        "health": health,
        "gate": int(gate_s * 1e6),
        "error": error or None,
        "ms": ms,
        "ratio": (used.input_tokens or 0) / input_bytes if is_known and input_bytes else None,
        "output": used.output_tokens if is_known else None,
    }
    try:
        answer = meters.run("settle", [meter.key for meter in grant.meters], arguments)
    except Away:
        # The reservation falls out of its window, the lease runs out.
        return
    if event := answer.get("event"):
        breaker.record(grant.provider, grant.model, event, error)


def settled(meter: Meter, used: Used, told: Sequence[Told]) -> dict[str, Any]:
    rule = meter.rule
    wire = rule.wire(meter.need, meter.pace) | {"used": used.of(rule.unit, meter.need)}
    if rule.provider and rule.tenant_id is None and rule.window == Limit.Window.MINUTE:
        for said in told:
            if said.unit == rule.unit:
                wire |= {"told": [said.limit, said.left], "limit": rule.amount}
    return wire


@dataclass
class Leases:
    """The calls at once that this process holds, renewed while they run: those of a process that
    died run out."""

    held: dict[UUID, list[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    def hold(self, grant: Grant) -> None:
        keys = [meter.key for meter in grant.meters if not meter.rule.per_us]
        if not keys:
            return
        self.held[grant.attempt_id] = keys
        # After a fork the thread is the parent's.
        if self.thread is None or not self.thread.is_alive():
            with self.lock:
                if self.thread is None or not self.thread.is_alive():
                    self.thread = threading.Thread(target=self.run, name="leases", daemon=True)
                    self.thread.start()

    def drop(self, attempt_id: UUID) -> None:
        self.held.pop(attempt_id, None)

    def run(self) -> None:
        while True:
            time.sleep(settings.LLMTASKS["RENEW_S"])
            try:
                self.renew()
            except Away:
                continue
            except Exception:
                log.exception("the leases of calls under way can't be renewed")

    def renew(self) -> None:
        """Raises `Away`."""
        pairs = [(key, str(attempt)) for attempt, keys in list(self.held.items()) for key in keys]
        if pairs:
            keys = [key for key, _ in pairs]
            attempts = [attempt for _, attempt in pairs]
            meters.run("renew", keys, {"attempts": attempts, "lease": lease_us()})


leases = Leases()


# --- What the dispatcher and people ask -----------------------------------------------------------


def rooms(
    models: Sequence[tuple[str, str]], tenants: Sequence[UUID], horizon_s: float
) -> tuple[dict[tuple[str, str], float], dict[UUID, float]]:
    """How many more background calls may begin within `horizon_s`, for (provider, model) and for
    tenants. What is missing has no limit. Raises `Away`."""
    known = rules.rules()
    asked: list[tuple[Any, str, Rule]] = []
    for provider, model in models:
        for rule in known.of_provider.get(provider, ()):
            if rule.model in ("", model) and not (rule.tenant_id or rule.key_id or rule.each):
                asked.append(((provider, model), rule.meter(NOBODY, None), rule))
    for tenant in tenants:
        for rule in known.others:
            is_whole = not rule.key_id and rule.each != Limit.Each.KEY
            if rule.tenant_id in (None, tenant) and is_whole:
                asked.append((tenant, rule.meter(tenant, None), rule))
    places = [f"{provider}/{model}" for provider, model in models]
    answer = meters.run(
        "room",
        [key for _, key, _ in asked],
        {
            "meters": [rule.wire(0, 0) for _, _, rule in asked],
            "places": places,
            "horizon": int(horizon_s * 1e6),
            "lease": lease_us(),
        },
    )
    found: dict[Any, float] = {}
    for (who, _, rule), (free, _, mean, _) in zip(asked, answer["rooms"] or (), strict=True):
        a_call = mean if mean > 0 else usual(rule)
        found[who] = min(found.get(who, float("inf")), max(0.0, free / max(a_call, 1.0)))
    for who, (state, open_us, gate_us, *_) in zip(models, answer["places"] or (), strict=True):
        is_open = state == "open" and open_us > horizon_s * 1e6
        if is_open or gate_us > horizon_s * 1e6:
            found[who] = 0.0
    return {w: n for w, n in found.items() if isinstance(w, tuple)}, {
        w: n for w, n in found.items() if isinstance(w, UUID)
    }


NOBODY = UUID(int=0)


def usual(rule: Rule) -> float:
    """What a call uses of a limit before anybody knows."""
    is_plain = rule.unit in (Limit.Unit.REQUESTS, Limit.Unit.CONCURRENCY)
    return 1.0 if is_plain else ASSUMED_OUTPUT


def is_degraded() -> bool:
    """Whether this process keeps to its local share since Redis is away."""
    return meters.outage.is_away
