"""What every door does with a request before it is work: who, how much, which wishes.

The body is read once as bytes, under MAX_BODY_BYTES, and its bytes are what an Idempotency-Key
is bound to.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import UUID

from django.conf import settings
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.request import Request
from rest_framework.views import APIView

from llmtasks import submit
from llmtasks.api.auth import Principal
from llmtasks.api.bodies import Scheduling
from llmtasks.api.errors import UnsupportedMedia
from llmtasks.errors import ApiError, BodyTooLarge, InvalidInput
from llmtasks.models import Task
from llmtasks.submit import Idempotency, Work
from llmtasks.telemetry import request_id_var

AnyHttp = TypeVar("AnyHttp", bound=HttpResponseBase)

JSON_TYPES = re.compile(r"(application/([a-z.-]+\+)?json)?\s*(;|\Z)", re.IGNORECASE)
VISIBLE_ASCII = re.compile(r"[\x21-\x7e]{1,255}\Z")
READ_AT_ONCE = 65_536
# So much earlier than the caller hangs up he is to have his answer: a second, or a tenth of a
# shorter wait.
BEFORE_HANG_UP_S = 1.0
# So much of a body that is too large is read and thrown away, so that its sender, who may not
# listen before all is sent, hears why.
DRAINED_BODIES = 3


class OneRenderer(BaseContentNegotiation):
    """Answers are rendered by hand: whatever the client accepts, it gets what the path gives."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        return parsers[0]

    def select_renderer(self, request: Request, renderers: Any, format_suffix: Any = None) -> Any:
        return renderers[0], renderers[0].media_type


class ApiView(APIView):
    """REST framework's view with its dispatch, authentication and errors, and nothing else."""

    content_negotiation_class = OneRenderer
    permission_classes = ()
    metadata_class = None
    # Preflights are answered by the CORS middleware.
    http_method_names = ("get", "head", "post")


def principal_of(request: Request) -> Principal:
    principal = request.user
    if not isinstance(principal, Principal):
        raise TypeError("a view without authentication asked who it is")
    return principal


# --- The body -------------------------------------------------------------------------------


def read_body(request: Request, *, is_json: bool = True) -> bytes:
    """The request's bytes. Raises BodyTooLarge, UnsupportedMedia."""
    http = request._request
    limit = int(settings.LLMTASKS["MAX_BODY_BYTES"])
    if "chunked" in http.META.get("HTTP_TRANSFER_ENCODING", "").lower():
        raw = read_chunked(http, limit)
    elif length_of(http) > limit:
        drain(http, limit)
        raise too_large(limit)
    else:
        raw = http.body
    if raw and is_json and not JSON_TYPES.match(http.META.get("CONTENT_TYPE", "")):
        raise UnsupportedMedia("Send JSON, with the header Content-Type: application/json.")
    return raw


def length_of(http: HttpRequest) -> int:
    try:
        return int(http.META.get("CONTENT_LENGTH") or 0)
    except ValueError:
        return 0


def read_chunked(http: HttpRequest, limit: int) -> bytes:
    """A body without a Content-Length, which Django itself takes for empty."""
    source, pieces, size = http.META["wsgi.input"], [], 0
    while size <= DRAINED_BODIES * limit and (piece := source.read(READ_AT_ONCE)):
        size += len(piece)
        if size <= limit:
            pieces.append(piece)
    if size > limit:
        raise too_large(limit)
    return b"".join(pieces)


def drain(http: HttpRequest, limit: int) -> None:
    left = min(length_of(http), DRAINED_BODIES * limit)
    while left > 0 and (piece := http.read(min(left, READ_AT_ONCE))):
        left -= len(piece)


def too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {limit} bytes: send less.")


# --- Wishes in headers ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preferences:
    """RFC 7240's `Prefer`, as far as it is honoured here. `wait` is in seconds, as is the most
    that the caller's `patience` allows."""

    respond_async: bool = False
    wait: float | None = None
    patience: float = math.inf


def preferences_of(request: Request) -> Preferences:
    """What can't be read is passed over, as the RFC has it."""
    patience = patience_of(request)
    text = request._request.META.get("HTTP_PREFER")
    if not text:
        return Preferences(patience=patience)
    respond_async, wait = False, None
    for item in text.split(","):
        name, _, value = item.partition(";")[0].partition("=")
        name, value = name.strip().lower(), value.strip().strip('"')
        if name == "respond-async":
            respond_async = True
        elif name == "wait" and value.isascii() and value.isdigit() and len(value) < 10:
            wait = min(float(value), settings.LLMTASKS["MAX_WAIT_S"], patience)
    return Preferences(respond_async, wait, patience)


def patience_of(request: Request) -> float:
    """How long the caller waits for the first byte of an answer, less what it takes to be there
    in time. The official clients announce it; what can't be read is passed over."""
    try:
        announced = float(request._request.META.get("HTTP_X_STAINLESS_READ_TIMEOUT", "inf"))
    except ValueError:
        return math.inf
    if not announced > 0:
        return math.inf
    return announced - min(BEFORE_HANG_UP_S, announced / 10)


def idempotency_of(request: Request, raw: bytes, endpoint: str) -> Idempotency | None:
    """The client's Idempotency-Key for the endpoint (a path's template). Raises InvalidInput."""
    key = request._request.META.get("HTTP_IDEMPOTENCY_KEY")
    if key is None:
        return None
    if not VISIBLE_ASCII.match(key):
        raise InvalidInput(
            "Idempotency-Key: give 1 to 255 visible ASCII characters, like a UUID.",
            param="Idempotency-Key",
        )
    # The path is part of what was asked: /retry has its task there, and no body.
    digest = hashlib.sha256(request.path.encode() + b"\0" + raw).hexdigest()
    return Idempotency(endpoint=endpoint, key=key, body_hash=digest)


# --- Work -----------------------------------------------------------------------------------


def work_of(
    principal: Principal,
    kind: str,
    request: Any,
    when: Scheduling,
    *,
    metadata: Mapping[str, Any] | None,
    user: str | None,
    stream: bool | None = None,
    idempotency: Idempotency | None = None,
    prompt: str = "",
) -> Work:
    return Work(
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        kind=kind,
        request=request,
        lane=when.lane,
        metadata=dict(metadata or {}),
        user=user or "",
        request_id=request_id_var.get(),
        run_at=when.run_at,
        deadline_s=when.deadline_s,
        on_unknown=when.on_unknown,
        stream=stream,
        idempotency=idempotency,
        prompt=prompt,
    )


def within_patience(work: Work, wishes: Preferences) -> Work:
    """Inline work whose deadline is not after its caller hangs up: he would ask again, and the
    first call would be paid for in vain."""
    if wishes.patience >= submit.MAX_DEADLINE_S:
        return work
    wanted = wishes.patience if work.deadline_s is None else min(work.deadline_s, wishes.patience)
    return replace(work, deadline_s=wanted)


def earlier_task(tenant_id: UUID, idempotency: Idempotency | None) -> Task | None:
    """The task that this very request made before."""
    return None if idempotency is None else submit.replay(tenant_id, idempotency)


def queue(work: Work) -> Task:
    """A saved, waiting task. Raises what refused it."""
    [result] = submit.queued([work])
    if isinstance(result, ApiError):
        raise result
    return result


def tell_replayed(response: AnyHttp) -> AnyHttp:
    response["Idempotent-Replayed"] = "true"
    return response
