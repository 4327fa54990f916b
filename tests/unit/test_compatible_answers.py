"""What APIs in OpenAI's format answer, whole and streamed, by the vendors' documented traffic."""

import json
from pathlib import Path

import pytest

from providers import errors
from providers.compatible import embeddings_from_wire
from providers.compatible_answers import ChatStream, response_from_wire, usage_from_wire
from providers.faults import error_from_event
from providers.sse import Parser
from providers.types import (
    EmbeddingRequest,
    Refusal,
    Text,
    TextDelta,
    Thinking,
    ThinkingDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)

FIXTURES = Path(__file__).parent / "fixtures" / "openai"


def load(name):
    return json.loads((FIXTURES / name).read_text())


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
