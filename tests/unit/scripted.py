"""A server for tests that sends exactly what a test tells it to, byte by byte."""

import contextlib
import socket
import threading
from collections.abc import Callable

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def answer(body: bytes, head: bytes = OK) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*chunks: bytes, head: bytes = EVENTS, end: bool = True) -> bytes:
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed + (b"0\r\n\r\n" if end else b"")


class Scripted:
    """`script(peer, number)` runs in a thread of its own for each connection, counted from 0."""

    def __init__(self, script: Callable[["Peer", int], None]) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._peers: list[Peer] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def __enter__(self) -> "Scripted":
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        # Shut down first: closing alone does not wake a blocked accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for peer in self._peers:
            peer.close()
            peer.thread.join()

    def wait_until_closed(self, number: int) -> None:
        """Until the script of that connection has ended."""
        self._peers[number].thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            peer = Peer(self, connection)
            self._peers.append(peer)
            peer.thread = threading.Thread(
                target=self._serve, args=(peer, self.connections), daemon=True
            )
            self.connections += 1
            peer.thread.start()

    def _serve(self, peer: "Peer", number: int) -> None:
        with contextlib.suppress(OSError):
            self._script(peer, number)
        peer.close()


class Peer:
    thread: threading.Thread

    def __init__(self, server: Scripted, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server = server
        self._closed = threading.Event()

    def read(self) -> bytes:
        """One request, head and body; b"" when the client has left."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = self.socket.recv(65536)
            if not more:
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        while len(body) < length:
            body += self.socket.recv(65536)
        self._server.requests.append(head + b"\r\n\r\n" + body)
        return self._server.requests[-1]

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than the test lasts."""
        self._closed.wait(seconds)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
