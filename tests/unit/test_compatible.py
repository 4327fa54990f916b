"""OpenAI's wire format, both ways, against the vendors' documented traffic."""

import json
from pathlib import Path

import orjson
import pytest

from providers import errors, registry
from providers.base import Account
from providers.compatible import Flavour, embeddings_from_wire, request_to_wire
from providers.compatible_answers import ChatStream, response_from_wire, usage_from_wire
from providers.faults import error_from_event
from providers.http import Exchange
from providers.sse import Parser
from providers.types import (
    Done,
    EmbeddingRequest,
    Image,
    Message,
    Refusal,
    Request,
    ResponseFormat,
    Text,
    TextDelta,
    Thinking,
    ThinkingDelta,
    ToolCall,
    ToolCallDelta,
    ToolResult,
    ToolSpec,
    Usage,
)
from tests.unit.scripted import EVENTS, OK, Scripted, answer

FIXTURES = Path(__file__).parent / "fixtures" / "openai"
TOOL = ToolSpec(name="get_weather", description="Weather", parameters={"type": "object"})


def load(name):
    return json.loads((FIXTURES / name).read_text())


def parts(*given, role="user", name=None):
    return Message(role=role, parts=given, name=name)


def request(*messages, **fields):
    messages = messages or (parts(Text(text="hi")),)
    return Request(**{"model": "m", "messages": messages, **fields})


def to_wire(*messages, flavour=None, **fields):
    return request_to_wire(request(*messages, **fields), flavour or Flavour())


def error(payload):
    return error_from_event(payload, {})


def stream(name):
    reader, chats = Parser(), ChatStream("asked", error)
    events = []
    for event in [*reader.feed((FIXTURES / name).read_bytes()), *reader.finish()]:
        if event.data == "[DONE]":
            break
        events.extend(chats.feed(event.data))
    return events, chats.finish()


# To the wire


def test_the_plainest_request():
    assert to_wire() == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_every_field_of_a_request():
    body = to_wire(
        tools=(TOOL, ToolSpec(name="b", strict=True)),
        tool_choice={"name": "get_weather"},
        parallel_tool_calls=False,
        max_output_tokens=9,
        temperature=0.0,
        top_p=0.5,
        stop=("a", "b"),
        seed=1,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        logit_bias={"5": 1},
        logprobs=True,
        top_logprobs=3,
        reasoning_effort="low",
        thinking_budget=100,
        service_tier="flex",
        user="u",
        extra={"verbosity": "low", "model": "never", "stream": True, "n": 9},
    )
    del body["messages"]
    assert body == {
        "model": "m",
        "verbosity": "low",
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "Weather",
                    "parameters": {"type": "object"},
                },
            },
            {
                "type": "function",
                "function": {
                    "name": "b",
                    "parameters": {"type": "object", "properties": {}},
                    "strict": True,
                },
            },
        ],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "stop": ["a", "b"],
        "seed": 1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "logit_bias": {"5": 1},
        "logprobs": True,
        "top_logprobs": 3,
        "reasoning_effort": "low",
        "service_tier": "flex",
        "user": "u",
    }


def test_the_limits_name_is_the_servers():
    flavour = Flavour(max_tokens_field="max_completion_tokens")
    assert to_wire(flavour=flavour, max_output_tokens=9)["max_completion_tokens"] == 9
    assert to_wire(tools=(TOOL,), tool_choice="required")["tool_choice"] == "required"


@pytest.mark.parametrize(
    ("wanted", "wired"),
    [
        (ResponseFormat(type="text"), {"type": "text"}),
        (ResponseFormat(type="json_object"), {"type": "json_object"}),
        (
            ResponseFormat(type="json_schema"),
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": {}}},
        ),
        (
            ResponseFormat(
                type="json_schema", name="n", schema={"a": 1}, strict=True, description="d"
            ),
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "schema": {"a": 1},
                    "strict": True,
                    "description": "d",
                },
            },
        ),
    ],
)
def test_formats(wanted, wired):
    assert to_wire(response_format=wanted)["response_format"] == wired


def test_a_whole_conversation():
    call = ToolCall(id="c1", name="f", arguments="{}")
    messages = to_wire(
        parts(Text(text="be brief"), Text(text="be kind"), role="system"),
        parts(
            Text(text="look"),
            Image(url="data:image/png;base64,AA==", detail="low"),
            Image(url="https://example.com/a.png"),
            name="ann",
        ),
        parts(Thinking(text="hm", signature="s"), Text(text="a"), Text(text="b"), call,
              role="assistant"),
        parts(ToolResult(call_id="c1", content="1", is_error=True),
              ToolResult(call_id="c2", content="2"), role="tool"),
        parts(ToolResult(call_id="c3", content="3"), Text(text="and?")),
        parts(call, role="assistant"),
        parts(Refusal(text="no"), role="assistant"),
        parts(role="assistant"),
        parts(role="user"),
        parts(Text(text="misplaced"), call),
    )["messages"]  # fmt: skip
    wired_call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert messages == [
        {
            "role": "system",
            "content": [{"type": "text", "text": "be brief"}, {"type": "text", "text": "be kind"}],
        },
        {
            "role": "user",
            "name": "ann",
            "content": [
                {"type": "text", "text": "look"},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"},
                },
                {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            ],
        },
        {"role": "assistant", "content": "ab", "tool_calls": [wired_call]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "tool", "tool_call_id": "c3", "content": "3"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": None, "tool_calls": [wired_call]},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "misplaced"}]},
    ]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (parts(Text(text="a"), Image(url="https://a")), None),
        (parts(ToolCall(id="1", name="f", arguments=""), role="assistant"), None),
        (parts(Image(url="https://a"), role="system"), "messages"),
        (parts(ToolCall(id="1", name="f", arguments="")), "messages"),
        (parts(Refusal(text="a")), "messages"),
        (parts(Text(text="a"), role="tool"), "messages"),
    ],
)
def test_what_is_unsupported(message, field):
    provider = registry.build("openai", Account(name="a", base_url=""))
    assert provider.unsupported(request(message)) == field


# From the wire


def test_a_chat():
    response = response_from_wire(load("chat.json"), "asked")
    assert response.text == "Hello! How can I assist you today?"
    assert response.finish_reason == "stop"
    assert (response.id, response.model) == ("chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT", "gpt-5.4")
    assert response.service_tier == "default"
    assert response.logprobs is None
    assert response.usage == Usage(
        input_tokens=22,
        cached_input_tokens=1920,
        cache_write_5m_tokens=64,
        output_tokens=108,
        reasoning_tokens=192,
    )
    assert response.usage.total_input_tokens == 2006
    assert response.usage.total_output_tokens == 300
    assert response.raw_usage["prompt_tokens_details"]["cached_tokens"] == 1920


def test_a_tool_call():
    response = response_from_wire(load("chat_tools.json"), "asked")
    assert response.parts == (
        ToolCall(
            id="call_abc123",
            name="get_current_weather",
            arguments='{\n"location": "Boston, MA"\n}',
        ),
    )
    assert response.finish_reason == "tool_calls"


def test_a_tool_call_without_id_and_with_arguments_as_an_object():
    response = response_from_wire(load("chat_ollama_tools.json"), "asked")
    (call,) = response.tool_calls
    assert call.id.startswith("call_")
    assert len(call.id) > 20
    assert json.loads(call.arguments) == {"city": "Paris"}
    assert response.finish_reason == "tool_calls"


def test_a_refusal_logprobs_and_reasoning():
    refused = response_from_wire(load("chat_refusal.json"), "asked")
    assert refused.parts == (Refusal(text="I'm sorry, I cannot assist with that request."),)
    told = response_from_wire(load("chat_logprobs.json"), "asked")
    assert told.logprobs["content"][0]["token"] == "Hello"
    assert told.finish_reason == "length"
    thought = response_from_wire(load("chat_vllm_reasoning.json"), "asked")
    assert thought.parts == (
        Thinking(text="9.11 or 9.8: compare the tenths."),
        Text(text="9.8 is greater."),
    )


def whole(message=None, **fields):
    choice = {"message": message or {"content": "a"}, "finish_reason": "stop"}
    return {"choices": [{**choice, **fields.pop("choice", {})}], **fields}


def test_an_answer_with_the_least_in_it():
    response = response_from_wire(whole(), "asked")
    assert (response.id, response.model, response.usage) == ("", "asked", None)


def test_content_in_parts():
    content = [{"type": "text", "text": "a"}, {"type": "other"}, {"type": "text", "text": "b"}]
    message = {"content": content, "reasoning_content": "r"}
    assert response_from_wire(whole(message), "m").parts == (Thinking(text="r"), Text(text="ab"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("length", "length"), ("content_filter", "content_filter"), ("function_call", "tool_calls"),
     ("eos", "stop")],
)  # fmt: skip
def test_finish_reasons(theirs, ours):
    choice = {"finish_reason": theirs}
    assert response_from_wire(whole(choice=choice), "m").finish_reason == ours


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"choices": None},
        {"choices": []},
        {"choices": "x"},
        {"choices": [1]},
        {"choices": [{}]},
        whole({"content": 1}),
        whole({"content": [1]}),
        whole({"content": [{"type": "text"}]}),
        whole({"reasoning": 1}),
        whole({"refusal": 1}),
        whole({"tool_calls": {}}),
        whole({"tool_calls": [1]}),
        whole({"tool_calls": [{}]}),
        whole({"tool_calls": [{"function": {}}]}),
        whole({"tool_calls": [{"function": {"name": ""}}]}),
        whole({"tool_calls": [{"function": {"name": "f", "arguments": 1}}]}),
        whole({"tool_calls": [{"id": 1, "function": {"name": "f", "arguments": ""}}]}),
        whole(choice={"finish_reason": None}),
        whole(choice={"finish_reason": "error"}),
        whole(choice={"finish_reason": "abort"}),
        whole(choice={"logprobs": []}),
        whole(usage="x"),
        whole(usage={"prompt_tokens": -1}),
        whole(usage={"prompt_tokens": "1"}),
        whole(usage={"completion_tokens": 1.5}),
        whole(usage={"prompt_tokens": 1, "prompt_tokens_details": []}),
        whole(id=1),
        whole(model=1),
        whole(service_tier=1),
    ],
)
def test_answers_that_are_not_documented(body):
    with pytest.raises(errors.BadResponse):
        response_from_wire(body, "m")


def test_usage_where_details_exceed_the_totals():
    usage, _ = usage_from_wire(
        {
            "usage": {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 8},
                "completion_tokens_details": {"reasoning_tokens": 50},
            }
        }
    )
    assert usage == Usage(cached_input_tokens=8, cache_write_5m_tokens=2, reasoning_tokens=5)
    assert usage_from_wire({"usage": {"cost": 1}}) == (None, {"cost": 1})


# Streams


def test_a_stream():
    events, response = stream("stream.sse")
    assert events == [TextDelta(text="Hello"), TextDelta(text=" there")]
    assert response.parts == (Text(text="Hello there"),)
    assert response.usage == Usage(input_tokens=19, output_tokens=6, reasoning_tokens=4)
    assert (response.id, response.model) == ("chatcmpl-123", "gpt-5.4-mini")
    assert [token["token"] for token in response.logprobs["content"]] == ["Hello", " there"]
    assert response.service_tier == "default"


def test_a_stream_with_tool_calls():
    events, response = stream("stream_tools.sse")
    assert events == [
        ToolCallDelta(index=0, id="call_a", name="get_weather"),
        ToolCallDelta(index=0, arguments='{"city":'),
        ToolCallDelta(index=0, arguments=' "Paris"}'),
        ToolCallDelta(index=1, id="call_b", name="get_time", arguments="{}"),
    ]
    assert response.tool_calls == (
        ToolCall(id="call_a", name="get_weather", arguments='{"city": "Paris"}'),
        ToolCall(id="call_b", name="get_time", arguments="{}"),
    )
    assert response.finish_reason == "tool_calls"
    assert response.usage is None


def test_calls_that_all_have_index_0_are_told_apart_by_id():
    events, response = stream("stream_ollama_tools.sse")
    assert events[0] == ThinkingDelta(text="Two cities.")
    assert [(event.index, event.id) for event in events[1:]] == [(0, "call_x"), (1, "call_y")]
    assert [json.loads(call.arguments)["city"] for call in response.tool_calls] == ["Paris", "Rome"]
    assert response.finish_reason == "tool_calls"
    assert response.parts[0] == Thinking(text="Two cities.")


def test_azures_filter_ends_a_stream():
    events, response = stream("stream_azure.sse")
    assert events == [TextDelta(text="Once upon")]
    assert (response.finish_reason, response.model) == ("content_filter", "gpt-4o-2024-11-20")


def feed(*deltas, finish="stop"):
    chats = ChatStream("m", error)
    events = []
    for delta in deltas:
        events += chats.feed(json.dumps({"choices": [{"delta": delta}]}))
    events += chats.feed(json.dumps({"choices": [{"finish_reason": finish}]}))
    return events, chats.finish()


def call_delta(**fields):
    return {"tool_calls": [fields]}


def test_calls_without_ids_or_indexes():
    events, response = feed(
        call_delta(function={"arguments": '{"a"'}),
        call_delta(function={"name": "f", "arguments": ":1}"}),
        call_delta(function=None),
    )
    (call,) = response.tool_calls
    assert (call.name, call.arguments) == ("f", '{"a":1}')
    assert [(event.name, event.arguments) for event in events] == [("f", '{"a":1}')]
    events, response = feed(
        call_delta(id="a", function={"name": "f", "arguments": {"x": 1}}),
        call_delta(id="a", function={"name": "f", "arguments": ""}),
        call_delta(id="b", function={"name": "g"}),
    )
    assert [(call.id, call.name) for call in response.tool_calls] == [("a", "f"), ("b", "g")]
    assert [call.arguments for call in response.tool_calls] == ['{"x":1}', "{}"]


def test_a_refusal_in_a_stream():
    events, response = feed({"refusal": "I can"}, {"refusal": "not."})
    assert events == []
    assert response.parts == (Refusal(text="I cannot."),)


@pytest.mark.parametrize(
    "chunk",
    [
        "not JSON",
        "[]",
        {"choices": {}},
        {"choices": [1]},
        {"choices": [{"delta": []}]},
        {"choices": [{"delta": {"content": 1}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": "0", "function": {}}]}}]},
        {"choices": [{"delta": {"tool_calls": [1]}}]},
        {"choices": [{"logprobs": {"content": 1}}]},
        {"choices": [{"finish_reason": 1}]},
        {"usage": 1},
        {"id": 1},
    ],
)
def test_chunks_that_are_not_documented(chunk):
    with pytest.raises(errors.BadResponse):
        list(ChatStream("m", error).feed(chunk if isinstance(chunk, str) else json.dumps(chunk)))


def test_streams_that_do_not_end_well():
    with pytest.raises(errors.ServerError, match="had an error"):
        stream("stream_error.sse")
    with pytest.raises(errors.BadResponse, match="without a finish reason"):
        ChatStream("m", error).finish()
    with pytest.raises(errors.BadResponse, match="no name"):
        feed(call_delta(id="a"))
    with pytest.raises(errors.BadResponse, match="1024 tool calls"):
        feed(*(call_delta(id=str(number)) for number in range(1025)))
    with pytest.raises(errors.InvalidRequest):
        list(ChatStream("m", error).feed('{"object": "error", "code": 400, "message": "no"}'))


# Over HTTP


def script(*answers):
    def serve(peer, _number):
        for data in answers:
            peer.read()
            peer.send(data)

    return serve


def sse(name):
    data = (FIXTURES / name).read_bytes()
    return EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data


def sent(server, number=0):
    return orjson.loads(server.requests[number].partition(b"\r\n\r\n")[2])


def test_a_stream_over_http():
    with Scripted(script(sse("stream.sse"))) as server:
        provider = registry.build("openai", Account(name="a", base_url=server.base_url))
        exchange = Exchange()
        events = list(provider.stream(request(), exchange))
        assert sent(server)["stream"] is True
        assert sent(server)["stream_options"] == {"include_usage": True}
        assert b"Authorization" not in server.requests[0]
    assert events[:2] == [TextDelta(text="Hello"), TextDelta(text=" there")]
    assert isinstance(events[-1], Done)
    assert exchange.first_byte_at


def test_a_stream_that_came_whole():
    data = (FIXTURES / "chat_tools.json").read_bytes()
    with Scripted(script(answer(data))) as server:
        options = {"stream_usage": False}
        account = Account(name="a", base_url=server.base_url, options=options)
        *deltas, done = registry.build("vllm", account).stream(request(), Exchange())
        assert "stream_options" not in sent(server)
    assert deltas == [
        ToolCallDelta(
            index=0, id="call_abc123", name="get_current_weather",
            arguments='{\n"location": "Boston, MA"\n}',
        )
    ]  # fmt: skip
    assert done.response.finish_reason == "tool_calls"


def test_a_stream_without_done_counts_once_it_has_a_finish_reason():
    with Scripted(script(sse("stream_ollama_tools.sse").replace(b"data: [DONE]", b":           "))):
        pass
    data = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    reply = EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data
    with Scripted(script(reply)) as server:
        provider = registry.build("vllm", Account(name="a", base_url=server.base_url))
        *_, done = provider.stream(request(), Exchange())
    assert done.response.text == "a"


def test_azures_paths_and_key():
    data = (FIXTURES / "chat.json").read_bytes()
    with Scripted(script(answer(data), answer(data))) as server:
        root = server.base_url.removesuffix("/v1")
        options = {"deployments": True, "api_version": "2024-10-21"}
        old = Account(name="a", base_url=root, api_key="key1", options=options)
        registry.build("azure", old).complete(request(model="my gpt/4"), Exchange())
        new = Account(name="a", base_url=f"{root}/openai/v1", api_key="key1")
        registry.build("azure", new).complete(request(), Exchange())
        first, second = (data.split(b"\r\n") for data in server.requests)
    assert first[0] == (
        b"POST /openai/deployments/my%20gpt%2F4/chat/completions?api-version=2024-10-21 HTTP/1.1"
    )
    assert b"api-key: key1" in first
    assert second[0] == b"POST /openai/v1/chat/completions HTTP/1.1"


def test_openais_account_headers():
    data = (FIXTURES / "chat.json").read_bytes()
    with Scripted(script(answer(data))) as server:
        options = {"organization": "org-1", "project": "proj_1"}
        account = Account(name="a", base_url=server.base_url, api_key="k", options=options)
        registry.build("openai", account).complete(request(), Exchange())
        head = server.requests[0].split(b"\r\n")
    assert b"OpenAI-Organization: org-1" in head
    assert b"OpenAI-Project: proj_1" in head


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"code": 429, "message": "slow down, sk-secret"}}',
        b'{"object": "error", "code": 429, "message": "slow down, sk-secret"}',
    ],
)
def test_an_error_that_came_with_status_200(body):
    with Scripted(script(answer(body), answer(body), answer(body))) as server:
        account = Account(name="a", base_url=server.base_url, api_key="sk-secret")
        provider = registry.build("openai", account)
        for run in (
            lambda: provider.complete(request(), Exchange()),
            lambda: list(provider.stream(request(), Exchange())),
            lambda: provider.embed(EmbeddingRequest(model="m", inputs=("a",)), Exchange()),
        ):
            with pytest.raises(errors.RateLimited, match=r"slow down, \[key\]"):
                run()


def test_a_key_that_a_stream_echoes_is_not_told():
    data = b'data: {"error": {"code": 401, "message": "bad key sk-secret"}}\n\n'
    reply = EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data
    with Scripted(script(reply)) as server:
        account = Account(name="a", base_url=server.base_url, api_key="sk-secret")
        with pytest.raises(errors.AuthenticationFailed, match=r"bad key \[key\]"):
            list(registry.build("openai", account).stream(request(), Exchange()))


# Embeddings


def test_embeddings_over_http():
    with Scripted(script(answer((FIXTURES / "embeddings.json").read_bytes()))) as server:
        provider = registry.build("openai", Account(name="a", base_url=server.base_url))
        wanted = EmbeddingRequest(model="m", inputs=("a", (1, 2)), dimensions=2, user="u")
        response = provider.embed(wanted, Exchange())
        assert sent(server) == {
            "model": "m",
            "input": ["a", [1, 2]],
            "encoding_format": "base64",
            "dimensions": 2,
            "user": "u",
        }
    assert response.vectors == ((0.5, -0.25), (1.0, 0.0))
    assert response.model == "text-embedding-3-small"
    assert response.usage == Usage(input_tokens=8)


def vectors(*items, **fields):
    return {"data": list(items), **fields}


@pytest.mark.parametrize(
    "body",
    [
        {},
        vectors(),
        vectors(1),
        vectors({"embedding": []}),
        vectors({"embedding": "***"}),
        vectors({"embedding": "AAAA"}),
        vectors({"embedding": "é"}),
        vectors({"embedding": "AADAfw=="}),
        vectors({"embedding": [1], "index": 1}),
        vectors({"embedding": [1], "index": "0"}),
        vectors({"embedding": [1]}, {"embedding": [1]}),
        vectors({"embedding": [1]}, usage=1),
        vectors({"embedding": [1]}, usage={"prompt_tokens": -1}),
        vectors({"embedding": [1]}, model=1),
    ],
)
def test_embeddings_that_are_not_documented(body):
    with pytest.raises(errors.BadResponse):
        embeddings_from_wire(body, EmbeddingRequest(model="m", inputs=("a",)))


def test_embeddings_without_usage():
    wanted = EmbeddingRequest(model="m", inputs=("a",))
    response = embeddings_from_wire(vectors({"embedding": [1]}), wanted)
    assert (response.vectors, response.usage, response.model) == (((1.0,),), None, "m")


def test_the_head_of_a_whole_answer_may_name_a_charset():
    head = OK.replace(b"application/json", b"application/json; charset=utf-8")
    data = (FIXTURES / "chat.json").read_bytes()
    with Scripted(script(answer(data, head))) as server:
        provider = registry.build("openai", Account(name="a", base_url=server.base_url))
        *_, done = provider.stream(request(), Exchange())
    assert done.response.text.startswith("Hello!")
