"""What got stuck is put back, and what must not run again is ended."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import dispatch, ledger, queues, stores, submit, sweep
from llmtasks.ledger import Outcome
from llmtasks.models import Attempt, IdempotencyKey, Mode, OnUnknown, Task, Worker
from llmtasks.submit import Idempotency
from llmtasks.turns import Turns
from providers.types import Usage
from tests import factories
from tests.corridor import until

pytestmark = pytest.mark.usefixtures("account")


@pytest.fixture
def dead() -> Worker:
    return factories.worker(alive=False)


def running(owner: Worker, **fields: Any) -> Task:
    return factories.task(status="running", fence=1, owner_id=owner.id, **fields)


def sent(task: Task, number: int = 1, **fields: Any) -> Attempt:
    given = {"provider": "sandbox", "model": "echo", "cost": Decimal(2), "state": "sent"}
    return Attempt.objects.create(
        task=task, tenant_id=task.tenant_id, number=number, **{**given, **fields}
    )


def after(task: Task) -> Task:
    return Task.objects.get(id=task.id)


# --- owners that are gone -------------------------------------------------------------------------


def test_queued_work_of_a_dead_process_waits_again(dead):
    task = running(dead)
    attempt = sent(task)
    assert sweep.run() == 1
    row = after(task)
    assert (row.status, row.owner_id, row.error_class) == ("waiting", None, "Interrupted")
    assert row.finished_at is None
    attempt.refresh_from_db()
    assert (attempt.state, attempt.cost, attempt.cost_state) == ("unknown", 2, "estimated")
    assert (row.cost, row.cost_state) == (Decimal(2), "estimated")
    assert sweep.run() == 0


def test_a_live_owner_keeps_its_tasks():
    task = running(factories.worker())
    sent(task)
    assert sweep.run() == 0
    assert after(task).status == "running"


@pytest.mark.parametrize("owner", [None, uuid7(), "00000000-0000-0000-0000-000000000000"])
def test_an_owner_that_nobody_knows_is_gone(owner):
    task = factories.task(status="running", owner_id=owner)
    assert sweep.run() == 1
    assert after(task).status == "waiting"


def test_inline_work_of_a_dead_process_fails_and_frees_its_key(dead):
    tenant = factories.tenant()
    task = running(dead, of=tenant, mode=Mode.INLINE)
    sent(task)
    key = Idempotency(endpoint="/v1/tasks", key="k", body_hash="h")
    submit.key_row(task, key).save(force_insert=True)
    with pytest.raises(submit.Conflict):
        submit.replay(tenant.id, key)
    sweep.run()
    row = after(task)
    assert (row.status, row.error_class) == ("failed", "Interrupted")
    assert row.finished_at is not None
    assert not IdempotencyKey.objects.exists()
    assert submit.replay(tenant.id, key) is None


def test_what_must_not_run_twice_fails_only_where_a_call_was_under_way(dead):
    called, uncalled = (running(dead, on_unknown=OnUnknown.FAIL) for _ in range(2))
    sent(called)
    sweep.run()
    assert (after(called).status, after(called).error_class) == ("failed", "Interrupted")
    assert after(called).finished_at is not None
    assert after(uncalled).status == "waiting"


def test_what_was_to_be_cancelled_is(dead):
    task = running(dead, cancel_requested_at=timezone.now())
    sent(task)
    sweep.run()
    row = after(task)
    assert (row.status, row.error_class) == ("cancelled", "Cancelled")
    assert row.finished_at is not None
    assert row.cost == Decimal(2)


def test_no_price_stays_unknown(dead):
    task = running(dead)
    sent(task, cost=None, cost_state="unpriced")
    sweep.run()
    assert Attempt.objects.get().cost_state == "unpriced"
    assert (after(task).cost, after(task).cost_state) == (None, "unpriced")


def test_settled_attempts_count_too(dead):
    task = running(dead, cost=Decimal(3), cost_state="final")
    sent(task, state="settled", cost=Decimal(3), cost_state="final", output_tokens=4)
    sent(task, 2)
    sweep.run()
    row = after(task)
    assert (row.cost, row.cost_state, row.output_tokens) == (Decimal(5), "estimated", 4)


def test_a_late_answer_of_the_dead_settles_its_attempt(dead):
    task = running(dead)
    attempt = sent(task)
    sweep.run()
    told = Outcome(usage=Usage(output_tokens=7), cost=Decimal("0.25"), cost_state="final")
    with pytest.raises(ledger.Lost):
        ledger.finish(task, attempt.id, told, ledger.End(status="succeeded"))
    row = after(task)
    assert (row.status, row.cost, row.cost_state) == ("waiting", Decimal("0.25"), "final")
    assert Attempt.objects.get().state == "settled"


# --- hints that were lost -------------------------------------------------------------------------


def released(age_s: float, **fields: Any) -> Task:
    at = timezone.now() - timedelta(seconds=age_s)
    return factories.task(status="queued", seq=1, queued_at=at, **fields)


def test_a_hint_is_lost_when_it_is_old_and_lies_in_no_queue():
    lost, young = released(40), released(5)
    waits, stale = released(4000, lane="bulk"), released(40, lane="bulk")
    queues.publish([(waits.id, 1, "sandbox", "bulk"), (stale.id, 0, "sandbox", "bulk")])
    assert sweep.run() == 2
    assert (after(lost).status, after(lost).queued_at) == ("waiting", None)
    assert (after(young).status, after(waits).status) == ("queued", "queued")
    # Of the other a hint lies there, but of an earlier release.
    assert after(stale).status == "waiting"


def test_a_new_leader_puts_back_what_the_one_before_marked_and_did_not_send():
    left, sent, now = released(3), released(3), released(0)
    queues.publish([(sent.id, 1, "sandbox", "default")])
    assert sweep.take_over() == 1
    assert [after(task).status for task in (left, sent, now)] == ["waiting", "queued", "queued"]


def test_a_hint_that_was_put_back_is_stale_when_it_comes():
    task = released(40)
    sweep.run()
    assert ledger.claim(task.id, 1, uuid7()) is None
    factories.worker("sandbox.default")
    assert dispatch.release(Turns())[0] == 1
    assert ledger.claim(task.id, 1, uuid7()) is None
    assert ledger.claim(task.id, 2, uuid7()) is not None


def test_nothing_is_put_back_while_redis_cannot_tell(monkeypatch):
    import redis

    task = released(700)

    def away(_names: set[str]) -> None:
        raise redis.ConnectionError

    monkeypatch.setattr(queues, "hints_in", away)
    assert sweep.run() == 0
    assert after(task).status == "queued"


# --- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["waiting", "queued", "blocked"])
def test_what_did_not_run_in_time_expires(status):
    past = timezone.now() - timedelta(seconds=1)
    task = factories.task(status=status, deadline=past, queued_at=timezone.now())
    other = factories.task(status=status, queued_at=timezone.now())
    assert sweep.run() == 1
    row = after(task)
    assert (row.status, row.error_class) == ("expired", "DeadlineExceeded")
    assert row.finished_at is not None
    assert after(other).status == status


def test_a_running_task_ends_by_its_own_deadline():
    past = timezone.now() - timedelta(seconds=1)
    task = running(factories.worker(), deadline=past)
    assert sweep.run() == 0
    assert after(task).status == "running"


def test_watchers_are_told(dead):
    from llmtasks import events

    task = running(dead)
    late = factories.task(deadline=timezone.now())
    sweep.run()

    def names() -> list[list[bytes]]:
        redis = stores.redis_client()
        streams = [redis.xrange(events.stream_of(t.id)) for t in (task, late)]
        return [[entry[b"n"] for _, entry in stream] for stream in streams]

    until(lambda: all(names()))
    assert names() == [[b"state"], [b"done"]]


def test_a_sweep_takes_a_bounded_batch(dead, monkeypatch):
    monkeypatch.setattr(sweep, "BATCH", 3)
    for _ in range(5):
        running(dead)
    assert [sweep.run(), sweep.run(), sweep.run()] == [3, 2, 0]
