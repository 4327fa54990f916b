"""What clients read: against the official client's own types, and against the schema's."""

import base64
import struct
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter
from uuid_utils.compat import uuid7

from llmtasks.api import answers, shapes
from llmtasks.api.streaming import chat_frames
from llmtasks.execute import Outcome
from llmtasks.models import Kind, Task
from providers.types import (
    EmbeddingResponse,
    Refusal,
    Response,
    Text,
    Thinking,
    ToolCall,
    Usage,
)

USAGE = Usage(
    input_tokens=10,
    cached_input_tokens=5,
    cache_write_5m_tokens=2,
    cache_write_1h_tokens=1,
    output_tokens=7,
    reasoning_tokens=3,
)


def task(**fields: Any) -> Task:
    given = {"id": uuid7(), "kind": Kind.CHAT, "route": "smart", "created_at": datetime.now(UTC)}
    return Task(**{**given, **fields})


def response(*parts: Any, **fields: Any) -> Response:
    given: dict[str, Any] = {"id": "v1", "model": "gpt-x", "finish_reason": "stop", "usage": USAGE}
    return Response(parts=parts, **{**given, **fields})


def strictly(kind: Any, body: Any) -> Any:
    """The body as the official client's type, with nothing converted."""
    return TypeAdapter(kind).validate_json(orjson.dumps(body), strict=True)


WHOLE = response(
    Thinking(text="hm", signature="sig"),
    Thinking(redacted="xyz"),
    Text(text="hello "),
    Text(text="there"),
    ToolCall(id="c1", name="f", arguments='{"a": 1}'),
    finish_reason="tool_calls",
    service_tier="default",
)


def test_a_completion_is_the_official_clients():
    made = task()
    found = strictly(ChatCompletion, answers.completion(made, WHOLE))
    assert found.id == f"chatcmpl-{made.id}"
    assert abs(found.created - datetime.now(UTC).timestamp()) < 5
    message = found.choices[0].message
    assert (message.content, message.tool_calls[0].function.name) == ("hello there", "f")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (18, 10)
    assert found.usage.prompt_tokens_details.cached_tokens == 5
    assert found.usage.completion_tokens_details.reasoning_tokens == 3
    assert message.model_extra["thinking_blocks"] == [
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "redacted_thinking", "data": "xyz"},
    ]


def test_an_answer_of_calls_alone_has_no_content():
    found = answers.message(response(ToolCall(id="c", name="f", arguments="{}")))
    assert found["content"] is None


def test_usage_that_is_not_known_is_null():
    found = strictly(ChatCompletion, answers.completion(task(), response(usage=None)))
    assert found.usage is None


def test_a_tier_that_the_client_does_not_know_is_left_out():
    body = answers.completion(task(), response(Text(text="x"), service_tier="standard_only"))
    assert "service_tier" not in body


def frames(events: list[Any], include_usage: bool = False) -> list[bytes]:
    rest = iter(events[1:])
    return list(chat_frames(task(), events[0], rest, include_usage))


def chunks_of(found: list[bytes]) -> list[Any]:
    bodies = [orjson.loads(frame.removeprefix(b"data: ")) for frame in found[:-1]]
    return [strictly(ChatCompletionChunk, body) for body in bodies]


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_is_the_official_clients(include_usage: bool):
    given = response(*WHOLE.parts, Refusal(text="no"), finish_reason="tool_calls")
    events = [*answers.deltas_of(given), Outcome(task(), given)]
    found = frames(events, include_usage)
    assert found[-1] == b"data: [DONE]\n\n"
    chunks = chunks_of(found)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "hello there"
    assert "".join(delta.refusal or "" for delta in deltas) == "no"
    [call] = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert (call.index, call.id, call.function.arguments) == (0, "c1", '{"a": 1}')
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == "tool_calls" and set(ends[:-1]) == {None}
    last = chunks[-1]
    assert (last.usage is not None, last.choices == []) == (include_usage, include_usage)


def test_an_error_in_the_middle_is_the_last_frame():
    failed = task(error_class="BadResponse", error_message="cut short")
    found = frames([*answers.deltas_of(response(Text(text="a"))), Outcome(failed, None)])
    assert orjson.loads(found[-1].removeprefix(b"data: "))["error"] == {
        "message": "cut short",
        "type": "server_error",
        "param": None,
        "code": "vendor_bad_response",
    }


def test_embeddings_are_the_official_clients():
    given = EmbeddingResponse(model="e", vectors=((0.5, -1.0), (0.25, 2.0)), usage=USAGE)
    found = strictly(CreateEmbeddingResponse, answers.embeddings(task(), given))
    assert [item.embedding for item in found.data] == [[0.5, -1.0], [0.25, 2.0]]
    packed = answers.embeddings(task(), given, as_base64=True)["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (0.5, -1.0)


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (None, None),
        (Decimal("0"), "0"),
        (Decimal("0.0000120000"), "0.000012"),
        (Decimal("1E+2"), "100"),
        (Decimal("3.10"), "3.1"),
    ],
)
def test_money_is_a_plain_decimal_string(cost: Decimal | None, text: str | None):
    assert answers.money(cost) == text


def test_a_task_on_the_wire_has_the_fields_of_the_schema():
    made = task(
        status="succeeded",
        mode="queued",
        lane="default",
        provider="sandbox",
        input_tokens=1,
        cost=Decimal("0.1"),
        cost_state="final",
        error_class="Timeout",
        error_message="late",
        finished_at=datetime.now(UTC),
    )
    body = orjson.loads(answers.json_response(answers.task_body(made, WHOLE)).content)
    assert set(body) == set(shapes.Task.model_fields)
    assert set(body["usage"]) == set(shapes.TaskUsage.model_fields)
    assert set(body["error"]) == {"class", "message", "retry_after"}
    assert body["created_at"].endswith("Z")
    assert set(body["output"]) - {"service_tier"} <= set(shapes.ChatCompletion.model_fields)


def test_a_task_that_has_not_begun_says_so_with_nulls():
    body = answers.task_body(task(status="waiting"))
    nulls = {"provider", "started_at", "finished_at", "usage", "cost", "cost_state", "output"}
    nulls |= {"error", "user", "prompt"}
    assert nulls == {name for name, value in body.items() if value is None}
