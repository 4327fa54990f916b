"""kill -9 of web, dispatcher and workers, again and again, while agents and workflows run.

The runs have known steps (`runs.py`): agents with critical, queued and awaited calls and with calls
that a person lets through, and workflows of each pattern, one with agents in it. A person is there
all the time: approves what asks for approval, refuses what was interrupted.

The judge counts what tools did (a row for each run of one, `tools.py`), what the vendor saw, and
what is in the database: runs, steps, children, attempts.
"""

import statistics
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import httpx

from tests.acceptance.cluster import KEY, Cluster
from tests.chaos import audit, kills
from tests.chaos.bursts import Size, victims
from tests.chaos.runs import RUNS, body

NAMES = ("sandbox", "web", "dispatcher", "worker-default", "worker-bulk")
COPIES = {"worker-default": 2}
SEED = 4
LOOK_S = 0.2

FULL = Size(
    tasks=2_100,
    kills=105,
    copies=2,
    kill_after_s=(0.0, 0.3),
    down_s=(0.0, 0.5),
    up_s=(0.2, 1.2),
    quiet_s=90.0,
)
SHORT = Size(
    tasks=84,
    kills=7,
    copies=2,
    kill_after_s=(0.0, 0.2),
    down_s=(0.0, 0.1),
    up_s=(0.0, 0.2),
    quiet_s=60.0,
)

INSTALL = """
CREATE TABLE chaos_runs (
    tool text NOT NULL, key text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
ENDED = """
SELECT count(*) FROM chaos_ends e JOIN llmtasks_task t ON t.id = e.task_id
WHERE t.parent_id IS NULL
"""
UNDECIDED = """
SELECT task_id::text, number, status FROM llmtasks_step WHERE status IN ('approval', 'unknown')
"""
# Every task of a run with its run's name, and the run's id.
TREE = """
WITH RECURSIVE tree AS (
    SELECT id, id AS root, metadata ->> 'run' AS run FROM llmtasks_task
    WHERE parent_id IS NULL AND metadata ? 'run'
    UNION ALL
    SELECT t.id, p.root, p.run FROM llmtasks_task t JOIN tree p ON t.parent_id = p.id
)"""
SIZES = f"""{TREE}
SELECT root::text, min(run), count(DISTINCT tree.id), count(s.id)
FROM tree LEFT JOIN llmtasks_step s ON s.task_id = tree.id GROUP BY root
"""
BELOW = f"{TREE} SELECT id::text FROM tree WHERE id <> root"
TIMES = """
SELECT metadata ->> 'run', extract(epoch FROM finished_at - created_at)::float
FROM llmtasks_task WHERE parent_id IS NULL AND finished_at IS NOT NULL
"""
# Children that no step, or more than one, names; steps whose child isn't there.
CHILDREN = """
SELECT count(*) FILTER (WHERE s.named IS DISTINCT FROM 1),
    (SELECT count(*) FROM llmtasks_step s WHERE s.child_id IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM llmtasks_task c WHERE c.id = s.child_id AND c.parent_id = s.task_id))
FROM llmtasks_task t LEFT JOIN (
    SELECT child_id, count(*) AS named FROM llmtasks_step GROUP BY child_id
) s ON s.child_id = t.id
WHERE t.parent_id IS NOT NULL
"""
NUMBERS = """
SELECT count(*) FROM (
    SELECT 1 FROM llmtasks_step GROUP BY task_id HAVING max(number) <> count(*) - 1
) wrong
"""
STEPS_LEFT_OPEN = """
SELECT count(*) FROM llmtasks_step WHERE status NOT IN ('done', 'failed', 'skipped')
"""
# A run's cost beside its tree's attempts; each workflow's beside its children.
COSTS = f"""{TREE}
SELECT count(*) FROM llmtasks_task r JOIN (
    SELECT root, coalesce(sum(a.cost), 0) AS cost
    FROM tree LEFT JOIN llmtasks_attempt a ON a.task_id = tree.id GROUP BY root
) s ON s.root = r.id
WHERE r.kind = 'workflow' AND coalesce(r.cost, 0) <> s.cost
"""
WORKFLOW_COSTS = """
SELECT count(*) FROM llmtasks_task t WHERE kind = 'workflow' AND coalesce(cost, 0) <> (
    SELECT coalesce(sum(c.cost), 0) FROM llmtasks_task c WHERE c.parent_id = t.id)
"""
WAITING_FOR_NOTHING = """
SELECT count(*) FROM llmtasks_task t WHERE status = 'blocked' AND NOT EXISTS (
    SELECT 1 FROM llmtasks_step s WHERE s.task_id = t.id AND s.status IN ('approval', 'unknown')
) AND NOT EXISTS (
    SELECT 1 FROM llmtasks_task c WHERE c.parent_id = t.id
        AND c.status NOT IN ('succeeded', 'failed', 'cancelled', 'expired'))
"""
# What a tool's call came to: of an agent's step, or of a task. And when.
CALLS = """
SELECT input ->> 'key', name, status, finished_at FROM llmtasks_step
WHERE kind = 'tool' AND input ? 'key' AND child_id IS NULL
UNION ALL
SELECT p.request #>> '{arguments,key}', t.route, t.status, t.finished_at
FROM llmtasks_task t JOIN llmtasks_taskpayload p ON p.task_id = t.id WHERE t.kind = 'tool'
"""
RAN = "SELECT key, array_agg(at ORDER BY at) FROM chaos_runs GROUP BY key"
MAY_RUN_AGAIN = ("look_up@1", "mail@1")
# Nobody's failure: its process died, and it must not run twice.
FAILED = """
SELECT count(*) FROM llmtasks_task WHERE metadata ? 'run' AND status <> 'succeeded'
    AND NOT (kind = 'tool' AND on_unknown = 'fail' AND error_class = 'Interrupted')
"""

CONDITIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "as many kills as were meant": lambda f: sum(f["killed"].values()) >= f["size"]["kills"],
    "something was under way when something died": lambda f: f["interrupted"] > 0,
    "every run was taken by the API": lambda f: f["taken"] == f["size"]["tasks"],
    "every run ended, none waits for what has ended": lambda f: (
        f["found"]["lost"] == f["waiting_for_nothing"] == f["steps_left_open"] == 0
    ),
    "ended exactly once: all, children too": lambda f: (
        f["found"]["finished_once"] == f["found"]["tasks"] and f["found"]["finished_again"] == 0
    ),
    "all succeeded, but for what was interrupted and must not run twice": lambda f: (
        f["failed_otherwise"] == 0
    ),
    "every run's output is what its calls gave": lambda f: f["outputs_wrong"] == 0,
    "every run has its steps, each once": lambda f: f["steps_wrong"] == f["numbers_wrong"] == 0,
    "every child exactly once, and a step's": lambda f: (
        f["children_wrong"] == f["children_unnamed"] == f["children_missing"] == 0
    ),
    "one key, one run": lambda f: (
        f["submitted"]["changed"] == f["found"]["not_asked_for"] == f["found"]["vendor_only"] == 0
    ),
    "a tool that must not run twice never did": lambda f: f["tools"]["ran_twice"] == 0,
    "no tool ran once its step was done": lambda f: f["tools"]["ran_when_done"] == 0,
    "every call that is done was made, and no other": lambda f: (
        f["tools"]["never_ran"] == f["tools"]["unasked"] == 0
    ),
    "each turn billed once, and not asked for again": lambda f: (
        f["found"]["billed_twice"] == f["found"]["called_after_bill"] == 0
        and f["found"]["answered_unbilled"] == 0
    ),
    "overlapping calls of one task = 0": lambda f: f["found"]["overlaps"] == 0,
    "the vendor's calls are the attempts": lambda f: (
        f["found"]["answers_unaccounted"] == f["found"]["calls_without_attempt"] == 0
        and f["found"]["attempts_without_call"] == 0
    ),
    "cost = sum over attempts, of a workflow over all below it": lambda f: (
        f["found"]["sums_wrong"] == f["costs_wrong"] == f["workflow_costs_wrong"] == 0
    ),
    "attempts left open, tasks left owned = 0": lambda f: (
        f["found"]["left_open"] == f["found"]["still_owned"] == 0
    ),
}

COLUMNS = {
    "run": "run",
    "runs": "runs",
    "steps": "steps",
    "tasks": "tasks",
    "wrong": "wrong",
    "median_s": "median s",
    "longest_s": "longest s",
}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(found["runs"])


def run(clusters: Callable[..., AbstractContextManager[Cluster]], is_short: bool) -> dict[str, Any]:
    size = SHORT if is_short else FULL
    bodies = [body(number) for number in range(size.tasks)]
    with clusters(names=NAMES, copies=COPIES, settings={"APPS": "tests.chaos"}) as cluster:
        audit.install(cluster)
        cluster.rows(INSTALL)
        httpx.post(f"{cluster.sandbox_url}/_faults", json=kills.FAULT).raise_for_status()
        order = victims([name for name in cluster.commands if name != "sandbox"], size.kills, SEED)
        with Person(cluster) as person:
            sent = kills.send_and_kill(cluster, bodies, size, order, ended)
        figures = judge(cluster, sent.ids)
    return {
        "size": asdict(size),
        "taken": len(sent.ids),
        "killed": dict(Counter(order)),
        "submitted": sent.answers,
        "decided": dict(person.decided),
        "interrupted": person.decided["unknown"]
        + figures["found"]["attempt_states"].get("unknown", 0)
        + figures["found"]["errors"].get("Interrupted", 0),
        "times": sent.times,
        **figures,
    }


class Person(threading.Thread):
    """Decides what waits for a person: lets through what asks, refuses what was interrupted."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(name="person")
        self.cluster = cluster
        # Decisions by what was decided on.
        self.decided = Counter[str]()
        self.is_leaving = threading.Event()

    def __enter__(self) -> "Person":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_leaving.set()
        self.join()

    def run(self) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=self.cluster.base_url, headers=headers, timeout=10) as client:
            while not self.is_leaving.wait(LOOK_S):
                for task_id, step, status in self.cluster.rows(UNDECIDED):
                    self.decide(client, task_id, step, status)

    def decide(self, client: httpx.Client, task_id: str, step: int, status: str) -> None:
        """An answer that was lost is no harm: what is still open is decided at the next look."""
        decision = "approve" if status == "approval" else "refuse"
        body = {"step": step, "decision": decision, "by": "person"}
        try:
            answer = client.post(f"/v1/tasks/{task_id}/decide", json=body)
        except httpx.HTTPError:
            return
        self.decided[status] += answer.status_code == 200


def ended(cluster: Cluster) -> int:
    return int(cluster.rows(ENDED)[0][0])


def judge(cluster: Cluster, ids: Mapping[int, str]) -> dict[str, Any]:
    """What became of the runs that were sent. Read when nothing is under way any more."""
    below = [task_id for (task_id,) in cluster.rows(BELOW)]
    told = {**ids, **{len(ids) + n: task_id for n, task_id in enumerate(below)}}
    sizes = {root: (name, tasks, steps) for root, name, tasks, steps in cluster.rows(SIZES)}
    [(unnamed, missing)] = cluster.rows(CHILDREN)

    def count(sql: str) -> int:
        return int(cluster.rows(sql)[0][0])

    return {
        "found": audit.figures(cluster, told),
        "failed_otherwise": count(FAILED),
        "waiting_for_nothing": count(WAITING_FOR_NOTHING),
        "steps_left_open": count(STEPS_LEFT_OPEN),
        "numbers_wrong": count(NUMBERS),
        "steps_wrong": sum(RUNS[name].steps != steps for name, _, steps in sizes.values()),
        "children_wrong": sum(RUNS[name].tasks != tasks for name, tasks, _ in sizes.values()),
        "children_unnamed": unnamed,
        "children_missing": missing,
        "costs_wrong": count(COSTS),
        "workflow_costs_wrong": count(WORKFLOW_COSTS),
        "outputs_wrong": sum(not is_right(cluster, n, task_id) for n, task_id in ids.items()),
        "tools": tools(dict(cluster.rows(RAN)), cluster.rows(CALLS)),
        "runs": shown(cluster, sizes),
    }


def is_right(cluster: Cluster, number: int, task_id: str) -> bool:
    """Whether a run gave what its calls gave."""
    task = cluster.task(task_id)
    wanted = RUNS[task["metadata"]["run"]].output(f"r{number}")
    return bool(task["output"]) and output_of(task) == wanted


def output_of(task: Mapping[str, Any]) -> Any:
    if task["kind"] == "workflow":
        return task["output"]["value"]
    return task["output"]["choices"][0]["message"]["content"]


def tools(ran: Mapping[str, Sequence[Any]], calls: Sequence[Sequence[Any]]) -> dict[str, int]:
    """What tools did, beside what the rows say. `ran`: when, by key."""
    found = Counter(runs=sum(map(len, ran.values())), calls=0)
    asked = set()
    for key, name, status, finished_at in calls:
        times = ran.get(key, [])
        asked.add(key)
        found["calls"] += 1
        found["ran_again"] += max(0, len(times) - 1)
        found["ran_twice"] += len(times) > 1 and name not in MAY_RUN_AGAIN
        found["ran_when_done"] += any(finished_at is not None and at > finished_at for at in times)
        found["never_ran"] += not times and status in ("done", "succeeded")
    found["unasked"] = len(set(ran) - asked)
    return dict(found)


def shown(cluster: Cluster, sizes: Mapping[str, tuple[str, int, int]]) -> list[dict[str, Any]]:
    """A line for each kind of run."""
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for name, took in cluster.rows(TIMES):
        seconds[name].append(took)
    lines = []
    for name, meant in RUNS.items():
        mine = [(tasks, steps) for run, tasks, steps in sizes.values() if run == name]
        lines.append(
            {
                "run": name,
                "runs": len(mine),
                "steps": sum(steps for _, steps in mine),
                "tasks": sum(tasks for tasks, _ in mine),
                "wrong": sum(size != (meant.tasks, meant.steps) for size in mine),
                "median_s": round(statistics.median(seconds[name] or [0.0]), 2),
                "longest_s": round(max(seconds[name], default=0.0), 2),
            }
        )
    return lines
