"""The adapter of OpenAI's format over real HTTP, and its flavours."""

import json
from pathlib import Path

import orjson
import pytest

from providers import errors, registry
from providers.base import Account
from providers.http import Exchange
from providers.types import (
    Done,
    EmbeddingRequest,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from tests.unit.exchanges import chat, once
from tests.unit.scripted import EVENTS, OK, Scripted, answer

FIXTURES = Path(__file__).parent / "fixtures" / "openai"


def sse(name):
    data = (FIXTURES / name).read_bytes()
    return EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data


def sent(server, number=0):
    return orjson.loads(server.requests[number].partition(b"\r\n\r\n")[2])


def test_a_stream_over_http():
    with Scripted(once(sse("stream.sse"))) as server:
        provider = registry.build("openai", Account(name="a", base_url=server.base_url))
        exchange = Exchange()
        events = list(provider.stream(chat(), exchange))
        assert sent(server)["stream"] is True
        assert sent(server)["stream_options"] == {"include_usage": True}
        assert b"Authorization" not in server.requests[0]
    assert events[:2] == [TextDelta(text="Hello"), TextDelta(text=" there")]
    assert isinstance(events[-1], Done)
    assert exchange.first_byte_at


def test_a_stream_that_came_whole():
    data = (FIXTURES / "chat_tools.json").read_bytes()
    with Scripted(once(answer(data))) as server:
        options = {"stream_usage": False}
        account = Account(name="a", base_url=server.base_url, options=options)
        *deltas, done = registry.build("vllm", account).stream(chat(), Exchange())
        assert "stream_options" not in sent(server)
    assert deltas == [
        ToolCallDelta(
            index=0, id="call_abc123", name="get_current_weather",
            arguments='{\n"location": "Boston, MA"\n}',
        )
    ]  # fmt: skip
    assert done.response.finish_reason == "tool_calls"


def test_a_stream_without_done_counts_once_it_has_a_finish_reason():
    reply = sse("stream_ollama_tools.sse").replace(b"data: [DONE]", b":           ")
    with Scripted(once(reply)) as server:
        provider = registry.build("vllm", Account(name="a", base_url=server.base_url))
        *_, done = provider.stream(chat(), Exchange())
    assert [json.loads(call.arguments)["city"] for call in done.response.tool_calls] == [
        "Paris",
        "Rome",
    ]


def test_azures_paths_and_key():
    data = (FIXTURES / "chat.json").read_bytes()
    with Scripted(once(answer(data), then_close=False)) as server:
        root = server.base_url.removesuffix("/v1")
        options = {"deployments": True, "api_version": "2024-10-21"}
        old = Account(name="a", base_url=root, api_key="key1", options=options)
        registry.build("azure", old).complete(chat("my gpt/4"), Exchange())
        new = Account(name="a", base_url=f"{root}/openai/v1", api_key="key1")
        registry.build("azure", new).complete(chat(), Exchange())
        first, second = (data.split(b"\r\n") for data in server.requests)
    assert first[0] == (
        b"POST /openai/deployments/my%20gpt%2F4/chat/completions?api-version=2024-10-21 HTTP/1.1"
    )
    assert b"api-key: key1" in first
    assert second[0] == b"POST /openai/v1/chat/completions HTTP/1.1"


def test_openais_account_headers():
    data = (FIXTURES / "chat.json").read_bytes()
    with Scripted(once(answer(data))) as server:
        options = {"organization": "org-1", "project": "proj_1"}
        account = Account(name="a", base_url=server.base_url, api_key="k", options=options)
        registry.build("openai", account).complete(chat(), Exchange())
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
    with Scripted(once(answer(body), then_close=False)) as server:
        account = Account(name="a", base_url=server.base_url, api_key="sk-secret")
        provider = registry.build("openai", account)
        for run in (
            lambda: provider.complete(chat(), Exchange()),
            lambda: list(provider.stream(chat(), Exchange())),
            lambda: provider.embed(EmbeddingRequest(model="m", inputs=("a",)), Exchange()),
        ):
            with pytest.raises(errors.RateLimited, match=r"slow down, \[key\]"):
                run()


def test_a_key_that_a_stream_echoes_is_not_told():
    data = b'data: {"error": {"code": 401, "message": "bad key sk-secret"}}\n\n'
    reply = EVENTS + b"Content-Length: %d\r\n\r\n" % len(data) + data
    with Scripted(once(reply)) as server:
        account = Account(name="a", base_url=server.base_url, api_key="sk-secret")
        with pytest.raises(errors.AuthenticationFailed, match=r"bad key \[key\]"):
            list(registry.build("openai", account).stream(chat(), Exchange()))


def test_embeddings_over_http():
    with Scripted(once(answer((FIXTURES / "embeddings.json").read_bytes()))) as server:
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


def test_the_head_of_a_whole_answer_may_name_a_charset():
    head = OK.replace(b"application/json", b"application/json; charset=utf-8")
    data = (FIXTURES / "chat.json").read_bytes()
    with Scripted(once(answer(data, head))) as server:
        provider = registry.build("openai", Account(name="a", base_url=server.base_url))
        *_, done = provider.stream(chat(), Exchange())
    assert done.response.text.startswith("Hello!")
