"""What somebody thought of a task's answer, and the export of tasks with what was thought of them.

An export reads in batches and holds no connection while its reader is slow: its memory and its
statements are the same for ten tasks and for ten million.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson

from llmtasks import stores
from llmtasks.models import Feedback, Task, TaskPayload

BATCH = 50
FIRST = UUID(int=0)
LAST = UUID(int=2**128 - 1)

PUT = """
INSERT INTO llmtasks_feedback (id, tenant_id, task_id, source, score, label, comment)
VALUES (%(id)s, %(tenant)s, %(task)s, %(source)s, %(score)s::float, %(label)s, %(comment)s)
ON CONFLICT (tenant_id, task_id, source) DO UPDATE SET
    score = excluded.score, label = excluded.label, comment = excluded.comment,
    updated_at = clock_timestamp()
RETURNING id
"""
# Each task once, by the index that holds a source to one row.
NEXT = """
SELECT DISTINCT task_id FROM llmtasks_feedback
WHERE tenant_id = %(tenant)s AND task_id > %(after)s AND task_id >= %(first)s
    AND task_id < %(before)s
ORDER BY task_id LIMIT %(batch)s
"""


def put(row: Feedback) -> bool:
    """Write what a source thinks, in place of what it thought; whether it is new."""
    values = {
        "id": row.id, "tenant": row.tenant_id, "task": row.task_id, "source": row.source,
        "score": row.score, "label": row.label, "comment": row.comment,
    }  # fmt: skip
    [(kept,)] = stores.fetch(PUT, values)
    return bool(kept == row.id)


def of(task_id: UUID, tenant_id: UUID) -> list[Feedback]:
    return list(Feedback.objects.filter(tenant_id=tenant_id, task_id=task_id).order_by("source"))


def exported(tenant_id: UUID, first: UUID = FIRST, before: UUID = LAST) -> Iterator[bytes]:
    """A line of JSON for each task of the tenant with feedback, the oldest first. `first` and
    `before` bound the tasks' ids, and so their times."""
    after = FIRST
    while True:
        values = {
            "tenant": tenant_id, "after": after, "first": first, "before": before, "batch": BATCH,
        }  # fmt: skip
        ids = [task_id for (task_id,) in stores.fetch(NEXT, values)]
        lines = list(lines_of(tenant_id, ids))
        stores.release()
        yield b"".join(lines)
        if len(ids) < BATCH:
            return
        after = ids[-1]


def lines_of(tenant_id: UUID, ids: Iterable[UUID]) -> Iterator[bytes]:
    given: dict[UUID, list[Feedback]] = defaultdict(list)
    wanted = list(ids)
    for row in Feedback.objects.filter(tenant_id=tenant_id, task_id__in=wanted).order_by("source"):
        given[row.task_id].append(row)
    payloads = TaskPayload.objects.in_bulk(wanted)
    for task in Task.objects.filter(tenant_id=tenant_id, id__in=wanted).order_by("id"):
        yield orjson.dumps(line(task, payloads.get(task.id), given[task.id])) + b"\n"


def line(task: Task, payload: TaskPayload | None, given: Iterable[Feedback]) -> dict[str, Any]:
    """`request` and `response` are null where they were deleted."""
    return {
        "id": str(task.id),
        "kind": task.kind,
        "status": task.status,
        "model": task.route,
        "provider": task.provider or None,
        "prompt": task.prompt or None,
        "created_at": moment(task.created_at),
        "finished_at": moment(task.finished_at),
        "user": task.user or None,
        "metadata": task.metadata,
        "input_tokens": task.input_tokens + task.cached_input_tokens + task.cache_write_tokens,
        "output_tokens": task.output_tokens + task.reasoning_tokens,
        "cost": None if task.cost is None else f"{task.cost.normalize():f}",
        "cost_state": task.cost_state or None,
        "feedback": [shown(row) for row in given],
        "request": None if payload is None else payload.request,
        "response": None if payload is None else payload.response,
    }


def shown(row: Feedback) -> dict[str, Any]:
    return {
        "source": row.source,
        "score": row.score,
        "label": row.label or None,
        "comment": row.comment or None,
        "created_at": moment(row.created_at),
        "updated_at": moment(row.updated_at),
    }


def moment(value: datetime | None) -> str | None:
    return None if value is None else value.astimezone(UTC).isoformat().replace("+00:00", "Z")
