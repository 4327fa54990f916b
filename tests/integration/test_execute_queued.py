"""Queued work, step by step, and what its watchers are told."""

from typing import Any

import pytest

from llmtasks import bodies, execute
from llmtasks.models import Attempt
from tests import factories
from tests.corridor import check_ledger, queue, release, told, until, work_off

pytestmark = pytest.mark.usefixtures("short_waits")


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


# --- what watchers are told -----------------------------------------------------------------------


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
