"""How long a call may take, and what is known of its times."""

import time

import pytest

from providers import errors
from providers.http import Exchange
from tests.unit.exchanges import call, chat, dropped_after, full_listener, provider
from tests.unit.scripted import OK, Scripted

pytestmark = pytest.mark.usefixtures("no_idle_connections")


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
