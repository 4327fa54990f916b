"""Two calls for one answer where one or both fail, are dropped, or their process dies."""

import threading
import time
from typing import Any

import pytest
from django.db.models import F

from llmtasks import attempts as attempts_of
from llmtasks import execute, hedge, ledger, pulse, submit, sweep
from llmtasks.models import Attempt, Provider, Task
from tests import factories
from tests.corridor import (
    attempts,
    check_ledger,
    errors_of,
    in_thread,
    inline,
    queue,
    release,
    until,
)
from tests.hedging import SLOW, first_waits, has_begun, is_called, nobody_calls

pytestmark = pytest.mark.usefixtures("short_waits")


# --- failures -------------------------------------------------------------------------------------


def test_a_first_that_fails_waits_for_the_second(
    account, tenant, second, hedged, door, monkeypatch
):
    Provider.objects.filter(pk=account.pk).update(read_timeout_s=0.1)
    hedged((account, SLOW), (second, "slow-1000"))
    first_waits(monkeypatch, has_begun)
    task = door(tenant, "smart").task
    assert (task.status, errors_of(task)) == ("succeeded", ["Timeout", ""])
    assert [a.cost_state for a in attempts(task)] == ["estimated", "final"]
    check_ledger(task)


def test_a_second_that_fails_leaves_the_first_alone(account, tenant, second, hedged, door):
    hedged((account, "slow-1500"), (second, "error-400"))
    task = door(tenant, "smart").task
    assert (task.status, errors_of(task)) == ("succeeded", ["", "InvalidRequest"])
    assert (task.provider, task.cost_state) == ("sandbox", "final")
    check_ledger(task)


def test_where_both_fail_both_are_tries(
    account, tenant, second, hedged, door, sandbox, monkeypatch
):
    Provider.objects.filter(pk=account.pk).update(read_timeout_s=0.3)
    hedged((account, SLOW), (second, "error-503"))
    first_waits(monkeypatch, has_begun)
    task = door(tenant, "smart").task
    rows = attempts(task)
    assert task.status == "failed"
    assert [a.number for a in rows] == [1, 2, 3, 4, 5]
    assert [a.error_class for a in rows][:2] == ["Timeout", "Overloaded"]
    until(lambda: sandbox.calls(str(task.id))["calls"] == 5)
    check_ledger(task)


def test_a_request_that_is_at_fault_ends_both(account, tenant, second, hedged, monkeypatch):
    """A vendor that refuses the request after a while: no other is asked for it."""
    hedged((account, "error-400"), (second, SLOW))
    real = attempts_of.send

    def send(attempt: Any, request: Any) -> Any:
        if attempt.provider == "sandbox":
            until(lambda: Attempt.objects.filter(provider="second").exists())
        return (yield from real(attempt, request))

    monkeypatch.setattr(attempts_of, "send", send)
    began = time.monotonic()
    task = inline(tenant, "smart").task
    assert time.monotonic() - began < 5
    assert (task.status, task.error_class) == ("failed", "InvalidRequest")
    assert errors_of(task) == ["InvalidRequest", "Outrun"]
    check_ledger(task)


@pytest.mark.parametrize("broken", ["sandbox", "second"])
def test_a_fault_of_ours_in_one_settles_both(
    account, tenant, second, hedged, monkeypatch, broken, sandbox
):
    hedged((account, "slow-1500"), (second, SLOW))
    real = attempts_of.send

    def send(attempt: Any, request: Any) -> Any:
        if attempt.provider == broken:
            until(lambda: Attempt.objects.filter(provider="second").exists())
            raise RuntimeError("broken")
        return (yield from real(attempt, request))

    monkeypatch.setattr(attempts_of, "send", send)
    task = inline(tenant, "smart").task
    expected = {
        "sandbox": ("failed", ["InternalError", "Outrun"]),
        "second": ("succeeded", ["", "InternalError"]),
    }
    assert (task.status, errors_of(task)) == expected[broken]
    nobody_calls(sandbox, task)
    check_ledger(task)


# --- dropped --------------------------------------------------------------------------------------


def both_sent() -> bool:
    return Attempt.objects.filter(state="sent").count() == 2


def test_the_deadline_ends_both(account, tenant, second, hedged, door, sandbox):
    hedged((account, SLOW), (second, SLOW))
    task = door(tenant, "smart", deadline_s=2).task
    assert (task.status, task.error_class) == ("failed", "DeadlineExceeded")
    assert errors_of(task) == ["Timeout", "Timeout"]
    nobody_calls(sandbox, task)
    check_ledger(task)


ENDS = {
    # Why it is dropped → what the task and both attempts are then, inline and queued.
    "cancel": (("cancelled", "Cancelled"), ("cancelled", "Cancelled")),
    "client": (("cancelled", "ClientLeft"), ("cancelled", "ClientLeft")),
    "lease": (("failed", "Interrupted"), ("waiting", "Interrupted")),
    "drain": (("failed", "Interrupted"), ("waiting", "Interrupted")),
}


@pytest.mark.parametrize("reason", ENDS)
@pytest.mark.parametrize("mode", ["inline", "queued"])
def test_a_drop_reaches_both(account, tenant, second, hedged, sandbox, mode, reason):
    hedged((account, SLOW), (second, SLOW))
    if mode == "queued":
        queue(tenant, "smart")
        [hint] = release()
        target, arguments = execute.run_queued, (hint.task_id, hint.seq)
    else:
        work = factories.work(tenant, "smart")
        target, arguments = execute.run, (submit.inline(work), work.request)
    with in_thread(target, *arguments) as thread:
        until(both_sent)
        task = Task.objects.get()
        asked = time.monotonic()
        if reason == "cancel":
            execute.cancel(task.id)
        elif reason == "lease":
            pulse.start().lose_lease()
        else:
            [call] = pulse.start().calls[task.id]
            call.drop(reason)
        thread.join(10)
        assert time.monotonic() - asked < 4
    task.refresh_from_db()
    status, error = ENDS[reason][mode == "queued"]
    assert task.status == status
    assert errors_of(task) == [error, error]
    assert task.owner_id is None
    nobody_calls(sandbox, task)
    assert task.cost == sum(a.cost for a in attempts(task))


def test_a_drop_that_comes_before_the_second_is_sent_reaches_it(
    account, tenant, second, hedged, monkeypatch, sandbox
):
    hedged((account, SLOW), (second, SLOW))
    real = hedge.admission.admit_at_once
    work = factories.work(tenant, "smart")
    task = submit.inline(work)

    def admit_at_once(*arguments: Any) -> Any:
        admitted = real(*arguments)
        [call] = pulse.start().calls[task.id]
        call.drop("client")
        return admitted

    monkeypatch.setattr(hedge.admission, "admit_at_once", admit_at_once)
    execute.run(task, work.request)
    assert (task.status, errors_of(task)) == ("cancelled", ["ClientLeft"])
    assert sandbox.calls(str(task.id))["calls"] == 1
    check_ledger(task)


# --- processes that die, and Postgres away --------------------------------------------------------


def test_both_attempts_of_a_dead_process_are_unknown_until_a_late_answer(
    account, tenant, second, hedged
):
    hedged((account, "slow-1500"), (second, SLOW))
    task = queue(tenant, "smart")
    [hint] = release()
    with in_thread(execute.run_queued, hint.task_id, hint.seq):
        until(both_sent)
        Task.objects.update(owner_id=factories.worker(alive=False).id)
        assert sweep.run() == 1
        rows = attempts(task)
        assert [(a.state, a.cost_state) for a in rows] == [("unknown", "estimated")] * 2
        task.refresh_from_db()
        assert (task.status, task.cost) == ("waiting", sum(a.cost for a in rows))
    # It was frozen rather than dead: what it knows of the costs is written, and nothing else.
    until(lambda: not Attempt.objects.exclude(state="settled").exists())
    task.refresh_from_db()
    assert (task.status, errors_of(task)) == ("waiting", ["", "Outrun"])
    rows = attempts(task)
    assert [(a.state, a.cost_state) for a in rows] == [
        ("settled", "final"),
        ("settled", "estimated"),
    ]
    assert task.cost == sum(a.cost for a in rows)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_second_that_could_not_be_written_down_is_not_called(
    account, tenant, second, hedged, lose_statement, sandbox, after, monkeypatch, caplog
):
    hedged((account, "echo"), (second, "echo"))
    first_waits(monkeypatch, lambda _: "no second call" in caplog.text)
    # The first is written with its task.
    lose_statement("UPDATE llmtasks_task SET attempts", after=after)
    task = inline(tenant, "smart").task
    assert (task.status, task.provider) == ("succeeded", "sandbox")
    assert sandbox.calls(str(task.id))["calls"] == 1
    states = [a.state for a in attempts(task)]
    assert states == (["settled", "sent"] if after else ["settled"])
    # Nobody knows that it was not called: it is closed with its estimate once it is old.
    assert sweep.close_left_open() == 0
    Attempt.objects.filter(state="sent").update(started_at="2026-01-01T00:00Z")
    assert sweep.close_left_open() == (1 if after else 0)
    task.refresh_from_db()
    assert task.cost == sum(a.cost for a in attempts(task))
    assert task.cost_state == ("estimated" if after else "final")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("times", [1, 4])
def test_settlements_go_on_while_postgres_is_away(
    account, tenant, second, hedged, lose_statement, door, after, times
):
    hedged((account, SLOW), (second, "echo"))
    lose_statement("UPDATE llmtasks_attempt", times=times, after=after)
    task = door(tenant, "smart").task
    assert task.status == "succeeded"
    until(lambda: not Attempt.objects.exclude(state="settled").exists())
    until(lambda: Task.objects.filter(status="succeeded").exists())
    until(lambda: not any(t.name == "settle" for t in threading.enumerate()))
    assert errors_of(task) == ["Outrun", ""]
    check_ledger(task)


def test_an_answer_does_not_wait_for_long_for_the_other_to_be_settled(
    account, tenant, second, hedged, sandbox, monkeypatch
):
    hedged((account, "slow-300"), (second, SLOW))
    first_waits(monkeypatch, is_called(sandbox))
    held = threading.Event()
    real = ledger.settle_apart

    def settle_apart(*arguments: Any) -> bool:
        held.wait(10)
        return real(*arguments)

    monkeypatch.setattr(ledger, "settle_apart", settle_apart)
    began = time.monotonic()
    task = inline(tenant, "smart").task
    assert time.monotonic() - began < 5
    assert [a.state for a in attempts(task)] == ["settled", "sent"]
    held.set()
    until(lambda: not Attempt.objects.filter(state="sent").exists())
    check_ledger(task)


def test_a_second_of_a_task_that_somebody_else_took_is_not_begun(
    account, tenant, second, hedged, monkeypatch
):
    hedged((account, "slow-500"), (second, "echo"))
    real = attempts_of.begin

    def begin(candidate: Any, *arguments: Any) -> Any:
        if candidate.provider == "second":
            Task.objects.update(fence=F("fence") + 1)
        return real(candidate, *arguments)

    monkeypatch.setattr(attempts_of, "begin", begin)
    assert errors_of(inline(tenant, "smart").task) == [""]
