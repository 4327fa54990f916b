"""/v1/tasks over real stores and a real (sandbox) vendor."""

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from llmtasks.api import waiting
from llmtasks.models import Attempt, IdempotencyKey, Provider, Status, Task, TaskPayload
from tests import factories
from tests.callers import Caller, new_task, work_off


@pytest.fixture
def caller(account: Provider) -> Caller:
    factories.route("echo", (account, "echo"))
    factories.route("broken", (account, "error-400"))
    return Caller(factories.tenant())


def test_inline_work_is_answered_with_the_finished_task(caller: Caller):
    answer = caller.task(mode="inline", metadata={"feature": "summary"}, user="u_42")
    assert answer.status_code == 200
    task = answer.json()
    assert (task["status"], task["mode"], task["model"]) == ("succeeded", "inline", "echo")
    assert task["output"]["choices"][0]["message"]["content"] == "hello there"
    assert (task["metadata"], task["user"]) == ({"feature": "summary"}, "u_42")
    assert task["usage"]["output_tokens"] > 0 and float(task["cost"]) > 0
    stored = caller.get(answer["Location"]).json()
    assert {**stored, "started_at": None} == {**task, "started_at": None}


def test_inline_work_that_fails_is_a_failed_task(caller: Caller):
    answer = caller.task("broken", mode="inline")
    assert answer.status_code == 200
    task = answer.json()
    assert (task["status"], task["error"]["class"]) == ("failed", "InvalidRequest")
    assert task["output"] is None


def test_queued_work_is_accepted_and_found(caller: Caller):
    answer = caller.task(mode="queued", deadline_s=120, lane="bulk")
    assert answer.status_code == 202
    body = answer.json()
    assert answer["Location"] == f"/v1/tasks/{body['id']}" == body["url"]
    assert int(answer["Retry-After"]) >= 1
    assert (body["status"], body["lane"], body["output"]) == ("waiting", "bulk", None)
    work_off(body["id"])
    done = caller.get(answer["Location"]).json()
    assert done["status"] == "succeeded"
    assert done["output"]["choices"][0]["message"]["content"] == "hello there"


def run_soon(caller: Caller, seconds: float = 0.3) -> threading.Thread:
    """A worker that takes the tenant's next task."""

    def run() -> None:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            task = Task.objects.filter(tenant=caller.tenant, status=Status.WAITING).first()
            if task is not None:
                time.sleep(seconds)
                work_off(task.id)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("fields", "headers", "applied"),
    [
        ({"mode": "queued"}, {"Prefer": "wait=5"}, "wait=5"),
        ({}, {"Prefer": "respond-async, wait=5"}, "respond-async, wait=5"),
        # Queued, whatever is known of the route.
        ({"mode": "auto", "lane": "bulk"}, {}, None),
        ({"lane": "bulk"}, {}, None),
    ],
)
def test_who_waits_gets_the_finished_task(
    caller: Caller,
    fields: dict[str, Any],
    headers: dict[str, str],
    applied: str | None,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(waiting, "LOOK_S", 60.0)
    worker = run_soon(caller)
    began = time.monotonic()
    answer = caller.task(headers=headers, **fields)
    took = time.monotonic() - began
    worker.join()
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert took < 5, "it is woken by the event, not by a look at the row"
    assert answer.headers.get("Preference-Applied") == applied


def test_who_waits_in_vain_gets_202(caller: Caller):
    answer = caller.task(mode="queued", headers={"Prefer": "wait=1"})
    assert (answer.status_code, answer.json()["status"]) == (202, "waiting")
    assert answer["Preference-Applied"] == "wait=1"


def test_respond_async_does_not_wait(caller: Caller):
    began = time.monotonic()
    answer = caller.task(headers={"Prefer": "respond-async"})
    assert (answer.status_code, answer["Preference-Applied"]) == (202, "respond-async")
    assert time.monotonic() - began < 5


def test_work_for_later_says_when_to_ask(caller: Caller):
    answer = caller.task(run_at=in_an_hour())
    assert answer.status_code == 202
    assert 3500 < int(answer["Retry-After"]) <= 3601


def in_an_hour() -> str:

    return (datetime.now(UTC) + timedelta(hours=1)).isoformat()


def test_the_same_key_gets_the_same_task(caller: Caller):
    for mode in ("queued", "inline"):
        key = {"Idempotency-Key": str(uuid4())}
        first = caller.task(mode=mode, headers=key)
        again = caller.task(mode=mode, headers=key)
        assert again.status_code == first.status_code
        assert again.json()["id"] == first.json()["id"]
        assert (first.headers.get("Idempotent-Replayed"), again["Idempotent-Replayed"]) == (
            None,
            "true",
        )
        other = caller.task(mode=mode, headers=key, user="someone")
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert Task.objects.count() == 2


def test_a_key_that_is_none_is_refused(caller: Caller):
    for key in ("", "a b", "x" * 256):
        answer = caller.task(mode="queued", headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.json()["param"]) == (400, "Idempotency-Key")


def test_many_tasks_have_a_result_each(caller: Caller):
    bad = new_task()
    bad["input"]["messages"] = []
    body = {"tasks": [new_task(), bad, new_task("nope"), new_task(mode="inline"), 5, new_task()]}
    answer = caller.post("/v1/tasks/bulk", body)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["accepted"], found["refused"]) == (2, 4)
    assert ["task" in item for item in found["data"]] == [True, False, False, False, False, True]
    assert [item["error"]["param"] for item in found["data"] if "error" in item] == [
        "tasks[1].input.messages",
        "tasks[2].input.model",
        "tasks[3].mode",
        "tasks[4].kind",
    ]
    assert Task.objects.count() == 2


def test_many_tasks_with_a_key_are_made_once(caller: Caller):
    body = {"tasks": [new_task() for _ in range(3)]}
    key = {"Idempotency-Key": "k"}
    first = caller.post("/v1/tasks/bulk", body, **key)
    again = caller.post("/v1/tasks/bulk", body, **key)
    assert again["Idempotent-Replayed"] == "true"
    ids = [[item["task"]["id"] for item in answer.json()["data"]] for answer in (first, again)]
    assert ids[0] == ids[1]
    other = caller.post("/v1/tasks/bulk", {"tasks": [5, new_task()]}, **key)
    assert other.status_code == 422
    assert Task.objects.count() == 3


def test_pages_follow_each_other(caller: Caller):
    made = [caller.task(mode="queued").json()["id"] for _ in range(5)]
    found: list[str] = []
    path = "/v1/tasks?limit=2"
    while path:
        page = caller.get(path).json()
        found += [task["id"] for task in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        path = f"/v1/tasks?limit=2&cursor={cursor}" if cursor else ""
    assert found == made[::-1]


def test_filters(caller: Caller):
    one = caller.task(mode="queued", user="ann", metadata={"n": 5, "s": "x", "b": True}).json()
    two = caller.task(mode="inline", lane="bulk", metadata={"n": "5"}).json()

    def ids(query: str) -> list[str]:
        answer = caller.get(f"/v1/tasks?{query}")
        assert answer.status_code == 200, answer.json()
        return [task["id"] for task in answer.json()["data"]]

    assert ids("status=waiting") == [one["id"]]
    assert ids("status=succeeded,waiting") == [two["id"], one["id"]]
    assert ids("lane=bulk") == [two["id"]]
    assert ids("user=ann") == [one["id"]]
    assert ids("model=echo&kind=chat") == [two["id"], one["id"]]
    assert ids("model=other") == []
    assert ids("metadata.n=5") == [two["id"], one["id"]]
    assert ids("metadata.b=true") == [one["id"]]
    assert ids("metadata.s=x") == [one["id"]]
    assert ids("created_after=2000-01-01T00:00:00Z") == [two["id"], one["id"]]
    assert ids("created_before=2000-01-01T00:00:00Z") == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=-1", "limit"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=1&limit=2", "limit"),
        ("status=done", "status"),
        ("lane=fast", "lane"),
        ("cursor=!!", "cursor"),
        ("cursor=%ff", "cursor"),
        ("created_after=yesterday", "created_after"),
        ("created_before=2020-01-01T00:00:00", "created_before"),
        ("colour=red", "colour"),
        ("metadata.=x", "metadata."),
        ("user=%00", "user"),
    ],
)
def test_a_filter_that_is_wrong_is_named(caller: Caller, query: str, param: str):
    answer = caller.get(f"/v1/tasks?{query}")
    assert (answer.status_code, answer.json()["param"]) == (400, param)


def test_what_is_another_tenants_is_not_there(caller: Caller):
    task_id = caller.task(mode="queued").json()["id"]
    other = Caller(factories.tenant())
    for answer in (
        other.get(f"/v1/tasks/{task_id}"),
        other.get(f"/v1/tasks/{task_id}/events"),
        other.post(f"/v1/tasks/{task_id}/cancel"),
        other.post(f"/v1/tasks/{task_id}/retry"),
        other.post(f"/v1/tasks/{task_id}/token"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert other.get("/v1/tasks").json()["data"] == []


def test_cancel_and_its_repetition(caller: Caller):
    task_id = caller.task(mode="queued").json()["id"]
    for _ in range(2):
        answer = caller.post(f"/v1/tasks/{task_id}/cancel", **{"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")


def test_a_finished_task_can_not_be_cancelled(caller: Caller):
    task_id = caller.task(mode="inline").json()["id"]
    answer = caller.post(f"/v1/tasks/{task_id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")


def test_retry_is_a_new_task(caller: Caller):
    failed = caller.task("broken", mode="inline", metadata={"a": 1}, user="u").json()
    path = f"/v1/tasks/{failed['id']}/retry"
    key = {"Idempotency-Key": "again"}
    answer = caller.post(path, **key)
    assert answer.status_code == 202
    task = Task.objects.get(id=answer.json()["id"])
    assert (str(task.retry_of), task.metadata, task.user) == (failed["id"], {"a": 1}, "u")
    again = caller.post(path, **key)
    assert (again.json()["id"], again["Idempotent-Replayed"]) == (str(task.id), "true")
    other = caller.task(mode="inline").json()
    assert caller.post(f"/v1/tasks/{other['id']}/retry", **key).status_code == 422
    waiting = caller.post(f"/v1/tasks/{task.id}/retry")
    assert waiting.status_code == 409


def test_a_refused_request_leaves_no_row(caller: Caller):
    refused = [
        caller.task("nope", mode="inline"),
        caller.task("nope", mode="queued"),
        caller.task(mode="inline", run_at=in_an_hour()),
        caller.task(mode="inline", input={"stream": True}),
        caller.task(input={"temperature": 5}),
        caller.post("/v1/tasks", b"{"),
        caller.post("/v1/tasks", new_task(), **{"Idempotency-Key": "a b"}),
    ]
    assert [answer.status_code for answer in refused] == [404, 404, 400, 400, 400, 400, 400]
    assert [answer.json().get("param") for answer in refused[:5]] == [
        "input.model",
        "input.model",
        "run_at",
        "input.stream",
        "input.temperature",
    ]
    for model in (Task, TaskPayload, Attempt, IdempotencyKey):
        assert model.objects.count() == 0
