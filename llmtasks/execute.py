"""Running a task: claim → run its kind → finish. Inline, streamed and queued work alike."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from socket import socket
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import IntegrityError, OperationalError

from llmtasks import attempts, bodies, call, crash, events, ledger, pulse, queues, stores
from llmtasks.bodies import TaskAnswer, TaskRequest
from llmtasks.context import Context, Event, Reset
from llmtasks.errors import (
    ApiError,
    Conflict,
    InternalError,
    Interrupted,
    Lost,
    NoProvider,
    NotFound,
    Snooze,
    TaskError,
    Unavailable,
)
from llmtasks.guards.rate_limit import Meter
from llmtasks.ledger import ClockTimestamp
from llmtasks.models import FINAL, Kind, Mode, Status, Task
from llmtasks.telemetry import task_id_var
from llmtasks.tools import alone, loop
from llmtasks.workflows import flow
from providers.errors import ProviderError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished inline task, its answer where there is one, a warning for the caller (the
    answer is not stored yet), and what is left of the caller's own limits. A failure stands in the
    task's `error_*` fields."""

    task: Task
    response: TaskAnswer | None
    warning: str = ""
    limits: tuple[Meter, ...] = ()


def run(task: Task, request: TaskRequest, *, client_socket: socket | None = None) -> Outcome:
    """Run an unsaved inline task to its end, in this thread.

    What went wrong with the work is in the outcome. Raises `ApiError`s for what keeps the work
    from being begun: `Unavailable` (Postgres is away), `Conflict` (its Idempotency-Key).
    """
    context = inline_context(task, client=client_socket)
    response = None
    try:
        with told_to_caller():
            response = whole(answer_of(request, context))
    except (ProviderError, TaskError, NoProvider, Lost) as error:
        conclude_inline(task, error)
    finally:
        stores.release()
    return Outcome(task, response, context.warning, context.own_limits)


def stream(
    task: Task, request: TaskRequest, context: Context | None = None
) -> Generator[Event | Outcome]:
    """As `run`, yielding the answer's deltas, then one `Outcome`. Closing the generator drops the
    call. No `Reset` comes: what went out over HTTP can't be taken back.

    `context` is an `inline_context` with `streams`, for whoever looks at it in between.
    """
    context = context or inline_context(task, streams=True)
    response = None
    try:
        with told_to_caller():
            response = yield from answer_of(request, context)
    except (ProviderError, TaskError, NoProvider, Lost) as error:
        conclude_inline(task, error)
    finally:
        stores.release()
    yield Outcome(task, response, context.warning, context.own_limits)


# What runs each kind of task: yields its deltas, returns its answer.
RUNNERS: dict[str, Callable[..., Generator[Event, None, Any]]] = {
    Kind.CHAT: call.stream,
    Kind.EMBEDDING: call.stream,
    Kind.AGENT: loop.stream,
    Kind.TOOL: alone.stream,
    Kind.WORKFLOW: flow.stream,
}


def answer_of(request: TaskRequest, context: Context) -> Generator[Event, None, TaskAnswer]:
    """Run the task's kind. A task that no call of a model ended is ended here."""
    task = context.task
    if task._state.adding and task.kind == Kind.TOOL:
        ledger.insert_running(task)
    answer: TaskAnswer = yield from RUNNERS[task.kind](request, context)
    if task.status == Status.RUNNING and not context.warning:
        body = bodies.dump_response(task.kind, answer)
        ledger.end_running(task, ledger.End(status=Status.SUCCEEDED, response=body))
    return answer


def whole(events_: Generator[Event, None, TaskAnswer]) -> TaskAnswer:
    while True:
        try:
            next(events_)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def inline_context(task: Task, *, streams: bool = False, client: socket | None = None) -> Context:
    """`client` is the caller's socket: a call whose caller hung up is dropped, or goes on as if
    nobody had left (CLIENT_LEFT)."""
    pulse.require_postgres()
    with told_to_caller():
        task.owner_id = pulse.owner_id()
    task.fence = 1
    return Context(task, streams=streams, client=None if is_drained() else client)


def is_drained() -> bool:
    """Whether the call of a caller that left is read to its end."""
    return settings.CLIENT_LEFT == "drain"


def leave(events: Generator[Event | Outcome]) -> None:
    """Nobody reads on: drop what is left of a stream, or read it to its end (CLIENT_LEFT)."""
    if is_drained():
        # What it raises is for the caller, who is gone.
        with suppress(ApiError):
            for _ in events:
                pass
    events.close()


@contextmanager
def told_to_caller() -> Iterator[None]:
    """What keeps work from being begun, as the caller is told."""
    try:
        yield
    except IntegrityError as error:
        raise Conflict("a request with this Idempotency-Key was faster", retry_after=1) from error
    except OperationalError as error:
        raise Unavailable("Postgres is away: try again shortly", retry_after=2) from error


def conclude_inline(task: Task, error: Exception) -> None:
    """Write how an inline task ended without an answer, for the caller to be told."""
    try:
        if isinstance(error, Lost):
            # Cancelled, or taken for dead: the row says what became of it.
            task.refresh_from_db()
        else:
            conclude(task, error)
    except IntegrityError as taken:
        raise Conflict("a request with this Idempotency-Key was faster", retry_after=1) from taken
    except OperationalError:
        log.warning("Postgres went away under a task", extra={"task": task.id})
        ledger.put_end(task, attempts.describe(attempts.final_status(error), error))
    if isinstance(error, NoProvider):
        raise error


def run_queued(task_id: UUID, seq: int) -> None:
    """Run release `seq` of a queued task, in a worker's thread.

    A hint that is stale changes nothing. Raises only database faults of the claim, which may be
    tried again.
    """
    crash.point("execute.received")
    if pulse.is_draining():
        hand_back(task_id, seq)
        return
    claimed = ledger.claim(task_id, seq, pulse.owner_id())
    crash.point("execute.claimed")
    stores.release()
    if claimed is None:
        log.info("a stale hint", extra={"task": task_id, "seq": seq})
        return
    task, stored = claimed
    token = task_id_var.set(str(task_id))
    try:
        events.publish(task.id, "state", {"status": Status.RUNNING})
        perform(task, stored)
    except OperationalError:
        # The pulse finds the task without a call and lets go of it.
        log.warning("Postgres went away under a task", extra={"task": task_id})
    finally:
        task_id_var.reset(token)
        stores.release()


def hand_back(task_id: UUID, seq: int) -> None:
    """A hint that came while this process ends: the task waits for another worker."""
    if ledger.move(task_id, [Status.QUEUED], Status.WAITING, where={"seq": seq}, queued_at=None):
        events.publish(task_id, "state", {"status": Status.WAITING})
    stores.release()


def perform(task: Task, stored: Any) -> None:
    """Run a claimed task and write its end. Raises `OperationalError`."""
    try:
        request = bodies.load_request(task.kind, stored)
        context = Context(task, streams=task.streams, may_restart=True)
        publish_deltas(context, answer_of(request, context))
    except Snooze:
        pass
    except Lost:
        log.warning("the task is somebody else's by now", extra={"task": task.id})
        return
    except (ProviderError, TaskError, ApiError) as error:
        conclude(task, error)
    except OperationalError:
        raise
    except Exception:
        log.exception("a task failed by a fault of ours", extra={"task": task.id})
        conclude(task, InternalError("internal error: see the server's log"))
    tell(task)


def publish_deltas(context: Context, answer: Iterator[Event]) -> None:
    for event in answer:
        if isinstance(event, Reset):
            events.publish_reset(context.task.id, event.attempt, event.reason)
        else:
            events.publish_piece(context.task.id, context.answering, event)


def conclude(task: Task, error: Exception) -> None:
    """Write a task's end by an error that came before its first attempt, or between two."""
    if task.status != Status.RUNNING:
        return
    end = attempts.describe(attempts.final_status(error), error)
    # No attempt is open here: nothing is unknown.
    if isinstance(error, Interrupted) and task.mode == Mode.QUEUED:
        end = ledger.End(status=Status.WAITING)
    try:
        if task._state.adding:
            ledger.write_ended(task, end)
        else:
            ledger.end_running(task, end)
    except Lost:
        log.warning("the task is somebody else's by now", extra={"task": task.id})


def tell(task: Task) -> None:
    """The task's new state, to whoever watches."""
    name = "done" if task.status in FINAL else "state"
    events.publish(task.id, name, {"status": task.status})
    if task.kind == Kind.WORKFLOW and task.status in FINAL:
        cancel_steps([task.id])
    if task.parent_id is not None and task.status in FINAL:
        queues.wake()


def cancel_steps(task_ids: Sequence[UUID]) -> None:
    """What is open below workflows that ended. The sweep does what is missed here."""
    ended = ledger.cancel_below(task_ids, "the workflow that it is a step of ended")
    for task_id in ended:
        events.publish(task_id, "done", {"status": Status.CANCELLED})


IDLE = (Status.WAITING, Status.QUEUED, Status.BLOCKED)
CANCEL_LOOKS = 10
CANCELLED: dict[str, Any] = {"error_class": "Cancelled", "error_message": "cancelled on request"}


def cancel(task_id: UUID, tenant_id: UUID | None = None) -> Task:
    """Cancel a task: at once where it waits, within a second where it runs.

    Returns the task as it is then. Raises `NotFound`, and `Conflict` for a finished one.
    """
    tasks = Task.objects.filter(id=task_id)
    if tenant_id is not None:
        tasks = tasks.filter(tenant_id=tenant_id)
    task = tasks.first()
    if task is None:
        raise NotFound(f"there is no task {task_id}")
    ended = False
    # Between two looks it may have gone from one side to the other.
    for _ in range(CANCEL_LOOKS):
        if ended := ledger.move(task_id, IDLE, Status.CANCELLED, **CANCELLED):
            break
        if tasks.filter(status=Status.RUNNING).update(cancel_requested_at=ClockTimestamp()):
            break
        task.refresh_from_db()
        if task.status in FINAL:
            raise Conflict(f"the task is {task.status} already: there is nothing left to cancel")
    task.refresh_from_db()
    if ended:
        tell(task)
        queues.wake()
    return task
