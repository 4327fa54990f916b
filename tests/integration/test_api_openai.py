"""OpenAI's paths over real stores and a real (sandbox) vendor."""

import base64
import struct
from typing import Any
from uuid import UUID

import pytest
from django.db import OperationalError

from llmtasks import execute, submit
from llmtasks.models import Attempt, Provider, Task
from tests import factories
from tests.callers import Caller, body_of, frames_of, work_off

MODELS = ("echo", "tool", "cut", "garbage", "error-400", "error-401", "long-2000")


@pytest.fixture
def caller(account: Provider) -> Caller:
    for name in MODELS:
        factories.route(name, (account, name))
    factories.route("embed", (account, "embed"), kind="embedding")
    return Caller(factories.tenant())


def test_a_chat_is_a_task_with_its_cost(caller: Caller):
    answer = caller.chat(metadata={"feature": "x"}, user="u_1")
    assert answer.status_code == 200
    body = answer.json()
    assert body["choices"][0]["message"]["content"] == "hello there"
    task = Task.objects.get(id=answer["x-llmtasks-task-id"])
    assert body["id"] == f"chatcmpl-{task.id}"
    assert (task.metadata, task.user, task.mode) == ({"feature": "x"}, "u_1", "inline")
    assert answer["x-llmtasks-cost"] == caller.get(f"/v1/tasks/{task.id}").json()["cost"]


def test_a_stream_is_a_task_with_its_cost(caller: Caller):
    answer = caller.chat(stream=True, stream_options={"include_usage": True})
    assert answer["Content-Type"] == "text/event-stream"
    frames = [data for _, _, data in frames_of(answer)]
    assert frames[-1] == "[DONE]"
    text = "".join(
        frame["choices"][0]["delta"].get("content") or ""
        for frame in frames[:-1]
        if frame["choices"]
    )
    assert text == "hello there"
    assert frames[-2]["usage"]["completion_tokens"] > 0
    task = Task.objects.get(id=answer["x-llmtasks-task-id"])
    assert (task.status, task.cost_state) == ("succeeded", "final")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "status", "code"),
    [("error-400", 400, "invalid_request"), ("error-401", 502, "vendor_auth")],
)
def test_what_fails_before_the_first_delta_is_an_http_error(
    caller: Caller, stream: bool, model: str, status: int, code: str
):
    answer = caller.chat(model, stream=stream)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer["x-should-retry"] == "false"
    assert Task.objects.get().status == "failed"


def test_a_stream_that_breaks_off_says_so_and_ends(caller: Caller):
    frames = [data for _, _, data in frames_of(caller.chat("cut", stream=True))]
    assert frames[-1]["error"]["code"] == "vendor_bad_response"
    assert Task.objects.get().status == "failed"


def test_who_leaves_a_stream_ends_the_call(caller: Caller):
    answer = caller.chat("long-2000", stream=True)
    chunks = iter(answer)
    next(chunks)
    next(chunks)
    answer.close()
    task = Task.objects.get()
    assert (task.status, task.error_class) == ("cancelled", "ClientLeft")
    assert Attempt.objects.get().state == "settled"


def test_a_stream_that_nobody_read_ends_the_call(caller: Caller):
    answer = caller.chat("long-2000", stream=True)
    answer.close()
    assert Task.objects.get().status == "cancelled"


def test_a_tool_is_called(caller: Caller):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    choice = caller.chat("tool", tools=[tool]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_the_same_key_replays_answer_and_stream(caller: Caller):
    for fields in ({}, {"stream": True}):
        key = {"Idempotency-Key": f"k{len(fields)}"}
        assert text_of(caller.chat(headers=key, **fields)) == "hello there"
        again = caller.chat(headers=key, **fields)
        assert again["Idempotent-Replayed"] == "true"
        assert text_of(again) == "hello there"
    assert Task.objects.count() == 2
    assert caller.chat(headers={"Idempotency-Key": "k0"}, seed=1).status_code == 422


def text_of(answer: Any) -> str:
    if not answer.streaming:
        return str(answer.json()["choices"][0]["message"]["content"])
    deltas = [data["choices"][0]["delta"] for _, _, data in frames_of(answer) if data != "[DONE]"]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_while_the_first_still_runs_the_second_is_told_to_wait(caller: Caller):
    key = {"Idempotency-Key": "k"}
    first = caller.chat("long-2000", stream=True, headers=key)
    second = caller.chat("long-2000", stream=True, headers=key)
    assert (second.status_code, second["Retry-After"]) == (409, "1")
    first.close()


def test_the_same_key_replays_a_vendors_refusal(caller: Caller):
    key = {"Idempotency-Key": "k"}
    first, again = (caller.chat("error-400", headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (400, 400)
    assert first.json() == again.json()
    assert Attempt.objects.count() == 1


@pytest.mark.parametrize(
    ("body", "headers"),
    [({"background": True}, {}), ({}, {"Prefer": "respond-async"})],
)
def test_a_chat_in_the_background(caller: Caller, body: dict[str, Any], headers: dict[str, str]):
    answer = caller.chat(headers=headers, lane="bulk", **body)
    assert answer.status_code == 202
    found = answer.json()
    assert (found["object"], found["status"], found["lane"]) == ("task", "waiting", "bulk")
    assert answer["Location"] == found["url"] == f"/v1/tasks/{UUID(found['id'])}"
    work_off(found["id"])
    assert caller.get(found["url"]).json()["status"] == "succeeded"


def test_a_chat_in_the_background_is_not_streamed(caller: Caller):
    answer = caller.chat(background=True, stream=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")
    answer = caller.chat(run_at="2099-01-01T00:00:00Z")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "run_at")


def test_embeddings_as_numbers_and_packed(caller: Caller):
    body = {"model": "embed", "input": ["a", "b"], "dimensions": 8}
    answer = caller.post("/v1/embeddings", body)
    assert answer.status_code == 200, answer.json()
    plain = [item["embedding"] for item in answer.json()["data"]]
    body["encoding_format"] = "base64"
    packed = caller.post("/v1/embeddings", body).json()["data"]
    for numbers, item in zip(plain, packed, strict=True):
        unpacked = struct.unpack("<8f", base64.b64decode(item["embedding"]))
        assert unpacked == pytest.approx(numbers, rel=1e-6)
    assert answer.json()["usage"]["prompt_tokens"] > 0


def test_models(caller: Caller):
    names = [model["id"] for model in caller.get("/v1/models").json()["data"]]
    assert names == sorted([*MODELS, "embed"])
    assert caller.get("/v1/models/echo").json()["object"] == "model"
    missing = caller.get("/v1/models/not/there")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")


def test_a_model_of_the_other_kind_says_where_it_works(caller: Caller):
    answer = caller.chat("embed")
    assert answer.status_code == 400
    assert "/v1/embeddings" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("raw", "media", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"[]", "application/json", 400),
        (b'"\\ud800"', "application/json", 400),
    ],
)
def test_what_is_no_body_is_refused_in_shape(caller: Caller, raw: bytes, media: str, status: int):
    answer = caller.client.post("/v1/chat/completions", raw, content_type=media)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_refused(caller: Caller, settings: Any):
    settings.LLMTASKS = {**settings.LLMTASKS, "MAX_BODY_BYTES": 1000}
    answer = caller.chat(messages=[{"role": "user", "content": "x" * 1000}])
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("put", "/v1/chat/completions", 405),
        ("get", "/v1/chat/completions", 405),
        ("delete", "/v1/tasks", 405),
        ("get", "/v1/responses", 404),
        ("post", "/v1/responses", 404),
        ("get", "/v1/tasks/not-an-id", 404),
        ("get", "/v1/", 404),
    ],
)
def test_what_is_not_there_says_so_in_shape(caller: Caller, method: str, path: str, status: int):
    answer = getattr(caller.client, method)(path)
    assert answer.status_code == status
    body = answer.json()
    is_native = path.startswith("/v1/tasks")
    assert ("code" in body, "error" in body) == (is_native, not is_native)
    assert answer["x-request-id"]


def away(*_: Any, **__: Any) -> Any:
    raise OperationalError("connection refused")


def test_while_postgres_is_away_the_answer_is_503(caller: Caller, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submit, "queued", away)
    answer = caller.chat(background=True)
    assert (answer.status_code, answer["Retry-After"]) == (503, "2")
    assert answer.json()["error"]["code"] == "unavailable"
    assert caller.task(mode="queued").json()["code"] == "unavailable"


def test_a_fault_of_ours_is_a_500_in_shape(caller: Caller, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("inner detail")

    monkeypatch.setattr(execute, "run", broken)
    answer = caller.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "error")
    assert b"inner detail" not in body_of(answer)
