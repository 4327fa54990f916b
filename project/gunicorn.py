"""gunicorn's settings that are code: how a web process begins and ends
(`--config=python:project.gunicorn`).

Told to end, a process takes what already waits at its door and closes the door, so that a load
balancer turns to another at once. Requests under way get GRACE_S; then their calls are dropped,
and the callers are told to try again.
"""

import signal
import threading
from typing import Any

from django.conf import settings

# After the grace time, to answer those whose calls were dropped.
TELL_S = 5

graceful_timeout = settings.LLMTASKS["GRACE_S"] + TELL_S


def post_worker_init(worker: Any) -> None:
    # Not before Django is set up.
    from llmtasks import memory, sla
    from project import urls  # noqa: F401 reads all that answers requests

    sla.threads = worker.cfg.threads
    memory.keep()

    def told_to_end(number: int, frame: Any) -> None:
        is_first = worker.alive
        worker.handle_exit(number, frame)
        if is_first:
            # A handler may come in the middle of anything: the main loop does the rest.
            worker.method_queue.defer(end, worker)

    signal.signal(signal.SIGTERM, told_to_end)
    signal.siginterrupt(signal.SIGTERM, False)


def end(worker: Any) -> None:
    from llmtasks import pulse  # not before Django is set up

    threading.Thread(target=pulse.drain, name="drain", daemon=True).start()
    worker.set_accept_enabled(False)
    for listener in worker.sockets:
        accept_waiting(worker, listener)
        listener.close()


def accept_waiting(worker: Any, listener: Any) -> None:
    """Connections that the kernel took already: their clients would see them break."""
    before = -1
    while worker.nr_conns != before:
        before = worker.nr_conns
        worker.accept(listener)


def worker_exit(server: Any, worker: Any) -> None:
    """Give the lease up: what is left is taken up at once."""
    from llmtasks import pulse

    pulse.stop()
