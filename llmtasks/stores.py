"""The two stores: Postgres through Django's pool, Redis through one client per process.

A connection to Postgres is held for statements only: whoever is about to wait for a vendor
calls `release()` first, so that a small pool serves hundreds of threads.
"""

import select
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import orjson
import psycopg
import redis
from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connection, connections
from redis.backoff import NoBackoff
from redis.retry import Retry

# Longer than any statement_timeout: only a server that froze is cut off here.
POSTGRES_WAIT_S = 35.0
REDIS_TIMEOUT_S = 2.0


class TimedConnection(psycopg.Connection[Any]):
    """A connection none of whose waits lasts for ever: libpq itself has no read timeout."""

    wait_s = POSTGRES_WAIT_S

    def wait(self, gen: Any, interval: float = 0.5, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, timeout or self.wait_s)
        except psycopg.errors._WaitTimeout:
            # Its state is unknown now; the pool throws a closed connection away.
            self.pgconn.finish()
            raise psycopg.OperationalError("Postgres gave no answer in time") from None

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        # The pool's check before it hands a connection out is an empty statement. One on whose
        # socket nothing arrived while it was idle was not closed: that saves the round trip.
        if query == "" and not has_input(self.pgconn.socket):
            return self.cursor()
        return super().execute(query, *args, **kwargs)


def has_input(fd: int) -> bool:
    """Whether a read would not block: on an idle connection, its end."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def fetch(
    sql: str, params: Sequence[Any] | dict[str, Any] = (), *, prepare: bool = False
) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows. Raises `django.db.Error`s.

    `prepare`: parse and plan it once per connection. For statements that find their rows by
    primary key, whose plan is right whatever the tables hold.
    """
    django: Any = connections[DEFAULT_DB_ALIAS]
    with django.wrap_database_errors:
        if django.connection is not None or django.in_atomic_block:
            django.ensure_connection()
            return rows_of(django.connection, sql, params, prepare)
        # Past Django, whose way of taking a connection costs more than the statement.
        pool = django.pool
        pool.open()
        taken = pool.getconn()
        try:
            return rows_of(taken, sql, params, prepare)
        finally:
            pool.putconn(taken)


def rows_of(taken: Any, sql: str, params: Any, prepare: bool) -> list[tuple[Any, ...]]:
    with psycopg.Cursor(taken) as cursor:
        cursor.execute(sql, params, prepare=prepare)
        return cursor.fetchall() if cursor.description else []


def release() -> None:
    """Give this thread's connection back to the pool."""
    if not connection.in_atomic_block:
        connection.close()


@contextmanager
def reading(lock: threading.Lock) -> Iterator[None]:
    """Hold `lock` while what it guards is read from Postgres.

    The connection comes first: whoever held the lock and waited for a connection could wait for
    those who hold all of them, and wait for the lock. Raises `django.db.Error`s.
    """
    connection.ensure_connection()
    with lock:
        yield


@cache
def redis_client() -> redis.Redis:
    """The process's client. Commands are tried once more after a lost connection, so that every
    command and script sent through it must be safe to run twice."""
    return redis.Redis.from_url(
        settings.REDIS_URL,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=1.0,
        health_check_interval=30,
        max_connections=200,
    )


@cache
def hasty_client(timeout_s: float) -> redis.Redis:
    """For what nobody should wait for longer, and what is not sent twice."""
    return redis.Redis.from_url(
        settings.REDIS_URL,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        max_connections=1000,
    )


def loads(value: Any) -> Any:
    """A jsonb value as `fetch` gives it: Django has psycopg leave it as text."""
    return orjson.loads(value) if isinstance(value, str | bytes) else value
