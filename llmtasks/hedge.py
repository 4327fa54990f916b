"""Hedging: a second call beside one that is slow. The first answer counts, both calls are paid for.

    first call ───────────────────────► answer ─► the other is dropped and settled
         └─ p95 ─► second call ──────┘

The first call stays in its caller's thread. Where no byte of its answer came in the time that 95 %
of its model's calls take, the second begins in a thread of its own, if its limits let it through at
once. Of streams the first delta decides. Each call is an attempt. The one whose answer counts goes
on in the caller's thread and is settled there, together with the task; the other one apart from it.
"""

import logging
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

from django.db import OperationalError

from llmtasks import admission, alarms, attempts, stores
from llmtasks.attempts import Sending
from llmtasks.bodies import AnyRequest, AnyResponse
from llmtasks.context import Context, Event, drop_error
from llmtasks.errors import InternalError, Lost
from llmtasks.guards import rate_limit
from llmtasks.guards.rate_limit import Used
from llmtasks.ledger import Outcome
from llmtasks.retry import MAX_ATTEMPTS, OUTRUN, Next, Try
from llmtasks.routing import Candidate, Route
from providers import errors

log = logging.getLogger(__name__)

# No second call is worth it sooner.
LEAST_S = 0.05
# How long an answer waits for the call that it outran to be settled: both are in its cost then.
SETTLED_WITHIN_S = 0.1


Events = Generator[Event, None, AnyResponse]


@dataclass(frozen=True, slots=True)
class Start:
    """What came first of an answer: its first event, or all of it."""

    event: Event | None
    answer: AnyResponse | None
    rest: Events


def send(
    route: Route, first: Sending, request: AnyRequest, options: Sequence[Next], tries: list[Try]
) -> tuple[Sending, Events]:
    """The call, and where the route says so and it is slow another beside it: the attempt that
    answers, and its answer's events.

    Raises what the first call ended with; a second one that failed too is then among `tries`.
    """
    after_s = patience_s(route, first, tries)
    if after_s is None:
        return first, attempts.send(first, request)
    others = [option.candidate for option in options if option.candidate is not first.candidate]
    return Race(first, request, others or [first.candidate], tries).run(after_s)


def patience_s(route: Route, first: Sending, tries: Sequence[Try]) -> float | None:
    """How long the first call may be silent; None where there is no second."""
    if not route.hedges or len(tries) + 2 > MAX_ATTEMPTS:
        return None
    p95_ms = rate_limit.stats_of(first.provider, first.model).p95_ms
    return None if p95_ms is None else max(p95_ms / 1000, LEAST_S)


@dataclass
class Race:
    """Two calls for one answer. `others` are the second's candidates, `context` is its own."""

    first: Sending
    request: AnyRequest
    others: Sequence[Candidate]
    tries: list[Try]
    winner: Sending | None = None
    start: Start | None = None
    # How the second call ended without an answer.
    failed: Try | None = None
    is_fired: bool = False
    is_closed: bool = False
    context: Context = field(init=False)
    # The second call ended, and is settled unless its answer counts.
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, after_s: float) -> tuple[Sending, Events]:
        """The first call, in its caller's thread."""
        alarm = alarms.at(self.first.started + after_s, self.fire)
        try:
            start = started(attempts.send(self.first, self.request))
        except Exception as error:
            if not self.is_answered_after(error):
                raise
            return self.second_won(failure(self.first, error, self.start))
        finally:
            alarm.call_off()
        if self.close():
            if not self.claim(self.first, start):
                return self.second_won(too_late(self.first, start))
            self.context.drop(OUTRUN)
            self.over.wait(SETTLED_WITHIN_S)
        return self.first, going_on(start)

    def is_answered_after(self, error: Exception) -> bool:
        """Whether the second call answers where the first one failed."""
        if not self.close():
            return False
        if not may_still_be_answered(error):
            self.context.drop(OUTRUN)
        self.over.wait()
        if self.winner is not None:
            # That answer may break off, and be tried again.
            self.tries.append(ended(self.first.candidate, error))
            return True
        if self.failed is not None:
            self.tries.append(self.failed)
        return False

    def second_won(self, of_first: Outcome) -> tuple[Sending, Events]:
        self.over.wait()
        attempts.settle_apart(self.first, of_first)
        assert self.winner is not None and self.start is not None  # noqa: S101 - for the type checker
        # From here on it is the call.
        self.winner.context = self.first.context
        self.winner.context.answering = self.context.answering
        return self.winner, going_on(self.start)

    def close(self) -> bool:
        """No second call begins any more; whether one had begun."""
        with self.lock:
            self.is_closed = True
            return self.is_fired

    def claim(self, sending: Sending, start: Start) -> bool:
        """Whether this answer is the first."""
        with self.lock:
            if self.winner is None:
                self.winner, self.start = sending, start
            return self.winner is sending

    # The second call, in its own thread -----------------------------------------------------------

    def fire(self) -> None:
        """Begin the second call: its moment has come."""
        with self.lock:
            if self.is_closed or self.first.exchange.first_byte_at is not None:
                return
            self.context = self.first.context.beside()
            # The second's number: also where the first goes on without it.
            self.first.context.number += 1
            threading.Thread(target=self.run_second, name="hedge", daemon=True).start()
            self.is_fired = True

    def run_second(self) -> None:
        try:
            if (second := self.begin_second()) is not None:
                self.call_second(second)
        except OperationalError as error:
            log.warning("no second call: Postgres is away", extra={"error": str(error)})
        except Exception:
            log.exception("a second call failed by a fault of ours")
        finally:
            stores.release()
            self.over.set()

    def begin_second(self) -> Sending | None:
        """The second attempt, if it may begin at once. Raises `OperationalError`."""
        admitted = admission.admit_at_once(self.others, self.request, self.context)
        if admitted is None:
            return None
        candidate, grant = admitted
        if self.context.dropped:
            rate_limit.settle(grant, Used(is_sent=False))
            return None
        try:
            second = attempts.begin(candidate, grant, self.request, self.context)
        except Lost:
            return None
        log.info(
            "hedge",
            extra={
                "task": self.context.task.id, "attempt": second.id, "provider": second.provider,
                "after_s": round(second.started - self.first.started, 3),
            },
        )  # fmt: skip
        return second

    def call_second(self, second: Sending) -> None:
        try:
            start = started(attempts.send(second, self.request))
        except Exception as error:  # noqa: BLE001 - settled as what it is, and logged
            self.failed = ended(second.candidate, error)
            attempts.settle_apart(second, failure(second, error, self.start))
            return
        if self.claim(second, start):
            self.first.exchange.drop(OUTRUN)
        else:
            attempts.settle_apart(second, too_late(second, start))


def started(events: Events) -> Start:
    """Wait for what comes first."""
    try:
        return Start(next(events), None, events)
    except StopIteration as done:
        return Start(None, done.value, events)


def going_on(start: Start) -> Events:
    """The events of an answer that has begun."""
    if start.answer is not None:
        return start.answer
    assert start.event is not None  # noqa: S101 - for the type checker
    yield start.event
    return (yield from start.rest)


def may_still_be_answered(error: Exception) -> bool:
    """Whether the second call goes on after the first one failed so: not where the request itself
    is at fault, or we are."""
    if isinstance(error, errors.ProviderError):
        return error.retryable or error.try_next
    return isinstance(error, errors.Dropped)


def ended(candidate: Candidate, error: Exception) -> Try:
    """How a call ended, for the rules of retry. One that we dropped was no failed try."""
    if isinstance(error, errors.ProviderError):
        return Try(candidate.provider, candidate.model, type(error), error.retry_after)
    return Try(candidate.provider, candidate.model, errors.ConnectionFailed, is_ours=True)


def failure(attempt: Sending, error: Exception, other: Start | None) -> Outcome:
    """How a call ended that gave no answer; `other` is the answer that was faster."""
    if isinstance(error, errors.Dropped) and error.reason == OUTRUN:
        unseen = attempts.length(other.answer) if other is not None else 0
        return outrun(attempts.error_outcome(attempt, error, OUTRUN, unseen))
    if isinstance(error, errors.Dropped):
        return attempts.error_outcome(attempt, error, type(drop_error(attempt.context)).__name__)
    if isinstance(error, errors.ProviderError):
        return attempts.error_outcome(attempt, error, type(error).__name__)
    log.error("a call failed by a fault of ours", exc_info=error)
    return attempts.error_outcome(attempt, error, InternalError.__name__)


def too_late(attempt: Sending, start: Start) -> Outcome:
    """How a call ended that did answer, right after the other one."""
    if start.answer is not None:
        return outrun(attempts.answer_outcome(attempt, start.answer))
    attempt.exchange.drop(OUTRUN)
    start.rest.close()
    return failure(attempt, errors.Dropped(OUTRUN), None)


def outrun(outcome: Outcome) -> Outcome:
    told = "the other of two calls answered first"
    return replace(outcome, error_class=OUTRUN, error_message=told)
