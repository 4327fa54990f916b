"""The dispatcher's loop: who leads, when it looks, what it survives."""

import threading
import time

import psycopg
import pytest
import redis as redis_py
from django.db import OperationalError
from django.utils import timezone
from kombu.exceptions import OperationalError as BrokerError
from uuid_utils.compat import uuid7

from llmtasks import dispatch, pulse, queues, stores
from llmtasks.dispatch import Dispatcher
from llmtasks.models import Config, Task
from tests.backlogs import end_one, serve, waiting
from tests.corridor import until

pytestmark = pytest.mark.usefixtures("account")


def run_loop(dispatcher: Dispatcher) -> threading.Thread:
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    return thread


def test_the_loop_releases_sweeps_and_hands_the_lead_on():
    serve("sandbox")
    swept = threading.Event()
    taken = threading.Event()
    first = Dispatcher(lambda: swept.set() or 0, threading.Event(), taken.set)
    thread = run_loop(first)
    try:
        until(lambda: Config.objects.get().leader == pulse.owner_id())
        assert taken.wait(10)
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
    me = Dispatcher(lambda: 0, threading.Event())
    assert me.lead()
    Config.objects.update(leader="00000000-0000-0000-0000-000000000001")
    me.led_at = float("-inf")
    assert not me.lead()
    assert me.turn() == dispatch.POLL_S
    Config.objects.update(leader_until=timezone.now())
    assert me.lead()
    assert me.epoch == Config.objects.get().epoch == 2


def test_the_loop_survives_whatever_a_round_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "AWAY_S", 0.01)
    faults = [OperationalError("x"), redis_py.ConnectionError("x"), BrokerError("x"), ValueError()]
    real, left = Dispatcher.turn, list(faults)

    def turn(self: Dispatcher) -> float:
        if left:
            raise left.pop(0)
        return real(self)

    monkeypatch.setattr(Dispatcher, "turn", turn)
    dispatcher = Dispatcher(lambda: 0, threading.Event())
    thread = run_loop(dispatcher)
    try:
        until(lambda: Config.objects.get().leader == pulse.owner_id())
    finally:
        dispatcher.stopped.set()
        thread.join(10)
    # Postgres was away: nobody's tasks are taken before everybody could renew.
    assert dispatcher.patient_until > time.monotonic() + 20


def test_a_lock_that_took_too_long_is_no_outage(monkeypatch):
    error = OperationalError("x")
    error.__cause__ = psycopg.errors.LockNotAvailable()
    monkeypatch.setattr(dispatch, "AWAY_S", 0.01)
    dispatcher = Dispatcher(lambda: 0, threading.Event())

    def turn(self: Dispatcher) -> float:
        self.stopped.set()
        raise error

    monkeypatch.setattr(Dispatcher, "turn", turn)
    dispatcher.run()
    assert dispatcher.patient_until == float("-inf")


def test_a_full_lane_is_looked_at_less_and_less_often():
    serve("sandbox", slots=1)
    waiting(3)
    dispatcher = Dispatcher(lambda: 0, threading.Event())
    assert dispatcher.turn() == dispatch.BUSY_POLL_S
    waits = [dispatcher.turn() for _ in range(40)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (dispatch.BUSY_POLL_S, dispatch.FULL_POLL_S)
    end_one()
    assert dispatcher.turn() == dispatch.BUSY_POLL_S


def test_nothing_is_swept_while_it_is_patient(monkeypatch):
    monkeypatch.setattr(dispatch, "SWEEP_S", 60.0)
    swept: list[int] = []
    dispatcher = Dispatcher(lambda: swept.append(1) or 0, threading.Event())
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


def test_ears_wake_early(monkeypatch):
    monkeypatch.setattr(queues, "WAKE_S", 5.0)
    # Channels are shared by all databases of a server, and so by all test processes.
    monkeypatch.setattr(queues, "WAKE_CHANNEL", f"wake-{uuid7()}")
    ears = dispatch.Ears()
    ears.wait(0.01)
    until(lambda: stores.redis_client().pubsub_numsub(queues.WAKE_CHANNEL)[0][1])
    queues.wake()
    began = time.monotonic()
    ears.wait(30)
    assert time.monotonic() - began < 10
    ears.pubsub.close()
