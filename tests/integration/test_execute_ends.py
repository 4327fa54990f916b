"""Calls that end early: deadlines, cancels, callers that left, lost leases."""

import ssl
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from llmtasks import execute, ledger, pulse, submit
from llmtasks.models import Attempt, OnUnknown, Provider, Status, Task
from providers.sandbox import Sandbox
from providers.types import TextDelta
from tests import factories
from tests.corridor import (
    check_ledger,
    errors_of,
    in_thread,
    queue,
    release,
    sent,
    told,
    until,
    work_off,
)

pytestmark = pytest.mark.usefixtures("short_waits")
TLS = Path(__file__).parent.parent / "unit" / "fixtures" / "tls"


# --- the deadline ---------------------------------------------------------------------------------


def test_the_deadline_ends_a_call_under_way(account, tenant, door):
    factories.route("slow", (account, "slow-20000"))
    began = time.monotonic()
    task = door(tenant, "slow", deadline_s=2).task
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
    task.deadline -= timedelta(seconds=10)
    execute.run(task, work.request)
    row = Task.objects.get()
    assert (row.status, row.error_class, row.attempts) == ("failed", "DeadlineExceeded", 0)


# --- dropped --------------------------------------------------------------------------------------


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
    factories.route("slow", (account, "slow-3000"))
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
