"""The limiter's promises, whatever is asked in which order: on a simulated clock."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtasks.guards import rate_limit
from llmtasks.guards.rate_limit import Grant
from llmtasks.guards.rules import Rule
from tests import simulated
from tests.simulated import Limiter, Vendor, units, window_us

MS = 1000
S = 1_000_000

UNITS = ("requests", "tokens", "input_tokens", "output_tokens")


@pytest.fixture
def limiter(redis: Any) -> Iterator[Callable[[list[Rule]], Limiter]]:
    with pytest.MonkeyPatch.context() as patch:
        yield lambda held: Limiter(redis, held, patch)


@st.composite
def limits(draw: st.DrawFn) -> list[Rule]:
    """One to three limits of the same calls."""
    found = []
    for number in range(1, draw(st.integers(1, 3)) + 1):
        unit = draw(st.sampled_from(UNITS))
        amount = draw(st.integers(1, 40) if unit == "requests" else st.integers(1, 4000))
        burst = draw(st.none() | st.integers(1, amount))
        window = draw(st.sampled_from(("second", "minute", "hour")))
        found.append(simulated.rule(unit, amount, window, burst, number))
    return found


@dataclasses.dataclass(frozen=True)
class Step:
    """Wait (as long as the last refusal said, where that is None), then ask for a call of so many
    tokens. It is settled `settled_after` steps later to a share of what it reserved, or never. It
    goes out `held_us` after it was let through, and reaches the vendor `late` (0 to 1 of what is
    allowed) after that."""

    pause_us: int | None
    urgent: bool
    given: int
    made: int
    expected: float
    used: float
    settled_after: int | None
    held_us: int
    late: float
    sent: bool
    twice: bool


pauses = st.one_of(
    st.none(),
    st.just(0),
    st.integers(0, 20 * MS),
    st.integers(0, 2 * S),
    st.integers(0, 90 * S),
    st.just(3 * 3600 * S),
)
steps = st.builds(
    Step,
    pause_us=pauses,
    urgent=st.booleans(),
    given=st.integers(1, 600),
    made=st.integers(0, 600),
    expected=st.floats(0.0, 1.0),
    used=st.floats(0.0, 1.0),
    settled_after=st.none() | st.integers(0, 8),
    held_us=st.just(0) | st.integers(0, 4 * S),
    late=st.sampled_from((0.0, 1.0)) | st.floats(0.0, 1.0),
    sent=st.integers(0, 9).map(lambda n: n > 0),
    twice=st.booleans(),
)

relaxed = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Run:
    """Takes steps, and tells the vendor of every call that was let through."""

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self.vendor = Vendor()
        self.open: list[tuple[int, Grant, Step, dict[str, int]]] = []
        self.slack_us = min(one.slack_us for one in limiter.rules)
        self.told_us = 0

    def step(self, number: int, step: Step) -> None:
        pause_us = self.told_us if step.pause_us is None else step.pause_us
        self.limiter.set(self.limiter.now_us + pause_us)
        self.settle(number)
        need = simulated.need(step.given, step.made, step.expected)
        grant = self.limiter.grant(need, urgent=step.urgent)
        self.told_us = self.limiter.wait_us(grant)
        if self.told_us:
            return
        if step.twice:
            before = self.held()
            assert self.limiter.wait_us(grant) == 0
            assert self.held() == before
        if step.held_us:
            self.hold_up(grant, step.held_us)
        used = units(0, 0) | {"requests": 0}
        if step.sent:
            # Until it is settled it may use all that was reserved.
            used = units(*self.reserved(grant, step))
            self.vendor.arrive(self.limiter.now_us + int(step.late * self.slack_us), used)
        if step.settled_after is not None:
            self.open.append((number + step.settled_after, grant, step, used))

    def hold_up(self, grant: Grant, held_us: int) -> None:
        """The call goes out so much later: as soon as it may."""
        self.limiter.set(self.limiter.now_us + held_us)
        grant.fresh_until = 0.0
        while refusal := rate_limit.freshen(grant):
            self.limiter.set(self.limiter.now_us + int(refusal.wait_s * S) + 1)
            grant.fresh_until = 0.0

    def reserved(self, grant: Grant, step: Step) -> tuple[int, int]:
        """Of a call that is larger than a limit: what it got."""
        given, made = step.given, step.made
        for meter in grant.meters:
            if meter.rule.unit == "input_tokens":
                given = min(given, meter.need)
            if meter.rule.unit == "output_tokens":
                made = min(made, meter.need)
        for meter in grant.meters:
            if meter.rule.unit == "tokens":
                given = min(given, meter.need)
                made = min(made, meter.need - given)
        return given, made

    def settle(self, number: int) -> None:
        for due in [one for one in self.open if one[0] <= number]:
            self.open.remove(due)
            _, grant, step, used = due
            given, made = (int(n * step.used) for n in self.reserved(grant, step))
            for _ in range(1 + step.twice):
                self.limiter.settle(grant, given, made, step.sent)
            used.update(units(given, made) if step.sent else dict.fromkeys(used, 0))

    def held(self) -> list[int]:
        return [self.limiter.used(one) for one in self.limiter.rules]


@relaxed
@given(held=limits(), taken=st.lists(steps, min_size=1, max_size=60))
def test_no_window_ever_holds_more_than_its_limit(
    limiter: Callable[[list[Rule]], Limiter], held: list[Rule], taken: list[Step]
) -> None:
    run = Run(limiter(held))
    for number, step in enumerate(taken):
        run.step(number, step)
    for one in held:
        assert run.vendor.peak(one.unit, window_us(one)) <= one.amount
    # What is held ends: two windows later all of it is free.
    run.limiter.set(run.limiter.now_us + 3 * max(window_us(one) for one in held))
    assert run.held() == [0] * len(held)
    everything = run.limiter.grant(simulated.need(1, 0), urgent=True)
    assert run.limiter.wait_us(everything) == 0


@relaxed
@given(
    held=limits(), taken=st.lists(steps, min_size=1, max_size=40), step=steps, early=st.booleans()
)
def test_a_refusal_says_exactly_when(
    limiter: Callable[[list[Rule]], Limiter],
    held: list[Rule],
    taken: list[Step],
    step: Step,
    early: bool,
) -> None:
    run = Run(limiter(held))
    for number, one in enumerate(taken):
        run.step(number, dataclasses.replace(one, pause_us=(one.pause_us or 0) // 40))
    need = simulated.need(step.given, step.made, step.expected)
    wait_us = run.limiter.wait_us(run.limiter.grant(need, urgent=step.urgent, has_waited=True))
    if not wait_us:
        return
    began_us = run.limiter.now_us
    if early and wait_us > MS:
        # A little before: no.
        run.limiter.set(began_us + wait_us - MS)
        again = run.limiter.grant(need, urgent=step.urgent, has_waited=True)
        assert 0 < run.limiter.wait_us(again) <= MS + 1
    run.limiter.set(began_us + wait_us)
    assert run.limiter.wait_us(run.limiter.grant(need, urgent=step.urgent, has_waited=True)) == 0


def test_background_calls_that_are_refused_ask_again_one_after_the_other(
    limiter: Callable[[list[Rule]], Limiter],
) -> None:
    run = limiter([simulated.rule("requests", 600, "minute", burst=1)])
    one = simulated.need(1, 1)
    assert run.wait_us(run.grant(one)) == 0
    told = [run.wait_us(run.grant(one)) for _ in range(30)]
    interval_us = told[1] - told[0]
    assert 100_000 <= interval_us < 103_000
    # None of them is told more than it would wait, and the line grows no further.
    for before, after in itertools.pairwise(told):
        assert after - before == pytest.approx(interval_us, abs=2) or after == before
    assert max(told) <= 2_000_000 + interval_us
    # Who waited, and who is urgent, are told the truth.
    assert run.wait_us(run.grant(one, has_waited=True)) == told[0]
    assert run.wait_us(run.grant(one, urgent=True)) <= told[0]
    # Each finds room at its time.
    began_us = run.now_us
    for wait_us in told[:5]:
        run.set(began_us + wait_us)
        assert run.wait_us(run.grant(one, has_waited=True)) == 0
