"""One LLM call, from a route's candidates to an answer that is paid for.

    candidates → for each try:
        begin attempt → send → settle
    → result

Between `candidates` and `begin attempt` the exact cache, the breaker, the money's hold and the
limiter have their places (marked below), each a step of its own.
"""

import logging
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from socket import socket
from typing import Any
from uuid import UUID

from django.db import DataError, OperationalError

from llmtasks import bodies, ledger, pricing, pulse, retry, routing, stores
from llmtasks.errors import (
    Cancelled,
    ClientLeft,
    DeadlineExceeded,
    InternalError,
    Interrupted,
    Lost,
    NoProvider,
    Snooze,
    TaskError,
)
from llmtasks.ledger import End, Outcome
from llmtasks.models import Attempt, CostState, Mode, OnUnknown, Status, Task
from llmtasks.retry import Try
from llmtasks.routing import Candidate
from providers import errors
from providers.http import Exchange
from providers.types import (
    Done,
    EmbeddingRequest,
    EmbeddingResponse,
    Request,
    Response,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    Usage,
)

log = logging.getLogger(__name__)

AnyRequest = Request | EmbeddingRequest
AnyResponse = Response | EmbeddingResponse

# How often, and for how long, a settlement is tried while Postgres is away.
SETTLE_AGAIN_S = 0.5
SETTLE_FOR_S = 3600.0
MAX_MESSAGE = 1000


@dataclass(frozen=True, slots=True)
class Reset:
    """What was streamed so far is void: a new attempt starts from the beginning."""

    attempt: int


Event = StreamEvent | Reset


@dataclass
class Context:
    """What surrounds a call: its task, its deadline, and whether somebody dropped it.

    `ends_task`: the task succeeds or fails with this call (a chat), and is written so together
    with the attempt. `streams`: deltas are wanted; `may_restart`: whoever gets them understands a
    `Reset`. `client`: the caller's socket, watched for a hang-up.
    """

    task: Task
    step: int = 0
    ends_task: bool = True
    streams: bool = False
    may_restart: bool = False
    client: socket | None = None
    warning: str = ""
    exchange: Exchange | None = None
    dropped: str = ""
    wakes: threading.Event = field(default_factory=threading.Event)
    deadline: float = 0.0

    def __post_init__(self) -> None:
        left = (self.task.deadline - pulse.now()).total_seconds()
        self.deadline = time.monotonic() + left

    def drop(self, reason: str) -> None:
        """End the call from another thread: `cancel`, `client` or `lease`."""
        self.dropped = self.dropped or reason
        self.wakes.set()
        if (exchange := self.exchange) is not None:
            exchange.drop(reason)

    def pause(self, seconds: float) -> None:
        """Wait without holding a connection; a drop ends it early."""
        stores.release()
        self.wakes.wait(seconds)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


def complete(request: AnyRequest, context: Context) -> AnyResponse:
    """The whole answer. Raises as `stream` does."""
    events = stream(request, context)
    while True:
        try:
            next(events)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def stream(request: AnyRequest, context: Context) -> Generator[Event, None, AnyResponse]:
    """Yield the answer's deltas (where `context.streams`) and return the answer.

    `request.model` is the route's name. Every attempt is settled when this ends, however it
    ends. Raises the `ProviderError` that stood at last, a `TaskError`, `NoProvider`, `Snooze`
    (the task is back in `waiting`) or `Lost`.
    """
    task = context.task
    with pulse.watch(task.id, context.drop, context.client, task.owner_id):
        # look_up_cache: its place, before any money.
        candidates = usable_candidates(request, context)
        tries = past_tries(context)
        if context.left_s <= 0:
            raise DeadlineExceeded("the deadline passed before a provider was called")
        chosen = retry.choose(candidates, tries)
        number = len(tries)
        while chosen is not None:
            # breaker → hold money → take limit: their places, for each candidate.
            number += 1
            if number > 1 and context.may_restart:
                yield Reset(number)
            attempt = begin(chosen.candidate, request, context, number)
            try:
                answer = yield from send(attempt, request)
            except errors.ProviderError as error:
                tries.append(Try(attempt.provider, attempt.model, type(error), error.retry_after))
                chosen = after_error(attempt, error, retry.choose(candidates, tries))
            except BaseException as error:
                raise after_end(attempt, error) from error
            else:
                settle(attempt, answer_outcome(attempt, answer), success(context, answer))
                # store_cache: its place.
                return answer
        # A resumed task that has no try left.
        raise tries[-1].error("no provider answered: the attempts say why")


def usable_candidates(request: AnyRequest, context: Context) -> tuple[Candidate, ...]:
    """The route's candidates that can do it and are not paused. Raises `NoProvider`, or `Snooze`
    for queued work, which waits."""
    route = routing.find(context.task.route, context.task.kind)
    able = routing.supporting(route, request)
    open_ = tuple(c for c in able if not c.is_paused)
    if open_:
        return open_
    if context.task.mode == Mode.QUEUED:
        ledger.end_running(context.task, End(status=Status.WAITING, wait_s=1.0))
        raise Snooze(1.0)
    raise NoProvider(f"every provider of {route.name!r} is paused", retry_after=30)


def past_tries(context: Context) -> list[Try]:
    """What earlier runs of this step tried, from the ledger."""
    if context.task.attempts == 0:
        return []
    rows = Attempt.objects.filter(task_id=context.task.id, step=context.step).order_by("number")
    return [
        Try(row.provider, row.model, retry.CLASSES.get(row.error_class, errors.ConnectionFailed))
        for row in rows.only("provider", "model", "error_class")
    ]


@dataclass(slots=True)
class Sending:
    """One attempt under way. `streamed` counts the bytes of deltas that went out; `has_told`
    says that any delta did, an empty one included."""

    candidate: Candidate
    context: Context
    exchange: Exchange
    id: UUID
    input_bytes: int
    max_output_tokens: int | None
    started: float
    streamed: int = 0
    has_told: bool = False

    @property
    def provider(self) -> str:
        return self.candidate.provider

    @property
    def model(self) -> str:
        return self.candidate.model


def begin(candidate: Candidate, request: AnyRequest, context: Context, number: int) -> Sending:
    """Write the attempt down, before anything is sent."""
    task = context.task
    limit = request.max_output_tokens if isinstance(request, Request) else 0
    estimate = pricing.estimate(candidate.price_family, candidate.model, len(task.body), limit)
    attempt_id = ledger.begin(
        task,
        step=context.step,
        number=number,
        provider=candidate.provider,
        model=candidate.model,
        estimate=estimate.amount,
        cost_state=estimate.state,
        price_id=estimate.price_id,
    )
    stores.release()
    exchange = Exchange(
        deadline=context.deadline,
        # OpenAI documents this header; other vendors ignore it.
        headers={"X-Client-Request-Id": f"{task.id}.{number}"},
    )
    context.exchange = exchange
    if context.dropped:
        exchange.drop(context.dropped)
    return Sending(
        candidate, context, exchange, attempt_id, len(task.body), limit, time.monotonic()
    )


def send(attempt: Sending, request: AnyRequest) -> Generator[Event, None, AnyResponse]:
    """The call itself. Raises `ProviderError`, `Dropped`."""
    routing.check_credential(attempt.candidate)
    adapter = attempt.candidate.adapter
    if isinstance(request, EmbeddingRequest):
        return adapter.embed(replace(request, model=attempt.model), attempt.exchange)
    request = replace(request, model=attempt.model)
    if not (attempt.context.streams and adapter.supports_streaming):
        return adapter.complete(request, attempt.exchange)
    for event in adapter.stream(request, attempt.exchange):
        if isinstance(event, Done):
            return event.response
        attempt.streamed += size(event)
        attempt.has_told = True
        yield event
    raise errors.BadResponse("the stream ended without an answer")


def size(event: StreamEvent) -> int:
    if isinstance(event, TextDelta | ThinkingDelta):
        return len(event.text.encode())
    return len(event.arguments.encode()) if isinstance(event, ToolCallDelta) else 0


# --- settle: what it cost, and what becomes of the task ---------------------------------------


def answer_outcome(attempt: Sending, answer: AnyResponse) -> Outcome:
    """A call that was answered: the vendor's usage, or an estimate where it gave none."""
    candidate = attempt.candidate
    if answer.usage is not None:
        cost = pricing.cost_of(answer.usage, candidate.price_family, candidate.model)
    else:
        text = answer.text if isinstance(answer, Response) else ""
        cost = estimate(attempt, len(text.encode()))
    return outcome(attempt, cost, usage=answer.usage or Usage(), raw_usage=answer.raw_usage)


def error_outcome(attempt: Sending, error: BaseException, name: str) -> Outcome:
    """A call that failed. One that never went out, or that the vendor refused, costs nothing; any
    other may be on its bill: what went over the wire is the estimate."""
    exchange = attempt.exchange
    if not exchange.is_sent or (exchange.status or 0) >= 400:
        cost = pricing.Cost(amount=Decimal(0), state=CostState.FINAL, price_id=None)
    else:
        cost = estimate(attempt, attempt.streamed)
    message = getattr(error, "message", "") or str(error)
    return outcome(attempt, cost, error_class=name, error_message=message[:MAX_MESSAGE])


def estimate(attempt: Sending, output_bytes: int) -> pricing.Cost:
    candidate = attempt.candidate
    tokens = -(-output_bytes // 4)
    return pricing.estimate(candidate.price_family, candidate.model, attempt.input_bytes, tokens)


def outcome(attempt: Sending, cost: pricing.Cost, **fields: Any) -> Outcome:
    exchange = attempt.exchange
    first = exchange.first_byte_at
    return Outcome(
        cost=cost.amount,
        cost_state=cost.state,
        price_id=cost.price_id,
        latency_ms=milliseconds(time.monotonic() - attempt.started),
        first_token_ms=None if first is None else milliseconds(first - attempt.started),
        http_status=exchange.status,
        vendor_request_id=exchange.request_id or "",
        **({"usage": Usage()} | fields),
    )


def milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def success(context: Context, answer: AnyResponse) -> End:
    if not context.ends_task:
        return End(status=Status.RUNNING)
    body = bodies.dump_response(context.task.kind, answer)
    return End(status=Status.SUCCEEDED, response=body)


def failure(context: Context, error: Exception) -> End:
    """The task's end by an error, where the task ends with this call."""
    if not context.ends_task:
        return End(status=Status.RUNNING)
    return describe(final_status(error), error)


def final_status(error: Exception) -> str:
    return Status.CANCELLED if isinstance(error, Cancelled | ClientLeft) else Status.FAILED


def describe(status: str, error: Exception, wait_s: float = 0.0) -> End:
    return End(
        status=status,
        error_class=type(error).__name__,
        error_message=str(getattr(error, "message", error))[:MAX_MESSAGE],
        error_status=getattr(error, "status", None),
        error_param=(getattr(error, "param", None) or "")[:100],
        retry_after=getattr(error, "retry_after", None),
        wait_s=wait_s,
    )


def after_error(
    attempt: Sending, error: errors.ProviderError, chosen: retry.Next | None
) -> retry.Next:
    """Settle a failed attempt and say what is called next. Raises what ends the call."""
    context, task = attempt.context, attempt.context.task
    settled = error_outcome(attempt, error, type(error).__name__)
    final: Exception | None = None
    if context.left_s <= 0 or error.code == "deadline":
        final = DeadlineExceeded("the deadline passed while a provider was called")
    elif chosen is None or (attempt.has_told and not context.may_restart):
        final = error
    elif chosen.wait_s >= context.left_s:
        final = error
    if final is not None or chosen is None:
        final = final or error
        settle(attempt, settled, failure(context, final))
        raise final
    log.info(
        "retry",
        extra={
            "task": task.id, "attempt": attempt.id, "error": type(error).__name__,
            "provider": attempt.provider, "next": chosen.candidate.provider,
            "wait_s": round(chosen.wait_s, 3),
        },
    )  # fmt: skip
    if chosen.wait_s and task.mode == Mode.QUEUED:
        settle(attempt, settled, describe(Status.WAITING, error, chosen.wait_s))
        raise Snooze(chosen.wait_s)
    settle(attempt, settled, End(status=Status.RUNNING))
    if chosen.wait_s:
        context.pause(chosen.wait_s)
    if context.dropped:
        # `execute` writes the task's end: there is no attempt to settle.
        raise drop_error(context)
    return chosen


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
    end = failure(context, raised)
    if isinstance(raised, Interrupted) and may_run_again(context.task):
        end = End(status=Status.WAITING)
    settled = error_outcome(attempt, error, type(raised).__name__)
    if isinstance(error, GeneratorExit):
        # A generator that is being closed may raise nothing else.
        with suppress(Lost):
            settle(attempt, settled, end)
        return error
    settle(attempt, settled, end)
    return raised


def may_run_again(task: Task) -> bool:
    """Whether work whose process died during a call is run once more."""
    return task.mode == Mode.QUEUED and task.on_unknown == OnUnknown.RETRY


def drop_error(context: Context) -> TaskError:
    """The error that says why the call was dropped."""
    if context.dropped == "cancel":
        return Cancelled("cancelled on request")
    if context.dropped == "client":
        return ClientLeft("the caller hung up")
    return Interrupted("the process that ran it lost its lease")


def settle(attempt: Sending, settled: Outcome, end: End) -> None:
    """Write how the attempt ended. Raises `Lost` where the task was no longer ours.

    While Postgres is away, queued work tries again. Inline work gives the answer at once, with
    a warning, and its settlement goes on by itself.
    """
    context = attempt.context
    try:
        ledger.finish(context.task, attempt.id, settled, end)
    except OperationalError:
        log.warning("a settlement waits for Postgres", extra={"task": context.task.id})
        if context.task.mode == Mode.INLINE:
            context.warning = "stored later: Postgres is away"
            ledger.put_end(context.task, end)
            threading.Thread(
                target=settle_aside, args=(attempt, settled, end), name="settle", daemon=True
            ).start()
        else:
            settle_until_done(attempt, settled, end)
    except DataError:
        # What the vendor sent can't be stored. An attempt is settled all the same.
        log.exception("an answer can't be stored", extra={"task": context.task.id})
        error = InternalError("the provider's answer can't be stored: see the server's log")
        bare = Outcome(
            usage=Usage(),
            cost=settled.cost,
            cost_state=settled.cost_state,
            price_id=settled.price_id,
            http_status=settled.http_status,
            error_class=type(error).__name__,
            error_message=error.message,
        )
        ledger.finish(context.task, attempt.id, bare, failure(context, error))
        raise error from None


def settle_aside(attempt: Sending, settled: Outcome, end: End) -> None:
    """In a thread of its own: the caller has the answer."""
    try:
        settle_until_done(attempt, settled, end)
    except Exception:
        log.exception("a settlement was lost", extra={"task": attempt.context.task.id})


def settle_until_done(attempt: Sending, settled: Outcome, end: End) -> None:
    """A lost lease is no reason to stop: the fence says whether somebody took the task, and the
    true cost is written even then."""
    context = attempt.context
    until = time.monotonic() + SETTLE_FOR_S
    # Still under way: the pulse must not take it for forgotten.
    with pulse.watch(context.task.id, context.drop):
        while time.monotonic() < until:
            time.sleep(SETTLE_AGAIN_S)
            try:
                ledger.finish(context.task, attempt.id, settled, end)
            except OperationalError:
                continue
            finally:
                stores.release()
            return
    raise Lost
