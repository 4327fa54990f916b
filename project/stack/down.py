"""`down`: ends what `up` started and waits until all of it is gone."""

import signal
import time
from pathlib import Path

import psutil

from project.stack import processes
from project.stack.console import say
from project.stack.errors import StackError
from project.stack.layout import Layout, holder, locked, remove_sockets

# Programs, supervisord and Postgres each have their time to end.
PATIENCE_S = 90.0


def down(data: Path | str) -> int:
    layout = Layout(Path(data).resolve())
    if not layout.data.exists():
        say("nothing is running")
        return 0
    owner = holder(layout.lock)
    if owner is not None:
        end_owner(layout, owner)
    with locked(layout.lock) as mine:
        if not mine:
            raise StackError("another `make up` began meanwhile: run make down again")
        left = processes.end_all(layout.data)
        remove_sockets(layout)
    say("everything has ended" if owner is not None or left else "nothing is running")
    return 0


def end_owner(layout: Layout, pid: int) -> None:
    """Ask the owner to end everything; if it doesn't, end it and leave the rest to the caller."""
    try:
        owner = psutil.Process(pid)
        if "project.stack" not in " ".join(owner.cmdline()):
            raise psutil.NoSuchProcess(pid)
        owner.send_signal(signal.SIGTERM)
    except (psutil.NoSuchProcess, ValueError):
        # Its pid means nothing here: it runs in a container, say.
        raise StackError(f"{layout.lock} is held by a process that can't be seen here") from None
    except psutil.AccessDenied:
        raise StackError(
            f"it was started by another user (pid {pid}): run make down as him"
        ) from None
    deadline = time.monotonic() + PATIENCE_S
    while holder(layout.lock) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    if holder(layout.lock) == pid:
        say("it does not end by itself and is killed")
        owner.kill()
        owner.wait(10)
