"""The dispatcher: releases waiting tasks to the workers, as many as there is room for.

    lead → (each second: sweep) → release:
        windows → who became due, who waits → room → choose → mark → publish

One process leads, by a lease; two leaders for a moment are harmless, since every move is a
conditional UPDATE. A million waiting tasks are rows: what is outstanding in the broker is bounded
by the workers' slots, what is remembered of tenants by `turns.MOST_KNOWN`. Urgent lanes are
served first from what the limits leave (`room.py`), tenants take turns (`turns.py`).
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import redis
from django.conf import settings
from django.db import OperationalError
from kombu.exceptions import KombuError

from llmtasks import crash, events, pulse, queues, steps, stores
from llmtasks.guards import rate_limit
from llmtasks.guards.meters import Away
from llmtasks.models import Lane, Status
from llmtasks.room import URGENT, Limits, Room, Stream, windows
from llmtasks.stores import fetch, redis_client
from llmtasks.turns import (
    SEARCHED,
    Ask,
    Head,
    Line,
    Place,
    Turns,
    choose,
    in_turn,
    share,
)

log = logging.getLogger(__name__)

LEASE_S = 3.0
POLL_S = 0.3
# While more waits than there were slots; longer and longer while none becomes free.
BUSY_POLL_S = 0.02
FULL_POLL_S = 0.12
# Between two rounds at the least. A round that released so many is followed by the next at once.
ROUND_S = 0.005
MANY = 100
# The most tasks of a place that one round releases.
MOST_A_ROUND = 500
# The most tasks that a look for what became due reads. What is committed later than so long after
# its time is found by the search.
MOST_DUE = 5000
LATE = timedelta(seconds=0.5)
# Tenants beyond the room that are looked at, since some have nothing left.
SPARE = 16
# A tenant whose own limits have no room is asked for again after this time.
PARK_S = 0.5
SWEEP_S = 1.0
# Between two looks for blocked tasks whose children ended, and for all that have nothing open.
WAKE_S = 0.05
WAKE_ALL_S = 10.0
# After a store failed.
AWAY_S = 1.0

LEAD = """
UPDATE llmtasks_config SET
    leader = %(me)s, leader_until = clock_timestamp() + make_interval(secs => %(lease)s),
    epoch = epoch + CASE WHEN leader IS DISTINCT FROM %(me)s THEN 1 ELSE 0 END
WHERE id = 1 AND (leader = %(me)s OR leader IS NULL OR leader_until < clock_timestamp())
RETURNING epoch
"""

RESIGN = "UPDATE llmtasks_config SET leader_until = clock_timestamp() WHERE leader = %(me)s"

# Whose tasks became due since the last look, and when the last of them did.
DUE = """
SELECT d.provider, d.lane, d.route, d.tenant_id, coalesce(t.weight, 1), d.last, d.number
FROM (
    SELECT provider, lane, route, tenant_id, max(not_before) AS last, count(*) AS number FROM (
        SELECT provider, lane, route, tenant_id, not_before FROM llmtasks_task
        WHERE status = 'waiting' AND not_before > '1970-01-01 00:00+00'
            AND not_before > %(since)s AND not_before <= statement_timestamp()
        ORDER BY not_before LIMIT %(most)s
    ) due GROUP BY provider, lane, route, tenant_id
) d LEFT JOIN llmtasks_tenant t ON t.id = d.tenant_id
"""

# Who waits at each place, by index probes alone: first the routes that wait there, then of each
# route so many tenants after the one that the last search ended at. Arrays rather than joins: the
# planner can't tell how few there are, and would read the whole table.
FIND = """
WITH RECURSIVE asked AS (
    SELECT * FROM unnest(%(providers)s::text[], %(lanes)s::text[]) AS a(provider, lane)
), remembered AS (
    SELECT * FROM unnest(%(line_providers)s::text[], %(line_lanes)s::text[],
        %(line_routes)s::text[], %(cursors)s::uuid[], %(wanted)s::int[])
        AS r(provider, lane, route, cursor, wanted)
), lines AS (
    SELECT provider, lane, '' AS route FROM asked
    UNION ALL
    SELECT l.provider, l.lane, n.route FROM lines l CROSS JOIN LATERAL (
        SELECT route::text FROM llmtasks_task
        WHERE status = 'waiting' AND provider = l.provider AND lane = l.lane AND route > l.route
        ORDER BY route LIMIT 1
    ) n
), tenants AS (
    SELECT provider, lane, route,
        coalesce(cursor, '00000000-0000-0000-0000-000000000000') AS tenant_id,
        coalesce(wanted, %(searched)s) AS most, false AS is_due, 0 AS seen
    FROM lines LEFT JOIN remembered USING (provider, lane, route) WHERE route <> ''
    UNION ALL
    SELECT s.provider, s.lane, s.route, n.tenant_id, s.most, n.is_due, s.seen + 1
    FROM tenants s CROSS JOIN LATERAL (
        SELECT tenant_id, not_before <= statement_timestamp() AS is_due FROM llmtasks_task
        WHERE status = 'waiting' AND provider = s.provider AND lane = s.lane
            AND route = s.route AND tenant_id > s.tenant_id
        ORDER BY tenant_id, not_before LIMIT 1
    ) n
    WHERE s.seen < s.most
), numbered AS (
    SELECT *, max(seen) OVER (PARTITION BY provider, lane, route) AS last FROM tenants
)
SELECT f.provider, f.lane, f.route, f.tenant_id, f.is_due, f.seen >= f.most, coalesce(t.weight, 1)
FROM numbered f LEFT JOIN llmtasks_tenant t ON t.id = f.tenant_id AND f.is_due
WHERE f.is_due OR f.seen = f.last
ORDER BY f.seen
"""

# The oldest due tasks of tenants in their lines. Rows are compared as a whole: column by column
# another index, of a tenant's tasks, may look as good to the planner.
HEADS = """
SELECT h.number, t.id, t.not_before
FROM unnest(%(providers)s::text[], %(lanes)s::text[], %(routes)s::text[], %(tenants)s::uuid[],
        %(most)s::int[]) WITH ORDINALITY AS h(provider, lane, route, tenant_id, most, number)
CROSS JOIN LATERAL (
    SELECT id, not_before FROM llmtasks_task
    WHERE status = 'waiting'
        AND (provider, lane, route, tenant_id, not_before)
            >= (h.provider, h.lane, h.route, h.tenant_id, '-infinity')
        AND (provider, lane, route, tenant_id, not_before)
            <= (h.provider, h.lane, h.route, h.tenant_id, statement_timestamp())
    ORDER BY provider, lane, route, tenant_id, not_before LIMIT h.most
) t
"""

MARK = """
WITH picked AS (
    SELECT id FROM llmtasks_task
    WHERE id = ANY(%(ids)s) AND status || '' = 'waiting' AND not_before <= statement_timestamp()
    ORDER BY id FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_task SET status = 'queued', seq = seq + 1, queued_at = clock_timestamp()
WHERE id = ANY(ARRAY(SELECT id FROM picked)) AND status || '' = 'waiting'
RETURNING id, seq, provider, lane, tenant_id
"""

PUT_BACK = """
WITH unsent AS (
    SELECT id FROM llmtasks_task
    WHERE id = ANY(%(ids)s) AND status || '' = 'queued'
        AND queued_at > clock_timestamp() - interval '1 min'
    ORDER BY id FOR UPDATE
)
UPDATE llmtasks_task t SET status = 'waiting', queued_at = NULL
FROM unsent WHERE t.id = unsent.id
"""

LANES = {str(lane): rank for rank, lane in enumerate(Lane.values)}
# What sending a hint raises: then nothing is half done.
BROKER_AWAY = (KombuError, redis.RedisError, OSError)
# Faults of one statement, told by a server that is there.
OF_A_STATEMENT = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.QueryCanceled,
    psycopg.errors.DeadlockDetected,
)


@dataclass(frozen=True, slots=True)
class Hint:
    task_id: UUID
    seq: int
    provider: str
    lane: str
    tenant_id: UUID


def release(turns: Turns, limits: Limits = rate_limit.rooms) -> tuple[int, bool]:
    """One round: how many tasks were released, and whether to look again soon where none was.
    `turns` goes from round to round.

    Raises `OperationalError` (Postgres), `BROKER_AWAY` and `Away` (Redis), after which nothing is
    half done.
    """
    slots = windows()
    hints = pick(slots.free, turns, limits, slots.unbegun) if slots.free else []
    if not hints:
        return 0, slots.is_full or turns.has_parked
    crash.point("dispatch.queued")
    try:
        queues.publish((h.task_id, h.seq, h.provider, h.lane) for h in hints)
    except BROKER_AWAY:
        fetch(PUT_BACK, {"ids": [h.task_id for h in hints]})
        turns.search_anew()
        raise
    crash.point("dispatch.published")
    tell(hints)
    return len(hints), True


def tell(hints: Iterable[Hint]) -> None:
    """Whoever watches the tasks. At once: two threads that both compute slow each other down."""
    told = [events.Unsent(hint.task_id, "state", {"status": Status.QUEUED}) for hint in hints]
    try:
        events.send(told)
    except redis.RedisError as error:
        log.warning("events dropped: Redis is away", extra={"error": str(error)})


def pick(
    free: Mapping[Place, int],
    turns: Turns,
    limits: Limits = rate_limit.rooms,
    unbegun: Mapping[Stream, int] | None = None,
) -> list[Hint]:
    """Move as many due tasks to `queued` as there is room for, and name them in order."""
    now = time.monotonic()
    turns.begin_round(now)
    most = {place: min(count, MOST_A_ROUND) for place, count in free.items()}
    look(turns)
    lines = find(most, turns)
    rooms = rooms_of(lines, unbegun or {}, limits)
    turns.closed = {line for line in lines if rooms[line[1]].of_route(line[2]) < 1}
    asks: list[Ask] = []
    until: dict[Place, float] = {}
    for place, count in most.items():
        mine, until[place] = asks_at(place, count, lines, turns, rooms[place[1]])
        asks += mine
    asks = with_room(asks, rooms, turns, now)
    heads = find_heads(asks)
    chosen: list[Head] = []
    for place in in_order(most, turns.rounds):
        at = [head for head in heads if head.ask.line[:2] == place]
        take = rooms[place[1]].take
        chosen += choose(at, turns.stride(place), most[place], take, until[place])
    turns.end_round(asks, heads, chosen)
    return mark(chosen)


def look(turns: Turns) -> None:
    """Remember whose tasks became due since the last look."""
    now = pulse.now()
    values = {"since": turns.looked or now - LATE, "most": MOST_DUE}
    rows = fetch(DUE, values)
    found: dict[Line, dict[UUID, int]] = {}
    for provider, lane, route, tenant, weight, *_ in rows:
        found.setdefault((provider, lane, route), {})[tenant] = weight
    for line, weights in found.items():
        turns.found(line, weights)
    is_all = sum(number for *_, number in rows) < MOST_DUE
    turns.looked = now - LATE if is_all else max(last for *_, last, _ in rows)


def find(places: Collection[Place], turns: Turns) -> list[Line]:
    """The lines in which somebody waits. Tenants that are found there are remembered."""
    known = [line for line in turns.lines if line[:2] in places]
    values = {
        "providers": [provider for provider, _ in places],
        "lanes": [lane for _, lane in places],
        "line_providers": [provider for provider, _, _ in known],
        "line_lanes": [lane for _, lane, _ in known],
        "line_routes": [route for _, _, route in known],
        "cursors": [turns.lines[line].cursor for line in known],
        "wanted": [turns.wanted(line) for line in known],
        "searched": SEARCHED,
    }
    found: dict[Line, dict[UUID, int]] = {}
    cursors: dict[Line, UUID | None] = {}
    for provider, lane, route, tenant, is_due, goes_on, weight in fetch(FIND, values):
        line = (provider, lane, route)
        weights = found.setdefault(line, {})
        cursors[line] = tenant if goes_on else None
        if is_due:
            weights[tenant] = weight
    turns.drop(line for line in known if line not in found)
    for line, weights in found.items():
        turns.searched(line, weights, cursors[line])
    return list(found)


def rooms_of(
    lines: Collection[Line], unbegun: Mapping[Stream, int], limits: Limits
) -> dict[str, Room]:
    """The room of each lane: that of people is asked for where some of them wait."""
    background = Room.now({route for *_, route in lines}, unbegun, limits)
    rooms = dict.fromkeys(LANES, background)
    if urgent := {route for _, lane, route in lines if lane in URGENT}:
        rooms |= dict.fromkeys(URGENT, Room.now(urgent, unbegun, limits, background))
    return rooms


def with_room(
    asks: Sequence[Ask], rooms: Mapping[str, Room], turns: Turns, now: float
) -> list[Ask]:
    """Those whose tenants' own limits leave any; the others are asked for again after PARK_S."""
    left = []
    for room in {id(room): room for room in rooms.values()}.values():
        mine = [ask for ask in asks if rooms[ask.line[1]] is room]
        room.ask_tenants({ask.tenant_id for ask in mine})
        full = room.full_tenants()
        turns.park({(a.line[1], a.tenant_id) for a in mine if a.tenant_id in full}, now + PARK_S)
        left += [ask for ask in mine if ask.tenant_id not in full]
    return left


def asks_at(
    place: Place, most: int, lines: Iterable[Line], turns: Turns, room: Room
) -> tuple[list[Ask], float]:
    """Whose tasks are looked at, and how many of each: the first of each line, and of all lines
    together as many as there is room for. And when the turn of the first one starts who is not."""
    pairs: list[tuple[Line, UUID]] = []
    more: list[tuple[Line, UUID]] = []
    for line in in_turn([line for line in lines if line[:2] == place], turns.rounds):
        count = int(min(room.of_route(line[2]), most + SPARE + 1))
        first = [(line, tenant) for tenant in turns.first_in(line, count)]
        pairs += first[:SPARE]
        more += first[SPARE:]
    chosen, until = turns.first_of(place, more, most)
    pairs += chosen
    weights = [turns.lines[line].weights[tenant] for line, tenant in pairs]
    total = sum(weights)
    asks = [
        Ask(line, tenant, weight, share(most, weight, total))
        for (line, tenant), weight in zip(pairs, weights, strict=True)
    ]
    return asks, until


def find_heads(asks: Sequence[Ask]) -> list[Head]:
    if not asks:
        return []
    values = {
        "providers": [ask.line[0] for ask in asks],
        "lanes": [ask.line[1] for ask in asks],
        "routes": [ask.line[2] for ask in asks],
        "tenants": [ask.tenant_id for ask in asks],
        "most": [ask.most for ask in asks],
    }
    rows = fetch(HEADS, values)
    return [Head(task_id, asks[number - 1], since) for number, task_id, since in rows]


def in_order(places: Iterable[Place], rounds: int) -> list[Place]:
    """Urgent lanes first; within a lane another provider is first in each round."""
    return sorted(in_turn(sorted(places), rounds), key=lambda place: LANES[place[1]])


def mark(chosen: Sequence[Head]) -> list[Hint]:
    """`waiting → queued`, for those that still wait."""
    if not chosen:
        return []
    hints = {row[0]: Hint(*row) for row in fetch(MARK, {"ids": [h.task_id for h in chosen]})}
    return [hints[head.task_id] for head in chosen if head.task_id in hints]


@dataclass
class Dispatcher:
    """The loop of the dispatcher's process. `take_over` is called when it comes to lead, `sweep`
    each second while it does: how many tasks it moved."""

    sweep: Callable[[], int]
    stopped: threading.Event
    take_over: Callable[[], object] = lambda: None
    epoch: int = 0
    led_at: float = float("-inf")
    swept_at: float = float("-inf")
    # Postgres came back: nobody's lease counts as lapsed before this (monotonic).
    patient_until: float = float("-inf")
    woke_at: float = float("-inf")
    woke_all_at: float = float("-inf")
    turns: Turns = field(default_factory=Turns)
    # Rounds in a row that released nothing and were to be repeated soon.
    fruitless: int = 0

    def run(self) -> None:
        """Until `stopped`; survives the absence of either store."""
        ears = Ears()
        while not self.stopped.is_set():
            began = time.monotonic()
            try:
                wait_s = self.turn()
            except OperationalError as error:
                log.warning("the dispatcher waits for Postgres", extra={"error": str(error)})
                if not isinstance(error.__cause__, OF_A_STATEMENT):
                    self.patient_until = time.monotonic() + AWAY_S + settings.LLMTASKS["LEASE_S"]
                wait_s = AWAY_S
            except (*BROKER_AWAY, Away) as error:
                log.warning("the dispatcher waits for Redis", extra={"error": str(error)})
                wait_s = AWAY_S
            except Exception:
                log.exception("the dispatcher failed")
                wait_s = AWAY_S
            finally:
                stores.release()
            if wait_s == AWAY_S:
                self.stopped.wait(AWAY_S)
            else:
                ears.wait(wait_s)
                self.stopped.wait(max(0.0, began + ROUND_S - time.monotonic()))
        self.resign()

    def turn(self) -> float:
        """One round; seconds until the next if nobody wakes us."""
        if not self.lead():
            return POLL_S
        now = time.monotonic()
        if now - self.swept_at >= SWEEP_S and now >= self.patient_until:
            self.swept_at = now
            if self.sweep():
                self.turns.search_anew()
        wake_s = self.wake_parents(now)
        released, is_soon = release(self.turns)
        self.fruitless = self.fruitless + 1 if is_soon and not released else 0
        if released >= MANY:
            return 0.0
        if self.fruitless:
            return min(BUSY_POLL_S * (1 + self.fruitless // 5), FULL_POLL_S)
        return BUSY_POLL_S if released else min(POLL_S, wake_s)

    def wake_parents(self, now: float) -> float:
        """Tasks whose last child ended; now and then whatever is blocked by nothing. Seconds until
        the next look, where this one came too early."""
        wait_s = POLL_S
        if now - self.woke_at >= WAKE_S:
            age_s = min(now - self.woke_at, WAKE_ALL_S) + WAKE_ALL_S / 4
            self.woke_at = now
            steps.wake_parents(age_s)
        else:
            wait_s = self.woke_at + WAKE_S - now
        if now - self.woke_all_at >= WAKE_ALL_S:
            self.woke_all_at = now
            steps.wake()
        return wait_s

    def lead(self) -> bool:
        """Take or renew the leader's lease; renewed each second."""
        now = time.monotonic()
        if now - self.led_at < LEASE_S / 4:
            return True
        rows = fetch(LEAD, {"me": pulse.owner_id(), "lease": LEASE_S})
        if not rows:
            return False
        if rows[0][0] != self.epoch:
            self.take_over()
            self.epoch = rows[0][0]
            log.info("this dispatcher leads", extra={"epoch": self.epoch})
        self.led_at = now
        return True

    def resign(self) -> None:
        """Let another dispatcher lead at once."""
        try:
            fetch(RESIGN, {"me": pulse.owner_id()})
        except OperationalError:
            log.warning("Postgres is away: the lease runs out by itself")
        finally:
            stores.release()


class Ears:
    """Listens for wake-ups; while Redis is away it only sleeps."""

    def __init__(self) -> None:
        self.pubsub: Any = None

    def wait(self, seconds: float) -> None:
        """Until somebody wakes us, for `seconds` at the most."""
        try:
            if self.pubsub is None:
                client: Any = redis_client()
                self.pubsub = client.pubsub(ignore_subscribe_messages=True)
                self.pubsub.subscribe(queues.WAKE_CHANNEL)
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0:
                if self.pubsub.get_message(timeout=left):
                    break
            # What came meanwhile is answered by the next round too.
            while self.pubsub.get_message(timeout=0.0):
                pass
        except (redis.RedisError, OSError):
            self.pubsub = None
            time.sleep(seconds)
