"""One LLM call, from a route's candidates to an answer that is paid for.

    candidates → for each try:
        admit (breaker, gate, limits) → begin attempt → send (hedged) → settle
    → result

The exact cache and the money's hold have their places too (marked below), each a step of its own.
"""

import logging
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from llmtasks import admission, attempts, hedge, ledger, pulse, retry, routing
from llmtasks.attempts import Sending
from llmtasks.bodies import AnyRequest, AnyResponse
from llmtasks.context import Context, Event, Reset, drop_error
from llmtasks.errors import (
    DeadlineExceeded,
    InternalError,
    Interrupted,
    Lost,
    NoProvider,
    Snooze,
)
from llmtasks.ledger import End
from llmtasks.models import Attempt, Mode, OnUnknown, Status, Task
from llmtasks.retry import Try
from llmtasks.routing import Route
from providers import errors

log = logging.getLogger(__name__)


def stream(request: AnyRequest, context: Context) -> Generator[Event, None, AnyResponse]:
    """Yield the answer's deltas (where `context.streams`) and return the answer.

    `request.model` is the route's name. Every attempt is settled when this ends, however it
    ends. Raises the `ProviderError` that stood at last, a `TaskError`, `NoProvider`, `Snooze`
    (the task is back in `waiting`) or `Lost`.
    """
    task = context.task
    is_patient = task.mode == Mode.QUEUED
    options_of = partial(retry.options, is_patient=is_patient)
    with pulse.watch(task.id, context.drop, context.client, task.owner_id):
        # look_up_cache: its place, before any money.
        route = usable_route(request, context)
        tries = past_tries(context)
        if context.left_s <= 0:
            raise DeadlineExceeded("the deadline passed before a provider was called")
        options = options_of(route.candidates, tries)
        failed: errors.ProviderError | None = None
        while options:
            # hold money: its place, for each candidate.
            is_again = retry.is_again(tries, is_patient=is_patient)
            candidate, grant = admission.admit(options, request, context, failed, is_again=is_again)
            if tries and context.may_restart:
                yield Reset(context.number + 1)
            attempt = attempts.begin(candidate, grant, request, context)
            try:
                attempt, events = hedge.send(route, attempt, request, options, tries)
                answer = yield from events
                # Here, since a fault of ours must not leave the attempt open.
                outcome = attempts.answer_outcome(attempt, answer)
                end = attempts.success(context, answer)
            except errors.ProviderError as error:
                failed = error
                tries.append(Try(attempt.provider, attempt.model, type(error), error.retry_after))
                options = options_of(route.candidates, tries)
                after_error(attempt, error, options[0] if options else None)
            except BaseException as error:
                raise after_end(attempt, error) from error
            else:
                attempts.settle(attempt, outcome, end)
                # store_cache: its place.
                return answer
        # A resumed task that has no try left.
        raise tries[-1].error("no provider answered: the attempts say why")


def usable_route(request: AnyRequest, context: Context) -> Route:
    """The route, with those candidates that can do it and are open. Raises `NoProvider`, or
    `Snooze` for queued work, which waits."""
    route = routing.find(context.task.route, context.task.kind)
    able = routing.supporting(route, request)
    open_ = tuple(c for c in able if c.is_usable)
    if open_:
        return replace(route, candidates=open_)
    if context.task.mode == Mode.QUEUED:
        ledger.end_running(context.task, End(status=Status.WAITING, wait_s=1.0))
        raise Snooze(1.0)
    raise NoProvider(f"every provider of {route.name!r} is paused or refused us", retry_after=30)


def past_tries(context: Context) -> list[Try]:
    """What earlier runs of this step tried, from the ledger."""
    if context.task.attempts == 0 or context.is_new_step:
        return []
    found = Attempt.objects.filter(task_id=context.task.id, step=context.step).order_by("number")
    rows = list(found.only("provider", "model", "error_class", "number"))
    if rows:
        context.number = rows[-1].number
    return [retry.past(row.provider, row.model, row.error_class) for row in rows]


def after_error(attempt: Sending, error: errors.ProviderError, chosen: retry.Next | None) -> None:
    """Settle a failed attempt, and wait for the next try. Raises what ends the call."""
    context, task = attempt.context, attempt.context.task
    settled = attempts.error_outcome(attempt, error, type(error).__name__)
    final: Exception | None = None
    if context.left_s <= 0 or error.code == "deadline":
        final = DeadlineExceeded("the deadline passed while a provider was called")
    elif chosen is None or (attempt.has_told and not context.may_restart):
        final = error
    elif chosen.wait_s >= context.left_s:
        final = error
    if final is not None or chosen is None:
        final = final or error
        attempts.settle(attempt, settled, attempts.failure(context, final))
        raise final
    log.info(
        "retry",
        extra={
            "task": task.id, "attempt": attempt.id, "error": type(error).__name__,
            "provider": attempt.provider, "model": attempt.model,
            "next": f"{chosen.candidate.provider}/{chosen.candidate.model}",
            "wait_s": round(chosen.wait_s, 3),
        },
    )  # fmt: skip
    if chosen.wait_s and task.mode == Mode.QUEUED:
        attempts.settle(attempt, settled, attempts.describe(Status.WAITING, error, chosen.wait_s))
        raise Snooze(chosen.wait_s)
    attempts.settle(attempt, settled, End(status=Status.RUNNING))
    if chosen.wait_s:
        context.pause(chosen.wait_s)
    if context.dropped:
        # `execute` writes the task's end: there is no attempt to settle.
        raise drop_error(context)


def after_end(attempt: Sending, error: BaseException) -> BaseException:
    """Settle an attempt that we ended ourselves, or that a fault of ours ended; what to raise."""
    context = attempt.context
    if isinstance(error, GeneratorExit):
        attempt.exchange.drop("client")
        context.dropped = context.dropped or "client"
    if not isinstance(error, errors.Dropped | GeneratorExit):
        log.error("a call failed by a fault of ours", exc_info=error)
        raised: Exception = InternalError("internal error: see the server's log")
    else:
        raised = drop_error(context)
    end = attempts.failure(context, raised)
    if isinstance(raised, Interrupted) and may_run_again(context.task):
        end = End(status=Status.WAITING)
    settled = attempts.error_outcome(attempt, error, type(raised).__name__)
    if isinstance(error, GeneratorExit):
        # A generator that is being closed may raise nothing else.
        with suppress(Lost):
            attempts.settle(attempt, settled, end)
        return error
    attempts.settle(attempt, settled, end)
    return raised


def may_run_again(task: Task) -> bool:
    """Whether work whose process died during a call is run once more."""
    return task.mode == Mode.QUEUED and task.on_unknown == OnUnknown.RETRY
