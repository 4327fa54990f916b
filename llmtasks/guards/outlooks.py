"""What a call that begins now would meet: its limits, the vendor's gate, the breaker, its time.

Only looks, in one round trip: nothing is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from llmtasks.guards import estimates, meters, rate_limit, rules


@dataclass(slots=True)
class Outlook:
    """What a call of a model would meet: how many may begin soon, and in which time most end."""

    calls: float = float("inf")
    p95_ms: float | None = None


def outlooks(
    models: Sequence[tuple[str, str]], tenant_id: UUID, key_id: UUID | None, horizon_s: float
) -> list[Outlook]:
    """What a caller who waits would meet within `horizon_s`, for each (provider, model). Raises
    `Away`, `django.db.Error`s."""
    asked = [
        (index, rule)
        for index, model in enumerate(models)
        for rule in rules.matching(*model, tenant_id, key_id)
    ]
    answer = meters.run(
        "room",
        [rule.meter(tenant_id, key_id) for _, rule in asked],
        {
            # Nothing is kept back from who waits.
            "urgent": True,
            "places": [f"{provider}/{model}" for provider, model in models],
            "horizon": int(horizon_s * 1e6),
            "lease": rate_limit.lease_us(),
        },
        [rule.wire() for _, rule in asked],
    )
    found = [outlook(horizon_s, *place) for place in answer["places"] or ()]
    for (index, rule), (free, _, mean, amount) in zip(asked, answer["rooms"] or (), strict=True):
        # A call that is larger than the limit takes all of it.
        a_call = min(mean if mean > 0 else rate_limit.usual(rule), amount, rule.burst)
        found[index].calls = min(found[index].calls, max(0.0, free / max(a_call, 1.0)))
    return found


def outlook(
    horizon_s: float, state: str, open_us: float, gate_us: float, *learnt: float
) -> Outlook:
    """Of a model's breaker and gate, and what was learnt of it."""
    _, _, p95_ms, _ = estimates.known(learnt)
    is_open = state == "closed" and gate_us <= horizon_s * 1e6
    return Outlook(float("inf") if is_open else 0.0, p95_ms)
