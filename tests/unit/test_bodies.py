"""What is stored comes back as it was, whatever was in it."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtasks import bodies
from providers.types import (
    EmbeddingRequest,
    EmbeddingResponse,
    Image,
    Message,
    Refusal,
    Request,
    Response,
    ResponseFormat,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
    ToolSpec,
    Usage,
)

# What JSON and Postgres can hold: no lone surrogates, no NUL (another test), 64 bits.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
WHOLE = st.integers(-(2**53), 2**53)
COUNT = st.integers(0, 2**53)
JSON = st.recursive(
    st.none() | st.booleans() | WHOLE | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
CACHE = st.none() | st.sampled_from(["5m", "1h"])


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


PARTS = st.one_of(
    st.builds(Text, text=TEXT, cache=CACHE),
    st.builds(Image, url=TEXT, detail=maybe(st.sampled_from(["auto", "low", "high"])), cache=CACHE),
    st.builds(Thinking, text=TEXT, signature=maybe(TEXT), redacted=maybe(TEXT)),
    st.builds(ToolCall, id=TEXT, name=TEXT, arguments=TEXT),
    st.builds(ToolResult, call_id=TEXT, content=TEXT, is_error=st.booleans(), cache=CACHE),
    st.builds(Refusal, text=TEXT),
)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    parts=st.lists(PARTS, max_size=3).map(tuple),
    name=maybe(TEXT),
)
REQUESTS = st.builds(
    Request,
    model=TEXT,
    messages=st.lists(MESSAGES, max_size=3).map(tuple),
    tools=st.lists(
        st.builds(
            ToolSpec,
            name=TEXT,
            description=TEXT,
            parameters=OBJECT,
            strict=maybe(st.booleans()),
        ),
        max_size=2,
    ).map(tuple),
    tool_choice=st.none() | TEXT | OBJECT,
    parallel_tool_calls=maybe(st.booleans()),
    response_format=maybe(
        st.builds(
            ResponseFormat,
            type=st.sampled_from(["text", "json_object", "json_schema"]),
            name=maybe(TEXT),
            schema=maybe(OBJECT),
            strict=maybe(st.booleans()),
            description=maybe(TEXT),
        )
    ),
    max_output_tokens=maybe(COUNT),
    temperature=maybe(NUMBER),
    top_p=maybe(NUMBER),
    stop=st.lists(TEXT, max_size=2).map(tuple),
    seed=maybe(WHOLE),
    frequency_penalty=maybe(NUMBER),
    presence_penalty=maybe(NUMBER),
    logit_bias=maybe(st.dictionaries(TEXT, NUMBER, max_size=2)),
    logprobs=maybe(st.booleans()),
    top_logprobs=maybe(COUNT),
    reasoning_effort=maybe(TEXT),
    thinking_budget=maybe(COUNT),
    service_tier=maybe(TEXT),
    user=maybe(TEXT),
    extra=OBJECT,
)
USAGES = st.builds(Usage, **dict.fromkeys(Usage.__dataclass_fields__, COUNT))
RESPONSES = st.builds(
    Response,
    id=TEXT,
    model=TEXT,
    parts=st.lists(PARTS, max_size=3).map(tuple),
    finish_reason=st.sampled_from(["stop", "length", "tool_calls", "content_filter"]),
    usage=maybe(USAGES),
    raw_usage=maybe(OBJECT),
    logprobs=maybe(OBJECT),
    service_tier=maybe(TEXT),
)
EMBEDDING_REQUESTS = st.builds(
    EmbeddingRequest,
    model=TEXT,
    inputs=st.lists(TEXT | st.lists(COUNT, max_size=3).map(tuple), max_size=3).map(tuple),
    dimensions=maybe(COUNT),
    user=maybe(TEXT),
)
EMBEDDING_RESPONSES = st.builds(
    EmbeddingResponse,
    model=TEXT,
    vectors=st.lists(st.lists(NUMBER, max_size=4).map(tuple), max_size=3).map(tuple),
    usage=maybe(USAGES),
    raw_usage=maybe(OBJECT),
)


@given(REQUESTS)
def test_a_chats_request_comes_back(request):
    stored = orjson.loads(bodies.dump_request("chat", request))
    assert bodies.load_request("chat", stored) == request


@given(RESPONSES)
def test_a_chats_answer_comes_back(response):
    stored = orjson.loads(bodies.dump_response("chat", response))
    assert bodies.load_response("chat", stored) == response


@given(EMBEDDING_REQUESTS)
def test_an_embeddings_request_comes_back(request):
    stored = orjson.loads(bodies.dump_request("embedding", request))
    assert bodies.load_request("embedding", stored) == request


@given(EMBEDDING_RESPONSES)
def test_an_embeddings_answer_comes_back(response):
    stored = orjson.loads(bodies.dump_response("embedding", response))
    assert bodies.load_response("embedding", stored) == response


def test_every_field_of_the_vocabulary_is_drawn_above():
    drawn = {Request: REQUESTS, Response: RESPONSES, EmbeddingRequest: EMBEDDING_REQUESTS}
    for kind, strategy in drawn.items():
        assert set(strategy.wrapped_strategy.kwargs) == set(kind.__dataclass_fields__)


# --- NUL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("a\0b", "a\ufffdb"),
        ("\0", "\ufffd"),
        # A backslash and the letters u0000 are no NUL.
        ("\\u0000", "\\u0000"),
        ("\\\0", "\\\ufffd"),
        ("plain", "plain"),
    ],
)
def test_nul_is_replaced_and_nothing_else(text, stored):
    value = {text: [text, {"deep": text}], "n": 1, "f": 1.5, "none": None}
    assert orjson.loads(bodies.dump(value)) == {
        stored: [stored, {"deep": stored}], "n": 1, "f": 1.5, "none": None,
    }  # fmt: skip
    assert bodies.storable(text) == stored


@given(JSON)
def test_what_has_no_nul_is_kept_to_the_byte(value):
    text = orjson.dumps(value)
    assert orjson.loads(bodies.without_nul(text)) == value
