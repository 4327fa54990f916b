"""Functions that are called at their time, by one thread for the whole process.

What waits needs no thread of its own, and costs its caller no switch of threads; what is called
off costs its place in a heap until its time. A function here is short and waits for nothing.
"""

import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Alarm:
    """A function and its moment (monotonic)."""

    __slots__ = ("function", "moment")

    def __init__(self, moment: float, function: Callable[[], object]) -> None:
        self.moment = moment
        self.function: Callable[[], object] | None = function

    def call_off(self) -> None:
        """It is called no more, unless it is being called now."""
        self.function = None


class Alarms:
    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Alarm]] = []
        self.numbers = itertools.count()
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def at(self, moment: float, function: Callable[[], object]) -> Alarm:
        alarm = Alarm(moment, function)
        with self.changed:
            # Of those of one moment the first given comes first.
            heapq.heappush(self.heap, (moment, next(self.numbers), alarm))
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, name="alarms", daemon=True)
                self.thread.start()
            elif self.heap[0][2] is alarm:
                self.changed.notify()
        return alarm

    def run(self) -> None:
        while True:
            function = self.next_due()
            try:
                function()
            except Exception:
                log.exception("an alarm failed")

    def next_due(self) -> Callable[[], object]:
        """Wait for the next function whose time has come."""
        with self.changed:
            while True:
                left = self.heap[0][0] - time.monotonic() if self.heap else None
                if left is None or left > 0:
                    self.changed.wait(left)
                elif (function := heapq.heappop(self.heap)[2].function) is not None:
                    return function


_alarms = Alarms()


def at(moment: float, function: Callable[[], object]) -> Alarm:
    """Have it called at `moment` (monotonic), or at once where that has passed."""
    return _alarms.at(moment, function)


def _start_anew() -> None:
    """After a fork the thread is the parent's."""
    global _alarms
    _alarms = Alarms()


os.register_at_fork(after_in_child=_start_anew)
