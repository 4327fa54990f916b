"""What an adapter is: an account, declared capabilities, three calls.

An adapter is pure functions (to wire, from wire, from stream, usage) beside these I/O methods.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from providers.http import Exchange
from providers.types import (
    EmbeddingRequest,
    EmbeddingResponse,
    Request,
    Response,
    StreamEvent,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One vendor account. `api_key` is the secret itself: it is kept out of `repr`.

    `options` are the adapter's own (`api_version`, `headers`, …). Timeouts are in seconds;
    `total_timeout` bounds a whole call, streamed or not.
    """

    name: str
    base_url: str
    api_key: str = field(default="", repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    connect_timeout: float = 5.0
    read_timeout: float = 120.0
    total_timeout: float = 600.0


class Provider:
    """An adapter bound to an account. Thread-safe: it holds no state of a call."""

    supports_chat: ClassVar[bool] = True
    supports_streaming: ClassVar[bool] = True
    supports_embeddings: ClassVar[bool] = False

    def __init__(self, account: Account) -> None:
        self.account = account

    def unsupported(self, request: Request) -> str | None:
        """The name of the first field of `request` that this adapter can't honour, or None.

        Features count (logprobs, an image, a JSON schema); tuning knobs that a vendor lacks
        (seed, penalties) are dropped silently.
        """
        raise NotImplementedError

    def complete(self, request: Request, exchange: Exchange) -> Response:
        """Send the chat and wait for the whole answer. Raises `ProviderError`, `Dropped`."""
        raise NotImplementedError

    def stream(self, request: Request, exchange: Exchange) -> Iterator[StreamEvent]:
        """Send the chat and yield its deltas, then one `Done`. Raises as `complete` does.

        Closing the iterator closes the connection.
        """
        raise NotImplementedError

    def embed(self, request: EmbeddingRequest, exchange: Exchange) -> EmbeddingResponse:
        """Embed the inputs. Raises as `complete` does."""
        raise NotImplementedError
