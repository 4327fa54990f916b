"""Where work in mode `auto` runs: in the caller's request where an answer can be expected in the
time that he waits, else in the queue. Decided once, at the start.

    is it for now → has this process a thread → has a candidate room → does it answer in time

The first candidate that has room decides. What is known of it is what the limiter knows: its
limits, gate and breaker, and the time in which 95 % of its calls end; of a model that nobody
called yet the best is hoped. A look is kept for a moment; what is decided meanwhile is taken off.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from llmtasks import pulse, routing
from llmtasks.guards import outlooks, rate_limit
from llmtasks.guards.meters import Away
from llmtasks.guards.outlooks import Outlook
from llmtasks.models import Kind, Lane
from llmtasks.submit import Work

# The threads of this web process, where it is one that serves with threads.
threads: int | None = None
# The share of them that calls under way may hold: beyond it more work is queued.
SHARE = 0.75
# An inline call may wait so long for its limits; queued work waits longer, and in its turn.
HORIZON_S = 1.0
KEPT_S = 0.25
MOST_KEPT = 1000

# (provider, the vendor's model)
Model = tuple[str, str]


@dataclass(slots=True)
class Look:
    at: float
    outlooks: list[Outlook]


_looks: dict[Any, Look] = {}


def runs_inline(work: Work, wait_s: float) -> bool:
    """Whether work in mode `auto`, whose caller waits so long, runs in this request. Raises
    `InvalidInput` for a model that is none, `django.db.Error`s."""
    is_a_call = work.kind in (Kind.CHAT, Kind.EMBEDDING)
    is_for_now = is_a_call and work.run_at is None and work.lane != Lane.BULK and not work.stream
    if not is_for_now or wait_s <= 0 or is_busy():
        return False
    route = routing.find(work.request.model, work.kind)
    able = routing.supporting(route, work.request)
    models = [(c.provider, c.model) for c in able if c.is_usable]
    for outlook in look(models, work.tenant_id, work.key_id):
        if outlook.calls >= 1:
            outlook.calls -= 1
            return outlook.p95_ms is None or outlook.p95_ms <= wait_s * 1000
    return False


def is_busy() -> bool:
    """Whether calls under way hold most of this process's threads."""
    return threads is not None and len(pulse.start().calls) >= SHARE * threads


def look(models: Sequence[Model], tenant_id: UUID, key_id: UUID | None) -> list[Outlook]:
    """What a call of each model would meet now. While Redis is away nobody knows; queued work
    could not be released either."""
    who, now = (tuple(models), tenant_id, key_id), time.monotonic()
    known = _looks.get(who)
    if known is None or now - known.at > KEPT_S:
        try:
            found = outlooks.outlooks(models, tenant_id, key_id, HORIZON_S)
        except Away:
            found = [Outlook(p95_ms=rate_limit.stats_of(*model).p95_ms) for model in models]
        if len(_looks) >= MOST_KEPT:
            _looks.clear()
        known = _looks[who] = Look(now, found)
    return known.outlooks
