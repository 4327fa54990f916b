"""Replays of real traffic: an hour of Azure's LLM inference traces of November 2023.

Conversations are interactive, code is bulk, both to one model whose limits are 1.2 times the mean
rate of the whole hour, requests and tokens. Time runs six times as fast, so that the limits are
six times as high; every call has the tokens of its original, in and out. The sandbox enforces the
same limits by its own count, and must refuse nothing.

The data is not in the repository: `shared/data/azure` beside the checkout (CC BY 4.0,
github.com/Azure/AzurePublicDataset, `data/AzureLLMInferenceTrace_{conv,code}.csv`).
"""

import csv
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.acceptance.cluster import Cluster
from tests.benchmarks.tables import percentile
from tests.chaos import NotRun
from tests.chaos.limits import INSERT, counted, steer
from tests.chaos.submit import until
from tests.chaos.traffic import Due, Traffic, chat, text

DATA = Path(__file__).parents[3] / "shared" / "data" / "azure"
# Lane and trace, and how long its callers let an answer become.
LANES = {"interactive": ("conv", 1000), "bulk": ("code", 2000)}
MODEL = "slow-100"
FASTER = 6.0
ABOVE_MEAN = 1.2
NAMES = ("sandbox", "web", "dispatcher", "worker-interactive", "worker-bulk")
COPIES = {"worker-interactive": 2, "worker-bulk": 2}


@dataclass(frozen=True)
class Size:
    """Which minutes of the trace; how long the last of it may take."""

    first: float
    last: float
    patience_s: float


FULL = Size(0.0, 60.0, 300.0)
SHORT = Size(13.0, 17.0, 120.0)

CONDITIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "refused by the vendor's own count = 0": lambda f: f["refused"] == f["refusals_seen"] == 0,
    "no window above the limit": lambda f: all(
        f["peak"][unit] <= f["limit"][unit] for unit in f["limit"]
    ),
    "every call succeeded, at the first try": lambda f: (
        f["succeeded"] == f["calls"] == f["attempts"] > 0
    ),
    "tokens are those of the trace": lambda f: f["tokens"] == f["tokens_meant"],
    "bulk had to wait": lambda f: f["waits"]["bulk"]["most_s"] > 1.0,
}

COLUMNS = {
    "lane": "lane",
    "calls": "calls",
    "p50_s": "wait p50 s",
    "p99_s": "p99 s",
    "most_s": "most s",
    "refused": "429s",
}

ENDED = "SELECT count(*) FROM llmtasks_task WHERE status NOT IN ('waiting', 'queued', 'running')"
SUCCEEDED = "SELECT count(*) FROM llmtasks_task WHERE status = 'succeeded'"
ATTEMPTS = "SELECT count(*), count(*) FILTER (WHERE http_status = 429) FROM llmtasks_attempt"
WAITS = """
SELECT t.lane, extract(epoch FROM min(a.started_at) - t.created_at)::float
FROM llmtasks_task t JOIN llmtasks_attempt a ON a.task_id = t.id GROUP BY t.id
"""


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"lane": lane, "refused": found["refused"], **waits}
        for lane, waits in found["waits"].items()
    ]


@dataclass(frozen=True, order=True)
class Call:
    """`at`: minutes after the trace's first."""

    at: float
    given: int
    made: int
    lane: str

    def due(self, first: float, most: int) -> Due:
        """The user's text comes back as the answer; the rest of the input is the system's."""
        messages = [{"role": "user", "content": text(self.made)}]
        if self.given > self.made:
            filler = {"role": "system", "content": text(self.given - self.made)}
            messages = [filler, *messages]
        body = chat(MODEL, messages, mode="queued", lane=self.lane, input={"max_tokens": most})
        return (self.at - first) * 60 / FASTER, body

    @property
    def tokens(self) -> int:
        return max(self.given, self.made) + self.made


def read() -> list[Call]:
    found = []
    for lane, (name, _) in LANES.items():
        with (DATA / f"AzureLLMInferenceTrace_{name}.csv").open(newline="") as lines:
            for row in csv.DictReader(lines):
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() / 60
                given, made = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                found.append(Call(at, given, made, lane))
    begun = min(call.at for call in found)
    return sorted(Call(call.at - begun, call.given, call.made, call.lane) for call in found)


def limits(calls: list[Call]) -> dict[str, int]:
    """A minute's, of the time that runs faster."""
    minutes = (calls[-1].at - calls[0].at) / FASTER
    return {
        "requests": int(len(calls) / minutes * ABOVE_MEAN),
        "tokens": int(sum(call.tokens for call in calls) / minutes * ABOVE_MEAN),
    }


def run(clusters: Callable[..., AbstractContextManager[Cluster]], is_short: bool) -> dict[str, Any]:
    if not DATA.is_dir():
        raise NotRun(f"no traces in {DATA.relative_to(DATA.parents[2])} beside the checkout")
    size = SHORT if is_short else FULL
    calls = read()
    held = limits(calls)
    calls = [call for call in calls if size.first <= call.at < size.last]
    with clusters(names=NAMES, copies=COPIES) as cluster:
        for unit, amount in held.items():
            values = {"model": MODEL, "unit": unit, "window": "minute", "amount": amount}
            cluster.rows(INSERT, values)
        vendor = {"model": MODEL, "window_s": 60, "enforce": True, "headers": True, **held}
        steer(cluster, "_limits", vendor)
        # Every process reads the limits within a second.
        time.sleep(1.5)
        began = time.monotonic()
        replay(cluster, calls, size)
        seconds = time.monotonic() - began
        return {
            "size": asdict(size),
            "faster": FASTER,
            "limit": held,
            "calls": len(calls),
            "tokens_meant": sum(call.tokens for call in calls),
            "seconds_replayed": round(seconds, 1),
            **figures(cluster),
        }


def replay(cluster: Cluster, calls: list[Call], size: Size) -> None:
    with Traffic(cluster.base_url, callers=1) as traffic:
        for lane, (_, most) in LANES.items():
            traffic.queue(due(calls, lane, size.first, most))
        traffic.join()
        until(lambda: cluster.rows(ENDED)[0][0] >= len(calls), size.patience_s, 0.5)
        assert set(traffic.answers) == {"bulk 200"}, traffic.answers


def due(calls: list[Call], lane: str, first: float, most: int) -> Iterator[Due]:
    for call in calls:
        if call.lane == lane:
            yield call.due(first, most)


def figures(cluster: Cluster) -> dict[str, Any]:
    vendor = counted(cluster)[MODEL, 60.0]
    attempts, refusals = cluster.rows(ATTEMPTS)[0]
    return {
        "refused": vendor["refused"],
        "refusals_seen": refusals,
        "peak": {unit: vendor[f"peak_{unit}"] for unit in ("requests", "tokens")},
        "tokens": vendor["tokens"],
        "is_exact": vendor["is_exact"],
        "succeeded": cluster.rows(SUCCEEDED)[0][0],
        "attempts": attempts,
        "waits": waits(cluster),
    }


def waits(cluster: Cluster) -> dict[str, dict[str, float]]:
    """From the task's creation to the begin of its first attempt, by Postgres's clock."""
    taken: dict[str, list[float]] = {lane: [] for lane in LANES}
    for lane, wait in cluster.rows(WAITS):
        taken[lane].append(wait)
    return {
        lane: {
            "calls": len(mine),
            "p50_s": round(percentile(mine, 50), 3),
            "p99_s": round(percentile(mine, 99), 3),
            "most_s": round(max(mine, default=0.0), 3),
        }
        for lane, mine in taken.items()
    }
