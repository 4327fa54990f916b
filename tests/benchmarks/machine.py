"""Where and what was measured."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import psycopg

ROOT = Path(__file__).parents[2]
DURABLE = ("fsync", "synchronous_commit", "full_page_writes")


def facts(database_url: str) -> dict[str, Any]:
    with psycopg.connect(database_url) as connection:
        settings = {name: show(connection, name) for name in (*DURABLE, "server_version")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cores": os.cpu_count(),
            "cpu": cpu(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "postgres": settings,
    }


def show(connection: "psycopg.Connection[Any]", name: str) -> str:
    row = connection.execute(f"SHOW {name}").fetchone()  # type: ignore[arg-type]
    return str(row[0]) if row else ""


def require_durable(found: dict[str, Any]) -> None:
    """Figures of a server that may lose bills would be worth nothing."""
    for name in DURABLE:
        if found["postgres"][name] != "on":
            raise SystemExit(f"Postgres has {name} = {found['postgres'][name]}: run `make bench`")


def cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def commit() -> str:
    """The commit, with a + where files differ from it; empty outside of a checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()
