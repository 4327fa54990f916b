"""The official client, unmodified, against the running product."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.acceptance.cluster import Cluster, wait_for

MESSAGES: Any = [{"role": "user", "content": "hello there"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    """It checks each answer against its own types."""
    with openai.OpenAI(
        api_key=cluster.key,
        base_url=f"{cluster.base_url}/v1",
        timeout=30,
        _strict_response_validation=True,
    ) as made:
        yield made


@pytest.mark.parametrize("model", ["echo", "claude-echo"])
def test_a_chat_through_either_wire_format(client: openai.OpenAI, model: str):
    found = client.chat.completions.create(
        model=model, messages=MESSAGES, metadata={"feature": "x"}, user="u"
    )
    assert found.choices[0].message.content == "hello there"
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None and found.usage.total_tokens > 0


@pytest.mark.parametrize("model", ["echo", "claude-echo"])
def test_a_stream_with_its_usage(client: openai.OpenAI, model: str):
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "hello there"
    assert chunks[-1].usage is not None and chunks[-1].choices == []


@pytest.mark.parametrize("model", ["tool", "claude-tool"])
def test_tools_plain_and_streamed(client: openai.OpenAI, model: str):
    plain = client.chat.completions.create(model=model, messages=MESSAGES, tools=[WEATHER])
    [call] = plain.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    with client.chat.completions.stream(model=model, messages=MESSAGES, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == (
        "weather",
        call.function.arguments,
    )
    conversation = [
        *MESSAGES,
        plain.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert client.chat.completions.create(model="echo", messages=conversation).choices


class City(BaseModel):
    name: str


def test_a_structured_answer(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="echo",
        messages=MESSAGES,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": City.model_json_schema()},
        },
    )
    assert City.model_validate_json(answer.choices[0].message.content or "")


def test_embeddings_packed_by_default_and_as_numbers(cluster: Cluster, client: openai.OpenAI):
    # Its strict mode checks the packed text before it unpacks it, whoever the server is.
    plain_client = openai.OpenAI(api_key=cluster.key, base_url=f"{cluster.base_url}/v1")
    packed = plain_client.embeddings.create(model="embed", input=["a", "b"])
    numbers = client.embeddings.create(model="embed", input=["a", "b"], encoding_format="float")
    for one, other in zip(packed.data, numbers.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)


def test_models(client: openai.OpenAI):
    names = {model.id for model in client.models.list()}
    assert {"echo", "claude-echo", "embed"} <= names
    assert client.models.retrieve("echo").id == "echo"


@pytest.mark.parametrize(
    ("model", "kind", "code"),
    [
        ("error-400", openai.BadRequestError, "invalid_request"),
        ("error-401", openai.InternalServerError, "vendor_auth"),
        ("error-403", openai.InternalServerError, "vendor_auth"),
        ("cut", openai.InternalServerError, "vendor_bad_response"),
        ("garbage", openai.InternalServerError, "vendor_bad_response"),
        ("nope", openai.NotFoundError, "model_not_found"),
    ],
)
def test_its_exceptions(client: openai.OpenAI, model: str, kind: Any, code: str):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES)
    assert caught.value.code == code


def test_our_own_tries_are_the_only_ones(cluster: Cluster, client: openai.OpenAI):
    """Five of ours, and none of the client's two on top."""
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="error-503", messages=MESSAGES)
    task_id = caught.value.response.headers["x-llmtasks-task-id"]
    assert cluster.task(task_id)["attempts"] <= 5
    tasks = cluster.api.get("/v1/tasks", params={"model": "error-503"}).json()["data"]
    assert [task["id"] for task in tasks] == [task_id]


def test_its_own_timeout_is_the_deadline(cluster: Cluster, client: openai.OpenAI):
    """It hears of it in time, and does not ask again."""
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(
            model="slow-20000", messages=MESSAGES, metadata={"feature": "timeout"}, timeout=10
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    found = cluster.api.get("/v1/tasks", params={"metadata.feature": "timeout"})
    [task] = found.json()["data"]
    assert (task["error"]["class"], task["attempts"]) == ("DeadlineExceeded", 1)


def test_a_fault_in_the_middle_of_a_stream_is_raised(client: openai.OpenAI):
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model="cut", messages=MESSAGES, stream=True))
    assert caught.value.code == "vendor_bad_response"


def test_what_the_client_gets_wrong(cluster: Cluster, client: openai.OpenAI):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="lt_wrong").models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=MESSAGES, n=2)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=MESSAGES, extra_body={"foo": 1})
    assert caught.value.param == "foo"


def test_an_idempotency_key_set_by_hand(client: openai.OpenAI):
    def send(text: str) -> str:
        return client.chat.completions.create(
            model="echo",
            messages=[{"role": "user", "content": text}],
            extra_headers={"Idempotency-Key": f"client-{id(client)}"},
        ).id

    assert send("a") == send("a")
    with pytest.raises(openai.UnprocessableEntityError):
        send("b")


def test_a_chat_in_the_background(cluster: Cluster, client: openai.OpenAI):
    accepted = client.chat.completions.with_raw_response.create(
        model="echo", messages=MESSAGES, extra_body={"background": True}
    )
    assert accepted.status_code == 202
    task = cluster.finished(accepted.headers["location"].rsplit("/", 1)[-1])
    assert task["output"]["choices"][0]["message"]["content"] == "hello there"
    waited = client.chat.completions.create(
        model="echo", messages=MESSAGES, extra_headers={"Prefer": "wait=20"}
    )
    assert waited.choices[0].message.content == "hello there"


def test_a_client_that_leaves_ends_the_call(cluster: Cluster, client: openai.OpenAI):
    stream = client.chat.completions.create(model="long-2000", messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    wait_for_status(cluster, "long-2000", "cancelled")


def wait_for_status(cluster: Cluster, model: str, status: str) -> None:
    until = time.monotonic() + 10
    while True:
        [task] = cluster.api.get("/v1/tasks", params={"model": model, "limit": 1}).json()["data"]
        if task["status"] == status:
            return
        assert time.monotonic() < until, task
        time.sleep(0.1)


def test_a_browser_follows_a_task_and_comes_back(cluster: Cluster):
    task_id = cluster.queue("long-500")
    token = cluster.api.post(f"/v1/tasks/{task_id}/token").json()
    url = cluster.base_url + token["events_url"]
    seen: list[tuple[str, str]] = []
    with httpx.stream("GET", url, timeout=20) as first:
        for event in events_of(first):
            seen.append(event)
            if event[1] == "delta":
                break
    with httpx.stream("GET", url, headers={"Last-Event-ID": seen[-1][0]}, timeout=20) as second:
        rest = list(events_of(second))
    assert rest[-1][1] == "done"
    assert "snapshot" not in {name for _, name in rest}
    assert httpx.get(url, headers={"Last-Event-ID": "done"}).status_code == 204


def events_of(response: httpx.Response) -> Iterator[tuple[str, str]]:
    """The (id, name) of each event as it comes."""
    event_id, name = "", ""
    for line in response.iter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif not line and name:
            yield event_id, name
            name = ""


def test_a_body_without_a_length(cluster: Cluster):
    def pieces() -> Iterator[bytes]:
        yield b'{"model": "echo", '
        yield b'"messages": [{"role": "user", "content": "in pieces"}]}'

    json_type = {"Content-Type": "application/json"}
    answer = cluster.api.post("/v1/chat/completions", content=pieces(), headers=json_type)
    assert answer.json()["choices"][0]["message"]["content"] == "in pieces"
    large = cluster.api.post(
        "/v1/chat/completions", content=(b"x" * 65536 for _ in range(320)), headers=json_type
    )
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    large = cluster.api.post("/v1/tasks", content=b"x" * 21_000_000, headers=json_type)
    assert (large.status_code, large.json()["code"]) == (413, "body_too_large")


def test_a_revoked_key_is_refused_within_a_second(cluster: Cluster):
    # A machine that stands still delays it: one key of three is enough.
    assert any(refused_after(cluster, f"short-lived-{number}") < 1.2 for number in range(3))


def refused_after(cluster: Cluster, name: str) -> float:
    """The seconds from a new key's end to the first request that was refused."""
    printed = cluster.manage("issue_key", "demo", name)
    text = next(word for word in printed.split() if word.startswith("lt_"))
    headers = {"Authorization": f"Bearer {text}"}

    def status() -> int:
        return cluster.api.get("/v1/models", headers=headers).status_code

    wait_for(lambda: status() == 200, 10)
    cluster.rows("UPDATE llmtasks_apikey SET revoked_at = now() WHERE name = %s", [name])
    began = time.monotonic()
    wait_for(lambda: status() == 401, 10, step_s=0.02)
    return time.monotonic() - began


def test_many_watchers_at_once(cluster: Cluster):
    task_id = cluster.queue("long-50")
    ends: list[str] = []

    def follow() -> None:
        headers = {"Authorization": f"Bearer {cluster.key}"}
        url = f"{cluster.base_url}/v1/tasks/{task_id}/events"
        with httpx.stream("GET", url, headers=headers, timeout=20) as response:
            ends.append(list(events_of(response))[-1][1])

    threads = [threading.Thread(target=follow) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == ["done"] * 20


def test_a_prompt_by_the_extra_body(client: openai.OpenAI, cluster: Cluster):
    said = [{"role": "user", "content": "Hello {{ name }}"}]
    prompt = {"name": "greet", "messages": said, "model": "echo", "labels": ["production"]}
    assert cluster.api.post("/v1/prompts", json=prompt).status_code in (200, 201)
    named: Any = {"prompt": "greet", "variables": {"name": "Ann"}}
    raw = client.chat.completions.with_raw_response.create(
        model="", messages=[], user="u", extra_body=named
    )
    assert raw.parse().choices[0].message.content == "Hello Ann"
    task = cluster.task(raw.headers["x-llmtasks-task-id"])
    assert (task["prompt"], task["model"]) == ("greet@1", "echo")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="", messages=[], extra_body={"prompt": "greet"})
    assert caught.value.param == "variables.name"
