"""One thread per process: its lease, cancels for its calls, the configuration's version.

Every `PERIOD_S` one statement renews the lease where that is due, learns which of this process's
tasks were asked to cancel, and reads `config_version`. A process whose lease lapsed drops all
its calls and takes a new id: whoever finds the old id expired may take its tasks.

The thread has a connection of its own: a pool that is used up must not cost the lease.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from django.conf import settings
from django.db import connection
from psycopg.types.json import Jsonb
from uuid_utils.compat import uuid7

from llmtasks.errors import Unavailable
from llmtasks.models import Worker
from llmtasks.stores import TimedConnection, has_input

log = logging.getLogger(__name__)

# The lease's own times are settings: LEASE_S, RENEW_S and DROP_AFTER_S.
PERIOD_S = 0.5
# While Postgres is away, configuration and keys that were read before stay valid for so long.
CONFIG_VALID_S = 60.0
# A connect and a statement together must not outlast what DROP_AFTER_S leaves of the lease.
STATEMENT_S = 2.0
# Between two looks for calls that are still under way after the grace time.
DRAIN_LOOK_S = 0.1

BEAT = """
WITH renewed AS (
    UPDATE llmtasks_worker
    SET lease_until = clock_timestamp() + make_interval(secs => %(lease)s), queues = %(queues)s
    WHERE id = %(id)s AND %(due)s AND lease_until > clock_timestamp()
    RETURNING id
)
SELECT (SELECT count(*) FROM renewed),
       coalesce((SELECT version FROM llmtasks_config WHERE id = 1), 0),
       ARRAY(
           SELECT id FROM llmtasks_task
           WHERE owner_id = %(id)s AND status = 'running' AND cancel_requested_at IS NOT NULL
       ),
       clock_timestamp(),
       (SELECT count(*) FROM llmtasks_worker
        WHERE lease_until > clock_timestamp() AND role IN ('web', 'worker'))
"""

# What this process owns but does not run (a write was lost with its connection) is given to
# nobody: the sweep takes it up as it does the tasks of a dead process.
OWNED = "SELECT id FROM llmtasks_task WHERE owner_id = %(id)s AND status = 'running'"
DISOWN = """
WITH orphans AS (
    SELECT id FROM llmtasks_task
    WHERE id = ANY(%(orphans)s) AND owner_id = %(id)s AND status || '' = 'running'
    ORDER BY id FOR UPDATE
)
UPDATE llmtasks_task t SET owner_id = '00000000-0000-0000-0000-000000000000'
FROM orphans WHERE t.id = orphans.id
"""

REGISTER = """
INSERT INTO llmtasks_worker (id, role, lane, host, pid, slots, queues, lease_until)
VALUES (%(id)s, %(role)s, %(lane)s, %(host)s, %(pid)s, %(slots)s, %(queues)s,
        clock_timestamp() + make_interval(secs => %(lease)s))
"""

RESIGN = "UPDATE llmtasks_worker SET lease_until = clock_timestamp() WHERE id = %(id)s"

Drop = Callable[[str], None]


class PulseConnection(TimedConnection):
    wait_s = STATEMENT_S


@dataclass(slots=True)
class Call:
    """A call under way: how to drop it, and the caller's socket where there is one."""

    drop: Drop
    client: socket.socket | None = None


@dataclass
class Pulse:
    """The state of this process's pulse. One per process; a fork starts anew."""

    role: str
    lane: str = ""
    slots: int = 0
    pid: int = field(default_factory=os.getpid)
    id: UUID = field(default_factory=uuid7)
    queues: list[str] = field(default_factory=list)
    # A task may have several: an agent, and the call of its turn.
    calls: dict[UUID, tuple[Call, ...]] = field(default_factory=dict)
    suspects: set[UUID] = field(default_factory=set)
    looked_for_orphans_at: float = float("-inf")
    version: int = 0
    renewed_at: float = float("-inf")
    read_at: float = float("-inf")
    is_registered: bool = False
    is_away: bool = False
    # The process was told to end.
    is_draining: bool = False
    clock_offset: timedelta = timedelta(0)
    # Processes that call vendors, this one included.
    live: int = 1
    # Held for a beat: a thread that needs an id may make one too.
    lock: threading.RLock = field(default_factory=threading.RLock)
    stopped: threading.Event = field(default_factory=threading.Event)
    # Set for a beat before its time, with a renewal that writes `queues`.
    wanted: threading.Event = field(default_factory=threading.Event)
    must_renew: bool = False
    db: PulseConnection | None = None

    def run(self) -> None:
        """The thread's loop, until `stopped`."""
        while not self.stopped.is_set():
            self.wanted.wait(PERIOD_S)
            self.wanted.clear()
            with self.lock:
                if not self.stopped.is_set():
                    self.tick()

    def tick(self) -> None:
        """One beat. Never raises: the thread must live as long as the process."""
        with self.lock:
            self.drop_if_lapsed()
            try:
                self.beat()
            except (psycopg.Error, OSError) as error:
                log.warning("no pulse", extra={"error": str(error)})
                self.is_away = True
                self.disconnect()
            except Exception:
                log.exception("the pulse failed")
                self.disconnect()
            self.drop_if_lapsed()
        self.look_for_clients_that_left()

    def drop_if_lapsed(self) -> None:
        """Looked at before a beat too, which may wait for an unreachable Postgres."""
        unseen = time.monotonic() - self.renewed_at
        if self.is_registered and unseen > settings.LLMTASKS["DROP_AFTER_S"]:
            self.lose_lease()

    def beat(self) -> None:
        before = time.monotonic()
        if not self.is_registered:
            self.execute(REGISTER)
            self.is_registered = True
            self.renewed_at = before
        due = self.must_renew or before - self.renewed_at >= settings.LLMTASKS["RENEW_S"]
        self.must_renew = False
        renewed, version, cancelled, clock, self.live = self.execute(BEAT, due=due)[0]
        self.clock_offset = clock - datetime.now(UTC)
        if due and renewed:
            self.renewed_at = before
            self.disown_orphans(before)
        elif due:
            self.lose_lease()
        self.version = version
        self.read_at = before
        self.is_away = False
        for task_id in cancelled:
            for call in self.calls.get(task_id, ()):
                call.drop("cancel")

    def disown_orphans(self, now: float) -> None:
        """Let go of tasks that were ours but not under way at two renewals in a row."""
        if now - self.looked_for_orphans_at < settings.LLMTASKS["RENEW_S"]:
            return
        self.looked_for_orphans_at = now
        owned = {task_id for (task_id,) in self.execute(OWNED)}
        idle = owned - self.calls.keys()
        orphans = sorted(idle & self.suspects)
        if orphans:
            log.error("tasks without a call", extra={"tasks": orphans})
            self.execute(DISOWN, orphans=orphans)
        self.suspects = idle

    def execute(self, sql: str, **more: Any) -> list[tuple[Any, ...]]:
        if self.db is None:
            parameters = connection.get_connection_params()
            parameters.pop("pool", None)
            parameters.pop("cursor_factory", None)
            parameters |= {"connect_timeout": int(STATEMENT_S), "autocommit": True}
            self.db = PulseConnection.connect(**parameters)
        values = {
            "id": self.id,
            "role": self.role,
            "lane": self.lane,
            "host": socket.gethostname(),
            "pid": self.pid,
            "slots": self.slots,
            "queues": Jsonb(self.queues),
            "lease": settings.LLMTASKS["LEASE_S"],
        } | more
        with psycopg.Cursor(self.db) as cursor:
            cursor.execute(sql, values)
            return cursor.fetchall() if cursor.description else []

    def lose_lease(self) -> None:
        """Drop every call and go on under a new id."""
        log.error("the lease lapsed: dropping calls", extra={"calls": len(self.calls)})
        self.is_registered = False
        self.id = uuid7()
        for call in self.under_way():
            call.drop("lease")

    def under_way(self) -> list[Call]:
        return [call for calls in list(self.calls.values()) for call in calls]

    def look_for_clients_that_left(self) -> None:
        for call in self.under_way():
            if call.client is not None and has_left(call.client):
                call.drop("client")

    def disconnect(self) -> None:
        # What a lost renewal was to tell is told by the next.
        self.must_renew = True
        if self.db is not None:
            with suppress(psycopg.Error):
                self.db.close()
            self.db = None


def has_left(client: socket.socket) -> bool:
    """Whether the peer closed its end, found by peeking. Never waits, whatever the socket's
    timeout."""
    try:
        if not has_input(client.fileno()):
            return False
        # Unbound, since an SSLSocket refuses flags.
        return socket.socket.recv(client, 1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except (OSError, ValueError):
        return True


_pulse: Pulse | None = None
_start_lock = threading.Lock()
_watch_lock = threading.Lock()


def start(role: str = Worker.Role.WEB, lane: str = "", slots: int = 0) -> Pulse:
    """This process's pulse, started on first use; again in a forked child."""
    global _pulse
    running = _pulse
    if running is not None and running.pid == os.getpid():
        return running
    with _start_lock:
        if _pulse is None or _pulse.pid != os.getpid():
            pulse = Pulse(role=role, lane=lane, slots=slots)
            pulse.tick()
            threading.Thread(target=pulse.run, name="pulse", daemon=True).start()
            _pulse = pulse
        return _pulse


def stop() -> None:
    """End the thread and the lease: what this process still owned is taken up at once."""
    global _pulse
    pulse, _pulse = _pulse, None
    if pulse is None or pulse.pid != os.getpid():
        return
    pulse.stopped.set()
    pulse.wanted.set()
    # Not in the middle of a beat.
    with pulse.lock:
        with suppress(psycopg.Error):
            pulse.execute(RESIGN)
        pulse.disconnect()


def drain() -> None:
    """Let calls under way end for GRACE_S, then drop what is left, and whatever begins later,
    until `stop`. For a thread of its own in a process that was told to end."""
    pulse = start()
    pulse.is_draining = True
    pulse.stopped.wait(settings.LLMTASKS["GRACE_S"])
    if pulse.calls:
        log.warning("the grace time is over: dropping calls", extra={"calls": len(pulse.calls)})
    while not pulse.stopped.wait(DRAIN_LOOK_S):
        for call in pulse.under_way():
            call.drop("drain")


def is_draining() -> bool:
    """Whether this process was told to end: what it has begun goes on, nothing else begins."""
    return _pulse is not None and _pulse.is_draining


def owner_id() -> UUID:
    """The id under which this process owns tasks. Raises OperationalError while it has none."""
    pulse = start()
    if not pulse.is_registered and not pulse.is_away:
        pulse.tick()
    if not pulse.is_registered:
        from django.db import OperationalError

        raise OperationalError("this process has no lease: Postgres is away")
    return pulse.id


def serve(queues: list[str]) -> None:
    """List the queues that this process takes tasks from: only then are they used."""
    pulse = start()
    pulse.queues = queues
    pulse.must_renew = True
    pulse.wanted.set()


def config_version() -> int:
    """The version of configuration that was read last; it changes within `PERIOD_S` of an edit."""
    return start().version


def look() -> None:
    """Learn of edits now, and not within `PERIOD_S`."""
    start().tick()


def config_is_fresh() -> bool:
    """Whether what was cached under `config_version` may still be used."""
    return time.monotonic() - start().read_at < CONFIG_VALID_S


def live_processes() -> int:
    """How many processes call vendors now, as the last beat saw them."""
    return max(1, start().live)


def require_postgres() -> None:
    """Raises `Unavailable` at once while the last beat found Postgres away: better than each
    request waiting for a timeout of its own."""
    if start().is_away:
        raise Unavailable("Postgres is away: try again shortly", retry_after=2)


def now() -> datetime:
    """The time by Postgres's clock, as far as the last beat knows it."""
    return datetime.now(UTC) + start().clock_offset


@contextmanager
def watch(
    task_id: UUID, drop: Drop, client: socket.socket | None = None, owner: UUID | None = None
) -> Iterator[None]:
    """While the block runs, `drop(reason)` is called from another thread when the task is to be
    cancelled (`cancel`), the lease lapsed (`lease`), the caller hung up (`client`) or the process
    is to end (`drain`).

    `owner` is the id under which the task was taken: one that lapsed meanwhile is told at once.
    """
    pulse = start()
    mine = Call(drop, client)
    with _watch_lock:
        pulse.calls[task_id] = (*pulse.calls.get(task_id, ()), mine)
    if owner is not None and owner != pulse.id:
        drop("lease")
    try:
        yield
    finally:
        # A settlement that goes on in another thread may watch the same task.
        with _watch_lock:
            others = tuple(call for call in pulse.calls.get(task_id, ()) if call is not mine)
            if others:
                pulse.calls[task_id] = others
            else:
                pulse.calls.pop(task_id, None)
