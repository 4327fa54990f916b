"""Puts back what got stuck: tasks of dead processes, lost hints, passed deadlines.

Every step is one conditional UPDATE over rows in the order of their ids, so that two sweeps at
once do no harm. Nothing here runs while Postgres came back less than a lease ago: processes that
could not renew get their time to.
"""

import logging
import time
from uuid import UUID

import redis
from django.conf import settings
from django.db import transaction

from llmtasks import crash, events, ledger, queues
from llmtasks.models import FINAL, IdempotencyKey, Mode, Status
from llmtasks.stores import fetch

log = logging.getLogger(__name__)

BATCH = 1000
# A new leader looks at younger hints than HINT_LOST_S: the one before may have died between its
# mark and its hints, and what it marked takes slots.
LEFT_BEHIND_S = 1.0
# Between two looks at all attempts that are not settled.
LOOK_AT_ATTEMPTS_S = 30.0

# What the owner's end means: cancelled if that was asked for; inline work and work that must not
# run twice fails; other work waits again.
TAKE_FROM_DEAD = """
WITH gone AS (
    SELECT t.id FROM llmtasks_task t
    WHERE t.status = 'running' AND NOT EXISTS (
        SELECT 1 FROM llmtasks_worker w
        WHERE w.id = t.owner_id AND w.lease_until > statement_timestamp()
    )
    ORDER BY t.id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
), unknown AS (
    UPDATE llmtasks_attempt a SET state = 'unknown', cost_state =
        CASE WHEN cost_state = 'unpriced' THEN 'unpriced' ELSE 'estimated' END
    WHERE a.state = 'sent' AND a.task_id IN (SELECT id FROM gone) RETURNING a.task_id
)
UPDATE llmtasks_task t SET
    status = CASE
        WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
        WHEN mode = 'inline' THEN 'failed'
        WHEN on_unknown = 'fail' AND (t.kind = 'tool' OR t.id IN (SELECT task_id FROM unknown))
            THEN 'failed'
        ELSE 'waiting' END,
    error_class = CASE WHEN cancel_requested_at IS NOT NULL THEN 'Cancelled' ELSE 'Interrupted' END,
    error_message = CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled on request'
        ELSE 'the process that ran it died' END,
    owner_id = NULL, not_before = clock_timestamp(),
    finished_at = CASE WHEN cancel_requested_at IS NOT NULL OR mode = 'inline'
        OR (on_unknown = 'fail' AND (t.kind = 'tool' OR t.id IN (SELECT task_id FROM unknown)))
        THEN clock_timestamp() END
FROM gone WHERE t.id = gone.id
RETURNING t.id, t.status, t.mode, t.id IN (SELECT task_id FROM unknown)
"""

OLD_HINTS = """
SELECT id, seq, provider, lane FROM llmtasks_task
WHERE status = 'queued' AND queued_at < statement_timestamp() - make_interval(secs => %(age)s)
"""

PUT_BACK = """
WITH lost AS (
    SELECT id FROM llmtasks_task
    WHERE id = ANY(%(lost)s) AND status || '' = 'queued'
        AND queued_at < statement_timestamp() - make_interval(secs => %(age)s)
    ORDER BY id FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_task t SET status = 'waiting', queued_at = NULL
FROM lost WHERE t.id = lost.id AND t.status || '' = 'queued' RETURNING t.id
"""

EXPIRE = """
WITH late AS (
    SELECT id FROM llmtasks_task
    WHERE status IN ('waiting', 'queued', 'blocked')
        AND deadline > '1970-01-01 00:00+00' AND deadline < statement_timestamp()
    ORDER BY id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_task t SET status = 'expired', finished_at = clock_timestamp(), owner_id = NULL,
    error_class = 'DeadlineExceeded', error_message = 'the deadline passed before it ran'
FROM late WHERE t.id = late.id RETURNING t.id
"""

# A hedged call's other attempt is settled apart from its task: its process may die in between.
LEFT_OPEN = """
WITH ended AS (
    SELECT t.id FROM llmtasks_task t
    WHERE t.status <> 'running' AND t.id IN (
        SELECT task_id FROM llmtasks_attempt
        WHERE state = 'sent' AND started_at < statement_timestamp() - make_interval(secs => %(age)s)
    )
    ORDER BY t.id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_attempt a SET state = 'unknown', cost_state =
    CASE WHEN cost_state = 'unpriced' THEN 'unpriced' ELSE 'estimated' END
FROM ended WHERE a.task_id = ended.id AND a.state = 'sent' RETURNING a.task_id
"""

# Parents by one index probe each, however many children they have; then what of theirs is open
# though they ended: the process died that was to cancel it, or the parent's own deadline passed.
LEFT_BELOW = """
WITH RECURSIVE parents AS (
    (SELECT parent_id AS id FROM llmtasks_task
     WHERE parent_id IS NOT NULL AND status IN ('waiting', 'queued', 'running', 'blocked')
     ORDER BY parent_id LIMIT 1)
    UNION ALL
    SELECT (SELECT parent_id FROM llmtasks_task
            WHERE parent_id > p.id AND status IN ('waiting', 'queued', 'running', 'blocked')
            ORDER BY parent_id LIMIT 1)
    FROM parents p WHERE p.id IS NOT NULL
)
SELECT t.id FROM parents p JOIN llmtasks_task t ON t.id = p.id
WHERE t.kind = 'workflow' AND t.status IN ('succeeded', 'failed', 'cancelled', 'expired')
"""
# Between two looks for it.
LOOK_BELOW_S = 5.0

_attempts_looked_at = float("-inf")
_looked_below_at = float("-inf")


def run() -> int:
    """One sweep; how many tasks were moved."""
    global _attempts_looked_at, _looked_below_at
    if time.monotonic() - _attempts_looked_at >= LOOK_AT_ATTEMPTS_S:
        _attempts_looked_at = time.monotonic()
        close_left_open()
    if time.monotonic() - _looked_below_at >= LOOK_BELOW_S:
        _looked_below_at = time.monotonic()
        cancel_left_below()
    return take_from_dead() + put_back_lost_hints() + expire()


def take_from_dead() -> int:
    """Tasks whose owner's lease ran out."""
    with transaction.atomic():
        rows = fetch(TAKE_FROM_DEAD, {"batch": BATCH})
        if billed := [task_id for task_id, _, _, unknown in rows if unknown]:
            ledger.recount(billed)
        if inline := [task_id for task_id, _, mode, _ in rows if mode == Mode.INLINE]:
            # Its client may start it again, with the same key.
            IdempotencyKey.objects.filter(task_id__in=inline).delete()
        if rows:
            crash.point("sweep.taking")
    if rows:
        crash.point("sweep.taken")
        log.warning("took up tasks of processes that are gone", extra={"tasks": len(rows)})
    tell([(task_id, status) for task_id, status, _, _ in rows])
    return len(rows)


def close_left_open() -> int:
    """Attempts that nobody settles any more, of tasks that ended or wait: what they cost is not
    known, and counts as estimated."""
    with transaction.atomic():
        rows = fetch(LEFT_OPEN, {"batch": BATCH, "age": settings.LLMTASKS["LEASE_S"]})
        if rows:
            ledger.recount(sorted({task_id for (task_id,) in rows}))
    if rows:
        log.warning("closed attempts that were left open", extra={"attempts": len(rows)})
    return len(rows)


def cancel_left_below() -> int:
    """What is open below workflows that ended; how much of it ended at once."""
    ended = [task_id for (task_id,) in fetch(LEFT_BELOW)]
    if not ended:
        return 0
    cancelled = ledger.cancel_below(ended, "the workflow that it is a step of ended")
    tell([(task_id, Status.CANCELLED) for task_id in cancelled])
    return len(cancelled)


def take_over() -> int:
    """What a new leader does first."""
    return put_back_lost_hints(LEFT_BEHIND_S)


def put_back_lost_hints(age_s: float | None = None) -> int:
    """Tasks that were released so long ago and whose hints lie in no queue: never sent, or lost by
    the broker or a worker. One that a worker has in hand at this moment will find itself stale."""
    age = {"age": settings.LLMTASKS["HINT_LOST_S"] if age_s is None else age_s}
    old = fetch(OLD_HINTS, age)
    if not old:
        return 0
    try:
        sent = queues.hints_in({queues.queue_name(provider, lane) for *_, provider, lane in old})
    except redis.RedisError:
        return 0
    lost = [task_id for task_id, seq, *_ in old if queues.hint_id(task_id, seq) not in sent]
    rows = fetch(PUT_BACK, age | {"lost": lost})
    if rows:
        log.warning("put back tasks whose hints were lost", extra={"tasks": len(rows)})
    tell([(task_id, Status.WAITING) for (task_id,) in rows])
    return len(rows)


def expire() -> int:
    """Tasks whose deadline passed before they ran."""
    rows = fetch(EXPIRE, {"batch": BATCH})
    tell([(task_id, Status.EXPIRED) for (task_id,) in rows])
    return len(rows)


def tell(moved: list[tuple[UUID, str]]) -> None:
    for task_id, status in moved:
        events.publish(task_id, "done" if status in FINAL else "state", {"status": status})
