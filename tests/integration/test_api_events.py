"""Live events: published, followed, resumed, and done without where Redis is away."""

import threading
import time
from typing import Any

import pytest
from redis import ConnectionError as RedisAway
from uuid_utils.compat import uuid7

from llmtasks import events, watchers
from llmtasks.api import streaming, waiting
from llmtasks.errors import TooManyWatchers
from llmtasks.models import Provider, Status, Task
from providers.types import TextDelta
from tests import factories
from tests.callers import Caller, body_of, frames_of, work_off


@pytest.fixture
def caller(account: Provider) -> Caller:
    for name in ("echo", "long-50"):
        factories.route(name, (account, name))
    return Caller(factories.tenant())


@pytest.fixture
def task_id(caller: Caller) -> str:
    return str(caller.task("long-50", mode="queued").json()["id"])


def watch(caller: Caller, task_id: str, **headers: str) -> Any:
    return caller.get(f"/v1/tasks/{task_id}/events", **headers)


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row, which may be done before all events came, is not looked at."""
    monkeypatch.setattr(waiting, "LOOK_S", 60.0)


@pytest.mark.usefixtures("no_looks")
def test_a_watcher_sees_everything_from_the_first_event_to_the_answer(caller: Caller, task_id: str):
    answer = watch(caller, task_id)
    worker = threading.Timer(0.2, work_off, [task_id])
    worker.start()
    found = frames_of(answer)
    worker.join()
    names = [name for _, name, _ in found]
    assert names[0] == "snapshot" and names[-1] == "done"
    assert {"state", "delta"} <= set(names)
    text = "".join(data["text"] for _, name, data in found if name == "delta")
    done = found[-1][2]
    assert text == done["output"]["choices"][0]["message"]["content"]
    assert (done["status"], found[-1][0]) == ("succeeded", "done")


@pytest.mark.usefixtures("no_looks")
def test_a_watcher_goes_on_after_the_last_event_that_it_saw(caller: Caller, task_id: str):
    first = watch(caller, task_id)
    work_off(task_id)
    seen = frames_of(first)
    middle = len(seen) // 2
    rest = frames_of(watch(caller, task_id, **{"Last-Event-ID": seen[middle][0]}))
    assert rest == seen[middle + 1 :]
    path = f"/v1/tasks/{task_id}/events?last_event_id={seen[middle][0]}"
    assert frames_of(caller.get(path)) == rest


@pytest.mark.parametrize("unknown", ["5-5", "nonsense", "99999999999999-0", "1-1\u00e9"])
def test_an_id_that_is_gone_gets_a_snapshot(caller: Caller, task_id: str, unknown: str):
    events.publish(Task.objects.get().id, "state", {"status": "queued"})
    events.outbox().flush()
    answer = watch(caller, task_id, **{"Last-Event-ID": unknown})
    blocks = iter(answer)
    next(blocks)
    assert b"event: snapshot" in next(blocks)
    answer.close()


def test_after_the_end_nobody_comes_back(caller: Caller, task_id: str):
    work_off(task_id)
    assert [name for _, name, _ in frames_of(watch(caller, task_id))] == ["done"]
    assert watch(caller, task_id, **{"Last-Event-ID": "done"}).status_code == 204


def test_an_event_that_was_lost_is_found_in_the_row(
    caller: Caller, task_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(waiting, "LOOK_S", 0.2)
    answer = watch(caller, task_id)
    Task.objects.filter(id=task_id).update(status=Status.FAILED, error_class="Timeout")
    found = frames_of(answer)
    assert (found[-1][1], found[-1][2]["status"]) == ("done", "failed")


def test_a_stream_ends_after_a_while_and_says_when_to_come_back(
    caller: Caller, task_id: str, settings: Any
):
    settings.LLMTASKS = {**settings.LLMTASKS, "STREAM_S": 0.3}
    began = time.monotonic()
    body = body_of(watch(caller, task_id))
    assert 0.2 < time.monotonic() - began < 2
    assert body.startswith(b"retry: 1000\n\n")


def test_a_quiet_stream_has_a_heartbeat(
    caller: Caller, task_id: str, settings: Any, monkeypatch: pytest.MonkeyPatch
):
    settings.LLMTASKS = {**settings.LLMTASKS, "STREAM_S": 0.4}
    monkeypatch.setattr(streaming, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(waiting, "LOOK_S", 0.1)
    assert b": here\n\n" in body_of(watch(caller, task_id))


def test_watchers_have_a_cap_of_their_own(
    caller: Caller, task_id: str, settings: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watchers, "places", lambda: threading_semaphore)
    threading_semaphore = threading.BoundedSemaphore(1)
    first = watch(caller, task_id)
    second = watch(caller, task_id)
    assert (second.status_code, second.json()["code"]) == (503, "too_many_watchers")
    assert second["Retry-After"] == "2"
    assert caller.chat().status_code == 200
    # Who waits for an answer gets 202 at once.
    assert caller.task(mode="queued", headers={"Prefer": "wait=5"}).status_code == 202
    first.close()
    third = watch(caller, task_id)
    assert third.status_code == 200
    third.close()


def test_a_stream_that_was_never_read_gives_its_place_back(caller: Caller, task_id: str):
    before = watchers.places()._value
    for _ in range(3):
        watch(caller, task_id).close()
    assert watchers.places()._value == before


def test_without_redis_the_row_is_enough(
    caller: Caller, task_id: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events, "client", lambda: Away())
    monkeypatch.setattr(watchers, "client", lambda: Away())
    answer = watch(caller, task_id)
    worker = threading.Timer(0.2, work_off, [task_id])
    worker.start()
    began = time.monotonic()
    found = frames_of(answer)
    worker.join()
    assert [name for _, name, _ in found] == ["snapshot", "done"]
    assert time.monotonic() - began < 3
    waiting_for = caller.task(mode="queued", headers={"Prefer": "wait=1"})
    assert waiting_for.status_code == 202


class Away:
    """A Redis that is not there."""

    def __getattr__(self, name: str) -> Any:
        if name == "connection_pool":
            return self
        if name == "disconnect":
            return lambda: None
        raise RedisAway("away")


# --- Watchers themselves --------------------------------------------------------------------------


@pytest.mark.usefixtures("account")
def test_many_watchers_of_one_task_all_get_all():
    task_id = uuid7()
    texts: list[str] = []

    def follow() -> None:
        with watchers.watch(task_id) as watcher:
            text = ""
            while (event := watcher.next(5)) is not None and event.name != "done":
                text += events.orjson.loads(event.data)["text"]
            texts.append(text)

    threads = [threading.Thread(target=follow) for _ in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        for piece in range(20):
            events.publish_piece(task_id, 1, TextDelta(text=f"{number}.{piece} "))
            time.sleep(0.005)
    events.publish(task_id, "done", {})
    for thread in threads:
        thread.join()
    expected = "".join(f"{number}.{piece} " for number in range(5) for piece in range(20))
    assert texts == [expected] * 5


@pytest.mark.usefixtures("account")
def test_a_slow_watcher_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchers, "MOST_QUEUED", 10)
    monkeypatch.setattr(watchers, "PAGE", 7)
    task_id = uuid7()
    with watchers.watch(task_id) as watcher:
        assert watcher.next(0.05) is None
        for number in range(200):
            events.publish(task_id, "state", {"number": number})
            if number % 40 == 0:
                time.sleep(0.02)
        events.outbox().flush()
        time.sleep(0.1)
        found = [watcher.next(2) for _ in range(200)]
    numbers = [events.orjson.loads(event.data)["number"] for event in found if event]
    assert numbers == list(range(200))


@pytest.mark.usefixtures("account")
def test_the_reader_ends_when_nobody_watches():
    with watchers.watch(uuid7()) as watcher:
        watcher.next(0.05)
        thread = watchers.reader().thread
        assert thread is not None
    thread.join(3)
    assert not thread.is_alive()


@pytest.mark.usefixtures("account")
def test_no_place_to_watch_from(monkeypatch: pytest.MonkeyPatch):
    full = threading.BoundedSemaphore(1)
    monkeypatch.setattr(watchers, "places", lambda: full)
    with watchers.watch(uuid7()), pytest.raises(TooManyWatchers), watchers.watch(uuid7()):
        pass
