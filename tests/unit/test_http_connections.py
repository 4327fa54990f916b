"""Connections are used again, and one that broke meanwhile is no error."""

import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from providers import errors, http, sockets
from providers.http import Exchange
from tests.unit.exchanges import WHOLE, call, chat, once, provider
from tests.unit.scripted import OK, Scripted, answer, chunked

pytestmark = pytest.mark.usefixtures("no_idle_connections")


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
    assert provider(url, api_key="k").complete(chat(), Exchange()).text == "Hello, world!"
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
