"""Real stores, and the sandbox over HTTP. What a process remembers is forgotten between tests."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from django.test import TransactionTestCase

from llmtasks import health, pricing, pulse, queues, routing, stores
from llmtasks.guards import estimates, meters, rate_limit, rules, shares
from llmtasks.models import Provider
from llmtasks.tools import allowed, stored
from providers.sandbox import Sandbox
from tests import factories
from tests.admin_pages import everything, login, provider, steered, tenant  # noqa: F401
from tests.corridor import door, lose_statement, short_waits, vendor  # noqa: F401
from tests.hedging import hedged, second  # noqa: F401

# Tests share two cores: who waits a while for an answer has seen no outage.
meters.TIMEOUT_S = 5.0
pulse.PulseConnection.wait_s = 20.0


# Filled by `migrate`; no test changes them.
KEPT_TABLES = {"django_content_type", "auth_permission"}
# Rows in larger tables would slow the tests that follow down, though they are deleted.
MOST_DELETED_BYTES = 2_000_000
MAY_DELETE = """
SELECT current_setting('is_superuser') = 'on' AND max(pg_total_relation_size(name::regclass)) < %s
FROM unnest(%s::text[]) name
"""


def empty_tables(_: TransactionTestCase) -> None:
    """Deletes what a test left, in a fiftieth of the time that Django's `flush` takes."""
    known = set(connection.introspection.django_table_names(include_views=False)) - KEPT_TABLES
    names = [connection.ops.quote_name(name) for name in sorted(known)]
    with connection.cursor() as cursor:
        cursor.execute(MAY_DELETE, [MOST_DELETED_BYTES, names])
        if cursor.fetchone() == (True,):
            deletes = "; ".join(f"DELETE FROM {name}" for name in names)
            # As a replica: without foreign keys, and without the triggers that keep history.
            cursor.execute(
                f"SET session_replication_role = replica; {deletes}; RESET session_replication_role"
            )
        else:
            cursor.execute(f"TRUNCATE {', '.join(names)}")


@pytest.fixture(scope="session", autouse=True)
def quick_flush() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransactionTestCase, "_fixture_teardown", empty_tables)
        yield


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as server:
        yield server


@pytest.fixture(autouse=True)
def forget(request: pytest.FixtureRequest, _django_db_marker: None) -> Iterator[None]:
    """A process as it is after its start: no configuration read, no lease."""
    if "transactional_db" in request.fixturenames:
        # Before us, and so after us: a pulse that beats while the tables are emptied is a deadlock.
        request.getfixturevalue("transactional_db")
    os.environ["SANDBOX_KEY"] = "sandbox"
    routing._snapshot = None
    stored._snapshot = None
    allowed._version = -1
    health._last = None
    pricing._prices = None
    queues._away_until = 0.0
    rules._rules = None
    meters.outage = meters.Outage()
    rate_limit.leases = rate_limit.Leases()
    estimates._stats.clear()
    shares._free_at.clear()
    yield
    # The thread that renews them goes on.
    rate_limit.leases.held.clear()
    pulse.stop()


@pytest.fixture
def redis(forget: None) -> Any:
    """The test process's own Redis database, empty."""
    client = stores.redis_client()
    client.flushdb()
    return client


@pytest.fixture
def account(transactional_db: None, redis: Any, sandbox: Sandbox) -> Provider:
    """The sandbox as a provider in OpenAI's format, for tests that run calls."""
    return factories.provider(sandbox.base_url)
