"""Limits under a backlog: eight workers and the web server, three times what the vendor allows.

Two models of one account: of the first the requests a minute bind, of the second the tokens. The
account's requests a second are limited too. Meanwhile people call, inline and queued, the vendor
refuses some calls out of turn (429, with and without Retry-After), and half of the workers' clocks
are wrong. The judge is the sandbox: what every window held, request by request, as it came in.

wait      from the task's creation to the begin of its first attempt, right before it is sent, by
          Postgres's clock; of one that never began, until now
used      of the binding limit

Both from when the backlog is there until the end.
"""

import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.acceptance.cluster import Cluster
from tests.benchmarks.tables import percentile
from tests.chaos import skew
from tests.chaos.traffic import Due, Traffic, chat, text

BY_REQUESTS, BY_TOKENS = "slow-100", "slow-200"
MODELS = (BY_REQUESTS, BY_TOKENS)
OFFERED = 3.0
# Tokens of a text, which the sandbox sends back: as many in as out.
SHORTEST, LONGEST = 20, 400
CALL_TOKENS = SHORTEST + LONGEST
# The workers whose clocks are wrong, and by how many seconds.
SKEWS_S = {
    "worker-bulk-3": 3600.0,
    "worker-bulk-4": -1200.0,
    "worker-default-2": 7.0,
    "worker-interactive-2": -90.0,
}
CLOCKS_S = {
    **dict.fromkeys(("worker-bulk", "worker-bulk-2", "worker-default", "worker-interactive"), 0.0),
    **SKEWS_S,
}
NAMES = ("sandbox", "web", "dispatcher", "worker-interactive", "worker-default", "worker-bulk")
COPIES = {"worker-default": 1, "worker-bulk": 2, "worker-interactive": 1}
AT_ONCE_S = 5.0
SEED = 3
# The longest waits, each with its mode and when it came.
LONGEST_SHOWN = 40


@dataclass(frozen=True)
class Size:
    """`a_second`: calls of each model that its limit allows. `people`: of both models together,
    a second, half of them inline."""

    seconds: float
    # Until the backlog is there and the buckets have no more credit.
    warm_s: float
    a_second: float
    people: float
    # A share of the calls is refused with this Retry-After, and every so often some without one.
    refused_share: float
    retry_after_s: float
    bare_every_s: float


FULL = Size(600.0, 30.0, 20.0, 4.0, 0.003, 0.2, 120.0)
SHORT = Size(45.0, 8.0, 12.0, 4.0, 0.01, 0.2, 1000.0)

CONDITIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "eight workers, half of their clocks wrong": lambda f: (
        f["workers"] == 8
        and all(abs(f["clocks_off_s"][name] - seconds) < 2 for name, seconds in CLOCKS_S.items())
    ),
    "no minute ever held more than its limit, by the vendor's count": lambda f: all(
        limit["peak"] <= limit["amount"]
        for limit in f["limits"].values()
        if limit["window_s"] == 60
    ),
    "the vendor's count is exact": lambda f: f["is_exact"],
    "there was a backlog until the end": lambda f: min(f["backlog"].values()) > 0,
    "the vendor refused calls out of turn": lambda f: f["refused_out_of_turn"] > 0,
    "no task failed": lambda f: f["failed"] == 0,
}
AIMS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    # Where a process stands still for longer than a call may be late, the vendor sees two seconds'
    # calls in one.
    "no second ever held more than its limit, by the vendor's count": lambda f: all(
        limit["peak"] <= limit["amount"] for limit in f["limits"].values()
    ),
    "offered three times the limit": lambda f: min(f["offered"].values()) >= OFFERED * 0.95,
    "97 % of each binding limit was used": lambda f: min(f["used"].values()) >= 0.97,
    "who waits: p99 of 0.5 s at the most": lambda f: f["waits"]["all"]["p99_s"] <= 0.5,
}

COLUMNS = {
    "limit": "limit",
    "amount": "amount",
    "peak": "most in a window",
    "used": "used",
    "offered": "offered",
    "backlog": "backlog",
}

INSERT = """
INSERT INTO llmtasks_limit (provider_id, model, "each", unit, "window", amount)
SELECT id, %(model)s, '', %(unit)s, %(window)s, %(amount)s FROM llmtasks_provider
WHERE name = 'sandbox'
"""
WAITS = """
SELECT t.mode, extract(epoch FROM
    coalesce(min(a.started_at), clock_timestamp()) - t.created_at)::float,
    extract(epoch FROM t.created_at - (SELECT min(created_at) FROM llmtasks_task))::float
FROM llmtasks_task t LEFT JOIN llmtasks_attempt a ON a.task_id = t.id
WHERE t.metadata ? 'person' GROUP BY t.id
"""
BACKLOG = "SELECT count(*) FROM llmtasks_task WHERE status = 'waiting' AND route = %s"
FAILED = """
SELECT count(*) FROM llmtasks_task WHERE status NOT IN ('waiting', 'queued', 'running', 'succeeded')
"""
TASKS = "SELECT count(*) FROM llmtasks_task WHERE route = %s"


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for name, limit in found["limits"].items():
        binding = limit["binds"]
        lines.append(
            {
                "limit": name,
                "amount": limit["amount"],
                "peak": limit["peak"],
                "used": found["used"][binding] if binding else None,
                "offered": found["offered"][binding] if binding else None,
                "backlog": found["backlog"][binding] if binding else None,
            }
        )
    return lines


@dataclass(frozen=True)
class Held:
    """A limit of ours, and the window of the sandbox that judges it."""

    model: str
    unit: str
    window: str
    amount: int
    # The model that it binds, if it does.
    binds: str = ""

    @property
    def window_s(self) -> float:
        return {"second": 1.0, "minute": 60.0}[self.window]

    def __str__(self) -> str:
        return f"{self.model or 'all'}: {self.unit} per {self.window}"


def limits(size: Size) -> list[Held]:
    a_minute = int(size.a_second * 60)
    return [
        Held(BY_REQUESTS, "requests", "minute", a_minute, BY_REQUESTS),
        Held(BY_REQUESTS, "tokens", "minute", a_minute * CALL_TOKENS * 2),
        Held(BY_TOKENS, "requests", "minute", a_minute * 2),
        Held(BY_TOKENS, "tokens", "minute", a_minute * CALL_TOKENS, BY_TOKENS),
        Held("", "requests", "second", int(size.a_second * 4)),
    ]


def run(clusters: Callable[..., AbstractContextManager[Cluster]], is_short: bool) -> dict[str, Any]:
    size = SHORT if is_short else FULL
    with clusters(names=NAMES, copies=COPIES) as cluster:
        shared = skew.library(Path(tempfile.mkdtemp(dir=cluster.folder)))
        for name, seconds in SKEWS_S.items():
            cluster.commands[name] = cluster.commands[name.rpartition("-")[0]]
            cluster.start(name, **skew.environment(shared, seconds))
        held = limits(size)
        for limit in held:
            cluster.rows(INSERT, asdict(limit))
            judge(cluster, limit)
        cluster.wait_until_ready()
        # Every process reads the limits within a second.
        time.sleep(1.5)
        found = measure(cluster, size, held)
        found["workers"] = len(cluster.serving())
        found["clocks_off_s"] = clocks(cluster)
        return {"size": asdict(size), **found}


def judge(cluster: Cluster, limit: Held) -> None:
    """Have the sandbox count, and enforce nothing: so that too much is seen."""
    body = {"model": limit.model or "*", "window_s": limit.window_s}
    steer(cluster, "_limits", body)


def steer(cluster: Cluster, path: str, body: Mapping[str, Any]) -> None:
    httpx.post(f"{cluster.sandbox_url}/{path}", json=body, timeout=10.0).raise_for_status()


def clocks(cluster: Cluster) -> dict[str, float]:
    """By how much each worker's clock is wrong: the id that it drew as it registered, which begins
    with its time, beside Postgres's."""
    names = {process.pid: name for name, process in cluster.running.items()}
    found = {}
    for pid, drawn, at in cluster.rows("SELECT pid, id, started_at FROM llmtasks_worker"):
        if (name := names.get(pid, "")).startswith("worker"):
            found[name] = round((drawn.int >> 80) / 1000 - at.timestamp(), 1)
    return found


def measure(cluster: Cluster, size: Size, held: list[Held]) -> dict[str, Any]:
    with Traffic(cluster.base_url) as traffic:
        for number, model in enumerate(MODELS):
            traffic.queue(backlog(model, size, random.Random(SEED + number)))
        traffic.call(people(size, random.Random(SEED + 2), mode="inline"))
        traffic.queue(people(size, random.Random(SEED + 3), mode="queued", lane="interactive"))
        with Surprises(cluster, size) as struck:
            time.sleep(size.warm_s)
            before, began = counted(cluster), time.monotonic()
            time.sleep(size.seconds - size.warm_s)
            after, seconds = counted(cluster), time.monotonic() - began
        waiting = {model: int(cluster.rows(BACKLOG, [model])[0][0]) for model in MODELS}
        came = {model: int(cluster.rows(TASKS, [model])[0][0]) for model in MODELS}
    # Those who came last have begun, or will be counted as waiting still.
    time.sleep(2.0)
    return {
        "seconds_measured": round(seconds, 1),
        "limits": {str(limit): seen(limit, after) for limit in held},
        "is_exact": all(limit["is_exact"] for limit in after.values()),
        "used": {
            limit.binds: round(used(limit, before, after) / limit.amount * 60 / seconds, 4)
            for limit in held
            if limit.binds
        },
        "offered": {
            model: round(came[model] / (size.a_second * size.seconds), 2) for model in MODELS
        },
        "backlog": waiting,
        "waits": waits(cluster, size.warm_s),
        "refused_out_of_turn": sum(struck),
        "failed": int(cluster.rows(FAILED)[0][0]),
        "answers": dict(traffic.answers),
        "sent_late_s": round(traffic.latest_s, 3),
    }


def counted(cluster: Cluster) -> dict[tuple[str, float], dict[str, Any]]:
    shown = httpx.get(f"{cluster.sandbox_url}/_limits", timeout=10.0).json()["limits"]
    return {(limit["model"], limit["window_s"]): limit for limit in shown}


def seen(limit: Held, after: Mapping[tuple[str, float], Mapping[str, Any]]) -> dict[str, Any]:
    window = after[limit.model or "*", limit.window_s]
    return {
        "amount": limit.amount,
        "window_s": limit.window_s,
        "peak": window[f"peak_{limit.unit}"],
        "binds": limit.binds,
    }


def used(
    limit: Held,
    before: Mapping[tuple[str, float], Mapping[str, Any]],
    after: Mapping[tuple[str, float], Mapping[str, Any]],
) -> int:
    name = "calls" if limit.unit == "requests" else limit.unit
    key = (limit.model, limit.window_s)
    return int(after[key][name] - before[key][name])


def waits(cluster: Cluster, since_s: float) -> dict[str, Any]:
    """Of those who came when the backlog was there."""
    rows = [row for row in cluster.rows(WAITS) if row[2] >= since_s]
    taken = [(mode, wait) for mode, wait, _ in rows]
    longest = sorted(rows, key=lambda row: -row[1])[:LONGEST_SHOWN]
    found: dict[str, Any] = {
        "longest": [[mode, round(wait, 3), round(at, 1)] for mode, wait, at in longest]
    }
    for name in ("inline", "queued", "all"):
        mine = [wait for mode, wait in taken if name in (mode, "all")]
        found[name] = {
            "calls": len(mine),
            "p50_s": round(percentile(mine, 50), 4),
            "p99_s": round(percentile(mine, 99), 4),
            "most_s": round(max(mine, default=0.0), 4),
        }
    return found


def backlog(model: str, size: Size, dice: random.Random) -> Iterator[Due]:
    """Three times the limit; what comes in the first seconds comes at once."""
    a_second = size.a_second * OFFERED
    for number in range(int(a_second * (size.seconds + AT_ONCE_S))):
        at = max(0.0, number / a_second - AT_ONCE_S)
        lane = dice.choice(("bulk", "default"))
        yield at, body(model, dice, mode="queued", lane=lane)


def people(size: Size, dice: random.Random, **fields: Any) -> Iterator[Due]:
    """Those who wait for their answer, at random times."""
    at = 0.0
    while at < size.seconds - 2.0:
        at += dice.expovariate(size.people / 2)
        yield at, body(dice.choice(MODELS), dice, metadata={"person": True}, **fields)


def body(model: str, dice: random.Random, **fields: Any) -> dict[str, Any]:
    tokens = dice.randint(SHORTEST, LONGEST)
    # Half of the callers say how long the answer may be.
    most = {"max_tokens": LONGEST} if dice.random() < 0.5 else {}
    return chat(model, [{"role": "user", "content": text(tokens)}], input=most, **fields)


class Surprises:
    """While the block runs the vendor refuses calls that it had room for."""

    def __init__(self, cluster: Cluster, size: Size) -> None:
        self.cluster = cluster
        self.size = size
        self.struck: list[int] = []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> list[int]:
        self.thread.start()
        return self.struck

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def run(self) -> None:
        began, bare = time.monotonic(), 0
        self.strike(self.size.refused_share, self.size.retry_after_s)
        while not self.stopped.wait(0.5):
            due = int((time.monotonic() - began) / self.size.bare_every_s)
            if due > bare:
                bare = due
                # Without Retry-After: about one call of a second's.
                self.strike(1 / self.size.a_second, None)
                self.stopped.wait(1.0)
                self.strike(self.size.refused_share, self.size.retry_after_s)
        self.count()

    def strike(self, share: float, retry_after_s: float | None) -> None:
        self.count()
        for model in MODELS:
            fault = {"model": model, "kind": "rate-limit", "share": share}
            if retry_after_s is not None:
                fault["retry_after"] = retry_after_s
            steer(self.cluster, "_faults", fault)

    def count(self) -> None:
        shown = httpx.get(f"{self.cluster.sandbox_url}/_faults", timeout=10.0).json()["faults"]
        self.struck.append(sum(fault["struck"] for fault in shown))
