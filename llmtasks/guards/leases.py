"""The calls at once that this process holds, renewed while they run: those of a process that died
run out."""

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from django.conf import settings

from llmtasks.guards import meters
from llmtasks.guards.meters import Away

log = logging.getLogger(__name__)


def times() -> dict[str, Any]:
    """What the script is told of leases: how long one lasts, and after which time (us) all that
    are under way were renewed once."""
    given = settings.LLMTASKS
    return {"lease": int(given["LEASE_S"] * 1e6), "quiet": int(given["RENEW_S"] * 1.5e6)}


@dataclass
class Leases:
    held: dict[UUID, list[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    def hold(self, attempt_id: UUID, keys: Iterable[str]) -> None:
        """Renew the attempt's lease in each of these meters until it is dropped."""
        if not (listed := list(keys)):
            return
        self.held[attempt_id] = listed
        # After a fork the thread is the parent's.
        if self.thread is None or not self.thread.is_alive():
            with self.lock:
                if self.thread is None or not self.thread.is_alive():
                    self.thread = threading.Thread(target=self.run, name="leases", daemon=True)
                    self.thread.start()

    def drop(self, attempt_id: UUID) -> None:
        self.held.pop(attempt_id, None)

    def run(self) -> None:
        while True:
            time.sleep(settings.LLMTASKS["RENEW_S"])
            try:
                self.renew()
            except Away:
                continue
            except Exception:
                log.exception("the leases of calls under way can't be renewed")

    def renew(self) -> None:
        """Raises `Away`."""
        pairs = [(key, str(attempt)) for attempt, keys in list(self.held.items()) for key in keys]
        if pairs:
            keys = [key for key, _ in pairs]
            meters.run("renew", keys, {"attempts": [attempt for _, attempt in pairs], **times()})
