"""What clients send, and what they are told when it is wrong. No request, no store."""

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtasks.api import bodies
from llmtasks.api.bodies_chat import CHAT
from llmtasks.api.bodies_embeddings import EMBEDDING
from llmtasks.api.bodies_tasks import BULK, TASK
from llmtasks.errors import InvalidInput
from providers.types import (
    Image,
    Message,
    Refusal,
    Request,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
)

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "smart", "messages": [USER], **fields}


def parse(adapter: Any, body: Any) -> Any:
    return bodies.check(adapter, bodies.decode(orjson.dumps(body)))


def request(**fields: Any) -> Request:
    return parse(CHAT, chat(**fields)).request()


def refusal(adapter: Any, body: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parse(adapter, body)
    return caught.value


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"  ", "empty"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'"\xff"', "UTF-8"),
        (b'"\\ud800"', "not valid JSON"),
        (b"[" * 5000 + b"]" * 5000, "not valid JSON"),
    ],
)
def test_what_is_no_json_is_refused(raw: bytes, words: str):
    with pytest.raises(InvalidInput, match=words):
        bodies.decode(raw)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"content": "a\0"}]}, "messages[0].content"),
        ({"metadata": {"a\0b": 1}}, "metadata"),
        (["a", "\0"], "[1]"),
    ],
)
def test_a_nul_is_found_wherever_it_hides(body: Any, param: str):
    with pytest.raises(InvalidInput) as caught:
        bodies.decode(orjson.dumps(body))
    assert caught.value.param == param


def test_a_backslash_before_u0000_is_no_nul():
    assert bodies.decode(b'{"a": "\\\\u0000"}') == {"a": "\\u0000"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content"),
        ({"messages": [USER | {"x": 1}]}, "messages[0].x"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}],
                    }
                ]
            },
            "messages[0].content[0].image_url",
        ),
        ({"model": ""}, "model"),
        ({"n": 2}, "n"),
        ({"store": True}, "store"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"50256": 101}}, "logit_bias.50256"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": 5}, "stop"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"lane": "fast"}, "lane"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"run_at": "tomorrow"}, "run_at"),
        ({"run_at": "2099-01-01T00:00:00"}, "run_at"),
        ({"run_at": "0001-01-01T00:00:00+14:00"}, "run_at"),
        ({"run_at": "2001-01-01T00:00:00Z"}, "run_at"),
        ({"metadata": {"a": [1]}}, "metadata"),
        ({"metadata": {"": "x"}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {str(i): i for i in range(17)}}, "metadata"),
        ({"user": "u" * 201}, "user"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str):
    error = refusal(CHAT, chat(**fields))
    assert error.param == param
    assert len(error.message) > len(param) + 5


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"properties": []},
        {"type": "object", "required": "x"},
        {"$schema": [1], "type": 5},
        {"$schema": "http://json-schema.org/draft-07/schema#", "minimum": "x"},
    ],
)
def test_a_tools_schema_that_is_no_schema_is_refused(schema: dict[str, Any]):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    error = refusal(CHAT, chat(tools=[tool]))
    assert error.param == "tools[0].function.parameters"
    assert "no JSON schema" in error.message


def test_deep_nesting_is_refused_where_anything_goes():
    deep: Any = 1
    for _ in range(100):
        deep = {"a": [deep]}
    assert refusal(CHAT, chat(extra=deep)).param == "extra"
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert refusal(CHAT, chat(tools=[tool])).param == "tools[0].function.parameters"


def test_what_says_what_holds_anyway_is_accepted():
    fields = {"n": 1, "store": False, "audio": None, "modalities": ["text"], "functions": None}
    assert request(**fields) == request()


def test_all_wrong_fields_are_listed():
    error = refusal(CHAT, {"model": "m", "messages": [USER], "foo": 1, "temperature": "x"})
    assert isinstance(error, bodies.InvalidBody)
    assert {field for field, _ in error.errors} == {"foo", "temperature"}


def test_a_conversation_in_our_words():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be kind"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look", "cache_control": {"type": "ephemeral"}},
                {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
            ],
            "name": "ann",
        },
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}],
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    assert request(messages=messages).messages == (
        Message(role="system", parts=(Text(text="be kind"),)),
        Message(
            role="user",
            parts=(Text(text="look", cache="5m"), Image(url="https://x/y.png", detail="low")),
            name="ann",
        ),
        Message(
            role="assistant",
            parts=(
                Thinking(text="hm", signature="s"),
                ToolCall(id="c1", name="f", arguments="{}"),
            ),
        ),
        Message(role="tool", parts=(ToolResult(call_id="c1", content="42"),)),
        Message(role="assistant", parts=(Refusal(text="no"),)),
    )


def test_the_knobs_in_our_words():
    found = request(
        max_tokens=7,
        stop="END",
        temperature=1,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True},
        },
        thinking={"type": "enabled", "budget_tokens": 100},
        verbosity="low",
        safety_identifier="u1",
        extra={"top_k": 5},
        user="u",
    )
    assert (found.max_output_tokens, found.stop, found.temperature) == (7, ("END",), 1)
    assert (found.tool_choice, found.tools[0].name) == ({"name": "weather"}, "weather")
    assert found.response_format is not None
    assert (found.response_format.name, found.response_format.strict) == ("s", True)
    assert (found.thinking_budget, found.user) == (100, "u")
    assert found.extra == {"verbosity": "low", "safety_identifier": "u1", "top_k": 5}


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2]], ((1,), (2,))),
    ],
)
def test_the_forms_of_an_embeddings_input(given: Any, inputs: Any):
    assert parse(EMBEDDING, {"model": "e", "input": given}).request().inputs == inputs


@pytest.mark.parametrize("given", ["", [], [""], [True], [[]], [["a"]], ["a", 1], [1.5], {}, None])
def test_what_can_not_be_embedded(given: Any):
    assert refusal(EMBEDDING, {"model": "e", "input": given}).param == "input"


def test_a_task_names_fields_of_its_input():
    body = {"kind": "chat", "input": {"model": "m", "messages": [{"role": "user"}]}}
    assert refusal(TASK, body).param == "input.messages[0].content"
    assert refusal(TASK, {"input": {}}).param == "kind"
    assert refusal(TASK, []).param == "kind"
    assert refusal(BULK, {"tasks": []}).param == "tasks"
    assert refusal(BULK, {"tasks": [1] * 1001}).param == "tasks"


# --- Whatever comes, it is an InvalidInput or it is fine ------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["chat", "user", "text", "auto", "function", "2030-01-01T00:00:00Z"])
)
NAMES = st.text(max_size=8) | st.sampled_from(
    ["model", "messages", "role", "content", "type", "tools", "function", "input", "kind"]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
RICH: list[tuple[Any, dict[str, Any]]] = [
    (
        CHAT,
        chat(
            tools=[TOOL],
            tool_choice="auto",
            stop=["a"],
            logit_bias={"1": 1},
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
            stream=True,
            stream_options={"include_usage": True},
            thinking={"type": "enabled", "budget_tokens": 5},
            metadata={"a": "b"},
            run_at="2099-01-01T00:00:00Z",
            extra={"a": [1]},
        ),
    ),
    (EMBEDDING, {"model": "e", "input": ["a"], "dimensions": 5}),
    (TASK, {"kind": "chat", "input": chat(), "metadata": {"a": 1}, "deadline_s": 5}),
    (TASK, {"kind": "embedding", "input": {"model": "e", "input": [[1]]}}),
    (BULK, {"tasks": [{"kind": "chat"}]}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    steps = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in steps:
        inner = item if isinstance(item, dict | list) else {}
        found += places(inner, (*path, key))
    return found


def changed(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    target: Any = body
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    return body


def accept_or_refuse(adapter: Any, raw: bytes) -> None:
    try:
        body = bodies.check(adapter, bodies.decode(raw))
    except InvalidInput as error:
        assert error.message
        return
    if hasattr(body, "request"):
        body.request()


@settings(max_examples=300)
@given(st.sampled_from([CHAT, EMBEDDING, TASK, BULK]), JSON)
def test_any_json_is_fine_or_refused(adapter: Any, value: Any):
    accept_or_refuse(adapter, orjson.dumps(value))


@settings(max_examples=600)
@given(st.data())
def test_a_good_body_with_anything_in_one_place_is_fine_or_refused(data: st.DataObject):
    adapter, body = data.draw(st.sampled_from(RICH))
    path = data.draw(st.sampled_from(places(body)))
    accept_or_refuse(adapter, orjson.dumps(changed(body, path, data.draw(JSON))))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_fine_or_refused(raw: bytes):
    accept_or_refuse(CHAT, raw)
