"""Calls over real sockets: what bounds them, what drops them, what a broken server becomes."""

import contextlib
import gzip
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpcore
import httpx
import orjson
import pytest

from providers import errors, http, registry, sockets
from providers.base import Account
from providers.http import Exchange
from providers.sandbox import Sandbox
from providers.types import Message, Request, Text
from tests.unit.scripted import EVENTS, OK, Scripted, answer, chunked

TLS = Path(__file__).parent / "fixtures" / "tls"
WHOLE = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
)


def chat(model="echo", text="hello"):
    return Request(model=model, messages=(Message(role="user", parts=(Text(text=text),)),))


def provider(base_url, **account):
    return registry.build("compatible", Account(name="test", base_url=base_url, **account))


def call(server, request=None, exchange=None, **account):
    account = {"api_key": "sk-test", **account}
    return provider(server.base_url, **account).complete(request or chat(), exchange or Exchange())


def once(data, *, then_close=True):
    """A script that answers each request with `data`."""

    def script(peer, _number):
        while peer.read():
            peer.send(data)
            if then_close:
                return

    return script


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as server:
        yield server


@pytest.fixture(autouse=True)
def no_idle_connections():
    yield
    http.close_idle()


@pytest.fixture
def tls_sandbox(monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
    with Sandbox(tls=context) as server:
        yield server


def until(condition):
    """Wait for it, for a few seconds."""
    deadline = time.monotonic() + 3
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def dropped_after(seconds, exchange, run, once=lambda: True):
    """`run()` must end by `Dropped` within a second of the drop, which comes so long after `once()`
    is true."""
    dropped_at = []

    def drop():
        until(once)
        time.sleep(seconds)
        dropped_at.append(time.monotonic())
        exchange.drop("cancel")

    thread = threading.Thread(target=drop)
    thread.start()
    with pytest.raises(errors.Dropped) as caught:
        run()
    ended_at = time.monotonic()
    thread.join()
    assert caught.value.reason == "cancel"
    assert ended_at - dropped_at[0] < 1


# Dropping


def test_drop_wakes_a_call_that_waits_for_its_answer(sandbox):
    exchange = Exchange(headers={"X-Client-Request-Id": "dropped.1"})
    chats = provider(f"{sandbox.base_url}/v1", api_key="k")
    dropped_after(
        0.1,
        exchange,
        lambda: chats.complete(chat("slow-5000"), exchange),
        once=lambda: exchange.is_sent,
    )
    until(lambda: sandbox.calls("dropped")["hung_up"])
    assert sandbox.calls("dropped")["hung_up"] == 1


def test_drop_wakes_a_call_under_tls(tls_sandbox):
    chats = provider(f"{tls_sandbox.base_url}/v1", api_key="k")
    assert chats.complete(chat(), Exchange()).text == "hello"
    exchange = Exchange()
    dropped_after(0.1, exchange, lambda: chats.complete(chat("slow-5000"), exchange))


@pytest.mark.parametrize("secure", [False, True])
def test_drop_ends_a_stream_between_two_deltas(request, secure):
    server = request.getfixturevalue("tls_sandbox" if secure else "sandbox")
    exchange = Exchange()
    stream = provider(f"{server.base_url}/v1", api_key="k").stream(chat("long-9000-20"), exchange)
    next(stream)
    dropped_after(0.1, exchange, lambda: list(stream))


def test_drop_before_the_call_sends_nothing():
    with Scripted(once(answer(WHOLE))) as server:
        exchange = Exchange()
        exchange.drop("lease")
        exchange.drop("cancel")
        with pytest.raises(errors.Dropped, match="lease"):
            call(server, exchange=exchange)
        assert server.connections == 0


@contextlib.contextmanager
def full_listener():
    """A port whose SYNs are never answered: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_drop_wakes_a_call_that_still_connects():
    with full_listener() as url:
        exchange = Exchange()
        dropped_after(0.1, exchange, lambda: provider(url).complete(chat(), exchange))


def test_connecting_ends_after_its_timeout():
    with full_listener() as url:
        with pytest.raises(errors.Timeout) as caught:
            provider(url, connect_timeout=0.2).complete(chat(), Exchange())
        assert caught.value.code == "connect_timeout"
        with pytest.raises(errors.Timeout) as caught:
            provider(url).complete(chat(), Exchange(deadline=time.monotonic() + 0.2))
        assert caught.value.code == "deadline"


@pytest.fixture
def slow_names(monkeypatch):
    """Name lookups that hang until the test ends; the names."""
    released = threading.Event()
    names = []

    def look_up(host, port, **options):
        names.append(host)
        released.wait(5)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield names
    released.set()
    while sockets._lookups:
        time.sleep(0.01)


def test_drop_wakes_a_call_whose_name_is_looked_up(slow_names):
    exchange = Exchange()
    chats = provider("http://vendor.invalid/v1")
    dropped_after(0.1, exchange, lambda: chats.complete(chat(), exchange))


def test_a_hanging_lookup_ends_after_the_connect_timeout_and_is_shared(slow_names):
    chats = provider("http://vendor.invalid/v1", connect_timeout=0.2)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(chats.complete, chat(), Exchange()) for _ in range(4)]
        for result in calls:
            with pytest.raises(errors.Timeout) as caught:
                result.result()
            assert caught.value.code == "connect_timeout"
    assert slow_names.count("vendor.invalid") == 1


@pytest.mark.parametrize(
    "problem",
    [socket.gaierror(socket.EAI_NONAME, "Name or service not known"), UnicodeError("too long")],
)
def test_a_name_without_an_address_is_a_failed_connection(monkeypatch, problem):
    def look_up(*_args, **_options):
        raise problem

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(errors.ConnectionFailed, match="has no address") as caught:
        provider("http://vendor.invalid/v1").complete(chat(), Exchange())
    assert caught.value.code == "dns"


def test_no_thread_left_for_a_lookup_is_a_failed_connection(monkeypatch):
    def no_thread(_self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(errors.ConnectionFailed, match="has no address"):
        provider("http://vendor.invalid/v1").complete(chat(), Exchange())
    assert not sockets._lookups


def test_a_name_is_looked_up_and_called(sandbox):
    port = sandbox.base_url.rpartition(":")[2]
    chats = provider(f"http://localhost:{port}/v1", api_key="k")
    assert chats.complete(chat(), Exchange()).text == "hello"


def test_a_dead_first_address_leaves_time_for_the_second(monkeypatch, sandbox):
    port = int(sandbox.base_url.rpartition(":")[2])
    with full_listener() as url:
        dead = int(url.removesuffix("/v1").rpartition(":")[2])
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", number))
            for number in (dead, port)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: found)
        chats = provider("http://vendor.invalid/v1", api_key="k", connect_timeout=4.0)
        assert chats.complete(chat(), Exchange()).text == "hello"


def test_drop_wakes_a_handshake():
    with Scripted(lambda peer, _number: peer.pause(5)) as server:
        exchange = Exchange()
        chats = provider(server.base_url.replace("http:", "https:"))
        dropped_after(0.1, exchange, lambda: chats.complete(chat(), exchange))


def test_a_handshake_ends_after_the_connect_timeout():
    with Scripted(lambda peer, _number: peer.pause(5)) as server:
        chats = provider(server.base_url.replace("http:", "https:"), connect_timeout=0.2)
        with pytest.raises(errors.Timeout) as caught:
            chats.complete(chat(), Exchange())
        assert caught.value.code == "connect_timeout"


def test_a_certificate_that_nobody_vouches_for_is_refused(tls_sandbox, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(errors.ConnectionFailed, match="certificate is not valid") as caught:
        provider(f"{tls_sandbox.base_url}/v1", api_key="k").complete(chat(), Exchange())
    assert caught.value.code == "tls"


def test_drop_does_not_touch_the_socket_of_a_later_call(sandbox):
    chats = provider(f"{sandbox.base_url}/v1", api_key="k")
    first = Exchange()
    chats.complete(chat(), first)
    first.drop("late")
    assert chats.complete(chat(), Exchange()).text == "hello"


# Time


def test_a_silent_vendor_times_out(sandbox):
    chats = provider(f"{sandbox.base_url}/v1", api_key="k", read_timeout=0.2)
    with pytest.raises(errors.Timeout, match=r"silent for 0\.2 s") as caught:
        chats.complete(chat("slow-5000"), Exchange())
    assert caught.value.code == "read_timeout"


def test_the_deadline_bounds_a_call_and_is_told_apart(sandbox):
    chats = provider(f"{sandbox.base_url}/v1", api_key="k")
    with pytest.raises(errors.Timeout, match="deadline") as caught:
        chats.complete(chat("slow-5000"), Exchange(deadline=time.monotonic() + 0.2))
    assert caught.value.code == "deadline"
    with pytest.raises(errors.Timeout) as caught:
        chats.complete(chat(), Exchange(deadline=time.monotonic() - 1))
    assert caught.value.code == "deadline"


def drip(head):
    def script(peer, _number):
        peer.read()
        peer.send(head)
        for _ in range(200):
            peer.send(b" ")
            peer.pause(0.05)

    return script


@pytest.mark.parametrize("head", [OK + b"Content-Length: 999\r\n\r\n", b"HTTP/1.1 200"])
def test_a_drip_of_single_bytes_can_not_outlast_the_limits(head):
    with Scripted(drip(head)) as server:
        with pytest.raises(errors.Timeout) as caught:
            call(server, read_timeout=1, total_timeout=0.3)
        assert caught.value.code == "total_timeout"
        begun = time.monotonic()
        with pytest.raises(errors.Timeout) as caught:
            call(server, exchange=Exchange(deadline=time.monotonic() + 0.3))
        assert caught.value.code == "deadline"
        assert time.monotonic() - begun < 4


def test_a_vendor_that_does_not_read_times_out():
    with Scripted(lambda peer, _number: peer.pause(5)) as server:
        request = chat(text="x" * 20_000_000)
        with pytest.raises(errors.Timeout):
            call(server, request, read_timeout=0.2)
        exchange = Exchange()
        dropped_after(0.1, exchange, lambda: call(server, request, exchange))


def test_times_and_ids_are_on_the_exchange(sandbox):
    exchange = Exchange()
    begun = time.monotonic()
    provider(f"{sandbox.base_url}/v1", api_key="k").complete(chat("slow-50"), exchange)
    assert begun + 0.05 <= exchange.first_byte_at <= time.monotonic()
    assert exchange.status == 200
    assert exchange.request_id == exchange.response_headers["x-request-id"]


def test_whether_anything_went_out_is_known(sandbox):
    exchange = Exchange()
    with pytest.raises(errors.ServerError):
        provider(f"{sandbox.base_url}/v1", api_key="k").complete(chat("error-500"), exchange)
    assert exchange.is_sent
    exchange = Exchange()
    with full_listener() as url, pytest.raises(errors.Timeout):
        provider(url, connect_timeout=0.1).complete(chat(), exchange)
    assert not exchange.is_sent


# Connections


def test_a_connection_is_used_again():
    with Scripted(once(answer(WHOLE), then_close=False)) as server:
        for _ in range(3):
            assert call(server).text == "hi"
        assert (server.connections, len(server.requests)) == (1, 3)


def test_a_streams_connection_is_used_again():
    events = (b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n',
              b"data: [DONE]\n\n")  # fmt: skip
    with Scripted(once(chunked(*events), then_close=False)) as server:
        for _ in range(2):
            list(provider(server.base_url).stream(chat(), Exchange()))
        assert server.connections == 1


def test_a_drop_after_the_last_event_loses_no_answer():
    exchange = Exchange()

    def script(peer, _number):
        peer.read()
        peer.send(chunked(b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}'
                          b"\n\ndata: [DONE]\n\n", end=False))  # fmt: skip
        peer.pause(5)

    with Scripted(script) as server:
        stream = provider(server.base_url).stream(chat(), exchange)
        next(stream)
        exchange.drop("cancel")
        (done,) = stream
        assert done.response.text == "a"


def test_a_stream_whose_end_hangs_is_done_all_the_same():
    event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'

    def script(peer, _number):
        peer.read()
        peer.send(chunked(event, b"data: [DONE]\n\n", end=False))
        peer.pause(5)

    with Scripted(script) as server:
        begun = time.monotonic()
        *_, done = provider(server.base_url).stream(chat(), Exchange())
        assert done.response.text == "a"
        assert time.monotonic() - begun < 4


def test_a_connection_that_the_server_closed_meanwhile_is_no_error():
    with Scripted(once(answer(WHOLE))) as server:
        for number in range(3):
            assert call(server).text == "hi"
            server.wait_until_closed(number)
            assert server.connections == number + 1


def test_nothing_is_sent_twice():
    def script(peer, number):
        peer.read()
        if number == 0:
            peer.send(answer(WHOLE))
            peer.read()
        # Closes without an answer to a request that it has read.

    with Scripted(script) as server:
        call(server)
        with pytest.raises(errors.ConnectionFailed, match="before the answer began"):
            call(server)
        assert len(server.requests) == 2


def test_a_reset_before_a_byte_went_out_opens_a_new_connection(monkeypatch):
    def script(peer, number):
        peer.read()
        peer.send(answer(WHOLE))
        if number == 0:
            reset(peer)

    # As if the reset came just after the look at the socket.
    monkeypatch.setattr(sockets.Stream, "stale", lambda _self: False)
    with Scripted(script) as server:
        call(server)
        server.wait_until_closed(0)
        assert call(server).text == "hi"
        assert len(server.requests) == 2


def reset(peer):
    """Close by a reset, as a server does that crashed."""
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.socket.close()


def test_a_connection_that_was_reset_meanwhile_is_no_error():
    def script(peer, _number):
        peer.read()
        peer.send(answer(WHOLE))
        reset(peer)

    with Scripted(script) as server:
        for number in range(2):
            assert call(server).text == "hi"
            server.wait_until_closed(number)
            assert server.connections == number + 1


def test_a_reset_in_the_middle_of_an_answer():
    def script(peer, _number):
        peer.read()
        peer.send(OK + b"Content-Length: 99\r\n\r\n{")
        peer.pause(0.05)
        reset(peer)

    with Scripted(script) as server:
        with pytest.raises(errors.BadResponse, match="broke off"):
            call(server)


def test_a_drop_just_before_the_connect_is_noticed(monkeypatch):
    exchange = Exchange()
    connect = sockets._connect

    def dropped_first(*args):
        exchange.drop("cancel")
        connect(*args)

    monkeypatch.setattr(sockets, "_connect", dropped_first)
    with full_listener() as url:
        begun = time.monotonic()
        with pytest.raises(errors.Dropped):
            provider(url).complete(chat(), exchange)
        assert time.monotonic() - begun < 4


def test_old_and_surplus_idle_connections_are_closed(monkeypatch, sandbox):
    url = f"{sandbox.base_url}/v1"
    monkeypatch.setattr(http, "MAX_IDLE_PER_ORIGIN", 3)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(
            lambda _: provider(url, api_key="k").complete(chat("slow-100"), Exchange()), range(8)
        ):
            pass  # fmt: skip
    # Threads that look at once leave a few too many; each later call closes up to two.
    for _ in range(4):
        provider(url, api_key="k").complete(chat(), Exchange())
    (stack,) = [stack for stack in http._idle.values() if stack]
    assert len(stack) == 3
    # Two old ones at the bottom go when the newest comes back; the next call finds all old.
    for connection, _stream in list(stack)[:2]:
        connection._expire_at = time.monotonic() - 1
    provider(url, api_key="k").complete(chat(), Exchange())
    assert len(stack) == 1
    stack[0][0]._expire_at = time.monotonic() - 1
    assert provider(url, api_key="k").complete(chat(), Exchange()).text == "hello"
    assert len(stack) == 1


def test_a_stack_that_others_empty_meanwhile_is_no_error():
    class Racing:
        """A stack that looks full and is empty."""

        def __bool__(self):
            return True

        def append(self, item):
            item[0].close()

        def pop(self):
            raise IndexError

        popleft = pop

    with Scripted(once(answer(WHOLE), then_close=False)) as server:
        target = http._target(server.base_url, "/chat/completions")
        http._idle[target[:3]] = Racing()
        try:
            assert call(server).text == "hi"
        finally:
            del http._idle[target[:3]]


def test_sixty_four_calls_at_once(sandbox):
    chats = provider(f"{sandbox.base_url}/v1", api_key="k")

    def one(number):
        return chats.complete(chat("slow-200", f"text {number}"), Exchange()).text

    begun = time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(one, range(64))) == [f"text {number}" for number in range(64)]
    assert time.monotonic() - begun < 5


def test_a_forked_child_shares_no_connection():
    script = """
import os, sys
from providers import http, registry
from providers.base import Account
from providers.sandbox import Sandbox
from providers.types import Message, Request, Text
with Sandbox() as sandbox:
    account = Account(name="a", base_url=sandbox.base_url + "/v1", api_key="k")
    chats = registry.build("compatible", account)
    request = Request(model="echo", messages=(Message(role="user", parts=(Text(text="x"),)),))
    chats.complete(request, http.Exchange())
    assert sum(map(len, http._idle.values())) == 1
    child = os.fork()
    if child == 0:
        os._exit(sum(map(len, http._idle.values())))
    assert os.waitpid(child, 0)[1] == 0
    assert sum(map(len, http._idle.values())) == 1
    chats.complete(request, http.Exchange())
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=30)


# Answers that are not what a vendor documents


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (answer(b"", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n"), "BadResponse"),
        (answer(b""), "BadResponse"),
        (answer(b"null"), "BadResponse"),
        (answer(b"<html>"), "BadResponse"),
        (answer(b'{"choices": []}'), "BadResponse"),
        (answer(b"\xff\xfe"), "BadResponse"),
        (OK + b"Content-Length: 99\r\n\r\n{", "BadResponse"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "BadResponse"),
        (OK + b"X: " + b"x" * 200_000, "BadResponse"),
        (b"", "ConnectionFailed"),
        (answer(b'{"error": {"message": "no"}}', b"HTTP/1.1 400 Bad\r\n"), "InvalidRequest"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 99\r\n\r\n{", "Overloaded"),
        (answer(b"x" * 300_000, b"HTTP/1.1 500 Oops\r\n"), "ServerError"),
    ],
)  # fmt: skip
def test_broken_answers(data, kind):
    with Scripted(once(data)) as server:
        with pytest.raises(getattr(errors, kind)) as caught:
            call(server)
        assert type(caught.value) is getattr(errors, kind)


def test_interim_answers_are_passed_over():
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    with Scripted(once(early + answer(WHOLE))) as server:
        assert call(server).text == "hi"


def test_a_refusal_that_comes_before_the_body_was_read_is_read():
    def script(peer, _number):
        peer.socket.recv(10)
        peer.send(answer(b'{"error": {"message": "too large"}}', b"HTTP/1.1 413 Too Large\r\n"))
        peer.socket.shutdown(socket.SHUT_WR)
        # Reads on until the client has seen the answer: an early close would reset it away.
        while peer.socket.recv(65536):
            pass

    with Scripted(script) as server:
        with pytest.raises(errors.InvalidRequest, match="too large"):
            call(server, chat(text="x" * 5_000_000))


def test_a_refusal_that_is_followed_by_a_reset_is_read():
    def script(peer, _number):
        peer.socket.recv(10)
        peer.send(answer(b'{"error": {"message": "too large"}}', b"HTTP/1.1 413 Too Large\r\n"))
        # Closing with bytes unread sends a reset.
        peer.socket.close()

    with Scripted(script) as server:
        with pytest.raises(errors.InvalidRequest, match="too large"):
            call(server, chat(text="x" * 5_000_000))


def test_a_body_that_is_too_large_is_not_read_to_its_end():
    def script(peer, _number):
        peer.read()
        peer.send(OK + b"Content-Length: 99999999\r\n\r\n")
        for _ in range(40):
            peer.send(b" " * 1024 * 1024)

    with Scripted(script) as server:
        with pytest.raises(errors.BadResponse, match="larger than 33554432 bytes"):
            call(server)


def test_compressed_answers_are_read_and_bounded():
    head = OK + b"Content-Encoding: gzip\r\n"
    with Scripted(once(answer(gzip.compress(WHOLE), head))) as server:
        assert call(server).text == "hi"
    with Scripted(once(answer(gzip.compress(b" " * 40_000_000), head))) as server:
        with pytest.raises(errors.BadResponse, match="larger than"):
            call(server)
    with Scripted(once(answer(b"no gzip", head))) as server:
        with pytest.raises(errors.BadResponse, match="broke off"):
            call(server)


def test_a_stream_that_is_too_large_ends(monkeypatch):
    monkeypatch.setattr(http, "MAX_STREAM_BYTES", 1000)
    with Scripted(once(chunked(b": comment\n\n" * 200))) as server:
        with pytest.raises(errors.BadResponse, match="the stream is larger than 1000 bytes"):
            list(provider(server.base_url).stream(chat(), Exchange()))


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(errors.ConnectionFailed, match="no connection to 127"):
        provider(f"http://127.0.0.1:{port}/v1").complete(chat(), Exchange())


def test_the_vendors_id_is_on_every_error():
    head = b"HTTP/1.1 500 Oops\r\nX-Request-Id: req_9\r\n"
    with Scripted(once(answer(b"{}", head))) as server:
        with pytest.raises(errors.ServerError) as caught:
            call(server)
        assert caught.value.request_id == "req_9"
    with Scripted(once(answer(b"no JSON", OK + b"X-Request-Id: req_8\r\n"))) as server:
        with pytest.raises(errors.BadResponse) as caught:
            call(server)
        assert caught.value.request_id == "req_8"


def test_a_stream_is_put_together_from_any_pieces():
    events = 'data: {"choices":[{"delta":{"content":"é😀"},"finish_reason":"stop"}]}\n\n'.encode()

    def script(peer, _number):
        peer.read()
        peer.send(EVENTS + b"Connection: close\r\n\r\n")
        for byte in events:
            peer.send(bytes([byte]))

    with Scripted(script) as server:
        *_, done = provider(server.base_url).stream(chat(), Exchange())
        assert done.response.text == "é😀"


def test_closing_a_stream_closes_its_connection(sandbox):
    exchange = Exchange(headers={"X-Client-Request-Id": "closed.1"})
    stream = provider(f"{sandbox.base_url}/v1", api_key="k").stream(chat("long-9000"), exchange)
    next(stream)
    stream.close()
    until(lambda: sandbox.calls("closed")["hung_up"])
    assert sandbox.calls("closed")["hung_up"] == 1


# What goes out


def test_what_a_request_carries():
    with Scripted(once(answer(WHOLE))) as server:
        exchange = Exchange(headers={"X-Client-Request-Id": "task.1"})
        call(server, exchange=exchange, api_key=" sk-secret\r\n", options={"headers": {"X-A": "b"}})
        head = server.requests[0].partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert head[0] == b"POST /v1/chat/completions HTTP/1.1"
    assert b"Host: " + server.base_url[7:-3].encode() in head
    assert b"Authorization: Bearer sk-secret" in head
    assert b"X-Client-Request-Id: task.1" in head
    assert b"X-A: b" in head
    assert b"Accept-Encoding: identity" in head


@pytest.mark.parametrize("key", ["sk-a\r\nb", "sk-a b", "sk-\x00", "sk-ü"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(key):
    with pytest.raises(errors.AuthenticationFailed) as caught:
        provider("http://127.0.0.1:1/v1", api_key=key).complete(chat(), Exchange())
    assert "sk-" not in str(caught.value)
    assert "sk-" not in repr(Account(name="a", base_url="", api_key=key))


def test_a_header_that_http_forbids_is_not_told(sandbox):
    exchange = Exchange(headers={"X-A": "secret\r\nX-B: c"})
    with pytest.raises(errors.InvalidRequest, match="a header") as caught:
        provider(f"{sandbox.base_url}/v1", api_key="k").complete(chat(), exchange)
    assert "secret" not in str(caught.value)


def test_a_body_that_json_can_not_hold_is_the_callers_fault():
    with pytest.raises(errors.InvalidRequest, match="JSON"):
        provider("http://127.0.0.1:1/v1").complete(chat(text="\ud800"), Exchange())


@pytest.mark.parametrize("url", ["ftp://a/v1", "http:///v1", "http://[::1/v1", "nothing"])
def test_a_base_url_that_is_none_is_a_failed_connection(url):
    with pytest.raises(errors.ConnectionFailed, match="base URL"):
        http._target(url, "/x")


# Errors of the libraries


def subclasses(base):
    for child in base.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_error_of_the_http_libraries_is_mapped():
    found = {httpx.HTTPError, httpx.InvalidURL, httpx.CookieConflict, httpx.StreamError}
    found |= {kind for base in set(found) for kind in subclasses(base)}
    found |= {
        kind
        for kind in vars(httpcore).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert len(found) > 35
    unmapped = {kind for kind in found if not set(kind.__mro__) & set(http.FOREIGN_ERRORS)}
    assert not unmapped
    for kind in found:
        call_ = http._Call(
            Account(name="a", base_url=""), http._target("http://a", "/"), Exchange()
        )
        problem = kind.__new__(kind)
        assert isinstance(http._ours(problem, call_), errors.ProviderError)
