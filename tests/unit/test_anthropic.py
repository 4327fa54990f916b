"""Anthropic's wire format, both ways, against the vendor's documented traffic."""

import json
from pathlib import Path

import orjson
import pytest

from providers import errors, registry
from providers.anthropic import messages_to_wire, model_version, request_to_wire
from providers.anthropic_answers import MessageStream, response_from_wire, usage_from_wire
from providers.base import Account
from providers.faults import error_from_event
from providers.http import Exchange
from providers.sse import Parser
from providers.types import (
    Done,
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
from tests.unit.scripted import EVENTS, Scripted, answer

FIXTURES = Path(__file__).parent / "fixtures" / "anthropic"
TOOL = ToolSpec(name="f", description="F", parameters={"type": "object"}, strict=True)
OLD = {"version": "2023-06-01"}


def load(name):
    return json.loads((FIXTURES / name).read_text())


def parts(*given, role="user"):
    return Message(role=role, parts=given)


def request(*messages, model="claude-sonnet-4-5", **fields):
    return Request(model=model, messages=messages or (parts(Text(text="hi")),), **fields)


def to_wire(*messages, options=None, **fields):
    return request_to_wire(request(*messages, **fields), options or {})


def error(payload):
    return error_from_event(payload, {})


def stream(name):
    reader, messages = Parser(), MessageStream("asked", error)
    events = []
    for event in [*reader.feed((FIXTURES / name).read_bytes()), *reader.finish()]:
        events.extend(messages.feed(event.data))
    return events, messages.finish().response


# To the wire


def test_the_plainest_request():
    assert to_wire() == {
        "model": "claude-sonnet-4-5",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 8192,
    }
    assert to_wire(options={"max_tokens": 100})["max_tokens"] == 100
    assert to_wire(options={"max_tokens": 100}, max_output_tokens=5)["max_tokens"] == 5


def test_every_field_of_a_request():
    body = to_wire(
        tools=(TOOL, ToolSpec(name="g")),
        tool_choice={"name": "f"},
        parallel_tool_calls=False,
        response_format=ResponseFormat(type="json_schema", name="n", schema={"type": "object"}),
        stop=("END",),
        seed=1,
        frequency_penalty=1.0,
        logit_bias={"1": 1},
        service_tier="default",
        user="u",
        extra={
            "speed": "fast",
            "stream": True,
            "messages": "never",
            "output_config": {"effort": "low"},
        },
    )
    del body["messages"]
    assert body == {
        "model": "claude-sonnet-4-5",
        "max_tokens": 8192,
        "speed": "fast",
        "tools": [
            {
                "name": "f",
                "description": "F",
                "input_schema": {"type": "object"},
                "strict": True,
            },
            {"name": "g", "input_schema": {"type": "object", "properties": {}}},
        ],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        "output_config": {
            "effort": "low",
            "format": {"type": "json_schema", "schema": {"type": "object"}},
        },
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u"},
        "service_tier": "standard_only",
    }
    wanted = ResponseFormat(type="json_schema")
    body = to_wire(response_format=wanted, extra={"output_config": "odd"}, service_tier="flex")
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": {}}}
    assert "service_tier" not in body


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, None),
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        (
            {"parallel_tool_calls": True},
            {"type": "auto", "disable_parallel_tool_use": False},
        ),
    ],
)
def test_tool_choices(fields, choice):
    assert to_wire(tools=(TOOL,), **fields).get("tool_choice") == choice


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("claude-opus-5-5", (5, 5)),
        ("claude-sonnet-5", (5, 0)),
        ("claude-haiku-4-5-20251001", (4, 5)),
        ("claude-sonnet-4-20250514", (4, 0)),
        ("claude-opus-4.7", (4, 7)),
        ("claude-3-5-sonnet-20241022", (3, 5)),
        ("claude-3-haiku-20240307", (3, 0)),
        ("anthropic.claude-opus-4-6-v1", (4, 6)),
        ("claude-mythos-preview", (99, 0)),
        ("our-alias", (99, 0)),
    ],
)
def test_model_versions(name, version):
    assert model_version(name) == version


# The models of https://platform.claude.com/docs/en/build-with-claude/thinking, "Sampling
# parameters", and whether each takes a temperature before API version 2026-10-21.
@pytest.mark.parametrize(
    ("model", "takes"),
    [
        ("claude-fable-5-1", False),
        ("claude-mythos-5-1", False),
        ("claude-mythos-preview", False),
        ("claude-opus-5-5", False),
        ("claude-opus-5", False),
        ("claude-opus-4-8", False),
        ("claude-opus-4-7", False),
        ("claude-sonnet-5-5", False),
        ("claude-sonnet-5", False),
        ("claude-haiku-5-5", False),
        ("claude-opus-4-6", True),
        ("claude-sonnet-4-6", True),
        ("claude-haiku-4-5", True),
        ("claude-opus-4-5", True),
    ],
)
def test_sampling_knobs_by_model(model, takes):
    old = to_wire(model=model, temperature=0.3, top_p=0.5, options=OLD)
    assert old.get("temperature") == (0.3 if takes else None)
    assert "top_p" not in old
    new = to_wire(model=model, temperature=0.3, top_p=0.5)
    assert not {"temperature", "top_p", "top_k"} & set(new)


def test_sampling_knobs_of_old_versions():
    assert to_wire(temperature=1.7, options=OLD)["temperature"] == 1.0
    assert to_wire(top_p=0.5, options=OLD)["top_p"] == 0.5
    thinking = {"thinking_budget": 2000, "options": OLD}
    assert "temperature" not in to_wire(temperature=0.3, **thinking)
    assert "top_p" not in to_wire(top_p=0.5, **thinking)
    assert to_wire(top_p=0.97, **thinking)["top_p"] == 0.97
    assert "temperature" not in to_wire(options=OLD)


@pytest.mark.parametrize(
    ("fields", "thinking", "max_tokens"),
    [
        ({}, None, 8192),
        ({"thinking_budget": 0}, None, 8192),
        ({"thinking_budget": 2000}, {"type": "enabled", "budget_tokens": 2000}, 10192),
        ({"thinking_budget": 5}, {"type": "enabled", "budget_tokens": 1024}, 9216),
        (
            {"thinking_budget": 2000, "max_output_tokens": 3000},
            {"type": "enabled", "budget_tokens": 2000},
            3000,
        ),
        (
            {"thinking_budget": 2000, "max_output_tokens": 1500},
            {"type": "enabled", "budget_tokens": 1499},
            1500,
        ),
        ({"thinking_budget": 2000, "max_output_tokens": 1000}, None, 1000),
        ({"reasoning_effort": "high"}, None, 8192),
        ({"model": "claude-opus-5-5"}, None, 8192),
        ({"model": "claude-opus-5-5", "thinking_budget": 2000}, {"type": "adaptive"}, 8192),
        ({"model": "claude-opus-5-5", "reasoning_effort": "high"}, {"type": "adaptive"}, 8192),
        ({"model": "claude-opus-5-5", "reasoning_effort": "none"}, None, 8192),
    ],
)
def test_thinking(fields, thinking, max_tokens):
    body = to_wire(**fields)
    assert body.get("thinking") == thinking
    assert body["max_tokens"] == max_tokens


@pytest.mark.parametrize(
    ("model", "effort", "sent"),
    [
        ("claude-opus-5-5", "minimal", "low"),
        ("claude-opus-5-5", "xhigh", "xhigh"),
        ("claude-opus-5-5", "none", None),
        ("claude-opus-4-6", "xhigh", "high"),
        ("claude-opus-4-6", "max", "max"),
        ("claude-haiku-4-5", "high", None),
    ],
)
def test_effort(model, effort, sent):
    config = to_wire(model=model, reasoning_effort=effort).get("output_config", {})
    assert config.get("effort") == sent


def test_a_whole_conversation():
    system, turns = messages_to_wire(
        (
            parts(Text(text="be brief", cache="1h"), Text(text=""), role="system"),
            parts(
                Image(url="data:image/png;base64,AA==", cache="5m"),
                Image(url="https://example.com/a.png"),
                Text(text="look"),
            ),
            parts(Text(text="again")),
            parts(
                Thinking(text="hm", signature="sig"),
                Thinking(redacted="opaque"),
                Thinking(text="from elsewhere"),
                Text(text="a"),
                Refusal(text="not b"),
                Refusal(text=""),
                ToolCall(id="t1", name="f", arguments='{"x": 1}'),
                ToolCall(id="t2", name="f", arguments=""),
                ToolCall(id="t3", name="f", arguments='{"x": '),
                ToolCall(id="t4", name="f", arguments="[]"),
                role="assistant",
            ),
            parts(Text(text="mid"), role="system"),
            parts(Text(text="first")),
            parts(ToolResult(call_id="t1", content="1", cache="5m"), role="tool"),
            parts(ToolResult(call_id="t2", content="", is_error=True), role="tool"),
            parts(role="assistant"),
        )
    )
    assert system == [
        {
            "type": "text",
            "text": "be brief",
            "cache_control": {"type": "ephemeral", "ttl": "1h"},
        },
        {"type": "text", "text": "mid"},
    ]
    assert turns == [
        {
            "role": "user",
            "content": [
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
                    "cache_control": {"type": "ephemeral", "ttl": "5m"},
                },
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
                {"type": "text", "text": "look"},
                {"type": "text", "text": "again"},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "sig"},
                {"type": "redacted_thinking", "data": "opaque"},
                {"type": "text", "text": "a"},
                {"type": "text", "text": "not b"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
                {
                    "type": "tool_use",
                    "id": "t3",
                    "name": "f",
                    "input": {"INVALID_JSON": '{"x": '},
                },
                {"type": "tool_use", "id": "t4", "name": "f", "input": {"INVALID_JSON": "[]"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": "1",
                    "cache_control": {"type": "ephemeral", "ttl": "5m"},
                },
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "text", "text": "first"},
            ],
        },
    ]
    assert to_wire(parts(Text(text="s"), role="system"), parts(Text(text="u")))["system"] == [
        {"type": "text", "text": "s"}
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, None),
        ({"logprobs": False, "response_format": ResponseFormat(type="text")}, None),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": ResponseFormat(type="json_object")}, "response_format"),
        ({"messages": (parts(Image(url="https://a")),)}, None),
        ({"messages": (parts(Image(url="https://a"), role="assistant"),)}, "messages"),
        ({"messages": (parts(Image(url="data:image/tiff;base64,AA==")),)}, "messages"),
        ({"messages": (parts(ToolCall(id="1", name="f", arguments="")),)}, "messages"),
        ({"messages": (parts(ToolResult(call_id="1", content="")),)}, None),
        (
            {"messages": (parts(ToolResult(call_id="1", content=""), role="assistant"),)},
            "messages",
        ),
    ],
)
def test_what_is_unsupported(fields, field):
    provider = registry.build("anthropic", Account(name="a", base_url=""))
    given = {"model": "m", "messages": (), **fields}
    assert provider.unsupported(Request(**given)) == field


def test_an_image_that_can_not_be_sent_is_refused_before_sending():
    with pytest.raises(errors.Unsupported) as caught:
        to_wire(parts(Image(url="data:image/tiff;base64,AA==")))
    assert caught.value.param == "messages"


# From the wire


def test_a_message():
    response = response_from_wire(load("message.json"), "asked")
    assert response.parts == (Text(text="Hi! My name is Claude."),)
    assert (response.id, response.model) == ("msg_013Zva2CMHLNnXjNJJKqJ2EF", "claude-opus-5-5")
    assert (response.finish_reason, response.service_tier) == ("stop", "standard")
    assert response.usage == Usage(
        input_tokens=2095,
        cached_input_tokens=1800,
        cache_write_5m_tokens=456,
        cache_write_1h_tokens=100,
        output_tokens=383,
        reasoning_tokens=120,
    )
    assert response.raw_usage["service_tier"] == "standard"


def test_a_tool_call():
    response = response_from_wire(load("tool_use.json"), "asked")
    assert response.text == "I'll check the current weather in San Francisco for you."
    (call,) = response.tool_calls
    assert (call.id, call.name) == ("toolu_01A09q90qw90lq917835lq9", "get_weather")
    assert json.loads(call.arguments) == {"location": "San Francisco, CA", "unit": "celsius"}
    assert response.finish_reason == "tool_calls"


def test_thinking_comes_back_as_it_must_be_sent_again():
    response = response_from_wire(load("thinking.json"), "asked")
    thought, redacted, text = response.parts
    assert thought.text == "Let me analyze this step by step..."
    assert redacted == Thinking(
        redacted="EmwKAhgBEgy3va3pzix/LafPsn4aDFIT2Xlxh0L5L8rLVyIwxtE3rAFBa8cr3qpP"
    )
    assert text == Text(text="Based on my analysis...")
    assert response.usage == Usage(input_tokens=10, cache_write_5m_tokens=7, output_tokens=20)
    _, turns = messages_to_wire((Message(role="assistant", parts=response.parts),))
    given = [
        block for block in load("thinking.json")["content"] if block["type"] != "server_tool_use"
    ]
    assert turns[0]["content"] == given


def test_a_refusal():
    response = response_from_wire(load("refusal.json"), "asked")
    assert response.parts == (Refusal(text="This request was declined."),)
    assert response.finish_reason == "content_filter"


def whole(*content, **fields):
    return {"content": list(content), "stop_reason": "end_turn", **fields}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("pause_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("something_new", "stop"),
    ],
)
def test_stop_reasons(theirs, ours):
    assert response_from_wire(whole(stop_reason=theirs), "m").finish_reason == ours


def test_an_answer_with_the_least_in_it():
    response = response_from_wire(whole({"type": "text", "text": ""}, {"type": "new"}), "asked")
    assert (response.id, response.model, response.parts) == ("", "asked", ())
    assert (response.usage, response.raw_usage) == (None, None)
    response = response_from_wire(whole(usage={"service_tier": "batch"}), "asked")
    assert (response.usage, response.service_tier) == (None, "batch")


@pytest.mark.parametrize(
    "body",
    [
        {},
        whole(content=None),
        whole(content="x"),
        whole(1),
        whole({"type": "text"}),
        whole({"type": "thinking", "thinking": "x", "signature": 1}),
        whole({"type": "thinking"}),
        whole({"type": "redacted_thinking"}),
        whole({"type": "tool_use", "id": "a", "name": "f", "input": "{}"}),
        whole({"type": "tool_use", "id": "a", "input": {}}),
        whole({"type": "tool_use", "name": "f", "input": {}}),
        whole(stop_reason=None),
        whole(stop_details=[]),
        whole(stop_details={"explanation": 1}),
        whole(id=1),
        whole(model=[]),
        whole(usage="x"),
        whole(usage={"input_tokens": -1}),
        whole(usage={"input_tokens": 1, "output_tokens": "1"}),
        whole(usage={"input_tokens": 1, "cache_creation": 1}),
        whole(usage={"input_tokens": 1, "cache_read_input_tokens": 1.5}),
        whole(usage={"input_tokens": 1, "service_tier": 1}),
    ],
)
def test_answers_that_are_not_documented(body):
    with pytest.raises(errors.BadResponse):
        response_from_wire(body, "m")


def test_usage_that_does_not_add_up():
    usage = usage_from_wire(
        {
            "input_tokens": 1,
            "output_tokens": 5,
            "cache_creation_input_tokens": 10,
            "cache_creation": {"ephemeral_5m_input_tokens": 99, "ephemeral_1h_input_tokens": 30},
            "output_tokens_details": {"thinking_tokens": 50},
        }
    )
    assert usage == Usage(input_tokens=1, cache_write_1h_tokens=10, reasoning_tokens=5)
    lifetimes = {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 3}
    usage = usage_from_wire({"input_tokens": 1, "cache_creation": lifetimes})
    assert (usage.cache_write_5m_tokens, usage.cache_write_1h_tokens) == (2, 3)


# Streams


def test_a_stream():
    events, response = stream("stream.sse")
    assert events == [TextDelta(text="Hello"), TextDelta(text="!")]
    assert response.parts == (Text(text="Hello!"),)
    assert response.usage == Usage(input_tokens=25, cached_input_tokens=100, output_tokens=15)
    assert (response.finish_reason, response.model) == ("stop", "claude-opus-5-5")


def test_a_stream_with_tool_calls():
    events, response = stream("stream_tools.sse")
    assert events == [
        TextDelta(text="Okay, let's check:"),
        ToolCallDelta(index=0, id="toolu_01T1x1fJ34qAmk2tNTrN7Up6", name="get_weather"),
        ToolCallDelta(index=0, arguments='{"location":'),
        ToolCallDelta(index=0, arguments=' "San Francisco, CA"}'),
        ToolCallDelta(index=1, id="toolu_02", name="get_time"),
    ]
    assert [call.arguments for call in response.tool_calls] == [
        '{"location": "San Francisco, CA"}',
        "{}",
    ]
    assert response.finish_reason == "tool_calls"
    assert response.usage.output_tokens == 89


def test_a_stream_with_thinking():
    events, response = stream("stream_thinking.sse")
    assert events == [
        ThinkingDelta(text="I need to find the GCD"),
        TextDelta(text="The"),
        TextDelta(text=" GCD is 21"),
    ]
    assert response.parts == (
        Thinking(
            text="I need to find the GCD",
            signature="EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pkiMOYds...",
        ),
        Thinking(redacted="EmwKAhgB"),
        Text(text="The GCD is 21"),
    )
    assert response.finish_reason == "length"
    assert response.usage == Usage(
        input_tokens=5, cache_write_1h_tokens=10, output_tokens=20, reasoning_tokens=30
    )


def test_streams_that_do_not_end_well():
    with pytest.raises(errors.Overloaded) as caught:
        stream("stream_error.sse")
    assert caught.value.code == "overloaded_error"
    with pytest.raises(errors.BadResponse, match="without message_stop"):
        MessageStream("m", error).finish()
    messages = MessageStream("m", error)
    list(messages.feed('{"type": "message_stop"}'))
    with pytest.raises(errors.BadResponse, match="stop_reason"):
        messages.finish()


def start(index=0, **block):
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index=0, **fields):
    return {"type": "content_block_delta", "index": index, "delta": fields}


@pytest.mark.parametrize(
    "events",
    [
        ["not JSON"],
        [{"type": "message_start"}],
        [{"type": "message_start", "message": {"usage": 1}}],
        [{"type": "message_delta"}],
        [start("0", type="text")],
        [{"type": "content_block_start", "index": 0}],
        [start(type="text", text=1)],
        [start(type="tool_use", name="f", input={})],
        [start(type="tool_use", id="a", input={})],
        [start(type="tool_use", id="a", name="f", input=[])],
        [delta(type="text_delta", text="a")],
        [start(type="text", text=""), delta(type="text_delta", text=1)],
        [start(type="text", text=""), delta(type="text_delta")],
        [start(type="text", text=""), {"type": "content_block_delta", "index": 0}],
        [start(type="thinking", thinking=""), delta(type="signature_delta", signature=1)],
    ],
)
def test_events_that_are_not_documented(events):
    messages = MessageStream("m", error)
    with pytest.raises(errors.BadResponse):
        for event in events:
            list(messages.feed(event if isinstance(event, str) else json.dumps(event)))


def test_deltas_of_new_types_and_in_the_wrong_block_are_passed_over():
    messages = MessageStream("m", error)
    told = []
    for event in (
        start(type="text", text=""),
        delta(type="new_delta", text="x"),
        delta(type=["odd"]),
        delta(type="input_json_delta", partial_json="x"),
        start(1, type="new_block"),
        delta(1, type="text_delta", text="x"),
        start(2, type="tool_use", id="a", name="f", input={"x": 1}),
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
        {"type": "message_stop"},
    ):
        told += messages.feed(json.dumps(event))
    assert told == [ToolCallDelta(index=0, id="a", name="f")]
    response = messages.finish().response
    assert response.parts == (ToolCall(id="a", name="f", arguments='{"x":1}'),)


# Over HTTP


def script(data):
    def serve(peer, _number):
        peer.read()
        peer.send(data)

    return serve


def provider(server, **fields):
    base_url = server.base_url.removesuffix("/v1")
    return registry.build("anthropic", Account(name="a", base_url=base_url, **fields))


def test_a_message_over_http():
    with Scripted(script(answer((FIXTURES / "message.json").read_bytes()))) as server:
        response = provider(server, api_key="sk-ant-1").complete(request(), Exchange())
        head = server.requests[0].split(b"\r\n")
    assert response.text == "Hi! My name is Claude."
    assert head[0] == b"POST /v1/messages HTTP/1.1"
    assert b"x-api-key: sk-ant-1" in head
    assert b"anthropic-version: 2026-10-21" in head


def test_a_stream_over_http():
    data = (FIXTURES / "stream.sse").read_bytes()
    reply = EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data
    with Scripted(script(reply)) as server:
        options = {"version": "2023-06-01", "headers": {"anthropic-beta": "x"}}
        exchange = Exchange()
        events = list(provider(server, options=options).stream(request(), exchange))
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert orjson.loads(body)["stream"] is True
    assert b"anthropic-version: 2023-06-01" in head.split(b"\r\n")
    assert b"anthropic-beta: x" in head.split(b"\r\n")
    assert b"x-api-key" not in head
    assert isinstance(events[-1], Done)
    assert exchange.first_byte_at


def test_a_stream_that_came_whole():
    with Scripted(script(answer((FIXTURES / "thinking.json").read_bytes()))) as server:
        events = list(provider(server).stream(request(), Exchange()))
    assert events[:-1] == [
        ThinkingDelta(text="Let me analyze this step by step..."),
        TextDelta(text="Based on my analysis..."),
    ]


def test_an_error_that_came_with_status_200():
    body = b'{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}'
    with Scripted(script(answer(body))) as server:
        with pytest.raises(errors.Overloaded):
            provider(server).complete(request(), Exchange())


def test_a_stream_that_is_cut_short():
    data = (FIXTURES / "stream.sse").read_bytes().partition(b"event: message_stop")[0]
    reply = EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data
    with Scripted(script(reply)) as server:
        with pytest.raises(errors.BadResponse, match="without message_stop"):
            list(provider(server).stream(request(), Exchange()))
