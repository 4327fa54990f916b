"""Starting processes so that they are found again, and ending those and no others.

Everything that a stack starts carries `LLMTASKS_STACK=<its .data>` in its environment, and so
does what that starts in turn. What carries it is ours, whatever became of its parent; nothing
else is ever signalled. On Linux the kernel tells each child when the owner dies, so that even
a kill -9 of the owner leaves nothing for long.
"""

import contextlib
import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from project.stack.errors import Stopped
from project.stack.layout import ROOT

MARK = "LLMTASKS_STACK"
PART = "LLMTASKS_STACK_PART"
SERVER = "server"  # Postgres and Valkey
PROGRAM = "program"  # what runs on them, and its process manager

PR_SET_PDEATHSIG = 1
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def marked(data: Path, part: str, environment: Mapping[str, str]) -> dict[str, str]:
    return {**environment, MARK: str(data), PART: part}


def find(data: Path, part: str | None = None) -> list[psutil.Process]:
    """The running processes of the stack in `data`, ourselves excepted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if environment.get(MARK) == str(data) and part in (None, environment.get(PART)):
                found.append(process)
    return found


def end_all(data: Path) -> int:
    """End what is left of a stack, programs before the servers that they use."""
    return end(data, PROGRAM, patience_s=40.0) + end(data, SERVER, patience_s=60.0)


def end(data: Path, part: str, patience_s: float) -> int:
    """End one part of a stack: asked first, then killed. Returns how many processes it had."""
    # Postgres takes SIGINT for "end now, in order", where SIGTERM waits for its clients.
    polite = signal.SIGINT if part == SERVER else signal.SIGTERM
    processes = find(data, part)
    count = len(processes)
    send(roots(processes), polite)
    psutil.wait_procs(processes, timeout=patience_s)
    deadline = time.monotonic() + 10
    while (processes := find(data, part)) and time.monotonic() < deadline:
        send(processes, signal.SIGKILL)
        psutil.wait_procs(processes, timeout=1)
    return count


def roots(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those whose parent isn't among them: a parent ends its children itself, in order."""
    pids = {process.pid for process in processes}
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.ppid() not in pids:
                found.append(process)
    return found


def send(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        # psutil compares the start time first: a pid that was given anew is left alone.
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def end_with_parent(number: int) -> None:
    """Have the kernel send us a signal when our parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def raise_on_signals() -> None:
    """From now on a signal to end raises `Stopped` in the main thread, once."""

    def stop(number: int, frame: object) -> None:
        ignore_signals()
        raise Stopped(number)

    for number in END_SIGNALS:
        # Under nohup we are to outlive the terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def ignore_signals() -> None:
    """Ending takes a few seconds and must not be cut short by a second Ctrl-C."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def before_exec() -> None:
    """Runs in the new process, which inherits what we ignore and must not."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(signal.SIGTERM)


def before_exec_of_server() -> None:
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(signal.SIGINT)


@dataclass
class Child:
    """A process of ours: a server, the process manager, the preparation."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str]
    user: pwd.struct_passwd | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    patience_s: float = 30.0
    prepare: Callable[[], None] = before_exec
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it in a session of its own: a Ctrl-C at the terminal is for the owner only."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd="/" if self.user else ROOT,
                start_new_session=True,
                preexec_fn=self.prepare,  # the owner has one thread
                user=self.user.pw_uid if self.user else None,
                group=self.user.pw_gid if self.user else None,
                extra_groups=[] if self.user else None,
            )

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        if self.process is None:
            return
        for number, wait_s in ((self.stop_signal, self.patience_s), (signal.SIGKILL, 5.0)):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(wait_s)
        self.process = None


def tail(log: Path, lines: int = 3) -> str:
    """The end of a log for an error message."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return " / ".join(text.strip().splitlines()[-lines:])


def rotate(log: Path, limit: int, kept: int) -> None:
    """Move a log aside that grew over `limit` bytes, keeping `kept` old ones.

    Copied and cut rather than renamed: its writer has it open (for appending).
    """
    if not log.exists() or log.stat().st_size <= limit:
        return
    for number in range(kept, 1, -1):
        older = log.with_name(f"{log.name}.{number - 1}")
        if older.exists():
            older.replace(log.with_name(f"{log.name}.{number}"))
    log.with_name(f"{log.name}.1").write_bytes(log.read_bytes())
    os.truncate(log, 0)
