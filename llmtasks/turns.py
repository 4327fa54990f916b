"""Whose turn it is: tenants by stride, each tenant's oldest task first. Plain rules, no stores.

Among those who wait at one place (a provider's lane) the tenant whose turn starts first is next:

    start = max(its pass, the place's time);  time = start;  its pass = start + cost / weight

A tenant's pass is where its last turn ended. The place's time is the start of the turn that was
given last, so that nobody has credit from a time in which it had nothing that could run. A task
costs 1, whatever it will use: what it uses is known after it ran, and is held by limits.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar
from uuid import UUID

T = TypeVar("T")

# (provider, lane): a Celery queue and a window; (provider, lane, route): who waits for the same.
Place = tuple[str, str]
Line = tuple[str, str, str]

NOBODY = UUID(int=0)
NEVER = float("inf")
COST = 1.0
# The most passes kept of a place, and the most waiting tenants known of all lines together, 10 MB.
# One more, and the memory is emptied: as after a change of the leader the tenants are found anew.
MOST_PASSES = 10_000
MOST_KNOWN = 50_000
# Tenants that are searched for in a line in a round: as many as have turns in one at the most, so
# that each is found before the others had two. Once all were, what becomes due is seen at once, and
# the search is for what that missed.
SEARCHED = 500
SEARCHED_AGAIN = 50


@dataclass(frozen=True, slots=True)
class Ask:
    """So many tasks of a tenant in a line are looked at in a round."""

    line: Line
    tenant_id: UUID
    weight: int
    most: int


@dataclass(frozen=True, slots=True)
class Head:
    """A task near the head of its line."""

    task_id: UUID
    ask: Ask
    not_before: datetime


@dataclass(slots=True)
class Stride:
    """The passes of one place."""

    time: float = 0.0
    passes: dict[UUID, float] = field(default_factory=dict)

    def start(self, tenant: UUID) -> float:
        return max(self.passes.get(tenant, 0.0), self.time)

    def give(self, tenant: UUID, weight: int) -> None:
        """One turn."""
        self.time = self.start(tenant)
        self.passes[tenant] = self.time + COST / weight
        if len(self.passes) > MOST_PASSES:
            # A pass that the time has reached says nothing any more.
            self.passes = {t: p for t, p in self.passes.items() if p > self.time}
        if len(self.passes) > MOST_PASSES:
            self.passes = {}


@dataclass(slots=True)
class Waiting:
    """Who is known to wait in one line, by weight, where the search for others goes on, and whether
    it went round once."""

    weights: dict[UUID, int] = field(default_factory=dict)
    cursor: UUID = NOBODY
    went_round: bool = False

    def to_the_end(self, tenant: UUID) -> None:
        if weight := self.weights.pop(tenant, None):
            self.weights[tenant] = weight


@dataclass(slots=True)
class Turns:
    """What the dispatcher remembers from round to round."""

    strides: dict[Place, Stride] = field(default_factory=dict)
    lines: dict[Line, Waiting] = field(default_factory=dict)
    # What was due by this time was looked at.
    looked: datetime | None = None
    # Tenants whose own limits have no room in a lane: not asked for again there before this time
    # (monotonic).
    parked: dict[tuple[str, UUID], float] = field(default_factory=dict)
    # Whether somebody was parked in this round: others may come after them.
    has_parked: bool = False
    # Lines that had no room in the last round: nobody is searched for there.
    closed: set[Line] = field(default_factory=set)
    rounds: int = 0

    def stride(self, place: Place) -> Stride:
        return self.strides.setdefault(place, Stride())

    def begin_round(self, now: float) -> None:
        self.rounds += 1
        self.has_parked = False
        self.parked = {who: until for who, until in self.parked.items() if until > now}

    def drop(self, lines: Iterable[Line]) -> None:
        """Nobody waits there."""
        for line in list(lines):
            del self.lines[line]

    def found(self, line: Line, weights: Mapping[UUID, int]) -> None:
        """Tenants that wait in a line."""
        waiting = self.lines.setdefault(line, Waiting())
        waiting.weights.update(weights)
        if sum(len(each.weights) for each in self.lines.values()) > MOST_KNOWN:
            # Searches go on where they were: begun anew each time, they would never come far.
            for each in self.lines.values():
                each.weights, each.went_round = {}, False
            waiting.weights = dict(weights)

    def searched(self, line: Line, weights: Mapping[UUID, int], cursor: UUID | None) -> None:
        """Tenants that a search found in a line, and where the next one begins: anew (None) after
        one that came to the end."""
        self.found(line, weights)
        waiting = self.lines[line]
        waiting.cursor = cursor or NOBODY
        waiting.went_round |= cursor is None

    def search_anew(self) -> None:
        """Tasks came back with a time that was looked at before."""
        for waiting in self.lines.values():
            waiting.cursor, waiting.went_round = NOBODY, False

    def park(self, who: Iterable[tuple[str, UUID]], until: float) -> None:
        """Tenants in lanes: not before `until`, and then after those who were not looked at yet."""
        for lane, tenant in who:
            self.has_parked = True
            self.parked[lane, tenant] = until
            for line, waiting in self.lines.items():
                if line[1] == lane:
                    waiting.to_the_end(tenant)

    def first_in(self, line: Line, most: int) -> list[UUID]:
        """The tenants of a line whose turns start first, in order, at most so many."""
        tenants = self.lines[line].weights
        ready = (tenant for tenant in tenants if (line[1], tenant) not in self.parked)
        return heapq.nsmallest(most, ready, key=self.stride(line[:2]).start)

    def first_of(
        self, place: Place, pairs: Iterable[tuple[Line, UUID]], most: int
    ) -> tuple[list[tuple[Line, UUID]], float]:
        """Of tenants in the lines of a place those whose turns start first, at most so many, and
        when the turn of the first one starts that is left out.

        A tenant's second line stands for its second turn: else who waits in many lines would fill
        the round alone."""
        stride = self.stride(place)
        next_start: dict[UUID, float] = {}
        order: list[tuple[float, int, tuple[Line, UUID]]] = []
        for pair in pairs:
            line, tenant = pair
            start = next_start.get(tenant) or stride.start(tenant)
            next_start[tenant] = start + COST / self.lines[line].weights[tenant]
            order.append((start, len(order), pair))
        first = heapq.nsmallest(most + 1, order)
        return [pair for *_, pair in first[:most]], first[most][0] if first[most:] else NEVER

    def wanted(self, line: Line) -> int:
        """How many tenants to search for in a line."""
        if line in self.closed:
            return 0
        return SEARCHED_AGAIN if self.lines[line].went_round else SEARCHED

    def end_round(self, asks: Iterable[Ask], heads: Iterable[Head], chosen: Sequence[Head]) -> None:
        """Forget who has nothing more in a line: a search finds them again. Who had a turn comes
        last of those whose turns start together: where others at the place have more room, its
        time passes by all who wait in a line."""
        there = Counter(head.ask for head in heads)
        given = Counter(head.ask for head in chosen)
        for ask in asks:
            if there[ask] < ask.most and there[ask] == given[ask]:
                self.lines[ask.line].weights.pop(ask.tenant_id, None)
            elif given[ask]:
                self.lines[ask.line].to_the_end(ask.tenant_id)


def in_turn(names: Sequence[T], rounds: int) -> list[T]:
    """Another one is first in each round."""
    first = rounds % (len(names) or 1)
    return [*names[first:], *names[:first]]


def share(turns: int, weight: int, total: int) -> int:
    """How many of so many turns fall to a weight of the total, rounded up."""
    return -(-turns * weight // total)


def choose(
    heads: Iterable[Head],
    stride: Stride,
    most: int,
    take: Callable[[Head], bool],
    until: float = NEVER,
) -> list[Head]:
    """The heads whose turn it is at one place, in order, at most so many.

    `take` books the room for a task and says whether there was any. No turn starts after `until`,
    when that of somebody starts who was not looked at, nor after that of one who may have more
    than was looked at: the place's time must not pass them by.
    """
    mine: dict[UUID, deque[Head]] = {}
    for head in sorted(heads, key=lambda head: head.not_before):
        mine.setdefault(head.ask.tenant_id, deque()).append(head)
    there = Counter(head.ask for own in mine.values() for head in own)
    may_have_more = {ask.tenant_id for ask, count in there.items() if count == ask.most}
    order = [(stride.start(tenant), own[0].not_before, tenant) for tenant, own in mine.items()]
    heapq.heapify(order)
    chosen: list[Head] = []
    while order and len(chosen) < most:
        start, _, tenant = heapq.heappop(order)
        if start > until:
            break
        own = mine[tenant]
        taken = next_with_room(own, take)
        if taken is None:
            continue
        chosen.append(taken)
        stride.give(tenant, taken.ask.weight)
        if own:
            heapq.heappush(order, (stride.start(tenant), own[0].not_before, tenant))
        elif tenant in may_have_more:
            until = min(until, stride.start(tenant))
    return chosen


def next_with_room(own: "deque[Head]", take: Callable[[Head], bool]) -> Head | None:
    while own:
        head = own.popleft()
        if take(head):
            return head
    return None
