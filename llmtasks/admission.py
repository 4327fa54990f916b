"""Admission: which candidate a try goes to, and when: its limits, breaker and gate let it through.

Whose turn it is comes first; where it is refused, another candidate that has room is called at
once. Waiting is not failing: nothing of it is a try. Queued work waits a moment in its worker, then
in Postgres; inline work waits for as long as its deadline leaves.
"""

import random
import time
from collections.abc import Sequence
from typing import NoReturn
from uuid import UUID

from uuid_utils.compat import uuid7

from llmtasks import ledger
from llmtasks.bodies import AnyRequest
from llmtasks.context import Context, drop_error
from llmtasks.errors import LimitReached, NoProvider, Snooze
from llmtasks.guards import estimates, rate_limit
from llmtasks.guards.rate_limit import Grant, Refusal
from llmtasks.ledger import End
from llmtasks.models import Lane, Mode, Status
from llmtasks.retry import Next
from llmtasks.routing import Candidate
from providers.errors import ProviderError
from providers.types import Request

# How long queued work waits in its worker before it goes back to waiting.
PATIENCE_S = 2.0
# Longest waits between two looks: a limit may have been raised meanwhile.
LOOK_INLINE_S, LOOK_QUEUED_S = 2.0, 300.0
# Those that were refused together do not ask again together.
SPREAD = 0.02


def admit(
    options: Sequence[Next],
    request: AnyRequest,
    context: Context,
    failed: ProviderError | None,
    *,
    is_again: bool,
) -> tuple[Candidate, Grant]:
    """Take all limits of the first option that has room, waiting for it where need be.

    `failed` is the error of the try before in this run. Raises it where a call again would be one
    too many; `LimitReached` or `NoProvider` (inline), `Snooze` (the task is back in `waiting`), or
    why the call was dropped.
    """
    began = time.monotonic()
    # Asked under the same id each time: where an answer of Redis was lost, that took it already.
    asks = [(uuid7(), option.candidate) for option in options]
    refusals: list[Refusal] = []
    while True:
        has_waited = bool(refusals)
        refusals = []
        for attempt_id, candidate in asks:
            grant = ask(
                candidate, request, context,
                is_again=is_again, attempt_id=attempt_id, has_waited=has_waited,
            )  # fmt: skip
            refusal = rate_limit.acquire(grant)
            if refusal is None:
                return candidate, grant
            refusals.append(refusal)
        wait_s = min(refusal.wait_s for refusal in refusals)
        if context.task.mode == Mode.QUEUED:
            if time.monotonic() + wait_s > began + PATIENCE_S:
                go_back(context, wait_s)
        else:
            check_patience(refusals, context, failed)
        wait_s = min(wait_s, LOOK_INLINE_S)
        context.pause(wait_s * (1 + random.uniform(0, SPREAD)))  # noqa: S311 - no secret
        if context.dropped:
            raise drop_error(context)


def admit_at_once(
    candidates: Sequence[Candidate], request: AnyRequest, context: Context
) -> tuple[Candidate, Grant] | None:
    """The same for a second call beside one under way: the first candidate that has room now, or
    none. It counts as a call again."""
    for candidate in candidates:
        grant = ask(candidate, request, context, is_again=True)
        if rate_limit.acquire(grant) is None:
            return candidate, grant
    return None


def ask(
    candidate: Candidate,
    request: AnyRequest,
    context: Context,
    *,
    is_again: bool,
    attempt_id: UUID | None = None,
    has_waited: bool = False,
) -> Grant:
    """What the call asks the limiter for."""
    task, attempt_id = context.task, attempt_id or uuid7()
    most = request.max_output_tokens if isinstance(request, Request) else 0
    counted = estimates.counted_bytes(request, len(task.body))
    need = rate_limit.need_of(candidate.provider, candidate.model, counted, most)
    patience_s = PATIENCE_S if task.mode == Mode.QUEUED else context.left_s
    return rate_limit.grant_for(
        attempt_id, candidate.provider, candidate.model, task.tenant_id, task.key_id, need,
        is_urgent=task.mode == Mode.INLINE or task.lane == Lane.INTERACTIVE,
        is_again=is_again, left_s=context.left_s, patience_s=patience_s,
        has_waited=has_waited,
    )  # fmt: skip


def go_back(context: Context, wait_s: float) -> NoReturn:
    """Back to waiting: no worker is held meanwhile."""
    wait_s = min(wait_s, LOOK_QUEUED_S)
    ledger.end_running(context.task, End(status=Status.WAITING, wait_s=wait_s))
    raise Snooze(wait_s)


def check_patience(
    refusals: Sequence[Refusal], context: Context, failed: ProviderError | None
) -> None:
    """Raise what ends an inline call that can't wait for any of these."""
    soonest = min(refusals, key=lambda refusal: refusal.wait_s)
    if all(refusal.why == "breaker" for refusal in refusals):
        raise NoProvider(
            f"no provider of {context.task.route!r} is healthy now", retry_after=soonest.wait_s
        )
    if failed is not None and all(refusal.why in ("retries", "breaker") for refusal in refusals):
        raise failed
    if soonest.wait_s >= context.left_s:
        context.refusal = soonest
        raise LimitReached(limit_text(soonest), retry_after=soonest.wait_s)


def limit_text(refusal: Refusal) -> str:
    if refusal.rule is not None and refusal.rule.is_own:
        return f"rate limit reached ({refusal.rule.name}): there is room in {refusal.wait_s:.1f} s"
    whose = "our" if refusal.rule is not None and not refusal.rule.provider else "the provider's"
    return f"{whose} rate limit is reached: there is room in {refusal.wait_s:.1f} s"
