"""What can go wrong at a vendor, as one tree.

    ProviderError
    ├── RateLimited            429: wait for `retry_after`
    ├── TransientError         try again, then the next candidate; counts for the breaker
    │   ├── Overloaded         503, 529
    │   ├── ServerError        any other 5xx
    │   ├── Timeout            408, 504, or no answer in time
    │   ├── ConnectionFailed   no connection, or it broke before the answer began
    │   └── BadResponse        an answer that is not what the vendor documents, or cut short
    ├── CredentialError        never again with this credential; the next candidate
    │   ├── AuthenticationFailed   401
    │   ├── PermissionDenied       403
    │   └── QuotaExhausted         402, or a 429 that says that the money is gone
    ├── InvalidRequest         400, 404, 405, 409, 413, 415, 422: the caller's fault, final
    │   └── ContextTooLong     too many tokens for the model: a larger window may do
    ├── ContentFiltered        the vendor's policy refused; final, told as such
    └── Unsupported            this adapter can't do what the request asks; nothing was sent

    Dropped                    we ended the call ourselves: cancel, deadline or lost lease

The status decides first, the body only refines it (see `http.error_from_response`). Each class
says what to do next: `retryable` (same candidate again), `try_next` (another candidate may
answer), `breaker` (counts against the vendor's health).
"""

from typing import ClassVar


class ProviderError(Exception):
    """A vendor's call failed. `message` is safe to show to the caller: it holds no credential.

    `status` is the HTTP status, None where there was none; `retry_after` is in seconds;
    `param` names the request's field that the vendor objected to; `code` is the vendor's own
    code; `request_id` is the vendor's id of the call.
    """

    retryable: ClassVar[bool] = False
    try_next: ClassVar[bool] = False
    breaker: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.retry_after = retry_after
        self.code = code
        self.param = param
        self.request_id = request_id


class RateLimited(ProviderError):
    """The vendor's rate limit; not a fault of the vendor or of the request."""

    retryable = True
    try_next = True


class TransientError(ProviderError):
    """A fault that may pass by itself."""

    retryable = True
    try_next = True
    breaker = True


class Overloaded(TransientError):
    """The vendor has no capacity now (503, 529)."""


class ServerError(TransientError):
    """The vendor failed (other 5xx)."""


class Timeout(TransientError):
    """The vendor did not answer in time (408, 504, or a limit of ours).

    For a limit of ours `code` names it: `connect_timeout`, `read_timeout`, `total_timeout`, or
    `deadline`, the exchange's own.
    """


class ConnectionFailed(TransientError):
    """No connection to the vendor, or it broke before the answer began.

    `code` is `dns` for a name without an address, `tls` for a failed handshake.
    """


class BadResponse(TransientError):
    """The answer is not what the vendor documents: not JSON, no choices, a stream cut short."""


class CredentialError(ProviderError):
    """The credential can't be used; calling again with it is pointless."""

    try_next = True


class AuthenticationFailed(CredentialError):
    """The vendor does not know the credential (401)."""


class PermissionDenied(CredentialError):
    """The credential may not do this (403)."""


class QuotaExhausted(CredentialError):
    """The account's money or quota is used up (402, or 429 with `insufficient_quota`)."""


class InvalidRequest(ProviderError):
    """The vendor refused the request's content (400, 404, 409, 413, 422 …)."""


class ContextTooLong(InvalidRequest):
    """The prompt does not fit the model's window; a candidate with a larger one may do."""

    try_next = True


class ContentFiltered(ProviderError):
    """The vendor's content policy refused the prompt or the answer."""


class Unsupported(ProviderError):
    """The adapter can't express what `param` asks for; nothing was sent."""

    try_next = True


class Dropped(Exception):
    """The call was ended from our side; `reason` says why (`cancel`, `deadline`, `lease`, …)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
