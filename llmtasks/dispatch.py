"""The dispatcher: releases waiting tasks to the workers, as many as there is room for.

    lead → (each second: sweep) → release: room → pick → mark queued → publish hints

One process leads, by a lease; two leaders for a moment are harmless, since every move is a
conditional UPDATE. A million waiting tasks are rows: what is outstanding in the broker is bounded
by the workers' slots. No provider holds more than a share of a lane's slots, so that one that
hangs can't fill it. Within a provider and lane tenants take turns, each its oldest task first.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import redis
from django.conf import settings
from django.db import OperationalError
from kombu.exceptions import OperationalError as BrokerError

from llmtasks import crash, events, pulse, queues, routing, stores
from llmtasks.models import Status
from llmtasks.stores import fetch, redis_client

log = logging.getLogger(__name__)

LEASE_S = 4.0
POLL_S = 0.25
# While more waits than there was room for, and between two rounds at the least.
BUSY_POLL_S = 0.02
ROUND_S = 0.005
SWEEP_S = 1.0
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

WORKERS = """
SELECT lane, sum(slots), jsonb_agg(queues) FROM llmtasks_worker
WHERE role = 'worker' AND lease_until > statement_timestamp() GROUP BY lane
"""

OUTSTANDING = """
SELECT provider, lane, count(*) FROM llmtasks_task
WHERE status IN ('queued', 'running') AND mode = 'queued' GROUP BY provider, lane
"""

# For each provider and lane with room: tenants that have work due there, found by a skip scan over
# the index which begins after the tenant that had its turn last (part 0) and goes round (part 1);
# of each its oldest tasks; and of those as many as there is room for, tenants taking turns. Arrays
# rather than joins: the planner can't tell how few there are, and would read the whole table.
PICK = """
WITH RECURSIVE asked AS (
    SELECT * FROM unnest(%(providers)s::text[], %(lanes)s::text[], %(rooms)s::int[],
                         %(last)s::uuid[]) AS r(provider, lane, free, last)
), tenants AS (
    SELECT provider, lane, free, 0 AS part, last AS tenant_id,
        'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid AS until, false AS is_due, 0 AS found
    FROM asked
    UNION ALL
    SELECT provider, lane, free, 1, '00000000-0000-0000-0000-000000000000', last, false, 0
    FROM asked
    UNION ALL
    SELECT s.provider, s.lane, s.free, s.part, n.tenant_id, s.until, n.is_due,
        s.found + n.is_due::int
    FROM tenants s CROSS JOIN LATERAL (
        SELECT tenant_id, not_before <= statement_timestamp() AS is_due FROM llmtasks_task
        WHERE status = 'waiting' AND provider = s.provider AND lane = s.lane
            AND tenant_id > s.tenant_id AND tenant_id <= s.until
        ORDER BY tenant_id, not_before LIMIT 1
    ) n
    WHERE s.found < s.free
), counted AS (
    SELECT *, count(*) OVER (PARTITION BY provider, lane) AS tenants FROM tenants WHERE is_due
), turns AS (
    SELECT t.id, c.provider, c.lane, c.free, c.part, c.tenant_id,
        row_number() OVER (PARTITION BY c.provider, c.lane, c.tenant_id ORDER BY t.not_before) turn
    FROM counted c CROSS JOIN LATERAL (
        SELECT id, not_before FROM llmtasks_task
        WHERE status = 'waiting' AND provider = c.provider AND lane = c.lane
            AND tenant_id = c.tenant_id AND not_before <= statement_timestamp()
        ORDER BY not_before LIMIT ceil(c.free::numeric / c.tenants)
    ) t
), ranked AS (
    SELECT id, free,
        row_number() OVER (PARTITION BY provider, lane ORDER BY turn, part, tenant_id) AS place
    FROM turns
), picked AS (
    SELECT id FROM llmtasks_task
    WHERE id = ANY(ARRAY(SELECT id FROM ranked WHERE place <= free)) AND status = 'waiting'
    ORDER BY id FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_task t SET status = 'queued', seq = seq + 1, queued_at = clock_timestamp()
WHERE id = ANY(ARRAY(SELECT id FROM picked)) AND status = 'waiting'
RETURNING id, seq, provider, lane, tenant_id, (SELECT place FROM ranked WHERE ranked.id = t.id)
"""

PUT_BACK = """
WITH unsent AS (
    SELECT id FROM llmtasks_task
    WHERE id = ANY(%(ids)s) AND status = 'queued'
        AND queued_at > clock_timestamp() - interval '1 min'
    ORDER BY id FOR UPDATE
)
UPDATE llmtasks_task t SET status = 'waiting', queued_at = NULL
FROM unsent WHERE t.id = unsent.id
"""

NOBODY = UUID(int=0)

# (provider, lane) → the tenant that had its turn there last.
Turns = dict[tuple[str, str], UUID]


@dataclass(frozen=True, slots=True)
class Hint:
    task_id: UUID
    seq: int
    provider: str
    lane: str
    tenant_id: UUID


def release(turns: Turns) -> tuple[int, bool]:
    """One round: how many tasks were released, and whether more may wait than there was room.
    `turns` goes from round to round.

    Raises `OperationalError` (Postgres) and `BrokerError`, after which nothing is half done.
    """
    rooms, is_full = free_rooms()
    hints = pick(rooms, turns) if rooms else []
    if not hints:
        return 0, is_full
    crash.point("dispatch.queued")
    try:
        queues.publish((h.task_id, h.seq, h.provider, h.lane) for h in hints)
    except (BrokerError, OSError, redis.RedisError):
        fetch(PUT_BACK, {"ids": [h.task_id for h in hints]})
        raise
    crash.point("dispatch.published")
    for hint in hints:
        events.publish(hint.task_id, "state", {"status": Status.QUEUED})
    return len(hints), True


def free_rooms() -> tuple[dict[tuple[str, str], int], bool]:
    """(provider, lane) → how many more tasks may be outstanding there; whether any is full."""
    outstanding = {(provider, lane): n for provider, lane, n in fetch(OUTSTANDING)}
    open_providers = [name for name, paused in routing.snapshot().providers.items() if not paused]
    rooms, is_full = {}, False
    for lane, slots, listed in fetch(WORKERS):
        served = {name for names in stores.loads(listed) for name in names}
        most = window(int(slots))
        for provider in open_providers:
            free = most - outstanding.get((provider, lane), 0)
            if queues.queue_name(provider, lane) not in served:
                continue
            if free > 0:
                rooms[provider, lane] = free
            else:
                is_full = True
    return rooms, is_full


def window(slots: int) -> int:
    """How many of a lane's slots one provider may hold."""
    return max(1, int(slots * settings.LLMTASKS["PROVIDER_SHARE"]))


def pick(rooms: dict[tuple[str, str], int], turns: Turns) -> list[Hint]:
    """Move as many due tasks to `queued` as there is room for, and name them in order."""
    values: dict[str, Any] = {
        "providers": [provider for provider, _ in rooms],
        "lanes": [lane for _, lane in rooms],
        "rooms": list(rooms.values()),
        "last": [turns.get(place, NOBODY) for place in rooms],
    }
    rows = sorted(fetch(PICK, values), key=lambda row: row[5])
    hints = [Hint(*row[:5]) for row in rows]
    turns.update({(hint.provider, hint.lane): hint.tenant_id for hint in hints})
    return hints


@dataclass
class Dispatcher:
    """The loop of the dispatcher's process. `sweep` is called each second while it leads."""

    sweep: Callable[[], object]
    stopped: threading.Event
    epoch: int = 0
    led_at: float = float("-inf")
    swept_at: float = float("-inf")
    # Postgres came back: nobody's lease counts as lapsed before this (monotonic).
    patient_until: float = float("-inf")
    turns: Turns = field(default_factory=dict)

    def run(self) -> None:
        """Until `stopped`; survives the absence of either store."""
        ears = Ears()
        while not self.stopped.is_set():
            began = time.monotonic()
            try:
                wait_s = self.turn()
            except OperationalError as error:
                log.warning("the dispatcher waits for Postgres", extra={"error": str(error)})
                self.patient_until = time.monotonic() + AWAY_S + settings.LLMTASKS["LEASE_S"]
                wait_s = AWAY_S
            except (BrokerError, redis.RedisError, OSError) as error:
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
            self.sweep()
        _, more = release(self.turns)
        return BUSY_POLL_S if more else POLL_S

    def lead(self) -> bool:
        """Take or renew the leader's lease; renewed each second."""
        now = time.monotonic()
        if now - self.led_at < LEASE_S / 4:
            return True
        rows = fetch(LEAD, {"me": pulse.owner_id(), "lease": LEASE_S})
        if not rows:
            return False
        if rows[0][0] != self.epoch:
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
