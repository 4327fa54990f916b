"""What is tried next after a try failed: pure rules, the error table of `docs/errors.md`.

The order over candidates is two tries each, then the next one, then round again, at most
`MAX_ATTEMPTS` in all. A vendor's 429 moves on at once. For queued work it is no failed try: with
every candidate limited the task waits, bounded by its deadline alone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from llmtasks.routing import Candidate
from providers import errors

MAX_ATTEMPTS = 5
TRIES_A_CANDIDATE = 2
BACKOFF_S = 0.5
BACKOFF_CAP_S = 30.0

# The error class of the one of two hedged calls whose answer does not count.
OUTRUN = "Outrun"
# Attempts that we ended ourselves, as the ledger names them.
OF_OURS = frozenset({"Interrupted", OUTRUN})

# A permission may be missing for one model only; these hold for all.
OF_THE_ACCOUNT = (errors.AuthenticationFailed, errors.QuotaExhausted)

CLASSES: dict[str, type[errors.ProviderError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.ProviderError)
}


@dataclass(frozen=True, slots=True)
class Try:
    """One attempt that ended without an answer. `error` is a class of `providers.errors`; a call
    whose process died counts as `ConnectionFailed`, and `is_lost`. `is_ours`: we ended the call
    ourselves, and it was no failed try."""

    provider: str
    model: str
    error: type[errors.ProviderError]
    retry_after: float | None = None
    is_ours: bool = False
    is_lost: bool = False

    @property
    def is_limit(self) -> bool:
        return issubclass(self.error, errors.RateLimited)


def past(provider: str, model: str, error_class: str) -> Try:
    """An attempt of an earlier run, as the ledger has it."""
    error = CLASSES.get(error_class, errors.ConnectionFailed)
    is_ours = error_class in OF_OURS
    return Try(
        provider, model, error, is_ours=is_ours, is_lost=not is_ours and error_class not in CLASSES
    )


def is_again(tries: Sequence[Try], *, is_patient: bool) -> bool:
    """Whether the next call repeats one that its vendor failed: such calls have a budget. What died
    with its process is no fault of the vendor, and patient work that was limited has not failed."""
    if not tries or tries[-1].is_ours or tries[-1].is_lost:
        return False
    return not (is_patient and tries[-1].is_limit)


@dataclass(frozen=True, slots=True)
class Next:
    """Call `candidate` after `wait_s` seconds."""

    candidate: Candidate
    wait_s: float


def choose(
    candidates: Sequence[Candidate], tries: Sequence[Try], *, is_patient: bool
) -> Next | None:
    """The next call, or None where the last error stands."""
    return next(iter(options(candidates, tries, is_patient=is_patient)), None)


def options(
    candidates: Sequence[Candidate], tries: Sequence[Try], *, is_patient: bool
) -> list[Next]:
    """The next call, and after it what may be called in its place. Empty where the last error
    stands.

    Queued work is patient: a vendor's 429 is no failed try. Where somebody waits it is one.
    """
    tries = [t for t in tries if not t.is_ours]
    if tries and not (tries[-1].error.retryable or tries[-1].error.try_next):
        return []
    if sum(not (t.is_limit and is_patient) for t in tries) >= MAX_ATTEMPTS:
        return []
    usable = [c for c in candidates if not is_ruled_out(c, candidates, tries)]
    if not usable:
        return []
    best, *others = sorted(usable, key=lambda c: rounds(of(c, tries)))
    instead = [Next(c, 0.0) for c in others if not of(c, tries)]
    return [Next(best, wait_s(of(best, tries))), *instead]


def of(candidate: Candidate, tries: Sequence[Try]) -> list[Try]:
    return [t for t in tries if (t.provider, t.model) == (candidate.provider, candidate.model)]


def rounds(tries: Sequence[Try]) -> int:
    """How often this candidate had its turn."""
    limited = sum(t.is_limit for t in tries)
    return limited + (len(tries) - limited) // TRIES_A_CANDIDATE


def is_ruled_out(
    candidate: Candidate, candidates: Sequence[Candidate], tries: Sequence[Try]
) -> bool:
    """Whether an earlier try says that this candidate can't answer."""
    mine = of(candidate, tries)
    if any(not t.error.retryable for t in mine):
        return True
    # An account's other models have the same credential.
    if any(t.provider == candidate.provider and issubclass(t.error, OF_THE_ACCOUNT) for t in tries):
        return True
    # An answer that nobody can read is on the bill all the same.
    if sum(issubclass(t.error, errors.BadResponse) for t in mine) >= TRIES_A_CANDIDATE:
        return True
    overflowed = [
        c.context_window or 0
        for c in candidates
        if any(issubclass(t.error, errors.ContextTooLong) for t in of(c, tries))
    ]
    return bool(overflowed) and (candidate.context_window or 0) <= max(overflowed)


def wait_s(tries: Sequence[Try]) -> float:
    """How long to wait before this candidate's next try: exponential backoff with full jitter,
    on top of what the vendor asked for."""
    if not tries:
        return 0.0
    ceiling = min(BACKOFF_CAP_S, BACKOFF_S * 2 ** (len(tries) - 1))
    return (tries[-1].retry_after or 0.0) + random.uniform(0, ceiling)  # noqa: S311 - no secret
