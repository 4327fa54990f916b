"""Two calls for one answer, against the sandbox: the faster answers, both are paid for."""

import threading
import time
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from django.db import connection
from uuid_utils.compat import uuid7

from llmtasks import attempts as attempts_of
from llmtasks import execute, hedge, ledger, submit
from llmtasks.guards import rules
from llmtasks.ledger import End, Outcome
from llmtasks.models import Attempt, CostState, Limit, Route, Status, Task, Tenant
from providers.types import Usage
from tests import factories
from tests.corridor import (
    attempts,
    check_ledger,
    in_thread,
    inline,
    queued,
    streamed,
    told,
    until,
)
from tests.hedging import P95_MS, SLOW, errors_of, first_waits, is_called, nobody_calls
from tests.meters import P95, learnt, open_breaker, put_p95, remember

pytestmark = pytest.mark.usefixtures("short_waits")


# --- who answers first ----------------------------------------------------------------------------


def test_a_faster_second_answers_and_both_are_paid_for(
    account, tenant, second, hedged, door, sandbox
):
    hedged((account, SLOW), (second, "echo"))
    began = time.monotonic()
    outcome = door(tenant, "smart", "how much is this? " * 20)
    assert time.monotonic() - began < 5
    task = outcome.task
    assert (task.status, task.provider, task.error_class) == ("succeeded", "second", "")
    assert "how much" in outcome.response.text
    first_row, second_row = attempts(task)
    assert [a.number for a in (first_row, second_row)] == [1, 2]
    assert (first_row.provider, first_row.error_class) == ("sandbox", "Outrun")
    assert (second_row.provider, second_row.error_class) == ("second", "")
    # Nobody knows what the first will be billed.
    assert (first_row.cost_state, second_row.cost_state) == ("estimated", "final")
    assert first_row.cost > 0
    assert second_row.cost > 0
    assert task.cost == first_row.cost + second_row.cost
    assert (task.cost_state, task.attempts) == ("estimated", 2)
    assert (task.input_tokens, task.output_tokens) == (
        second_row.input_tokens,
        second_row.output_tokens,
    )
    assert sandbox.calls(str(task.id))["calls"] == 2
    nobody_calls(sandbox, task)
    check_ledger(task)


def test_a_first_that_answers_after_all_drops_the_second(
    account, tenant, second, hedged, door, sandbox, monkeypatch
):
    hedged((account, "slow-600"), (second, SLOW))
    first_waits(monkeypatch, is_called(sandbox))
    monkeypatch.setattr(hedge, "SETTLED_WITHIN_S", 10.0)
    began = time.monotonic()
    task = door(tenant, "smart").task
    assert time.monotonic() - began < 5
    assert (task.status, task.provider) == ("succeeded", "sandbox")
    assert errors_of(task) == ["", "Outrun"]
    assert [a.cost_state for a in attempts(task)] == ["final", "estimated"]
    # What the caller is told is what the ledger says.
    row = Task.objects.get(id=task.id)
    assert (task.cost, task.attempts, task.provider) == (row.cost, 2, "sandbox")
    nobody_calls(sandbox, task)
    check_ledger(task)


def test_a_whole_answer_that_nobody_saw_is_taken_for_as_long_as_the_other(
    account, tenant, second, hedged
):
    hedged((account, SLOW), (second, "echo"))
    first_row, second_row = attempts(inline(tenant, "smart", "much " * 100).task)
    answer = Decimal(second_row.output_tokens * 4) / 10**6
    assert first_row.cost > answer * Decimal("0.8")


def test_a_stream_goes_on_with_whoever_began_first(account, tenant, second, hedged, sandbox):
    hedged((account, SLOW), (second, "long-60-100"))
    outcome = streamed(tenant, "smart")
    task = outcome.task
    assert (task.status, task.provider, errors_of(task)) == ("succeeded", "second", ["Outrun", ""])
    nobody_calls(sandbox, task)
    check_ledger(task)


def test_a_stream_that_began_has_no_second(account, tenant, second, hedged):
    hedged((account, "long-150-100"), (second, "echo"), p95_ms=1300)
    assert errors_of(streamed(tenant, "smart").task) == [""]


def test_two_streams_may_begin_at_once(account, tenant, second, hedged, monkeypatch, sandbox):
    hedged((account, "long-100-100"), (second, "long-100-100"))
    both = threading.Barrier(2)
    real = attempts_of.send

    def send(attempt: Any, request: Any) -> Any:
        events = real(attempt, request)
        event = next(events)
        both.wait(10)
        yield event
        return (yield from events)

    monkeypatch.setattr(attempts_of, "send", send)
    monkeypatch.setattr(hedge.Race, "fire", fire_in_any_case)
    task = streamed(tenant, "smart").task
    assert task.status == "succeeded"
    assert sorted(errors_of(task)) == ["", "Outrun"]
    nobody_calls(sandbox, task)
    check_ledger(task)


def fire_in_any_case(race: hedge.Race) -> None:
    """Also where the first call's delta is there, and its caller does not know yet."""
    race.context = race.first.context.beside()
    race.is_fired = True
    threading.Thread(target=race.run_second, name="hedge", daemon=True).start()


def test_watchers_of_queued_work_see_the_attempt_that_answers(account, tenant, second, hedged):
    hedged((account, SLOW), (second, "echo"))
    task = queued(tenant, "smart", stream=True).task
    entries = told(task)
    assert [name for name, _ in entries if name == "reset"] == []
    assert {data["attempt"] for name, data in entries if name == "delta"} == {2}
    assert errors_of(task) == ["Outrun", ""]


def test_a_stream_that_breaks_after_it_won_is_tried_again(account, tenant, second, hedged):
    hedged((account, "slow-1500"), (second, "cut"))
    task = queued(tenant, "smart", stream=True).task
    assert task.status == "succeeded"
    # The one that was outrun was no failed try: its candidate is called again.
    assert errors_of(task)[:2] == ["Outrun", "BadResponse"]
    assert sorted(errors_of(task)[2:]) == ["", "Outrun"]
    assert [a.number for a in attempts(task)] == [1, 2, 3, 4]
    entries = [(name, data["attempt"]) for name, data in told(task) if "attempt" in data]
    assert entries[0] == ("delta", 2)
    assert ("reset", 3) in entries
    assert entries[-1] in [("delta", 3), ("delta", 4)]
    check_ledger(task)


def test_an_embedding_is_hedged_too(account, tenant, second, hedged):
    hedged((account, SLOW), (second, "embed-8"), kind="embedding")
    work = factories.embedding(tenant, "smart", "one text")
    task = execute.run(submit.inline(work), work.request).task
    assert (task.status, errors_of(task)) == ("succeeded", ["Outrun", ""])
    check_ledger(task)


def test_the_only_candidate_is_called_twice(account, tenant, hedged, sandbox):
    hedged((account, "slow-1500"), p95_ms=700)
    task = inline(tenant, "smart").task
    assert errors_of(task) == ["", "Outrun"]
    assert sandbox.calls(str(task.id))["overlaps"] == 1
    check_ledger(task)


# --- when there is no second ----------------------------------------------------------------------


@pytest.mark.parametrize("p95_ms", [None, 2000])
def test_no_second_before_the_p95_or_without_one(account, tenant, second, hedged, p95_ms):
    hedged((account, "slow-200"), (second, "echo"), p95_ms=p95_ms)
    assert errors_of(inline(tenant, "smart").task) == [""]


def test_no_second_sooner_than_the_least_delay(account, tenant, second, hedged, monkeypatch):
    monkeypatch.setattr(hedge, "LEAST_S", 5.0)
    hedged((account, "slow-200"), (second, "echo"), p95_ms=1)
    assert errors_of(inline(tenant, "smart").task) == [""]


def test_no_second_where_the_route_does_not_hedge(account, tenant, second, hedged):
    hedged((account, "slow-300"), (second, "echo"))
    Route.objects.update(hedges=False)
    assert errors_of(inline(tenant, "smart").task) == [""]


@pytest.mark.parametrize("why", ["limit", "gate", "breaker"])
def test_a_second_that_is_not_admitted_is_not_waited_for(
    account, tenant, second, hedged, redis, why, sandbox
):
    hedged((account, "slow-400"), (second, "echo"))
    if why == "limit":
        Limit.objects.create(provider=second, unit="concurrency", amount=1)
        rules._rules = None
        key = f"{{limits}}:meter:{Limit.objects.get().pk}"
        redis.zadd(key, {"somebody": (time.time() + 60) * 1e6})
        remember(redis)
    elif why == "gate":
        redis.set("{limits}:gate:second/echo", int((time.time() + 60) * 1e6))
    else:
        until_us = int((time.time() + 60) * 1e6)
        open_breaker(redis, "second/echo", until_us)
    task = inline(tenant, "smart").task
    assert (task.status, errors_of(task)) == ("succeeded", [""])
    assert sandbox.calls(str(task.id))["calls"] == 1


def test_a_second_is_a_call_again_for_the_retry_budget(
    account, tenant, second, hedged, redis, sandbox, monkeypatch
):
    hedged((account, "slow-300"), (second, SLOW))
    first_waits(monkeypatch, is_called(sandbox))
    assert errors_of(inline(tenant, "smart").task) == ["", "Outrun"]
    counts = [redis.hgetall(key) for key in redis.keys("{limits}:tries:second*")]
    again = sum(int(n) for h in counts for k, n in h.items() if k.startswith(b"x"))
    firsts = sum(int(n) for h in counts for k, n in h.items() if k.startswith(b"c"))
    assert (again, firsts) == (1, 0)


def test_the_limits_of_both_are_given_back(
    account, tenant, second, hedged, redis, sandbox, monkeypatch
):
    for provider in (account, second):
        Limit.objects.create(provider=provider, unit="concurrency", amount=5)
    rules._rules = None
    remember(redis)
    hedged((account, "slow-300"), (second, SLOW))
    first_waits(monkeypatch, is_called(sandbox))
    assert errors_of(inline(tenant, "smart").task) == ["", "Outrun"]
    until(lambda: not redis.keys("{limits}:taken:*"))
    for row in Limit.objects.all():
        assert redis.zcard(f"{{limits}}:meter:{row.pk}") == 0


# --- what is learnt -------------------------------------------------------------------------------


def test_a_call_that_was_outrun_is_learnt_from_as_slow(account, tenant, second, hedged, redis):
    hedged((account, SLOW), (second, "echo"))
    assert errors_of(inline(tenant, "smart").task) == ["Outrun", ""]
    assert learnt(redis, f"sandbox/{SLOW}")[P95] > P95_MS


def test_a_second_that_had_no_time_teaches_nothing(
    account, tenant, second, hedged, redis, sandbox, monkeypatch
):
    hedged((account, "slow-300"), (second, SLOW))
    first_waits(monkeypatch, is_called(sandbox))
    put_p95(redis, f"second/{SLOW}", 5000)
    assert errors_of(inline(tenant, "smart").task) == ["", "Outrun"]
    assert learnt(redis, f"second/{SLOW}")[P95] == 5000


# --- many at once ---------------------------------------------------------------------------------


def test_many_at_once_keep_their_ledgers(account, tenant, second, hedged, sandbox):
    hedged((account, "slow-250"), (second, "slow-150"))
    outcomes: list[Any] = []

    def run() -> None:
        try:
            outcomes.append(inline(tenant, "smart"))
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 24
    until(lambda: not Attempt.objects.exclude(state="settled").exists())
    seconds = 0
    for outcome in outcomes:
        task = outcome.task
        rows = attempts(task)
        assert task.status == "succeeded"
        assert sum(a.error_class == "" for a in rows) == 1
        assert {a.error_class for a in rows} <= {"", "Outrun"}
        # One that was dropped before it was sent is no call.
        assert 1 <= sandbox.calls(str(task.id))["calls"] <= len(rows)
        seconds += len(rows) - 1
        check_ledger(task)
    # As many as the retry budget lets through.
    assert 0 < seconds <= 12


OUTCOME = Outcome(usage=Usage(output_tokens=3), cost=Decimal("0.25"), cost_state=CostState.FINAL)


def begun(tenant: Tenant) -> tuple[Task, list[UUID]]:
    """A running task with two attempts under way."""
    task = factories.task(tenant, status=Status.RUNNING, fence=1, owner_id=uuid7())
    ids = [uuid7(), uuid7()]
    for number, attempt_id in enumerate(ids):
        ledger.begin(
            task, attempt_id=attempt_id, step=0, number=number + 1, provider="sandbox", model="m",
            estimate=Decimal(1), cost_state=CostState.ESTIMATED, price_id=None,
        )  # fmt: skip
    return task, ids


def end(task: Task, attempt_id: UUID, together: threading.Barrier) -> None:
    together.wait()
    ledger.finish(task, attempt_id, OUTCOME, End(status=Status.SUCCEEDED))


def test_two_settlements_of_one_task_at_once_lose_no_money(account, tenant):
    """The one that ends the task and the one apart from it, in every order."""
    for number in range(30):
        task, ids = begun(tenant)
        together = threading.Barrier(2)
        with in_thread(end, task, ids[0], together):
            together.wait()
            time.sleep(number % 3 * 0.001)
            assert ledger.settle_apart(task.id, ids[1], OUTCOME)
        row = Task.objects.get(id=task.id)
        told = (row.status, row.cost, row.output_tokens, row.attempts)
        assert told == ("succeeded", Decimal("0.5"), 6, 2)
        assert not ledger.settle_apart(task.id, ids[1], OUTCOME)
