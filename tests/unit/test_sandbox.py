"""The sandbox behaves like a vendor, over real HTTP, and counts what it did."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from providers import errors, http, registry, sandbox_calls
from providers.base import Account
from providers.http import Exchange
from providers.sandbox import Sandbox
from providers.sandbox_answers import tokens, vector
from providers.types import (
    EmbeddingRequest,
    Message,
    ResponseFormat,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    ToolSpec,
    Usage,
)
from tests.unit.exchanges import chat, until

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


@pytest.fixture(params=["compatible", "anthropic"])
def provider(request, sandbox):
    return build(request.param, sandbox)


def build(adapter, sandbox, key="any"):
    url = sandbox.base_url + ("" if adapter == "anthropic" else "/v1")
    return registry.build(adapter, Account(name="sandbox", base_url=url, api_key=key))


def task(name, number=1):
    return Exchange(headers={"X-Client-Request-Id": f"{name}.{number}"})


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


def test_the_oldest_tasks_are_forgotten(monkeypatch):
    monkeypatch.setattr(sandbox_calls, "MAX_TASKS", 3)
    with Sandbox() as server:
        provider = build("compatible", server)
        for number in range(5):
            provider.complete(chat("echo"), task(f"t{number}"))
        assert list(server.calls()["tasks"]) == ["t2", "t3", "t4"]
        assert server.calls()["calls"] == 5
        assert server.calls("t0")["calls"] == 0
