"""`python -m tests.chaos`: runs proofs, prints their tables, writes their figures as JSON."""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from project.stack import processes
from project.stack.errors import Stopped
from tests.acceptance.cluster import Cluster
from tests.benchmarks import machine, tables
from tests.chaos import NotRun

ROOT = Path(__file__).parents[2]
# What each proves; the modules are in this package.
PROOFS = {
    "kills": "kill -9 of every program again and again, beside plain Celery",
    "agents": "kill -9 again and again while agents and workflows run",
    "crash": "kill -9 at each named step, again and again",
    "stores": "Redis and Postgres killed, frozen, emptied, restarted and away, under load",
    "limits": "eight workers, three times the limit, surprise 429s and wrong clocks",
    "traces": "a day of real traffic in minutes, beside a vendor's own bucket",
    "freeze": "SIGSTOP for longer than a lease, with calls under way, and SIGCONT",
}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        epilog="; ".join(f"{name}: {meaning}" for name, meaning in PROOFS.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROOFS)}; or all")
    parser.add_argument("--short", action="store_true", help="a small form, under 90 s each")
    parser.add_argument("--out", type=Path, default=ROOT / ".data" / "bench")
    parser.add_argument(
        "--number", type=int, default=0, help="tells apart what runs at the same time: 0 to 7"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(PROOFS):
        parser.error(f"no such proof: {', '.join(sorted(unknown))}")
    return given


def main() -> int:
    given = options()
    for name in ("DATABASE_URL", "REDIS_URL"):
        if not os.environ.get(name):
            raise SystemExit(f"{name} is not set: run `make chaos`, which starts servers")
    given.out.mkdir(parents=True, exist_ok=True)
    # A signal to end is an exception, so that all that was started is ended.
    processes.raise_on_signals()
    names = given.names or PROOFS
    held = [prove(name, given.short, given.out, given.number) for name in names]
    return 0 if all(held) else 1


def prove(name: str, is_short: bool, out: Path, number: int = 0) -> bool:
    """Run one proof; whether every condition held."""
    module = importlib.import_module(f"tests.chaos.{name}")
    say(f"{name}: {PROOFS[name]}…")
    folder = Path(tempfile.mkdtemp(prefix=f"llmtasks-chaos-{name}-"))
    began = time.monotonic()
    facts = machine.facts(os.environ["DATABASE_URL"])
    try:
        found = module.run(partial(clusters, folder, number), is_short)
    except NotRun as why:
        say(f"{name} was NOT RUN: {why}")
        shutil.rmtree(folder)
        return False
    except BaseException:
        say(f"{name} broke off; logs are in {folder}")
        raise
    holds = {condition: bool(check(found)) for condition, check in module.CONDITIONS.items()}
    # What only a quiet machine can show is judged in full, and told in short.
    aims = {aim: bool(check(found)) for aim, check in getattr(module, "AIMS", {}).items()}
    seconds = round(time.monotonic() - began, 1)
    result = {**facts, "short": is_short, "seconds": seconds, **found}
    result |= {"conditions": holds, "aims": aims}
    path = out / f"chaos-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    show(name, module, found, holds | aims)
    say(f"{seconds:.0f} s; {path}")
    is_held = all(holds.values()) and (is_short or all(aims.values()))
    if is_held:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        say(f"logs are in {folder}")
    return is_held


def clusters(folder: Path, number: int, **given: Any) -> AbstractContextManager[Cluster]:
    """`Cluster.fresh` with its logs in a folder of its own."""
    return Cluster.fresh(Path(tempfile.mkdtemp(dir=folder)), number, **given)


def show(name: str, module: Any, found: Mapping[str, Any], holds: Mapping[str, bool]) -> None:
    say("\n" + tables.table(name, module.rows(found), module.COLUMNS))
    for condition, held in holds.items():
        say(f"  {'holds ' if held else 'FAILED'}  {condition}")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Stopped:
        raise SystemExit(130) from None
