"""The lease, and what the pulse learns."""

import socket
import ssl
import threading
import time
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.db import OperationalError
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import pulse, routing
from llmtasks.errors import Unavailable
from llmtasks.models import Config, Task, Worker
from tests import factories
from tests.corridor import until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def beating() -> pulse.Pulse:
    """This process's pulse, registered, whose thread only beats when it is told to."""
    made = pulse.Pulse(role=Worker.Role.WORKER, lane="default", slots=4)
    made.tick()
    pulse._pulse = made
    return made


class Call:
    """A call that remembers why it was dropped."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)


def age(by_s: float, of: pulse.Pulse) -> None:
    """As if the last renewal were that much longer ago, by its own clock."""
    of.renewed_at -= by_s


def test_a_process_is_registered_once_with_its_lane_and_slots(beating):
    row = Worker.objects.get()
    assert (row.id, row.role, row.lane, row.slots) == (beating.id, "worker", "default", 4)
    assert timedelta(seconds=25) < row.lease_until - timezone.now() <= timedelta(seconds=30)
    beating.tick()
    assert Worker.objects.count() == 1


def test_the_lease_is_renewed_when_it_is_due(beating):
    before = Worker.objects.get().lease_until
    beating.tick()
    assert Worker.objects.get().lease_until == before
    age(6, beating)
    beating.tick()
    assert Worker.objects.get().lease_until > before


def test_queues_are_listed_at_once(beating):
    beating.queues, beating.must_renew = ["a.default"], True
    beating.tick()
    assert Worker.objects.get().queues == ["a.default"]


def test_a_lease_that_lapsed_drops_all_calls_and_takes_a_new_id(beating):
    before, call = beating.id, Call()
    with pulse.watch(uuid7(), call):
        Worker.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
        age(6, beating)
        beating.tick()
        assert call.reasons == ["lease"]
    assert beating.id != before
    beating.tick()
    assert set(Worker.objects.values_list("id", flat=True)) == {before, beating.id}


def test_a_process_that_cannot_renew_drops_its_calls_before_anybody_may_take_them(
    beating, monkeypatch
):
    def away(*_args: Any, **_more: Any) -> None:
        raise psycopg.OperationalError("away")

    call = Call()
    with pulse.watch(uuid7(), call), monkeypatch.context() as patch:
        patch.setattr(beating, "execute", away)
        beating.tick()
        assert (beating.is_away, call.reasons) == (True, [])
        age(24, beating)
        beating.tick()
        assert call.reasons == []
        age(1.1, beating)
        beating.tick()
        assert call.reasons == ["lease"]
        with pytest.raises(OperationalError):
            pulse.owner_id()
        with pytest.raises(Unavailable):
            pulse.require_postgres()
    beating.tick()
    assert pulse.owner_id() == beating.id
    pulse.require_postgres()


def test_who_took_a_task_under_an_id_that_lapsed_is_told_at_once(beating):
    call = Call()
    with pulse.watch(uuid7(), call, owner=uuid7()):
        assert call.reasons == ["lease"]


def test_a_cancel_reaches_its_call_and_no_other(beating):
    task = factories.task(status="running", owner_id=beating.id)
    other = factories.task(status="running", owner_id=beating.id)
    call, other_call = Call(), Call()
    with pulse.watch(task.id, call), pulse.watch(other.id, other_call):
        beating.tick()
        assert call.reasons == []
        Task.objects.filter(id=task.id).update(cancel_requested_at=timezone.now())
        beating.tick()
        assert call.reasons == ["cancel"]
        assert other_call.reasons == []


def test_a_task_without_a_call_is_given_back_after_two_renewals(beating):
    idle = factories.task(status="running", owner_id=beating.id)
    busy = factories.task(status="running", owner_id=beating.id)
    with pulse.watch(busy.id, Call()):
        for _ in range(2):
            age(6, beating)
            beating.looked_for_orphans_at -= 6
            beating.tick()
    assert Task.objects.get(id=idle.id).owner_id != beating.id
    assert Task.objects.get(id=busy.id).owner_id == beating.id


def test_renewals_in_quick_succession_disown_nobody(beating):
    """A provider that is added renews at once; a task may be between its claim and its call."""
    task = factories.task(status="running", owner_id=beating.id)
    for _ in range(5):
        beating.must_renew = True
        beating.tick()
    assert Task.objects.get(id=task.id).owner_id == beating.id


def test_a_settlement_in_another_thread_stays_watched(beating):
    task_id, first, second = uuid7(), Call(), Call()
    with pulse.watch(task_id, first):
        after = pulse.watch(task_id, second)
        after.__enter__()
    assert task_id in beating.calls
    after.__exit__(None, None, None)
    assert task_id not in beating.calls


# --- configuration --------------------------------------------------------------------------------


def test_every_change_of_configuration_is_seen_within_a_second(redis):
    before = pulse.config_version()
    factories.route("new", (factories.provider(), "echo"))
    wanted = Config.objects.get().version
    assert wanted != before
    until(lambda: pulse.config_version() == wanted, 5)
    assert routing.find("new", "chat").name == "new"


def test_the_last_configuration_holds_while_postgres_is_away(beating, monkeypatch):
    factories.route("echo", (factories.provider(), "echo"))
    beating.tick()
    assert routing.find("echo", "chat")
    beating.is_away = True
    beating.read_at -= pulse.CONFIG_VALID_S - 1
    assert routing.find("echo", "chat")
    beating.read_at -= 2
    with pytest.raises(OperationalError):
        routing.find("echo", "chat")


# --- callers that left ----------------------------------------------------------------------------


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def test_a_caller_that_hung_up_is_noticed(beating):
    server, client = pair()
    call = Call()
    with server, client, pulse.watch(uuid7(), call, server):
        beating.tick()
        # The next request of a client that pipelines is no end.
        client.send(b"GET / HTTP/1.1")
        beating.tick()
        assert call.reasons == []
        server.recv(100)
        client.close()
        beating.tick()
        assert call.reasons == ["client"]


def test_peeking_never_waits_and_never_raises():
    server, client = pair()
    with server, client:
        server.settimeout(30)
        began = time.monotonic()
        assert not pulse.has_left(server)
        assert time.monotonic() - began < 5
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        wrapped = context.wrap_socket(server, server_side=True, do_handshake_on_connect=False)
        assert not pulse.has_left(wrapped)
        client.close()
        assert pulse.has_left(wrapped)
        wrapped.close()
        assert pulse.has_left(wrapped)


# --- start and end --------------------------------------------------------------------------------


def test_stopping_ends_the_lease_at_once():
    pulse.start()
    pulse.stop()
    assert Worker.objects.get().lease_until <= timezone.now()


def test_many_threads_that_start_at_once_share_one_pulse():
    ids = []
    threads = [threading.Thread(target=lambda: ids.append(pulse.owner_id())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 1
    assert Worker.objects.count() == 1


def test_a_beat_survives_a_broken_connection(beating):
    beating.db.close()
    beating.tick()
    assert beating.is_away
    beating.tick()
    assert not beating.is_away


def test_a_fault_of_ours_does_not_end_the_pulse(beating, monkeypatch):
    def broken(_now: float) -> None:
        raise RuntimeError

    age(6, beating)
    with monkeypatch.context() as patch:
        patch.setattr(beating, "disown_orphans", broken)
        beating.tick()
    beating.tick()
    assert not beating.is_away


def test_a_forked_child_has_a_pulse_of_its_own(beating, monkeypatch):
    monkeypatch.setattr(beating, "pid", -1)
    child = pulse.start()
    beating.disconnect()
    assert child is not beating
    assert Worker.objects.count() == 2


def test_time_is_that_of_postgres(beating):
    beating.clock_offset = timedelta(hours=1)
    assert pulse.now() - timezone.now() > timedelta(minutes=59)
