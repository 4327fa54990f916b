"""Watching a task's events (`events.py`): any number of watchers, one connection per process.

One reader thread follows Redis for all watchers of the process; it lives while somebody watches.
A watcher first reads the stream itself, from its place to the end, then is fed by the reader;
a watcher that is too slow falls back to reading by itself.
"""

import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from uuid import UUID

import redis
from django.conf import settings
from uuid_utils.compat import uuid7

from llmtasks.errors import TooManyWatchers
from llmtasks.events import BLOCK_MS, Event, client, stream_of

PAGE = 500
MOST_QUEUED = 2000
FIRST_ID = "0-0"
EVENT_ID = re.compile(r"\d{1,19}-\d{1,19}\Z")


def position(event_id: str) -> tuple[int, int]:
    """An event's id as a number pair, for comparison."""
    milliseconds, _, count = event_id.partition("-")
    return int(milliseconds), int(count)


def event_of(entry: tuple[bytes, dict[bytes, bytes]]) -> Event:
    event_id, fields = entry
    return Event(event_id.decode(), fields.get(b"n", b"").decode(), fields.get(b"d", b"{}"))


class Watcher:
    """One watcher's place in a task's events. For one thread."""

    def __init__(self, task_id: UUID, after: str | None) -> None:
        self.task_id = task_id
        self.last = after or FIRST_ID
        # True if `after` can't be resumed from: it was trimmed, expired, or never was.
        self.is_lost = False
        self.is_behind = True
        self.arrived = threading.Condition()
        self.queue: deque[Event] = deque()

    def find_place(self) -> None:
        """Check that `after` still exists; else go on from the stream's end, and say so."""
        if self.last == FIRST_ID:
            return
        stream = stream_of(self.task_id)
        try:
            if EVENT_ID.match(self.last) and client().xrange(stream, self.last, self.last, 1):
                return
            newest: Any = client().xrevrange(stream, count=1)
        except redis.RedisError:
            newest = []
        self.is_lost = True
        self.last = newest[0][0].decode() if newest else FIRST_ID

    def next(self, timeout: float) -> Event | None:
        """The next event, or None where there was none for `timeout` seconds."""
        until = time.monotonic() + timeout
        while True:
            if self.is_behind and not self.queue:
                self._catch_up()
            with self.arrived:
                left = until - time.monotonic()
                if not self.queue and not self.is_behind:
                    self.arrived.wait_for(lambda: self.queue or self.is_behind, max(left, 0))
                while self.queue:
                    event = self.queue.popleft()
                    if position(event.id) > position(self.last):
                        self.last = event.id
                        return event
            if time.monotonic() >= until:
                return None
            if self.is_behind and not reader().is_online:
                time.sleep(min(0.2, max(until - time.monotonic(), 0)))

    def _catch_up(self) -> None:
        """Read what is in the stream, then have the reader go on from there."""
        try:
            entries: Any = client().xrange(stream_of(self.task_id), f"({self.last}", "+", PAGE)
        except redis.RedisError:
            reader().is_online = False
            return
        reader().is_online = True
        self.queue.extend(map(event_of, entries))
        if len(entries) < PAGE:
            self.is_behind = False
            reader().follow(self, self.queue[-1].id if self.queue else self.last)

    def take(self, events: list[Event]) -> None:
        """Called by the reader."""
        with self.arrived:
            if self.is_behind or len(self.queue) + len(events) > MOST_QUEUED:
                self.is_behind = True  # a slow client: it reads the stream itself, at its pace
            else:
                self.queue.extend(events)
            self.arrived.notify()


class Reader:
    """Follows Redis for all watchers of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.watchers: dict[str, set[Watcher]] = {}
        self.positions: dict[str, str] = {}
        self.bell = f"events:bell:{uuid7()}"
        self.thread: threading.Thread | None = None
        self.is_online = True

    def follow(self, watcher: Watcher, after: str) -> None:
        stream = stream_of(watcher.task_id)
        with self.lock:
            self.watchers.setdefault(stream, set()).add(watcher)
            known = self.positions.get(stream)
            # The one that is further back decides; the others drop what they have seen.
            self.positions[stream] = min(known, after, key=position) if known else after
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, name="events-reader", daemon=True)
                self.thread.start()
                return
        self.ring()

    def leave(self, watcher: Watcher) -> None:
        stream = stream_of(watcher.task_id)
        with self.lock:
            watching = self.watchers.get(stream, set())
            watching.discard(watcher)
            if not watching:
                self.watchers.pop(stream, None)
                self.positions.pop(stream, None)

    def ring(self) -> None:
        """Wake the thread from its blocked read, so that it takes up a new stream."""
        try:
            with client().pipeline(transaction=False) as pipe:
                pipe.xadd(self.bell, {"n": "ring"}, maxlen=1, approximate=False)
                pipe.expire(self.bell, 60)
                pipe.execute()
        except redis.RedisError:
            self.is_online = False

    def run(self) -> None:
        heard = FIRST_ID
        while True:
            with self.lock:
                if not self.watchers:
                    self.thread = None
                    return
                streams: Any = {**self.positions, self.bell: heard}
            try:
                answer: Any = client().xread(streams, block=BLOCK_MS)
                self.is_online = True
            except redis.RedisError:
                self.is_online = False
                time.sleep(0.2)
                continue
            for name, entries in items(answer):
                if name == self.bell:
                    heard = entries[-1][0].decode()
                else:
                    self.deliver(name, entries, streams[name])

    def deliver(self, stream: str, entries: list[Any], asked: str) -> None:
        with self.lock:
            # Another place by now: someone came who is further back, and reads from there.
            if self.positions.get(stream) == asked:
                self.positions[stream] = entries[-1][0].decode()
            watching = list(self.watchers.get(stream, ()))
        events = [event_of(entry) for entry in entries]
        for watcher in watching:
            watcher.take(events)


def items(answer: Any) -> Iterator[tuple[str, list[Any]]]:
    """XREAD's answer, which is a mapping or a list depending on the protocol's version."""
    for name, entries in answer.items() if isinstance(answer, dict) else answer or ():
        # RESP3 wraps the entries of a stream in one more list.
        flat = entries[0] if entries and isinstance(entries[0], list) else entries
        if flat:
            yield name.decode(), flat


@contextmanager
def watch(task_id: UUID, after: str | None = None) -> Iterator[Watcher]:
    """Watch a task's events after the id `after` (None: from the first). Raises TooManyWatchers."""
    if not places().acquire(blocking=False):
        raise TooManyWatchers("Too many event streams here; try again soon.", retry_after=2)
    try:
        watcher = Watcher(task_id, after)
        watcher.find_place()
        try:
            yield watcher
        finally:
            reader().leave(watcher)
    finally:
        places().release()


@cache
def reader() -> Reader:
    return Reader()


@cache
def places() -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(int(settings.LLMTASKS["WATCHERS"]))


def forget() -> None:
    """After a fork: the thread stayed behind, and so must what it shares."""
    reader.cache_clear()
    places.cache_clear()


os.register_at_fork(after_in_child=forget)
