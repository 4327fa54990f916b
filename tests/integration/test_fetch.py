"""How statements of ours reach Postgres: which connection, and which plan."""

import pytest
from django.db import DatabaseError, connection, transaction

from llmtasks import stores

pytestmark = pytest.mark.django_db(transaction=True)


def prepared() -> list[str]:
    return [sql for (sql,) in stores.fetch("SELECT statement FROM pg_prepared_statements")]


def test_only_what_asks_for_it_is_prepared() -> None:
    with transaction.atomic():
        before = prepared()
        for _ in range(10):
            stores.fetch("SELECT %(n)s::int + 1", {"n": 1})
            stores.fetch("SELECT %(n)s::int + 2", {"n": 1}, prepare=True)
        assert set(prepared()) - set(before) == {"SELECT $1::int + 2"}


def test_a_statement_holds_no_connection_after_it() -> None:
    stores.release()
    assert stores.fetch("SELECT 1") == [(1,)]
    with pytest.raises(DatabaseError):
        stores.fetch("SELECT 1 / 0")
    assert connection.connection is None
    assert connection.pool.get_stats()["requests_waiting"] == 0


def test_within_a_transaction_it_is_the_transaction_s_connection() -> None:
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            [mine] = cursor.fetchone()
        assert stores.fetch("SELECT pg_backend_pid()") == [(mine,)]
