"""A vendor of our own: a real HTTP server that speaks OpenAI's and Anthropic's wire formats.

The model's name says what happens (a `claude-` before it changes nothing):

    echo               answers the last user text; embeds too
    slow-<ms>          answers after that many milliseconds
    flaky-<n>          503 for the first n calls of a task, then answers
    error-<status>     that status (400 to 599), with the vendor's error body
    rate-limit-<s>     429 with Retry-After
    cut                an answer that breaks off, its connection closed
    garbage            200, not JSON
    tool               calls the request's tool; answers once the last message is a result
    long-<n>[-<rate>]  n tokens at that rate (per second, 200 where not given)
    no-usage           an answer without usage
    embed[-<dims>]     embeddings alone: vectors that depend on the text alone

Any key will do but `bad-key`. A call's task is what stands before the last dot of its
`X-Client-Request-Id` header. `GET /_calls` counts calls in all and per task, `GET /_calls/<task>`
those of one, `POST /_reset` forgets them.
"""

import asyncio
import contextlib
import itertools
import signal
import ssl
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

import orjson

from providers import sandbox_answers as answers

MAX_TASKS: Final = 100_000  # remembered; the oldest are forgotten
MAX_CONNECTIONS: Final = 4096
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_HEAD_BYTES: Final = 64 * 1024
IDLE_SECONDS: Final = 75.0
TICK: Final = 0.02  # seconds between two writes of a stream with a rate


class Tally:
    """How often a task called, and what a vendor would bill for it."""

    __slots__ = (
        "answered", "calls", "failures", "hung_up", "input_tokens", "output_tokens", "overlaps",
        "under_way",
    )  # fmt: skip

    def __init__(self) -> None:
        self.calls = 0  # requests that came in
        self.answered = 0  # requests whose whole answer went out
        self.failures = 0  # answers of 503 by flaky-<n>
        self.hung_up = 0  # clients that left before their answer was out
        self.overlaps = 0  # calls that began while another of the same task was under way
        self.under_way = 0
        self.input_tokens = 0  # of every answer that was made, cut ones too
        self.output_tokens = 0

    def begin(self) -> None:
        self.calls += 1
        self.overlaps += self.under_way > 0
        self.under_way += 1

    def bill(self, given: int, made: int) -> None:
        self.input_tokens += given
        self.output_tokens += made

    def shown(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class Ledger:
    """All tallies. Touched by the server's loop alone."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total = Tally()
        self.tasks: OrderedDict[str, Tally] = OrderedDict()

    def of(self, task: str) -> Tally:
        tally = self.tasks.get(task)
        if tally is None:
            tally = self.tasks[task] = Tally()
            if len(self.tasks) > MAX_TASKS:
                self.tasks.popitem(last=False)
        return tally

    @contextlib.contextmanager
    def call(self, task: str) -> Iterator[tuple[Tally, Tally]]:
        """Overlaps are counted per task, and in total as their sum."""
        tally, total = self.of(task), self.total
        overlaps = tally.overlaps
        tally.begin()
        total.calls += 1
        total.under_way += 1
        total.overlaps += tally.overlaps - overlaps
        try:
            yield tally, total
        except asyncio.CancelledError:
            tally.hung_up += 1
            total.hung_up += 1
            raise
        finally:
            tally.under_way -= 1
            total.under_way -= 1


class _Refused(Exception):
    """A request that ends with an error body."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class _Request:
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


class _Connection(asyncio.Protocol):
    """One client: reads requests, runs one after the other, notices when it leaves."""

    def __init__(self, server: "_Server") -> None:
        self._server = server
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._request: _Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._idle: asyncio.TimerHandle | None = None

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

    def _read(self) -> _Request | None:
        """Raises `ValueError` for what is no request that we take."""
        if self._request is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise ValueError("head too large")
                return None
            self._request = _Request(bytes(self._buffer[:end]))
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

    async def _run(self, request: _Request) -> None:
        keep = request.keep_alive
        try:
            keep = await self._server.handle(request, self) and keep
        except asyncio.CancelledError:
            return
        except _Refused as refused:
            body = answers.error_body(refused.status, str(refused), request.anthropic)
            self.reply(refused.status, body, refused.headers)
        except Exception:
            # A fault of ours: the client must not wait for an answer that never comes.
            self._transport.abort()
            raise
        self._task = None
        if not keep:
            self._transport.close()
        elif not self._transport.is_closing():
            self._wait()
            self._next()

    def reply(
        self, status: int, body: Any, headers: Mapping[str, str] | None = None, cut: bool = False
    ) -> None:
        """A whole answer; `cut` sends half of its body."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        head = _head(status, {"Content-Length": str(len(data)), **(headers or {})})
        self._transport.write(head + (data[: len(data) // 2] if cut else data))

    async def write(self, data: bytes) -> None:
        await self._writable.wait()
        if not self._transport.is_closing():
            self._transport.write(data)

    async def begin_stream(self) -> None:
        headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}
        await self.write(_head(200, headers))

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%s\r\n" % (len(data), data))


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    call_id = f"req_{uuid.uuid4().hex}"
    lines = [f"HTTP/1.1 {status} Sandbox", f"x-request-id: {call_id}", f"request-id: {call_id}"]
    if "Content-Type" not in headers:
        lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Server:
    def __init__(self) -> None:
        self.ledger = Ledger()
        self.connections: set[_Connection] = set()

    async def handle(self, request: _Request, client: _Connection) -> bool:
        """Answer one request; whether the connection can go on. Raises `_Refused`."""
        if request.method == "GET":
            client.reply(200, self._shown(request.path))
            return True
        if request.method != "POST":
            raise _Refused(405, "Only GET and POST are known here")
        if request.path == "/_reset":
            self.ledger.reset()
            client.reply(200, {})
            return True
        with self.ledger.call(request.task) as tallies:
            goes_on = await self._call(request, client, tallies)
            for tally in tallies:
                tally.answered += goes_on
            return goes_on

    def _shown(self, path: str) -> dict[str, Any]:
        if path == "/v1/models":
            names = (*answers.MODELS, *(f"claude-{name}" for name in answers.MODELS))
            shown = [
                {"id": name, "object": "model", "created": 0, "owned_by": "sandbox"}
                for name in names
            ]
            return {"object": "list", "data": shown}
        if path == "/_calls":
            tasks = {task: tally.shown() for task, tally in self.ledger.tasks.items() if task}
            return {**self.ledger.total.shown(), "tasks": tasks}
        if path.startswith("/_calls/"):
            tally = self.ledger.tasks.get(path.removeprefix("/_calls/"))
            return (tally or Tally()).shown()
        if path == "/healthz":
            return {"status": "ok"}
        raise _Refused(404, f"There is nothing at {path}")

    async def _call(
        self, request: _Request, client: _Connection, tallies: tuple[Tally, Tally]
    ) -> bool:
        body = _parsed(request)
        wanted = _wanted(request, body)
        await _trouble(wanted, tallies)
        if wanted.kind == "garbage":
            client.reply(200, b"<html>this is no JSON</html>")
            return True
        try:
            if request.path == "/v1/embeddings":
                return _embed(body, wanted, client, tallies)
            prompt = answers.read_prompt(body, request.anthropic)
            reply = answers.answer(prompt, wanted)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise _Refused(400, f"Invalid request: {exc}") from None
        shape = answers.Anthropic if request.anthropic else answers.OpenAI
        made = shape(prompt, reply, wanted.kind != "no-usage")
        if prompt.stream:
            return await _stream(made, wanted, client, tallies)
        if wanted.kind == "long":
            await asyncio.sleep(wanted.number / wanted.rate)
        for tally in tallies:
            tally.bill(reply.input_tokens, reply.output_tokens)
        client.reply(200, made.whole(), cut=wanted.kind == "cut")
        return wanted.kind != "cut"


def _parsed(request: _Request) -> dict[str, Any]:
    if request.path not in ("/v1/chat/completions", "/v1/embeddings", "/v1/messages"):
        raise _Refused(404, f"There is nothing at {request.path}")
    if request.key in ("", "bad-key"):
        raise _Refused(401, "Incorrect API key provided")
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        raise _Refused(400, "The body of the request is not JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise _Refused(400, "The body must be an object with a model")
    return body


def _wanted(request: _Request, body: Mapping[str, Any]) -> answers.Behaviour:
    wanted = answers.behaviour(body["model"])
    embeds = request.path == "/v1/embeddings"
    if (
        wanted is None
        or (wanted.kind == "embed" and not embeds)
        or (wanted.kind in ("tool", "long") and embeds)
    ):
        if request.anthropic:
            raise _Refused(404, f"model: {body['model']}")
        raise _Refused(404, f"The model `{body['model']}` does not exist")
    return wanted


async def _trouble(wanted: answers.Behaviour, tallies: tuple[Tally, Tally]) -> None:
    """What comes before an answer, or in place of it. Raises `_Refused`."""
    kind, number = wanted.kind, wanted.number
    if kind == "slow":
        await asyncio.sleep(number / 1000)
    elif kind == "error":
        raise _Refused(number, f"The sandbox was asked for status {number}")
    elif kind == "rate-limit":
        raise _Refused(429, "Rate limit reached", {"Retry-After": str(number)})
    elif kind == "flaky" and tallies[0].failures < number:
        for tally in tallies:
            tally.failures += 1
        raise _Refused(503, "The server is overloaded, try again")


def _embed(
    body: Mapping[str, Any],
    wanted: answers.Behaviour,
    client: _Connection,
    tallies: tuple[Tally, Tally],
) -> bool:
    reply, count = answers.embeddings(body, wanted)
    for tally in tallies:
        tally.bill(count, 0)
    client.reply(200, reply, cut=wanted.kind == "cut")
    return wanted.kind != "cut"


async def _stream(
    made: answers.OpenAI | answers.Anthropic,
    wanted: answers.Behaviour,
    client: _Connection,
    tallies: tuple[Tally, Tally],
) -> bool:
    """The answer as events; what a client that leaves has had is billed all the same."""
    for tally in tallies:
        tally.bill(made.reply.input_tokens, 0)
    await client.begin_stream()
    await client.chunk(made.opening())
    deltas = made.deltas()
    if wanted.kind == "long":
        await _paced(deltas, wanted.rate, client, tallies)
    elif wanted.kind == "cut":
        await client.chunk(b"".join(itertools.islice(deltas, 1)))
        return False
    else:
        for tally in tallies:
            tally.bill(0, made.reply.output_tokens)
        await client.chunk(b"".join(deltas) or b": nothing\n\n")
    await client.chunk(made.closing())
    await client.write(b"0\r\n\r\n")
    return True


async def _paced(
    deltas: Iterator[bytes], rate: int, client: _Connection, tallies: tuple[Tally, Tally]
) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    sent = 0
    while True:
        due = int((loop.time() - begun) * rate) + 1
        batch = list(itertools.islice(deltas, due - sent))
        if batch:
            await client.chunk(b"".join(batch))
            sent += len(batch)
            for tally in tallies:
                tally.bill(0, len(batch))
        if sent < due:
            return
        await asyncio.sleep(max(TICK, 1 / rate))


async def _serve(
    server: _Server,
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    stop: asyncio.Event,
    ready: Callable[[str, int], None] | None,
) -> None:
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(
        lambda: _Connection(server), host, port, ssl=tls, backlog=1024
    )
    try:
        if ready is not None:
            bound = listening.sockets[0].getsockname()
            ready(bound[0], bound[1])
        await stop.wait()
    finally:
        listening.close()
        for connection in list(server.connections):
            connection.abort()
        # Lets the aborted connections' tasks end.
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def serve(
    host: str,
    port: int,
    *,
    ready: Callable[[str, int], None] | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `ready` gets host and port once the server listens.

    Raises `OSError` where the port can't be had.
    """

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Only the main thread may; elsewhere the process's own handlers stay.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, stop.set)
        await _serve(_Server(), host, port, tls, stop, ready)

    asyncio.run(run())


class Sandbox:
    """The server in a thread of this process, for tests: `with Sandbox() as sandbox:`.

    `base_url` ends without a slash; OpenAI-compatible accounts add `/v1`.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, tls: ssl.SSLContext | None = None
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._server = _Server()
        self._listening = threading.Event()
        self._error: OSError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="sandbox", daemon=True)
        self.base_url = ""

    def start(self) -> "Sandbox":
        """Raises `OSError` where the port can't be had."""
        self._thread.start()
        self._listening.wait()
        if self._error is not None:
            raise self._error
        return self

    def stop(self) -> None:
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def __enter__(self) -> "Sandbox":
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def calls(self, task: str | None = None) -> dict[str, Any]:
        """What `GET /_calls` or `GET /_calls/<task>` shows."""
        assert self._loop is not None  # noqa: S101 - for the type checker

        async def shown() -> dict[str, Any]:
            return self._server._shown("/_calls" if task is None else f"/_calls/{task}")

        return asyncio.run_coroutine_threadsafe(shown(), self._loop).result()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except OSError as exc:
            self._error = exc
            self._listening.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await _serve(self._server, self._host, self._port, self._tls, self._stop, self._is_ready)

    def _is_ready(self, host: str, port: int) -> None:
        scheme = "https" if self._tls is not None else "http"
        self.base_url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        self._listening.set()
