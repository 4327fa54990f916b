"""Requests and answers as they are stored: our vocabulary as JSON, with a version.

A later change of the vocabulary raises VERSION and teaches `load_*` to read the older ones.
"""

from typing import Any

import orjson
from pydantic import TypeAdapter

from llmtasks.models import Kind
from providers.types import EmbeddingRequest, EmbeddingResponse, Request, Response

VERSION = 1

AnyRequest = Request | EmbeddingRequest
AnyResponse = Response | EmbeddingResponse

REQUESTS: dict[str, TypeAdapter[Any]] = {
    Kind.CHAT: TypeAdapter(Request),
    Kind.EMBEDDING: TypeAdapter(EmbeddingRequest),
}
RESPONSES: dict[str, TypeAdapter[Any]] = {
    Kind.CHAT: TypeAdapter(Response),
    Kind.EMBEDDING: TypeAdapter(EmbeddingResponse),
}


def dump_request(kind: str, request: AnyRequest) -> bytes:
    """The request as JSON text."""
    return without_nul(REQUESTS[kind].dump_json(request, exclude_none=True))


def dump_response(kind: str, response: AnyResponse) -> bytes:
    return without_nul(RESPONSES[kind].dump_json(response, exclude_none=True))


def dump(value: Any) -> bytes:
    """Any JSON value as text that Postgres stores."""
    return without_nul(orjson.dumps(value, default=dict))


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
