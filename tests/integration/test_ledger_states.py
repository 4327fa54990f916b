"""Any order of claims, calls, deaths, sweeps, cancels and late answers keeps the ledger true."""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from django.db import connection
from django.utils import timezone
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from uuid_utils.compat import uuid7

from llmtasks import dispatch, execute, ledger, queues, sweep
from llmtasks.errors import Conflict, Lost
from llmtasks.ledger import End, Outcome
from llmtasks.models import FINAL, Attempt, CostState, Status, Task, Worker
from llmtasks.turns import Turns
from providers.types import Usage
from tests import factories

# The diagram of `docs/states.md`.
ARROWS = {
    "waiting": {"queued", "cancelled", "expired", "failed"},
    "queued": {"waiting", "running", "cancelled", "expired", "failed"},
    "running": {"succeeded", "failed", "cancelled", "waiting", "blocked"},
    "blocked": {"waiting", "cancelled", "expired", "failed"},
    **{status: set() for status in FINAL},
}
COSTS = st.sampled_from([None, Decimal("0"), Decimal("0.25"), Decimal("1.5")])
ENDS = st.sampled_from([Status.RUNNING, Status.WAITING, Status.SUCCEEDED, Status.FAILED])


class Runs:
    """What one process believes that it runs."""

    def __init__(self, task: Task, owner: UUID) -> None:
        self.task, self.owner = task, owner
        self.open: UUID | None = None


class Life(RuleBasedStateMachine):
    """One task, whose processes die and come back late."""

    def __init__(self) -> None:
        super().__init__()
        # Settled attempts can't be deleted but by leaving them: each life has a task of its own.
        tenant = uuid7()
        self.task = factories.task(tenant)
        self.id = self.task.id
        self.runs: list[Runs] = []
        self.seen = "waiting"
        self.settled: dict[UUID, Decimal | None] = {}

    def row(self) -> Task:
        return Task.objects.get(id=self.id)

    def moved(self) -> None:
        """No arrow but those of the diagram; final is final."""
        now = self.row().status
        if now != self.seen:
            assert now in reachable(self.seen), f"{self.seen} → {now}"
            assert self.seen not in FINAL
        self.seen = now

    @rule()
    def release(self) -> None:
        hints = dispatch.pick({("sandbox", "default"): 5}, Turns())
        assert all(hint.task_id == self.id for hint in hints)
        self.moved()

    @rule(stale=st.booleans())
    def claim(self, stale: bool) -> None:
        owner = factories.worker().id
        seq = self.row().seq - stale
        found = ledger.claim(self.id, seq, owner)
        if found is not None:
            assert not stale
            self.runs.append(Runs(found[0], owner))
        self.moved()

    @precondition(lambda self: any(r.open is None for r in self.runs))
    @rule(cost=COSTS, which=st.integers(0, 10))
    def begin(self, cost: Decimal | None, which: int) -> None:
        run = self.pick(lambda r: r.open is None, which)
        number = 1 + Attempt.objects.filter(task_id=self.id).count()
        state = CostState.UNPRICED if cost is None else CostState.ESTIMATED
        attempt_id = uuid7()
        try:
            ledger.begin(
                run.task, attempt_id=attempt_id, step=0, number=number,
                provider="sandbox", model="m", estimate=cost, cost_state=state, price_id=None,
            )  # fmt: skip
        except Lost:
            self.runs.remove(run)
        else:
            run.open = attempt_id
        self.moved()

    @precondition(lambda self: any(r.open for r in self.runs))
    @rule(cost=COSTS, end=ENDS, which=st.integers(0, 10))
    def finish(self, cost: Decimal | None, end: str, which: int) -> None:
        run = self.pick(lambda r: r.open is not None, which)
        before = self.row()
        state = CostState.UNPRICED if cost is None else CostState.FINAL
        outcome = Outcome(usage=Usage(output_tokens=3), cost=cost, cost_state=state)
        assert run.open is not None
        self.settled[run.open] = cost
        attempt, run.open = run.open, None
        try:
            ledger.finish(run.task, attempt, outcome, End(status=end))
        except Lost:
            self.runs.remove(run)
            # The money was written; the task's state was somebody else's.
            assert self.row().status == before.status
        else:
            assert (before.status, before.fence) == ("running", run.task.fence)
            if end != Status.RUNNING:
                self.runs.remove(run)
        self.moved()

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 10))
    def die(self, which: int) -> None:
        """The lease runs out; the process may be late rather than dead."""
        run = self.pick(lambda _: True, which)
        Worker.objects.filter(id=run.owner).update(lease_until=timezone.now())

    @rule()
    def sweep(self) -> None:
        sweep.run()
        self.moved()

    @rule()
    def lose_the_hint(self) -> None:
        old = timezone.now() - timedelta(seconds=60)
        Task.objects.filter(id=self.id, status="queued").update(queued_at=old)

    @rule()
    def cancel(self) -> None:
        before = self.row().status
        try:
            execute.cancel(self.id)
        except Conflict:
            assert before in FINAL
        else:
            assert self.row().status in ("cancelled", "running")
        self.moved()

    def pick(self, wanted: Callable[[Runs], bool], which: int) -> Runs:
        fitting = [run for run in self.runs if wanted(run)]
        return fitting[which % len(fitting)]

    @invariant()
    def the_money_is_the_sum_over_the_attempts(self) -> None:
        row = self.row()
        attempts = list(Attempt.objects.filter(task_id=self.id))
        counted = [a for a in attempts if a.state != "sent"]
        assert row.attempts == len(attempts)
        assert row.output_tokens == sum(a.output_tokens for a in counted)
        states = {a.cost_state for a in counted}
        if "unpriced" in states:
            assert (row.cost, row.cost_state) == (None, "unpriced")
        elif counted:
            assert row.cost == sum(a.cost for a in counted)
            assert row.cost_state == ("estimated" if "estimated" in states else "final")
        else:
            assert (row.cost, row.cost_state) == (None, "")

    @invariant()
    def what_was_settled_stays(self) -> None:
        for attempt in Attempt.objects.filter(id__in=self.settled):
            assert (attempt.state, attempt.cost) == ("settled", self.settled[attempt.id])

    @invariant()
    def owners_and_ends_fit_the_state(self) -> None:
        row = self.row()
        assert (row.owner_id is not None) == (row.status == "running")
        assert (row.finished_at is not None) == (row.status in FINAL)
        # One process at most may still change the task.
        able = [r for r in self.runs if row.status == "running" and r.task.fence == row.fence]
        assert len(able) <= 1

    def teardown(self) -> None:
        Task.objects.filter(id=self.id).exclude(status__in=FINAL).update(
            status="failed", owner_id=None
        )


def reachable(status: str) -> set[str]:
    """A sweep takes up to two arrows at once: it puts back, then expires."""
    one = ARROWS[status]
    return one.union(*(ARROWS[next_] for next_ in one)) if status != "waiting" else one


@pytest.mark.django_db(transaction=True)
def test_any_order_of_events_keeps_the_ledger_true(redis: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queues, "wake", lambda: None)
    connection.ensure_connection()
    run_machine(
        Life,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
