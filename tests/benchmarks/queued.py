"""Queued work: how soon it starts on an idle machine, and how much one worker gets done."""

import time
from typing import Any

import psycopg

from tests.benchmarks.application import LANE, Application, per_1000, route
from tests.benchmarks.inline import MESSAGES
from tests.benchmarks.tables import percentile

PAUSE_S = 0.05
BULK = 1000
DONE_S = 120.0

STARTED = """
SELECT extract(epoch FROM started_at - created_at)::float8 * 1000 FROM llmtasks_task
WHERE "user" = %s AND started_at IS NOT NULL
"""
DONE = """
SELECT count(*) FILTER (WHERE status = 'succeeded'), count(*) FILTER (WHERE status IN
        ('failed', 'cancelled', 'expired')),
    coalesce(extract(epoch FROM max(finished_at) - min(created_at)), 0)::float8,
    coalesce(extract(epoch FROM max(finished_at) - min(started_at)), 0)::float8
FROM llmtasks_task WHERE "user" = %s
"""

COLUMNS = {
    "start_p50_ms": "POST→start p50 ms",
    "start_p99_ms": "p99 ms",
    "accept_p50_ms": "POST→202 p50 ms",
    "answer_p50_ms": "POST→answer p50 ms",
    "answer_p99_ms": "p99 ms ",
    "tasks_per_s": "tasks/s",
    "worker_cpu_s": "worker CPU s/1000",
    "dispatcher_cpu_s": "dispatcher",
    "postgres_cpu_s": "pg",
    "valkey_cpu_s": "valkey",
    "worker_rss_mb": "RSS MB",
}


def measure(
    app: Application, database: "psycopg.Connection[Any]", idle: int, tasks: int, name: str
) -> dict[str, Any]:
    """One round."""
    return {**when_idle(app, database, idle, name), **throughput(app, database, tasks, name)}


def when_idle(
    app: Application, database: "psycopg.Connection[Any]", count: int, name: str
) -> dict[str, Any]:
    """One task at a time: POST → start by the rows, POST → 202 and, with `Prefer: wait`, POST →
    answer by the client's clock."""
    tag = f"{name}-idle"
    accepted, answered = [], []
    for _ in range(count):
        time.sleep(PAUSE_S)
        accepted.append(timed(app, task(tag, "queued"), 202))
        time.sleep(PAUSE_S)
        answered.append(timed(app, task(tag, None), 200, Prefer="wait=30"))
    wait_for(database, tag, 2 * count)
    started = [milliseconds for (milliseconds,) in database.execute(STARTED.encode(), [tag])]
    return {
        "start_p50_ms": percentile(started, 50),
        "start_p99_ms": percentile(started, 99),
        "accept_p50_ms": percentile(accepted, 50),
        "accept_p99_ms": percentile(accepted, 99),
        "answer_p50_ms": percentile(answered, 50),
        "answer_p99_ms": percentile(answered, 99),
    }


def timed(app: Application, body: dict[str, Any], wanted: int, **headers: str) -> float:
    began = time.monotonic()
    status, answer = app.ask("POST", "/v1/tasks", body, **headers)
    elapsed = (time.monotonic() - began) * 1000
    if status != wanted:
        raise SystemExit(f"POST /v1/tasks answered {status}: {answer}")
    return elapsed


def throughput(
    app: Application, database: "psycopg.Connection[Any]", count: int, name: str
) -> dict[str, Any]:
    """Many tasks at once for one worker, from the first POST to the last end."""
    tag = f"{name}-bulk"
    before = app.cpu_s()
    post_bulk(app, task(tag, "queued"), count)
    total_s, running_s = wait_for(database, tag, count)
    after = app.cpu_s()
    return {
        "tasks": count,
        "tasks_per_s": round(count / total_s, 1),
        "drained_per_s": round(count / running_s, 1),
        "worker_cpu_s": per_1000(before, after, "worker", count),
        "dispatcher_cpu_s": per_1000(before, after, "dispatcher", count),
        "web_cpu_s": per_1000(before, after, "web", count),
        "postgres_cpu_s": per_1000(before, after, "postgres", count),
        "valkey_cpu_s": per_1000(before, after, "valkey", count),
        "worker_rss_mb": app.rss_mb("worker"),
    }


def post_bulk(app: Application, item: dict[str, Any], count: int) -> None:
    """Queue the same so often."""
    left = count
    while left > 0:
        items = [item] * min(left, BULK)
        status, answer = app.ask("POST", "/v1/tasks/bulk", {"tasks": items})
        if status != 200 or answer["refused"]:
            raise SystemExit(f"POST /v1/tasks/bulk answered {status}: {str(answer)[:300]}")
        left -= len(items)


def task(tag: str, mode: str | None) -> dict[str, Any]:
    body = {
        "kind": "chat",
        "lane": LANE,
        "user": tag,
        "input": {"model": route(0), "messages": MESSAGES, "max_tokens": 100},
    }
    return {**body, "mode": mode} if mode else body


def wait_for(database: "psycopg.Connection[Any]", tag: str, count: int) -> tuple[float, float]:
    """Seconds from the first row to the last end, and from the first start to it."""
    deadline = time.monotonic() + DONE_S
    done = failed = 0
    while time.monotonic() < deadline:
        row = database.execute(DONE.encode(), [tag]).fetchone()
        done, failed, total_s, running_s = row or (0, 0, 0.0, 0.0)
        if failed:
            raise SystemExit(f"{tag}: {failed} tasks failed")
        if done == count:
            return total_s, running_s
        time.sleep(0.1)
    raise SystemExit(f"{tag}: {done} of {count} tasks are done after {DONE_S:.0f} s")
