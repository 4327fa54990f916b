"""Puts back what got stuck: tasks of dead processes, lost hints, passed deadlines.

Every step is one conditional UPDATE over rows in the order of their ids, so that two sweeps at
once do no harm. Nothing here runs while Postgres came back less than a lease ago: processes that
could not renew get their time to.
"""

import logging
from uuid import UUID

import redis
from django.conf import settings
from django.db import transaction

from llmtasks import crash, events, ledger, queues
from llmtasks.models import FINAL, IdempotencyKey, Mode, Status
from llmtasks.stores import fetch

log = logging.getLogger(__name__)

BATCH = 1000
# A hint is lost when it is older than HINT_LOST_S and its queue is empty, or than this.
HINT_LOST_FOR_SURE_S = 600.0

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
        WHEN on_unknown = 'fail' AND t.id IN (SELECT task_id FROM unknown) THEN 'failed'
        ELSE 'waiting' END,
    error_class = CASE WHEN cancel_requested_at IS NOT NULL THEN 'Cancelled' ELSE 'Interrupted' END,
    error_message = CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled on request'
        ELSE 'the process that ran it died' END,
    owner_id = NULL, not_before = clock_timestamp(),
    finished_at = CASE WHEN cancel_requested_at IS NOT NULL OR mode = 'inline'
        OR (on_unknown = 'fail' AND t.id IN (SELECT task_id FROM unknown))
        THEN clock_timestamp() END
FROM gone WHERE t.id = gone.id
RETURNING t.id, t.status, t.mode, t.id IN (SELECT task_id FROM unknown)
"""

OLD_HINTS = """
SELECT DISTINCT provider, lane FROM llmtasks_task
WHERE status = 'queued' AND queued_at < statement_timestamp() - make_interval(secs => %(age)s)
"""

PUT_BACK = """
WITH lost AS (
    SELECT id FROM llmtasks_task
    WHERE status = 'queued' AND (
        queued_at < statement_timestamp() - make_interval(secs => %(sure)s)
        OR (queued_at < statement_timestamp() - make_interval(secs => %(age)s)
            AND provider || '.' || lane = ANY(%(empty)s)))
    ORDER BY id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_task t SET status = 'waiting', queued_at = NULL
FROM lost WHERE t.id = lost.id AND t.status = 'queued' RETURNING t.id
"""

EXPIRE = """
WITH late AS (
    SELECT id FROM llmtasks_task
    WHERE status IN ('waiting', 'queued', 'blocked') AND deadline < statement_timestamp()
    ORDER BY id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_task t SET status = 'expired', finished_at = clock_timestamp(), owner_id = NULL,
    error_class = 'DeadlineExceeded', error_message = 'the deadline passed before it ran'
FROM late WHERE t.id = late.id RETURNING t.id
"""


def run() -> int:
    """One sweep; how many tasks were moved."""
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


def put_back_lost_hints() -> int:
    """Tasks whose message the broker or a worker lost."""
    age = {"age": settings.LLMTASKS["HINT_LOST_S"]}
    pairs = fetch(OLD_HINTS, age)
    if not pairs:
        return 0
    names = [queues.queue_name(provider, lane) for provider, lane in pairs]
    try:
        empty = [name for name, depth in queues.depths(names).items() if depth == 0]
    except redis.RedisError:
        return 0
    values = age | {"sure": HINT_LOST_FOR_SURE_S, "empty": empty, "batch": BATCH}
    rows = fetch(PUT_BACK, values)
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
