"""Anthropic's adapter over real HTTP."""

from pathlib import Path

import orjson
import pytest

from providers import errors, registry
from providers.base import Account
from providers.http import Exchange
from providers.types import (
    Done,
    TextDelta,
    ThinkingDelta,
)
from tests.unit.exchanges import chat, once
from tests.unit.scripted import EVENTS, Scripted, answer

FIXTURES = Path(__file__).parent / "fixtures" / "anthropic"


def provider(server, **fields):
    base_url = server.base_url.removesuffix("/v1")
    return registry.build("anthropic", Account(name="a", base_url=base_url, **fields))


def test_a_message_over_http():
    with Scripted(once(answer((FIXTURES / "message.json").read_bytes()))) as server:
        response = provider(server, api_key="sk-ant-1").complete(chat(), Exchange())
        head = server.requests[0].split(b"\r\n")
    assert response.text == "Hi! My name is Claude."
    assert head[0] == b"POST /v1/messages HTTP/1.1"
    assert b"x-api-key: sk-ant-1" in head
    assert b"anthropic-version: 2026-10-21" in head


def test_a_stream_over_http():
    data = (FIXTURES / "stream.sse").read_bytes()
    reply = EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data
    with Scripted(once(reply)) as server:
        options = {"version": "2023-06-01", "headers": {"anthropic-beta": "x"}}
        exchange = Exchange()
        events = list(provider(server, options=options).stream(chat(), exchange))
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert orjson.loads(body)["stream"] is True
    assert b"anthropic-version: 2023-06-01" in head.split(b"\r\n")
    assert b"anthropic-beta: x" in head.split(b"\r\n")
    assert b"x-api-key" not in head
    assert isinstance(events[-1], Done)
    assert exchange.first_byte_at


def test_a_stream_that_came_whole():
    with Scripted(once(answer((FIXTURES / "thinking.json").read_bytes()))) as server:
        events = list(provider(server).stream(chat(), Exchange()))
    assert events[:-1] == [
        ThinkingDelta(text="Let me analyze this step by step..."),
        TextDelta(text="Based on my analysis..."),
    ]


def test_an_error_that_came_with_status_200():
    body = b'{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}'
    with Scripted(once(answer(body))) as server:
        with pytest.raises(errors.Overloaded):
            provider(server).complete(chat(), Exchange())


def test_a_stream_that_is_cut_short():
    data = (FIXTURES / "stream.sse").read_bytes().partition(b"event: message_stop")[0]
    reply = EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data
    with Scripted(once(reply)) as server:
        with pytest.raises(errors.BadResponse, match="without message_stop"):
            list(provider(server).stream(chat(), Exchange()))
