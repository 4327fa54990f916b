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
    script             makes the calls that the first user text lists, turn by turn (JSON like
                       [[{"name": "f", "arguments": {}}], …]), then answers the last result; an
                       argument "$queued" is the ids of the calls that were queued before
    long-<n>[-<rate>]  n tokens at that rate (per second, 200 where not given)
    no-usage           an answer without usage
    embed[-<dims>]     embeddings alone: vectors that depend on the text alone

Any key will do but `bad-key`. A call's task is what stands before the last dot of its
`X-Client-Request-Id` header. `GET /_calls` counts calls in all and per task, `GET /_calls/<task>`
those of one. `POST /_limits` sets a limit of the sandbox's own and `GET /_limits` shows what came
of it (`sandbox_limits`), `POST /_faults` has a share of the calls fail (`sandbox_faults`).
`POST /_reset` forgets calls, limits and faults.
"""

import asyncio
import contextlib
import itertools
import signal
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import orjson

from providers import sandbox_answers as answers
from providers import sandbox_bodies as bodies
from providers.sandbox_calls import Call, Ledger, Tally
from providers.sandbox_faults import Faults
from providers.sandbox_http import Connection, Refused, Request
from providers.sandbox_limits import Limits

TICK: Final = 0.02  # seconds between two writes of a stream with a rate
MAX_BATCH: Final = 500  # tokens of one write, so that no stream keeps the others waiting


class _Server:
    def __init__(self) -> None:
        self.ledger = Ledger()
        self.limits = Limits()
        self.faults = Faults()
        self.connections: set[Connection] = set()

    async def handle(self, request: Request, client: Connection) -> bool:
        """Answer one request; whether the connection can go on. Raises `Refused`."""
        if request.method == "GET":
            client.reply(200, self._shown(request.path))
            return True
        if request.method != "POST":
            raise Refused(405, "Only GET and POST are known here")
        if request.path.startswith("/_"):
            client.reply(200, self._steered(request))
            return True
        with self.ledger.call(request.task) as call:
            goes_on = await self._call(request, client, call)
            if goes_on:
                call.answer()
            return goes_on

    def _steered(self, request: Request) -> dict[str, Any]:
        if request.path == "/_reset":
            for part in (self.ledger, self.limits, self.faults):
                part.reset()
            return {}
        parts: dict[str, Limits | Faults] = {"/_limits": self.limits, "/_faults": self.faults}
        if request.path not in parts:
            raise Refused(404, f"There is nothing at {request.path}")
        try:
            return parts[request.path].set(orjson.loads(request.body))
        except ValueError as exc:
            raise Refused(400, f"Invalid request: {exc}") from None

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
        if path == "/_limits":
            return self.limits.shown()
        if path == "/_faults":
            return self.faults.shown()
        if path == "/healthz":
            return {"status": "ok"}
        raise Refused(404, f"There is nothing at {path}")

    async def _call(self, request: Request, client: Connection, call: Call) -> bool:
        body = _parsed(request)
        wanted = _wanted(request, body)
        limits = self.limits.of(body["model"])
        given = _input_tokens(request, body, wanted) if limits else 0
        try:
            places = self.limits.arrive(limits, given, request.anthropic)
        finally:
            client.headers = self.limits.headers(limits, request.anthropic)
        try:
            return await self._answer(request, body, wanted, client, call)
        finally:
            for limit, entry in places:
                limit.settle(entry, call.made)

    async def _answer(
        self,
        request: Request,
        body: dict[str, Any],
        wanted: answers.Behaviour,
        client: Connection,
        call: Call,
    ) -> bool:
        await self.faults.strike(body["model"])
        await _trouble(wanted, call)
        if wanted.kind == "garbage":
            client.reply(200, b"<html>this is no JSON</html>")
            return True
        try:
            if request.path == "/v1/embeddings":
                return _embed(body, wanted, client, call)
            prompt = answers.read_prompt(body, request.anthropic)
            reply = answers.answer(prompt, wanted)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise Refused(400, f"Invalid request: {exc}") from None
        shape = bodies.Anthropic if request.anthropic else bodies.OpenAI
        made = shape(prompt, reply, wanted.kind != "no-usage")
        if prompt.stream:
            return await _stream(made, wanted, client, call)
        if wanted.kind == "long":
            await asyncio.sleep(wanted.number / wanted.rate)
        call.bill(reply.input_tokens, reply.output_tokens)
        client.reply(200, made.whole(), cut=wanted.kind == "cut")
        return wanted.kind != "cut"


def _parsed(request: Request) -> dict[str, Any]:
    if request.path not in ("/v1/chat/completions", "/v1/embeddings", "/v1/messages"):
        raise Refused(404, f"There is nothing at {request.path}")
    if request.key in ("", "bad-key"):
        raise Refused(401, "Incorrect API key provided")
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        raise Refused(400, "The body of the request is not JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise Refused(400, "The body must be an object with a model")
    return body


def _wanted(request: Request, body: Mapping[str, Any]) -> answers.Behaviour:
    wanted = answers.behaviour(body["model"])
    embeds = request.path == "/v1/embeddings"
    if (
        wanted is None
        or (wanted.kind == "embed" and not embeds)
        or (wanted.kind in ("tool", "script", "long") and embeds)
    ):
        if request.anthropic:
            raise Refused(404, f"model: {body['model']}")
        raise Refused(404, f"The model `{body['model']}` does not exist")
    return wanted


def _input_tokens(request: Request, body: Mapping[str, Any], wanted: answers.Behaviour) -> int:
    """0 for a request that is wrong, which is told so later."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        if request.path == "/v1/embeddings":
            return answers.embeddings(body, wanted)[1]
        return answers.read_prompt(body, request.anthropic).input_tokens
    return 0


async def _trouble(wanted: answers.Behaviour, call: Call) -> None:
    """What comes before an answer, or in place of it. Raises `Refused`."""
    kind, number = wanted.kind, wanted.number
    if kind == "slow":
        await asyncio.sleep(number / 1000)
    elif kind == "error":
        raise Refused(number, f"The sandbox was asked for status {number}")
    elif kind == "rate-limit":
        raise Refused(429, "Rate limit reached", {"Retry-After": str(number)})
    elif kind == "flaky" and call.task.failures < number:
        call.fail()
        raise Refused(503, "The server is overloaded, try again")


def _embed(
    body: Mapping[str, Any],
    wanted: answers.Behaviour,
    client: Connection,
    call: Call,
) -> bool:
    reply, count = answers.embeddings(body, wanted)
    call.bill(count, 0)
    client.reply(200, reply, cut=wanted.kind == "cut")
    return wanted.kind != "cut"


async def _stream(
    made: bodies.OpenAI | bodies.Anthropic,
    wanted: answers.Behaviour,
    client: Connection,
    call: Call,
) -> bool:
    """The answer as events; what a client that leaves has had is billed all the same."""
    call.bill(made.reply.input_tokens, 0)
    await client.begin_stream()
    await client.chunk(made.opening())
    deltas = made.deltas()
    if wanted.kind == "long":
        await _paced(deltas, wanted.rate, client, call)
    elif wanted.kind == "cut":
        await client.chunk(b"".join(itertools.islice(deltas, 1)))
        return False
    else:
        call.bill(0, made.reply.output_tokens)
        await client.chunk(b"".join(deltas) or b": nothing\n\n")
    await client.chunk(made.closing())
    await client.write(b"0\r\n\r\n")
    return True


async def _paced(deltas: Iterator[bytes], rate: int, client: Connection, call: Call) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    sent = 0
    while True:
        due = int((loop.time() - begun) * rate) + 1
        asked = min(due - sent, MAX_BATCH)
        batch = list(itertools.islice(deltas, asked))
        if batch:
            await client.chunk(b"".join(batch))
            sent += len(batch)
            call.bill(0, len(batch))
        if len(batch) < asked:
            return
        await asyncio.sleep(max(TICK, 1 / rate) if sent == due else 0)


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
        lambda: Connection(server), host, port, ssl=tls, backlog=1024
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
