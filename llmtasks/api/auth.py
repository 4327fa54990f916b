"""Who asks: an API key, or a browser with a token for one task.

A token is signed and stored nowhere: it names its task and the key that minted it, lives for
TASK_TOKEN_S, and dies with its key.
"""

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from django.conf import settings
from django.core import signing
from django.http import HttpRequest
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from llmtasks.api.keys import Known, keys, last_used
from llmtasks.errors import NotAllowed, NotAuthenticated, NotFound
from llmtasks.models import Scope

TOKEN_PREFIX = "tt_"  # noqa: S105 - no secret: how tokens begin
SALT = "llmtasks.task-token"
CANCEL = "cancel"
TOKEN_RIGHTS = frozenset({Scope.READ.value, CANCEL})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, and what they may do. `task_id`: only with this task."""

    tenant_id: UUID
    key_id: UUID
    scopes: frozenset[str]
    task_id: UUID | None = None
    is_authenticated: bool = True

    def require(self, scope: str, task_id: UUID | None = None) -> None:
        """Raises NotAllowed, or NotFound for a task that a token was not made for."""
        if self.task_id is not None and task_id is None:
            raise NotAllowed("A task token is good for its one task: use an API key.")
        if self.task_id not in (None, task_id):
            raise NotFound(f"There is no task {task_id}.")
        may_cancel = scope == CANCEL and Scope.WRITE in self.scopes
        if scope not in self.scopes and not may_cancel:
            raise NotAllowed(f"This key lacks the scope {scope!r}: use one that has it.")


class ApiKeyAuthentication(BaseAuthentication):
    """`Authorization: Bearer lt_…` (or `x-api-key`), or a task token `tt_…`."""

    def authenticate(self, request: Request) -> tuple[Principal, str]:
        text = credential_of(request._request)
        if text.startswith(TOKEN_PREFIX):
            return of_token(text.removeprefix(TOKEN_PREFIX)), "token"
        known = keys().by_text(text)
        if known is None:
            raise NotAuthenticated("This API key is wrong, expired or revoked.")
        last_used().note(known.key_id)
        return Principal(known.tenant_id, known.key_id, known.scopes), "key"

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def credential_of(request: HttpRequest) -> str:
    """The text of the key or token. Raises NotAuthenticated where there is none."""
    header: str = request.META.get("HTTP_AUTHORIZATION", "")
    scheme, _, text = header.partition(" ")
    if scheme.lower() == "bearer" and text.strip():
        return text.strip()
    if key := request.META.get("HTTP_X_API_KEY", "").strip():
        return str(key)
    # EventSource can't send headers; a key in a URL would be one in every log.
    token = request.GET.get("token", "")
    if token.startswith(TOKEN_PREFIX) and request.path.endswith("/events"):
        return token
    raise NotAuthenticated("Send your API key: Authorization: Bearer lt_…")


def mint(principal: Principal, task_id: UUID) -> str:
    """A token for one task."""
    claims = [str(task_id), str(principal.tenant_id), str(principal.key_id)]
    return TOKEN_PREFIX + signing.dumps(claims, salt=SALT)


def of_token(text: str) -> Principal:
    """Who holds this token. Raises NotAuthenticated."""
    life = timedelta(seconds=settings.LLMTASKS["TASK_TOKEN_S"])
    try:
        claims = signing.loads(text, salt=SALT, max_age=life)
        task_id, tenant_id, key_id = (UUID(claim) for claim in claims)
    except signing.SignatureExpired:
        raise NotAuthenticated("This task token expired: mint another.") from None
    except (signing.BadSignature, ValueError, TypeError, AttributeError):
        raise NotAuthenticated("This task token is wrong.") from None
    minter: Known | None = keys().by_id(key_id)
    if minter is None or minter.tenant_id != tenant_id:
        raise NotAuthenticated("The key that minted this token is expired or revoked.")
    return Principal(tenant_id, key_id, TOKEN_RIGHTS, task_id)
