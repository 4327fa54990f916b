"""How many calls the limits have room for: what the dispatcher asks before it releases work."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from llmtasks.guards import estimates, meters, rules
from llmtasks.guards.rules import Rule
from llmtasks.models import Limit

NOBODY = UUID(int=0)
# (provider, the vendor's model)
Model = tuple[str, str]
Asked = tuple[Model | UUID, str, Rule]


def rooms(
    models: Sequence[Model], tenants: Sequence[UUID], horizon_s: float, is_urgent: bool = False
) -> tuple[dict[Model, float], dict[UUID, float]]:
    """How many more calls may begin within `horizon_s`, for (provider, model) and for tenants: in
    the background, or (`is_urgent`) for people, from whom nothing is kept back. What is missing has
    no limit. Raises `Away`."""
    asked = [*of_models(models), *of_tenants(tenants)]
    if not (asked or models):
        return {}, {}
    answer = meters.run(
        "room",
        [key for _, key, _ in asked],
        {
            "places": [f"{provider}/{model}" for provider, model in models],
            "horizon": int(horizon_s * 1e6),
            "urgent": is_urgent,
        },
        [rule.wire() for _, _, rule in asked],
    )
    found: dict[Any, float] = {}
    for (who, _, rule), (free, _, mean, _) in zip(asked, answer["rooms"] or (), strict=True):
        a_call = mean if mean > 0 else estimates.usual(rule.unit)
        found[who] = min(found.get(who, float("inf")), max(0.0, free / max(a_call, 1.0)))
    for who, (state, open_us, gate_us, *_) in zip(models, answer["places"] or (), strict=True):
        is_open = state == "open" and open_us > horizon_s * 1e6
        if is_open or gate_us > horizon_s * 1e6:
            found[who] = 0.0
    return {w: n for w, n in found.items() if isinstance(w, tuple)}, {
        w: n for w, n in found.items() if isinstance(w, UUID)
    }


def of_models(models: Sequence[Model]) -> list[Asked]:
    """The meters that hold for all calls of a model."""
    known = rules.rules()
    return [
        ((provider, model), rule.meter(NOBODY, None), rule)
        for provider, model in models
        for rule in known.of_provider.get(provider, ())
        if rule.model in ("", model) and not (rule.tenant_id or rule.key_id or rule.each)
    ]


def of_tenants(tenants: Sequence[UUID]) -> list[Asked]:
    """The meters that hold for all calls of a tenant, whatever the model."""
    known = rules.rules()
    return [
        (tenant, rule.meter(tenant, None), rule)
        for tenant in tenants
        for rule in (*known.of_caller.get(None, ()), *known.of_caller.get(tenant, ()))
        if rule.each != Limit.Each.KEY
    ]
