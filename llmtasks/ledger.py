"""Every write of a task's life: the spend ledger and the arrows between states.

The hot path goes through two functions, one statement and one round trip each:

    begin    the attempt `sent` (and, for inline work, the task itself), before the call
    finish   the attempt `settled`, its money on the task, the task's end or its next state

`move` is every other arrow: one conditional UPDATE that names the state it leaves. One row
changed: it was ours. None: somebody else's, and the caller leaves.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson
from django.db import transaction
from django.db.models import DateTimeField, Func, QuerySet
from psycopg.types.json import Jsonb

from llmtasks import bodies, pulse
from llmtasks.errors import Lost
from llmtasks.models import FINAL, IdempotencyKey, Kind, Status, Task, TaskPayload
from llmtasks.stores import fetch, loads
from providers.types import Usage

# An inline task that ended so gave no final answer: its Idempotency-Key is free again.
# fmt: off
FORGETTABLE = frozenset(
    {
        "RateLimited", "LimitReached", "Overloaded", "NoProvider", "Interrupted", "ClientLeft",
        "InternalError",
    }
)
# fmt: on


class ClockTimestamp(Func):
    """Postgres's clock now; `Now()` would be the transaction's start."""

    template = "clock_timestamp()"
    output_field = DateTimeField()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one attempt ended. `cost` is None where it is unpriced."""

    usage: Usage
    cost: Decimal | None
    cost_state: str
    price_id: int | None = None
    raw_usage: Mapping[str, Any] | None = None
    latency_ms: int | None = None
    first_token_ms: int | None = None
    http_status: int | None = None
    error_class: str = ""
    error_message: str = ""
    vendor_request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A model's answer as a step of its task, written with the attempt that gave it."""

    number: int
    name: str
    output: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What becomes of the task: a final status, or `waiting` again after `wait_s` seconds."""

    status: str
    response: bytes | None = None
    turn: Turn | None = None
    error_class: str = ""
    error_message: str = ""
    error_status: int | None = None
    error_param: str = ""
    retry_after: float | None = None
    wait_s: float = 0.0


INSERT_TASK = """
    INSERT INTO llmtasks_task (
        id, tenant_id, key_id, kind, mode, lane, status, route, provider, prompt, "user", metadata,
        request_id, on_unknown, streams, created_at, run_at, not_before, deadline, started_at,
        seq, fence, owner_id, attempts, input_tokens, cached_input_tokens, cache_write_tokens,
        output_tokens, reasoning_tokens, cost_state, error_class, error_message, error_param,
        retry_of
    ) VALUES (
        %(task)s, %(tenant)s, %(key)s, %(kind)s, %(mode)s, %(lane)s, 'running', %(route)s,
        %(provider)s, %(prompt)s, %(user)s, %(metadata)s, %(request_id)s, %(on_unknown)s,
        %(streams)s, %(created_at)s, NULL, %(created_at)s, %(deadline)s, clock_timestamp(),
        0, %(fence)s, %(owner)s, 1, 0, 0, 0, 0, 0, '', '', '', '', %(retry_of)s
    )"""

INSERT_PAYLOAD = """
    INSERT INTO llmtasks_taskpayload (task_id, version, request)
    VALUES (%(task)s, %(version)s, %(body)s::jsonb)"""

INSERT_KEY = """
    INSERT INTO llmtasks_idempotencykey
        (id, tenant_id, endpoint, key, body_hash, task_id, expires_at)
    VALUES (%(key_id)s, %(tenant)s, %(key_endpoint)s, %(key_text)s, %(key_hash)s, %(task)s,
            %(key_expires)s)"""

ATTEMPT_COLUMNS = """
    INSERT INTO llmtasks_attempt (
        id, task_id, tenant_id, step, number, provider, model, state, started_at,
        error_class, error_message, vendor_request_id,
        input_tokens, cached_input_tokens, cache_write_5m_tokens, cache_write_1h_tokens,
        output_tokens, reasoning_tokens, price_id, cost, cost_state
    )
    SELECT %(attempt)s, %(task)s, %(tenant)s, %(step)s, %(number)s, %(provider)s, %(model)s,
           'sent', clock_timestamp(), '', '', '', 0, 0, 0, 0, 0, 0, %(price)s::int,
           %(cost)s::numeric, %(cost_state)s::text"""

BEGIN_NEW = f"WITH t AS ({INSERT_TASK}), p AS ({INSERT_PAYLOAD}) {ATTEMPT_COLUMNS} RETURNING id"
BEGIN_NEW_WITH_KEY = (
    f"WITH t AS ({INSERT_TASK}), p AS ({INSERT_PAYLOAD}), k AS ({INSERT_KEY}) "
    f"{ATTEMPT_COLUMNS} RETURNING id"
)
BEGIN_AGAIN = f"""
WITH t AS (
    UPDATE llmtasks_task SET attempts = attempts + 1, provider = %(provider)s
    WHERE id = %(task)s AND status || '' = 'running' AND fence = %(fence)s RETURNING id
) {ATTEMPT_COLUMNS} FROM t RETURNING id"""


def begin(
    task: Task,
    *,
    attempt_id: UUID,
    step: int,
    number: int,
    provider: str,
    model: str,
    estimate: Decimal | None,
    cost_state: str,
    price_id: int | None,
) -> None:
    """Write the attempt as `sent`, in a transaction of its own.

    An inline task is written with its first attempt. Raises `Lost` where the task is no longer
    ours, `IntegrityError` where its Idempotency-Key was taken meanwhile.
    """
    values: dict[str, Any] = {
        "attempt": attempt_id,
        "task": task.id,
        "tenant": task.tenant_id,
        "step": step,
        "number": number,
        "provider": provider,
        "model": model,
        "price": price_id,
        "cost": estimate,
        "cost_state": cost_state,
        "fence": task.fence,
    }
    if task._state.adding:
        sql = BEGIN_NEW_WITH_KEY if task.key_row else BEGIN_NEW
        fetch(sql, values | new_task_values(task), prepare=True)
        task._state.adding = False
        task.started_at = pulse.now()
    elif not fetch(BEGIN_AGAIN, values, prepare=True):
        raise Lost
    task.attempts += 1
    task.provider = provider


def new_task_values(task: Task) -> dict[str, Any]:
    values: dict[str, Any] = {
        "key": task.key_id,
        "kind": task.kind,
        "mode": task.mode,
        "lane": task.lane,
        "route": task.route,
        "prompt": task.prompt,
        "user": task.user,
        "metadata": Jsonb(task.metadata),
        "request_id": task.request_id,
        "on_unknown": task.on_unknown,
        "streams": task.streams,
        "created_at": task.created_at,
        "deadline": task.deadline,
        "owner": task.owner_id,
        "retry_of": task.retry_of,
        "version": bodies.VERSION,
        "body": task.body.decode(),
    }
    if (row := task.key_row) is not None:
        values |= {
            "key_id": row.id,
            "key_endpoint": row.endpoint,
            "key_text": row.key,
            "key_hash": row.body_hash,
            "key_expires": row.expires_at,
        }
    return values


SETTLED = """
    state = 'settled', finished_at = clock_timestamp(), latency_ms = %(latency_ms)s::int,
    first_token_ms = %(first_token_ms)s::int, http_status = %(http_status)s::int,
    error_class = %(error_class)s, error_message = %(error_message)s,
    vendor_request_id = %(vendor_request_id)s, input_tokens = %(input)s,
    cached_input_tokens = %(cached)s, cache_write_5m_tokens = %(write_5m)s,
    cache_write_1h_tokens = %(write_1h)s, output_tokens = %(output)s,
    reasoning_tokens = %(reasoning)s, raw_usage = %(raw_usage)s::jsonb,
    price_id = %(price)s::int, cost = %(cost)s::numeric, cost_state = %(cost_state)s::text
"""
SETTLE = f"""
UPDATE llmtasks_attempt SET {SETTLED} WHERE id = %(attempt)s AND state <> 'settled' RETURNING id
"""
# What a settlement changes of a task beside its end.
COUNTED = (
    "cost", "cost_state", "attempts", "input_tokens", "cached_input_tokens", "cache_write_tokens",
    "output_tokens", "reasoning_tokens", "provider", "finished_at",
)  # fmt: skip
# The task's row is locked before the attempt's, as everywhere. A cancel that came too late to
# drop the call ends a task that would wait for its next.
FINISH_START = f"""
WITH mine AS (
    SELECT id, CASE WHEN %(status)s::text = 'waiting' AND cancel_requested_at IS NOT NULL
                    THEN 'cancelled' ELSE %(status)s::text END AS status
    FROM llmtasks_task
    WHERE id = %(task)s AND status || '' = 'running' AND fence = %(fence)s FOR UPDATE
), a AS (
    UPDATE llmtasks_attempt SET {SETTLED}
    WHERE id = %(attempt)s AND state = 'sent' AND task_id IN (SELECT id FROM mine)
    RETURNING task_id, provider, started_at
), p AS (
    UPDATE llmtasks_taskpayload SET response = %(response)s::text::jsonb
    WHERE %(response)s::text IS NOT NULL AND task_id IN (SELECT task_id FROM a)
)"""
INSERT_TURN = """, s AS (
    INSERT INTO llmtasks_step (
        id, task_id, tenant_id, number, kind, name, status, output, error_class, call_id,
        started_at, finished_at, decided_by, comment
    )
    SELECT %(attempt)s, a.task_id, %(tenant)s, %(turn)s::int, 'model', %(turn_name)s, 'done',
        %(turn_output)s::text::jsonb, '', '', a.started_at, clock_timestamp(), '', '' FROM a
    ON CONFLICT (task_id, number) DO NOTHING
)"""
FINISH_END = f"""
UPDATE llmtasks_task t SET
    input_tokens = input_tokens + %(input)s,
    cached_input_tokens = cached_input_tokens + %(cached)s,
    cache_write_tokens = cache_write_tokens + %(write_5m)s + %(write_1h)s,
    output_tokens = output_tokens + %(output)s,
    reasoning_tokens = reasoning_tokens + %(reasoning)s,
    cost = CASE WHEN 'unpriced' NOT IN (t.cost_state, %(cost_state)s::text)
                THEN coalesce(cost, 0) + %(cost)s::numeric END,
    cost_state = CASE
        WHEN 'unpriced' IN (t.cost_state, %(cost_state)s::text) THEN 'unpriced'
        WHEN 'estimated' IN (t.cost_state, %(cost_state)s::text) THEN 'estimated'
        ELSE 'final' END,
    status = mine.status,
    provider = a.provider,
    owner_id = CASE WHEN mine.status = 'running' THEN owner_id END,
    finished_at = CASE WHEN mine.status = ANY(%(final)s) THEN clock_timestamp() END,
    not_before = clock_timestamp() + make_interval(secs => %(wait_s)s),
    error_class = CASE WHEN mine.status = 'cancelled' AND %(status)s::text = 'waiting'
                       THEN 'Cancelled' ELSE %(end_class)s::text END,
    error_message = CASE WHEN mine.status = 'cancelled' AND %(status)s::text = 'waiting'
                         THEN 'cancelled on request' ELSE %(end_message)s::text END,
    error_status = %(end_status)s::int, error_param = %(end_param)s,
    retry_after = %(retry_after)s::float
FROM a, mine WHERE t.id = a.task_id AND mine.id = t.id
RETURNING t.status, {", ".join(f"t.{name}" for name in COUNTED)}
"""
FINISH = FINISH_START + FINISH_END
FINISH_TURN = FINISH_START + INSERT_TURN + FINISH_END


def finish(task: Task, attempt_id: UUID, outcome: Outcome, end: End) -> None:
    """Settle the attempt and change the task, in one statement.

    The attempt is settled whatever became of the task, since a true cost is never thrown away.
    Raises `Lost` where the task was no longer ours, after the money was written.
    """
    values = outcome_values(attempt_id, outcome) | end_values(task, end)
    forget = task.key_row is not None and end.error_class in FORGETTABLE
    sql = FINISH
    if end.turn is not None:
        sql = FINISH_TURN
        values |= {
            "tenant": task.tenant_id,
            "turn": end.turn.number,
            "turn_name": end.turn.name,
            "turn_output": end.turn.output.decode(),
        }
    with transaction.atomic() if forget else nullcontext():
        rows = fetch(sql, values, prepare=True)
        if rows and forget:
            IdempotencyKey.objects.filter(task_id=task.id).delete()
    if not rows:
        rows = settle_late(task, attempt_id, outcome, end)
    [(status, *counted)] = rows
    for name, value in zip(COUNTED, counted, strict=True):
        setattr(task, name, value)
    put_end(task, end if status == end.status else CANCELLED)


def outcome_values(attempt_id: UUID, outcome: Outcome) -> dict[str, Any]:
    usage = outcome.usage
    return {
        "attempt": attempt_id,
        "latency_ms": outcome.latency_ms,
        "first_token_ms": outcome.first_token_ms,
        "http_status": outcome.http_status,
        "error_class": outcome.error_class,
        "error_message": bodies.storable(outcome.error_message),
        "vendor_request_id": bodies.storable(outcome.vendor_request_id)[:200],
        "input": usage.input_tokens,
        "cached": usage.cached_input_tokens,
        "write_5m": usage.cache_write_5m_tokens,
        "write_1h": usage.cache_write_1h_tokens,
        "output": usage.output_tokens,
        "reasoning": usage.reasoning_tokens,
        "raw_usage": None if outcome.raw_usage is None else bodies.dump(outcome.raw_usage).decode(),
        "price": outcome.price_id,
        "cost": outcome.cost,
        "cost_state": outcome.cost_state,
    }


def end_values(task: Task, end: End) -> dict[str, Any]:
    return {
        "task": task.id,
        "fence": task.fence,
        "status": end.status,
        "final": [str(status) for status in FINAL],
        "wait_s": end.wait_s,
        "response": None if end.response is None else end.response.decode(),
        "end_class": end.error_class,
        "end_message": bodies.storable(end.error_message),
        "end_status": end.error_status,
        "end_param": end.error_param,
        "retry_after": end.retry_after,
    }


CANCELLED = End(
    status=Status.CANCELLED, error_class="Cancelled", error_message="cancelled on request"
)


def put_end(task: Task, end: End) -> None:
    """Show the end on the object in memory."""
    task.status = end.status
    task.error_class = end.error_class
    task.error_message = end.error_message
    task.error_status = end.error_status
    task.error_param = end.error_param
    task.retry_after = end.retry_after


def settle_late(task: Task, attempt_id: UUID, outcome: Outcome, end: End) -> list[Any]:
    """Settle an attempt whose task `FINISH` did not find, and count the task's money anew.

    Raises `Lost`, unless it was our own `FINISH` that changed both: the connection broke before
    its answer came.
    """
    row = None
    if not settle_apart(task.id, attempt_id, outcome):
        row = Task.objects.filter(id=task.id).first()
    if row is None or (row.fence, row.status) != (task.fence, end.status):
        raise Lost
    return [(row.status, *(getattr(row, name) for name in COUNTED))]


def settle_apart(task_id: UUID, attempt_id: UUID, outcome: Outcome) -> bool:
    """Settle an attempt that decides nothing of its task's end, whatever the task's state, and
    count its money anew. Whether the attempt was open."""
    with transaction.atomic():
        # The task first, as everywhere: two settlements of one task must not cross.
        Task.objects.select_for_update().filter(id=task_id).first()
        if not fetch(SETTLE, outcome_values(attempt_id, outcome)):
            return False
        recount([task_id])
        return True


RECOUNT = """
UPDATE llmtasks_task t SET
    input_tokens = s.input, cached_input_tokens = s.cached, cache_write_tokens = s.written,
    output_tokens = s.output, reasoning_tokens = s.reasoning,
    cost = CASE WHEN s.unpriced = 0 THEN s.cost END,
    cost_state = CASE WHEN s.attempts = 0 THEN '' WHEN s.unpriced > 0 THEN 'unpriced'
                      WHEN s.estimated > 0 THEN 'estimated' ELSE 'final' END
FROM (
    SELECT task_id, count(*) AS attempts, sum(input_tokens) AS input,
        sum(cached_input_tokens) AS cached,
        sum(cache_write_5m_tokens + cache_write_1h_tokens) AS written,
        sum(output_tokens) AS output, sum(reasoning_tokens) AS reasoning, sum(cost) AS cost,
        count(*) FILTER (WHERE cost_state = 'unpriced') AS unpriced,
        count(*) FILTER (WHERE cost_state = 'estimated') AS estimated
    FROM llmtasks_attempt WHERE task_id = ANY(%(ids)s) AND state <> 'sent' GROUP BY task_id
) s
WHERE t.id = s.task_id
"""


def recount(task_ids: Sequence[UUID]) -> None:
    """Make the tasks' tokens and cost the sums over their attempts, and so those of the workflows
    that they are steps of. The caller has locked them."""
    fetch(RECOUNT, {"ids": list(task_ids)})
    sum_up(parents_of(task_ids))


def parents_of(task_ids: Sequence[UUID]) -> list[UUID]:
    found = Task.objects.filter(id__in=task_ids).values_list("parent_id", flat=True)
    return sorted({parent for parent in found if parent is not None})


# A workflow has no attempts of its own.
SUM_UP = """
UPDATE llmtasks_task t SET
    input_tokens = s.input, cached_input_tokens = s.cached, cache_write_tokens = s.written,
    output_tokens = s.output, reasoning_tokens = s.reasoning, cost = s.cost,
    cost_state = s.cost_state
FROM (
    SELECT parent_id, sum(input_tokens) AS input, sum(cached_input_tokens) AS cached,
        sum(cache_write_tokens) AS written, sum(output_tokens) AS output,
        sum(reasoning_tokens) AS reasoning,
        CASE WHEN bool_or(cost_state = 'unpriced') THEN NULL ELSE sum(cost) END AS cost,
        CASE WHEN bool_or(cost_state = 'unpriced') THEN 'unpriced'
             WHEN bool_or(cost_state = 'estimated') THEN 'estimated'
             WHEN bool_or(cost_state = 'final') THEN 'final' ELSE '' END AS cost_state
    FROM llmtasks_task WHERE parent_id = ANY(%(ids)s) GROUP BY parent_id
) s
WHERE t.id = s.parent_id AND t.id = ANY(%(ids)s)
    AND (t.cost, t.cost_state, t.input_tokens, t.cached_input_tokens, t.cache_write_tokens,
         t.output_tokens, t.reasoning_tokens)
        IS DISTINCT FROM
        (s.cost, s.cost_state, s.input, s.cached, s.written, s.output, s.reasoning)
RETURNING t.id, t.cost
"""


def sum_up(task_ids: Sequence[UUID], among: QuerySet[Task] | None = None) -> Decimal | None:
    """Make workflows' tokens and cost the sums over their children, and so on upward for as long
    as something changes. Other tasks are left alone. The cost of the last one, if it changed."""
    rows = Task.objects.all() if among is None else among
    wanted, cost = sorted(task_ids), None
    while wanted:
        with transaction.atomic():
            # Locked before they are summed: else the older of two sums might be written last.
            found = rows.filter(id__in=wanted, kind=Kind.WORKFLOW).order_by("id")
            locked = list(found.select_for_update(of=("self",)).values_list("id", flat=True))
            changed = fetch(SUM_UP, {"ids": locked}) if locked else []
        cost = changed[-1][1] if changed else cost
        wanted = parents_of([task_id for task_id, _ in changed]) if changed else []
        rows = Task.objects.all()
    return cost


# All that is open below the tasks, workflows' own steps too.
OPEN_BELOW = """
WITH RECURSIVE below AS (
    SELECT id, kind FROM llmtasks_task
    WHERE parent_id = ANY(%(ids)s) AND status IN ('waiting', 'queued', 'running', 'blocked')
    UNION ALL
    SELECT c.id, c.kind FROM below b JOIN llmtasks_task c ON c.parent_id = b.id
    WHERE b.kind = 'workflow' AND c.status IN ('waiting', 'queued', 'running', 'blocked')
)
SELECT id FROM below ORDER BY id
"""
CANCEL_MANY = """
WITH mine AS (
    SELECT id FROM llmtasks_task
    WHERE id = ANY(%(ids)s) AND status || '' IN ('waiting', 'queued', 'running', 'blocked')
    ORDER BY id FOR UPDATE
)
UPDATE llmtasks_task t SET
    status = CASE WHEN status = 'running' THEN status ELSE 'cancelled' END,
    cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()),
    finished_at = CASE WHEN status <> 'running' THEN clock_timestamp() END,
    error_class = CASE WHEN status = 'running' THEN error_class ELSE 'Cancelled' END,
    error_message = CASE WHEN status = 'running' THEN error_message ELSE %(why)s END
FROM mine WHERE t.id = mine.id
    AND (t.status <> 'running' OR t.cancel_requested_at IS NULL)
RETURNING t.id, t.status
"""
CANCELLED_AT_ONCE = 1000


def cancel_below(task_ids: Sequence[UUID], why: str) -> list[UUID]:
    """Cancel all that is open below the tasks: at once what waits, within a second what runs.
    Which ended at once."""
    return cancel_many([task_id for (task_id,) in fetch(OPEN_BELOW, {"ids": list(task_ids)})], why)


def cancel_many(ids: Sequence[UUID], why: str) -> list[UUID]:
    """As `cancel_below`, for these tasks themselves."""
    ids, ended = sorted(ids), []
    for at in range(0, len(ids), CANCELLED_AT_ONCE):
        batch = {"ids": ids[at : at + CANCELLED_AT_ONCE], "why": why}
        moved = fetch(CANCEL_MANY, batch)
        ended += [task_id for task_id, status in moved if status == Status.CANCELLED]
    return ended


def write_ended(task: Task, end: End) -> None:
    """Write an inline task that ended before its first attempt: alone, and already final."""
    put_end(task, end)
    task.error_message = bodies.storable(end.error_message)
    if end.error_class in FORGETTABLE:
        task.key_row = None
    task.finished_at = task.started_at = pulse.now()
    task.owner_id = None
    insert(task)


def insert_running(task: Task) -> None:
    """Write an inline task that begins without an attempt. Raises `IntegrityError` where its
    Idempotency-Key was taken meanwhile."""
    task.started_at = pulse.now()
    insert(task)


def insert(task: Task) -> None:
    """The rows of an inline task: itself, its payload, its Idempotency-Key."""
    with transaction.atomic():
        Task.objects.bulk_create([task])
        TaskPayload.objects.bulk_create(
            [TaskPayload(task_id=task.id, version=bodies.VERSION, request=orjson.loads(task.body))]
        )
        if task.key_row is not None:
            task.key_row.save(force_insert=True)
    task._state.adding = False


def move(
    task_id: UUID,
    leaving: Sequence[str],
    to: str,
    *,
    fence: int | None = None,
    where: Mapping[str, Any] | None = None,
    **changes: Any,
) -> bool:
    """One arrow of the state diagram; whether it was ours to go.

    `leaving` are the states that it may start from; for a running task give its `fence`.
    """
    rows = Task.objects.filter(id=task_id, status__in=leaving, **(where or {}))
    if fence is not None:
        rows = rows.filter(fence=fence)
    if to in FINAL:
        changes["finished_at"] = ClockTimestamp()
    if to != Status.RUNNING:
        changes["owner_id"] = None
    return rows.update(status=to, **changes) == 1


def end_running(task: Task, end: End) -> None:
    """Change a task of ours that has no attempt to settle. Raises `Lost`."""
    with transaction.atomic():
        if end.response is not None:
            found = TaskPayload.objects.filter(task_id=task.id)
            found.update(response=orjson.loads(end.response))
        move_running(task, end)


def move_running(task: Task, end: End) -> None:
    # A task whose cancel was asked for does not go back to waiting.
    unless = {"cancel_requested_at": None} if end.status == Status.WAITING else {}
    for chosen, where in ((end, unless), (CANCELLED, {})):
        if move(task.id, [Status.RUNNING], chosen.status, where=where, **ours(task, chosen)):
            break
        if not unless:
            raise Lost
    else:
        raise Lost
    put_end(task, chosen)
    if chosen.status in FINAL:
        task.finished_at = Task.objects.values_list("finished_at", flat=True).get(id=task.id)
    if task.key_row is not None and chosen.error_class in FORGETTABLE:
        IdempotencyKey.objects.filter(task_id=task.id).delete()


def ours(task: Task, end: End) -> dict[str, Any]:
    return {
        "fence": task.fence,
        "not_before": ClockTimestamp() + timedelta(seconds=end.wait_s),
        "error_class": end.error_class,
        "error_message": bodies.storable(end.error_message),
        "error_status": end.error_status,
        "error_param": end.error_param,
        "retry_after": end.retry_after,
    }


TASK_COLUMNS = [column.column for column in Task._meta.concrete_fields]
CLAIM = f"""
UPDATE llmtasks_task t SET
    status = 'running', fence = fence + 1, owner_id = %(owner)s,
    started_at = coalesce(started_at, clock_timestamp())
FROM llmtasks_taskpayload p
WHERE t.id = %(task)s AND p.task_id = t.id AND t.seq = %(seq)s AND t.status || '' = 'queued'
RETURNING {", ".join(f't."{name}"' for name in TASK_COLUMNS)}, p.request
"""


def claim(task_id: UUID, seq: int, owner_id: UUID) -> tuple[Task, Any] | None:
    """`queued → running` for release `seq`: the task and its stored request, or None where the
    hint is stale (a second copy, a task that was cancelled or released anew)."""
    rows = fetch(CLAIM, {"task": task_id, "seq": seq, "owner": owner_id}, prepare=True)
    if not rows:
        return None
    *values, request = rows[0]
    task = Task.from_db(None, [c.attname for c in Task._meta.concrete_fields], values)
    task.metadata = loads(task.metadata)
    task.body = request.encode() if isinstance(request, str) else orjson.dumps(request)
    return task, loads(request)
