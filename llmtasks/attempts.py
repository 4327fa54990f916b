"""One attempt: written down before it is sent, settled however it ends.

    begin → send → settle

`settle` takes what it cost (an `Outcome`) and what becomes of the task (an `End`).
"""

import logging
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.db import DataError, OperationalError

from llmtasks import bodies, crash, ledger, pricing, pulse, retry, routing, stores
from llmtasks.bodies import AnyRequest, AnyResponse
from llmtasks.context import Context, Event
from llmtasks.errors import Cancelled, ClientLeft, InternalError, Lost
from llmtasks.guards import accounts, rate_limit
from llmtasks.guards.rate_limit import Grant, Used
from llmtasks.ledger import End, Outcome, Turn
from llmtasks.models import CostState, Mode, Status
from llmtasks.routing import Candidate
from providers import errors, vendor_limits
from providers.http import Exchange
from providers.types import (
    Done,
    EmbeddingRequest,
    Request,
    Response,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    Usage,
)

log = logging.getLogger(__name__)

# How often, and for how long, a settlement is tried while Postgres is away.
SETTLE_AGAIN_S = 0.5
SETTLE_FOR_S = 3600.0
MAX_MESSAGE = 1000
UNSTORABLE = "the provider's answer can't be stored: see the server's log"
# How long a vendor's gate is closed by a 429 that does not say.
GATE_S = 1.0


@dataclass(slots=True)
class Sending:
    """One attempt under way. `streamed` counts the bytes of deltas that went out; `has_told`
    says that any delta did, an empty one included."""

    candidate: Candidate
    grant: Grant
    context: Context
    exchange: Exchange
    id: UUID
    input_bytes: int
    max_output_tokens: int | None
    started: float
    streamed: int = 0
    has_told: bool = False
    error: BaseException | None = None

    @property
    def provider(self) -> str:
        return self.candidate.provider

    @property
    def model(self) -> str:
        return self.candidate.model


def begin(candidate: Candidate, grant: Grant, request: AnyRequest, context: Context) -> Sending:
    """Write the step's next attempt down, before anything is sent."""
    task = context.task
    context.grant = grant
    context.number += 1
    context.answering = context.number
    limit = request.max_output_tokens if isinstance(request, Request) else 0
    try:
        estimate = pricing.estimate(candidate.price_family, candidate.model, len(task.body), limit)
        ledger.begin(
            task,
            attempt_id=grant.attempt_id,
            step=context.step,
            number=context.number,
            provider=candidate.provider,
            model=candidate.model,
            estimate=estimate.amount,
            cost_state=estimate.state,
            price_id=estimate.price_id,
        )
    except BaseException:
        rate_limit.settle(grant, Used(is_sent=False))
        raise
    crash.point("attempt.begun")
    stores.release()
    exchange = Exchange(
        deadline=context.deadline,
        # OpenAI documents this header; other vendors ignore it.
        headers={"X-Client-Request-Id": f"{task.id}.{context.number}"},
    )
    context.exchange = exchange
    if context.dropped:
        exchange.drop(context.dropped)
    return Sending(
        candidate, grant, context, exchange, grant.attempt_id, len(task.body), limit,
        time.monotonic(),
    )  # fmt: skip


def send(attempt: Sending, request: AnyRequest) -> Generator[Event, None, AnyResponse]:
    """The call itself. Raises `ProviderError`, `Dropped`."""
    routing.check_credential(attempt.candidate)
    keep_fresh(attempt)
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


def keep_fresh(attempt: Sending) -> None:
    """A call that was held up since it was let through counts from now; where its window is
    another one by now, it waits for room in that."""
    context = attempt.context
    while refusal := rate_limit.freshen(attempt.grant):
        if context.left_s <= 0 or attempt.exchange.dropped:
            return
        context.pause(min(refusal.wait_s, context.left_s))


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
        cost = estimate(attempt, length(answer))
    return outcome(attempt, cost, usage=answer.usage or Usage(), raw_usage=answer.raw_usage)


def length(answer: AnyResponse | None) -> int:
    """The bytes of an answer's text."""
    return len(answer.text.encode()) if isinstance(answer, Response) else 0


def error_outcome(
    attempt: Sending, error: BaseException, name: str, unseen_bytes: int = 0
) -> Outcome:
    """A call that failed. One that never went out, or that the vendor refused, costs nothing; any
    other may be on its bill: what went over the wire is the estimate, and `unseen_bytes` that the
    vendor may have written."""
    exchange = attempt.exchange
    attempt.error = error
    if not exchange.is_sent or (exchange.status or 0) >= 400:
        cost = pricing.Cost(amount=Decimal(0), state=CostState.FINAL, price_id=None)
    else:
        cost = estimate(attempt, attempt.streamed + unseen_bytes)
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
    if not context.is_turn:
        return End(status=Status.SUCCEEDED, response=body)
    turn = Turn(number=context.step, name=context.task.route, output=body)
    if isinstance(answer, Response) and answer.tool_calls:
        return End(status=Status.RUNNING, turn=turn)
    return End(status=Status.SUCCEEDED, response=body, turn=turn)


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


def settle(attempt: Sending, settled: Outcome, end: End) -> None:
    """Write how the attempt ended. Raises `Lost` where the task was no longer ours.

    While Postgres is away, queued work tries again. Inline work gives the answer at once, with
    a warning, and its settlement goes on by itself.
    """
    context = attempt.context
    crash.point("attempt.answered")
    # Before Postgres is asked: others wait for what this call did not use.
    settle_limits(attempt, settled, is_retried=end.status in (Status.RUNNING, Status.WAITING))
    try:
        finish(attempt, settled, end)
        crash.point("attempt.finished")
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


def settle_apart(attempt: Sending, settled: Outcome) -> None:
    """Settle an attempt that decides nothing of its task's end. Never raises; while Postgres is
    away it goes on by itself."""
    settle_limits(attempt, settled)
    if not is_settled_apart(attempt, settled):
        threading.Thread(
            target=settle_apart_until_done, args=(attempt, settled), name="settle", daemon=True
        ).start()


def is_settled_apart(attempt: Sending, settled: Outcome) -> bool:
    """Whether it could be tried: False while Postgres is away."""
    task_id = attempt.context.task.id
    try:
        try:
            ledger.settle_apart(task_id, attempt.id, settled)
        except DataError:
            log.exception("an answer can't be stored", extra={"task": task_id})
            ledger.settle_apart(task_id, attempt.id, bare(settled, UNSTORABLE))
    except OperationalError:
        return False
    return True


def settle_apart_until_done(attempt: Sending, settled: Outcome) -> None:
    until = time.monotonic() + SETTLE_FOR_S
    is_done = False
    while not is_done and time.monotonic() < until:
        time.sleep(SETTLE_AGAIN_S)
        is_done = is_settled_apart(attempt, settled)
        stores.release()


def settle_limits(attempt: Sending, settled: Outcome, *, is_retried: bool = False) -> None:
    """Tell the limiter what the call used and how the vendor did, and people what they must
    see to."""
    candidate, error, usage = attempt.candidate, attempt.error, settled.usage
    is_answered = error is None and settled.raw_usage is not None
    # A vendor that refused a call made no tokens. What came in it may have counted.
    is_refused = (attempt.exchange.status or 0) >= 400
    told = vendor_limits.told(attempt.exchange.response_headers)
    rate_limit.settle(
        attempt.grant,
        Used(
            is_sent=attempt.exchange.is_sent,
            input_tokens=candidate.adapter.limited_input(usage) if is_answered else None,
            output_tokens=usage.total_output_tokens if is_answered or is_refused else None,
        ),
        health=health(error),
        error="" if error is None else type(error).__name__,
        is_retried=is_retried,
        gate_s=gate_s(error),
        told=[rate_limit.Told(*one) for one in told],
        ms=settled.latency_ms if is_answered or was_slow(attempt, settled) else None,
        input_bytes=attempt.grant.need.counted_bytes,
    )
    accounts.note(candidate, error, told)


def was_slow(attempt: Sending, settled: Outcome) -> bool:
    """Whether another call outran this one when it had taken longer than most already. If those
    were not learnt from, ever more calls would seem slow."""
    known = rate_limit.stats_of(attempt.provider, attempt.model).p95_ms
    is_outrun = isinstance(attempt.error, errors.Dropped) and attempt.error.reason == retry.OUTRUN
    return is_outrun and known is not None and (settled.latency_ms or 0) > known


def health(error: BaseException | None) -> str:
    """What an attempt's end says of the vendor's health, for the breaker."""
    if error is None:
        return "ok"
    is_fault = isinstance(error, errors.ProviderError) and error.breaker
    return "fault" if is_fault and getattr(error, "code", None) != "deadline" else ""


def gate_s(error: BaseException | None) -> float:
    """For how long a vendor wants no call."""
    if isinstance(error, errors.RateLimited):
        return GATE_S if error.retry_after is None else error.retry_after
    if isinstance(error, errors.Overloaded):
        return error.retry_after or 0.0
    return 0.0


def finish(attempt: Sending, settled: Outcome, end: End) -> None:
    """Settle the attempt, also where what the vendor sent can't be stored: then the task fails.
    Raises `Lost`, `InternalError`, `OperationalError`."""
    context = attempt.context
    try:
        ledger.finish(context.task, attempt.id, settled, end)
    except DataError:
        log.exception("an answer can't be stored", extra={"task": context.task.id})
        error = InternalError(UNSTORABLE)
        ledger.finish(context.task, attempt.id, bare(settled, UNSTORABLE), failure(context, error))
        raise error from None


def bare(settled: Outcome, message: str) -> Outcome:
    """What surely can be stored of it: the money."""
    return Outcome(
        usage=Usage(),
        cost=settled.cost,
        cost_state=settled.cost_state,
        price_id=settled.price_id,
        http_status=settled.http_status,
        error_class=InternalError.__name__,
        error_message=message,
    )


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
                finish(attempt, settled, end)
            except OperationalError:
                continue
            finally:
                stores.release()
            return
    raise Lost
