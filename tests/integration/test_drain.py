"""A process that is told to end: what it has begun goes on for GRACE_S, then is given back."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.conf import settings
from django.db import connection

from llmtasks import dispatch, execute, pulse
from llmtasks.models import Attempt, IdempotencyKey, OnUnknown, Provider, Task
from tests import factories
from tests.callers import Caller, frames_of
from tests.corridor import queue, release, sent, until

pytestmark = pytest.mark.django_db(transaction=True)
GRACE_S = 1


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    monkeypatch.setitem(settings.LLMTASKS, "GRACE_S", GRACE_S)


@pytest.fixture
def caller(account: Provider) -> Caller:
    for name in ("echo", "slow-1000", "slow-20000"):
        factories.route(name, (account, name))
    return Caller(factories.tenant())


@contextlib.contextmanager
def beside(function: Callable[..., Any], *args: Any) -> Iterator[list[Any]]:
    """Run it in a thread beside the block; what it returned is in the list afterwards."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function(*args))
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join(20)
    assert not thread.is_alive()


def drain() -> None:
    threading.Thread(target=pulse.drain, daemon=True).start()
    until(pulse.is_draining)


def hint_of(task: Task) -> dispatch.Hint:
    [hint] = until(release)
    assert hint.task_id == task.id
    return hint


def test_a_call_that_ends_within_the_grace_time_is_left_alone(caller, monkeypatch):
    monkeypatch.setitem(settings.LLMTASKS, "GRACE_S", 10)
    task = queue(caller.tenant, "slow-1000")
    hint = hint_of(task)
    with beside(execute.run_queued, hint.task_id, hint.seq):
        until(sent)
        drain()
    task.refresh_from_db()
    assert (task.status, task.attempts) == ("succeeded", 1)


def test_queued_work_goes_back_to_waiting_and_has_used_up_no_try(caller):
    task = queue(caller.tenant, "slow-20000")
    for _ in range(6):
        hint = hint_of(task)
        with beside(execute.run_queued, hint.task_id, hint.seq):
            until(sent)
            drain()
        task.refresh_from_db()
        assert (task.status, task.owner_id, task.error_class) == ("waiting", None, "")
        pulse.stop()
    rows = Attempt.objects.order_by("number")
    assert {(row.state, row.error_class) for row in rows} == {("settled", "Interrupted")}
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
    assert task.cost == sum(row.cost for row in rows) > 0


def test_what_must_not_run_twice_fails(caller):
    task = queue(caller.tenant, "slow-20000", on_unknown=OnUnknown.FAIL)
    hint = hint_of(task)
    with beside(execute.run_queued, hint.task_id, hint.seq):
        until(sent)
        drain()
    task.refresh_from_db()
    assert (task.status, task.error_class) == ("failed", "Interrupted")


def test_a_hint_that_was_not_begun_is_handed_back(caller):
    task = queue(caller.tenant, "echo", on_unknown=OnUnknown.FAIL)
    hint = hint_of(task)
    drain()
    execute.run_queued(hint.task_id, hint.seq)
    task.refresh_from_db()
    assert (task.status, task.attempts, task.queued_at) == ("waiting", 0, None)
    # A copy of it that comes late takes nothing from whoever has it by then.
    again = hint_of(task)
    execute.run_queued(hint.task_id, hint.seq)
    task.refresh_from_db()
    assert (task.status, task.seq) == ("queued", again.seq)


@pytest.mark.parametrize("stream", [False, True])
def test_an_inline_caller_is_told_to_try_again(caller, stream):
    key = {"idempotency_key": "once"}
    with beside(lambda: caller.chat("slow-20000", headers=key, stream=stream)) as answers:
        until(sent)
        drain()
    [answer] = answers
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "interrupted")
    assert (answer["Retry-After"], answer["x-should-retry"]) == ("1", "true")
    task = Task.objects.get()
    assert (task.status, task.error_class, task.cost_state) == (
        "failed",
        "Interrupted",
        "estimated",
    )
    assert not IdempotencyKey.objects.exists()


def test_at_the_native_door_the_answer_is_the_interrupted_task(caller):
    with beside(lambda: caller.task("slow-20000", mode="queued")) as answers:
        until(lambda: Task.objects.exists())
        drain()
    [answer] = answers
    # Queued and watched: whoever waits is told at once where it is found.
    assert (answer.status_code, answer.json()["status"]) == (202, "waiting")
    pulse.stop()
    with beside(lambda: caller.task("slow-20000", mode="inline")) as answers:
        until(sent)
        drain()
    [answer] = answers
    body = answer.json()
    assert (answer.status_code, body["status"]) == (200, "failed")
    assert (body["error"]["class"], body["error"]["retry_after"]) == ("Interrupted", 1.0)


def test_an_event_stream_ends_so_that_the_browser_resumes_elsewhere(caller):
    task = queue(caller.tenant, "echo")
    with beside(lambda: frames_of(caller.get(f"/v1/tasks/{task.id}/events"))) as streams:
        time.sleep(0.2)
        drain()
    [frames] = streams
    assert [event for _, event, _ in frames] == ["snapshot"]
