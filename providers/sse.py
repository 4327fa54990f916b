"""Server-sent events, as the HTML standard parses them (§ 9.2.6 "Interpreting an event stream").

Lines end with LF, CR or CRLF; `data` lines of one event are joined by LF; comments, `id` and
`retry` are passed over; an event without data is none. One difference: an event whose last line
is complete counts at the end of the stream even without the blank line after it, since some
servers leave it out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from providers.errors import BadResponse

MAX_EVENT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """`event` is "" where the server named none."""

    event: str
    data: str


class Parser:
    """Takes bytes as they come, gives whole events."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        # Pieces of a line whose end has not come; joined once, so that a long line that drips in
        # costs no more than its length.
        self._tail: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._first = True
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """Raises `BadResponse` where one event is larger than the cap."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        if not chunk:
            return
        self._after_cr = chunk.endswith(b"\r")
        for line in chunk.splitlines(keepends=True):
            self._size += len(line)
            if self._size > self._max:
                raise BadResponse(f"an event of the stream is larger than {self._max} bytes")
            if not line.endswith((b"\n", b"\r")):
                self._tail.append(line)
                return
            if self._tail:
                line = b"".join((*self._tail, line))
                self._tail.clear()
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                yield event

    def finish(self) -> Iterator[ServerSentEvent]:
        """The event that the end of the stream completes, if any."""
        if not self._tail:
            event = self._line(b"")
            if event is not None:
                yield event

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if self._first:
            self._first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode(errors="replace"))
        elif name == b"event":
            self._event = value.removeprefix(b" ").decode(errors="replace")
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        event, data = self._event, self._data
        self._event, self._data, self._size = "", [], 0
        return ServerSentEvent(event, "\n".join(data)) if data else None
