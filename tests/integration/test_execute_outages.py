"""Calls while Postgres is away, and tasks that somebody else took."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError

from llmtasks import execute, ledger, pulse, submit, sweep
from llmtasks.execute import Outcome
from llmtasks.models import Task
from providers.types import Response
from tests import factories
from tests.corridor import (
    check_ledger,
    in_thread,
    inline,
    queue,
    queued,
    release,
    sent,
    until,
    work_off,
)

pytestmark = pytest.mark.usefixtures("short_waits")


# --- Postgres away --------------------------------------------------------------------------------


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
    task.deadline -= timedelta(seconds=10)

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
    task.deadline -= timedelta(seconds=10)
    inline(tenant, "echo", idempotency=key)
    with pytest.raises(execute.Conflict):
        execute.run(task, late.request)
    assert Task.objects.count() == 1


def test_an_inline_task_that_was_taken_for_dead_says_what_became_of_it(account, tenant):
    factories.route("slow", (account, "slow-3000"))
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
    factories.route("slow", (account, "slow-3000"))
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
    with mine.lock:
        for _ in range(2):
            mine.renewed_at = mine.looked_for_orphans_at = float("-inf")
            mine.is_registered = True
            mine.must_renew = True
            mine.beat()
    assert sweep.run() == 1
    work_off()
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("succeeded", 1)
