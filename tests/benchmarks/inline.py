"""Inline calls: how many a second, what they add to the vendor's own time, what they cost."""

import json
import time
from collections.abc import Iterator
from typing import Any

import psycopg

from tests.benchmarks import load
from tests.benchmarks.application import Application, per_1000, route
from tests.benchmarks.upstream import Upstream

MESSAGES = [
    {"role": "system", "content": "You are a terse assistant. Answer in one sentence."},
    {"role": "user", "content": "Summarise this ticket for its owner: " + "the printer jams. " * 8},
]
SETTLE_S = 30.0

COUNT = """
SELECT count(*) FROM llmtasks_task t
JOIN llmtasks_attempt a ON a.task_id = t.id
JOIN llmtasks_taskpayload p ON p.task_id = t.id
WHERE t."user" = %s AND t.status = 'succeeded' AND t.cost_state = 'final'
    AND a.state = 'settled' AND p.response IS NOT NULL
"""
RUNNING = """SELECT count(*) FROM llmtasks_task WHERE "user" = %s AND status = 'running'"""

COLUMNS = {
    "upstream_ms": "upstream ms",
    "concurrency": "at once",
    "requests_per_s": "req/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "added_p50_ms": "+p50 ms",
    "added_p99_ms": "+p99 ms",
    "direct_per_s": "direct/s",
    "ratio": "ratio",
    "app_cpu_s": "app CPU s/1000",
    "postgres_cpu_s": "pg CPU s/1000",
    "web_rss_mb": "RSS MB",
    "rows": "rows",
}


def cells(
    app: Application,
    upstream: Upstream,
    database: "psycopg.Connection[Any]",
    levels: tuple[tuple[int, int], ...],
    seconds: int,
    name: str,
) -> Iterator[dict[str, Any]]:
    """One round: for each (delay, concurrency) the direct call, then ours."""
    for delay_ms, concurrency in levels:
        direct = load.post(
            f"{upstream.base_url(delay_ms)}/chat/completions",
            body(upstream.model(delay_ms), ""),
            "Bearer bench",
            concurrency,
            max(1, seconds // 4),
        )
        tag = f"{name}-{delay_ms}-{concurrency}"
        before = app.cpu_s()
        ours = load.post(
            app.url("/v1/chat/completions"),
            body(route(delay_ms), tag),
            app.authorization,
            concurrency,
            seconds,
        )
        after = app.cpu_s()
        rows = rows_of(database, tag, ours)
        yield {
            "upstream_ms": delay_ms,
            "concurrency": concurrency,
            "requests_per_s": round(ours.per_s, 1),
            "p50_ms": ours.p50_ms,
            "p99_ms": ours.p99_ms,
            "direct_per_s": round(direct.per_s, 1),
            "direct_p50_ms": direct.p50_ms,
            "direct_p99_ms": direct.p99_ms,
            "added_p50_ms": round(ours.p50_ms - direct.p50_ms, 3),
            "added_p99_ms": round(ours.p99_ms - direct.p99_ms, 3),
            "ratio": round(ours.per_s / direct.per_s, 4),
            "app_cpu_s": per_1000(before, after, "web", rows),
            "postgres_cpu_s": per_1000(before, after, "postgres", rows),
            "web_rss_mb": app.rss_mb("web"),
            "answered": ours.answered,
            "rows": rows,
        }


def body(model: str, tag: str) -> str:
    given: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 100}
    return json.dumps({**given, "user": tag} if tag else given)


def rows_of(database: "psycopg.Connection[Any]", tag: str, ours: load.Load) -> int:
    """How many calls are in the books, whole. Ends the run where an answered one is not: a
    figure for calls without their rows would be worth nothing."""
    if ours.refused or ours.broken or not ours.answered:
        raise SystemExit(
            f"{tag}: {ours.answered} answers, {ours.refused} of them no 2xx, {ours.broken} broken"
        )
    deadline = time.monotonic() + SETTLE_S
    # Calls that the generator left when its time was up end by themselves.
    while number(database, RUNNING, tag) and time.monotonic() < deadline:
        time.sleep(0.05)
    rows = number(database, COUNT, tag)
    if rows < ours.answered:
        raise SystemExit(f"{tag}: {ours.answered} answers and only {rows} rows")
    return rows


def number(database: "psycopg.Connection[Any]", sql: str, tag: str) -> int:
    row = database.execute(sql.encode(), [tag]).fetchone()
    return int(row[0]) if row else 0
