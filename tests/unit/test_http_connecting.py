"""From a name to a connection: lookups, addresses, handshakes, and how long they may take."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from providers import errors, http, sockets
from providers.http import Exchange
from tests.unit.exchanges import chat, dropped_after, full_listener, provider
from tests.unit.scripted import Scripted

pytestmark = pytest.mark.usefixtures("no_idle_connections")


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
    assert chats.complete(chat(), Exchange()).text == "Hello, world!"


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
        assert chats.complete(chat(), Exchange()).text == "Hello, world!"


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


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(errors.ConnectionFailed, match="no connection to 127"):
        provider(f"http://127.0.0.1:{port}/v1").complete(chat(), Exchange())


@pytest.mark.parametrize("url", ["ftp://a/v1", "http:///v1", "http://[::1/v1", "nothing"])
def test_a_base_url_that_is_none_is_a_failed_connection(url):
    with pytest.raises(errors.ConnectionFailed, match="base URL"):
        http._target(url, "/x")
