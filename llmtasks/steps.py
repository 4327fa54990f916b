"""Steps of a task: written down before they are done and after, under the task's fence, so that
a process that lost the task writes nothing.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from django.db import transaction

from llmtasks import bodies, events, ledger, queues, webhooks
from llmtasks.errors import Lost, Snooze
from llmtasks.ledger import ClockTimestamp
from llmtasks.models import FINAL, Status, Step, Task, TaskPayload
from llmtasks.stores import fetch

UNDECIDED = (Step.Status.APPROVAL, Step.Status.UNKNOWN)

BEGIN = """
WITH mine AS (
    SELECT id, tenant_id FROM llmtasks_task
    WHERE id = %(task)s AND status || '' = 'running' AND fence = %(fence)s FOR UPDATE
)
INSERT INTO llmtasks_step (id, task_id, tenant_id, number, kind, name, call_id, status, error_class,
    input, output, started_at, finished_at, decided_by, comment)
SELECT v.id, mine.id, mine.tenant_id, v.number, v.kind, v.name, v.call_id, v.status, v.error_class,
    v.input, v.output, v.started_at, v.finished_at, '', ''
FROM mine, jsonb_to_recordset(%(steps)s) AS v (id uuid, number int, kind text, name text,
    call_id text, status text, error_class text, input jsonb, output jsonb,
    started_at timestamptz, finished_at timestamptz)
RETURNING id
"""

FINISH = """
WITH mine AS (
    SELECT id FROM llmtasks_task
    WHERE id = %(task)s AND status || '' = 'running' AND fence = %(fence)s FOR UPDATE
)
UPDATE llmtasks_step s SET status = v.status, error_class = v.error_class, output = v.output,
    finished_at = clock_timestamp()
FROM mine, jsonb_to_recordset(%(steps)s)
    AS v (id uuid, status text, error_class text, output jsonb)
WHERE s.id = v.id AND s.task_id = mine.id RETURNING s.id
"""

# Where something is still open: else whoever ended it last would have nobody to wake.
BLOCK = """
UPDATE llmtasks_task t SET
    status = CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
                  WHEN EXISTS (
                      SELECT 1 FROM llmtasks_step s WHERE s.task_id = t.id
                          AND s.status IN ('approval', 'unknown')
                  ) OR (
                      SELECT count(*) FROM llmtasks_task c WHERE c.id = ANY(%(children)s)
                          AND c.status NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
                  ) > %(may_be_open)s THEN 'blocked' ELSE 'waiting' END,
    finished_at = CASE WHEN cancel_requested_at IS NOT NULL THEN clock_timestamp() END,
    error_class = CASE WHEN cancel_requested_at IS NOT NULL THEN 'Cancelled' ELSE '' END,
    error_message = CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled on request'
                         ELSE '' END,
    owner_id = NULL, not_before = clock_timestamp(), waits_for = %(children)s,
    may_be_open = %(may_be_open)s
WHERE id = %(task)s AND status || '' = 'running' AND fence = %(fence)s
RETURNING status
"""

# Level-triggered: whatever ended a child, and however often this is asked.
WAKE = """
WITH free AS (
    SELECT id FROM llmtasks_task t
    WHERE status = 'blocked' AND (%(ids)s::uuid[] IS NULL OR id = ANY(%(ids)s))
        AND NOT EXISTS (
            SELECT 1 FROM llmtasks_step s WHERE s.task_id = t.id
                AND s.status IN ('approval', 'unknown'))
        AND (
            SELECT count(*) FROM llmtasks_task c WHERE c.id = ANY(t.waits_for)
                AND c.status NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
        ) <= t.may_be_open
    ORDER BY id LIMIT 1000 FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_task t SET status = 'waiting', not_before = clock_timestamp()
FROM free WHERE t.id = free.id AND t.status || '' = 'blocked' RETURNING t.id
"""

# Parents of children that ended lately, and now and then all that are blocked.
PARENTS = """
SELECT DISTINCT parent_id FROM llmtasks_task
WHERE parent_id IS NOT NULL AND finished_at > clock_timestamp() - make_interval(secs => %(age)s)
"""


def of(task_id: UUID) -> list[Step]:
    """The task's steps in order."""
    return list(Step.objects.filter(task_id=task_id).order_by("number"))


def page(task_id: UUID, after: int, limit: int) -> list[Step]:
    """So many of them that come after a number."""
    rows = Step.objects.filter(task_id=task_id, number__gt=after)
    return list(rows.order_by("number")[:limit])


def hold(task: Task) -> None:
    """Within a transaction: nobody takes the task before its end. Raises `Lost`."""
    mine = Task.objects.select_for_update().filter(
        id=task.id, status=Status.RUNNING, fence=task.fence
    )
    if not mine.values_list("id", flat=True):
        raise Lost


def begin(task: Task, rows: Sequence[Step], children: Sequence[Task] = ()) -> None:
    """Write steps, and the child tasks that they become, all or none. Raises `Lost`."""
    if not rows:
        return
    if children or any(step.status in UNDECIDED for step in rows):
        record(task, (), rows, children)
        return
    # Of most turns: one statement.
    write(BEGIN, task, rows, BEGUN)


def write(sql: str, task: Task, rows: Sequence[Step], names: Sequence[str]) -> None:
    """One statement for some fields of all these steps. Raises `Lost`."""
    steps = [{name: getattr(step, name) for name in names} for step in rows]
    values = {"task": task.id, "fence": task.fence, "steps": bodies.dump(steps).decode()}
    if not fetch(sql, values):
        raise Lost


# What a step begins with.
BEGUN = (
    "id", "number", "kind", "name", "call_id", "status", "error_class", "input", "output",
    "started_at", "finished_at",
)  # fmt: skip
# What of a workflow's step changes.
CHANGED = ("status", "error_class", "output", "input", "child_id", "tries", "finished_at")


def record(
    task: Task, changed: Sequence[Step], new: Sequence[Step], children: Sequence[Task]
) -> None:
    """Write how steps went on, the steps that begin, and their child tasks, all or none. Raises
    `Lost`."""
    with transaction.atomic():
        hold(task)
        # Most did what they were to do: one short statement for all of them.
        done = [step.id for step in changed if is_plainly_done(step)]
        Step.objects.filter(id__in=done).update(
            status=Step.Status.DONE, finished_at=ClockTimestamp()
        )
        others = [step for step in changed if not is_plainly_done(step)]
        Step.objects.bulk_update(others, CHANGED, batch_size=500)
        Step.objects.bulk_create(new)
        webhooks.announce(new)
        Task.objects.bulk_create(children)
        TaskPayload.objects.bulk_create(
            TaskPayload(task_id=child.id, version=bodies.VERSION, request=bodies.loads(child.body))
            for child in children
        )
    if children:
        queues.wake()


def is_plainly_done(step: Step) -> bool:
    """Whether its task is all that there is to say of it."""
    return step.status == Step.Status.DONE and not step.error_class


def change(task: Task, step: Step, status: str, **fields: Any) -> None:
    """Write how a step goes on. Raises `Lost`."""
    if status in (Step.Status.DONE, Step.Status.FAILED):
        fields["finished_at"] = ClockTimestamp()
    with transaction.atomic():
        hold(task)
        Step.objects.filter(id=step.id).update(status=status, **fields)
        step.status = status
        webhooks.announce([step])
    for name, value in fields.items():
        setattr(step, name, value)


def finish(task: Task, ended: Sequence[Step]) -> None:
    """Write the results of calls, all or none, in one statement. Raises `Lost`."""
    write(FINISH, task, ended, ("id", "status", "error_class", "output"))


def block(task: Task, children: Sequence[UUID], may_be_open: int = 0) -> None:
    """Let go of the task until its children have ended, all but so many, and people have decided.
    Raises `Lost`; `Snooze` once it is written."""
    values = {
        "task": task.id, "fence": task.fence, "children": sorted(children),
        "may_be_open": may_be_open,
    }  # fmt: skip
    rows = fetch(BLOCK, values)
    if not rows:
        raise Lost
    task.status = rows[0][0]
    queues.wake()
    raise Snooze(0.0)


def wake(ids: Sequence[UUID] | None = None) -> list[UUID]:
    """Put blocked tasks that have nothing open any more back to waiting; which."""
    return [task_id for (task_id,) in fetch(WAKE, {"ids": None if ids is None else list(ids)})]


def wake_parents(age_s: float) -> list[UUID]:
    """As `wake`, for the parents of children that ended in the last seconds."""
    parents = [parent for (parent,) in fetch(PARENTS, {"age": age_s})]
    if parents:
        # Of those that ended before their children did.
        ledger.sum_up(parents, Task.objects.filter(status__in=FINAL))
    return wake(parents) if parents else []


def decide(step_id: UUID, tenant_id: UUID, *, run: bool, by: str, comment: str) -> Step | None:
    """A person's word on a step that waits for one: run it, or tell the model that it was refused.
    None where it waits for nobody (any more)."""
    found = Step.objects.filter(id=step_id, tenant_id=tenant_id, status__in=UNDECIDED)
    refused = {
        "status": Step.Status.FAILED, "error_class": "Refused", "finished_at": ClockTimestamp(),
        "output": {"content": f"a person refused this call{': ' + comment if comment else ''}"},
    }  # fmt: skip
    changes: dict[str, Any] = {"status": Step.Status.APPROVED} if run else refused
    if not found.update(decided_by=by, comment=comment, **changes):
        return None
    step = Step.objects.get(id=step_id)
    tell(step)
    wake([step.task_id])
    queues.wake()
    return step


def tell(step: Step) -> None:
    """How the step stands, to whoever watches its task."""
    events.publish_step(
        step.task_id, number=step.number, kind=step.kind, name=step.name, status=step.status,
        call_id=step.call_id, background=step.child_id is not None, child_id=step.child_id,
        error=step.error_class,
    )  # fmt: skip


def children_of(task: Task, ids: Sequence[UUID]) -> dict[UUID, Task]:
    """The task's own children among these, with their answers."""
    rows = Task.objects.select_related("payload").filter(id__in=ids, parent_id=task.id)
    return {row.id: row for row in rows}


def is_final(child: Task) -> bool:
    return child.status in FINAL
