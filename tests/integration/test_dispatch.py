"""Who is released, in what order, and how many at a time."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import redis as redis_py
from django.utils import timezone
from kombu.exceptions import OperationalError as BrokerError

from llmtasks import dispatch, pulse, queues, stores
from llmtasks.dispatch import Dispatcher
from llmtasks.models import Config, Provider, Status, Task
from llmtasks.turns import Turns
from tests import factories

pytestmark = pytest.mark.usefixtures("account")


@pytest.fixture
def second(account: Provider) -> Provider:
    return factories.provider(name="second")


def waiting(count: int, of: Any = None, **fields: Any) -> list[Task]:
    of = of or factories.tenant()
    return [factories.task(of, **fields) for _ in range(count)]


def serve(*names: str, slots: int = 8, **fields: Any) -> None:
    """A live worker that lists the queues of these providers."""
    lane = fields.get("lane", "default")
    factories.worker(*(f"{name}.{lane}" for name in names), slots=slots, **fields)


def messages(queue: str) -> int:
    return int(stores.redis_client().llen(queue))


def by_status() -> dict[str, int]:
    rows = list(Task.objects.values_list("status", flat=True))
    return {status: rows.count(status) for status in set(rows)}


# --- room -----------------------------------------------------------------------------------------


def test_as_many_are_released_as_a_provider_may_hold():
    serve("sandbox", slots=8)
    waiting(10)
    assert dispatch.release(Turns()) == (6, True)
    assert by_status() == {"queued": 6, "waiting": 4}
    assert messages("sandbox.default") == 6
    assert dispatch.release(Turns()) == (0, True)
    # One that ends makes room for one.
    Task.objects.filter(id=Task.objects.filter(status="queued").first().id).update(status="failed")
    assert dispatch.release(Turns()) == (1, True)


def test_running_inline_work_takes_no_room():
    serve("sandbox", slots=4)
    for _ in range(20):
        factories.task(status=Status.RUNNING, mode="inline")
    waiting(3)
    assert dispatch.release(Turns())[0] == 3


def test_a_flooded_provider_leaves_room_for_another(second):
    serve("sandbox", "second", slots=8)
    waiting(500)
    dispatch.release(Turns())
    late = waiting(3, provider="second")
    assert dispatch.release(Turns())[0] == 3
    assert Task.objects.filter(id__in=[t.id for t in late], status="queued").count() == 3


def test_slots_of_all_workers_of_a_lane_count_and_dead_ones_do_not():
    serve("sandbox", slots=4)
    serve("sandbox", slots=4)
    serve("sandbox", slots=400, alive=False)
    waiting(20)
    assert dispatch.release(Turns())[0] == 6


def test_one_slot_is_enough():
    serve("sandbox", slots=1)
    waiting(2)
    assert dispatch.release(Turns())[0] == 1


def test_a_queue_is_used_once_a_live_worker_lists_it(second):
    serve("sandbox")
    task = waiting(1, provider="second")[0]
    assert dispatch.release(Turns()) == (0, False)
    serve("second", alive=False)
    assert dispatch.release(Turns()) == (0, False)
    serve("second")
    assert dispatch.release(Turns())[0] == 1
    task.refresh_from_db()
    assert (task.status, task.seq) == ("queued", 1)
    assert task.queued_at is not None


def test_each_lane_has_its_own_room():
    serve("sandbox", slots=4)
    serve("sandbox", slots=4, lane="bulk")
    waiting(10)
    waiting(10, lane="bulk")
    waiting(10, lane="interactive")
    assert dispatch.release(Turns())[0] == 6
    assert set(Task.objects.filter(status="queued").values_list("lane", flat=True)) == {
        "default",
        "bulk",
    }


@pytest.mark.parametrize("flag", [{"is_paused": True}, {"refused_at": timezone.now()}])
def test_what_nobody_can_answer_waits(account, second, flag):
    factories.route("echo", (account, "echo"))
    factories.route("other", (second, "echo"))
    serve("sandbox", "second")
    waiting(1)
    waiting(1, provider="second", route="other")
    Provider.objects.filter(id=account.id).update(**flag)
    assert dispatch.release(Turns())[0] == 1
    assert Task.objects.get(status="queued").provider == "second"
    Provider.objects.filter(id=account.id).update(is_paused=False, refused_at=None)
    factories.in_force()
    assert dispatch.release(Turns())[0] == 1


@pytest.mark.parametrize("flag", [{"is_paused": True}, {"refused_at": timezone.now()}])
def test_another_candidate_takes_the_work_of_a_provider_that_is_out(account, second, flag):
    factories.route("echo", (account, "echo"), (second, "echo"))
    serve("sandbox", "second")
    waiting(1)
    Provider.objects.filter(id=account.id).update(**flag)
    assert dispatch.release(Turns())[0] == 1
    assert messages("sandbox.default") == 1


def test_a_task_without_a_route_is_released_to_be_told_so():
    serve("sandbox")
    waiting(1, route="gone")
    factories.route("empty")
    waiting(1, route="empty")
    assert dispatch.release(Turns())[0] == 2


# --- whose turn -----------------------------------------------------------------------------------


def end_one() -> None:
    task = Task.objects.filter(status="queued").order_by("queued_at").first()
    Task.objects.filter(id=task.id).update(status="succeeded")


def test_a_backlog_does_not_delay_a_tenant_with_one_task():
    """One slot: the worst case, where every round releases one task."""
    serve("sandbox", slots=1)
    busy = factories.tenant()
    old = timezone.now() - timedelta(hours=1)
    Task.objects.bulk_create(
        Task(
            tenant=busy, kind="chat", mode="queued", route="echo", provider="sandbox",
            not_before=old, deadline=old + timedelta(days=1),
        )
        for _ in range(5000)
    )  # fmt: skip
    turns = Turns()
    for _ in range(5):
        dispatch.release(turns)
        end_one()
    for _ in range(3):
        [single] = waiting(1)
        for _ in range(2):
            dispatch.release(turns)
            end_one()
        single.refresh_from_db()
        assert single.status == "succeeded"


def test_tenants_share_evenly_whatever_they_have_waiting():
    serve("sandbox", slots=4)
    tenants = [factories.tenant() for _ in range(3)]
    for tenant, count in zip(tenants, (60, 30, 30), strict=True):
        waiting(count, tenant)
    turns = Turns()
    for _ in range(10):
        dispatch.release(turns)
        Task.objects.filter(status="queued").update(status="succeeded")
    done = [Task.objects.filter(tenant=t, status="succeeded").count() for t in tenants]
    assert sum(done) == 30
    assert max(done) - min(done) <= 1


def test_more_tenants_than_room_have_their_turns_one_after_the_other():
    serve("sandbox", slots=4)
    tenants = [factories.tenant() for _ in range(7)]
    for tenant in tenants:
        waiting(5, tenant)
    turns = Turns()
    for _ in range(7):
        assert dispatch.release(turns)[0] == 3
        Task.objects.filter(status="queued").update(status="succeeded")
    done = [Task.objects.filter(tenant=t, status="succeeded").count() for t in tenants]
    assert done == [3] * 7


def test_a_tenants_oldest_task_goes_first():
    serve("sandbox", slots=1)
    tenant = factories.tenant()
    now = timezone.now()
    made = [factories.task(tenant, not_before=now - timedelta(seconds=age)) for age in (5, 50, 20)]
    order = []
    for _ in made:
        dispatch.release(Turns())
        order.append(Task.objects.get(status="queued").id)
        end_one()
    assert order == [made[1].id, made[2].id, made[0].id]


def test_what_is_not_due_waits_and_takes_nobodys_turn():
    serve("sandbox", slots=4)
    later = timezone.now() + timedelta(hours=1)
    for _ in range(10):
        waiting(3, not_before=later)
    waiting(3)
    assert dispatch.release(Turns())[0] == 3
    assert dispatch.release(Turns()) == (0, True)
    assert Task.objects.filter(not_before=later, status="waiting").count() == 30


def test_a_hint_is_released_once_by_two_dispatchers_at_once():
    serve("sandbox", slots=100)
    waiting(60)
    found: list[int] = []

    def run() -> None:
        found.append(dispatch.release(Turns())[0])
        stores.release()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == 60
    assert messages("sandbox.default") == 60
    assert set(Task.objects.values_list("seq", flat=True)) == {1}


# --- the broker away ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BrokerError, redis_py.ConnectionError, OSError])
def test_what_could_not_be_sent_waits_again(monkeypatch, error):
    serve("sandbox")
    waiting(3)

    def away(hints: Any) -> None:
        list(hints)
        raise error("away")

    with monkeypatch.context() as patch:
        patch.setattr(queues, "publish", away)
        with pytest.raises(error):
            dispatch.release(Turns())
    assert by_status() == {"waiting": 3}
    assert dispatch.release(Turns())[0] == 3
    assert set(Task.objects.values_list("seq", flat=True)) == {2}


# --- the loop -------------------------------------------------------------------------------------


def until(condition: Any, within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def run_loop(dispatcher: Dispatcher) -> threading.Thread:
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    return thread


def test_the_loop_releases_sweeps_and_hands_the_lead_on():
    serve("sandbox")
    swept = threading.Event()
    first = Dispatcher(swept.set, threading.Event())
    thread = run_loop(first)
    try:
        until(lambda: Config.objects.get().leader == pulse.owner_id())
        [task] = waiting(1)
        queues.wake()
        until(lambda: Task.objects.get(id=task.id).status == "queued")
        until(swept.is_set)
    finally:
        first.stopped.set()
        thread.join(10)
    config = Config.objects.get()
    assert config.leader_until <= timezone.now()
    assert config.epoch == 1


def test_one_leads_until_its_lease_runs_out(monkeypatch):
    me = Dispatcher(lambda: None, threading.Event())
    assert me.lead()
    Config.objects.update(leader="00000000-0000-0000-0000-000000000001")
    me.led_at = float("-inf")
    assert not me.lead()
    assert me.turn() == dispatch.POLL_S
    Config.objects.update(leader_until=timezone.now())
    assert me.lead()
    assert me.epoch == Config.objects.get().epoch == 2


def test_the_loop_survives_whatever_a_round_raises(monkeypatch):
    from django.db import OperationalError

    monkeypatch.setattr(dispatch, "AWAY_S", 0.01)
    faults = [OperationalError("x"), redis_py.ConnectionError("x"), BrokerError("x"), ValueError()]
    real, left = Dispatcher.turn, list(faults)

    def turn(self: Dispatcher) -> float:
        if left:
            raise left.pop(0)
        return real(self)

    monkeypatch.setattr(Dispatcher, "turn", turn)
    dispatcher = Dispatcher(lambda: None, threading.Event())
    thread = run_loop(dispatcher)
    try:
        until(lambda: Config.objects.get().leader == pulse.owner_id())
    finally:
        dispatcher.stopped.set()
        thread.join(10)
    # Postgres was away: nobody's tasks are taken before everybody could renew.
    assert dispatcher.patient_until > time.monotonic() + 20


def test_nothing_is_swept_while_it_is_patient():
    swept: list[int] = []
    dispatcher = Dispatcher(lambda: swept.append(1), threading.Event())
    dispatcher.patient_until = time.monotonic() + 60
    dispatcher.turn()
    assert swept == []
    dispatcher.patient_until = 0.0
    dispatcher.turn()
    dispatcher.turn()
    assert swept == [1]


def test_ears_sleep_while_redis_is_away(monkeypatch):
    monkeypatch.setattr(
        dispatch, "redis_client", lambda: redis_py.Redis(host="127.0.0.1", port=1, retry=None)
    )
    ears = dispatch.Ears()
    began = time.monotonic()
    ears.wait(0.2)
    assert time.monotonic() - began >= 0.2


def test_ears_wake_early():
    ears = dispatch.Ears()
    ears.wait(0.01)
    queues.wake()
    began = time.monotonic()
    ears.wait(30)
    assert time.monotonic() - began < 10
    ears.pubsub.close()
