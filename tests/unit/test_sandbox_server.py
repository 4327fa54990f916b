"""The sandbox's server: the bare protocol, its bounds, its begin and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from providers import sandbox_http
from providers.http import Exchange
from providers.sandbox import Sandbox, serve
from providers.sandbox_answers import behaviour
from tests.unit.exchanges import chat, provider, until


def test_a_client_that_leaves_while_much_is_unsent_is_noticed(sandbox):
    body = orjson.dumps(
        {"model": "long-900000-900000", "messages": [{"role": "user", "content": "x"}],
         "stream": True}
    )  # fmt: skip
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address(sandbox))
        client.sendall(raw(body, b"X-Client-Request-Id: full.1\r\n"))
        time.sleep(0.5)
        # Reads a little, so that the server may go on writing once.
        for _ in range(200):
            client.recv(65536)
    until(lambda: sandbox.calls("full")["hung_up"])
    assert sandbox.calls("full")["hung_up"] == 1


def address(sandbox):
    host, port = sandbox.base_url.removeprefix("http://").split(":")
    return host, int(port)


def raw(body, headers=b"", path=b"/v1/chat/completions", method=b"POST"):
    return (
        method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
        + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip


def talk(sandbox, data):
    """What comes back, until the connection ends."""
    with socket.create_connection(address(sandbox), timeout=5) as client:
        client.sendall(data)
        reply = b""
        while more := client.recv(65536):
            reply += more
        return reply


CLOSE = b"Connection: close\r\n"


def status_and_body(reply):
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)


@pytest.mark.parametrize(
    ("path", "status"),
    [(b"/healthz", 200), (b"/v1/models", 200), (b"/_calls", 200), (b"/_calls/a%20b", 200),
     (b"/", 404)],
)  # fmt: skip
def test_what_can_be_fetched(sandbox, path, status):
    found, body = status_and_body(talk(sandbox, raw(b"", CLOSE, path, b"GET")))
    assert found == status
    if path == b"/v1/models":
        names = {model["id"] for model in body["data"]}
        assert {"echo", "claude-echo", "embed"} <= names
        assert all(behaviour(name) for name in names)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (b"/v1/other", b"{}", 404),
        (b"/v1/chat/completions", b"{", 400),
        (b"/v1/chat/completions", b"[]", 400),
        (b"/v1/chat/completions", b'{"model": 1}', 400),
        (b"/v1/chat/completions", b'{"model": "echo"}', 400),
        (b"/v1/chat/completions", b'{"model": "echo", "messages": [1]}', 400),
        (b"/v1/chat/completions", b'{"model": "tool", "messages": [{}], "tools": [1]}', 400),
        (b"/v1/chat/completions", b'{"model": "echo", "messages": [{"content": 1}]}', 200),
        (b"/v1/messages", b'{"model": "echo", "messages": [{}]}', 400),
        (b"/v1/embeddings", b'{"model": "embed"}', 400),
        (b"/v1/embeddings", b'{"model": "embed", "input": [{}]}', 400),
        (b"/v1/embeddings", b'{"model": "embed", "input": [1, 2]}', 200),
        (b"/v1/embeddings", b'{"model": "embed", "input": "text"}', 200),
    ],
)
def test_requests_that_are_wrong(sandbox, path, body, status):
    found, reply = status_and_body(talk(sandbox, raw(body, CLOSE, path)))
    assert found == status
    if status != 200:
        assert reply["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"x" * 70_000,
        raw(b"", b"Transfer-Encoding: chunked\r\n"),
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    ],
)
def test_what_is_no_request_ends_the_connection(sandbox, data):
    assert talk(sandbox, data).startswith(b"HTTP/1.1 400")


def test_methods_reset_and_pipelining(sandbox):
    assert talk(sandbox, raw(b"", CLOSE, method=b"PUT")).startswith(b"HTTP/1.1 405")
    body = b'{"model": "slow-50", "messages": [{"role": "user", "content": "x"}]}'
    both_at_once = raw(body) + raw(body, CLOSE)
    assert talk(sandbox, both_at_once).count(b"HTTP/1.1 200") == 2
    with socket.create_connection(address(sandbox), timeout=5) as client:
        client.sendall(raw(body))
        time.sleep(0.02)
        client.sendall(raw(body, CLOSE))
        assert b"".join(iter(lambda: client.recv(65536), b"")).count(b"HTTP/1.1 200") == 2
    waiting = talk(sandbox, raw(body, b"Expect: 100-continue\r\n" + CLOSE))
    assert waiting.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    with Sandbox() as own:
        provider(f"{own.base_url}/v1", api_key="k").complete(chat(), Exchange())
        assert own.calls()["calls"] == 1
        assert talk(own, raw(b"", CLOSE, b"/_reset")).startswith(b"HTTP/1.1 200")
        assert own.calls()["calls"] == 0


def test_a_client_that_sends_too_much_ahead_is_cut_off(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox_http, "MAX_BODY_BYTES", 100_000)
    body = b'{"model": "slow-3000", "messages": [{"role": "user", "content": "x"}]}'
    with socket.create_connection(address(sandbox), timeout=5) as client:
        with pytest.raises(ConnectionError):
            client.sendall(raw(body))
            while True:
                client.sendall(b"x" * 65536)


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(sandbox_http, "MAX_CONNECTIONS", 1)
    with Sandbox() as server, socket.create_connection(address(server), timeout=5):
        assert talk(server, b"").startswith(b"HTTP/1.1 503")


def test_idle_connections_end(monkeypatch):
    monkeypatch.setattr(sandbox_http, "IDLE_SECONDS", 0.2)
    with Sandbox() as server:
        with socket.create_connection(address(server), timeout=5) as client:
            assert client.recv(1) == b""


def test_a_fault_of_the_sandbox_itself_ends_the_connection(monkeypatch):
    def broken(*_args):
        raise RuntimeError("a fault")

    with Sandbox() as server:
        monkeypatch.setattr(server._server, "_shown", broken)
        server._loop.set_exception_handler(lambda *_args: None)
        assert talk(server, raw(b"", CLOSE, b"/healthz", b"GET")) == b""


def test_a_taken_port_is_told():
    with Sandbox() as server:
        with pytest.raises(OSError, match="in use"):
            Sandbox(port=address(server)[1]).start()


def test_five_hundred_slow_calls_at_once(sandbox):
    body = b'{"model": "slow-500", "messages": [{"role": "user", "content": "x"}]}'
    begun = time.monotonic()
    clients = [socket.create_connection(address(sandbox), timeout=10) for _ in range(500)]
    try:
        for client in clients:
            client.sendall(raw(body))
        for client in clients:
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
    finally:
        for client in clients:
            client.close()
    assert time.monotonic() - begun < 10


def test_stopping_twice_is_no_error():
    server = Sandbox().start()
    server.stop()
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serving_until_a_signal(number):
    heard = []

    def ready(host, port):
        heard.append(host)
        os.kill(os.getpid(), number)

    serve("127.0.0.1", 0, ready=ready)
    assert heard == ["127.0.0.1"]


def test_serving_as_a_process_until_a_signal():
    script = (
        "from providers.sandbox import serve\n"
        "serve('127.0.0.1', 0, ready=lambda host, port: print(host, port, flush=True))\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root
    ) as process:
        host, port = process.stdout.readline().split()
        with socket.create_connection((host, int(port)), timeout=5):
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0
