"""The sandbox's side of HTTP/1.1: requests in, whole answers and streams out.

Plain asyncio, since hundreds of slow calls at once and a client that leaves in the middle are what
the sandbox is for: both cost nothing here.
"""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any, Final, Protocol
from urllib.parse import unquote

import orjson

from providers.sandbox_bodies import error_body

MAX_CONNECTIONS: Final = 4096
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_HEAD_BYTES: Final = 64 * 1024
IDLE_SECONDS: Final = 75.0


class Handler(Protocol):
    """Who answers: `handle` returns whether the connection can go on. Raises `Refused`."""

    connections: "set[Connection]"

    async def handle(self, request: "Request", client: "Connection") -> bool: ...


class Refused(Exception):
    """A request that ends with an error body."""

    def __init__(
        self,
        status: int,
        message: str,
        headers: Mapping[str, str] | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.kind = kind  # OpenAI's `type`, where the status alone does not say it


class Request:
    __slots__ = ("body", "headers", "method", "path")

    def __init__(self, head: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.method, target, _version = lines[0].split(" ", 2)
        self.path = unquote(target.partition("?")[0])
        self.headers: dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.body = b""

    @property
    def length(self) -> int:
        """Raises `ValueError` for no number."""
        return int(self.headers.get("content-length", "0"))

    @property
    def keep_alive(self) -> bool:
        return self.headers.get("connection", "").lower() != "close"

    @property
    def anthropic(self) -> bool:
        return self.path == "/v1/messages"

    @property
    def task(self) -> str:
        header = self.headers.get("x-client-request-id", "")
        return header.rpartition(".")[0] or header

    @property
    def key(self) -> str:
        headers = self.headers
        bearer = headers.get("authorization", "")
        scheme, _, key = bearer.partition(" ")
        own = headers.get("x-api-key") or headers.get("api-key") or ""
        return key.strip() if scheme.lower() == "bearer" else own


class Connection(asyncio.Protocol):
    """One client: reads requests, runs one after the other, notices when it leaves."""

    def __init__(self, server: "Handler") -> None:
        self._server = server
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._request: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._idle: asyncio.TimerHandle | None = None
        # More headers for the answer to the request under way.
        self.headers: Mapping[str, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport
        if len(self._server.connections) >= MAX_CONNECTIONS:
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            transport.close()
            return
        self._server.connections.add(self)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._rest()
        if self._task is not None:
            self._task.cancel()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def abort(self) -> None:
        self._transport.abort()

    def _wait(self) -> None:
        self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._transport.close)

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        """Begin the buffered request, if it is whole and none is under way."""
        if self._task is not None:
            if len(self._buffer) > MAX_BODY_BYTES:
                self._transport.abort()
            return
        try:
            request = self._read()
        except ValueError:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            self._transport.close()
            return
        if request is not None:
            self._rest()
            self._task = asyncio.get_running_loop().create_task(self._run(request))

    def _read(self) -> Request | None:
        """Raises `ValueError` for what is no request that we take."""
        if self._request is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise ValueError("head too large")
                return None
            self._request = Request(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if "transfer-encoding" in self._request.headers:
                raise ValueError("bodies need a Content-Length")
            if not 0 <= self._request.length <= MAX_BODY_BYTES:
                raise ValueError("body too large")
            if self._request.headers.get("expect", "").lower() == "100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request, length = self._request, self._request.length
        if len(self._buffer) < length:
            return None
        request.body = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._request = None
        return request

    async def _run(self, request: Request) -> None:
        keep = request.keep_alive
        self.headers = {}
        try:
            keep = await self._server.handle(request, self) and keep
        except asyncio.CancelledError:
            return
        except Refused as refused:
            body = error_body(refused.status, str(refused), request.anthropic, refused.kind)
            self.reply(refused.status, body, refused.headers)
        except Exception:
            # A fault of ours: the client must not wait for an answer that never comes.
            self._transport.abort()
            raise
        self._task = None
        if not keep or self._transport.is_closing():
            self._transport.close()
        else:
            self._wait()
            self._next()

    def reply(
        self, status: int, body: Any, headers: Mapping[str, str] | None = None, cut: bool = False
    ) -> None:
        """A whole answer; `cut` sends half of its body."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        length = {"Content-Length": str(len(data))}
        head = _head(status, {**length, **self.headers, **(headers or {})})
        self._transport.write(head + (data[: len(data) // 2] if cut else data))

    async def write(self, data: bytes) -> None:
        await self._writable.wait()
        self._transport.write(data)

    async def begin_stream(self) -> None:
        headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}
        await self.write(_head(200, {**headers, **self.headers}))

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%s\r\n" % (len(data), data))


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    call_id = f"req_{uuid.uuid4().hex}"
    lines = [f"HTTP/1.1 {status} Sandbox", f"x-request-id: {call_id}", f"request-id: {call_id}"]
    if "Content-Type" not in headers:
        lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
