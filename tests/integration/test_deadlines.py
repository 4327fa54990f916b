"""One deadline from the client to the vendor, and a cancel in every state."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from django.db import connection

from llmtasks import execute, pulse, sweep
from llmtasks.models import Attempt, Provider, Status, Task
from tests import factories
from tests.callers import Caller

MODELS = ("echo", "slow-20000", "error-503", "rate-limit-60", "long-2000-50")


@pytest.fixture
def caller(account: Provider) -> Caller:
    for name in MODELS:
        factories.route(name, (account, name))
    return Caller(factories.tenant())


def span_s(task: Task) -> float:
    return (task.deadline - task.created_at).total_seconds()


# --- where it is given ----------------------------------------------------------------------------


@pytest.mark.parametrize("deadline_s", [0, -5, -0.001, 1e12, "soon"])
def test_a_deadline_that_is_none_is_refused_by_its_name(caller: Caller, deadline_s: Any):
    native = caller.task(mode="inline", deadline_s=deadline_s)
    assert (native.status_code, native.json()["param"]) == (400, "deadline_s")
    openai = caller.chat(deadline_s=deadline_s)
    assert (openai.status_code, openai.json()["error"]["param"]) == (400, "deadline_s")
    [item] = caller.post(
        "/v1/tasks/bulk",
        {"tasks": [{"kind": "chat", "input": {}, "deadline_s": deadline_s}]},
    ).json()["data"]
    assert "tasks[0].deadline_s" in {wrong["param"] for wrong in item["error"]["errors"]}
    assert not Task.objects.exists()


@pytest.mark.parametrize("model", ["slow-20000", "long-2000-50", "error-503", "rate-limit-60"])
def test_no_call_retry_or_wait_goes_on_after_it(caller: Caller, model: str):
    began = time.monotonic()
    openai = caller.chat(model, deadline_s=0.6)
    native = caller.task(model, mode="inline", deadline_s=0.6).json()
    assert time.monotonic() - began < 15
    assert openai.status_code in (504, 503, 429)
    assert native["status"] == "failed"
    if model in ("slow-20000", "long-2000-50"):
        assert openai.json()["error"]["code"] == "deadline_exceeded"
        assert native["error"]["class"] == "DeadlineExceeded"
    assert not Attempt.objects.exclude(state="settled").exists()


def test_a_stream_ends_at_its_deadline(caller: Caller):
    began = time.monotonic()
    text = b"".join(caller.chat("long-2000-50", deadline_s=0.6, stream=True)).decode()
    assert time.monotonic() - began < 15
    assert "deadline_exceeded" in text
    assert Task.objects.get().error_class == "DeadlineExceeded"


def test_queued_work_that_waits_past_it_expires(caller: Caller):
    task_id = caller.task(mode="queued", deadline_s=0.1).json()["id"]
    time.sleep(0.2)
    sweep.run()
    task = caller.get(f"/v1/tasks/{task_id}").json()
    assert (task["status"], task["error"]["class"]) == ("expired", "DeadlineExceeded")


# --- what the official clients announce -----------------------------------------------------------


def announced(seconds: str) -> dict[str, str]:
    return {"x_stainless_read_timeout": seconds}


def test_an_inline_call_ends_before_its_caller_hangs_up(caller: Caller):
    began = time.monotonic()
    answer = caller.chat("slow-20000", headers=announced("1"))
    assert time.monotonic() - began < 15
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert answer["x-should-retry"] == "false"
    native = caller.task("slow-20000", mode="inline", headers=announced("1")).json()
    assert native["error"]["class"] == "DeadlineExceeded"
    assert [round(span_s(task), 1) for task in Task.objects.all()] == [0.9, 0.9]


def test_the_earlier_of_two_holds(caller: Caller):
    for wanted, seconds, span in ((5, "600", 5), (600, "5", 4.5), (None, "3600", 3599)):
        caller.chat(
            headers=announced(seconds), **({} if wanted is None else {"deadline_s": wanted})
        )
        task = Task.objects.latest("id")
        assert span_s(task) == pytest.approx(span)


def test_it_does_not_count_for_a_stream_or_for_queued_work(caller: Caller):
    answer = caller.chat("long-2000-50", stream=True, headers=announced("1"))
    time.sleep(1.2)
    assert next(iter(answer))
    answer.close()
    caller.task(mode="queued", headers=announced("1"))
    assert [span_s(task) for task in Task.objects.order_by("id")] == [600, 86400]


@pytest.mark.parametrize("seconds", ["", "soon", "0", "-1", "nan", "inf", "None"])
def test_what_can_not_be_read_is_passed_over(caller: Caller, seconds: str):
    assert caller.chat(headers=announced(seconds)).status_code == 200
    assert span_s(Task.objects.get()) == 600


@pytest.mark.parametrize("headers", [{}, {"prefer": "wait=30"}])
def test_who_watches_is_told_in_time(caller: Caller, headers: dict[str, str]):
    began = time.monotonic()
    answer = caller.task(lane="bulk", headers=announced("1") | headers)
    assert time.monotonic() - began < 8
    assert (answer.status_code, answer.json()["status"]) == (202, "waiting")


# --- cancel in every state ------------------------------------------------------------------------


def cancel(caller: Caller, task_id: str) -> tuple[int, str]:
    answer = caller.post(f"/v1/tasks/{task_id}/cancel")
    return answer.status_code, answer.json()["status"]


@contextmanager
def running(task_id: str) -> Iterator[None]:
    """A worker has it beside the block, and its end is waited for."""
    Task.objects.filter(id=task_id).update(status=Status.QUEUED, seq=1)

    def run() -> None:
        try:
            execute.run_queued(UUID(task_id), 1)
        finally:
            connection.close()

    pulse.start()
    thread = threading.Thread(target=run)
    thread.start()
    until = time.monotonic() + 10
    while not Attempt.objects.filter(state="sent").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    yield
    thread.join(10)
    assert not thread.is_alive()


def state(task_id: str) -> tuple[str, str]:
    task = Task.objects.get(id=task_id)
    return task.status, task.error_class


def test_waiting_and_queued_work_ends_at_once(caller: Caller):
    for status in (Status.WAITING, Status.QUEUED):
        task_id = caller.task(mode="queued").json()["id"]
        Task.objects.filter(id=task_id).update(status=status)
        assert cancel(caller, task_id) == (200, "cancelled")
        assert cancel(caller, task_id) == (200, "cancelled")
        # Its hint, if one is on the way, does nothing.
        execute.run_queued(UUID(task_id), 0)
        assert state(task_id) == ("cancelled", "Cancelled")
    assert not Attempt.objects.exists()


def test_running_work_ends_within_a_second(caller: Caller):
    task_id = caller.task("slow-20000", mode="queued").json()["id"]
    with running(task_id):
        # A beat drops the call.
        with pulse.start().lock:
            assert cancel(caller, task_id) == (202, "running")
        began = time.monotonic()
    assert time.monotonic() - began < 15
    assert state(task_id) == ("cancelled", "Cancelled")


def test_work_that_waits_for_its_next_try_ends_at_once(caller: Caller):
    task_id = caller.task("error-503", mode="queued").json()["id"]
    Task.objects.filter(id=task_id).update(status=Status.QUEUED, seq=1)
    execute.run_queued(UUID(task_id), 1)
    assert state(task_id) == ("waiting", "Overloaded")
    assert cancel(caller, task_id) == (200, "cancelled")
    assert state(task_id) == ("cancelled", "Cancelled")
    assert Attempt.objects.count() == 1


@pytest.mark.parametrize("status", ["succeeded", "failed", "expired"])
def test_finished_work_is_a_conflict_that_says_so(caller: Caller, status: str):
    task_id = caller.task(mode="inline").json()["id"]
    Task.objects.filter(id=task_id).update(status=status)
    answer = caller.post(f"/v1/tasks/{task_id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert status in answer.json()["detail"]
    assert state(task_id)[0] == status
