"""Sockets that can be dropped from another thread, and that never outlive their call's limits.

A call's `Exchange` holds the socket that the call is blocked on, from before it connects, so that
`drop` can shut it down: a blocked read, handshake or connect wakes at once. A `Stream` is such a
socket in the shape that httpcore's connection wants.
"""

import contextlib
import ipaddress
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final

from providers.errors import ConnectionFailed, Dropped, Timeout

# A vendor may think for minutes without a byte; a NAT in between forgets silent connections
# sooner than that.
KEEPALIVE_IDLE: Final = 30  # seconds
_PULSE: Final = 0.1  # seconds between two looks at `dropped` before a socket is connected
_SLACK: Final = 0.005  # seconds; a poll may wake that much before the clock shows the end

_Address = tuple[Any, ...]


class Exchange:
    """One HTTP call under way: what another thread needs to end it, and what it learned.

    `deadline` is a `time.monotonic()` value; `headers` are sent with the request. `is_sent` once a
    byte of it went out: from then on it may be on the vendor's bill. `status`, `request_id` (the
    vendor's id of the call) and `response_headers` (names in lower case) are there once the answer
    began; `first_byte_at` (monotonic) once its body did, for a stream its first delta.
    """

    __slots__ = (
        "_lock",
        "_socket",
        "deadline",
        "dropped",
        "first_byte_at",
        "headers",
        "is_sent",
        "request_id",
        "response_headers",
        "status",
    )

    def __init__(
        self, deadline: float | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.deadline = deadline
        self.headers: Mapping[str, str] = headers or {}
        self.dropped: str | None = None
        self.is_sent = False
        self.status: int | None = None
        self.request_id: str | None = None
        self.response_headers: Mapping[str, str] = {}
        self.first_byte_at: float | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def drop(self, reason: str) -> None:
        """End the call, from any thread, at any moment, before it began too.

        The call raises `Dropped(reason)`. The first reason stays.
        """
        # Under the lock, so that the socket can't be closed or given to another call meanwhile.
        with self._lock:
            if self.dropped is None:
                self.dropped = reason
            if self._socket is not None:
                _shut(self._socket)

    def check(self) -> None:
        if self.dropped is not None:
            raise Dropped(self.dropped)

    def hold(self, sock: socket.socket) -> None:
        """Name the socket that `drop` is to shut down. Raises `Dropped`."""
        with self._lock:
            self._socket = sock
        self.check()

    def release(self) -> None:
        with self._lock:
            self._socket = None

    def mark_first_byte(self) -> None:
        if self.first_byte_at is None:
            self.first_byte_at = time.monotonic()


def _shut(sock: socket.socket) -> None:
    # An error: not connected yet, or gone already; the call sees `dropped` by itself.
    with contextlib.suppress(OSError):
        # Unbound: SSLSocket.shutdown would take the TLS layer away under the reader's feet.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class Clock:
    """How long a call's next step may take: its own limit, the total's, the deadline's."""

    def __init__(self, exchange: Exchange, read_timeout: float, total_timeout: float) -> None:
        self.exchange = exchange
        self.read_timeout = read_timeout
        self.total_timeout = total_timeout
        self.total_end = time.monotonic() + total_timeout

    def left(self, step: float) -> float:
        """Seconds for a step of at most `step` seconds. Raises `Dropped`, `Timeout`."""
        self.exchange.check()
        deadline = self.exchange.deadline
        end = self.total_end if deadline is None else min(self.total_end, deadline)
        left = end - time.monotonic()
        if left <= 0:
            raise self._late_at_all()
        # Never 0, which a socket would take for "do not wait at all".
        return max(min(left, step), 0.001)

    def late(self, message: str, code: str) -> Timeout:
        """The `Timeout` of a step that took too long, named after the limit that it reached."""
        now = time.monotonic() + _SLACK
        deadline = self.exchange.deadline
        if now >= self.total_end or (deadline is not None and now >= deadline):
            return self._late_at_all()
        return Timeout(message, code=code)

    def _late_at_all(self) -> Timeout:
        deadline = self.exchange.deadline
        if deadline is not None and deadline <= self.total_end:
            return Timeout("the deadline passed before the vendor had answered", code="deadline")
        return Timeout(f"no answer within {self.total_timeout:g} s", code="total_timeout")

    def late_read(self) -> Timeout:
        return self.late(f"the vendor was silent for {self.read_timeout:g} s", "read_timeout")


class StaleError(Exception):
    """A kept-alive connection was dead before a byte of this call went out."""


class Stream:
    """A connected socket as httpcore's `NetworkStream`; its timeouts are the `Clock`'s.

    Writes are held back until the first read and then sent in one piece, so that a small
    request is one packet. `received` counts the call's bytes.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = 0
        self._clock: Clock | None = None
        self._reused = False
        self._unsent: list[bytes] = []

    def start(self, clock: Clock, *, reused: bool) -> None:
        """Begin a call on this connection. Raises `Dropped`."""
        self._clock = clock
        self._reused = reused
        self.received = 0
        self._unsent.clear()
        clock.exchange.hold(self.sock)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        clock = self._clock
        assert clock is not None  # noqa: S101 - for the type checker
        if self._unsent:
            self._send(clock)
        self.sock.settimeout(clock.left(clock.read_timeout))
        try:
            data = self.sock.recv(max_bytes)
        except TimeoutError:
            clock.exchange.check()
            raise clock.late_read() from None
        except OSError:
            clock.exchange.check()
            raise
        if not data:
            # The end of the stream is also what a drop looks like.
            clock.exchange.check()
        self.received += len(data)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if buffer:
            self._unsent.append(buffer)

    def _send(self, clock: Clock) -> None:
        data = memoryview(b"".join(self._unsent))
        self._unsent.clear()
        sent = 0
        while sent < len(data):
            self.sock.settimeout(clock.left(clock.read_timeout))
            try:
                sent += self.sock.send(data[sent:])
                clock.exchange.is_sent = True
            except TimeoutError:
                clock.exchange.check()
                raise clock.late_read() from None
            except OSError:
                clock.exchange.check()
                if self._reused and not sent:
                    raise StaleError from None
                # A server that refuses a large body answers before it has read it all, then
                # closes: its answer can still be read.
                return

    def park(self) -> None:
        """The call is over: an idle connection belongs to none."""
        self._clock = None

    def close(self) -> None:
        if self._clock is not None:
            self._clock.exchange.release()
        self.sock.close()

    def get_extra_info(self, info: str) -> Any:
        return self.stale() if info == "is_readable" else None

    def stale(self) -> bool:
        """Whether an idle connection was closed by the server (or sends what nobody asked for)."""
        try:
            self.sock.settimeout(0.0)
            # Unbound, since an SSLSocket refuses flags.
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True
        return True


def connect(
    host: str,
    port: int,
    clock: Clock,
    timeout: float,
    context: ssl.SSLContext | None,
    may_reach: Callable[[str], bool] | None = None,
) -> Stream:
    """A connection within `timeout` seconds: name, TCP, TLS. It goes to an address of which
    `may_reach` was asked: the name is not looked up again.

    Raises `ConnectionFailed`, `Timeout`, `Dropped`.
    """
    end = time.monotonic() + timeout
    late = f"no connection within {timeout:g} s"
    addresses = _resolve(host, port, clock, end, late)
    if may_reach is not None and not all(may_reach(address[4][0]) for address in addresses):
        raise ConnectionFailed(f"{host} is in a network that may not be reached", code="private")
    error: OSError | None = None
    for tried, address in enumerate(addresses):
        # A share of the time each: a dead first address must not use up what a second needs.
        share = (end - time.monotonic()) / (len(addresses) - tried)
        try:
            return Stream(_open(address, host, clock, share, context))
        except OSError as exc:
            clock.exchange.check()
            error = exc
    if isinstance(error, TimeoutError):
        raise clock.late(late, "connect_timeout") from None
    raise ConnectionFailed(f"no connection to {host}:{port}: {_reason(error)}", code=_code(error))


def _open(
    address: _Address, host: str, clock: Clock, seconds: float, context: ssl.SSLContext | None
) -> socket.socket:
    exchange = clock.exchange
    end = time.monotonic() + seconds
    family, kind, proto, _, target = address
    sock = socket.socket(family, kind, proto)
    try:
        exchange.hold(sock)
        _connect(sock, target, clock, end)
        exchange.check()
        _tune(sock)
        if context is not None:
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            exchange.hold(sock)
            sock.settimeout(clock.left(end - time.monotonic()))
            sock.do_handshake()
            exchange.check()
    except BaseException:
        exchange.release()
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, target: Any, clock: Clock, end: float) -> None:
    """In steps, since a drop just before the connect leaves nothing that would wake it."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(target)
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    while not poller.poll(1000 * clock.left(min(end - time.monotonic(), _PULSE))):
        if time.monotonic() >= end:
            raise TimeoutError
    if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # pragma: no branch - macOS has it not
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)


def _reason(error: OSError | None) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    return (error.strerror or type(error).__name__) if error is not None else "no address"


def _code(error: OSError | None) -> str | None:
    return "tls" if isinstance(error, ssl.SSLError) else None


# A name's lookup can't be interrupted and knows no timeout, so a thread of its own does it, one
# per name however many calls wait for it.
_lookups: dict[tuple[str, int], "Future[list[_Address]]"] = {}


def _resolve(host: str, port: int, clock: Clock, end: float, late: str) -> list[_Address]:
    if _is_address(host):
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    future: Future[list[_Address]] = Future()
    running = _lookups.setdefault((host, port), future)
    if running is future:
        _start_lookup(host, port, future)
    while not running.done():
        left = end - time.monotonic()
        if left <= 0:
            raise clock.late(late, "connect_timeout")
        try:
            running.exception(clock.left(min(left, _PULSE)))
        except TimeoutError:
            continue
    try:
        return running.result()
    except (OSError, UnicodeError, RuntimeError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise ConnectionFailed(f"{host} has no address: {reason}", code="dns") from None


def _start_lookup(host: str, port: int, future: "Future[list[_Address]]") -> None:
    work = threading.Thread(target=_look_up, args=(host, port, future), name="lookup", daemon=True)
    try:
        work.start()
    except RuntimeError as exc:  # the process has as many threads as it may
        _lookups.pop((host, port), None)
        future.set_exception(exc)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _look_up(host: str, port: int, future: "Future[list[_Address]]") -> None:
    try:
        future.set_result(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    except Exception as exc:  # noqa: BLE001 - handed to those who wait
        future.set_exception(exc)
    finally:
        _lookups.pop((host, port), None)


os.register_at_fork(after_in_child=_lookups.clear)
