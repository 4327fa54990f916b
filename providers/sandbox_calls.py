"""What the sandbox remembers of the calls that it got."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

MAX_TASKS: Final = 100_000  # remembered, 0.4 KB each; the oldest are forgotten


class Tally:
    """How often a task called, and what a vendor would bill for it."""

    __slots__ = (
        "answered", "calls", "failures", "hung_up", "input_tokens", "output_tokens", "overlaps",
        "under_way",
    )  # fmt: skip

    def __init__(self) -> None:
        self.calls = 0  # requests that came in
        self.answered = 0  # requests whose whole answer went out
        self.failures = 0  # answers of 503 by flaky-<n>
        self.hung_up = 0  # clients that left before their answer was out
        self.overlaps = 0  # calls that began while another of the same task was under way
        self.under_way = 0
        self.input_tokens = 0  # of every answer that was made, cut ones too
        self.output_tokens = 0

    def shown(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class Call:
    """One call under way, counted for its task and in total."""

    __slots__ = ("made", "tallies")

    def __init__(self, *tallies: Tally) -> None:
        self.tallies = tallies
        self.made = 0  # output tokens so far

    @property
    def task(self) -> Tally:
        return self.tallies[0]

    def bill(self, given: int, made: int) -> None:
        self.made += made
        for tally in self.tallies:
            tally.input_tokens += given
            tally.output_tokens += made

    def fail(self) -> None:
        for tally in self.tallies:
            tally.failures += 1

    def answer(self) -> None:
        for tally in self.tallies:
            tally.answered += 1


class Ledger:
    """All tallies. Touched by the server's loop alone."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total = Tally()
        self.tasks: OrderedDict[str, Tally] = OrderedDict()

    def of(self, task: str) -> Tally:
        tally = self.tasks.get(task)
        if tally is None:
            tally = self.tasks[task] = Tally()
            if len(self.tasks) > MAX_TASKS:
                self.tasks.popitem(last=False)
        return tally

    @contextlib.contextmanager
    def call(self, task: str) -> Iterator[Call]:
        """Overlaps are counted per task, and in total as their sum; a call of no task has none."""
        tally, total = self.of(task), self.total
        overlaps = bool(task) and tally.under_way > 0
        for counted in (tally, total):
            counted.calls += 1
            counted.under_way += 1
            counted.overlaps += overlaps
        try:
            yield Call(tally, total)
        except asyncio.CancelledError:
            tally.hung_up += 1
            total.hung_up += 1
            raise
        finally:
            tally.under_way -= 1
            total.under_way -= 1
