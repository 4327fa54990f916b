"""The lists with many rows: every statement finds its rows by an index, or stops early."""

import json
import re
from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from llmtasks.admin import start
from llmtasks.admin.lists import first_id
from llmtasks.models import Lane, Tenant

ROWS = 200_000
TABLES = ("llmtasks_task", "llmtasks_attempt")

# Time-ordered ids over the last 40 days, as UUIDv7 are; nearly all succeeded, of one tenant.
FILL_TASKS = """
INSERT INTO llmtasks_task (id, tenant_id, kind, mode, lane, status, route, provider, "user",
    metadata, request_id, on_unknown, streams, not_before, deadline, seq, fence, attempts,
    input_tokens, cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
    cost_state, error_class, error_message, error_param)
SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - n * 17280::bigint), 12, '0')
        || '7000' || 'a000' || lpad(to_hex(n), 12, '0'))::uuid,
    %(tenant)s, 'chat', 'queued', CASE WHEN n = 190000 THEN 'bulk' ELSE 'default' END,
    CASE WHEN n %% 5000 = 0 THEN 'failed' WHEN n > 199000 THEN 'waiting' ELSE 'succeeded' END,
    'smart', CASE WHEN n = 180000 THEN 'rare' ELSE 'vendor' END, '', '{}', '', 'retry', false,
    now(), now() + interval '1 day', 0, 0, 1, 0, 0, 0, 0, 0, '', '', '', ''
FROM generate_series(1, %(rows)s) AS n
"""
FILL_ATTEMPTS = """
INSERT INTO llmtasks_attempt (id, task_id, tenant_id, step, number, provider, model, state,
    error_class, error_message, vendor_request_id, input_tokens, cached_input_tokens,
    cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_state)
SELECT id, id, tenant_id, 0, 1, provider, 'm', 'settled', '', '', '', 1, 0, 0, 0, 1, 0, 'final'
FROM llmtasks_task
"""

LISTS = {
    "task": (
        {},
        {"p": "100"},
        {"status": "failed"},
        {"status": "blocked"},
        {"status": "waiting"},
        {"lane": "bulk"},
        {"provider": "rare"},
        {"provider": "vendor"},
        {"mode": "inline"},
        {"kind": "embedding"},
        {"age": "1h"},
        {"age": "over-30d"},
        {"tenant": "TENANT"},
        {"tenant": "OTHER"},
        {"tenant": "TENANT", "status": "failed"},
        {"tenant": "TENANT", "status": "failed", "lane": "bulk", "age": "30d"},
        {"q": "018f0000-0000-7000-8000-000000000000"},
    ),
    "attempt": (
        {},
        {"provider": "rare"},
        {"tenant": "TENANT"},
        {"tenant": "OTHER"},
        {"cost_state": "unpriced"},
        {"state": "unknown", "age": "7d"},
    ),
}


@pytest.fixture(scope="module")
def filled(django_db_setup, django_db_blocker):
    """Both tables with `ROWS` rows, as vacuumed as a database at rest."""
    with django_db_blocker.unblock():
        tenant = Tenant.objects.create(name="busy")
        other = Tenant.objects.create(name="idle")
        User.objects.create_superuser("operator")
        with connection.cursor() as cursor:
            # Rows in the order in which they came, as in a table that grew: not in what earlier
            # tests left free. The planner reckons with it.
            cursor.execute(f"TRUNCATE {', '.join(TABLES)}")
            cursor.execute(FILL_TASKS, {"tenant": tenant.pk, "rows": ROWS})
            cursor.execute(FILL_ATTEMPTS)
            for table in TABLES:
                vacuum(cursor, table)
            # Of the small tables that these are joined with, too.
            cursor.execute("ANALYZE")
        yield {"TENANT": str(tenant.pk), "OTHER": str(other.pk)}
        with connection.cursor() as cursor:
            cursor.execute(f"TRUNCATE {', '.join(TABLES)}")
        User.objects.all().delete()
        Tenant.objects.all().delete()


def vacuum(cursor, table: str) -> None:
    """Make every page visible to all: else index-only scans look dear, and the planner scans the
    table. A session that an earlier test left in a transaction would hold it back."""
    cursor.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
    )
    cursor.execute(f"VACUUM ANALYZE {table}")


def nodes(plan: dict) -> list[dict]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in nodes(child))]


def looked_at(node: dict) -> int:
    """How many rows a node read, those among them that it threw away."""
    read = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
    return int(read * node["Actual Loops"])


def check(captured: CaptureQueriesContext, most: int) -> None:
    """No statement scans a large table, or reads more of it than `most` rows."""
    statements = [each["sql"] for each in captured.captured_queries]
    large = [sql for sql in statements if re.match(f"SELECT.*({'|'.join(TABLES)})", sql, re.S)]
    assert large
    for sql in large:
        check_plan(sql, (), most)


def check_plan(sql: str, values: object, most: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {sql}", values or None)
        [(found,)] = cursor.fetchall()
        plan = json.loads(found) if isinstance(found, str) else found
        for node in nodes(plan[0]["Plan"]):
            if node.get("Relation Name") in TABLES:
                why = f"{node['Node Type']} of {looked_at(node)} rows in {sql[-500:]}"
                is_fine = node["Node Type"] != "Seq Scan" and looked_at(node) <= most
                assert is_fine, f"{why}\n{plan}\n{statistics(cursor)}"


def statistics(cursor) -> list[tuple[object, ...]]:
    """What the planner goes by: pages, rows, and whether these are in the order of their ids."""
    cursor.execute(
        "SELECT relname, relpages, reltuples, attname, correlation, n_distinct FROM pg_class"
        " LEFT JOIN pg_stats ON tablename = relname AND attname IN ('id', 'tenant_id')"
        " WHERE relname IN ('llmtasks_task', 'llmtasks_attempt', 'llmtasks_tenant')"
    )
    return cursor.fetchall()


@pytest.mark.django_db
def test_no_page_scans_a_large_table(filled, client):
    """One test, so that parallel runs fill one database."""
    client.force_login(User.objects.get(username="operator"))
    for model, queries in LISTS.items():
        for query in queries:
            check_list(client, model, {k: filled.get(v, v) for k, v in query.items()})
    check_start_page()
    check_confirmation(client)


def check_list(client, model: str, query: dict[str, str]) -> None:
    url = reverse(f"admin:llmtasks_{model}_changelist", query=query)
    with CaptureQueriesContext(connection) as captured:
        assert client.get(url).status_code == 200, url
    # 50,000 are looked through where no index helps; else as many as are counted.
    check(captured, 50_001)


def check_start_page() -> None:
    lanes = {"providers": ["vendor", "rare", ""], "lanes": Lane.values, "counted": start.COUNTED}
    check_plan(start.BACKLOG, lanes, start.COUNTED + 1)
    recent = {"since": first_id(timedelta(days=90)), "looked_at": 5, "longest": 5}
    check_plan(start.FAILURES, recent, 5)


def check_confirmation(client) -> None:
    """Of an action over a whole filter."""
    values = {"action": "retry_tasks", "_selected_action": ["x"], "select_across": "1"}
    url = reverse("admin:llmtasks_task_changelist")
    with CaptureQueriesContext(connection) as captured:
        response = client.post(url, {**values, "index": "0"})
    assert response.context["job"].total == 40
    check(captured, 10_001)
