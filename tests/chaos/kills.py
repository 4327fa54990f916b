"""kill -9 of workers, dispatchers, web and beat, again and again, while tasks come in and run.

Each kill comes in the middle of a burst: its share of the tasks is sent, and a moment later, while
some are on their way in, some released and some with the vendor, a program is killed. The same
load then goes to plain Celery (`control.py`), whose workers are killed as often.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import httpx

from tests.acceptance.cluster import LANES, NAMES, Cluster, chat
from tests.chaos import audit, control
from tests.chaos.bursts import AT_WORK, WORK_S, Bursts, Size, victims
from tests.chaos.submit import Submitter, until, while_moving

# Long enough to be hit, short enough for many: a kill finds calls under way and hints on the way.
MODELS = (
    *("echo", "slow-50", "slow-50", "slow-100", *3 * ("slow-200",)),
    *("claude-echo", "claude-slow-50", "claude-slow-100", *3 * ("claude-slow-200",)),
)
# The vendor's own trouble meanwhile: some calls must be tried again.
FAULT = {"model": "*", "kind": "error-503", "share": 0.02}
SEED = 20

RUNS = """
SELECT count(*) FROM llmtasks_task t JOIN llmtasks_worker w ON w.id = t.owner_id
WHERE t.status = 'running' AND w.pid = %s
"""


FULL = Size(
    tasks=20_000,
    kills=205,
    copies=2,
    kill_after_s=(0.0, 0.15),
    down_s=(0.0, 0.5),
    up_s=(0.2, 1.2),
    quiet_s=60.0,
)
SHORT = Size(
    tasks=600,
    kills=12,
    copies=1,
    kill_after_s=(0.0, 0.15),
    down_s=(0.0, 0.2),
    up_s=(0.0, 0.4),
    quiet_s=60.0,
)

CONDITIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "as many kills as were meant": lambda f: sum(f["killed"].values()) >= f["size"]["kills"],
    "calls were under way when something died": lambda f: (
        f["ours"]["attempt_states"].get("unknown", 0) > 0
    ),
    "every task was taken by the API": lambda f: f["ours"]["tasks"] == f["size"]["tasks"],
    "lost = 0": lambda f: f["ours"]["lost"] == 0,
    "finished exactly once: all": lambda f: f["ours"]["finished_once"] == f["size"]["tasks"],
    "no final state was left": lambda f: f["ours"]["finished_again"] == 0,
    "failed, but for five calls that died = 0": lambda f: f["ours"]["failed_early"] == 0,
    "one key, one task": lambda f: (
        f["submitted"]["changed"] == f["ours"]["not_asked_for"] == f["ours"]["vendor_only"] == 0
    ),
    "settled as billed more than once = 0": lambda f: f["ours"]["billed_twice"] == 0,
    "succeeded without a bill = 0": lambda f: f["ours"]["answered_unbilled"] == 0,
    "overlapping calls of one task = 0": lambda f: f["ours"]["overlaps"] == 0,
    "answers of the vendor that no attempt shows = 0": lambda f: (
        f["ours"]["answers_unaccounted"] == f["ours"]["calls_without_attempt"] == 0
    ),
    "every settled attempt was a call": lambda f: f["ours"]["attempts_without_call"] == 0,
    "cost = sum over attempts": lambda f: f["ours"]["sums_wrong"] == 0,
    "attempts left open, tasks left owned = 0": lambda f: (
        f["ours"]["left_open"] == f["ours"]["still_owned"] == 0
    ),
    "the control failed by nothing but its kills": lambda f: (
        f["control"]["failed"] == f["control"]["left_in_broker"] == 0
    ),
}

COLUMNS = {
    "name": "",
    "tasks": "tasks",
    "kills": "kills",
    "lost": "lost",
    "answered_again": "answered again",
    "billed_twice": "billed twice",
    "overlaps": "overlaps",
    "seconds": "s",
}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    kills = sum(found["killed"].values())
    ours = {"name": "llmtasks", "kills": kills, **found["ours"]}
    plain = {"name": "plain Celery", "billed_twice": None, **found["control"]}
    return [{field: row[field] for field in COLUMNS} for row in (ours, plain)]


def run(clusters: Callable[..., AbstractContextManager[Cluster]], is_short: bool) -> dict[str, Any]:
    size = SHORT if is_short else FULL
    dice = random.Random(SEED)
    bodies = [
        chat(dice.choice(MODELS), f"task {n}", lane=LANES[n % 3], metadata={"n": n})
        for n in range(size.tasks)
    ]
    copies = {"worker-default": size.copies, "dispatcher": size.copies}
    with clusters(names=(*NAMES, "beat"), copies=copies) as cluster:
        audit.install(cluster)
        httpx.post(f"{cluster.sandbox_url}/_faults", json=FAULT).raise_for_status()
        names = [name for name in cluster.commands if name != "sandbox"]
        order = victims(names, size.kills, SEED)
        found = ours(cluster, bodies, size, order)
        place = control.Place(cluster.folder, cluster.environment["REDIS_URL"], cluster.environment)
        # Nothing more is asked of them.
        for name in list(cluster.running):
            cluster.kill9(name)
    found["control"] = control.run(place, bodies, size, order, FAULT)
    return {"size": asdict(size), "killed": dict(Counter(order)), **found}


def ours(
    cluster: Cluster, bodies: list[dict[str, Any]], size: Size, order: list[str]
) -> dict[str, Any]:
    sent = send_and_kill(cluster, bodies, size, order, audit.finished)
    return {
        "submitted": sent.answers,
        "ours": {
            **audit.figures(cluster, sent.ids),
            **sent.times,
        },
    }


@dataclass(frozen=True)
class Sent:
    ids: dict[int, str]
    answers: dict[str, Any]
    times: dict[str, Any]


def send_and_kill(
    cluster: Cluster,
    bodies: list[dict[str, Any]],
    size: Size,
    order: list[str],
    finished: Callable[[Cluster], int],
) -> Sent:
    """Send all while programs are killed, and wait until `finished` counts as many, or nothing
    moves any more."""
    bursts = Bursts(size, SEED)
    began = time.monotonic()
    with Submitter(cluster.base_url, bodies, bursts.may_send) as submitter:

        def wait_for_work(name: str) -> None:
            taken = len(submitter.ids)
            until(lambda: is_at_work(cluster, name, len(submitter.ids) > taken), WORK_S, 0.02)

        def wait_until_sent() -> None:
            sent = partial(bursts.is_sent, submitter.ids)
            while_moving(sent, lambda: len(submitter.ids), size.quiet_s, 0.05)

        def progress() -> tuple[int, int]:
            return len(submitter.ids), finished(cluster)

        bursts.run(order, cluster.kill9, cluster.start, wait_for_work, wait_until_sent)
        loop_s, sent_in_loop = round(time.monotonic() - began, 1), len(submitter.ids)
        cluster.start_all()
        while_moving(lambda: progress() == (size.tasks, size.tasks), progress, size.quiet_s)
    seconds = round(time.monotonic() - began, 1)
    return Sent(
        submitter.ids,
        {"answers": dict(submitter.answers), "changed": len(submitter.changed)},
        {"sent_in_loop": sent_in_loop, "kill_loop_s": loop_s, "seconds": seconds},
    )


def is_at_work(cluster: Cluster, name: str, has_taken: bool) -> bool:
    """A worker runs some tasks, the web server takes some; the others are never idle."""
    if name.startswith("worker"):
        return bool(cluster.rows(RUNS, [cluster.running[name].pid])[0][0] >= AT_WORK)
    return has_taken or name != "web"
