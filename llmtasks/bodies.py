"""Requests and answers as they are stored: our vocabulary as JSON, with a version.

A later change of the vocabulary raises VERSION and teaches `load_*` to read the older ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import orjson
from pydantic import TypeAdapter

from llmtasks.models import Kind
from providers.types import EmbeddingRequest, EmbeddingResponse, Request, Response

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRequest:
    """A chat whose tools are ours, by reference (`name` or `name@version`), until the model
    answers. At most `max_turns` calls of the model, `max_tokens` in all, `max_cost` dollars."""

    chat: Request
    tools: tuple[str, ...]
    max_turns: int = 10
    max_tokens: int | None = None
    max_cost: Decimal | None = None

    @property
    def model(self) -> str:
        return self.chat.model


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRequest:
    """One run of a tool, `name@version`."""

    tool: str
    arguments: Mapping[str, Any]

    @property
    def model(self) -> str:
        return self.tool


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolAnswer:
    """What a tool gave: JSON text, or a text as it is."""

    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowRequest:
    """One block of a workflow (`workflows/spec.py`, checked before), with the values that its
    templates may name: `scope["input"]`, `scope["steps"]` and so on. `name` is the stored
    workflow's with its version, else the block's kind. `max_cost` is looked at between steps."""

    name: str
    block: Mapping[str, Any]
    scope: Mapping[str, Any]
    max_cost: Decimal | None = None

    @property
    def model(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowAnswer:
    """What a workflow's block gave: any JSON value."""

    value: Any


# What goes to a model and comes back, and what any task asks for and gives.
AnyRequest = Request | EmbeddingRequest
AnyResponse = Response | EmbeddingResponse
TaskRequest = AnyRequest | AgentRequest | ToolRequest | WorkflowRequest
TaskAnswer = AnyResponse | ToolAnswer | WorkflowAnswer

REQUESTS: dict[str, TypeAdapter[Any]] = {
    Kind.CHAT: TypeAdapter(Request),
    Kind.EMBEDDING: TypeAdapter(EmbeddingRequest),
    Kind.AGENT: TypeAdapter(AgentRequest),
    Kind.TOOL: TypeAdapter(ToolRequest),
    Kind.WORKFLOW: TypeAdapter(WorkflowRequest),
}
RESPONSES: dict[str, TypeAdapter[Any]] = {
    Kind.CHAT: TypeAdapter(Response),
    Kind.EMBEDDING: TypeAdapter(EmbeddingResponse),
    Kind.AGENT: TypeAdapter(Response),
    Kind.TOOL: TypeAdapter(ToolAnswer),
    Kind.WORKFLOW: TypeAdapter(WorkflowAnswer),
}


def dump_request(kind: str, request: TaskRequest) -> bytes:
    """The request as JSON text."""
    return without_nul(REQUESTS[kind].dump_json(request, exclude_none=True))


def dump_response(kind: str, response: TaskAnswer) -> bytes:
    return without_nul(RESPONSES[kind].dump_json(response, exclude_none=True))


def dump(value: Any) -> bytes:
    """Any JSON value as text that Postgres stores."""
    return without_nul(orjson.dumps(value, default=dict))


def loads(text: bytes) -> Any:
    return orjson.loads(text)


def without_nul(text: bytes) -> bytes:
    """JSON that jsonb takes: it knows no NUL, which a model may well write."""
    if b"\\u0000" not in text:
        return text
    return orjson.dumps(replaced(orjson.loads(text)))


def replaced(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [replaced(item) for item in value]
    if isinstance(value, dict):
        return {storable(name): replaced(item) for name, item in value.items()}
    return value


def storable(text: str) -> str:
    """The text with a replacement for what no column takes: NUL."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def load_request(kind: str, stored: Any) -> Any:
    """The `Request` or `EmbeddingRequest` of a payload's JSON value."""
    return REQUESTS[kind].validate_python(stored, strict=False)


def load_response(kind: str, stored: Any) -> Any:
    """The `Response` or `EmbeddingResponse` of a payload's JSON value."""
    return RESPONSES[kind].validate_python(stored, strict=False)
