"""The sandbox behaves like a vendor, over real HTTP, and counts what it did."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import jsonschema
import openai
import orjson
import pytest

from providers import errors, http, registry, sandbox_calls, sandbox_http
from providers.base import Account
from providers.http import Exchange
from providers.sandbox import Sandbox, serve
from providers.sandbox_answers import behaviour, minimal, tokens, vector
from providers.types import (
    EmbeddingRequest,
    Message,
    Request,
    ResponseFormat,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    ToolSpec,
    Usage,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 6},
        "days": {"type": "integer", "minimum": 2},
        "other": {"type": "string"},
    },
    "required": ["city", "days"],
}
TOOL = ToolSpec(name="weather", parameters=SCHEMA)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as server:
        yield server
    http.close_idle()


@pytest.fixture(params=["compatible", "anthropic"])
def provider(request, sandbox):
    return build(request.param, sandbox)


def build(adapter, sandbox, key="any"):
    url = sandbox.base_url + ("" if adapter == "anthropic" else "/v1")
    return registry.build(adapter, Account(name="sandbox", base_url=url, api_key=key))


def chat(model, text="Hello, world!", *more, **fields):
    messages = (Message(role="user", parts=(Text(text=text),)), *more)
    return Request(model=model, messages=messages, **fields)


def task(name, number=1):
    return Exchange(headers={"X-Client-Request-Id": f"{name}.{number}"})


def until(condition):
    """Wait for it, for a few seconds."""
    deadline = time.monotonic() + 3
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def once_all_left(sandbox, name):
    """The task's tally once nothing of it is under way any more."""
    until(lambda: not sandbox.calls(name)["under_way"])
    return sandbox.calls(name)


def both(provider, request, name="both"):
    """The answer whole and the answer streamed, which must say the same."""
    whole = provider.complete(request, task(name, 1))
    *deltas, done = provider.stream(request, task(name, 2))
    assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == done.response.text
    assert done.response.text == whole.text
    assert done.response.usage == whole.usage
    assert done.response.finish_reason == whole.finish_reason
    return whole


# Answers


@pytest.mark.parametrize("prefix", ["", "claude-"])
def test_echo(provider, prefix):
    response = both(provider, chat(f"{prefix}echo", "Grüße\n an 😀 alle "))
    assert response.text == "Grüße\n an 😀 alle "
    assert response.usage == Usage(input_tokens=5, output_tokens=5)
    assert response.model == f"{prefix}echo"
    assert both(provider, chat("echo", "x")).usage == Usage(input_tokens=1, output_tokens=1)


def test_what_is_counted_as_input(provider):
    request = chat(
        "echo",
        "user",
        Message(role="system", parts=(Text(text="system prompt here"),)),
        Message(role="assistant", parts=(Text(text="answer"),)),
    )
    response = both(provider, request)
    assert response.usage.input_tokens == len("user" + "system prompt here" + "answer") // 4
    assert response.text == "user"


def test_limits_cut_the_answer(provider):
    response = both(provider, chat("echo", "abcdefghijkl", max_output_tokens=2))
    assert (response.text, response.finish_reason) == ("abcdefgh", "length")
    assert response.usage.output_tokens == 2


def test_tool(provider):
    request = chat("tool", tools=(TOOL,))
    response = both(provider, request)
    (call,) = response.tool_calls
    assert call.name == "weather"
    assert json.loads(call.arguments) == {"city": "textxx", "days": 2}
    assert response.finish_reason == "tool_calls"
    *deltas, _ = provider.stream(request, Exchange())
    assert "".join(delta.arguments for delta in deltas) == call.arguments
    answered = chat(
        "tool",
        "hello",
        Message(role="assistant", parts=(call,)),
        Message(role="tool", parts=(ToolResult(call_id=call.id, content="sunny"),)),
        tools=(TOOL,),
    )
    response = both(provider, answered)
    assert (response.text, response.finish_reason) == ("sunny", "stop")
    assert response.usage.input_tokens == tokens("hello" + call.arguments + "sunny")


def test_tool_choices(provider):
    second = ToolSpec(name="second", parameters={})
    chosen = chat("tool", tools=(TOOL, second), tool_choice={"name": "second"})
    assert both(provider, chosen).tool_calls[0].name == "second"
    assert both(provider, chosen).tool_calls[0].arguments == "{}"
    for request in (chat("tool"), chat("tool", tools=(TOOL,), tool_choice="none")):
        assert both(provider, request).text == "Hello, world!"


def test_a_script_names_the_calls_that_it_queued(provider):
    given = json.dumps([[], [{"name": "wait", "arguments": {"ids": "$queued"}}]])
    calls = [ToolCall(id=name, name="send", arguments="{}") for name in ("c1", "c2")]
    results = [
        Message(role="tool", parts=(ToolResult(call_id=call.id, content=content),))
        for call, content in zip(calls, ('{"queued":"aa-1"}', '{"queued": "bb-2"}'), strict=True)
    ]
    request = chat("script", given, Message(role="assistant", parts=tuple(calls)), *results)
    (call,) = both(provider, request).tool_calls
    assert json.loads(call.arguments) == {"ids": ["aa-1", "bb-2"]}


def test_structured_output(provider):
    wanted = ResponseFormat(type="json_schema", name="n", schema=SCHEMA)
    jsonschema.validate(json.loads(both(provider, chat("echo", response_format=wanted)).text),
                        SCHEMA)  # fmt: skip


def test_any_json_object(sandbox):
    wanted = ResponseFormat(type="json_object")
    response = both(build("compatible", sandbox), chat("echo", response_format=wanted))
    assert json.loads(response.text) == {}


def test_long_answers_come_at_their_rate(provider):
    begun = time.monotonic()
    arrived = [
        time.monotonic() - begun
        for event in provider.stream(chat("long-20-100"), Exchange())
        if isinstance(event, TextDelta)
    ]
    assert len(arrived) == 20
    assert arrived[-1] >= 0.18
    assert arrived[0] < arrived[-1]
    begun = time.monotonic()
    response = provider.complete(chat("long-20-100"), Exchange())
    assert time.monotonic() - begun >= 0.2
    assert response.usage.output_tokens == 20


def test_the_shortest_long_answer(provider):
    assert both(provider, chat("long-1-1000")).text == "word"


def test_slow(provider):
    begun = time.monotonic()
    assert provider.complete(chat("slow-150"), Exchange()).text == "Hello, world!"
    assert time.monotonic() - begun >= 0.15


def test_no_usage(provider):
    response = both(provider, chat("no-usage"))
    assert (response.text, response.usage) == ("Hello, world!", None)


# Trouble


def fails(provider, model, kind, name="fails"):
    found = []
    for run in (
        lambda: provider.complete(chat(model), task(name)),
        lambda: list(provider.stream(chat(model), task(name))),
    ):
        with pytest.raises(kind) as caught:
            run()
        assert type(caught.value) is kind
        found.append(caught.value)
    return found[0]


def test_errors_by_status(provider):
    for status in (400, 401, 402, 403, 404, 408, 413, 418, 429, 500, 502, 503, 504, 529, 599):
        kind = type(http.error_from_response(status, {}, b""))
        error = fails(provider, f"error-{status}", kind)
        assert error.status == status
        assert error.request_id.startswith("req_")


def test_rate_limit(provider):
    assert fails(provider, "rate-limit-7", errors.RateLimited).retry_after == 7.0


def test_cut_and_garbage(provider):
    fails(provider, "cut", errors.BadResponse)
    fails(provider, "garbage", errors.BadResponse)
    stream = provider.stream(chat("cut"), Exchange())
    assert next(stream) == TextDelta(text="Hello, ")
    stream.close()


def test_flaky_counts_per_task(provider, sandbox):
    name = f"flaky-{type(provider).__name__}"
    for task_name in (f"{name}-a", f"{name}-b"):
        for number in range(2):
            with pytest.raises(errors.Overloaded):
                provider.complete(chat("flaky-2"), task(task_name, number))
        assert provider.complete(chat("flaky-2"), task(task_name, 3)).text
        tally = sandbox.calls(task_name)
        assert (tally["calls"], tally["answered"], tally["failures"]) == (3, 1, 2)


@pytest.mark.parametrize(
    "model",
    ["nope", "", "claude-", "echo-1", "slow", "slow-x", "error-399", "error-600", "long-0",
     "long-5-0", "long-9999999", "embed", "embed-8", "Echo", "claude-claude-echo"],
)  # fmt: skip
def test_unknown_models(provider, model):
    error = fails(provider, model, errors.InvalidRequest)
    assert (error.status, error.param) == (404, "model")


@pytest.mark.parametrize("adapter", ["compatible", "anthropic", "azure"])
def test_keys(sandbox, adapter):
    for key in ("bad-key", ""):
        with pytest.raises(errors.AuthenticationFailed):
            build(adapter, sandbox, key).complete(chat("echo"), Exchange())
    assert build(adapter, sandbox, "good").complete(chat("echo"), Exchange()).text


# Embeddings


def test_embeddings(sandbox):
    provider = build("compatible", sandbox)
    request = EmbeddingRequest(model="embed-8", inputs=("a text", "another", (1, 2, 3)))
    response = provider.embed(request, task("embeds"))
    assert [len(numbers) for numbers in response.vectors] == [8, 8, 8]
    assert len(set(response.vectors)) == 3
    assert provider.embed(request, Exchange()).vectors == response.vectors
    assert response.usage == Usage(input_tokens=1 + 1 + 3)
    assert sandbox.calls("embeds")["input_tokens"] == 5
    for numbers in response.vectors:
        assert sum(number * number for number in numbers) == pytest.approx(1.0, abs=1e-6)
    short = EmbeddingRequest(model="echo", inputs=("a",), dimensions=4)
    (numbers,) = provider.embed(short, Exchange()).vectors
    assert numbers == pytest.approx(vector("a", 4), abs=1e-6)


def test_embeddings_in_trouble(sandbox):
    provider = build("compatible", sandbox)

    def embed(model):
        return provider.embed(EmbeddingRequest(model=model, inputs=("a",)), Exchange())

    assert len(embed("embed").vectors[0]) == 256
    assert embed("no-usage").usage is None
    for model, kind in (
        ("cut", errors.BadResponse),
        ("garbage", errors.BadResponse),
        ("error-500", errors.ServerError),
        ("tool", errors.InvalidRequest),
        ("long-5", errors.InvalidRequest),
        ("embed-5000", errors.InvalidRequest),
    ):
        with pytest.raises(kind):
            embed(model)


# Tallies


def test_calls_are_counted(sandbox, provider):
    name = f"counted-{type(provider).__name__}"
    provider.complete(chat("echo", "abcdefgh"), task(name, 1))
    with pytest.raises(errors.BadResponse):
        provider.complete(chat("cut", "abcdefgh"), task(name, 3))
    with pytest.raises(errors.ServerError):
        provider.complete(chat("error-500"), task(name, 4))
    tally = once_all_left(sandbox, name)
    assert tally == {
        "calls": 3,
        "answered": 1,
        "failures": 0,
        "hung_up": 0,
        "overlaps": 0,
        "under_way": 0,
        "input_tokens": 4,
        "output_tokens": 4,
    }
    assert sandbox.calls()["tasks"][name] == tally


def test_overlaps_are_counted(sandbox):
    provider = build("compatible", sandbox)
    exchanges = [task("over", n) for n in range(3)]
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(provider.complete, chat("slow-5000"), each) for each in exchanges]
        until(lambda: sandbox.calls("over")["under_way"] == 3)
        for exchange, call in zip(exchanges, calls, strict=True):
            exchange.drop("cancel")
            with pytest.raises(errors.Dropped):
                call.result()
        list(pool.map(lambda n: provider.complete(chat("slow-50"), task(f"apart-{n}")), range(3)))
    assert sandbox.calls("over")["overlaps"] == 2
    assert [sandbox.calls(f"apart-{n}")["overlaps"] for n in range(3)] == [0, 0, 0]


def test_clients_that_leave_are_noticed(sandbox, provider):
    name = f"left-{type(provider).__name__}"
    exchange = task(name)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(provider.complete, chat("slow-9000"), exchange)
        until(lambda: exchange.is_sent)
        exchange.drop("cancel")
        with pytest.raises(errors.Dropped):
            call.result()
    stream = provider.stream(chat("long-9000-50"), task(name, 2))
    next(stream)
    stream.close()
    tally = once_all_left(sandbox, name)
    assert (tally["calls"], tally["hung_up"], tally["answered"]) == (2, 2, 0)
    assert 1 <= tally["output_tokens"] < 100


def test_a_client_that_leaves_while_much_is_unsent_is_noticed(sandbox):
    body = orjson.dumps(
        {"model": "long-900000-900000", "messages": [{"role": "user", "content": "x"}],
         "stream": True}
    )  # fmt: skip
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address(sandbox))
        client.sendall(raw(body, b"X-Client-Request-Id: full.1\r\n"))
        time.sleep(0.5)
        # Reads a little, so that the server may go on writing once.
        for _ in range(200):
            client.recv(65536)
    assert once_all_left(sandbox, "full")["hung_up"] == 1


def test_the_oldest_tasks_are_forgotten(monkeypatch):
    monkeypatch.setattr(sandbox_calls, "MAX_TASKS", 3)
    with Sandbox() as server:
        provider = build("compatible", server)
        for number in range(5):
            provider.complete(chat("echo"), task(f"t{number}"))
        assert list(server.calls()["tasks"]) == ["t2", "t3", "t4"]
        assert server.calls()["calls"] == 5
        assert server.calls("t0")["calls"] == 0


# The bare protocol


def address(sandbox):
    host, port = sandbox.base_url.removeprefix("http://").split(":")
    return host, int(port)


def raw(body, headers=b"", path=b"/v1/chat/completions", method=b"POST"):
    return (
        method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
        + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip


def talk(sandbox, data):
    """What comes back, until the connection ends."""
    with socket.create_connection(address(sandbox), timeout=5) as client:
        client.sendall(data)
        reply = b""
        while more := client.recv(65536):
            reply += more
        return reply


CLOSE = b"Connection: close\r\n"


def status_and_body(reply):
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)


@pytest.mark.parametrize(
    ("path", "status"),
    [(b"/healthz", 200), (b"/v1/models", 200), (b"/_calls", 200), (b"/_calls/a%20b", 200),
     (b"/", 404)],
)  # fmt: skip
def test_what_can_be_fetched(sandbox, path, status):
    found, body = status_and_body(talk(sandbox, raw(b"", CLOSE, path, b"GET")))
    assert found == status
    if path == b"/v1/models":
        names = {model["id"] for model in body["data"]}
        assert {"echo", "claude-echo", "embed"} <= names
        assert all(behaviour(name) for name in names)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (b"/v1/other", b"{}", 404),
        (b"/v1/chat/completions", b"{", 400),
        (b"/v1/chat/completions", b"[]", 400),
        (b"/v1/chat/completions", b'{"model": 1}', 400),
        (b"/v1/chat/completions", b'{"model": "echo"}', 400),
        (b"/v1/chat/completions", b'{"model": "echo", "messages": [1]}', 400),
        (b"/v1/chat/completions", b'{"model": "tool", "messages": [{}], "tools": [1]}', 400),
        (b"/v1/chat/completions", b'{"model": "echo", "messages": [{"content": 1}]}', 200),
        (b"/v1/messages", b'{"model": "echo", "messages": [{}]}', 400),
        (b"/v1/embeddings", b'{"model": "embed"}', 400),
        (b"/v1/embeddings", b'{"model": "embed", "input": [{}]}', 400),
        (b"/v1/embeddings", b'{"model": "embed", "input": [1, 2]}', 200),
        (b"/v1/embeddings", b'{"model": "embed", "input": "text"}', 200),
    ],
)
def test_requests_that_are_wrong(sandbox, path, body, status):
    found, reply = status_and_body(talk(sandbox, raw(body, CLOSE, path)))
    assert found == status
    if status != 200:
        assert reply["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"x" * 70_000,
        raw(b"", b"Transfer-Encoding: chunked\r\n"),
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    ],
)
def test_what_is_no_request_ends_the_connection(sandbox, data):
    assert talk(sandbox, data).startswith(b"HTTP/1.1 400")


def test_methods_reset_and_pipelining(sandbox):
    assert talk(sandbox, raw(b"", CLOSE, method=b"PUT")).startswith(b"HTTP/1.1 405")
    body = b'{"model": "slow-50", "messages": [{"role": "user", "content": "x"}]}'
    both_at_once = raw(body) + raw(body, CLOSE)
    assert talk(sandbox, both_at_once).count(b"HTTP/1.1 200") == 2
    with socket.create_connection(address(sandbox), timeout=5) as client:
        client.sendall(raw(body))
        time.sleep(0.02)
        client.sendall(raw(body, CLOSE))
        assert b"".join(iter(lambda: client.recv(65536), b"")).count(b"HTTP/1.1 200") == 2
    waiting = talk(sandbox, raw(body, b"Expect: 100-continue\r\n" + CLOSE))
    assert waiting.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    with Sandbox() as own:
        build("compatible", own).complete(chat("echo"), task("a"))
        assert own.calls()["calls"] == 1
        assert talk(own, raw(b"", CLOSE, b"/_reset")).startswith(b"HTTP/1.1 200")
        assert own.calls()["calls"] == 0


def test_a_client_that_sends_too_much_ahead_is_cut_off(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox_http, "MAX_BODY_BYTES", 100_000)
    body = b'{"model": "slow-3000", "messages": [{"role": "user", "content": "x"}]}'
    with socket.create_connection(address(sandbox), timeout=5) as client:
        with pytest.raises(ConnectionError):
            client.sendall(raw(body))
            while True:
                client.sendall(b"x" * 65536)


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(sandbox_http, "MAX_CONNECTIONS", 1)
    with Sandbox() as server, socket.create_connection(address(server), timeout=5):
        assert talk(server, b"").startswith(b"HTTP/1.1 503")


def test_idle_connections_end(monkeypatch):
    monkeypatch.setattr(sandbox_http, "IDLE_SECONDS", 0.2)
    with Sandbox() as server:
        with socket.create_connection(address(server), timeout=5) as client:
            assert client.recv(1) == b""


def test_a_fault_of_the_sandbox_itself_ends_the_connection(monkeypatch):
    def broken(*_args):
        raise RuntimeError("a fault")

    with Sandbox() as server:
        monkeypatch.setattr(server._server, "_shown", broken)
        server._loop.set_exception_handler(lambda *_args: None)
        assert talk(server, raw(b"", CLOSE, b"/healthz", b"GET")) == b""


def test_a_taken_port_is_told():
    with Sandbox() as server:
        with pytest.raises(OSError, match="in use"):
            Sandbox(port=address(server)[1]).start()


def test_five_hundred_slow_calls_at_once(sandbox):
    body = b'{"model": "slow-500", "messages": [{"role": "user", "content": "x"}]}'
    begun = time.monotonic()
    clients = [socket.create_connection(address(sandbox), timeout=10) for _ in range(500)]
    try:
        for client in clients:
            client.sendall(raw(body))
        for client in clients:
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
    finally:
        for client in clients:
            client.close()
    assert time.monotonic() - begun < 10


def test_stopping_twice_is_no_error():
    server = Sandbox().start()
    server.stop()
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serving_until_a_signal(number):
    heard = []

    def ready(host, port):
        heard.append(host)
        os.kill(os.getpid(), number)

    serve("127.0.0.1", 0, ready=ready)
    assert heard == ["127.0.0.1"]


def test_serving_as_a_process_until_a_signal():
    script = (
        "from providers.sandbox import serve\n"
        "serve('127.0.0.1', 0, ready=lambda host, port: print(host, port, flush=True))\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root
    ) as process:
        host, port = process.stdout.readline().split()
        with socket.create_connection((host, int(port)), timeout=5):
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0


# The vendors' own clients


def test_openais_client(sandbox):
    client = openai.OpenAI(base_url=f"{sandbox.base_url}/v1", api_key="k", max_retries=0)
    messages = [{"role": "user", "content": "Hello, world!"}]
    with client:
        answer = client.chat.completions.create(model="echo", messages=messages)
        assert answer.choices[0].message.content == "Hello, world!"
        assert answer.usage.total_tokens == 6
        chunks = list(
            client.chat.completions.create(
                model="echo",
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert chunks[-1].usage.total_tokens == 6
        assert len(client.embeddings.create(model="embed-8", input="a").data[0].embedding) == 8
        assert "echo" in {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nope", messages=messages)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="rate-limit-1", messages=messages)


def test_anthropics_client(sandbox):
    client = anthropic.Anthropic(base_url=sandbox.base_url, api_key="k", max_retries=0)
    messages = [{"role": "user", "content": "Hello, world!"}]
    with client:
        answer = client.messages.create(model="claude-echo", max_tokens=100, messages=messages)
        assert answer.content[0].text == "Hello, world!"
        assert answer.usage.output_tokens == 3
        with client.messages.stream(
            model="claude-echo", max_tokens=100, messages=messages
        ) as stream:
            assert "".join(stream.text_stream) == "Hello, world!"
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nope", max_tokens=100, messages=messages)


# Values that fit a schema


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "string"},
        {"type": "string", "maxLength": 2},
        {"type": "string", "format": "date-time"},
        {"type": "string", "minLength": 30},
        {"type": "integer"},
        {"type": "integer", "exclusiveMinimum": 4},
        {"type": "integer", "maximum": -3},
        {"type": "number", "minimum": 0.5},
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["integer", "null"]},
        {"enum": ["a", "b"]},
        {"const": 7},
        {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        {"type": "array", "items": {"type": "integer"}, "minItems": 2},
        {"type": "array"},
        {"properties": {"a": {"type": "integer"}}, "required": ["a", "b"]},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"],
         "$defs": {"x": {"type": "integer"}}},
    ],
)  # fmt: skip
def test_minimal_values_fit_their_schema(schema):
    jsonschema.validate(minimal(schema, schema), schema)


def test_a_schema_that_refers_to_itself_ends():
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    assert minimal(schema, schema)["a"]
    assert minimal({"$ref": "#/nowhere/x"}, {}) is None
    assert minimal(True, {}) is None
