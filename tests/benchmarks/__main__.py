"""`python -m tests.benchmarks`: interleaved rounds, medians, tables, and JSON for later."""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from project.stack import processes
from project.stack.errors import Stopped
from tests.benchmarks import (
    agents,
    application,
    dispatch,
    inline,
    limiter,
    load,
    machine,
    queued,
    tables,
    upstream,
)
from tests.benchmarks.application import Application

ROOT = Path(__file__).parents[2]
DELAYS_MS = (0, 50)


@dataclass(frozen=True)
class Plan:
    rounds: int
    concurrency: tuple[int, ...]
    seconds: int
    idle_posts: int
    queued_tasks: int
    # By how much the other benchmarks are made smaller.
    shrink: int = 1

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        return tuple((delay, count) for delay in DELAYS_MS for count in self.concurrency)


FULL = Plan(rounds=3, concurrency=(1, 8, 32, 128), seconds=6, idle_posts=40, queued_tasks=2000)
QUICK = Plan(rounds=1, concurrency=(1, 8), seconds=1, idle_posts=5, queued_tasks=100, shrink=20)
LIMITER_CALLS = 4000


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument(
        "what",
        nargs="?",
        choices=("application", "agents", "dispatch", "limiter"),
        default="application",
        help="the whole application (default), what agents and workflows cost beside their calls,"
        " the dispatcher on a million waiting tasks, or what the limiter adds to a call",
    )
    parser.add_argument("--quick", action="store_true", help="see that it works: under a minute")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--upstream", choices=("nginx", "sandbox"), help="default: nginx")
    parser.add_argument("--out", type=Path, default=ROOT / ".data" / "bench")
    return parser.parse_args(arguments)


def main() -> int:
    given = options()
    for name in ("DATABASE_URL", "REDIS_URL"):
        if not os.environ.get(name):
            raise SystemExit(f"{name} is not set: run `make bench`, which starts servers")
    plan = QUICK if given.quick else FULL
    began = time.monotonic()
    found = machine.facts(os.environ["DATABASE_URL"])
    if not given.quick:
        machine.require_durable(found)
    given.out.mkdir(parents=True, exist_ok=True)
    # A signal to end is an exception, so that all that was started is ended.
    processes.raise_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="llmtasks-bench-"))
    try:
        if given.what == "dispatch":
            figures = run_dispatch(given.quick, folder)
        elif given.what == "agents":
            figures = run_agents(given.quick, given.rounds or plan.rounds, folder)
        elif given.what == "limiter":
            figures = run_limiter(given.rounds or plan.rounds, LIMITER_CALLS // plan.shrink)
        else:
            figures = run(plan, given.rounds or plan.rounds, folder, given.upstream)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {**found, "quick": given.quick, **figures}
    result["seconds"] = round(time.monotonic() - began, 1)
    stamp = found["date"].replace(":", "").replace("+0000", "Z")
    name = stamp if given.what == "application" else f"{stamp}-{given.what}"
    path = given.out / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    say(f"{result['seconds']:.0f} s; {path}")
    return 0


def run(plan: Plan, rounds: int, folder: Path, wanted: str | None) -> dict[str, Any]:
    """Start everything, measure round by round, end everything."""
    environment = application.environment()
    os.environ.update(environment)
    vendor = upstream.start(folder, DELAYS_MS, environment, wanted)
    app = Application(folder, environment, application.configure(vendor, DELAYS_MS))
    try:
        app.start()
        with psycopg.connect(environment["DATABASE_URL"], autocommit=True) as database:
            warm_up(app, database, vendor, plan)
            found = [measure(app, database, vendor, plan, number) for number in range(rounds)]
    except SystemExit:
        keep_logs(folder)
        raise
    finally:
        app.stop()
        vendor.child.stop()
    return {
        "upstream": vendor.kind,
        "load": load.generator(),
        "rounds": rounds,
        "web": {"processes": app.places.web_workers, "threads": app.places.web_threads},
        "inline": [tables.medians(cell) for cell in zip(*(one for one, _ in found), strict=True)],
        "queue": tables.medians([one for _, one in found]),
    }


def run_dispatch(quick: bool, folder: Path) -> dict[str, Any]:
    environment = application.environment()
    os.environ.update(environment)
    try:
        return {
            "dispatch": dispatch.run(
                dispatch.QUICK if quick else dispatch.FULL, folder, environment
            )
        }
    except SystemExit:
        keep_logs(folder)
        raise


def run_agents(quick: bool, rounds: int, folder: Path) -> dict[str, Any]:
    environment = agents.environment()
    os.environ.update(environment)
    try:
        plan = agents.QUICK if quick else agents.FULL
        return {"agents": agents.run(plan, rounds, folder, environment)}
    except SystemExit:
        keep_logs(folder)
        raise


def run_limiter(rounds: int, calls: int) -> dict[str, Any]:
    environment = application.environment()
    os.environ.update(environment)
    limiter.configure()
    found = [limiter.measure(environment["REDIS_URL"], calls) for _ in range(rounds)]
    return {"limiter": [tables.medians(cell) for cell in zip(*found, strict=True)]}


def warm_up(
    app: Application,
    database: "psycopg.Connection[Any]",
    vendor: upstream.Upstream,
    plan: Plan,
) -> None:
    """Connections, caches and threads are made; nothing is kept of it."""
    levels = tuple((delay, plan.concurrency[-1]) for delay in DELAYS_MS)
    list(inline.cells(app, vendor, database, levels, 1, "warm"))
    queued.measure(app, database, 2, 20, "warm")


def measure(
    app: Application,
    database: "psycopg.Connection[Any]",
    vendor: upstream.Upstream,
    plan: Plan,
    number: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    say(f"round {number + 1}…")
    name = f"round-{number + 1}"
    cells = list(inline.cells(app, vendor, database, plan.levels, plan.seconds, name))
    return cells, queued.measure(app, database, plan.idle_posts, plan.queued_tasks, name)


def keep_logs(folder: Path) -> None:
    for log in sorted(folder.glob("*.log")):
        if text := log.read_text(errors="replace")[-2000:].strip():
            sys.stderr.write(f"--- {log.name}\n{text}\n")


def show(result: dict[str, Any]) -> None:
    place = result["machine"]
    say(
        f"\n{result['date']}, {result['commit']}: {place['cores']} cores ({place['cpu']}), "
        f"{place['memory_gb']} GB, Python {place['python']}, "
        f"PostgreSQL {result['postgres']['server_version']} "
        f"(fsync {result['postgres']['fsync']})"
    )
    if "dispatch" in result:
        show_dispatch(result["dispatch"])
        return
    if "agents" in result:
        show_agents(result["agents"])
        return
    if "limiter" in result:
        say(tables.table("limiter", result["limiter"], limiter.COLUMNS))
        return
    say(f"upstream {result['upstream']}, load by {result['load']}, {result['rounds']} rounds\n")
    say(tables.table("inline", result["inline"], inline.COLUMNS))
    say(tables.table("queued, one worker", [result["queue"]], queued.COLUMNS))


def show_agents(found: dict[str, Any]) -> None:
    say(tables.table("agents", [found["loop"]], agents.COLUMNS))
    say(tables.table("waiting for results", [found["blocked"]], agents.COLUMNS_OF_BLOCKED))
    say(tables.table("fan-out", [found["fan_out"]], agents.COLUMNS_OF_FAN))
    for name, held in found["aims"].items():
        say(f"  {'holds ' if held else 'MISSED'}  {name} <= {agents.AIMS[name]:g}")


def show_dispatch(found: dict[str, Any]) -> None:
    say(f"two queues of {found['slots']} slots, one dispatcher\n")
    say(tables.table("releases", found["releases"], dispatch.COLUMNS_OF_RELEASES))
    say(tables.table("idle", found["idle"], dispatch.COLUMNS_OF_IDLE))
    say(f"another leads and releases after a kill -9: {found['handover']['handovers_s']} s\n")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Stopped:
        raise SystemExit(130) from None
