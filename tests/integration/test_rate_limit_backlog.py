"""A backlog under limits, minutes of it on a simulated clock: how much of the limit is used, how
long those wait that somebody waits for, and whether large calls get their turn."""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from llmtasks.guards.rules import Rule
from tests import simulated
from tests.benchmarks.tables import percentile
from tests.simulated import Limiter, Vendor, units, window_us

MS = 1000
S = 1_000_000
SPREAD = 0.02


@pytest.fixture
def limiter(redis: Any) -> Iterator[Callable[[list[Rule]], Limiter]]:
    with pytest.MonkeyPatch.context() as patch:
        yield lambda held: Limiter(redis, held, patch)


@dataclass(frozen=True)
class Call:
    """`estimate`: how many times more than it uses a call reserves."""

    given: int = 10
    made: int = 10
    estimate: float = 1.0
    lasts_us: int = 300 * MS


@dataclass
class Traffic:
    """Clients that ask, wait as they are told, call and ask again; events in the order of time."""

    limiter: Limiter
    vendor: Vendor = field(default_factory=Vendor)
    dice: random.Random = field(default_factory=lambda: random.Random(7))
    events: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    waits_us: list[int] = field(default_factory=list)
    large: int = 0
    asked: int = 0

    def at(self, time_us: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (int(time_us), next(self.numbers), do))

    def run(self, until_us: int) -> None:
        while self.events and self.events[0][0] <= until_us:
            time_us, _, do = heapq.heappop(self.events)
            self.limiter.set(max(time_us, self.limiter.now_us))
            do()

    def begin(self, call: Call, urgent: bool, then: Callable[[], None]) -> None:
        """Ask until the call is let through, call, and then go on."""
        came_us = patient_since_us = self.limiter.now_us
        need = simulated.need(
            int(call.given * call.estimate), int(call.made * call.estimate), 1 / call.estimate
        )

        def ask(has_waited: bool = False) -> None:
            nonlocal patient_since_us
            grant = self.limiter.grant(
                need, urgent=urgent, patience_s=30.0 if urgent else 2.0, has_waited=has_waited
            )
            self.asked += 1
            if wait_us := self.limiter.wait_us(grant):
                again_us = self.limiter.now_us + wait_us * (1 + self.dice.uniform(0, SPREAD))
                has_patience = urgent or again_us <= patient_since_us + 2 * S
                if not has_patience:
                    # Back to waiting, to come again as one who did not wait.
                    patient_since_us = int(again_us)
                self.at(again_us, lambda: ask(has_patience))
                return
            now_us = self.limiter.now_us
            if urgent:
                self.waits_us.append(now_us - came_us)
            arrives_us = now_us + self.dice.randint(1, 40) * MS
            self.vendor.arrive(arrives_us, units(call.given, call.made))

            def end() -> None:
                self.limiter.settle(grant, call.given, call.made)
                then()

            self.at(arrives_us + call.lasts_us, end)

        ask()

    def backlog(self, calls: Callable[[], Call]) -> None:
        """A client that always has more to do."""
        self.begin(calls(), False, lambda: self.backlog(calls))

    def interactive(self, calls: Callable[[], Call], a_second: float) -> None:
        """People who come at random, so many a second."""

        def come() -> None:
            self.begin(calls(), True, lambda: None)
            self.at(self.limiter.now_us + self.dice.expovariate(a_second) * S, come)

        self.at(self.limiter.now_us, come)

    def share(self, one: Rule, since_us: int) -> float:
        """Of what the limit allows since then, how much was used."""
        now_us = self.limiter.now_us
        allowed = one.amount * (now_us - since_us) / window_us(one)
        return self.vendor.total(one.unit, since_us, now_us) / allowed

    @property
    def p99_s(self) -> float:
        return percentile(self.waits_us, 99) / S


def check(traffic: Traffic, binding: Rule, least: float) -> None:
    for one in traffic.limiter.rules:
        assert traffic.vendor.peak(one.unit, window_us(one)) <= one.amount, one.name
    assert traffic.share(binding, simulated.START_US + 60 * S) >= least


def test_requests_are_used_up_and_people_hardly_wait(limiter: Any) -> None:
    requests = simulated.rule("requests", 300, "minute")
    per_second = simulated.rule("requests", 12, "second", number=2)
    traffic = Traffic(limiter([requests, per_second]))
    for _ in range(12):
        traffic.at(simulated.START_US, lambda: traffic.backlog(Call))
    traffic.interactive(Call, a_second=0.3)
    traffic.run(simulated.START_US + 180 * S)
    check(traffic, requests, 0.97)
    assert len(traffic.waits_us) > 30
    assert traffic.p99_s <= 0.5
    # They come one after the other, not all of them whenever there is room for one.
    assert traffic.asked <= 4 * len(traffic.vendor.calls)


def test_tokens_are_used_up_and_people_hardly_wait(limiter: Any) -> None:
    tokens = simulated.rule("tokens", 60_000, "minute")
    traffic = Traffic(limiter([tokens]))

    def calls() -> Call:
        return Call(traffic.dice.randint(20, 200), traffic.dice.randint(20, 200), estimate=1.5)

    for _ in range(12):
        traffic.at(simulated.START_US, lambda: traffic.backlog(calls))
    traffic.interactive(calls, a_second=0.3)
    traffic.run(simulated.START_US + 180 * S)
    check(traffic, tokens, 0.97)
    assert traffic.p99_s <= 0.5


def test_a_second_is_used_but_for_what_may_come_late(limiter: Any) -> None:
    """The tenth of a second that calls may be late is a tenth of this window."""
    requests = simulated.rule("requests", 40, "second")
    traffic = Traffic(limiter([requests]))
    for _ in range(20):
        traffic.at(simulated.START_US, lambda: traffic.backlog(Call))
    traffic.run(simulated.START_US + 70 * S)
    check(traffic, requests, 0.88)


@pytest.mark.parametrize("urgent", [False, True])
def test_a_large_call_gets_its_turn_among_small_ones(limiter: Any, urgent: bool) -> None:
    """A thirtieth of the limit, while small calls would take all that becomes free."""
    tokens = simulated.rule("tokens", 60_000, "minute")
    traffic = Traffic(limiter([tokens]))
    for _ in range(12):
        traffic.at(simulated.START_US, lambda: traffic.backlog(lambda: Call(60, 60)))
    traffic.run(simulated.START_US + 70 * S)
    ended: list[int] = []
    traffic.begin(Call(1000, 1000), urgent, lambda: ended.append(traffic.limiter.now_us))
    traffic.run(simulated.START_US + 80 * S)
    assert len(ended) == 1
    check(traffic, tokens, 0.95)
