"""The way in: validate → idempotency → task.

Inline work becomes an unsaved task, which `ledger.begin` writes together with its first attempt.
Queued work becomes rows in status `waiting`, and the dispatcher is woken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeGuard
from uuid import UUID

import orjson
from django.conf import settings
from django.db import IntegrityError, transaction
from uuid_utils.compat import uuid7

from llmtasks import bodies, crash, pulse, queues, routing
from llmtasks.errors import ApiError, Conflict, InvalidInput, KeyReused, NotFound
from llmtasks.models import (
    FINAL,
    IdempotencyKey,
    Kind,
    Lane,
    Mode,
    OnUnknown,
    Status,
    Task,
    TaskPayload,
)

MAX_DEADLINE_S = 30 * 86_400.0
MAX_AHEAD = timedelta(days=365)
# How often work is made anew because requests with the same keys were faster.
KEY_LOOKS = 5
REUSED = "this Idempotency-Key came with another body before: use a new key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Idempotency:
    """A client's key for one endpoint, and the SHA-256 of the body that came with it."""

    endpoint: str
    key: str
    body_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a door hands over. `request.model` is the name of a route.

    `stream`: whether deltas are published while queued work runs; None leaves it to the lane
    (bulk work is not watched). `deadline_s` counts from now, or from `run_at`.
    """

    tenant_id: UUID
    key_id: UUID | None
    kind: str
    request: Any
    lane: str = Lane.DEFAULT
    metadata: dict[str, Any] = field(default_factory=dict)
    user: str = ""
    request_id: str = ""
    run_at: datetime | None = None
    deadline_s: float | None = None
    on_unknown: str = OnUnknown.RETRY
    stream: bool | None = None
    idempotency: Idempotency | None = None
    retry_of: UUID | None = None
    # The version of a prompt that the request was made of, `name@number`.
    prompt: str = ""


def inline(work: Work) -> Task:
    """An unsaved task for work that runs in the caller's thread. Raises `ApiError`s."""
    if work.run_at is not None:
        raise InvalidInput("inline work runs now: leave run_at out, or queue it", param="run_at")
    if work.kind == Kind.WORKFLOW:
        raise InvalidInput("a workflow is queued: leave mode out", param="mode")
    return make(work, Mode.INLINE)


def queued(works: Sequence[Work]) -> list[Task | ApiError]:
    """A saved task for each work, or the error that refused it, in order.

    All that are valid are saved in one transaction. A work whose Idempotency-Key was used before,
    here too, gives the task of then.
    """
    for _ in range(KEY_LOOKS):
        results = [found_or_made(work) for work in works]
        share_keys(results)
        fresh = {task.id: task for task in results if is_fresh(task)}
        try:
            save(list(fresh.values()))
        except IntegrityError:
            # Another request with the same key was faster; now its task is there to be found.
            if not any(task.key_row for task in fresh.values()):
                raise
            continue
        if fresh:
            crash.point("submit.saved")
            queues.wake()
        return results
    raise Conflict("other requests with this Idempotency-Key were faster", retry_after=1)


def found_or_made(work: Work) -> Task | ApiError:
    try:
        found = replay(work.tenant_id, work.idempotency) if work.idempotency else None
        return found or make(work, Mode.QUEUED)
    except ApiError as error:
        return error


def is_fresh(result: Task | ApiError) -> TypeGuard[Task]:
    return isinstance(result, Task) and result._state.adding


def share_keys(results: list[Task | ApiError]) -> None:
    """Within one request too a key stands for one task."""
    first: dict[tuple[UUID, str, str], Task] = {}
    for index, task in enumerate(results):
        if not is_fresh(task) or (row := task.key_row) is None:
            continue
        known = first.setdefault((row.tenant_id, row.endpoint, row.key), task)
        if known.key_row is None or known.key_row.body_hash == row.body_hash:
            results[index] = known
        else:
            results[index] = KeyReused(REUSED)


def save(tasks: Sequence[Task]) -> None:
    """Insert tasks with their bodies and keys, all or none."""
    if not tasks:
        return
    keys = [task.key_row for task in tasks if task.key_row]
    with transaction.atomic():
        Task.objects.bulk_create(tasks)
        TaskPayload.objects.bulk_create(
            TaskPayload(task_id=task.id, version=bodies.VERSION, request=orjson.loads(task.body))
            for task in tasks
        )
        IdempotencyKey.objects.bulk_create(keys)
        crash.point("submit.inserted")


def make(work: Work, mode: str) -> Task:
    """The unsaved task, checked."""
    route, provider = place_of(work)
    now = pulse.now()
    start = max(now, work.run_at or now)
    if start - now > MAX_AHEAD:
        raise InvalidInput("run_at is more than a year ahead", param="run_at")
    task = Task(
        id=uuid7(),
        tenant_id=work.tenant_id,
        key_id=work.key_id,
        kind=work.kind,
        mode=mode,
        lane=work.lane,
        status=Status.RUNNING if mode == Mode.INLINE else Status.WAITING,
        route=route,
        provider=provider,
        prompt=work.prompt,
        user=work.user,
        metadata=work.metadata,
        request_id=work.request_id,
        on_unknown=work.on_unknown,
        streams=wants_deltas(work),
        created_at=now,
        run_at=work.run_at,
        not_before=start,
        deadline=start + timedelta(seconds=deadline_s(work, mode)),
        retry_of=work.retry_of,
    )
    task.body = bodies.dump_request(work.kind, work.request)
    if work.idempotency is not None:
        task.key_row = key_row(task, work.idempotency)
    return task


def place_of(work: Work) -> tuple[str, str]:
    """The route, and the provider whose queue it goes to; tools and workflows have their own."""
    if work.kind == Kind.TOOL:
        return work.request.tool, routing.TOOLS
    if work.kind == Kind.WORKFLOW:
        return work.request.name, routing.WORKFLOWS
    request = work.request.chat if work.kind == Kind.AGENT else work.request
    route = routing.find(work.request.model, work.kind)
    candidates = routing.supporting(route, request)
    chosen = next((c for c in candidates if c.is_usable), candidates[0])
    return route.name, chosen.provider


def wants_deltas(work: Work) -> bool:
    if work.kind not in (Kind.CHAT, Kind.AGENT):
        return False
    return work.lane != Lane.BULK if work.stream is None else work.stream


def deadline_s(work: Work, mode: str) -> float:
    name = "INLINE_DEADLINE_S" if mode == Mode.INLINE else "QUEUED_DEADLINE_S"
    wanted = settings.LLMTASKS[name] if work.deadline_s is None else work.deadline_s
    if not 0 < wanted <= MAX_DEADLINE_S:
        raise InvalidInput(
            f"deadline_s is in seconds, more than 0 and at most {MAX_DEADLINE_S:.0f}",
            param="deadline_s",
        )
    return float(wanted)


def key_row(task: Task, given: Idempotency) -> IdempotencyKey:
    """The unsaved row for the task's Idempotency-Key."""
    return IdempotencyKey(
        id=uuid7(),
        tenant_id=task.tenant_id,
        endpoint=given.endpoint,
        key=given.key,
        body_hash=given.body_hash,
        task_id=task.id,
        expires_at=pulse.now() + timedelta(hours=settings.LLMTASKS["IDEMPOTENCY_HOURS"]),
    )


def replay(tenant_id: UUID, given: Idempotency) -> Task | None:
    """The task that this key was used for, with its payload; None where there is none.

    Raises `KeyReused` for another body and `Conflict` while an inline task still runs. A key
    whose work may be tried again was deleted with its end (`ledger.FORGETTABLE`).
    """
    found = IdempotencyKey.objects.filter(
        tenant_id=tenant_id, endpoint=given.endpoint, key=given.key
    )
    row = found.first()
    if row is None:
        return None
    if row.expires_at <= pulse.now():
        found.filter(id=row.id).delete()
        return None
    if row.body_hash != given.body_hash:
        raise KeyReused(REUSED)
    task = Task.objects.select_related("payload").filter(id=row.task_id).first()
    if task is None:
        found.filter(id=row.id).delete()
    elif task.mode == Mode.INLINE and task.status not in FINAL:
        raise Conflict("the request with this Idempotency-Key still runs: ask again", retry_after=1)
    return task


def retry(
    task_id: UUID, tenant_id: UUID | None = None, idempotency: Idempotency | None = None
) -> Task:
    """A new queued task with the body of a final one. Raises `NotFound`, `Conflict`."""
    found = Task.objects.select_related("payload").filter(id=task_id)
    if tenant_id is not None:
        found = found.filter(tenant_id=tenant_id)
    task = found.first()
    if task is None:
        raise NotFound(f"there is no task {task_id}")
    if task.status not in FINAL:
        raise Conflict(f"the task is {task.status}: only a finished one can be retried")
    stored = TaskPayload.objects.filter(task_id=task_id).first()
    if stored is None:
        raise Conflict("the task's request was deleted: send it again")
    work = Work(
        tenant_id=task.tenant_id,
        key_id=task.key_id,
        kind=task.kind,
        request=bodies.load_request(task.kind, stored.request),
        lane=task.lane,
        metadata=task.metadata,
        user=task.user,
        on_unknown=task.on_unknown,
        stream=task.streams,
        idempotency=idempotency,
        retry_of=task.id,
        prompt=task.prompt,
    )
    [result] = queued([work])
    if isinstance(result, ApiError):
        raise result
    return result
