"""Requests and answers as they are stored: our vocabulary as JSON, with a version.

A later change of the vocabulary raises VERSION and teaches `load_*` to read the older ones.
"""

from typing import Any

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
    return REQUESTS[kind].dump_json(request, exclude_none=True)


def dump_response(kind: str, response: AnyResponse) -> bytes:
    return RESPONSES[kind].dump_json(response, exclude_none=True)


def load_request(kind: str, stored: Any) -> Any:
    """The `Request` or `EmbeddingRequest` of a payload's JSON value."""
    return REQUESTS[kind].validate_python(stored, strict=False)


def load_response(kind: str, stored: Any) -> Any:
    """The `Response` or `EmbeddingResponse` of a payload's JSON value."""
    return RESPONSES[kind].validate_python(stored, strict=False)
