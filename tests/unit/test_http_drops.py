"""A call that is dropped ends at once, whatever it waits for, and nobody else's does."""

import time

import pytest

from providers import errors, sockets
from providers.http import Exchange
from tests.unit.exchanges import (
    WHOLE,
    call,
    chat,
    dropped_after,
    full_listener,
    once,
    provider,
    until,
)
from tests.unit.scripted import Scripted, answer, chunked

pytestmark = pytest.mark.usefixtures("no_idle_connections")


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
    assert chats.complete(chat(), Exchange()).text == "Hello, world!"
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


def test_drop_wakes_a_call_that_still_connects():
    with full_listener() as url:
        exchange = Exchange()
        dropped_after(0.1, exchange, lambda: provider(url).complete(chat(), exchange))


def test_drop_wakes_a_handshake():
    with Scripted(lambda peer, _number: peer.pause(5)) as server:
        exchange = Exchange()
        chats = provider(server.base_url.replace("http:", "https:"))
        dropped_after(0.1, exchange, lambda: chats.complete(chat(), exchange))


def test_drop_does_not_touch_the_socket_of_a_later_call(sandbox):
    chats = provider(f"{sandbox.base_url}/v1", api_key="k")
    first = Exchange()
    chats.complete(chat(), first)
    first.drop("late")
    assert chats.complete(chat(), Exchange()).text == "Hello, world!"


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


def test_closing_a_stream_closes_its_connection(sandbox):
    exchange = Exchange(headers={"X-Client-Request-Id": "closed.1"})
    stream = provider(f"{sandbox.base_url}/v1", api_key="k").stream(chat("long-9000"), exchange)
    next(stream)
    stream.close()
    until(lambda: sandbox.calls("closed")["hung_up"])
    assert sandbox.calls("closed")["hung_up"] == 1
