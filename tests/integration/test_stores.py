"""Connections: none waits for ever, none is held."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection, transaction

from llmtasks import pricing, routing, stores
from llmtasks.guards import rules
from llmtasks.tools import stored
from tests.corridor import until

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_server_that_froze_is_cut_off(monkeypatch):
    connection.ensure_connection()
    with monkeypatch.context() as patched:
        patched.setattr(stores.TimedConnection, "wait_s", 0.2)
        began = time.monotonic()
        with pytest.raises(OperationalError, match="no answer in time"):
            stores.fetch("SELECT pg_sleep(5)")
    assert time.monotonic() - began < 4
    stores.release()
    assert stores.fetch("SELECT 1") == [(1,)]


def test_a_connection_that_the_server_closed_is_replaced():
    connection.ensure_connection()
    pid = connection.connection.info.backend_pid
    socket = connection.connection.pgconn.socket
    stores.release()
    parameters = connection.get_connection_params()
    for name in ("pool", "cursor_factory", "connection_class"):
        parameters.pop(name, None)
    with psycopg.connect(**parameters, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [pid])
    until(lambda: stores.has_input(socket))
    for _ in range(5):
        assert stores.fetch("SELECT 1") == [(1,)]
        stores.release()


def test_a_connection_goes_back_to_the_pool_but_not_out_of_a_transaction():
    with transaction.atomic():
        stores.fetch("SELECT 1")
        stores.release()
        assert connection.connection is not None
    stores.release()
    assert connection.connection is None


@pytest.mark.parametrize(
    ("module", "name", "read"),
    [
        (routing, "_snapshot", routing.snapshot),
        (rules, "_rules", rules.rules),
        (pricing, "_prices", pricing.prices),
        (stored, "_snapshot", stored.tools),
    ],
)
def test_who_reads_for_all_does_not_wait_for_those_who_wait_for_it(monkeypatch, module, name, read):
    monkeypatch.setattr(module, name, None)
    stores.release()
    stats = until(settled_stats)
    # Threads of this process may keep some.
    kept = stats["pool_size"] - stats["pool_available"]
    size = stats["pool_max"] - kept
    holds, is_late = threading.Barrier(size + 1), threading.Event()

    def holder() -> Any:
        try:
            connection.ensure_connection()
            holds.wait(10)
            is_late.wait(10)
            return read()
        finally:
            stores.release()

    def newcomer() -> Any:
        try:
            return read()
        finally:
            stores.release()

    with ThreadPoolExecutor(size + 1) as threads:
        held = [threads.submit(holder) for _ in range(size)]
        holds.wait(10)
        late = threads.submit(newcomer)
        until(lambda: connection.pool.get_stats()["requests_waiting"])
        is_late.set()
        assert all(one.result() is late.result() for one in held)


def settled_stats() -> dict[str, int] | None:
    """The pool's figures, once none of its connections is on its way."""
    before = connection.pool.get_stats()
    time.sleep(0.05)
    stats: dict[str, int] = connection.pool.get_stats()
    names = ("pool_size", "pool_available")
    return stats if all(stats[name] == before[name] for name in names) else None


@pytest.mark.parametrize("value", ['{"a": 1}', b'{"a": 1}', {"a": 1}])
def test_json_is_read_whichever_way_it_comes(value):
    assert stores.loads(value) == {"a": 1}
