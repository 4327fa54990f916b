"""Redis and Postgres are taken away under load: killed, frozen, emptied, restarted, gone for long.

Callers send inline and queued work all the while, each piece again with the same key until it is
answered. Nothing may be lost, nobody may wait longer than he was told, and calls that end within
the lease must not be made twice because a store was away.
"""

import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from project.stack import postgres
from project.stack.layout import Layout
from project.stack.owner import Servers
from project.stack.processes import Child
from tests.acceptance.cluster import FIRST_PORT, KEY, Cluster, chat, wait_for
from tests.chaos import audit
from tests.chaos.calls import insist

# All end well within the lease.
MODELS = ("echo", "slow-200", "claude-slow-500", "slow-2000", "claude-echo")
INLINE_CALLERS, QUEUED_CALLERS = 3, 3
PAUSE_S = 0.2
DEADLINE_S = 10.0
# What each kind of request may take, and what a busy machine may add. Inline work has its
# deadline; who needs Postgres hears within the pool's and the statement's timeouts that it is away.
SLACK_S = 3.0
ALLOWED_S = {"inline": DEADLINE_S + SLACK_S, "queued": 10.0 + SLACK_S, "probe": 5.0 + SLACK_S}
PATIENCE_S = 120.0
SEED = 5


@dataclass(frozen=True)
class Size:
    killed_s: float
    frozen_s: float
    flushes: int
    restarts: int
    restart_s: tuple[float, float]
    away_s: float
    # Between two troubles, and around each: for calls to be under way.
    calm_s: float
    settings: dict[str, str]


FULL = Size(
    killed_s=10.0,
    frozen_s=20.0,
    flushes=5,
    restarts=10,
    restart_s=(5.0, 20.0),
    away_s=60.0,
    calm_s=5.0,
    settings={},
)
SHORT = Size(
    killed_s=2.0,
    frozen_s=5.0,
    flushes=1,
    restarts=2,
    restart_s=(2.0, 4.0),
    away_s=10.0,
    calm_s=1.5,
    settings={"LEASE_S": "8", "RENEW_S": "1", "DROP_AFTER_S": "6", "HINT_LOST_S": "5"},
)

OPEN = "SELECT count(*) FROM llmtasks_attempt WHERE state = 'sent'"
UNFINISHED = "SELECT count(*) FROM llmtasks_task WHERE status IN ('waiting', 'queued', 'running')"
SUMS_WRONG = """
SELECT count(*) FROM llmtasks_task t WHERE coalesce(cost, 0)
    <> (SELECT coalesce(sum(cost), 0) FROM llmtasks_attempt a WHERE a.task_id = t.id)
"""

CONDITIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "every trouble was made": lambda f: set(f["troubles"]) == set(TROUBLES),
    "lost = 0": lambda f: f["queued"]["lost"] == 0,
    "succeeded exactly once: all": lambda f: (
        f["queued"]["finished_once"] == f["queued"]["tasks"]
        and f["queued"]["statuses"] == {"succeeded": f["queued"]["tasks"]}
    ),
    "one key, one task": lambda f: f["queued"]["not_asked_for"] == 0,
    "no request hung longer than its timeout": lambda f: all(
        f["longest_s"][kind] <= allowed for kind, allowed in ALLOWED_S.items()
    ),
    "no mass re-run of calls": lambda f: f["called_again"] <= f["calls"] / 100,
    "billed once, or shown as unknown": lambda f: (
        f["queued"]["billed_twice"] == f["queued"]["answers_unaccounted"] == 0
        and f["queued"]["calls_without_attempt"] == 0
    ),
    "overlapping calls of one task = 0": lambda f: f["queued"]["overlaps"] == 0,
    "cost = sum over attempts": lambda f: f["sums_wrong"] == f["queued"]["sums_wrong"] == 0,
    "attempts left open, tasks left owned = 0": lambda f: (
        f["open_attempts"] == f["queued"]["still_owned"] == 0
    ),
}

COLUMNS = {
    "trouble": "trouble",
    "seconds": "s",
    "answered": "answered",
    "refused": "refused",
    "broken": "broken",
    "longest_s": "longest s",
    "recovered_s": "recovered s",
}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"trouble": name, **figures} for name, figures in found["troubles"].items()]


# --- the load -------------------------------------------------------------------------------------


class Watch:
    """How long each request took, and how it ended; by the trouble that was on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.trouble = ""
        self.longest: Counter[tuple[str, str]] = Counter()
        self.ends: Counter[tuple[str, str]] = Counter()

    def note(self, kind: str, seconds: float, end: str) -> None:
        with self.lock:
            place = self.trouble, kind
            self.longest[place] = max(self.longest[place], seconds)  # type: ignore[assignment]
            self.ends[self.trouble, end] += 1

    def of_kind(self, kind: str) -> float:
        return round(max((s for (_, k), s in self.longest.items() if k == kind), default=0.0), 2)

    def of_trouble(self, trouble: str) -> dict[str, Any]:
        longest = max((s for (t, _), s in self.longest.items() if t == trouble), default=0.0)
        ends = {end: self.ends[trouble, end] for end in ("answered", "refused", "broken")}
        return {**ends, "longest_s": round(longest, 2)}


class TimedClient(httpx.Client):
    """Notes each request that it sends. A request that hangs is cut off long after its time."""

    def __init__(self, cluster: Cluster, watch: Watch, kind: str) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        super().__init__(base_url=cluster.base_url, headers=headers, timeout=60.0)
        self.watch, self.kind = watch, kind

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        began, end = time.monotonic(), "broken"
        try:
            answer = super().send(request, **options)
            end = "answered" if answer.status_code < 300 else "refused"
            return answer
        finally:
            self.watch.note(self.kind, time.monotonic() - began, end)


class Load:
    """Callers in threads of their own, from `with` to its end. `ids`: what queued work became."""

    def __init__(self, cluster: Cluster, watch: Watch) -> None:
        self.cluster, self.watch = cluster, watch
        self.ids: dict[int, str] = {}
        self.inline = 0
        self.faults: list[BaseException] = []
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.threads = [
            *(self.thread("inline", self.call_inline) for _ in range(INLINE_CALLERS)),
            *(self.thread("queued", self.call_queued) for _ in range(QUEUED_CALLERS)),
            self.thread("probe", self.probe),
        ]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        if self.faults:
            raise self.faults[0]

    def thread(self, kind: str, call: Callable[[httpx.Client], None]) -> threading.Thread:
        def run() -> None:
            with TimedClient(self.cluster, self.watch, kind) as client:
                try:
                    while not self.stopped.wait(PAUSE_S):
                        call(client)
                except BaseException as fault:  # noqa: BLE001 - raised in the main thread
                    self.faults.append(fault)

        return threading.Thread(target=run, name=kind)

    def call_inline(self, client: httpx.Client) -> None:
        with self.lock:
            self.inline += 1
            number = self.inline
        body = chat(MODELS[number % len(MODELS)], mode="inline", deadline_s=DEADLINE_S)
        task = insist(client, body)
        assert task["status"] == "succeeded", task

    def call_queued(self, client: httpx.Client) -> None:
        with self.lock:
            number = len(self.ids)
            self.ids[number] = ""
        body = chat(MODELS[number % len(MODELS)], metadata={"n": number})
        self.ids[number] = insist(client, body)["id"]

    def probe(self, client: httpx.Client) -> None:
        for path in ("/healthz", "/readyz", "/v1/tasks?limit=1"):
            try:
                client.get(path)
            except httpx.HTTPError:
                continue


# --- the troubles ---------------------------------------------------------------------------------


def child(server: Child | None) -> Child:
    assert server is not None
    assert server.process is not None
    return server


def kill_redis(servers: Servers, size: Size) -> None:
    valkey = child(servers.valkey)
    assert valkey.process is not None
    valkey.process.kill()
    valkey.process.wait()
    time.sleep(size.killed_s)
    valkey.start()


def freeze_redis(servers: Servers, size: Size) -> None:
    process = child(servers.valkey).process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(size.frozen_s)
    finally:
        process.send_signal(signal.SIGCONT)


def flush_redis(servers: Servers, size: Size) -> None:
    import redis

    for _ in range(size.flushes):
        with redis.Redis.from_url(servers.redis_url) as client:
            client.flushall()
        time.sleep(size.calm_s)


def restart_postgres(servers: Servers, size: Size) -> None:
    dice = random.Random(SEED)
    server = child(servers.postgres)
    for _ in range(size.restarts):
        time.sleep(dice.uniform(*size.restart_s))
        server.stop()
        server.start()
        postgres.wait_until_ready(server, servers.layout)


def take_postgres_away(servers: Servers, size: Size) -> None:
    server = child(servers.postgres)
    server.stop()
    time.sleep(size.away_s)
    server.start()
    postgres.wait_until_ready(server, servers.layout)


TROUBLES: dict[str, Callable[[Servers, Size], None]] = {
    "redis killed": kill_redis,
    "redis frozen": freeze_redis,
    "redis emptied": flush_redis,
    "postgres restarted": restart_postgres,
    "postgres away": take_postgres_away,
}


# --- the proof ------------------------------------------------------------------------------------


def run(clusters: Callable[..., AbstractContextManager[Cluster]], is_short: bool) -> dict[str, Any]:
    """`clusters` is for servers that may not be touched; these have their own."""
    size = SHORT if is_short else FULL
    watch = Watch()
    with own_servers() as servers, own_cluster(servers, size) as cluster:
        audit.install(cluster)
        with Load(cluster, watch) as load:
            troubles = {name: trouble(cluster, servers, size, watch, name) for name in TROUBLES}
        wait_for(lambda: not count(cluster, UNFINISHED), PATIENCE_S)
        wait_for(lambda: not count(cluster, OPEN), PATIENCE_S)
        vendor = cluster.bill()["tasks"]
        return {
            "size": asdict(size),
            "troubles": troubles,
            "longest_s": {kind: watch.of_kind(kind) for kind in ALLOWED_S},
            "allowed_s": ALLOWED_S,
            "inline": load.inline,
            "calls": sum(seen["calls"] for seen in vendor.values()),
            "called_again": sum(max(0, seen["calls"] - 1) for seen in vendor.values()),
            "queued": audit.figures(cluster, load.ids),
            "open_attempts": count(cluster, OPEN),
            "sums_wrong": count(cluster, SUMS_WRONG),
        }


def trouble(
    cluster: Cluster, servers: Servers, size: Size, watch: Watch, name: str
) -> dict[str, Any]:
    """Make it under load, and wait until work goes through as before."""
    time.sleep(size.calm_s)
    watch.trouble = name
    began = time.monotonic()
    TROUBLES[name](servers, size)
    ended = time.monotonic()
    wait_for(lambda: works(cluster), PATIENCE_S)
    found = {
        "seconds": round(ended - began, 1),
        **watch.of_trouble(name),
        "recovered_s": round(time.monotonic() - ended, 1),
    }
    watch.trouble = ""
    return found


def works(cluster: Cluster) -> bool:
    """Whether a new queued task is done within seconds."""
    try:
        task_id = cluster.queue("echo")
        return bool(cluster.finished(task_id, 5.0)["status"] == "succeeded")
    except (AssertionError, httpx.HTTPError):
        return False


def count(cluster: Cluster, sql: str) -> int:
    return int(cluster.rows(sql)[0][0])


@contextmanager
def own_servers() -> Iterator[Servers]:
    with tempfile.TemporaryDirectory(prefix="llmtasks-") as folder:
        made = Servers(Layout.at(folder), "stores", test=False)
        try:
            made.start()
            yield made
        finally:
            made.stop()


@contextmanager
def own_cluster(servers: Servers, size: Size) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="llmtasks-chaos-stores-") as folder:
        cluster = Cluster(
            Path(folder),
            servers.database_url,
            servers.redis_url,
            # No other's: see there.
            first_port=FIRST_PORT - 1000,
            names=("sandbox", "web", "dispatcher", "worker-default"),
            settings=size.settings,
        )
        cluster.prepare()
        with cluster:
            yield cluster
