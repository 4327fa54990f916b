"""What an adapter is: an account, declared capabilities, three calls.

An adapter is pure functions (to wire, from wire, from stream, usage) beside these I/O methods.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from providers.http import Exchange
from providers.types import (
    Done,
    EmbeddingRequest,
    EmbeddingResponse,
    Request,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One vendor account. `api_key` is the secret itself: it is kept out of `repr`.

    `options` are the adapter's own (`api_version`, `headers`, …). Timeouts are in seconds;
    `total_timeout` bounds a whole call, streamed or not. `may_reach`, where given, is asked of each
    address that the host has, before a connection to it is made.
    """

    name: str
    base_url: str
    api_key: str = field(default="", repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    connect_timeout: float = 5.0
    read_timeout: float = 120.0
    total_timeout: float = 600.0
    may_reach: Callable[[str], bool] | None = None


class Option(NamedTuple):
    """One key of `Account.options`: what it must be, in words and as a test."""

    wanted: str
    valid: Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Whether `value` can stand in a header or a query as it is."""
    return isinstance(value, str) and re.fullmatch(r"[ -~]{1,500}", value) is not None


# Headers that carry the credential or belong to the transport: rows are stored in clear.
_RESERVED_HEADERS = frozenset(
    {
        "authorization", "api-key", "x-api-key", "cookie", "proxy-authorization", "host",
        "connection", "content-length", "content-type", "transfer-encoding", "accept-encoding",
    }
)  # fmt: skip


def _is_headers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str)
        and re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", name) is not None
        and name.lower() not in _RESERVED_HEADERS
        and is_text(text)
        for name, text in value.items()
    )


HEADERS = Option("an object of header names and texts, none of them a credential", _is_headers)


class Provider:
    """An adapter bound to an account. Thread-safe: it holds no state of a call."""

    supports_chat: ClassVar[bool] = True
    supports_streaming: ClassVar[bool] = True
    supports_embeddings: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Option]] = {"headers": HEADERS}

    def __init__(self, account: Account) -> None:
        self.account = account

    def limited_input(self, usage: Usage) -> int:
        """The input tokens of a call that count towards the vendor's rate limits."""
        return usage.total_input_tokens

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


def as_stream(response: Response) -> Iterator[StreamEvent]:
    """A whole answer as the stream that would have built it."""
    index = 0
    for part in response.parts:
        if isinstance(part, Thinking) and part.text:
            yield ThinkingDelta(text=part.text)
        elif isinstance(part, Text) and part.text:
            yield TextDelta(text=part.text)
        elif isinstance(part, ToolCall):
            yield ToolCallDelta(index=index, id=part.id, name=part.name, arguments=part.arguments)
            index += 1
    yield Done(response=response)
