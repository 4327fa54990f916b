"""What we send to Anthropic's API, as the vendor documents it."""

import pytest

from providers import errors, registry
from providers.anthropic import messages_to_wire, model_version, request_to_wire
from providers.base import Account
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

TOOL = ToolSpec(name="f", description="F", parameters={"type": "object"}, strict=True)
OLD = {"version": "2023-06-01"}


def parts(*given, role="user"):
    return Message(role=role, parts=given)


def request(*messages, model="claude-sonnet-4-5", **fields):
    return Request(model=model, messages=messages or (parts(Text(text="hi")),), **fields)


def to_wire(*messages, options=None, **fields):
    return request_to_wire(request(*messages, **fields), options or {})


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
