"""`run`: a PostgreSQL and a Valkey of their own around one command, thrown away after it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from project.stack import processes
from project.stack.console import say
from project.stack.errors import StackError, Stopped
from project.stack.layout import Layout, locked, remove_sockets
from project.stack.owner import Servers

SLOTS = 16
PASSWORD = "test"  # noqa: S105 - the servers live as long as the command


@contextmanager
def slot(parent: Path) -> Iterator[Layout]:
    """The first numbered folder below `parent` that no other run holds, empty."""
    for number in range(1, SLOTS + 1):
        layout = Layout.at(parent / str(number))
        with locked(layout.lock) as mine:
            if mine:
                clear(layout)
                yield Layout.at(layout.data)
                clear(layout)
                return
    raise StackError(f"{SLOTS} test runs are under way in {parent}: wait for one, or end it")


def clear(layout: Layout) -> None:
    """End what an earlier run left behind (it was killed) and throw its data away."""
    processes.end_all(layout.data)
    remove_sockets(layout)
    for path in layout.data.iterdir():
        if path.is_dir() and path != layout.logs:
            shutil.rmtree(path, ignore_errors=True)


def run(parent: Path, command: list[str], durable: bool) -> int:
    """Run `command` with DATABASE_URL and REDIS_URL of servers started for it."""
    processes.raise_on_signals()
    with slot(parent) as layout:
        servers = Servers(layout, PASSWORD, test=not durable)
        try:
            servers.start()
            return follow(command, servers)
        except Stopped as stopped:
            return 128 + int(stopped.args[0])
        finally:
            processes.ignore_signals()
            servers.stop()


def follow(command: list[str], servers: Servers) -> int:
    """Run it in our own process group, so that Ctrl-C reaches it too; watch the servers."""
    environment = {
        **os.environ,
        "DATABASE_URL": servers.database_url,
        "REDIS_URL": servers.redis_url,
        "LLMTASKS_TEST": "1",
    }
    # Importing `project` set it; pytest would load the settings before tests/conftest.py.
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    try:
        process = subprocess.Popen(command, env=environment, preexec_fn=processes.before_exec)
    except OSError as error:
        raise StackError(f"{command[0]} can't be run: {error.strerror}") from None
    try:
        while True:
            try:
                return exit_status(process.wait(timeout=1.0))
            except subprocess.TimeoutExpired:
                servers.watch()
    except Stopped:
        say("stopping…")
        end_command(process)
        raise


def end_command(process: subprocess.Popen[bytes]) -> None:
    """End it and what it started: a shell that is told to end leaves its commands behind."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    processes.send(below, signal.SIGTERM)
    _, alive = psutil.wait_procs(below, timeout=5)
    processes.send(alive, signal.SIGKILL)


def exit_status(code: int) -> int:
    """As a shell says it: a command that a signal ended has 128 + its number."""
    return 128 - code if code < 0 else code


def main(parent: str, command: list[str], durable: bool = False) -> int:
    if not command:
        sys.stderr.write("run: give a command after --\n")
        return 2
    return run(Path(parent), command, durable)
