"""Any order of claims, calls, deaths, sweeps, cancels and late answers keeps the ledger true.

A Hypothesis state machine over the product's own functions, on real stores: up to three tasks, the
processes that run them, die, and come back late, calls that are hedged, the limiter.
"""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from importlib import import_module
from typing import Any
from uuid import UUID

import pytest
from django.db import connection
from django.utils import timezone
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from llmtasks import admission, attempts, dispatch, execute, ledger, pulse, queues, stores, sweep
from llmtasks import call as calls
from llmtasks import submit as submits
from llmtasks.context import Context
from llmtasks.errors import Conflict, Lost, Snooze
from llmtasks.guards import rate_limit, rules
from llmtasks.ledger import End
from llmtasks.models import (
    FINAL,
    Adjustment,
    Attempt,
    Limit,
    Mode,
    OnUnknown,
    Provider,
    Status,
    Task,
    Worker,
)
from llmtasks.turns import Turns
from tests import factories
from tests.lives import ARROWS, AT_ONCE, Run, World, moves_are_noted, outcome
from tests.meters import settle_at_once

TASKS = 3
UNDER_WAY = ("waiting", "queued", "running")
OLD = "2026-01-01T00:00Z"
COSTS = st.sampled_from([None, Decimal("0"), Decimal("0.25"), Decimal("1.5")])
ENDS = st.sampled_from([Status.RUNNING, Status.WAITING, Status.SUCCEEDED, Status.FAILED])
TOKENS = st.integers(0, 500)

Draw = Callable[[st.SearchStrategy[Any]], Any]
ACTIONS: dict[str, tuple[int, Callable[["Life"], Any]]] = {}


def action(weight: int, when: Callable[["Life"], Any] = lambda _: True) -> Any:
    """Something that can happen where `when` holds, `weight` times as often as the rarest."""

    def add(function: Any) -> Any:
        ACTIONS[function.__name__] = (weight, when)
        return function

    return add


class Life(World, RuleBasedStateMachine):
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One of all that can happen now: left to itself Hypothesis tries what can't."""
        able = [name for name, (n, when) in ACTIONS.items() if when(self) for _ in range(n)]
        getattr(self, data.draw(st.sampled_from(able)))(data.draw)

    # --- how work comes and goes ------------------------------------------------------------------

    @action(3, lambda life: len(life.ids) < TASKS)
    def submit(self, draw: Draw) -> None:
        if draw(st.sampled_from([Mode.QUEUED, Mode.QUEUED, Mode.INLINE])) == Mode.QUEUED:
            on_unknown = draw(st.sampled_from(OnUnknown))
            task = factories.task(self.tenant, on_unknown=on_unknown, lane="interactive")
        else:
            task = submits.inline(factories.work(self.tenant))
            task.owner_id, task.fence = factories.worker().id, 1
            self.runs.append(Run(task, task.owner_id, Context(task)))
        self.ids.append(task.id)
        self.moved("submit.save")

    @action(2, lambda life: life.rows("waiting"))
    def release(self, _: Draw) -> None:
        hints = dispatch.pick({("sandbox", "interactive"): 5}, Turns())
        assert {hint.task_id for hint in hints} <= set(self.ids)
        self.moved("dispatch.MARK")

    @action(5, lambda life: life.rows("queued"))
    def claim(self, draw: Draw) -> None:
        self.take(draw(st.sampled_from(self.rows("queued"))), 0)

    @action(1, lambda life: life.rows())
    def claim_by_an_old_hint(self, draw: Draw) -> None:
        self.take(draw(st.sampled_from(self.rows())), draw(st.integers(0, 1)))

    def take(self, row: Task, stale: int) -> None:
        owner = factories.worker().id
        found = ledger.claim(row.id, row.seq - stale, owner)
        assert (found is not None) == (row.status == "queued" and not stale)
        if found is not None:
            context = Context(found[0])
            calls.past_tries(context)
            self.runs.append(Run(found[0], owner, context))
        self.moved("ledger.claim")

    @action(1, lambda life: life.rows("queued"))
    def hand_back(self, draw: Draw) -> None:
        row, stale = draw(st.sampled_from(self.rows("queued"))), draw(st.integers(0, 1))
        execute.hand_back(row.id, row.seq - stale)
        row.refresh_from_db()
        assert row.status == ("queued" if stale else "waiting")
        self.moved("execute.hand_back")

    # --- calls ------------------------------------------------------------------------------------

    @action(6, lambda life: life.some(lambda run: not run.calls))
    def call(self, draw: Draw) -> None:
        run = self.pick(draw, lambda run: not run.calls)
        if (grant := self.admitted(run.context)) is not None:
            self.begin(run, run.context, grant)
        elif run.task.mode == Mode.QUEUED:
            self.let_go(run)
            with pytest.raises((Snooze, Lost)):
                admission.go_back(run.context, 0.0)
            self.moved("ledger.end_running")

    @action(3, lambda life: life.some(lambda run: len(run.calls) == 1))
    def hedge(self, draw: Draw) -> None:
        run = self.pick(draw, lambda run: len(run.calls) == 1)
        context = run.context.beside()
        run.context.number += 1
        if (grant := self.admitted(context)) is not None:
            self.begin(run, context, grant)

    @action(6, lambda life: life.some(lambda run: run.calls))
    def finish(self, draw: Draw) -> None:
        """One of the calls under way decides what becomes of the task; another may be open."""
        run = self.pick(draw, lambda run: run.calls)
        call = run.calls.pop(draw(st.integers(0, len(run.calls) - 1)))
        call.context = run.context
        end = draw(ENDS)
        if run.task.mode == Mode.INLINE and end == Status.WAITING:
            end = Status.FAILED
        before = Task.objects.get(id=run.task.id)
        is_ours = (before.status, before.fence) == ("running", run.task.fence)
        settled = self.settled(call, draw(COSTS), draw(TOKENS))
        try:
            attempts.settle(call, settled, End(status=end))
        except Lost:
            # The money was written; the task's state was somebody else's.
            assert not is_ours
            self.let_go(run)
        else:
            assert is_ours
            if end != Status.RUNNING:
                self.let_go(run)
            self.is_told_as_stored(run.task)
        self.moved("ledger.finish")

    @action(3, lambda life: life.some(lambda run: run.calls))
    def settle_apart(self, draw: Draw) -> None:
        run = self.pick(draw, lambda run: run.calls)
        call = run.calls.pop(draw(st.integers(0, len(run.calls) - 1)))
        attempts.settle_apart(call, self.settled(call, draw(COSTS), draw(TOKENS)))
        self.moved()

    @action(3, lambda life: life.left)
    def answer_late(self, draw: Draw) -> None:
        call = self.left.pop(draw(st.integers(0, len(self.left) - 1)))
        attempts.settle_apart(call, self.settled(call, draw(COSTS), draw(TOKENS)))
        self.moved()

    @action(1, lambda life: any(spent.is_settled for spent in life.spent.values()))
    def settle_again(self, draw: Draw) -> None:
        """As after a connection that broke before the answer came."""
        done = [id_ for id_, spent in self.spent.items() if spent.is_settled]
        row = Attempt.objects.get(id=draw(st.sampled_from(done)))
        assert not ledger.settle_apart(row.task_id, row.id, outcome(Decimal(9), 9))
        self.moved()

    @action(1, lambda life: life.some(is_between_tries))
    def snooze(self, draw: Draw) -> None:
        """Between two tries, back to waiting."""
        run = self.pick(draw, is_between_tries)
        before = Task.objects.get(id=run.task.id)
        is_ours = (before.status, before.fence) == ("running", run.task.fence)
        self.let_go(run)
        try:
            ledger.end_running(run.task, End(status=Status.WAITING))
        except Lost:
            assert not is_ours
        else:
            assert is_ours
        self.moved("ledger.end_running")

    # --- how processes end ------------------------------------------------------------------------

    @action(4, lambda life: life.some(lambda run: run.is_stored))
    def die(self, draw: Draw) -> None:
        """The lease runs out; the process may be late rather than dead."""
        run = self.pick(draw, lambda run: run.is_stored)
        Worker.objects.filter(id=run.owner).update(lease_until=timezone.now())
        for call in run.calls:
            self.lapse(call)
        if draw(st.booleans()):
            self.let_go(run)

    @action(1, lambda life: life.some(lambda run: run.is_stored))
    def disown(self, draw: Draw) -> None:
        """The pulse finds a task that its process does not run."""
        run = self.pick(draw, lambda run: run.is_stored)
        self.let_go(run)
        stores.fetch(pulse.DISOWN, {"orphans": [run.task.id], "id": run.owner})
        self.moved()

    @action(5, lambda life: life.rows("running"))
    def take_from_dead(self, _: Draw) -> None:
        mine = Task.objects.filter(id__in=self.ids, status="running")
        alive = Worker.objects.filter(lease_until__gt=timezone.now())
        kept = set(mine.filter(owner_id__in=alive.values("id")).values_list("id", flat=True))
        sweep.take_from_dead()
        assert set(mine.values_list("id", flat=True)) == kept
        self.moved("sweep.TAKE_FROM_DEAD")

    @action(1, lambda life: life.spent)
    def close_left_open(self, _: Draw = lambda _: None) -> None:
        Attempt.objects.filter(tenant=self.tenant, state="sent").update(started_at=OLD)
        before = Attempt.objects.filter(tenant=self.tenant, state="sent")
        kept = set(before.filter(task__status="running").values_list("id", flat=True))
        sweep.close_left_open()
        after = Attempt.objects.filter(tenant=self.tenant, state="sent")
        assert set(after.values_list("id", flat=True)) == kept
        self.moved()

    # --- sweeps, clocks and people ----------------------------------------------------------------

    @action(1, lambda life: life.rows("queued"))
    def lose_the_hints(self, _: Draw) -> None:
        old = timezone.now() - timedelta(seconds=60)
        Task.objects.filter(id__in=self.ids, status="queued").update(queued_at=old)
        sweep.put_back_lost_hints()
        assert not Task.objects.filter(id__in=self.ids, status="queued").exists()
        self.moved("sweep.PUT_BACK")

    @action(1, lambda life: life.rows(*UNDER_WAY))
    def pass_a_deadline(self, draw: Draw) -> None:
        row = draw(st.sampled_from(self.rows(*UNDER_WAY)))
        Task.objects.filter(id=row.id).update(deadline=OLD)
        sweep.expire()
        self.moved("sweep.EXPIRE")

    @action(1, lambda life: life.rows())
    def cancel(self, draw: Draw) -> None:
        before = draw(st.sampled_from(self.rows()))
        try:
            execute.cancel(before.id)
        except Conflict:
            assert before.status in FINAL
        else:
            assert Task.objects.get(id=before.id).status in ("cancelled", "running")
        self.moved("execute.cancel")

    @action(1, lambda life: life.spent)
    def adjust(self, draw: Draw) -> None:
        attempt, amount = draw(st.sampled_from(list(self.spent))), draw(st.sampled_from((-1, 2)))
        given = {"tenant": self.tenant, "amount": Decimal(amount), "reason": "test"}
        Adjustment.objects.create(attempt_id=attempt, **given)
        self.adjusted += amount

    # --- what always holds ------------------------------------------------------------------------

    @invariant()
    def all_holds(self) -> None:
        self.look()
        for row in self.tasks:
            self.the_money_is_the_sum_over_the_attempts(row)
            self.owners_and_ends_fit_the_state(row)
        self.what_was_settled_stays()
        self.the_limiter_holds_what_is_under_way()

    def the_money_is_the_sum_over_the_attempts(self, row: Task) -> None:
        rows = [a for a in self.attempts if a.task_id == row.id]
        counted = [a for a in rows if a.state != "sent"]
        assert row.attempts == len(rows)
        assert row.input_tokens == sum(a.input_tokens for a in counted)
        assert row.output_tokens == sum(a.output_tokens for a in counted)
        states = {a.cost_state for a in counted}
        if "unpriced" in states:
            assert (row.cost, row.cost_state) == (None, "unpriced")
        elif counted:
            assert row.cost == sum(a.cost for a in counted)
            assert row.cost_state == ("estimated" if "estimated" in states else "final")
        else:
            assert (row.cost, row.cost_state) == (None, "")

    def owners_and_ends_fit_the_state(self, row: Task) -> None:
        assert (row.owner_id is not None) == (row.status == "running")
        assert (row.finished_at is not None) == (row.status in FINAL)
        # One process at most may still change the task.
        fences = [run.task.fence for run in self.runs if run.task.id == row.id]
        assert row.status != "running" or fences.count(row.fence) <= 1

    def what_was_settled_stays(self) -> None:
        rows = {row.id: row for row in self.attempts}
        assert rows.keys() == self.spent.keys()
        for id_, spent in self.spent.items():
            assert (rows[id_].state == "settled") == spent.is_settled
            if spent.is_settled:
                assert (rows[id_].cost, rows[id_].input_tokens) == (spent.cost, spent.tokens - 1)
        adjustments = Adjustment.objects.filter(tenant=self.tenant)
        assert sum(row.amount for row in adjustments) == self.adjusted

    def the_limiter_holds_what_is_under_way(self) -> None:
        open_ = {id_ for id_, spent in self.spent.items() if not spent.is_settled}
        assert self.leases() == {id_ for id_ in open_ if not self.spent[id_].has_lapsed}
        taken = {UUID(key.decode().rpartition(":")[2]) for key in self.redis.keys("*:taken:*")}
        assert taken == open_
        assert self.used("requests") == len(self.spent)
        assert self.used("tokens") == sum(spent.tokens for spent in self.spent.values())

    def teardown(self) -> None:
        """Every process dies: what it held is free, and nothing stays open."""
        for run in list(self.runs):
            Worker.objects.filter(id=run.owner).update(lease_until=timezone.now())
            self.let_go(run)
        for call in self.left:
            self.lapse(call)
        sweep.take_from_dead()
        self.moved("sweep.TAKE_FROM_DEAD")
        self.close_left_open()
        self.all_holds()
        assert not self.leases()
        assert not self.rows("running")
        assert "sent" not in {attempt.state for attempt in self.attempts}
        for call in self.left:
            attempts.settle_apart(call, self.settled(call, Decimal(1), 5))
        self.all_holds()

    def is_told_as_stored(self, task: Task) -> None:
        row = Task.objects.get(id=task.id)
        for name in ("status", "cost", "cost_state", "attempts", "input_tokens", "output_tokens"):
            assert getattr(task, name) == getattr(row, name)

    def some(self, wanted: Callable[[Run], Any]) -> bool:
        return any(wanted(run) for run in self.runs)

    def pick(self, draw: Draw, wanted: Callable[[Run], Any]) -> Run:
        fitting = [run for run in self.runs if wanted(run)]
        return fitting[draw(st.integers(0, len(fitting) - 1))]


def is_between_tries(run: Run) -> bool:
    return run.task.mode == Mode.QUEUED and not run.calls


@pytest.fixture
def limited(account: Provider) -> None:
    """A route with as many calls at once as `AT_ONCE`, and rates that only count."""
    factories.route("echo", (account, "echo"))
    Limit.objects.create(provider=account, unit="concurrency", amount=AT_ONCE)
    for unit in ("requests", "tokens"):
        Limit.objects.create(
            provider=account, unit=unit, window="hour", amount=10**9, burst=10**9,
            # Long ago: Postgres is not asked what was used before.
            created_at=timezone.now() - timedelta(days=1),
        )  # fmt: skip
    rules._rules = None


@pytest.mark.django_db(transaction=True)
def test_any_order_of_events_keeps_the_ledger_true(limited: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queues, "wake", lambda: None)
    settle_at_once(monkeypatch)
    # A lease that ran out would come back by a renewal that is late.
    monkeypatch.setattr(rate_limit.Leases, "renew", lambda _: None)
    connection.ensure_connection()
    with moves_are_noted():
        run_machine(
            Life,
            settings=settings(
                max_examples=30,
                stateful_step_count=40,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_the_places_of_the_diagram_are_in_the_code():
    for place in ARROWS:
        module, _, name = place.partition(".")
        assert hasattr(import_module(f"llmtasks.{module}"), name), place
