"""The two writes of the hot path, and every other arrow."""

from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import bodies, execute, ledger, pulse, stores, submit
from llmtasks.errors import Lost
from llmtasks.ledger import End, Outcome
from llmtasks.models import (
    Attempt,
    CostState,
    IdempotencyKey,
    Mode,
    Status,
    Task,
    TaskPayload,
)
from llmtasks.submit import Idempotency
from providers.types import Response, Text, Usage
from tests import factories

pytestmark = pytest.mark.django_db(transaction=True)

USAGE = Usage(
    input_tokens=10,
    cached_input_tokens=5,
    cache_write_5m_tokens=3,
    cache_write_1h_tokens=2,
    output_tokens=7,
    reasoning_tokens=1,
)
KEY = Idempotency(endpoint="/v1/tasks", key="k", body_hash="h")


def outcome(**fields) -> Outcome:
    given = {"usage": USAGE, "cost": Decimal("0.5"), "cost_state": CostState.FINAL}
    return Outcome(**{**given, **fields})


def begin(task: Task, number: int = 1, cost: Decimal | None = Decimal(1)) -> UUID:
    attempt_id = uuid7()
    ledger.begin(
        task,
        attempt_id=attempt_id,
        step=0,
        number=number,
        provider="sandbox",
        model="echo",
        estimate=cost,
        cost_state=CostState.UNPRICED if cost is None else CostState.ESTIMATED,
        price_id=None,
    )
    return attempt_id


def running(**fields) -> Task:
    """A stored task of ours."""
    fields = {"status": Status.RUNNING, "fence": 1, "owner_id": pulse.owner_id(), **fields}
    return factories.task(**fields)


@contextmanager
def round_trips(monkeypatch):
    """Counts what goes to Postgres and back over the pool's connections."""
    seen = []
    wait = stores.TimedConnection.wait

    def counted(self, step, *args, **kwargs):
        # Setting autocommit sends nothing; the pulse's connection is its own affair.
        if type(self) is stores.TimedConnection and "autocommit" not in step.__name__:
            seen.append(step.__name__)
        return wait(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stores.TimedConnection, "wait", counted)
        yield seen


# --- begin ----------------------------------------------------------------------------------------


@pytest.fixture
def inline(account) -> Task:
    """An unsaved inline task with an Idempotency-Key."""
    factories.route("echo", (account, "echo"))
    task = submit.inline(factories.work(factories.tenant(), "echo", idempotency=KEY, user="u"))
    task.owner_id, task.fence = pulse.owner_id(), 1
    return task


def test_begin_writes_task_body_key_and_attempt_in_one_round_trip(inline, monkeypatch):
    connection.ensure_connection()
    with round_trips(monkeypatch) as seen:
        attempt_id = begin(inline)
    assert len(seen) == 1
    row = Task.objects.get()
    assert (row.status, row.mode, row.fence, row.attempts) == (Status.RUNNING, Mode.INLINE, 1, 1)
    assert (row.owner_id, row.user, row.key_id) == (pulse.owner_id(), "u", None)
    assert row.deadline == inline.deadline
    assert bodies.load_request(row.kind, TaskPayload.objects.get().request).model == "echo"
    assert IdempotencyKey.objects.get().task_id == row.id
    attempt = Attempt.objects.get()
    assert (attempt.id, attempt.task_id, attempt.state) == (attempt_id, row.id, "sent")
    assert (attempt.cost, attempt.cost_state) == (Decimal(1), CostState.ESTIMATED)


def test_every_column_of_a_task_is_written_as_it_was_made(inline):
    begin(inline)
    row = Task.objects.get()
    # What the database's clock or the attempt sets.
    own = {"started_at", "not_before", "attempts", "provider"}
    for field in Task._meta.concrete_fields:
        if field.attname not in own:
            assert getattr(row, field.attname) == getattr(inline, field.attname), field.attname


def test_a_key_that_was_taken_meanwhile_leaves_nothing(inline):
    other = submit.inline(factories.work(inline.tenant_id, "echo", idempotency=KEY))
    other.owner_id, other.fence = pulse.owner_id(), 1
    begin(other)
    with pytest.raises(IntegrityError):
        begin(inline)
    assert Task.objects.count() == Attempt.objects.count() == TaskPayload.objects.count() == 1


def test_begin_of_a_task_that_is_not_ours_writes_nothing(account):
    task = running()
    Task.objects.update(fence=2)
    with pytest.raises(Lost):
        begin(task)
    assert not Attempt.objects.exists()


def test_an_attempts_number_is_used_once(account):
    task = running()
    begin(task)
    with pytest.raises(IntegrityError):
        begin(task)
    assert Attempt.objects.count() == 1


# --- finish ---------------------------------------------------------------------------------------


def test_finish_settles_the_attempt_and_ends_the_task_in_one_round_trip(account, monkeypatch):
    task = running()
    attempt_id = begin(task)
    answer = Response(id="r", model="m", parts=(Text(text="hi"),), finish_reason="stop")
    end = End(status=Status.SUCCEEDED, response=bodies.dump_response(task.kind, answer))
    with round_trips(monkeypatch) as seen:
        ledger.finish(task, attempt_id, outcome(raw_usage={"total": 28}), end)
    assert len(seen) == 1
    row = Task.objects.get()
    assert (row.status, row.owner_id, row.cost) == (Status.SUCCEEDED, None, Decimal("0.5"))
    assert row.finished_at is not None
    assert (row.input_tokens, row.cached_input_tokens, row.cache_write_tokens) == (10, 5, 5)
    assert (row.output_tokens, row.reasoning_tokens, row.cost_state) == (7, 1, "final")
    attempt = Attempt.objects.get()
    assert (attempt.state, attempt.cost, attempt.raw_usage) == (
        "settled",
        Decimal("0.5"),
        {"total": 28},
    )
    assert (attempt.cache_write_5m_tokens, attempt.cache_write_1h_tokens) == (3, 2)
    assert bodies.load_response(row.kind, TaskPayload.objects.get().response) == answer
    # The object in memory says the same.
    assert (task.status, task.cost, task.finished_at) == (row.status, row.cost, row.finished_at)


def test_a_whole_inline_call_is_two_round_trips(account, monkeypatch):
    factories.route("echo", (account, "echo"))
    tenant = factories.tenant()
    # Each of the pool's connections prepares the two statements once.
    for _ in range(6):
        work = factories.work(tenant, "echo", idempotency=None)
        execute.run(submit.inline(work), work.request)
    task = submit.inline(work)
    with round_trips(monkeypatch) as seen:
        result = execute.run(task, work.request)
    assert result.task.status == Status.SUCCEEDED
    assert len(seen) == 2


def test_an_answer_with_nul_is_stored_with_a_replacement(account):
    task = running()
    attempt_id = begin(task)
    answer = Response(id="r", model="m", parts=(Text(text="a\0b\\u0000"),), finish_reason="stop")
    end = End(status=Status.SUCCEEDED, response=bodies.dump_response(task.kind, answer))
    told = outcome(raw_usage={"a\0": ["\0"]}, error_message="\0", vendor_request_id="\0x")
    ledger.finish(task, attempt_id, told, end)
    stored = bodies.load_response(task.kind, TaskPayload.objects.get().response)
    assert stored.text == "a\ufffdb\\u0000"
    assert Attempt.objects.get().raw_usage == {"a\ufffd": ["\ufffd"]}


def test_a_failed_attempt_keeps_the_task_running(account):
    task = running()
    ledger.finish(task, begin(task), outcome(error_class="Overloaded"), End(status=Status.RUNNING))
    row = Task.objects.get()
    assert (row.status, row.owner_id, row.finished_at) == ("running", pulse.owner_id(), None)
    ledger.finish(task, begin(task, 2), outcome(), End(status=Status.SUCCEEDED))
    assert (Task.objects.get().cost, Task.objects.get().attempts) == (Decimal(1), 2)


def test_finish_under_a_stale_fence_settles_the_money_and_nothing_else(account):
    task = running()
    attempt_id = begin(task)
    Task.objects.update(fence=2)
    with pytest.raises(Lost):
        ledger.finish(task, attempt_id, outcome(), End(status=Status.SUCCEEDED))
    row = Task.objects.get()
    assert (row.status, row.cost, row.output_tokens) == (Status.RUNNING, Decimal("0.5"), 7)
    assert Attempt.objects.get().state == "settled"


def test_a_late_answer_settles_an_unknown_attempt_and_counts_anew(account):
    task = running()
    first = begin(task)
    Attempt.objects.update(state="unknown")
    ledger.recount([task.id])
    assert (Task.objects.get().cost, Task.objects.get().cost_state) == (Decimal(1), "estimated")
    Task.objects.update(fence=2)
    again = Task.objects.get()
    ledger.finish(again, begin(again, 2), outcome(), End(status=Status.SUCCEEDED))
    assert (Task.objects.get().cost, Task.objects.get().cost_state) == (
        Decimal("1.5"),
        "estimated",
    )
    with pytest.raises(Lost):
        ledger.finish(task, first, outcome(), End(status=Status.FAILED))
    row = Task.objects.get()
    assert (row.status, row.cost, row.cost_state) == ("succeeded", Decimal(1), "final")
    assert row.output_tokens == 14


def test_a_commit_whose_answer_was_lost_is_known_again(account):
    task = running()
    attempt_id = begin(task)
    ledger.finish(task, attempt_id, outcome(), End(status=Status.SUCCEEDED))
    again = running(id=uuid7())
    again.id = task.id
    ledger.finish(again, attempt_id, outcome(), End(status=Status.SUCCEEDED))
    row = Task.objects.get(id=task.id)
    assert (row.cost, row.output_tokens, again.cost) == (Decimal("0.5"), 7, Decimal("0.5"))


def test_no_price_means_unpriced_whatever_else_was_priced(account):
    task = running()
    ledger.finish(task, begin(task), outcome(), End(status=Status.RUNNING))
    unknown = outcome(cost=None, cost_state=CostState.UNPRICED)
    ledger.finish(task, begin(task, 2, cost=None), unknown, End(status=Status.RUNNING))
    ledger.finish(task, begin(task, 3), outcome(), End(status=Status.SUCCEEDED))
    row = Task.objects.get()
    assert (row.cost, row.cost_state) == (None, "unpriced")
    with transaction.atomic():
        ledger.recount([task.id])
    row.refresh_from_db()
    assert (row.cost, row.cost_state) == (None, "unpriced")


def test_a_task_whose_cancel_was_asked_for_does_not_wait_for_its_next_try(account):
    task = running()
    attempt_id = begin(task)
    Task.objects.update(cancel_requested_at=timezone.now())
    end = End(status=Status.WAITING, error_class="Overloaded", wait_s=5)
    ledger.finish(task, attempt_id, outcome(), end)
    row = Task.objects.get()
    assert (row.status, row.error_class, task.status) == ("cancelled", "Cancelled", "cancelled")
    assert row.finished_at is not None


@pytest.mark.parametrize(("name", "kept"), [("ServerError", True), ("Overloaded", False)])
def test_a_key_is_free_again_where_the_answer_was_not_final(inline, name, kept):
    attempt_id = begin(inline)
    ledger.finish(inline, attempt_id, outcome(), End(status=Status.FAILED, error_class=name))
    assert IdempotencyKey.objects.exists() == kept


def test_a_key_is_free_again_where_the_task_ended_between_two_attempts(inline):
    ledger.finish(inline, begin(inline), outcome(), End(status=Status.RUNNING))
    ledger.end_running(inline, End(status=Status.CANCELLED, error_class="ClientLeft"))
    assert not IdempotencyKey.objects.exists()


# --- the other arrows -----------------------------------------------------------------------------


def test_end_running_leaves_what_is_not_ours(account):
    task = running()
    Task.objects.update(fence=2)
    for status in (Status.FAILED, Status.WAITING):
        with pytest.raises(Lost):
            ledger.end_running(task, End(status=status))
    assert Task.objects.get().status == Status.RUNNING


def test_end_running_cancels_what_was_to_be_cancelled(account):
    task = running()
    Task.objects.update(cancel_requested_at=timezone.now())
    ledger.end_running(task, End(status=Status.WAITING, wait_s=1))
    assert (Task.objects.get().status, task.status) == ("cancelled", "cancelled")


def test_an_inline_task_that_had_no_attempt_is_written_final(inline):
    ledger.write_ended(inline, End(status=Status.FAILED, error_class="DeadlineExceeded"))
    row = Task.objects.get()
    assert (row.status, row.attempts, row.cost_state) == ("failed", 0, "")
    assert TaskPayload.objects.exists()
    assert IdempotencyKey.objects.exists()


def test_a_claim_is_of_one_release_and_raises_the_fence(account):
    task = factories.task(status=Status.QUEUED, seq=3, metadata={"a": [1]})
    assert ledger.claim(task.id, 2, pulse.owner_id()) is None
    claimed = ledger.claim(task.id, 3, pulse.owner_id())
    assert claimed is not None
    row, body = claimed
    assert (row.status, row.fence, row.metadata) == ("running", 1, {"a": [1]})
    assert row.owner_id == pulse.owner_id()
    assert body["model"] == "echo"
    assert ledger.claim(task.id, 3, pulse.owner_id()) is None


# --- what only the database promises --------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE llmtasks_attempt SET cost = 0",
        "UPDATE llmtasks_attempt SET state = 'sent'",
        "DELETE FROM llmtasks_attempt",
    ],
)
def test_a_settled_attempt_is_immutable(account, sql):
    task = running()
    ledger.finish(task, begin(task), outcome(), End(status=Status.SUCCEEDED))
    with pytest.raises(DatabaseError, match="is settled"), connection.cursor() as cursor:
        cursor.execute(sql)
    assert Attempt.objects.get().cost == Decimal("0.5")


def test_an_open_attempt_is_not(account):
    task = running()
    begin(task)
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM llmtasks_attempt")
    assert not Attempt.objects.exists()


def test_a_deadline_is_kept_to_the_microsecond(inline):
    inline.deadline += timedelta(microseconds=7)
    begin(inline)
    assert Task.objects.get().deadline == inline.deadline
