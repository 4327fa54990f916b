"""A crash at every step: programs die as by kill -9 at the named points of `llmtasks/crash.py`.

For each point a program is started that dies there, and started again each time that it did, while
tasks go through it. Beside it run one more dispatcher and one more worker that live. Inline work is
repeated by its client with the same key, until it is answered.

How long what was left behind stayed so is told by Postgres's times alone: from the dead owner's
last sign of life, or from the release of a hint.
"""

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.acceptance.cluster import KEY, Cluster, chat, wait_for
from tests.chaos import audit, history
from tests.chaos.calls import insist
from tests.chaos.submit import until

LEASE_S = 6.0
HINT_LOST_S = 3.0
SETTINGS = {
    "LEASE_S": f"{LEASE_S:g}",
    "RENEW_S": "1",
    "DROP_AFTER_S": "4.5",
    "GRACE_S": "2",
    "HINT_LOST_S": f"{HINT_LOST_S:g}",
}
SWEEP_S = 1.0
# Until another dispatcher leads.
LEADER_S = 4.5
# What a busy machine may add: two cores start processes beside.
SLACK_S = 1.5

AFTER_LEASE_S = LEASE_S + SWEEP_S + SLACK_S
AFTER_HINT_S = HINT_LOST_S + SWEEP_S + SLACK_S
AFTER_LEADER_S = max(HINT_LOST_S, LEADER_S) + SWEEP_S + SLACK_S
# One that died in a sweep stays away, or it would lead and die in the same sweep again.
AWAY_S = AFTER_LEADER_S

CRASHES = 50
CRASHES_SHORT = 1
# Of those that cannot be proven side by side, one for each program and mode.
SHORT = ("submit.saved", "dispatch.queued", "attempt.begun inline", "sweep.taken")
MODELS = ("echo", "slow-50", "slow-200", "claude-echo", "claude-slow-100")
BATCH = 6
CALLERS = 6
PATIENCE_S = 60.0

# Who dies at which point of a worker's; and the mark of the tasks that all of them run.
WORKERS = {
    point: f"worker-default-{number}"
    for number, point in enumerate(
        (
            "execute.received",
            "execute.claimed",
            "attempt.begun",
            "attempt.answered",
            "attempt.finished",
        ),
        start=2,
    )
}
WORK = "work"
PAUSE_S = 0.3
# How long, and how often, one is waited for to lead.
LEAD_S, MOST_TRIES = 6.0, 5
# Calls that last until their worker is killed.
LONG_MODELS = ("slow-2000", "claude-slow-2000")
# How long, and how often, it is waited for to run one.
RUN_S, MOST_SENT = 2.0, 10
VICTIM, ARMED_DISPATCHER, OTHER_DISPATCHER = "worker-default-2", "dispatcher", "dispatcher-2"

RUNS = """
SELECT 1 FROM llmtasks_task t JOIN llmtasks_worker w ON w.id = t.owner_id
WHERE t.status = 'running' AND w.pid = %s LIMIT 1
"""
LEADER = """
SELECT w.pid FROM llmtasks_config c JOIN llmtasks_worker w ON w.id = c.leader
WHERE c.leader_until > clock_timestamp()
"""
# Inline work: the one that was answered in the end, and those before it whose process died.
INLINE = """
SELECT t.metadata ->> 'point', t.metadata ->> 'inline', t.status, t.error_class,
    ARRAY(SELECT a.state || ' ' || a.cost_state FROM llmtasks_attempt a WHERE a.task_id = t.id)
FROM llmtasks_task t WHERE t.metadata ? 'inline'
"""


@dataclass
class Ids:
    """The tasks that were sent: queued ones by number, for the judge."""

    queued: dict[int, str] = field(default_factory=dict)

    def send(self, cluster: Cluster, point: str, models: tuple[str, ...] = MODELS) -> list[str]:
        first = len(self.queued)
        numbers = range(first, first + BATCH)
        bodies = [chat(models[n % len(models)], metadata={"n": n, "point": point}) for n in numbers]
        ids = cluster.queue_many(bodies)
        self.queued |= dict(zip(numbers, ids, strict=True))
        return ids


class Armed(threading.Thread):
    """Keeps a program alive that dies at a point; `deaths` counts how often it did. It is started
    again after `away_s`."""

    def __init__(
        self, cluster: Cluster, name: str, point: str, passes: tuple[int, ...], away_s: float = 0.0
    ) -> None:
        super().__init__(name=f"armed-{name}")
        self.cluster, self.program, self.point = cluster, name, point
        self.passes, self.away_s = itertools.cycle(passes), away_s
        self.deaths = 0
        self.ending = threading.Event()

    def __enter__(self) -> "Armed":
        self.cluster.terminate(self.program)
        self.begin()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        while self.is_alive():
            self.cluster.running[self.program].terminate()
            self.join(0.2)
        self.cluster.start(self.program)

    def run(self) -> None:
        while (code := self.cluster.running[self.program].wait()) == -9:
            self.deaths += 1
            if self.ending.wait(self.away_s):
                return
            self.begin()
        assert self.ending.is_set(), f"{self.program} ended by itself: {code}"

    def begin(self) -> None:
        self.cluster.start(self.program, LLMTASKS_CRASH=f"{self.point}:{next(self.passes)}")

    def wait_for_death(self, deaths: int) -> None:
        """One more than those before."""
        wait_for(lambda: self.deaths > deaths, 20, 0.02)

    @property
    def is_up(self) -> bool:
        return self.cluster.running[self.program].poll() is None

    @property
    def pid(self) -> int:
        return self.cluster.running[self.program].pid


# --- queued work ----------------------------------------------------------------------------------


def crash_workers(cluster: Cluster, ids: Ids, times: int) -> dict[str, int]:
    """A worker for each point, side by side, and one that lives."""
    with ExitStack() as stack:
        armed = {
            point: stack.enter_context(Armed(cluster, name, point, passes=(3, 5, 8)))
            for point, name in WORKERS.items()
        }
        while min(each.deaths for each in armed.values()) < times:
            ids.send(cluster, WORK)
            time.sleep(PAUSE_S)
        return {point: each.deaths for point, each in armed.items()}


def crash_dispatcher(cluster: Cluster, ids: Ids, point: str, times: int) -> int:
    passes = (2,) if point == "dispatch.publishing" else (1,)
    with Armed(cluster, ARMED_DISPATCHER, point, passes) as armed:
        for _ in range(times):
            lead(cluster, armed)
            deaths = armed.deaths
            sent = ids.send(cluster, point)
            armed.wait_for_death(deaths)
            wait_until_final(cluster, sent)
        return armed.deaths


def crash_sweep(cluster: Cluster, ids: Ids, point: str, times: int) -> int:
    """A worker dies first, so that there is something to sweep."""
    with Armed(cluster, ARMED_DISPATCHER, point, (1,), AWAY_S) as armed:
        for _ in range(times):
            lead(cluster, armed)
            deaths = armed.deaths
            sent = occupy(cluster, ids, point)
            cluster.kill9(VICTIM)
            armed.wait_for_death(deaths)
            cluster.start(VICTIM)
            wait_until_final(cluster, sent)
            wait_for(lambda: VICTIM in cluster.serving(), 30)
        return armed.deaths


def occupy(cluster: Cluster, ids: Ids, point: str) -> list[str]:
    """Send until the victim runs something, since the others may take all; the tasks."""
    sent: list[str] = []
    for _ in range(MOST_SENT):
        sent += ids.send(cluster, point, LONG_MODELS)
        if until(lambda: cluster.rows(RUNS, [cluster.running[VICTIM].pid]), RUN_S, 0.02):
            return sent
    raise AssertionError(f"{VICTIM} never ran anything")


def lead(cluster: Cluster, armed: Armed) -> None:
    """Have the one lead that is to die: the other ends in order, which gives its lease away, and
    is back after the one took it. Once more where that one had just died a second time, and was not
    there to take it."""
    for _ in range(MOST_TRIES):
        wait_for(lambda: armed.is_up and is_registered(cluster, armed.pid), 30)
        cluster.terminate(OTHER_DISPATCHER)
        leads = until(lambda: cluster.rows(LEADER) == [(armed.pid,)], LEAD_S, 0.02)
        cluster.start(OTHER_DISPATCHER)
        if leads:
            break
    else:
        raise AssertionError(f"{ARMED_DISPATCHER} never led")
    # Else it would be its start that is waited for.
    wait_for(lambda: is_registered(cluster, cluster.running[OTHER_DISPATCHER].pid), 30)


def is_registered(cluster: Cluster, pid: int) -> bool:
    return bool(cluster.rows("SELECT 1 FROM llmtasks_worker WHERE pid = %s", [pid]))


def wait_until_final(cluster: Cluster, ids: list[str]) -> None:
    ended = "SELECT count(*) FROM chaos_ends WHERE task_id = ANY(%s)"
    wait_for(lambda: cluster.rows(ended, [ids])[0][0] >= len(ids), PATIENCE_S)


# --- the web server: its master starts a process again that died, armed anew ----------------------


@contextmanager
def armed_web(cluster: Cluster, point: str) -> Iterator[Callable[[], int]]:
    """Every process of the web server dies at its tenth pass; how many did."""
    before = deaths_of_web(cluster)
    cluster.terminate("web")
    cluster.start("web", LLMTASKS_CRASH=f"{point}:10")
    cluster.wait_until_ready()
    try:
        yield lambda: deaths_of_web(cluster) - before
    finally:
        cluster.restart("web")
        cluster.wait_until_ready()


def deaths_of_web(cluster: Cluster) -> int:
    return cluster.log("web").read_text(errors="replace").count("was sent SIGKILL")


def crash_submit(cluster: Cluster, ids: Ids, point: str, times: int) -> int:
    def send(client: httpx.Client) -> None:
        with lock:
            number = len(ids.queued)
            ids.queued[number] = ""
        body = chat(MODELS[number % 5], metadata={"n": number, "point": point})
        ids.queued[number] = str(insist(client, body)["id"])

    lock = threading.Lock()
    with armed_web(cluster, point) as deaths:
        call_until(cluster, lambda: deaths() >= times, send)
        return deaths()


def crash_inline(cluster: Cluster, ids: Ids, point: str, times: int) -> int:
    def send(client: httpx.Client) -> None:
        metadata = {"point": f"{point} inline", "inline": next(numbers)}
        insist(client, chat("slow-50", metadata=metadata, mode="inline"))

    numbers = itertools.count()
    with armed_web(cluster, point) as deaths:
        call_until(cluster, lambda: deaths() >= times, send)
        return deaths()


def call_until(
    cluster: Cluster, is_done: Callable[[], bool], send: Callable[[httpx.Client], None]
) -> None:
    def call() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=cluster.base_url, headers=headers, timeout=20) as client:
            while not is_done():
                send(client)

    with ThreadPoolExecutor(CALLERS) as pool:
        for caller in [pool.submit(call) for _ in range(CALLERS)]:
            caller.result()


# --- the proof ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A point, who dies there, and how long what it leaves may lie."""

    name: str
    crash: Callable[[Cluster, Ids, str, int], int]
    allowed_s: float
    inline: bool = False

    @property
    def mark(self) -> str:
        return f"{self.name} inline" if self.inline else self.name


POINTS = (
    Point("submit.inserted", crash_submit, AFTER_HINT_S),
    Point("submit.saved", crash_submit, AFTER_HINT_S),
    Point("dispatch.queued", crash_dispatcher, AFTER_LEADER_S),
    Point("dispatch.publishing", crash_dispatcher, AFTER_LEADER_S),
    Point("dispatch.published", crash_dispatcher, AFTER_LEADER_S),
    Point("attempt.begun", crash_inline, AFTER_LEASE_S, inline=True),
    Point("attempt.answered", crash_inline, AFTER_LEASE_S, inline=True),
    Point("attempt.finished", crash_inline, AFTER_LEASE_S, inline=True),
    Point("sweep.taking", crash_sweep, LEASE_S + AFTER_LEADER_S),
    Point("sweep.taken", crash_sweep, LEASE_S + AFTER_LEADER_S),
)

COLUMNS = {
    "point": "point",
    "crashes": "crashes",
    "tasks": "tasks",
    "stuck": "left behind",
    "median_s": "median s",
    "longest_s": "longest s",
    "allowed_s": "allowed s",
}

CONDITIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "every point crashed as often as was meant": lambda f: (
        len(f["points"]) == f["points_meant"]
        and all(p["crashes"] >= f["times"] for p in f["points"])
    ),
    "recovered within lease + sweep": lambda f: all(
        p["longest_s"] is None or p["longest_s"] <= p["allowed_s"] for p in f["points"]
    ),
    "something was left behind to recover": lambda f: sum(p["stuck"] for p in f["points"]) > 0,
    "lost = 0": lambda f: f["queued"]["lost"] == 0,
    "finished exactly once: all": lambda f: f["queued"]["finished_once"] == f["queued"]["tasks"],
    # Five of six workers die again and again.
    "failed, but for five calls that died = 0": lambda f: f["queued"]["failed_early"] == 0,
    "one key, one task": lambda f: f["queued"]["not_asked_for"] == 0,
    "billed once or shown as unknown": lambda f: (
        f["queued"]["billed_twice"] == f["queued"]["answered_unbilled"] == 0
        and f["queued"]["answers_unaccounted"] == f["queued"]["calls_without_attempt"] == 0
    ),
    "overlapping calls of one task = 0": lambda f: f["queued"]["overlaps"] == 0,
    "cost = sum over attempts": lambda f: f["queued"]["sums_wrong"] == 0,
    "attempts left open, tasks left owned = 0": lambda f: (
        f["queued"]["left_open"] == f["queued"]["still_owned"] == f["open_attempts"] == 0
    ),
    "inline: one answer a key, every other Interrupted": lambda f: (
        f["inline"]["keys"] == f["inline"]["succeeded_once"] and not f["inline"]["odd"]
    ),
}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(found["points"])


def run(clusters: Callable[..., AbstractContextManager[Cluster]], is_short: bool) -> dict[str, Any]:
    times = CRASHES_SHORT if is_short else CRASHES
    chosen = [point for point in POINTS if not is_short or point.mark in SHORT]
    ids = Ids()
    with clusters(
        names=("sandbox", "web", "dispatcher", "worker-default"),
        copies={"worker-default": 1 + len(WORKERS), "dispatcher": 2},
        settings=SETTINGS,
    ) as cluster:
        audit.install(cluster)
        history.install(cluster)
        points = prove_workers(cluster, ids, times)
        points += [prove(cluster, ids, point, times) for point in chosen]
        return {
            "settings": SETTINGS,
            "times": times,
            "points_meant": len(WORKERS) + len(chosen),
            "points": points,
            "queued": audit.figures(cluster, ids.queued),
            "inline": inline_figures(cluster),
            "open_attempts": cluster.rows(
                "SELECT count(*) FROM llmtasks_attempt WHERE state = 'sent'"
            )[0][0],
        }


def prove(cluster: Cluster, ids: Ids, point: Point, times: int) -> dict[str, Any]:
    mark = point.mark
    crashes = point.crash(cluster, ids, point.name, times)
    wait_for_rest(cluster)
    took = history.taken_up(cluster, mark, LEASE_S) + history.put_back(cluster, mark)
    return figures(cluster, mark, mark, crashes, took, point.allowed_s)


def prove_workers(cluster: Cluster, ids: Ids, times: int) -> list[dict[str, Any]]:
    crashes = crash_workers(cluster, ids, times)
    wait_for_rest(cluster)
    found = []
    for point, name in WORKERS.items():
        took, allowed_s = history.taken_up(cluster, WORK, LEASE_S, name), AFTER_LEASE_S
        if point == "execute.received":
            # Its hint is gone, and nobody has claimed the task.
            took, allowed_s = history.put_back(cluster, WORK), AFTER_HINT_S
        found.append(figures(cluster, point, WORK, crashes[point], took, allowed_s))
    return found


def figures(
    cluster: Cluster, name: str, mark: str, crashes: int, took: list[float], allowed_s: float
) -> dict[str, Any]:
    sys.stderr.write(f"  {name}: {crashes} crashes\n")
    return {
        "point": name,
        "crashes": crashes,
        "tasks": count(cluster, "metadata ->> 'point' = %s", mark),
        "stuck": len(took),
        "median_s": sorted(took)[len(took) // 2] if took else None,
        "longest_s": max(took, default=None),
        "allowed_s": allowed_s,
    }


def wait_for_rest(cluster: Cluster) -> None:
    """Everything runs, and nothing is left to do."""
    cluster.start_all()
    open_ = ["waiting", "queued", "running"]
    wait_for(lambda: not count(cluster, "status = ANY(%s)", open_), PATIENCE_S)


def count(cluster: Cluster, where: str, value: Any) -> int:
    return int(cluster.rows(f"SELECT count(*) FROM llmtasks_task WHERE {where}", [value])[0][0])


def inline_figures(cluster: Cluster) -> dict[str, Any]:
    """Odd: neither an answer nor an `Interrupted` whose call shows as unknown."""
    answered: Counter[tuple[str, str]] = Counter()
    keys, interrupted, odd = set(), 0, []
    for point, number, status, error, attempts in cluster.rows(INLINE):
        keys.add((point, number))
        answered[point, number] += status == "succeeded"
        died = (status, error, attempts) == ("failed", "Interrupted", ["unknown estimated"])
        interrupted += died
        if not died and (status, attempts) != ("succeeded", ["settled final"]):
            odd.append([point, number, status, error, attempts])
    return {
        "keys": len(keys),
        "succeeded_once": sum(times == 1 for times in answered.values()),
        "interrupted": interrupted,
        "odd": odd,
    }
