"""Calls through the whole corridor, against the sandbox over HTTP: inline, streamed, queued."""

import time
from datetime import timedelta
from decimal import Decimal

import pytest
from django.utils import timezone

from llmtasks import bodies, execute, submit
from llmtasks.errors import NoProvider
from llmtasks.models import Attempt, Mode, Provider, Task, TaskPayload
from providers.sandbox_answers import tokens
from tests import factories
from tests.corridor import (
    attempts,
    check_ledger,
    errors_of,
    inline,
    queue,
    queued,
    release,
    streamed,
    work_off,
)

pytestmark = pytest.mark.usefixtures("short_waits")


# --- every behaviour of the sandbox ---------------------------------------------------------------


def test_an_answer_is_paid_for_as_the_vendor_bills_it(vendor, door, sandbox):
    account, prefix = vendor
    factories.route("smart", (account, f"{prefix}echo"))
    outcome = door(factories.tenant(), "smart", "how much is this? " * 20)
    task = outcome.task
    assert (task.status, task.provider, task.error_class) == ("succeeded", account.name, "")
    assert outcome.response is not None
    assert "how much" in outcome.response.text
    bill = sandbox.calls(str(task.id))
    assert (bill["calls"], bill["answered"], bill["overlaps"]) == (1, 1, 0)
    assert (task.input_tokens, task.output_tokens) == (bill["input_tokens"], bill["output_tokens"])
    # The prices of `factories.PRICES`, per million.
    assert task.cost == Decimal(bill["input_tokens"] + 4 * bill["output_tokens"]) / 10**6
    assert task.cost_state == "final"
    [attempt] = attempts(task)
    assert (attempt.http_status, attempt.price_id is not None) == (200, True)
    assert attempt.raw_usage
    assert attempt.first_token_ms is not None
    check_ledger(task)


def test_an_embedding_costs_its_input(account, tenant, sandbox):
    factories.route("embed", (account, "embed-8"), kind="embedding")
    for mode in ("inline", "queued"):
        work = factories.embedding(tenant, "embed", "one text", "another")
        if mode == "inline":
            outcome = execute.run(submit.inline(work), work.request)
            task, answer = outcome.task, outcome.response
        else:
            [task] = submit.queued([work])
            work_off()
            task.refresh_from_db()
            stored = TaskPayload.objects.get(task=task).response
            answer = bodies.load_response(task.kind, stored)
        assert [len(vector) for vector in answer.vectors] == [8, 8]
        assert task.input_tokens == tokens("one text") + tokens("another")
        assert task.cost == Decimal(task.input_tokens) / 10**6
        check_ledger(task)


FAILURES = [
    # behaviour, the attempts' errors, the task's error, calls
    ("error-400", ["InvalidRequest"], "InvalidRequest"),
    ("error-401", ["AuthenticationFailed"], "AuthenticationFailed"),
    ("error-402", ["QuotaExhausted"], "QuotaExhausted"),
    ("error-403", ["PermissionDenied"], "PermissionDenied"),
    ("error-404", ["InvalidRequest"], "InvalidRequest"),
    ("error-500", ["ServerError"] * 5, "ServerError"),
    ("error-503", ["Overloaded"] * 5, "Overloaded"),
    ("error-529", ["Overloaded"] * 5, "Overloaded"),
    ("error-504", ["Timeout"] * 5, "Timeout"),
    ("cut", ["BadResponse"] * 2, "BadResponse"),
    ("garbage", ["BadResponse"] * 2, "BadResponse"),
]


@pytest.mark.parametrize(("name", "expected", "final"), FAILURES)
def test_a_failure_is_tried_again_as_its_class_says(
    account, tenant, door, sandbox, name, expected, final
):
    factories.route(name, (account, name))
    task = door(tenant, name).task
    # What went out to the caller can't be taken back: a stream that was cut is final.
    if name == "cut" and door is streamed:
        expected = expected[:1]
    assert (task.status, task.error_class) == ("failed", final)
    assert errors_of(task) == expected
    assert sandbox.calls(str(task.id))["calls"] == len(expected)
    check_ledger(task)
    refused = name.startswith("error-")
    assert task.cost_state == ("final" if refused else "estimated")
    assert (task.cost == 0) == refused
    assert task.error_status == (int(name.removeprefix("error-")) if refused else None)


def test_a_vendor_that_recovers_is_asked_again(vendor, door, sandbox):
    account, prefix = vendor
    factories.route("flaky", (account, f"{prefix}flaky-2"))
    task = door(factories.tenant(), "flaky").task
    assert task.status == "succeeded"
    assert errors_of(task) == ["Overloaded", "Overloaded", ""]
    bill = sandbox.calls(str(task.id))
    assert (bill["calls"], bill["overlaps"]) == (3, 0)
    assert task.output_tokens == bill["output_tokens"]
    check_ledger(task)


def test_an_answer_without_usage_is_estimated(account, tenant, door):
    factories.route("no-usage", (account, "no-usage"))
    task = door(tenant, "no-usage", "hello " * 50).task
    assert (task.status, task.cost_state, task.output_tokens) == ("succeeded", "estimated", 0)
    assert task.cost is not None
    assert task.cost > 0
    check_ledger(task)


def test_no_price_is_unpriced_and_not_free(account, tenant, door):
    factories.route("echo", (account, "echo"), priced=False)
    task = door(tenant, "echo").task
    assert (task.status, task.cost, task.cost_state) == ("succeeded", None, "unpriced")
    assert task.output_tokens > 0
    check_ledger(task)


def test_the_next_candidate_answers_where_the_first_cannot(account, tenant, door, sandbox):
    other = factories.provider(sandbox.base_url, "second", adapter="anthropic")
    factories.route("smart", (account, "error-503"), (other, "claude-echo"))
    task = door(tenant, "smart").task
    assert (task.status, task.provider) == ("succeeded", "second")
    assert errors_of(task) == ["Overloaded", "Overloaded", ""]
    assert [a.provider for a in attempts(task)] == ["sandbox", "sandbox", "second"]
    check_ledger(task)


def test_a_refused_credential_moves_on_at_once(account, tenant, door, sandbox):
    other = factories.provider(sandbox.base_url, "second")
    factories.route("smart", (account, "error-401"), (account, "slow-1"), (other, "echo"))
    task = door(tenant, "smart").task
    assert errors_of(task) == ["AuthenticationFailed", ""]
    assert task.provider == "second"
    check_ledger(task)


def test_a_vendors_wait_is_honoured(account, tenant, door, monkeypatch):
    factories.route("limited", (account, "rate-limit-1"))
    began = time.monotonic()
    task = door(tenant, "limited", deadline_s=1.99).task
    waited = time.monotonic() - began
    # The second wait would pass the deadline: nobody waits for that.
    assert (task.status, task.error_class) == ("failed", "RateLimited")
    assert errors_of(task) == ["RateLimited", "RateLimited"]
    assert waited >= 1.0
    assert task.retry_after == 1.0
    assert task.cost == 0
    check_ledger(task)


def test_a_limited_provider_is_left_for_the_next(account, tenant, door, sandbox):
    other = factories.provider(sandbox.base_url, "second")
    factories.route("smart", (account, "rate-limit-30"), (other, "echo"))
    task = door(tenant, "smart").task
    assert (task.status, errors_of(task)) == ("succeeded", ["RateLimited", ""])


def test_modes_are_kept(account, tenant, door):
    factories.route("echo", (account, "echo"))
    task = door(tenant, "echo", metadata={"feature": "x"}, user="u_1").task
    row = Task.objects.get(id=task.id)
    assert row.mode == (Mode.QUEUED if door is queued else Mode.INLINE)
    assert (row.metadata, row.user) == ({"feature": "x"}, "u_1")


# --- what is never called -------------------------------------------------------------------------


def test_a_missing_credential_is_no_call(account, tenant, sandbox, door):
    Provider.objects.update(credential="env:NOT_SET_ANYWHERE")
    factories.route("echo", (account, "echo"))
    task = door(tenant, "echo").task
    assert (task.status, task.error_class) == ("failed", "AuthenticationFailed")
    assert "env:NOT_SET_ANYWHERE" in task.error_message
    assert sandbox.calls(str(task.id))["calls"] == 0
    assert task.cost == 0
    check_ledger(task)


def test_nobody_listens_there(account, tenant, door):
    Provider.objects.update(base_url="http://127.0.0.1:1/v1")
    factories.route("echo", (account, "echo"))
    task = door(tenant, "echo").task
    assert errors_of(task) == ["ConnectionFailed"] * 5
    assert (task.cost, task.cost_state) == (Decimal(0), "final")
    check_ledger(task)


def test_a_paused_provider_is_passed_over_inline(account, tenant, sandbox):
    other = factories.provider(sandbox.base_url, "second")
    factories.route("smart", (account, "echo"), (other, "echo"))
    factories.route("only", (account, "echo"))
    account.is_paused = True
    account.save()
    assert inline(tenant, "smart").task.provider == "second"
    with pytest.raises(NoProvider):
        inline(tenant, "only")
    assert not Attempt.objects.filter(provider="sandbox").exists()


def test_queued_work_of_a_paused_provider_goes_back_to_waiting(account, tenant):
    factories.route("only", (account, "echo"))
    task = queue(tenant, "only")
    [hint] = release()
    account.is_paused = True
    account.save()
    factories.in_force()
    began = timezone.now()
    execute.run_queued(hint.task_id, hint.seq)
    task.refresh_from_db()
    assert (task.status, task.attempts, task.owner_id) == ("waiting", 0, None)
    assert task.not_before - began >= timedelta(seconds=1)
