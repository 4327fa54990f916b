"""A vendor's error answer → our error: the status decides, the body refines.

The bodies that are read: OpenAI's and Azure's `{"error": {message, type, param, code}}` (openai
SDK `_exceptions.APIError`), Anthropic's `{"type": "error", "error": {type, message}}` (anthropic
SDK `types/shared/error_object.py`), the flat `{message, type, code}` of older vLLM servers,
FastAPI's `{"detail": …}`, and plain text. Anything else leaves the bare status.
"""

import email.utils
import math
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from providers.errors import (
    AuthenticationFailed,
    BadResponse,
    ContentFiltered,
    ContextTooLong,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    ProviderError,
    QuotaExhausted,
    RateLimited,
    ServerError,
    Timeout,
)
from providers.wire import clean, parse

MAX_MESSAGE = 500  # characters
MAX_RETRY_AFTER = 86_400.0  # seconds: quotas that reset daily are the longest that vendors have

_BY_STATUS: Final[Mapping[int, type[ProviderError]]] = {
    401: AuthenticationFailed,
    402: QuotaExhausted,
    403: PermissionDenied,
    408: Timeout,
    429: RateLimited,
    499: Timeout,  # the vendor's own proxy gave up on the answer
    503: Overloaded,
    504: Timeout,
    529: Overloaded,
}

# Error types that come without a status, in the middle of a stream. Anthropic's are those of
# https://platform.claude.com/docs/en/api/errors; `server_error` and `rate_limit_exceeded` are
# OpenAI's; the names with capitals are vLLM's.
_STATUS_BY_TYPE: Final[Mapping[str, int]] = {
    "invalid_request_error": 400,
    "BadRequestError": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "insufficient_quota": 429,
    "permission_error": 403,
    "not_found_error": 404,
    "NotFoundError": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "requests": 429,
    "tokens": 429,
    "api_error": 500,
    "server_error": 500,
    "InternalServerError": 500,
    "overloaded_error": 529,
    "timeout_error": 504,
}

_QUOTA_CODES: Final = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "billing_error",
        # Anthropic's `error.details.error_code`: limits of spending, not of rate.
        "contract_spend_limit_reached",
        "enforced_spend_limit_reached",
        "linked_organization_spend_limit_reached",
    }
)
_FILTER_CODES: Final = frozenset(
    {"content_filter", "content_policy_violation", "responsibleaipolicyviolation"}
)
_CONTEXT_CODES: Final = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_MODEL_CODES: Final = frozenset({"model_not_found", "deploymentnotfound", "not_found_error"})
_CONTEXT_TEXT: Final = re.compile(
    r"prompt is too long|maximum context length|exceeds? the (?:model's )?context (?:window|limit"
    r"|length)|exceed context limit|input is too long|exceeds the available context size",
    re.IGNORECASE,
)
# Anthropic answers 400 for an empty balance and for a spend limit that the customer set.
_QUOTA_TEXT: Final = re.compile(
    r"credit balance is too low|specified API usage limits", re.IGNORECASE
)


def error_from_response(
    status: int, headers: Mapping[str, str], body: bytes, *, secret: str = ""
) -> ProviderError:
    """The error that an answer of 400 to 599 stands for; `BadResponse` for any other status.

    `headers` has lower-case names. `secret` is blanked out of the message, should the vendor
    echo it.
    """
    fault = _read(body)
    message = _redact(fault["message"] or _phrase(status), secret)
    return _class(status, fault)(
        message,
        status=status,
        retry_after=retry_after(headers),
        code=fault["code"] or fault["type"] or None,
        param=_param(status, fault),
        request_id=request_id(headers),
    )


def error_from_event(
    payload: Any, headers: Mapping[str, str], *, secret: str = ""
) -> ProviderError:
    """The error that an object stands for that came with status 200 (see `is_error`)."""
    fault = _fields(payload)
    status = _status_of(fault)
    return _class(status, fault)(
        _redact(fault["message"] or "the answer is an error", secret),
        code=fault["code"] or fault["type"] or None,
        param=_param(status, fault),
        request_id=request_id(headers),
    )


def is_error(payload: Mapping[str, Any]) -> bool:
    """Whether a JSON object that came with status 200 is an error all the same."""
    return bool(payload.get("error")) or "error" in (payload.get("type"), payload.get("object"))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or a date), or None.

    Never negative, never more than `MAX_RETRY_AFTER`.
    """
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / divisor
        except ValueError:
            continue
        if not math.isnan(seconds):
            return min(max(seconds, 0.0), MAX_RETRY_AFTER)
    try:
        when = email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return min(max(when - time.time(), 0.0), MAX_RETRY_AFTER)


def request_id(headers: Mapping[str, str]) -> str | None:
    """The vendor's id of the call: OpenAI's, Anthropic's, Azure's gateway's header."""
    for name in ("x-request-id", "request-id", "apim-request-id"):
        if value := headers.get(name):
            return clean(value)[:200]
    return None


def _read(body: bytes) -> dict[str, str]:
    try:
        return _fields(parse(body))
    except ValueError:
        text = body[: 4 * MAX_MESSAGE].decode(errors="replace").strip()
        # A proxy's HTML page tells a reader nothing that the status does not.
        return _fields(None if text.startswith("<") else text)


def _fields(payload: Any) -> dict[str, str]:
    """`message`, `type`, `code`, `param` and `inner` of whatever shape the vendor chose."""
    if isinstance(payload, dict) and payload.get("error"):
        payload = payload["error"]
    if not isinstance(payload, dict):
        payload = {"message": payload}
    inner = payload.get("innererror")
    detail = payload.get("detail")
    return {
        "message": _word(payload.get("message")) or _detail(detail),
        "type": _word(payload.get("type")),
        "code": _word(payload.get("code")) or _code_in(payload.get("details")),
        "param": _word(payload.get("param")),
        "inner": _word(inner.get("code")) if isinstance(inner, dict) else "",
    }


def _code_in(details: Any) -> str:
    return _word(details.get("error_code")) if isinstance(details, dict) else ""


def _detail(detail: Any) -> str:
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        detail = detail[0].get("msg")
    return _word(detail)


def _word(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**9:
        return str(value)
    return clean(value) if isinstance(value, str) else ""


def _phrase(status: int) -> str:
    try:
        return f"HTTP {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status}"


def _redact(message: str, secret: str) -> str:
    # Placeholder keys of local servers (`x`, `-`) are no secrets and would shred the message.
    if len(secret) >= 4:
        message = message.replace(secret, "[key]")
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"


def _class(status: int, fault: Mapping[str, str]) -> type[ProviderError]:
    if not 400 <= status <= 599:
        return BadResponse
    refined = _refined(status, fault)
    if refined is not None:
        return refined
    if status >= 500:
        return _BY_STATUS.get(status, ServerError)
    return _BY_STATUS.get(status, InvalidRequest)


def _refined(status: int, fault: Mapping[str, str]) -> type[ProviderError] | None:
    words = {fault["code"].lower(), fault["type"].lower(), fault["inner"].lower()}
    if status >= 500:
        return Overloaded if "overloaded_error" in words else None
    if words & _QUOTA_CODES or _QUOTA_TEXT.search(fault["message"]):
        return QuotaExhausted
    if status not in (400, 404, 413, 422):
        return None
    if words & _FILTER_CODES:
        return ContentFiltered
    if words & _CONTEXT_CODES or _CONTEXT_TEXT.search(fault["message"]):
        return ContextTooLong
    return AuthenticationFailed if "invalid_api_key" in words else None


def _param(status: int, fault: Mapping[str, str]) -> str | None:
    words = {fault["code"].lower(), fault["type"].lower()}
    if status == 404 and (words & _MODEL_CODES or "model" in fault["message"].lower()):
        return "model"
    return fault["param"][:200] or None


def _status_of(fault: Mapping[str, str]) -> int:
    code = fault["code"]
    if code.isdecimal() and 400 <= int(code) <= 599:
        return int(code)
    for word in (code, fault["type"]):
        if word in _STATUS_BY_TYPE:
            return _STATUS_BY_TYPE[word]
    # Codes that refine a request's fault (`context_length_exceeded` …) imply one.
    if _refined(400, fault) is not None:
        return 400
    return 500
