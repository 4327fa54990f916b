"""Calls through the whole corridor, against the sandbox over HTTP: inline, streamed, queued."""

import contextlib
import ssl
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.utils import timezone

from llmtasks import bodies, dispatch, events, execute, ledger, pulse, stores, submit, sweep
from llmtasks.errors import NoProvider
from llmtasks.execute import Outcome
from llmtasks.models import Attempt, Mode, OnUnknown, Provider, Status, Task, TaskPayload, Tenant
from llmtasks.turns import Turns
from providers.sandbox import Sandbox
from providers.sandbox_answers import tokens
from providers.types import Response, TextDelta
from tests import factories

TLS = Path(__file__).parent.parent / "unit" / "fixtures" / "tls"
FORMATS = {"compatible": "", "anthropic": "claude-"}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    """Backoff in hundredths of a second: its length is `test_retry`'s business."""
    monkeypatch.setattr("llmtasks.retry.BACKOFF_S", 0.02)


@pytest.fixture
def tenant(account: Provider) -> Tenant:
    return factories.tenant()


@pytest.fixture(params=FORMATS)
def vendor(request, account: Provider, sandbox: Sandbox) -> tuple[Provider, str]:
    """An account in each wire format, and what a model's name begins with there."""
    if request.param == "compatible":
        return account, ""
    other = factories.provider(sandbox.base_url, "sandbox-anthropic", adapter="anthropic")
    return other, FORMATS[request.param]


# --- three doors, one corridor --------------------------------------------------------------------


def inline(tenant: Tenant, model: str, text: str = "hello", **fields: Any) -> Outcome:
    work = factories.work(tenant, model, text, **fields)
    return execute.run(submit.inline(work), work.request)


def streamed(tenant: Tenant, model: str, text: str = "hello", **fields: Any) -> Outcome:
    """The outcome of a streamed call; its deltas are checked against the answer."""
    work = factories.work(tenant, model, text, **fields)
    *deltas, outcome = execute.stream(submit.inline(work), work.request)
    if outcome.response is not None:
        told = "".join(d.text for d in deltas if isinstance(d, TextDelta))
        assert told == outcome.response.text
    return outcome


def queue(tenant: Tenant, model: str, text: str = "hello", **fields: Any) -> Task:
    [task] = submit.queued([factories.work(tenant, model, text, **fields)])
    assert isinstance(task, Task), task
    return task


def release() -> list[dispatch.Hint]:
    """One round of the dispatcher with room for all providers, without a broker."""
    rooms = {(p.name, lane): 50 for p in Provider.objects.all() for lane in LANES}
    return dispatch.pick(rooms, Turns())


LANES = ("interactive", "default", "bulk")


def work_off(within_s: float = 20.0) -> None:
    """Release and run what waits until nothing does: the dispatcher and a worker in one."""
    end = time.monotonic() + within_s
    while Task.objects.filter(status__in=("waiting", "queued")).exists():
        for hint in release():
            execute.run_queued(hint.task_id, hint.seq)
        assert time.monotonic() < end, list(Task.objects.values("status", "error_class"))
        time.sleep(0.005)


def queued(tenant: Tenant, model: str, text: str = "hello", **fields: Any) -> Outcome:
    task = queue(tenant, model, text, **fields)
    work_off()
    task.refresh_from_db()
    stored = TaskPayload.objects.get(task=task).response
    return Outcome(task, None if stored is None else bodies.load_response(task.kind, stored))


DOORS = {"inline": inline, "streamed": streamed, "queued": queued}


@pytest.fixture(params=DOORS)
def door(request):
    return DOORS[request.param]


def attempts(task: Task) -> list[Attempt]:
    return list(Attempt.objects.filter(task_id=task.id).order_by("number"))


def errors_of(task: Task) -> list[str]:
    return [row.error_class for row in attempts(task)]


def check_ledger(task: Task) -> None:
    """What holds for every task that ended: its money is the sum over its attempts."""
    row, rows = Task.objects.get(id=task.id), attempts(task)
    assert row.attempts == len(rows)
    assert all(a.state == "settled" and a.finished_at for a in rows)
    if row.cost_state not in ("", "unpriced"):
        assert row.cost == sum(a.cost for a in rows)
    assert row.output_tokens == sum(a.output_tokens for a in rows)
    assert row.input_tokens == sum(a.input_tokens for a in rows)
    assert (row.finished_at is not None, row.owner_id) == (True, None)


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
    task = door(tenant, "limited", deadline_s=1.7).task
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


# --- what is never called -------------------------------------------------------------------------


def test_a_missing_credential_is_no_call(tenant, sandbox, door, account, monkeypatch):
    Provider.objects.update(credential="env:NOT_SET_ANYWHERE")
    factories.route("echo", (account, "echo"))
    task = door(tenant, "echo").task
    assert (task.status, task.error_class) == ("failed", "AuthenticationFailed")
    assert "env:NOT_SET_ANYWHERE" in task.error_message
    assert sandbox.calls(str(task.id))["calls"] == 0
    assert task.cost == 0
    check_ledger(task)


def test_nobody_listens_there(tenant, account, door):
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
    execute.run_queued(hint.task_id, hint.seq)
    task.refresh_from_db()
    assert (task.status, task.attempts, task.owner_id) == ("waiting", 0, None)
    assert task.not_before > timezone.now()


# --- the deadline ---------------------------------------------------------------------------------


def test_the_deadline_ends_a_call_under_way(account, tenant, door):
    factories.route("slow", (account, "slow-20000"))
    began = time.monotonic()
    task = door(tenant, "slow", deadline_s=0.5).task
    assert time.monotonic() - began < 10
    assert (task.status, task.error_class) == ("failed", "DeadlineExceeded")
    assert task.cost_state == "estimated"
    check_ledger(task)


def test_a_read_timeout_is_tried_again(account, tenant, door):
    Provider.objects.update(read_timeout_s=0.1)
    factories.route("slow", (account, "slow-5000"))
    task = door(tenant, "slow").task
    assert errors_of(task) == ["Timeout"] * 5
    assert task.cost_state == "estimated"
    check_ledger(task)


def test_inline_work_whose_deadline_passed_already_is_written_final(account, tenant):
    factories.route("echo", (account, "echo"))
    work = factories.work(tenant, "echo", deadline_s=0.001)
    task = submit.inline(work)
    time.sleep(0.01)
    execute.run(task, work.request)
    row = Task.objects.get()
    assert (row.status, row.error_class, row.attempts) == ("failed", "DeadlineExceeded", 0)


# --- dropped --------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_thread(function, *args: Any):
    """Run it beside the block; its end is waited for."""

    def run() -> None:
        try:
            function(*args)
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(30)
    assert not thread.is_alive()


def until(condition, within_s: float = 10.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def sent(**where: Any) -> Attempt | None:
    return Attempt.objects.filter(state="sent", **where).first()


@pytest.mark.parametrize("model", ["slow-20000", "long-100000-50"])
def test_a_running_queued_call_is_cancelled_within_a_second(account, tenant, sandbox, model):
    factories.route("slow", (account, model))
    task = queue(tenant, "slow")
    [hint] = release()
    with in_thread(execute.run_queued, hint.task_id, hint.seq) as thread:
        until(sent)
        asked = time.monotonic()
        execute.cancel(task.id)
        thread.join(10)
        assert time.monotonic() - asked < 3
    task.refresh_from_db()
    assert (task.status, task.error_class) == ("cancelled", "Cancelled")
    assert task.cost_state == "estimated"
    assert task.cost > 0
    until(lambda: sandbox.calls(str(task.id))["under_way"] == 0)
    check_ledger(task)


def test_a_call_under_tls_is_cancelled_too(account, tenant, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
    with Sandbox(tls=context) as secure:
        Provider.objects.update(base_url=f"{secure.base_url}/v1")
        factories.route("slow", (account, "long-100000-50"))
        task = queue(tenant, "slow")
        [hint] = release()
        with in_thread(execute.run_queued, hint.task_id, hint.seq) as thread:
            until(lambda: secure.calls()["under_way"])
            asked = time.monotonic()
            execute.cancel(task.id)
            thread.join(10)
            assert time.monotonic() - asked < 3
    task.refresh_from_db()
    assert (task.status, task.cost_state) == ("cancelled", "estimated")
    check_ledger(task)


def test_an_inline_call_is_cancelled_too(account, tenant):
    factories.route("slow", (account, "slow-20000"))
    work = factories.work(tenant, "slow")
    with in_thread(execute.run, submit.inline(work), work.request):
        execute.cancel(until(sent).task_id, tenant.id)
    row = Task.objects.get()
    assert (row.status, row.error_class) == ("cancelled", "Cancelled")
    check_ledger(row)


def test_a_wait_between_two_tries_is_cancelled_too(account, tenant):
    factories.route("limited", (account, "rate-limit-30"))
    work = factories.work(tenant, "limited")
    with in_thread(execute.run, submit.inline(work), work.request) as thread:
        until(lambda: Attempt.objects.filter(state="settled").exists())
        execute.cancel(Task.objects.get().id)
        thread.join(5)
        assert not thread.is_alive()
    check_ledger(Task.objects.get(status="cancelled"))


def test_who_closes_a_stream_pays_for_what_was_sent(account, tenant, sandbox):
    factories.route("long", (account, "long-5000-200"))
    work = factories.work(tenant, "long")
    deltas = execute.stream(submit.inline(work), work.request)
    for _ in range(5):
        assert isinstance(next(deltas), TextDelta)
    deltas.close()
    row = Task.objects.get()
    assert (row.status, row.error_class, row.cost_state) == ("cancelled", "ClientLeft", "estimated")
    assert row.cost > 0
    until(lambda: sandbox.calls(str(row.id))["under_way"] == 0)
    check_ledger(row)


def test_a_lost_lease_sends_queued_work_back(account, tenant):
    factories.route("slow", (account, "slow-1000"))
    task = queue(tenant, "slow")
    [hint] = release()
    with in_thread(execute.run_queued, hint.task_id, hint.seq):
        until(sent)
        before = pulse.owner_id()
        pulse.start().lose_lease()
    task.refresh_from_db()
    assert (task.status, task.owner_id, errors_of(task)) == ("waiting", None, ["Interrupted"])
    assert pulse.owner_id() != before
    work_off()
    task.refresh_from_db()
    assert (task.status, task.cost_state) == ("succeeded", "estimated")
    check_ledger(task)


def test_a_lost_lease_fails_what_must_not_run_twice(account, tenant):
    factories.route("slow", (account, "slow-20000"))
    task = queue(tenant, "slow", on_unknown=OnUnknown.FAIL)
    [hint] = release()
    with in_thread(execute.run_queued, hint.task_id, hint.seq):
        until(sent)
        pulse.start().lose_lease()
    task.refresh_from_db()
    assert (task.status, task.error_class) == ("failed", "Interrupted")
    check_ledger(task)


def test_a_task_taken_just_before_the_lease_was_lost_is_not_called(account, tenant, sandbox):
    factories.route("echo", (account, "echo"))
    task = queue(tenant, "echo")
    [hint] = release()
    claimed = ledger.claim(hint.task_id, hint.seq, pulse.owner_id())
    pulse.start().lose_lease()
    execute.perform(*claimed)
    task.refresh_from_db()
    assert sandbox.calls(str(task.id))["calls"] == 0
    assert task.status == "waiting"


# --- queued work, step by step --------------------------------------------------------------------


def test_a_retry_is_a_state_and_no_sleep(account, tenant):
    factories.route("flaky", (account, "flaky-1"))
    task = queue(tenant, "flaky")
    [hint] = release()
    execute.run_queued(hint.task_id, hint.seq)
    task.refresh_from_db()
    assert (task.status, task.error_class, task.attempts) == ("waiting", "Overloaded", 1)
    assert (task.owner_id, task.finished_at) == (None, None)
    work_off()
    task.refresh_from_db()
    assert (task.status, task.error_class, task.attempts, task.seq) == ("succeeded", "", 2, 2)
    check_ledger(task)


def test_a_second_copy_of_a_hint_changes_nothing(account, tenant, sandbox):
    factories.route("echo", (account, "echo"))
    task = queue(tenant, "echo")
    [hint] = release()
    for _ in range(3):
        execute.run_queued(hint.task_id, hint.seq)
    assert sandbox.calls(str(task.id))["calls"] == 1
    assert Attempt.objects.count() == 1


def test_a_resumed_task_counts_the_tries_that_it_had(account, tenant):
    factories.route("down", (account, "error-503"))
    task = queue(tenant, "down")
    for _ in range(5):
        [hint] = until(release)
        execute.run_queued(hint.task_id, hint.seq)
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("failed", 5)
    check_ledger(task)


def test_a_route_that_went_away_fails_its_queued_work(account, tenant):
    row = factories.route("gone", (account, "echo"))
    task = queue(tenant, "gone")
    row.is_active = False
    row.save()
    factories.in_force()
    work_off()
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("failed", 0)
    assert "gone" in task.error_message


def test_a_fault_of_ours_fails_the_task_and_settles_the_attempt(account, tenant, monkeypatch):
    factories.route("echo", (account, "echo"))
    task = queue(tenant, "echo")

    def broken(*_args: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("providers.compatible.Compatible.stream", broken)
    monkeypatch.setattr("providers.compatible.Compatible.complete", broken)
    work_off()
    task.refresh_from_db()
    assert (task.status, task.error_class) == ("failed", "InternalError")
    assert "broken" not in task.error_message
    check_ledger(task)


def test_an_answer_that_no_column_takes_is_settled_all_the_same(account, tenant, door, monkeypatch):
    factories.route("echo", (account, "echo"))
    monkeypatch.setattr(bodies, "dump_response", lambda *_: b"not json")
    task = door(tenant, "echo").task
    assert (task.status, task.error_class) == ("failed", "InternalError")
    assert task.cost > 0
    check_ledger(task)


def test_a_fault_of_ours_after_the_answer_settles_the_attempt_too(
    account, tenant, door, monkeypatch
):
    factories.route("echo", (account, "echo"))

    def broken(*_args: Any) -> bytes:
        raise ValueError("broken")

    monkeypatch.setattr(bodies, "dump_response", broken)
    task = door(tenant, "echo").task
    assert (task.status, task.error_class) == ("failed", "InternalError")
    assert task.cost_state == "estimated"
    check_ledger(task)


# --- Postgres away --------------------------------------------------------------------------------


@pytest.fixture
def lose_statement(monkeypatch):
    """Makes the next statements that contain a text fail as if the connection broke, before they
    are sent or (`after`) once they were committed."""
    real = stores.fetch
    losing: list[tuple[str, bool]] = []

    def fetch(sql: str, params: Any = (), **options: Any) -> Any:
        hit = next((item for item in losing if item[0] in sql), None)
        if hit is None:
            return real(sql, params, **options)
        losing.remove(hit)
        if hit[1]:
            real(sql, params, **options)
        raise OperationalError("the connection broke")

    monkeypatch.setattr(ledger, "fetch", fetch)
    monkeypatch.setattr("llmtasks.attempts.SETTLE_AGAIN_S", 0.05)
    return lambda text, times=1, after=False: losing.extend([(text, after)] * times)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_settlement_is_tried_until_it_is_stored(account, tenant, door, lose_statement, after):
    factories.route("echo", (account, "echo"))
    lose_statement("UPDATE llmtasks_attempt", times=2, after=after)
    outcome = door(tenant, "echo")
    assert outcome.task.status == "succeeded"
    assert isinstance(outcome.response, Response)
    if door is not queued:
        assert "Postgres" in outcome.warning
    row = until(lambda: Task.objects.filter(status="succeeded").first())
    check_ledger(row)
    until(lambda: not any(t.name == "settle" for t in threading.enumerate()))


def test_an_inline_task_that_could_not_be_begun_leaves_nothing(account, tenant, lose_statement):
    factories.route("echo", (account, "echo"))
    lose_statement("INSERT INTO llmtasks_task")
    with pytest.raises(execute.Unavailable):
        inline(tenant, "echo")
    assert not Task.objects.exists()
    assert inline(tenant, "echo").task.status == "succeeded"


def test_an_end_that_cannot_be_written_is_told_all_the_same(account, tenant, monkeypatch):
    factories.route("echo", (account, "echo"))
    work = factories.work(tenant, "echo", deadline_s=0.001)
    task = submit.inline(work)
    time.sleep(0.01)

    def away(*_args: Any) -> None:
        raise OperationalError("away")

    monkeypatch.setattr(ledger, "write_ended", away)
    outcome = execute.run(task, work.request)
    assert (outcome.task.status, outcome.task.error_class) == ("failed", "DeadlineExceeded")
    assert not Task.objects.exists()


def test_a_key_taken_meanwhile_is_a_conflict_also_without_an_attempt(account, tenant):
    factories.route("echo", (account, "echo"))
    key = submit.Idempotency(endpoint="/v1/tasks", key="k", body_hash="h")
    late = factories.work(tenant, "echo", deadline_s=0.001, idempotency=key)
    task = submit.inline(late)
    inline(tenant, "echo", idempotency=key)
    with pytest.raises(execute.Conflict):
        execute.run(task, late.request)
    assert Task.objects.count() == 1


def test_an_inline_task_that_was_taken_for_dead_says_what_became_of_it(account, tenant):
    factories.route("slow", (account, "slow-1000"))
    work = factories.work(tenant, "slow")
    outcomes: list[Outcome] = []

    def run() -> None:
        outcomes.append(execute.run(submit.inline(work), work.request))

    with in_thread(run):
        until(sent)
        Task.objects.update(owner_id=factories.worker(alive=False).id)
        assert sweep.run() == 1
    [outcome] = outcomes
    assert outcome.response is None
    assert (outcome.task.status, outcome.task.error_class) == ("failed", "Interrupted")
    # Its answer came late, and is paid for as it was billed.
    row = Task.objects.get()
    assert row.cost_state == "final"
    check_ledger(row)


def test_a_task_that_was_taken_over_is_left_alone(account, tenant):
    factories.route("slow", (account, "slow-1000"))
    task = queue(tenant, "slow")
    [hint] = release()
    with in_thread(execute.run_queued, hint.task_id, hint.seq):
        until(sent)
        Task.objects.update(owner_id=factories.worker(alive=False).id)
        sweep.run()
    task.refresh_from_db()
    assert (task.status, task.attempts, task.cost_state) == ("waiting", 1, "final")
    work_off()
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("succeeded", 2)
    check_ledger(task)


def test_a_worker_lets_go_of_a_task_that_it_could_not_begin(account, tenant, lose_statement):
    factories.route("echo", (account, "echo"))
    task = queue(tenant, "echo")
    [hint] = release()
    lose_statement("INSERT INTO llmtasks_attempt")
    execute.run_queued(hint.task_id, hint.seq)
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("running", 0)
    mine = pulse.start()
    for _ in range(2):
        mine.renewed_at = mine.looked_for_orphans_at = float("-inf")
        mine.is_registered = True
        mine.must_renew = True
        with mine.lock:
            mine.beat()
    assert sweep.run() == 1
    work_off()
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("succeeded", 1)


# --- what watchers are told -----------------------------------------------------------------------


def told(task: Task) -> list[tuple[str, dict[str, Any]]]:
    events.outbox().flush()
    entries = stores.redis_client().xrange(events.stream_of(task.id))
    return [(e[b"n"].decode(), bodies.orjson.loads(e[b"d"])) for _, e in entries]


def test_watchers_are_told_of_every_state_and_of_every_new_attempt(account, tenant):
    factories.route("flaky", (account, "flaky-1"))
    task = queue(tenant, "flaky", stream=True)
    work_off()
    names = [name for name, _ in told(task)]
    assert names[-1] == "done"
    states = [data["status"] for name, data in told(task) if name in ("state", "done")]
    assert states == ["running", "waiting", "running", "succeeded"]
    resets = [data["attempt"] for name, data in told(task) if name == "reset"]
    assert resets == [2]
    deltas = [data for name, data in told(task) if name == "delta"]
    assert {data["attempt"] for data in deltas} == {2}
    assert "".join(data["text"] for data in deltas)


def test_work_that_nobody_watches_has_no_deltas(account, tenant):
    factories.route("echo", (account, "echo"))
    task = queue(tenant, "echo", lane="bulk")
    work_off()
    assert {name for name, _ in told(task)} == {"state", "done"}


# --- cancel before it runs ------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["waiting", "queued", "blocked"])
def test_what_has_not_begun_is_cancelled_at_once(account, tenant, status):
    task = factories.task(tenant, status=status)
    assert execute.cancel(task.id, tenant.id).status == Status.CANCELLED
    row = Task.objects.get()
    assert (row.status, row.error_class) == ("cancelled", "Cancelled")
    assert row.finished_at is not None
    assert [name for name, _ in told(task)] == ["done"]


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "expired"])
def test_what_is_final_cannot_be_cancelled(account, tenant, status):
    task = factories.task(tenant, status=status)
    with pytest.raises(execute.Conflict, match=status):
        execute.cancel(task.id)


def test_a_task_that_moves_while_it_is_cancelled_is_cancelled(account, tenant, monkeypatch):
    """Between the two looks it goes from running to waiting."""
    task = factories.task(tenant, status="running", fence=1)
    real = ledger.move

    def move(*args: Any, **fields: Any) -> bool:
        moved = real(*args, **fields)
        Task.objects.filter(status="running").update(status="waiting")
        return moved

    monkeypatch.setattr(ledger, "move", move)
    assert execute.cancel(task.id).status == "cancelled"


def test_nobody_cancels_another_tenants_task(account, tenant):
    task = factories.task(factories.tenant())
    with pytest.raises(execute.NotFound):
        execute.cancel(task.id, tenant.id)
    assert Task.objects.get().status == "waiting"


def test_modes_are_kept(account, tenant, door):
    factories.route("echo", (account, "echo"))
    task = door(tenant, "echo", metadata={"feature": "x"}, user="u_1").task
    row = Task.objects.get(id=task.id)
    assert row.mode == (Mode.QUEUED if door is queued else Mode.INLINE)
    assert (row.metadata, row.user) == ({"feature": "x"}, "u_1")
