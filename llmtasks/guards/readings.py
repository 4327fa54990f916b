"""What the limiter's meters show, for people: how close each limit is, what became of each model.

Only looks: nothing is taken, and a meter that is read is as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import redis
from django.conf import settings

from llmtasks.guards import estimates, meters
from llmtasks.guards.meters import Away
from llmtasks.guards.rules import Rule
from llmtasks.models import ApiKey, Limit

# Redis does one thing at a time, and calls wait meanwhile.
MOST_AT_ONCE = 100
# Of a limit that each tenant or key has for itself, those are looked at that were here last.
MOST_EACH = 50
NOBODY = UUID(int=0)
# Calls that failed, and those of them that are tried again.
ERRORS, RETRIES = "{limits}:errors", "{limits}:retries"

# (provider, the vendor's model)
Model = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Use:
    """How much of a limit is used now: in the window that ends now, or at once. `amount` is what
    holds, which the vendor may have made smaller. Of a limit that each has for itself, it is the
    one who is closest to it: `who`."""

    rule: Rule
    used: int
    amount: int
    who: UUID | None = None

    @property
    def share(self) -> float:
        return self.used / self.amount if self.amount else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """A model's breaker (`closed`, `open`, `half_open`; for how long it lets nothing through), for
    how long the vendor wants no call, and what was learnt of it."""

    breaker: str
    open_s: float
    gate_s: float
    tokens_per_byte: float | None
    output_tokens: float | None
    p95_ms: float | None

    @property
    def is_well(self) -> bool:
        return self.breaker == "closed" and self.gate_s <= 0


def uses(rules: Sequence[Rule]) -> list[Use]:
    """One for each rule. Raises `Away`, `django.db.Error`s."""
    latest = latest_callers() if any(rule.each for rule in rules) else []
    asked = [(rule, who) for rule in rules for who in holders(rule, latest)]
    found: dict[int, Use] = {}
    for some in parted(asked):
        keys = [rule.meter(who or NOBODY, who) for rule, who in some]
        wires = [rule.wire() for rule, _ in some]
        rooms = ask(keys, wires, ())["rooms"]
        for (rule, who), (_, used, _, amount) in zip(some, rooms, strict=True):
            use = Use(rule, max(0, int(used)), int(amount), who)
            if rule.id not in found or found[rule.id].share < use.share:
                found[rule.id] = use
    return list(found.values())


def readings(models: Sequence[Model]) -> dict[Model, Reading]:
    """Raises `Away`."""
    found = {}
    for some in parted(models):
        places = ask((), (), [f"{provider}/{model}" for provider, model in some])["places"]
        for model, place in zip(some, places, strict=True):
            found[model] = reading(*place)
    return found


def reading(breaker: str, open_us: float, gate_us: float, *learnt: float) -> Reading:
    tokens_per_byte, output_tokens, p95_ms, _ = estimates.known(learnt)
    return Reading(breaker, open_us / 1e6, gate_us / 1e6, tokens_per_byte, output_tokens, p95_ms)


def ask(keys: Sequence[str], wires: Sequence[bytes], places: Sequence[str]) -> dict[str, Any]:
    arguments = {
        "places": places,
        "horizon": 0,
        "lease": int(settings.LLMTASKS["LEASE_S"] * 1e6),
    }
    return meters.run("room", keys, arguments, wires)


def parted(asked: Sequence[Any]) -> list[Sequence[Any]]:
    return [asked[i : i + MOST_AT_ONCE] for i in range(0, len(asked), MOST_AT_ONCE)]


def latest_callers() -> list[ApiKey]:
    """The keys that were used last, of tenants as different as they are."""
    used = ApiKey.objects.exclude(last_used_at=None)
    return list(used.only("id", "tenant_id").order_by("-last_used_at")[:MOST_EACH])


def holders(rule: Rule, latest: Sequence[ApiKey]) -> set[UUID | None]:
    """Whose meters of a rule are looked at."""
    if not rule.each:
        return {None}
    mine = [key for key in latest if rule.tenant_id in (None, key.tenant_id)]
    return {key.tenant_id if rule.each == Limit.Each.TENANT else key.pk for key in mine}


def errors(name: str = ERRORS) -> dict[tuple[str, str, str], int]:
    """(provider, model, error class) → how many calls ended so since Redis remembers. Raises
    `Away`."""
    if not meters.outage.may_ask():
        raise Away
    try:
        counted: Any = meters.client().hgetall(name)
    except (redis.RedisError, OSError) as error:
        raise Away from error
    found = {}
    for key, number in counted.items():
        place, _, name = key.decode().rpartition(" ")
        provider, _, model = place.partition("/")
        found[provider, model, name] = int(number)
    return found
