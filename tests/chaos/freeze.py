"""Programs stand still for longer than their lease, in the middle of calls: SIGSTOP, then SIGCONT.

While a worker or the web server stands still, the sweep takes its tasks and others run them. Then
it wakes up, with answers of the vendor in its sockets, and does not know yet. Every change of state
that it makes to a task that is somebody else's by then must be refused; what its calls cost must be
written all the same. A frozen dispatcher wakes up as one of two leaders.

Who changed a row is told by the name under which a program connects to Postgres (PGAPPNAME).
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import psutil

from tests.acceptance.cluster import KEY, Cluster, chat, wait_for
from tests.chaos import audit, history
from tests.chaos.calls import insist
from tests.chaos.submit import until

LEASE_S = 4.0
FROZEN_S = LEASE_S + 3.0
SETTINGS = {"LEASE_S": f"{LEASE_S:g}", "RENEW_S": "0.5", "DROP_AFTER_S": "3", "HINT_LOST_S": "3"}
VICTIMS = ("worker-default-2", "web", "dispatcher")
ROUNDS = 8
ROUNDS_SHORT = 1
# Whether an answer in a socket is read before the call is dropped is a race of threads: as many
# rounds more until one was.
MOST_MORE = 4
# Some answers come while nobody reads them, some after; others stream all the while.
MODELS = ("slow-500", "claude-slow-1000", "slow-3000", "claude-slow-5000", "long-600-50")
BATCH = 10
# How long a program is waited for to run some of a batch, and how often another batch is queued.
RUN_S, MOST_BATCHES = 2.0, 5
PATIENCE_S = 90.0

RUNS = """
SELECT count(*) FROM llmtasks_attempt a JOIN llmtasks_task t ON t.id = a.task_id
    JOIN llmtasks_worker w ON w.id = t.owner_id
WHERE a.state = 'sent' AND t.status = 'running' AND w.pid = ANY(%s)
"""
LEADER = """
SELECT w.pid FROM llmtasks_config c JOIN llmtasks_worker w ON w.id = c.leader
WHERE c.leader_until > clock_timestamp()
"""
INLINE = """
SELECT t.status, t.error_class, t.attempts, count(*) FROM llmtasks_task t
WHERE t.mode = 'inline' GROUP BY 1, 2, 3
"""
# An overlap must show: as an unknown attempt, one that we ended, or a second one on the bill.
OVERLAPPED = """
SELECT count(*), count(*) FILTER (WHERE state = 'unknown' OR error_class = 'Interrupted'),
    count(*) FILTER (WHERE state = 'settled' AND error_class = '')
FROM llmtasks_attempt WHERE task_id = %s
"""
OPEN = "SELECT count(*) FROM llmtasks_attempt WHERE state = 'sent'"
BILLED = """
SELECT count(*) FROM llmtasks_attempt WHERE task_id = %s
    AND state = 'settled' AND http_status = 200 AND cost_state = 'final'
"""
SUMS_WRONG = """
SELECT count(*) FROM llmtasks_task t WHERE coalesce(cost, 0)
    <> (SELECT coalesce(sum(cost), 0) FROM llmtasks_attempt a WHERE a.task_id = t.id)
"""

CONDITIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "everything was frozen as often as was meant": lambda f: (
        min(f["frozen"].values()) >= f["rounds"]
    ),
    "stale changes were tried, and all refused": lambda f: (
        f["late_settlements"] > 0 and not f["stale_changes"] and not f["foreign_answers"]
    ),
    "every answer was settled with its true cost, late ones too": lambda f: (
        f["late_answers"] > 0 and f["answers_not_settled"] == 0
    ),
    "lost = 0": lambda f: f["queued"]["lost"] == 0,
    "succeeded exactly once: all": lambda f: (
        f["queued"]["finished_once"] == f["queued"]["tasks"]
        and f["queued"]["statuses"] == {"succeeded": f["queued"]["tasks"]}
    ),
    "every answer of the vendor is on the bill, or shows as unknown": lambda f: (
        f["queued"]["answers_unaccounted"] == f["queued"]["calls_without_attempt"] == 0
    ),
    "overlapping calls show": lambda f: f["overlaps_hidden"] == 0,
    "cost = sum over attempts": lambda f: f["sums_wrong"] == f["queued"]["sums_wrong"] == 0,
    "attempts left open, tasks left owned = 0": lambda f: (
        f["open_attempts"] == f["queued"]["still_owned"] == 0
    ),
    "inline: every key was answered, all others Interrupted": lambda f: (
        f["inline"]["answered"] == f["inline"]["keys"] and f["inline"]["odd"] == 0
    ),
}

COLUMNS = {
    "frozen": "frozen",
    "tasks": "tasks",
    "late_settlements": "settled late",
    "late_answers": "of these answers",
    "overlaps": "overlaps",
    "unknown": "unknown",
    "stale_changes": "stale changes",
}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    states = found["queued"]["attempt_states"]
    return [
        {
            "frozen": sum(found["frozen"].values()),
            "tasks": found["queued"]["tasks"] + found["inline"]["keys"],
            "late_settlements": found["late_settlements"],
            "late_answers": found["late_answers"],
            "overlaps": found["queued"]["overlaps"],
            "unknown": states.get("unknown", 0),
            "stale_changes": len(found["stale_changes"]),
        }
    ]


def run(clusters: Callable[..., AbstractContextManager[Cluster]], is_short: bool) -> dict[str, Any]:
    rounds = ROUNDS_SHORT if is_short else ROUNDS
    frozen: Counter[str] = Counter()
    with clusters(
        names=("sandbox", "web", "dispatcher", "worker-default"),
        copies={"worker-default": 2, "dispatcher": 2},
        settings=SETTINGS,
    ) as cluster:
        cluster.manage("seed_demo", "--route", "long-600-50")
        audit.install(cluster)
        history.install(cluster)
        ids: dict[int, str] = {}
        calls: list[Future[dict[str, Any]]] = []
        with ThreadPoolExecutor(BATCH) as callers:
            for number in range(rounds + MOST_MORE):
                if number >= rounds and cluster.rows(history.LATE)[0][1]:
                    break
                for name in VICTIMS:
                    ids |= queue(cluster, len(ids))
                    if name == "web":
                        calls += [callers.submit(call, cluster, n) for n in range(BATCH)]
                    freeze(cluster, name, ids)
                    frozen[name] += 1
                    wait_for(lambda: is_at_rest(cluster), PATIENCE_S)
            answered = sum(one.result()["status"] == "succeeded" for one in calls)
        wait_for(lambda: is_at_rest(cluster), PATIENCE_S)
        return {
            "settings": SETTINGS,
            "frozen_s": FROZEN_S,
            "rounds": rounds,
            "frozen": dict(frozen),
            **figures(cluster, ids),
            "inline": {"keys": len(calls), "answered": answered, "odd": odd(cluster)},
        }


def queue(cluster: Cluster, first: int) -> dict[int, str]:
    numbers = range(first, first + BATCH)
    bodies = [chat(MODELS[n % len(MODELS)], metadata={"n": n}) for n in numbers]
    return dict(zip(numbers, cluster.queue_many(bodies), strict=True))


def call(cluster: Cluster, number: int) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=cluster.base_url, headers=headers, timeout=40) as client:
        return insist(client, chat(MODELS[number % len(MODELS)], mode="inline"))


def freeze(cluster: Cluster, name: str, ids: dict[int, str]) -> None:
    """Stop it in the middle of its work, and have it go on after its lease. `ids` is added to."""
    group = cluster.running[name].pid
    if name == "dispatcher":
        # Were it there again at once, it might be faster than the one that is to lead.
        cluster.terminate("dispatcher-2")
        wait_for(lambda: cluster.rows(LEADER) == [(group,)], 30, 0.02)
        cluster.start("dispatcher-2")
    else:
        pids = [group, *(child.pid for child in psutil.Process(group).children())]
        keep_busy(cluster, lambda: cluster.rows(RUNS, [pids])[0][0] >= 3, ids)
    os.killpg(group, signal.SIGSTOP)
    try:
        time.sleep(FROZEN_S)
    finally:
        os.killpg(group, signal.SIGCONT)


def keep_busy(cluster: Cluster, is_busy: Callable[[], bool], ids: dict[int, str]) -> None:
    """Until a program has enough to do: of one batch the other worker may take almost all."""
    for _ in range(MOST_BATCHES):
        if until(is_busy, RUN_S, 0.02):
            return
        ids |= queue(cluster, len(ids))
    wait_for(is_busy, 30, 0.02)


def is_at_rest(cluster: Cluster) -> bool:
    unfinished = "SELECT 1 FROM llmtasks_task WHERE status IN ('waiting', 'queued', 'running')"
    open_ = "SELECT 1 FROM llmtasks_attempt WHERE state = 'sent'"
    return not cluster.rows(unfinished) and not cluster.rows(open_)


def figures(cluster: Cluster, ids: Mapping[int, str]) -> dict[str, Any]:
    vendor = cluster.bill()["tasks"]
    overlapped = [task_id for task_id, seen in vendor.items() if seen["overlaps"]]
    [(late, answers)] = cluster.rows(history.LATE)
    return {
        "queued": audit.figures(cluster, ids),
        "late_settlements": late,
        "late_answers": answers,
        "answers_not_settled": sum(
            max(0, seen["answered"] - count(cluster, BILLED, task_id))
            for task_id, seen in vendor.items()
        ),
        "stale_changes": cluster.rows(history.STALE),
        "foreign_answers": cluster.rows(history.FOREIGN),
        "overlaps_hidden": sum(not shows(cluster, task_id) for task_id in overlapped),
        "open_attempts": count(cluster, OPEN),
        "sums_wrong": count(cluster, SUMS_WRONG),
    }


def shows(cluster: Cluster, task_id: str) -> bool:
    [(attempts, ended, answered)] = cluster.rows(OVERLAPPED, [task_id])
    return attempts > 1 and (ended > 0 or answered > 1)


def odd(cluster: Cluster) -> int:
    """Inline tasks that are neither answered nor interrupted."""
    return sum(
        number
        for status, error, _, number in cluster.rows(INLINE)
        if (status, error) not in (("succeeded", ""), ("failed", "Interrupted"))
    )


def count(cluster: Cluster, sql: str, *values: Any) -> int:
    return int(cluster.rows(sql, values)[0][0])
