"""The limiter's script in Redis, and whether Redis answers.

A command waits 100 ms at the most. After a failure one caller asks again each quarter of a second,
the others don't. Only after a second Redis is taken for away: a server that was slow once is no
reason to leave what all processes hold together.

The script goes over connections of its own, past redis-py's client and pool, which cost more than
the script.

What nobody waits for (`later`) is taken along by whoever asks next, and sent by a thread where
nobody does: it comes before what its own thread asks after it.
"""

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import redis
from hiredis import pack_command

from llmtasks import stores

log = logging.getLogger(__name__)

TIMEOUT_S = 0.1
AGAIN_S = 0.25
AWAY_AFTER_S = 1.0
# What nobody waits for is gathered for so long, and so much of it goes in one trip: it takes the
# server about 0.1 ms each.
GATHER_S = 0.002
MOST_A_TRIP = 20
# Beyond that the oldest is dropped: while Redis is away.
MOST_LATER = 10_000
# A command's way through a cluster: every key of ours has this tag.
PLACE = "{limits}:since"
SCRIPT = (Path(__file__).parent / "rate_limit.lua").read_bytes()


def library(script: bytes) -> tuple[bytes, bytes]:
    """The name by which Redis knows this very script, and the library that it keeps. One of
    another release lies beside it: both may be asked while processes are replaced."""
    name = b"llmtasks_" + sha256(script).hexdigest()[:16].encode()
    return name, b"#!lua name=%b\nlocal NAME = '%b'\n%b" % (name, name, script)


NAME, LIBRARY = library(SCRIPT)


class Away(Exception):
    """Redis gave no answer in time."""


def client() -> redis.Redis:
    return stores.hasty_client(TIMEOUT_S)


class Outage:
    """Since when Redis gives no answer, and who asks next."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.again_at = float("-inf")
        self.lock = threading.Lock()

    @property
    def is_away(self) -> bool:
        since = self.since
        return since is not None and time.monotonic() - since >= AWAY_AFTER_S

    def may_ask(self) -> bool:
        if self.since is None:
            return True
        with self.lock:
            if time.monotonic() < self.again_at:
                return False
            # This caller asks; the others wait for what it finds.
            self.again_at = time.monotonic() + AGAIN_S
            return True

    def found(self, error: Exception | None) -> None:
        if error is None:
            if self.since is not None:
                log.warning("the limiter reaches Redis again")
            self.since = None
            return
        self.again_at = time.monotonic() + AGAIN_S
        if self.since is None:
            self.since = time.monotonic()
            log.error("the limiter can't reach Redis", extra={"error": str(error)})


outage = Outage()

# What follows the script's name: how many keys, the keys, the arguments.
Tail = tuple[str | bytes, ...]
Command = tuple[str | bytes, ...]
Answer = dict[str, Any]
Heard = Callable[[Answer], None]


class Later:
    """What nobody waits for, the oldest first, and the thread that sends it."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Tail, Heard]] = deque(maxlen=MOST_LATER)
        self.wanted = threading.Event()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def put(self, tail: Tail, heard: Heard) -> None:
        self.waiting.append((tail, heard))
        if not self.wanted.is_set():
            self.wanted.set()
        if self.thread is None:
            with self.lock:
                if self.thread is None:
                    self.thread = threading.Thread(target=self.run, name="later", daemon=True)
                    self.thread.start()

    def take(self) -> list[tuple[Tail, Heard]]:
        taken: list[tuple[Tail, Heard]] = []
        with suppress(IndexError):
            while len(taken) < MOST_A_TRIP:
                taken.append(self.waiting.popleft())
        return taken

    def run(self) -> None:
        while True:
            self.wanted.wait()
            time.sleep(GATHER_S)
            self.wanted.clear()
            try:
                flush()
            except Exception:
                log.exception("what the limiter was to be told can't be sent")
            if self.waiting:
                time.sleep(AGAIN_S)
                self.wanted.set()


# Idle connections, the last used first. A deque's pop and append are atomic: no lock.
_idle: deque[Any] = deque()
_later = Later()


def begin_anew() -> None:
    """After a fork: the connections, and what waits to be sent, are the parent's."""
    global _later
    _idle.clear()
    _later = Later()


os.register_at_fork(after_in_child=begin_anew)


def run(
    operation: str, keys: Sequence[str], arguments: dict[str, Any], wires: Sequence[bytes] = ()
) -> Answer:
    """One operation of `rate_limit.lua` with the meters at `keys`, each packed in `wires`; what it
    answers as numbers is `packed`. Raises `Away`."""
    if not outage.may_ask():
        raise Away
    return trip(tail_of(operation, keys, arguments, wires))


def later(
    operation: str,
    keys: Sequence[str],
    arguments: dict[str, Any],
    wires: Sequence[bytes],
    heard: Heard,
) -> None:
    """The same for what nobody waits for: sent with whatever is asked next, or within milliseconds
    by itself. `heard` is given the answer, in any thread. What a process had not sent when it was
    killed is lost; what waits while Redis is away is sent afterwards."""
    _later.put(tail_of(operation, keys, arguments, wires), heard)


@atexit.register
def flush() -> None:
    """Send all that waits to be sent, unless Redis is away."""
    with suppress(Away):
        while _later.waiting and outage.may_ask():
            trip()


def tail_of(
    operation: str, keys: Sequence[str], arguments: dict[str, Any], wires: Sequence[bytes]
) -> Tail:
    given = orjson.dumps(arguments)
    return str(len(keys) + 1), *keys, PLACE, operation, given, b"".join(wires)


def trip(asked: Tail | None = None) -> Answer:
    """Send what waits to be sent, and after it what is asked: its answer. Raises `Away`."""
    along = _later.take()
    tails = [tail for tail, _ in along]
    try:
        answers = send(tails if asked is None else [*tails, asked])
    except (redis.RedisError, OSError) as error:
        outage.found(error)
        # What was done of it is not done twice.
        _later.waiting.extendleft(reversed(along))
        raise Away from error
    for (_, heard), answer in zip(along, answers, strict=False):
        try:
            heard(read(answer))
        except Away:
            continue
        except Exception:
            log.exception("the limiter refused what it was told")
    return {} if asked is None else read(answers[-1])


def read(answer: Any) -> Answer:
    """What the script said. Raises `Away`, `redis.ResponseError`."""
    if isinstance(answer, redis.ResponseError):
        if not is_passing(answer):
            raise answer
        outage.found(answer)
        raise Away from answer
    outage.found(None)
    if isinstance(answer, list):
        told, packed = answer
        return {**orjson.loads(told), "packed": packed}
    return orjson.loads(answer)  # type: ignore[no-any-return]


def is_passing(error: redis.ResponseError) -> bool:
    """Whether the server says so for a while only: it loads its data, is full, or a replica."""
    return str(error).split(" ")[0] in ("LOADING", "OOM", "READONLY", "MASTERDOWN", "BUSY")


def send(tails: Sequence[Tail]) -> list[Any]:
    """Run the script for each: its answers, `redis.ResponseError`s among them. Raises other
    `redis.RedisError`s, `OSError`."""
    calls = [("FCALL", NAME, *tail) for tail in tails]
    answers = exchange(calls)
    if any(map(is_unknown, answers)):
        # Whoever else found that loads it as well: then it is there already.
        _, *answers = exchange([("FUNCTION", "LOAD", LIBRARY), *calls])
    return answers


def is_unknown(answer: Any) -> bool:
    """Whether the server lacks the library: it was never asked, or started without its data."""
    return isinstance(answer, redis.ResponseError) and "Function not found" in str(answer)


def exchange(commands: Sequence[Command]) -> list[Any]:
    """Send commands and wait for their answers, `redis.ResponseError`s among them. Those whose idle
    connection the server had closed are sent again over a new one: the script does for a call once
    what it is asked twice."""
    # Its stub speaks of tuples of one part.
    data = b"".join(map(pack_command, commands))  # type: ignore[arg-type]
    try:
        connection = _idle.pop()
    except IndexError:
        return ask(connect(), data, len(commands))
    try:
        return ask(connection, data, len(commands))
    except redis.ConnectionError:
        # The others are of the same age.
        forget_connections()
        return ask(connect(), data, len(commands))


def connect() -> Any:
    pool = client().connection_pool
    return pool.connection_class(**pool.connection_kwargs)


def ask(connection: Any, data: bytes, count: int) -> list[Any]:
    try:
        connection.send_packed_command([data], check_health=False)
        answers = [answer_of(connection) for _ in range(count)]
    except BaseException:
        connection.disconnect()
        raise
    _idle.append(connection)
    return answers


def answer_of(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def forget_connections() -> None:
    while _idle:
        try:
            _idle.pop().disconnect()
        except IndexError:  # another thread was faster
            return
