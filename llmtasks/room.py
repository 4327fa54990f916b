"""How much may be released: a window of the workers' slots, and what the limits have room for.

window   per provider and lane: a share of the lane's slots, less what is outstanding there
route    what its usable candidates may begin within HORIZON_S, less what was released for it
         and has not begun
tenant   what its own limits allow, less the same

The lane for people has room of its own: what is kept back from background work is for them, and
what is released of that stands behind them at the limiter too.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from django.conf import settings

from llmtasks import queues, routing, stores
from llmtasks.models import Lane
from llmtasks.stores import fetch
from llmtasks.turns import Head, Place

# Released ahead: a worker that has a hint in hand waits this long for the limiter at the most.
HORIZON_S = 2.0
UNLIMITED = float("inf")
URGENT = (str(Lane.INTERACTIVE),)

WORKERS = """
SELECT lane, sum(slots), jsonb_agg(queues) FROM llmtasks_worker
WHERE role = 'worker' AND lease_until > statement_timestamp() GROUP BY lane
"""

# What a dead process ran holds no slot of those that are counted. What was claimed and has not
# begun an attempt may still wait for the limiter.
OUTSTANDING = """
SELECT provider, lane, route, count(*),
    count(*) FILTER (WHERE status = 'queued' OR attempts = 0)
FROM llmtasks_task
WHERE status IN ('queued', 'running') AND mode = 'queued' AND (
    status = 'queued' OR owner_id IN (
        SELECT id FROM llmtasks_worker WHERE lease_until > statement_timestamp()))
GROUP BY provider, lane, route
"""

UNBEGUN = """
SELECT tenant_id, count(*) FROM llmtasks_task
WHERE status IN ('queued', 'running') AND mode = 'queued' AND (status = 'queued' OR attempts = 0)
    AND tenant_id = ANY(%(tenants)s) AND lane = ANY(%(lanes)s)
GROUP BY tenant_id
"""

# (provider, the vendor's model): what a candidate calls.
Model = tuple[str, str]
# (lane, route)
Stream = tuple[str, str]
# Asks the limits for models and tenants within so many seconds, and whether for people:
# `rate_limit.rooms`.
Limits = Callable[
    [Sequence[Model], Sequence[UUID], float, bool], tuple[dict[Model, float], dict[UUID, float]]
]


def no_limits(
    models: Sequence[Model], tenants: Sequence[UUID], horizon_s: float, is_urgent: bool
) -> tuple[dict[Model, float], dict[UUID, float]]:
    return {}, {}


@dataclass(frozen=True, slots=True)
class Windows:
    """`free`: how many more tasks may be outstanding at each place that is served and not full.
    `unbegun`: released tasks by lane and route that have not begun a call."""

    free: dict[Place, int]
    is_full: bool
    unbegun: dict[Stream, int]


def windows() -> Windows:
    outstanding: dict[Place, int] = {}
    unbegun: dict[Stream, int] = {}
    for provider, lane, route, count, pending in fetch(OUTSTANDING):
        place = (provider, lane)
        outstanding[place] = outstanding.get(place, 0) + count
        unbegun[lane, route] = unbegun.get((lane, route), 0) + pending
    free = {}
    for place, most in served().items():
        free[place] = most - outstanding.get(place, 0)
    return Windows(
        free={place: count for place, count in free.items() if count > 0},
        is_full=any(count <= 0 for count in free.values()),
        unbegun=unbegun,
    )


def served() -> dict[Place, int]:
    """The window of each place whose queue a live worker lists."""
    found = {}
    providers = routing.snapshot().providers
    for lane, slots, listed in fetch(WORKERS):
        names = {name for names in stores.loads(listed) for name in names}
        for provider in providers:
            if queues.queue_name(provider, lane) in names:
                found[provider, lane] = window(int(slots))
    return found


def window(slots: int) -> int:
    """How many of a lane's slots one provider may hold."""
    return max(1, int(slots * settings.LLMTASKS["PROVIDER_SHARE"]))


def usable(route: str) -> tuple[Model, ...] | None:
    """What a route's calls may go to now; None for a route without candidates, whose tasks are
    released all the same: the worker tells each what is wrong."""
    known = routing.snapshot().routes.get(route)
    if known is None or not known.candidates:
        return None
    return tuple((c.provider, c.model) for c in known.candidates if c.is_usable)


@dataclass(slots=True)
class Room:
    """What the limits leave for this round, booked task by task."""

    candidates: dict[str, tuple[Model, ...] | None]
    # Without those that have no limit.
    models: dict[Model, float] = field(default_factory=dict)
    tenants: dict[UUID, float] = field(default_factory=dict)
    limits: Limits = no_limits
    # Whose released tasks hold room here.
    lanes: Collection[str] = ()
    # What background work has, where this is the room of people: they take from it as well.
    behind: "Room | None" = None

    @classmethod
    def now(
        cls,
        routes: Iterable[str],
        unbegun: Mapping[Stream, int],
        limits: Limits,
        behind: "Room | None" = None,
    ) -> "Room":
        """Raises what `limits` does."""
        lanes = URGENT if behind else Lane.values
        mine = {stream: count for stream, count in unbegun.items() if stream[0] in lanes}
        candidates = {route: usable(route) for route in {*routes, *(name for _, name in mine)}}
        models = {model for found in candidates.values() for model in found or ()}
        left, _ = limits(list(models), [], HORIZON_S, behind is not None)
        room = cls(candidates, left, limits=limits, lanes=lanes, behind=behind)
        for (_, route), count in mine.items():
            room.book(route, count)
        return room

    def ask_tenants(self, tenants: Iterable[UUID]) -> None:
        """What their own limits leave. Raises what `limits` does."""
        asked = list(tenants)
        self.tenants = self.limits([], asked, HORIZON_S, self.behind is not None)[1]
        if self.tenants:
            values = {"tenants": list(self.tenants), "lanes": list(self.lanes)}
            for tenant, count in fetch(UNBEGUN, values):
                self.tenants[tenant] -= count

    def full_tenants(self) -> set[UUID]:
        return {tenant for tenant, left in self.tenants.items() if left < 1}

    def of_route(self, route: str) -> float:
        models = self.candidates[route]
        if models is None:
            return UNLIMITED
        return sum(max(0.0, self.models.get(model, UNLIMITED)) for model in models)

    def take(self, head: Head) -> bool:
        """Book a task's call, if there is room for it."""
        route = head.ask.line[2]
        tenant = head.ask.tenant_id
        if self.of_route(route) < 1 or self.tenants.get(tenant, UNLIMITED) < 1:
            return False
        self.book_for(tenant, route)
        if self.behind:
            self.behind.book_for(tenant, route)
        return True

    def book_for(self, tenant: UUID, route: str) -> None:
        self.book(route, 1)
        if tenant in self.tenants:
            self.tenants[tenant] -= 1

    def book(self, route: str, count: float) -> None:
        """Take from the route's candidates in their order, as its calls do."""
        for model in self.candidates[route] or ():
            left = self.models.get(model, UNLIMITED)
            taken = min(count, max(0.0, left))
            if model in self.models:
                self.models[model] = left - taken
            count -= taken
            if count <= 0:
                return
