"""What went wrong, in the shape of the door that it came through.

Native paths answer RFC 9457 problem+json, the others OpenAI's error body. `ENDINGS` is the table
from the class of a task's error to what an inline caller is told.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson
import psycopg
from django.core.exceptions import RequestDataTooBig
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse, UnreadablePostError
from django.views import defaults
from rest_framework import exceptions

from llmtasks.api.bodies import InvalidBody
from llmtasks.errors import (
    ApiError,
    BodyTooLarge,
    InvalidInput,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    Unavailable,
)
from llmtasks.models import Task
from llmtasks.telemetry import request_id_var

logger = logging.getLogger(__name__)

API = "/v1/"
NATIVE = (
    "/v1/tasks",
    "/v1/tools",
    "/v1/workflows",
    "/v1/providers",
    "/v1/prompts",
    "/v1/feedback",
)
NOTHING_HERE = "There is nothing here; /v1/docs lists what there is."
FAULT = "Internal error; the log has it as {}."
POSTGRES_AWAY = (
    OperationalError,
    InterfaceError,
    psycopg.OperationalError,
    psycopg.InterfaceError,
)


class Told(NamedTuple):
    """`status` and `code` of an answer; the type of OpenAI's body follows from the status."""

    status: int
    code: str


# Class of a task's error → what the caller of an inline call gets. The caller's own key is fine
# when a vendor refuses ours, so that a vendor's 401, 402 and 403 are a bad gateway's 502.
ENDINGS = {
    "RateLimited": Told(429, "rate_limit_exceeded"),
    "Overloaded": Told(503, "vendor_overloaded"),
    "ServerError": Told(502, "vendor_failed"),
    "Timeout": Told(504, "vendor_timeout"),
    "ConnectionFailed": Told(502, "vendor_unreachable"),
    "BadResponse": Told(502, "vendor_bad_response"),
    "AuthenticationFailed": Told(502, "vendor_auth"),
    "PermissionDenied": Told(502, "vendor_auth"),
    "QuotaExhausted": Told(502, "vendor_quota"),
    "InvalidRequest": Told(400, "invalid_request"),
    "ContextTooLong": Told(400, "context_length_exceeded"),
    "ContentFiltered": Told(400, "content_filter"),
    "Unsupported": Told(400, "unsupported_parameter"),
    "DeadlineExceeded": Told(504, "deadline_exceeded"),
    "LimitReached": Told(429, "rate_limit_exceeded"),
    "AgentStopped": Told(422, "agent_stopped"),
    "ToolFailed": Told(422, "tool_failed"),
    "StepFailed": Told(422, "step_failed"),
    "WorkflowStopped": Told(422, "workflow_stopped"),
    "Interrupted": Told(503, "interrupted"),
    "Cancelled": Told(409, "cancelled"),
    "ClientLeft": Told(499, "client_left"),
    "InternalError": Told(500, "internal_error"),
}
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Body too large",
    415: "Unsupported media type",
    422: "Idempotency-Key reused",
    429: "Rate limited",
    499: "Client left",
    500: "Internal error",
    502: "Provider failed",
    503: "Unavailable",
    504: "Timeout",
}


class MethodNotAllowed(ApiError):
    """The path exists, but not with this method."""

    status = 405
    code = "method_not_allowed"


class UnsupportedMedia(ApiError):
    """A body that is no JSON by its own Content-Type."""

    status = 415
    code = "unsupported_media_type"


class Ended(ApiError):
    """An inline task ended without an answer, after all our own tries. `headers` go with it."""

    def __init__(self, task: Task, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(
            task.error_message or f"The task is {task.status}.",
            param=task.error_param or None,
            retry_after=task.retry_after,
        )
        told = ENDINGS.get(task.error_class, Told(500, "internal_error"))
        self.status, self.code = told  # type: ignore[misc]
        self.task = task
        self.headers = headers or {}


class Fault(ApiError):
    """A fault of ours; what it was stands in the log under the request's id."""


def handle(error: Exception, context: Mapping[str, Any]) -> HttpResponse:
    """REST framework's exception handler."""
    request: HttpRequest = context["request"]
    response = answer(as_api_error(error), request.path)
    for name, value in getattr(error, "headers", {}).items():
        response[name] = value
    return response


def as_api_error(error: Exception) -> ApiError:
    """Any exception of a view as one of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, POSTGRES_AWAY):
        logger.warning("refused: Postgres is away", extra={"error": str(error)})
        return Unavailable("Postgres is away: try again shortly.", retry_after=2)
    if isinstance(error, exceptions.APIException | Http404):
        return of_framework(error)
    if isinstance(error, RequestDataTooBig):
        return BodyTooLarge("The body is too large.")
    if isinstance(error, UnreadablePostError):
        return InvalidInput("The body ended before its Content-Length.")
    logger.error("a request failed by a fault of ours", exc_info=error)
    return Fault(FAULT.format(request_id_var.get() or "unnamed"))


def of_framework(error: Exception) -> ApiError:
    if isinstance(error, exceptions.NotAuthenticated | exceptions.AuthenticationFailed):
        return NotAuthenticated("Send your API key: Authorization: Bearer lt_…")
    if isinstance(error, exceptions.PermissionDenied):
        return NotAllowed(str(error.detail))
    if isinstance(error, exceptions.MethodNotAllowed):
        return MethodNotAllowed(str(error.detail))
    if isinstance(error, Http404 | exceptions.NotFound):
        return NotFound(NOTHING_HERE)
    return InvalidInput(str(error))


def answer(error: ApiError, path: str) -> HttpResponse:
    """The error as an HTTP answer, in the shape of the path's door."""
    if path.startswith(NATIVE):
        body, media = problem(error), "application/problem+json"
    else:
        body, media = openai_body(error), "application/json"
    response = HttpResponse(orjson.dumps(body), content_type=media, status=error.status)
    if error.retry_after is not None:
        response["Retry-After"] = str(max(1, -int(-error.retry_after // 1)))
    if isinstance(error, NotAuthenticated):
        response["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Ended):
        # The official clients obey it: else five tries of ours become fifteen.
        response["x-should-retry"] = "true" if error.code == "interrupted" else "false"
        response["x-llmtasks-task-id"] = str(error.task.id)
    return response


def problem(error: ApiError) -> dict[str, Any]:
    """RFC 9457."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": TITLES.get(error.status, "Error"),
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "request_id": request_id_var.get(),
    }
    if error.param:
        body["param"] = error.param
    if isinstance(error, InvalidBody):
        body["errors"] = [{"param": field, "detail": advice} for field, advice in error.errors]
    return body


def openai_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error body."""
    fallback = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": OPENAI_TYPES.get(error.status, fallback),
            "param": error.param,
            "code": error.code,
        }
    }


# --- What happens outside of our views (Django's handlers in the root URLconf) ------------------


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    if not request.path.startswith(API):
        return defaults.bad_request(request, exception)
    error = InvalidInput("This request can't be read: is its Host one that is served here?")
    return answer(error, request.path)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    if not request.path.startswith(API):
        return defaults.page_not_found(request, exception)
    return answer(NotFound(NOTHING_HERE), request.path)


def server_error(request: HttpRequest) -> HttpResponse:
    if not request.path.startswith(API):
        return defaults.server_error(request)
    return answer(Fault(FAULT.format(request_id_var.get() or "unnamed")), request.path)
