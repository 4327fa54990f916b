"""Live events: what happens to a task, for whoever watches it.

A Redis stream per task, `events:{<task id>}`; the entry's id is the client's Last-Event-ID.

    state      {status, …}                          the task changed its state
    delta      {attempt, text}                      a piece of the answer
    thinking   {attempt, text}                      a piece of the model's reasoning
    tool_call  {attempt, index, id, name, arguments}   a piece of a tool call
    reset      {attempt, reason}                    forget the pieces so far
    step       {number, kind, name, status, call_id, background, task, error}
                                                    a step of an agent or a workflow changed
    snapshot   the task                             made by the API: the id was trimmed or unknown
    done       {status}                             final; the API puts the whole task into it

Events are a courtesy: the row is the truth. Publishing never raises and never waits: one writer
thread per process sends what has gathered in one round trip, deltas at most FLUSH_S after they
came, everything else at once. While Redis is away they are dropped, and the pieces of an answer
that has a hole are not sent on: a watcher gets the whole answer with `done`.

`watchers.py` is the other end.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from uuid import UUID

import orjson
import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

from providers.types import StreamEvent, TextDelta, ThinkingDelta, ToolCallDelta

logger = logging.getLogger(__name__)

FLUSH_S = 0.05
FLUSH_CHARACTERS = 1024
SKIP_S = 1.0
MOST_UNSENT = 20_000
# A finished task's events are kept for those who are reading them: whoever comes later gets the
# whole task. At 1,000 short tasks a second that is 25 MB in Redis, not 3 GB (130 MB where the
# server allocates 4 kB for each stream, docs/operations.md).
DONE_TTL_S = 30
BLOCK_MS = 1000
PIECES = frozenset({"delta", "thinking", "tool_call"})


@dataclass(frozen=True, slots=True)
class Event:
    """`data` is JSON text."""

    id: str
    name: str
    data: bytes


@cache
def client() -> redis.Redis:
    """Without retries: a piece of an answer that was sent twice would be worse than a lost one."""
    return redis.Redis.from_url(
        settings.REDIS_URL,
        socket_timeout=BLOCK_MS / 1000 + 1.0,
        socket_connect_timeout=0.5,
        health_check_interval=0,
        max_connections=200,
        retry=Retry(NoBackoff(), 0),
    )


def stream_of(task_id: UUID) -> str:
    return f"events:{{{task_id}}}"


@dataclass(slots=True)
class Unsent:
    task_id: UUID
    name: str
    data: Mapping[str, Any]
    # The pieces that were put together while it waited, under the name of their field.
    grows: str = ""
    pieces: list[str] = field(default_factory=list)

    def json(self) -> bytes:
        data = {**self.data, self.grows: "".join(self.pieces)} if self.grows else self.data
        return orjson.dumps(data, default=str)


class Outbox:
    """What this process has to tell, and the thread that tells it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.unsent: list[Unsent] = []
        self.growing: dict[UUID, Unsent] = {}
        # Tasks whose pieces have a hole → whether their watchers were told.
        self.holes: dict[UUID, bool] = {}
        self.urgent = False
        self.characters = 0
        self.away_until = 0.0
        self.thread: threading.Thread | None = None

    def put(self, task_id: UUID, name: str, data: Mapping[str, Any]) -> None:
        with self.changed:
            self.growing.pop(task_id, None)
            if name in ("reset", "done"):
                self.holes.pop(task_id, None)
            self.urgent = True
            self._append(Unsent(task_id, name, data))

    def grow(
        self, task_id: UUID, name: str, data: Mapping[str, Any], grows: str, piece: str
    ) -> None:
        """Add a piece to the event that still waits, or begin a new one."""
        with self.changed:
            if self._has_hole(task_id, data):
                return
            self.characters += len(piece)
            waiting = self.growing.get(task_id)
            if waiting and waiting.name == name and same_piece(waiting.data, data):
                waiting.pieces.append(piece)
                if self.characters >= FLUSH_CHARACTERS:
                    self.changed.notify()
                return
            self.growing[task_id] = unsent = Unsent(task_id, name, data, grows, [piece])
            self._append(unsent)

    def _has_hole(self, task_id: UUID, data: Mapping[str, Any]) -> bool:
        told = self.holes.get(task_id)
        if told is False:
            self.holes[task_id] = True
            self.urgent = True
            self._append(
                Unsent(task_id, "reset", {"attempt": data.get("attempt"), "reason": "lost"})
            )
        return told is not None

    def _append(self, unsent: Unsent) -> None:
        if len(self.unsent) >= MOST_UNSENT:
            self._lose(self.unsent)
            self.unsent, self.growing = [], {}
        self.unsent.append(unsent)
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, name="events-outbox", daemon=True)
            self.thread.start()
        self.changed.notify()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.unsent)
                self.changed.wait_for(
                    lambda: self.urgent or self.characters >= FLUSH_CHARACTERS, FLUSH_S
                )
            self.flush()

    def flush(self) -> None:
        """Send what has gathered, or drop it while Redis is away."""
        with self.changed:
            batch, self.unsent, self.growing = self.unsent, [], {}
            self.urgent, self.characters = False, 0
            if time.monotonic() < self.away_until:
                self._lose(batch)
                return
        if not batch:
            return
        try:
            send(batch)
        except redis.RedisError as error:
            logger.warning("events dropped: Redis is away", extra={"error": str(error)})
            client().connection_pool.disconnect()
            with self.changed:
                self.away_until = time.monotonic() + SKIP_S
                self._lose(batch)

    def _lose(self, batch: Iterable[Unsent]) -> None:
        if len(self.holes) > MOST_UNSENT:
            self.holes.clear()
        for unsent in batch:
            if unsent.name in PIECES or unsent.task_id in self.holes:
                self.holes[unsent.task_id] = False
            if unsent.name == "done":
                self.holes.pop(unsent.task_id, None)


def same_piece(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if the other continues the one: only a first piece brings an id and a name."""
    return one["attempt"] == other["attempt"] and (
        one.get("index") == other.get("index") and not other.get("id")
    )


def send(batch: Iterable[Unsent]) -> None:
    """One round trip for all."""
    kept, ttl = (int(settings.LLMTASKS[name]) for name in ("EVENTS_KEPT", "EVENTS_TTL_S"))
    with client().pipeline(transaction=False) as pipe:
        lives: dict[str, int] = {}
        for unsent in batch:
            stream = stream_of(unsent.task_id)
            lives[stream] = min(ttl, DONE_TTL_S) if unsent.name == "done" else ttl
            pipe.xadd(stream, {"n": unsent.name, "d": unsent.json()}, maxlen=kept, approximate=True)
        for stream, life in sorted(lives.items()):
            pipe.expire(stream, life)
        pipe.execute()


def publish(task_id: UUID, name: str, data: Mapping[str, Any]) -> None:
    outbox().put(task_id, name, data)


def publish_many(events: Iterable[tuple[UUID, str, Mapping[str, Any]]]) -> None:
    for task_id, name, data in events:
        outbox().put(task_id, name, data)


def publish_piece(task_id: UUID, attempt: int, event: StreamEvent) -> None:
    """A delta of attempt number `attempt`; a `Done` is no event: the task's state tells it."""
    if isinstance(event, TextDelta):
        outbox().grow(task_id, "delta", {"attempt": attempt}, "text", event.text)
    elif isinstance(event, ThinkingDelta):
        outbox().grow(task_id, "thinking", {"attempt": attempt}, "text", event.text)
    elif isinstance(event, ToolCallDelta):
        data = {"attempt": attempt, "index": event.index, "id": event.id, "name": event.name}
        outbox().grow(task_id, "tool_call", data, "arguments", event.arguments)


def publish_reset(task_id: UUID, attempt: int, reason: str = "retry") -> None:
    """Attempt number `attempt` begins: what the earlier one wrote is void, or was another turn."""
    publish(task_id, "reset", {"attempt": attempt, "reason": reason})


def publish_step(
    task_id: UUID,
    *,
    number: int,
    kind: str,
    name: str,
    status: str,
    call_id: str = "",
    background: bool = False,
    child_id: UUID | None = None,
    error: str = "",
) -> None:
    """A step of the task begins, waits or has ended, whatever kind of task it is. Its arguments
    and its result are for those who ask for the steps."""
    data = {
        "number": number, "kind": kind, "name": name, "status": status,
        "call_id": call_id or None, "background": background,
        "task": None if child_id is None else str(child_id), "error": error or None,
    }  # fmt: skip
    publish(task_id, "step", data)


@cache
def outbox() -> Outbox:
    made = Outbox()
    atexit.register(made.flush)
    return made


def forget() -> None:
    """After a fork: the thread stayed behind, and so must what it shares."""
    client.cache_clear()
    outbox.cache_clear()


os.register_at_fork(after_in_child=forget)
