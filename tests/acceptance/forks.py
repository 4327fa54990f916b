"""Programs as forks of one process that has imported the product: started in a tenth of the time.

    forks = Forks(environment, log)
    program = forks.start((sys.executable, "manage.py", "dispatcher"), {"PGAPPNAME": "a"}, log)
    program.send_signal(signal.SIGKILL)
    program.wait()

A fork runs the same command's main module, in a process group of its own. What must be in the
environment before Python starts (LD_PRELOAD) needs a process of its own instead.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from project.stack.processes import before_exec

ROOT = Path(__file__).resolve().parent.parent.parent
# What the programs import that Django's own set-up doesn't.
IMPORTED = (
    "celery.__main__",
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.thread",
    "gunicorn.app.wsgiapp",
    "gunicorn.workers.gthread",
    "llmtasks.management.commands.dispatcher",
    "llmtasks.management.commands.sandbox",
    "llmtasks.management.commands.seed_demo",
    "llmtasks.management.commands.worker",
    "project.urls",
)
MESSAGE_BYTES = 65536
# How often it is looked whether a fork ended.
LOOK_S = 0.01
START_S = 60.0


class Forks:
    """The process that forks, seen from the test."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(START_S)
        self.lock = threading.Lock()
        self.codes: dict[int, int] = {}
        with theirs, log.open("ab") as out:
            self.process = subprocess.Popen(
                (sys.executable, "-m", "tests.acceptance.forks", str(theirs.fileno())),
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                preexec_fn=before_exec,
            )

    def start(self, command: Sequence[str], more: Mapping[str, str], log: Path) -> "Fork":
        """Start a Python program, with `more` in its environment."""
        request = {"arguments": command[1:], "more": dict(more), "log": str(log)}
        with self.lock:
            self.channel.send(json.dumps(request).encode())
            while "started" not in (message := self.read()):
                self.codes[message["ended"]] = message["code"]
            self.codes.pop(message["started"], None)
        return Fork(self, message["started"], command)

    def code(self, pid: int) -> int | None:
        """The status of a fork that ended."""
        with self.lock:
            self.channel.setblocking(False)
            try:
                while True:
                    message = self.read()
                    self.codes[message["ended"]] = message["code"]
            except BlockingIOError:
                return self.codes.get(pid)
            finally:
                self.channel.settimeout(START_S)

    def read(self) -> dict[str, Any]:
        raw = self.channel.recv(MESSAGE_BYTES)
        if not raw:
            raise RuntimeError(f"the process that forks ended: {self.process.wait()}")
        message: dict[str, Any] = json.loads(raw)
        return message

    def close(self) -> None:
        """End the process that forks; what it started must have ended."""
        self.channel.close()
        self.process.wait(10)


class Fork:
    """A program that was started, with the methods of `subprocess.Popen`."""

    def __init__(self, forks: Forks, pid: int, command: Sequence[str]) -> None:
        self.forks, self.pid, self.args = forks, pid, command
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.forks.code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
            time.sleep(LOOK_S / 2)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- the process that forks -----------------------------------------------------------------------


def main(channel: socket.socket) -> None:
    import django

    django.setup()
    for name in IMPORTED:
        importlib.import_module(name)
    # Threads and connections would not be whole in a fork.
    if threading.active_count() > 1:
        raise RuntimeError(f"imports started threads: {threading.enumerate()}")
    gc.freeze()
    request = serve(channel)
    if request is not None:
        run(request)


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns in each fork with its request, and with None at the end."""
    channel.settimeout(LOOK_S)
    while True:
        tell_ended(channel)
        try:
            raw = channel.recv(MESSAGE_BYTES)
        except TimeoutError:
            continue
        if not raw:
            return None
        if not (pid := os.fork()):
            channel.close()
            request: dict[str, Any] = json.loads(raw)
            return request
        # Before it is known, so that its group can be signalled.
        os.setpgid(pid, pid)
        tell(channel, {"started": pid})


def tell_ended(channel: socket.socket) -> None:
    try:
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            tell(channel, {"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})
    except ChildProcessError:
        return


def tell(channel: socket.socket, message: Mapping[str, int]) -> None:
    channel.send(json.dumps(message).encode())


def run(request: Mapping[str, Any]) -> None:
    from llmtasks import crash  # not before Django is set up

    os.setpgid(0, 0)
    before_exec()
    os.environ.update(request["more"])
    with Path(request["log"]).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # The one thing that an import of ours reads from it.
    crash.arm()
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(str(ROOT / first), run_name="__main__")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
