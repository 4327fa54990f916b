"""Who is released, in what order, and how many at a time."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import redis as redis_py
from django.utils import timezone
from kombu.exceptions import OperationalError as BrokerError

from llmtasks import dispatch, pulse, queues, stores, turns
from llmtasks.dispatch import Dispatcher
from llmtasks.guards import rate_limit
from llmtasks.guards.meters import Away
from llmtasks.models import Limit, Provider, Status, Task, Worker
from llmtasks.room import HORIZON_S
from llmtasks.turns import Turns
from tests import factories
from tests.backlogs import end_one, serve, waiting

pytestmark = pytest.mark.usefixtures("account")


@pytest.fixture
def second(account: Provider) -> Provider:
    return factories.provider(name="second")


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


def test_a_tenant_of_weight_two_has_twice_the_turns():
    serve("sandbox", slots=4)
    light, heavy = factories.tenant(), factories.tenant(weight=2)
    waiting(40, light)
    waiting(40, heavy)
    turns = Turns()
    for _ in range(10):
        dispatch.release(turns)
        Task.objects.filter(status="queued").update(status="succeeded")
    done = [Task.objects.filter(tenant=t, status="succeeded").count() for t in (light, heavy)]
    assert done == [10, 20]


def test_a_newcomer_among_many_tenants_waits_for_two_rounds_at_the_most():
    """One slot, and more tenants than a round searches for."""
    serve("sandbox", slots=1)
    tenants = [factories.tenant() for _ in range(30)]
    for tenant in tenants:
        waiting(6, tenant)
    turns = Turns()
    for _ in range(40):
        dispatch.release(turns)
        end_one()
    [single] = waiting(1)
    for _ in range(2 * len(tenants)):
        dispatch.release(turns)
        end_one()
    single.refresh_from_db()
    assert single.status == "succeeded"


@pytest.fixture
def many_with_nothing_due(monkeypatch) -> Turns:
    """Turns of a dispatcher that looked at some of them."""
    monkeypatch.setattr(turns, "SEARCHED_AGAIN", 1)
    serve("sandbox", slots=4)
    for _ in range(30):
        waiting(1, not_before=timezone.now() + timedelta(hours=1))
    known = Turns()
    assert dispatch.release(known) == (0, False)
    return known


def test_a_newcomer_among_many_of_whom_nothing_is_due_is_released_at_once(many_with_nothing_due):
    waiting(2, not_before=timezone.now())
    assert dispatch.release(many_with_nothing_due)[0] == 2


def test_a_task_is_released_as_soon_as_it_is_due(many_with_nothing_due):
    due = timezone.now() + timedelta(seconds=2)
    waiting(1, not_before=due)
    assert dispatch.release(many_with_nothing_due) == (0, False)
    time.sleep(max(0.0, (due - timezone.now()).total_seconds()))
    assert dispatch.release(many_with_nothing_due)[0] == 1


def test_what_was_committed_late_is_found_by_the_search(many_with_nothing_due):
    [late] = waiting(1, not_before=timezone.now() - timedelta(minutes=1))
    for _ in range(31):
        dispatch.release(many_with_nothing_due)
    late.refresh_from_db()
    assert late.status == "queued"


def test_what_was_put_back_is_searched_for_at_once(many_with_nothing_due):
    [task] = waiting(1, not_before=timezone.now() - timedelta(minutes=1))
    dispatcher = Dispatcher(lambda: 1, threading.Event(), turns=many_with_nothing_due)
    dispatcher.turn()
    task.refresh_from_db()
    assert task.status == "queued"


def test_a_burst_of_one_tenant_hides_no_other(many_with_nothing_due, monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_DUE", 4)
    waiting(20, not_before=timezone.now())
    waiting(1, not_before=timezone.now())
    known, tenants = many_with_nothing_due, set()
    # A beat would set the clock anew.
    with pulse.start().lock:
        for _ in range(7):
            before = pulse.now()
            dispatch.release(known)
            queued = Task.objects.filter(status="queued")
            tenants |= set(queued.values_list("tenant_id", flat=True))
            queued.update(status="succeeded")
        # All of it was read, and is not read again.
        assert known.looked is not None
        assert before <= known.looked + dispatch.LATE <= pulse.now()
    assert len(tenants) == 2


def test_a_tenants_turns_count_over_all_its_routes():
    serve("sandbox", slots=1)
    one, other = factories.tenant(), factories.tenant()
    for route in ("a", "b", "c"):
        waiting(10, one, route=route)
    waiting(10, other, route="b")
    turns = Turns()
    for _ in range(16):
        dispatch.release(turns)
        end_one()
    assert Task.objects.filter(tenant=other, status="succeeded").count() == 8


# --- what the limits leave ------------------------------------------------------------------------


def limits(models: dict[Any, float] | None = None, tenants: dict[Any, float] | None = None) -> Any:
    """Limits that always say the same."""
    return lambda asked_models, asked_tenants, horizon_s, is_urgent: (
        {m: n for m, n in (models or {}).items() if m in asked_models},
        {t: n for t, n in (tenants or {}).items() if t in asked_tenants},
    )


ECHO = ("sandbox", "echo")


def test_no_more_is_released_than_a_limit_has_room_for(account):
    factories.route("echo", (account, "echo"))
    Limit.objects.create(provider=account, unit="requests", window="day", amount=6)
    serve("sandbox", slots=40)
    waiting(10)
    turns = Turns()
    # Some of it is kept for whoever waits.
    most = int(rate_limit.rooms([ECHO], [], HORIZON_S)[0][ECHO])
    assert 0 < most < 6
    assert dispatch.release(turns)[0] == most
    worker = Worker.objects.get(role="worker")
    # They have not begun: the room is theirs.
    assert dispatch.release(turns) == (0, False)
    Task.objects.filter(status="queued").update(status="running", owner_id=worker.id)
    assert dispatch.release(turns) == (0, False)
    # They began, and the limiter knows of them.
    Task.objects.filter(status="running").update(attempts=1)
    assert dispatch.release(turns, limits({ECHO: 2.0}))[0] == 2


def test_the_room_of_all_candidates_counts(account, second):
    factories.route("echo", (account, "echo"), (second, "echo"))
    serve("sandbox", "second", slots=40)
    waiting(10)
    assert dispatch.release(Turns(), limits({ECHO: 1.0, ("second", "echo"): 2.0}))[0] == 3


def test_urgent_lanes_have_the_room_first(account):
    factories.route("echo", (account, "echo"))
    for lane in ("bulk", "interactive", "default"):
        serve("sandbox", slots=40, lane=lane)
        waiting(2, lane=lane)
    dispatch.release(Turns(), limits({ECHO: 3.0}))
    lanes = sorted(Task.objects.filter(status="queued").values_list("lane", flat=True))
    assert lanes == ["default", "interactive", "interactive"]


def test_who_waits_is_released_beside_a_backlog_that_fills_the_limits(account):
    factories.route("echo", (account, "echo"))
    tenant = factories.tenant()
    for holder in ({"provider": account}, {"tenant": tenant}):
        Limit.objects.create(unit="requests", window="day", amount=30, **holder)
    for lane in ("interactive", "default"):
        serve("sandbox", slots=80, lane=lane)
    waiting(40, tenant)
    turns = Turns()
    assert 20 < dispatch.release(turns)[0] < 30
    assert dispatch.release(turns)[0] == 0
    waiting(40, tenant, lane="interactive")
    # As many as the limits have room for, what is kept back among them, and no more.
    assert dispatch.release(turns)[0] == 30
    assert dispatch.release(turns)[0] == 0
    # What was released for people is not left for background work.
    Task.objects.filter(lane="default", status="queued").update(status="waiting")
    assert dispatch.release(turns)[0] == 0


def test_a_route_without_room_holds_up_no_other(account):
    factories.route("echo", (account, "echo"))
    factories.route("free", (account, "other"))
    serve("sandbox", slots=1)
    waiting(20)
    waiting(5, route="free")
    turns = Turns()
    for _ in range(3):
        assert dispatch.release(turns, limits({ECHO: 0.0}))[0] == 1
        end_one()
    assert Task.objects.filter(route="free", status="succeeded").count() == 3
    # As soon as there is room again it has its turns.
    for _ in range(3):
        assert dispatch.release(turns, limits({ECHO: 9.0}))[0] == 1
        end_one()
    assert Task.objects.filter(route="echo", status="succeeded").exists()


def test_tenants_at_their_own_limits_hold_up_no_other():
    """One slot, and more of them than a round looks at."""
    serve("sandbox", slots=1)
    stuck = {factories.tenant().id: 0.0 for _ in range(40)}
    for tenant in stuck:
        waiting(1, tenant)
    [free] = waiting(1)
    turns = Turns()
    rounds = 0
    while not dispatch.release(turns, limits(tenants=stuck))[0]:
        rounds += 1
        assert rounds < 4
    free.refresh_from_db()
    assert free.status == "queued"


def test_a_tenant_has_no_more_released_than_its_limit_leaves():
    serve("sandbox", slots=40)
    one, other = factories.tenant(), factories.tenant()
    waiting(10, one)
    waiting(10, other)
    turns = Turns()
    assert dispatch.release(turns, limits(tenants={one.id: 4.0}))[0] == 14
    assert dispatch.release(turns, limits(tenants={one.id: 4.0}))[0] == 0


def test_without_redis_nothing_is_released(account):
    def away(*_: Any) -> Any:
        raise Away

    serve("sandbox")
    waiting(3)
    with pytest.raises(Away):
        dispatch.release(Turns(), away)
    assert by_status() == {"waiting": 3}


def test_what_a_dead_worker_ran_holds_no_slot():
    serve("sandbox", slots=4)
    dead = factories.worker("sandbox.default", alive=False)
    for _ in range(3):
        factories.task(status="running", owner_id=dead.id)
    waiting(5)
    assert dispatch.release(Turns())[0] == 3


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
        known = Turns()
        with pytest.raises(error):
            dispatch.release(known)
    assert by_status() == {"waiting": 3}
    assert dispatch.release(known)[0] == 3
    assert set(Task.objects.values_list("seq", flat=True)) == {2}
