"""Whatever a vendor sends, an adapter gives an answer or one of our errors, storable at that."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers import anthropic_answers, compatible, compatible_answers
from providers.errors import ProviderError
from providers.faults import error_from_event, error_from_response
from providers.sse import Parser
from providers.types import EmbeddingRequest
from providers.wire import parse

FIXTURES = Path(__file__).parent / "fixtures"
EMBEDDING = EmbeddingRequest(model="m", inputs=("a", "b"))
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 10),
    st.integers(10**9, 10**30),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["\x00", "\ud800", "tool_use", "text", "stop", "error", [], {}, [[]], [{}]]),
    st.recursive(
        st.one_of(st.none(), st.integers(), st.text(max_size=3)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)


def places(value, at=()):
    """Every path into a JSON value."""
    yield at
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*at, key))


def changed(value, at, new):
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ...:
        if len(at) == 1:
            del copy[at[0]]
            return copy
    copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


@st.composite
def mutations(draw, value):
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(value))))
        value = changed(value, at, ... if at and draw(st.booleans()) else draw(ODD))
    return value


def check_storable(value):
    if isinstance(value, str):
        assert "\x00" not in value
        value.encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            check_storable(key)
            check_storable(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_storable(item)
    elif hasattr(value, "__slots__"):
        for name in value.__slots__:
            check_storable(getattr(value, name))


def check(run):
    try:
        result = run()
    except ProviderError as error:
        check_storable(error.message)
        check_storable([error.code, error.param, error.request_id])
    else:
        check_storable(result)


def read_again(value):
    """The value as it comes from the wire."""
    return parse(json.dumps(value).replace("NaN", "0").replace("-Infinity", "1")
                 .replace("Infinity", "1"))  # fmt: skip


def read_embeddings(value, _model):
    return compatible.embeddings_from_wire(value, EMBEDDING)


def fixtures(pattern):
    return sorted(str(path.relative_to(FIXTURES)) for path in FIXTURES.glob(pattern))


READERS = {
    "openai/embeddings.json": read_embeddings,
    **dict.fromkeys(fixtures("openai/chat*.json"), compatible_answers.response_from_wire),
    **dict.fromkeys(fixtures("anthropic/[!e]*.json"), anthropic_answers.response_from_wire),
}
STREAMS = {
    **dict.fromkeys(fixtures("openai/*.sse"), compatible_answers.ChatStream),
    **dict.fromkeys(fixtures("anthropic/*.sse"), anthropic_answers.MessageStream),
}
quiet = settings(max_examples=150, database=None)


@pytest.mark.parametrize("name", READERS)
@quiet
@given(data=st.data())
def test_whole_answers(name, data):
    value = data.draw(mutations(json.loads((FIXTURES / name).read_text())))

    def read():
        body = read_again(value)
        return READERS[name](body, "m") if isinstance(body, dict) else None

    check(read)


@pytest.mark.parametrize("name", STREAMS)
@quiet
@given(data=st.data())
def test_streams(name, data):
    events = [
        json.loads(event.data)
        for event in Parser().feed((FIXTURES / name).read_bytes())
        if event.data != "[DONE]"
    ]
    for _ in range(data.draw(st.integers(0, 2))):
        events.insert(data.draw(st.integers(0, len(events))), data.draw(st.sampled_from(events)))
    value = data.draw(mutations(events))

    def read():
        stream = STREAMS[name]("m", lambda payload: error_from_event(payload, {}))
        told = []
        for event in value if isinstance(value, list) else [value]:
            text = json.dumps(event).replace("NaN", "0").replace("Infinity", "1")
            told.extend(stream.feed(text))
        return [*told, stream.finish()]

    check(read)


@quiet
@given(data=st.data())
def test_errors(data):
    vendor = data.draw(st.sampled_from(["openai", "anthropic"]))
    cases = json.loads((FIXTURES / vendor / "errors.json").read_text())
    case = data.draw(st.sampled_from([case for case in cases if "body" in case]))
    value = data.draw(mutations(case["body"]))
    body = json.dumps(value).encode()
    error = error_from_response(data.draw(st.integers(100, 999)), {}, body, secret="sk-test")
    assert isinstance(error, ProviderError)
    assert isinstance(error_from_event(read_again(value), {}), ProviderError)
    check_storable([error.message, error.code, error.param])


@quiet
@given(body=st.binary(max_size=200), status=st.integers(0, 999))
def test_errors_of_any_bytes(body, status):
    error = error_from_response(status, {}, body)
    assert isinstance(error, ProviderError)
    check_storable([error.message, error.code, error.param])
