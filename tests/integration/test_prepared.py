"""Hot statements are planned once per connection, others each time."""

import pytest

from llmtasks import stores

pytestmark = pytest.mark.django_db


def prepared() -> list[str]:
    return [sql for (sql,) in stores.fetch("SELECT statement FROM pg_prepared_statements")]


def test_only_what_asks_for_it_is_prepared() -> None:
    for _ in range(10):
        stores.fetch("SELECT %(n)s::int + 1", {"n": 1})
        stores.fetch("SELECT %(n)s::int + 2", {"n": 1}, prepare=True)
    assert prepared() == ["SELECT $1::int + 2"]
