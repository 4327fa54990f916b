"""What we send to APIs in OpenAI's format, as the vendors document it."""

import pytest

from providers import registry
from providers.base import Account
from providers.compatible import Flavour, request_to_wire
from providers.types import (
    Image,
    Message,
    Refusal,
    Request,
    ResponseFormat,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
    ToolSpec,
)

TOOL = ToolSpec(name="get_weather", description="Weather", parameters={"type": "object"})


def parts(*given, role="user", name=None):
    return Message(role=role, parts=given, name=name)


def request(*messages, **fields):
    messages = messages or (parts(Text(text="hi")),)
    return Request(**{"model": "m", "messages": messages, **fields})


def to_wire(*messages, flavour=None, **fields):
    return request_to_wire(request(*messages, **fields), flavour or Flavour())


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
