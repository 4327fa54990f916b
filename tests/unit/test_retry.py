"""What is tried next: the error table of `docs/errors.md`, and the order over candidates."""

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtasks import retry
from llmtasks.retry import MAX_ATTEMPTS, TRIES_A_CANDIDATE, Try
from llmtasks.routing import Candidate
from providers import errors

ALL = list(retry.CLASSES.values())
choose = partial(retry.choose, is_patient=True)


def candidate(provider: str, model: str = "m", window: int | None = None) -> Candidate:
    return Candidate(
        provider=provider,
        model=model,
        adapter=None,  # type: ignore[arg-type]
        credential="",
        price_family=provider,
        is_paused=False,
        is_refused=False,
        context_window=window,
        max_output_tokens=None,
    )


A, B, C = candidate("a"), candidate("b"), candidate("c")


def tried(chosen: Candidate, error: type[errors.ProviderError], **fields: Any) -> Try:
    return Try(chosen.provider, chosen.model, error, **fields)


def order(candidates: list[Candidate], error: type[errors.ProviderError], most: int = 20) -> str:
    """The providers in the order in which they are called, each failing with `error`."""
    tries: list[Try] = []
    while (found := choose(candidates, tries)) is not None and len(tries) < most:
        tries.append(tried(found.candidate, error))
    return "".join(t.provider for t in tries)


@pytest.mark.parametrize("kind", [errors.Overloaded, errors.ServerError, errors.Timeout,
                                  errors.ConnectionFailed])  # fmt: skip
@pytest.mark.parametrize(("names", "expected"), [("a", "aaaaa"), ("ab", "aabba"), ("abc", "aabbc")])
def test_a_fault_that_may_pass_gets_two_tries_a_candidate_and_goes_round(kind, names, expected):
    assert order([candidate(name) for name in names], kind) == expected


@pytest.mark.parametrize(("names", "expected"), [("a", "aa"), ("ab", "aabb"), ("abc", "aabbc")])
def test_an_unreadable_answer_is_asked_for_once_more_only(names, expected):
    assert order([candidate(name) for name in names], errors.BadResponse) == expected


@pytest.mark.parametrize(
    "kind", [errors.AuthenticationFailed, errors.PermissionDenied, errors.QuotaExhausted]
)
def test_a_refused_credential_is_never_used_again(kind):
    assert order([A, B, C], kind) == "abc"


@pytest.mark.parametrize("kind", [errors.AuthenticationFailed, errors.QuotaExhausted])
def test_a_refused_credential_rules_out_the_accounts_other_models(kind):
    found = choose([A, candidate("a", "larger"), B], [tried(A, kind)])
    assert found is not None
    assert found.candidate == B


def test_a_missing_permission_may_be_for_one_model_only():
    larger = candidate("a", "larger")
    found = choose([A, larger, B], [tried(A, errors.PermissionDenied)])
    assert found is not None
    assert found.candidate == larger


@pytest.mark.parametrize("kind", [errors.InvalidRequest, errors.ContentFiltered])
def test_the_callers_fault_is_final(kind):
    assert choose([A, B], [tried(A, kind)]) is None


def test_what_an_adapter_cannot_express_another_may():
    assert order([A, B], errors.Unsupported) == "ab"


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((8, 32, 8), "ab"),
        ((8, 8, 32), "ac"),
        ((32, 8, 8), "a"),
        # A window that nobody named is no larger one.
        ((8, None, None), "a"),
        ((None, 8, 16), "abc"),
    ],
)
def test_a_prompt_too_long_goes_to_larger_windows_only(windows, expected):
    candidates = [candidate(name, window=w) for name, w in zip("abc", windows, strict=True)]
    assert order(candidates, errors.ContextTooLong) == expected


# --- rate limits ----------------------------------------------------------------------------------


def test_a_limited_candidate_is_left_at_once():
    found = choose([A, B], [tried(A, errors.RateLimited, retry_after=60.0)])
    assert found is not None
    assert (found.candidate, found.wait_s) == (B, 0.0)


def test_where_all_are_limited_the_vendors_wait_is_honoured():
    limited = [tried(A, errors.RateLimited, retry_after=7.0)]
    found = choose([A], limited)
    assert found is not None
    assert 7.0 <= found.wait_s <= 7.5


def test_a_rate_limit_is_no_failed_try():
    limited = [tried(A, errors.RateLimited)] * 50
    assert choose([A], limited) is not None
    failed = [tried(A, errors.Overloaded)] * MAX_ATTEMPTS
    assert choose([A], [*limited, *failed]) is None


def test_where_somebody_waits_a_rate_limit_is_a_failed_try():
    limited = [tried(A, errors.RateLimited)] * MAX_ATTEMPTS
    assert retry.choose([A], limited[1:], is_patient=False) is not None
    assert retry.choose([A], limited, is_patient=False) is None


# --- waiting --------------------------------------------------------------------------------------


def test_the_first_try_waits_for_nothing():
    found = choose([A, B], [])
    assert found is not None
    assert (found.candidate, found.wait_s) == (A, 0.0)


@pytest.mark.parametrize("failures", range(1, 5))
def test_waits_are_drawn_from_below_a_doubling_ceiling(failures):
    tries = [tried(A, errors.Overloaded)] * failures
    waits = [retry.wait_s(tries) for _ in range(300)]
    ceiling = retry.BACKOFF_S * 2 ** (failures - 1)
    assert 0 <= min(waits) < ceiling / 4
    assert ceiling * 3 / 4 < max(waits) <= ceiling


def test_waits_are_capped():
    tries = [tried(A, errors.RateLimited)] * 60
    assert all(retry.wait_s(tries) <= retry.BACKOFF_CAP_S for _ in range(100))


# --- whatever happens -----------------------------------------------------------------------------

CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.sampled_from("abc"),
        st.sampled_from("mn"),
        st.none() | st.sampled_from([8, 16, 32]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda c: (c.provider, c.model),
)


@given(CANDIDATES, st.lists(st.sampled_from(ALL), max_size=30))
def test_a_run_of_errors_keeps_the_rules(candidates, kinds):
    tries: list[Try] = []
    for kind in kinds:
        found = choose(candidates, tries)
        if found is None:
            break
        chosen = found.candidate
        before = retry.of(chosen, tries)
        assert chosen in candidates
        assert found.wait_s >= 0
        assert all(t.error.retryable for t in before)
        assert sum(t.error is errors.BadResponse for t in before) < TRIES_A_CANDIDATE
        # Nobody has a second round before each that can still answer had a first.
        fewest = min(
            retry.rounds(retry.of(c, tries))
            for c in candidates
            if not retry.is_ruled_out(c, candidates, tries)
        )
        assert retry.rounds(before) == fewest
        tries.append(tried(chosen, kind))
    failed = [t for t in tries if not t.is_limit]
    assert len(failed) <= MAX_ATTEMPTS
    assert all(t.error.retryable or t.error.try_next for t in tries[:-1])


def test_every_class_of_the_tree_is_known_by_its_name():
    assert errors.RateLimited in ALL
    assert all(retry.CLASSES[kind.__name__] is kind for kind in ALL)


# --- the budget of calls again --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error_class", "inline", "queued"),
    [
        ("Overloaded", True, True),
        ("AuthenticationFailed", True, True),
        # Waiting for a limit is not failing, where nobody waits for the answer.
        ("RateLimited", True, False),
        # We ended it, or its process died: no fault of the vendor.
        ("Interrupted", False, False),
        ("Outrun", False, False),
        ("", False, False),
    ],
)
def test_what_is_a_call_again(error_class: str, inline: bool, queued: bool) -> None:
    tries = [retry.past("a", "m", "Overloaded"), retry.past("a", "m", error_class)]
    assert retry.is_again(tries, is_patient=False) is inline
    assert retry.is_again(tries, is_patient=True) is queued
    assert not retry.is_again([], is_patient=False)
