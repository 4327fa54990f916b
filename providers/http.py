"""The one way to a vendor: connections, caps, answers. Only this module knows httpx.

httpx and httpcore look through all connections of a pool for every call, which costs
milliseconds with hundreds of calls under way. So a call here takes a connection from a stack per
origin, or opens one, and gives it back: O(1). Last in, first out, so that what a burst left over
grows old and goes.

What bounds a call: the account's `connect_timeout` for name, TCP and TLS together, `read_timeout`
for each wait for bytes, `total_timeout` and the exchange's deadline for all of it, a drip of
single bytes included; the caps below. Redirects are not followed, proxies of the environment are
not used, and nothing is sent twice once a byte of it went out. TLS is verified against certifi's
roots, or those of `SSL_CERT_FILE` or `SSL_CERT_DIR`.
"""

import atexit
import contextlib
import os
import re
import ssl
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import httpcore
import httpx

from providers import sockets, wire
from providers.errors import (
    AuthenticationFailed,
    BadResponse,
    ConnectionFailed,
    Dropped,
    InvalidRequest,
    ProviderError,
    Timeout,
)
from providers.faults import error_from_event, error_from_response, is_error, request_id
from providers.sockets import Clock, Exchange, StaleError, Stream
from providers.sse import Parser, ServerSentEvent

if TYPE_CHECKING:
    from providers.base import Account

__all__ = [
    "Answer",
    "Exchange",
    "ServerSentEvent",
    "api_key",
    "ask",
    "error_from_response",
    "post_json",
    "send",
]

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_STREAM_BYTES: Final = 256 * 1024 * 1024
MAX_ERROR_BYTES: Final = 256 * 1024
MAX_IDLE_PER_ORIGIN: Final = 256
# Seconds that an idle connection is kept; longer, and vendors' own limits race with ours.
IDLE_EXPIRY: Final = 20.0
# Seconds that the end of a finished stream may take, so that its connection can be used again.
DRAIN_SECONDS: Final = 0.05

# Which of our errors each error of the HTTP libraries is; a subclass counts as its nearest base.
# A connection that breaks once bytes of the answer came is `BadResponse` instead (see `_ours`).
FOREIGN_ERRORS: Final[Mapping[type[Exception], type[ProviderError]]] = {
    OSError: ConnectionFailed,
    httpcore.TimeoutException: Timeout,
    httpcore.NetworkError: ConnectionFailed,
    httpcore.RemoteProtocolError: BadResponse,
    httpcore.LocalProtocolError: InvalidRequest,
    httpcore.ProtocolError: BadResponse,
    httpcore.UnsupportedProtocol: ConnectionFailed,
    httpcore.ProxyError: ConnectionFailed,
    httpcore.ConnectionNotAvailable: ConnectionFailed,
    httpx.TimeoutException: Timeout,
    httpx.NetworkError: ConnectionFailed,
    httpx.RemoteProtocolError: BadResponse,
    httpx.LocalProtocolError: InvalidRequest,
    httpx.ProtocolError: BadResponse,
    httpx.UnsupportedProtocol: ConnectionFailed,
    httpx.ProxyError: ConnectionFailed,
    httpx.TransportError: ConnectionFailed,
    httpx.DecodingError: BadResponse,
    httpx.TooManyRedirects: BadResponse,
    httpx.RequestError: ConnectionFailed,
    httpx.HTTPStatusError: BadResponse,
    httpx.HTTPError: ConnectionFailed,
    httpx.InvalidURL: ConnectionFailed,
    httpx.CookieConflict: BadResponse,
    httpx.StreamError: BadResponse,
}

_FOREIGN: Final = tuple(FOREIGN_ERRORS)
_KEY: Final = re.compile(r"[!-~]*")


def api_key(account: "Account") -> str:
    """The account's key without white space around it (a file ends with a newline).

    Raises `AuthenticationFailed` for a key that no header can carry; the key is not in it.
    """
    key = account.api_key.strip()
    if not _KEY.fullmatch(key):
        raise AuthenticationFailed(
            f"the key of {account.name} holds white space, control or non-ASCII characters"
        )
    return key


def post_json(
    account: "Account",
    path: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    exchange: Exchange,
) -> dict[str, Any]:
    """Send `body` and wait for the whole answer, a JSON object.

    Raises `ProviderError`, `Dropped`.
    """
    with send(account, path, body, headers, exchange) as answer:
        return answer.json()


@contextlib.contextmanager
def send(
    account: "Account",
    path: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    exchange: Exchange,
) -> Iterator["Answer"]:
    """Send `body` to `path` below the account's base URL; an answer of 2xx is yielded unread.

    Leaving the block gives the connection back if the answer was read to its end, else closes
    it. Raises `ProviderError` (for every other status too), `Dropped`.
    """
    exchange.check()
    payload = wire.dump(body)
    target = _target(account.base_url, path)
    with _ask(account, "POST", target, payload, headers, exchange) as answer:
        if not 200 <= answer.status <= 299:
            raise error_from_response(
                answer.status, answer.headers, answer.read_error(), secret=account.api_key.strip()
            )
        yield answer


def ask(
    account: "Account",
    method: str,
    path: str,
    payload: bytes | None,
    headers: Mapping[str, str],
    exchange: Exchange,
) -> contextlib.AbstractContextManager["Answer"]:
    """As `send`, with any method, JSON text or no body; the answer is yielded unread, whatever its
    status."""
    exchange.check()
    target = _parsed(account.base_url, path)
    if payload is None and method in ("POST", "PUT", "PATCH"):
        # Some servers answer 411 where no length is told.
        payload = b""
    return _ask(account, method, target, payload, headers, exchange)


@contextlib.contextmanager
def _ask(
    account: "Account",
    method: str,
    target: "_Target",
    payload: bytes | None,
    headers: Mapping[str, str],
    exchange: Exchange,
) -> Iterator["Answer"]:
    call = _Call(account, target, exchange)
    try:
        yield call.start(method, _head(target, headers, exchange.headers, payload), payload or b"")
    except ProviderError as exc:
        exc.request_id = exc.request_id or exchange.request_id
        raise
    except _FOREIGN as exc:
        error = _ours(exc, call)
        error.request_id = exchange.request_id
        raise error from None
    finally:
        call.end()


class Answer:
    """A vendor's answer whose body is still to be read, once."""

    def __init__(self, response: httpcore.Response, clock: Clock, secret: str) -> None:
        self.status = response.status
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in response.headers
        }
        self._clock = clock
        self._secret = secret
        self._chunks = _decoded(self.headers, cast("Iterable[bytes]", response.stream))

    @property
    def is_json(self) -> bool:
        """Whether the answer is one JSON document: some servers ignore `stream`."""
        return "json" in self.headers.get("content-type", "").partition(";")[0]

    def read(self, limit: int = MAX_BODY_BYTES) -> bytes:
        """The whole body. Raises `BadResponse` where it is larger than `limit`."""
        chunks = []
        size = 0
        for chunk in self._chunks:
            self._clock.exchange.mark_first_byte()
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise BadResponse(f"the answer is larger than {limit} bytes")
        return b"".join(chunks)

    def read_error(self) -> bytes:
        """As much of the body as there is: the status alone says enough."""
        with contextlib.suppress(BadResponse, Timeout, *_FOREIGN):
            return self.read(MAX_ERROR_BYTES)
        return b""

    def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises `BadResponse`; what an error stands for that came with status 200.
        """
        value = wire.parse_object(self.read(), "the answer")
        if is_error(value):
            raise self.error(value)
        return value

    def error(self, payload: Any) -> ProviderError:
        """The error that an object within an answer of status 200 stands for."""
        return error_from_event(payload, self.headers, secret=self._secret)

    def events(self) -> Iterator[ServerSentEvent]:
        """The body's events as they come. Raises `BadResponse` for one that is too large."""
        parser = Parser()
        size = 0
        for chunk in self._chunks:
            size += len(chunk)
            if size > MAX_STREAM_BYTES:
                raise BadResponse(f"the stream is larger than {MAX_STREAM_BYTES} bytes")
            yield from parser.feed(chunk)
        yield from parser.finish()

    def drain(self) -> None:
        """Read the little that follows a stream's last event, so that the connection is free."""
        self._clock.total_end = min(self._clock.total_end, time.monotonic() + DRAIN_SECONDS)
        # Dropped now or not, the answer is there, and it costs the same.
        with contextlib.suppress(Dropped, Timeout, *_FOREIGN):
            deque(islice(self._chunks, 8), maxlen=0)


class _Target(NamedTuple):
    host: str
    port: int
    tls: bool
    url: httpcore.URL
    authority: bytes


class _Call:
    """The connection of one call, from the stack or new, and back."""

    def __init__(self, account: "Account", target: _Target, exchange: Exchange) -> None:
        self.clock = Clock(exchange, account.read_timeout, account.total_timeout)
        self.stream: Stream | None = None
        self.secret = account.api_key.strip()
        self._connect_timeout = account.connect_timeout
        self._may_reach = account.may_reach
        self._target = target
        # Connections that were made without a look at the address are no others'.
        self._origin = (target.host, target.port, target.tls, account.may_reach is not None)
        self._connection: httpcore.HTTP11Connection | None = None
        self._response: httpcore.Response | None = None

    def start(self, method: str, head: list[tuple[bytes, bytes]], payload: bytes) -> Answer:
        request = httpcore.Request(method, self._target.url, headers=head, content=payload)
        while self._response is None:
            connection = self._connect()
            # Stale: its server closed it, and nothing went out. A new connection never is.
            with contextlib.suppress(StaleError):
                self._response = connection.handle_request(request)
        exchange = self.clock.exchange
        answer = Answer(self._response, self.clock, self.secret)
        exchange.status = answer.status
        exchange.response_headers = answer.headers
        exchange.request_id = request_id(answer.headers)
        return answer

    def _connect(self) -> httpcore.HTTP11Connection:
        target = self._target
        idle = _take(self._origin)
        if idle is not None:
            connection, stream = idle
        else:
            context = _tls() if target.tls else None
            timeout = self._connect_timeout
            stream = sockets.connect(
                target.host, target.port, self.clock, timeout, context, self._may_reach
            )
            connection = httpcore.HTTP11Connection(
                target.url.origin, cast("httpcore.NetworkStream", stream), IDLE_EXPIRY
            )
        self._connection, self.stream = connection, stream
        stream.start(self.clock, reused=idle is not None)
        return connection

    def end(self) -> None:
        """Give the connection back if its answer was read to the end, else close it."""
        if self._connection is None or self.stream is None:
            return
        if self._response is not None:
            self._response.close()
        self.clock.exchange.release()
        if self._connection.is_idle():
            self.stream.park()
            _give(self._origin, self._connection, self.stream)
        else:
            self._connection.close()


_Origin = tuple[str, int, bool, bool]
_Idle = tuple[httpcore.HTTP11Connection, Stream]

# Stacks of idle connections by origin. A deque's pop and append are atomic: no lock.
_idle: dict[_Origin, deque[_Idle]] = {}


def _take(origin: _Origin) -> _Idle | None:
    stack = _idle.get(origin)
    while stack:
        try:
            connection, stream = stack.pop()
        except IndexError:  # another thread was faster
            return None
        if not connection.has_expired():
            return connection, stream
        connection.close()
    return None


def _give(origin: _Origin, connection: httpcore.HTTP11Connection, stream: Stream) -> None:
    stack = _idle.setdefault(origin, deque())
    stack.append((connection, stream))
    # The oldest lie at the bottom. Two looks per call keep up with whatever a burst left there.
    for _ in range(2):
        try:
            oldest, _stream = stack.popleft()
        except IndexError:
            return
        if len(stack) < MAX_IDLE_PER_ORIGIN and not oldest.has_expired():
            stack.appendleft((oldest, _stream))
            return
        oldest.close()


def close_idle() -> None:
    """Close every idle connection of this process."""
    for stack in list(_idle.values()):
        while stack:
            with contextlib.suppress(IndexError):
                stack.pop()[0].close()


atexit.register(close_idle)
# A child that used its parent's sockets would mix two conversations.
os.register_at_fork(after_in_child=close_idle)


def _tls() -> ssl.SSLContext:
    return _tls_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@lru_cache(maxsize=8)
def _tls_context(_file: str | None, _directory: str | None) -> ssl.SSLContext:
    # The arguments are only the cache's key: httpx reads the environment itself.
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _parsed(base_url: str, path: str) -> _Target:
    """Raises `ConnectionFailed` for what is no URL of http or https."""
    try:
        url = httpx.URL(base_url.rstrip("/") + path)
    except httpx.InvalidURL as exc:
        raise ConnectionFailed(f"the base URL is not valid: {exc}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConnectionFailed("the base URL must begin with http:// or https:// and name a host")
    tls = url.scheme == "https"
    port = url.port or (443 if tls else 80)
    return _Target(
        host=url.raw_host.decode("ascii"),
        port=port,
        tls=tls,
        url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=port, target=url.raw_path),
        authority=url.netloc,
    )


# A vendor's paths are few; those of tools hold their arguments.
_target = lru_cache(maxsize=1024)(_parsed)


def _head(
    target: _Target, headers: Mapping[str, str], more: Mapping[str, str], payload: bytes | None
) -> list[tuple[bytes, bytes]]:
    head = [
        (b"Host", target.authority),
        (b"Accept-Encoding", b"identity"),
        (b"User-Agent", b"llmtasks"),
    ]
    if payload:
        head.append((b"Content-Type", b"application/json"))
    if payload is not None:
        head.append((b"Content-Length", str(len(payload)).encode()))
    for name, value in (*headers.items(), *more.items()):
        head.append((name.encode(errors="replace"), value.encode(errors="replace")))
    return head


class _Body(httpx.SyncByteStream):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks


def _decoded(headers: Mapping[str, str], chunks: Iterable[bytes]) -> Iterator[bytes]:
    # Not asked for, but some proxies compress all the same.
    encoding = headers.get("content-encoding", "identity")
    body = iter(chunks)
    if encoding.strip().lower() in ("identity", ""):
        return body
    response = httpx.Response(200, headers={"content-encoding": encoding}, stream=_Body(body))
    return response.iter_bytes()


def _ours(exc: Exception, call: _Call) -> ProviderError:
    kind = next(FOREIGN_ERRORS[base] for base in type(exc).__mro__ if base in FOREIGN_ERRORS)
    if kind is InvalidRequest:
        # The library's words quote the header, which may be the key.
        return InvalidRequest("a header of the request holds a character that HTTP forbids")
    reason = wire.clean(str(exc))[:200] or type(exc).__name__
    if kind in (BadResponse, ConnectionFailed):
        if call.stream is not None and call.stream.received:
            return BadResponse(f"the answer broke off: {reason}")
        return ConnectionFailed(f"the connection broke before the answer began: {reason}")
    return kind(reason)
