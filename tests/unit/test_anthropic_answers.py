"""What Anthropic's API answers, whole and streamed, by the vendor's documented traffic."""

import json
from pathlib import Path

import pytest

from providers import errors
from providers.anthropic import messages_to_wire
from providers.anthropic_answers import MessageStream, response_from_wire, usage_from_wire
from providers.faults import error_from_event
from providers.sse import Parser
from providers.types import (
    Message,
    Refusal,
    Text,
    TextDelta,
    Thinking,
    ThinkingDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)

FIXTURES = Path(__file__).parent / "fixtures" / "anthropic"


def load(name):
    return json.loads((FIXTURES / name).read_text())


def error(payload):
    return error_from_event(payload, {})


def stream(name):
    reader, messages = Parser(), MessageStream("asked", error)
    events = []
    for event in [*reader.feed((FIXTURES / name).read_bytes()), *reader.finish()]:
        events.extend(messages.feed(event.data))
    return events, messages.finish().response


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
