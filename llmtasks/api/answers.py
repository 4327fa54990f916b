"""From our vocabulary to what clients read: OpenAI's objects, and the task on the wire."""

import base64
import struct
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson
from django.http import HttpResponse

from llmtasks import bodies
from llmtasks.models import Kind, Step, Task, TaskPayload
from providers.types import (
    EmbeddingResponse,
    Refusal,
    Response,
    StreamEvent,
    Text,
    TextDelta,
    Thinking,
    ThinkingDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)

SERVICE_TIERS = frozenset({"auto", "default", "flex", "scale", "priority", "fast"})


def json_response(body: Any, status: int = 200) -> HttpResponse:
    # datetimes are UTC and end in Z, as RFC 3339 likes them.
    text = orjson.dumps(body, option=orjson.OPT_UTC_Z)
    return HttpResponse(text, content_type="application/json", status=status)


# --- OpenAI's objects -----------------------------------------------------------------------


def completion_id(task: Task) -> str:
    return f"chatcmpl-{task.id}"


def created(task_id: UUID) -> int:
    """The second in which an id was made: a UUIDv7 begins with its time."""
    return (task_id.int >> 80) // 1000


def usage_of_chat(usage: Usage | None) -> dict[str, Any] | None:
    """OpenAI's counts: details are subsets of the totals."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.total_input_tokens,
        "completion_tokens": usage.total_output_tokens,
        "total_tokens": usage.total_input_tokens + usage.total_output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_input_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def completion(task: Task, response: Response) -> dict[str, Any]:
    """A `chat.completion`; its model is the vendor's that answered."""
    body: dict[str, Any] = {
        "id": completion_id(task),
        "object": "chat.completion",
        "created": created(task.id),
        "model": response.model,
        "choices": [
            {
                "index": 0,
                "message": message(response),
                "logprobs": response.logprobs,
                "finish_reason": response.finish_reason,
            }
        ],
        "usage": usage_of_chat(response.usage),
    }
    if response.service_tier in SERVICE_TIERS:
        body["service_tier"] = response.service_tier
    return body


def message(response: Response) -> dict[str, Any]:
    texts = [part.text for part in response.parts if isinstance(part, Text)]
    refusals = [part.text for part in response.parts if isinstance(part, Refusal)]
    body: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(texts) if texts else None,
        "refusal": "".join(refusals) if refusals else None,
    }
    if calls := response.tool_calls:
        body["tool_calls"] = [tool_call(call) for call in calls]
    return body | reasoning(response)


def tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def reasoning(response: Response) -> dict[str, Any]:
    """What the model thought, as other servers of OpenAI's format name it, and as blocks to send
    back."""
    thoughts = [part for part in response.parts if isinstance(part, Thinking)]
    if not thoughts:
        return {}
    return {
        "reasoning_content": "".join(part.text for part in thoughts),
        "thinking_blocks": [thinking_block(part) for part in thoughts],
    }


def thinking_block(part: Thinking) -> dict[str, Any]:
    if part.redacted is not None:
        return {"type": "redacted_thinking", "data": part.redacted}
    return {"type": "thinking", "thinking": part.text, "signature": part.signature}


def embeddings(task: Task, response: EmbeddingResponse, as_base64: bool = False) -> dict[str, Any]:
    usage = response.usage or Usage()
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": packed(vector) if as_base64 else vector,
            }
            for index, vector in enumerate(response.vectors)
        ],
        "model": response.model,
        "usage": {
            "prompt_tokens": usage.total_input_tokens,
            "total_tokens": usage.total_input_tokens,
        },
    }


def packed(vector: tuple[float, ...]) -> str:
    """Little-endian 32-bit floats, as the official client reads them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def output_of(task: Task, response: Any) -> dict[str, Any]:
    """The answer's body of a task of any kind."""
    if task.kind == Kind.TOOL:
        return {"tool": task.route, "content": response.content}
    if task.kind == Kind.WORKFLOW:
        return {"workflow": task.route, "value": response.value}
    if task.kind == Kind.EMBEDDING:
        return embeddings(task, response)
    return completion(task, response)


def step(row: Step) -> dict[str, Any]:
    """A step as GET /v1/tasks/{id}/steps shows it."""
    content = (row.output or {}).get("content") if row.kind != Step.Kind.MODEL else None
    return {
        "number": row.number,
        "kind": row.kind,
        "name": row.name,
        "status": row.status,
        "arguments": row.input,
        "content": content,
        "error": row.error_class or None,
        "task": None if row.child_id is None else str(row.child_id),
        "tries": row.tries,
        "started_at": moment(row.started_at),
        "finished_at": moment(row.finished_at),
        "decided_by": row.decided_by or None,
        "comment": row.comment or None,
    }


# --- Chunks of a stream -----------------------------------------------------------------------


def chunk(
    task: Task, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return envelope(task) | {"choices": [choice]}


def envelope(task: Task) -> dict[str, Any]:
    """A chunk's model is the route's name: who answers is not settled before the end."""
    return {
        "id": completion_id(task),
        "object": "chat.completion.chunk",
        "created": created(task.id),
        "model": task.route,
    }


def delta_of(event: StreamEvent) -> dict[str, Any] | None:
    """The chunk's delta for an event; None for what ends a stream."""
    if isinstance(event, TextDelta):
        return {"content": event.text}
    if isinstance(event, ThinkingDelta):
        return {"reasoning_content": event.text}
    if isinstance(event, ToolCallDelta):
        call: dict[str, Any] = {"index": event.index, "function": {"arguments": event.arguments}}
        if event.id is not None:
            call |= {"id": event.id, "type": "function"}
        if event.name is not None:
            call["function"]["name"] = event.name
        return {"tool_calls": [call]}
    return None


def last_chunks(task: Task, response: Response, include_usage: bool) -> Iterator[dict[str, Any]]:
    """What no delta brings: refusals, thinking blocks, the reason of the end, the usage."""
    refusals = [part.text for part in response.parts if isinstance(part, Refusal)]
    if refusals:
        yield chunk(task, {"refusal": "".join(refusals)})
    if blocks := reasoning(response).get("thinking_blocks"):
        yield chunk(task, {"thinking_blocks": blocks})
    yield chunk(task, {}, response.finish_reason, response.logprobs)
    if include_usage:
        yield envelope(task) | {"choices": [], "usage": usage_of_chat(response.usage)}


def deltas_of(response: Response) -> Iterator[StreamEvent]:
    """The stream of an answer that is there already."""
    index = 0
    for part in response.parts:
        if isinstance(part, Text):
            yield TextDelta(text=part.text)
        elif isinstance(part, Thinking):
            yield ThinkingDelta(text=part.text)
        elif isinstance(part, ToolCall):
            yield ToolCallDelta(index=index, id=part.id, name=part.name, arguments=part.arguments)
            index += 1


# --- The task on the wire -----------------------------------------------------------------------


def summary(task: Task) -> dict[str, Any]:
    """A task without its answer's body, as lists have it."""
    return {
        "id": str(task.id),
        "object": "task",
        "kind": task.kind,
        "status": task.status,
        "mode": task.mode,
        "lane": task.lane,
        "model": task.route,
        "provider": task.provider or None,
        "prompt": task.prompt or None,
        "created_at": moment(task.created_at),
        "started_at": moment(task.started_at),
        "finished_at": moment(task.finished_at),
        "attempts": task.attempts,
        "usage": usage_of_task(task),
        "cost": money(task.cost),
        "currency": "USD",
        "cost_state": task.cost_state or None,
        "error": error_of(task),
        "metadata": task.metadata,
        "user": task.user or None,
    }


def task_body(task: Task, response: Any = None) -> dict[str, Any]:
    """A task with its answer, where it has one."""
    return summary(task) | {"output": None if response is None else output_of(task, response)}


def task_row(task: Task) -> dict[str, Any]:
    """A task that was loaded with its payload."""
    return task_body(task, stored_response(task))


def stored_response(task: Task) -> Any:
    """The stored answer of a task loaded with its payload; None where there is none (any more)."""
    try:
        stored = task.payload.response
    except TaskPayload.DoesNotExist:
        return None
    return None if stored is None else bodies.load_response(task.kind, stored)


def moment(value: datetime | None) -> datetime | None:
    return None if value is None else value.astimezone(UTC)


def money(value: Decimal | None) -> str | None:
    """A decimal string without an exponent or idle zeros."""
    return None if value is None else f"{value.normalize():f}"


def usage_of_task(task: Task) -> dict[str, int] | None:
    counts = {
        "input_tokens": task.input_tokens,
        "cached_input_tokens": task.cached_input_tokens,
        "cache_write_tokens": task.cache_write_tokens,
        "output_tokens": task.output_tokens,
        "reasoning_tokens": task.reasoning_tokens,
    }
    return counts if any(counts.values()) else None


def error_of(task: Task) -> dict[str, Any] | None:
    if not task.error_class:
        return None
    return {
        "class": task.error_class,
        "message": task.error_message,
        "retry_after": task.retry_after,
    }


def page(tasks: Iterable[Task], next_cursor: str | None) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [summary(task) for task in tasks],
        "has_more": next_cursor is not None,
        "next_cursor": next_cursor,
    }
