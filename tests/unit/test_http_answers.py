"""What goes out, and what a broken answer becomes."""

import gzip
import socket

import httpcore
import httpx
import pytest

from providers import errors, http
from providers.base import Account
from providers.http import Exchange
from tests.unit.exchanges import WHOLE, call, chat, once, provider
from tests.unit.scripted import EVENTS, OK, Scripted, answer, chunked

pytestmark = pytest.mark.usefixtures("no_idle_connections")


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
