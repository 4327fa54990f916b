"""Celery's tasks: one per provider, and the purge."""

import uuid
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import submit, tasks
from llmtasks.models import IdempotencyKey, Limit, Task, TaskPayload, Worker
from llmtasks.submit import Idempotency
from tests import factories


def test_each_provider_has_a_task_of_its_own():
    app = Celery("test", set_as_current=False)
    tasks.register(app, ["openai", "azure"])
    first = app.tasks["tasks.openai"]
    tasks.register(app, ["openai", "azure", "late"])
    assert app.tasks["tasks.openai"] is first
    assert {"tasks.openai", "tasks.azure", "tasks.late"} <= set(app.tasks)
    assert first.ignore_result is True


def test_a_celery_task_runs_the_release_that_it_names(account, monkeypatch):
    ran = []
    monkeypatch.setattr("llmtasks.execute.run_queued", lambda *args: ran.append(args))
    app = Celery("test", set_as_current=False)
    tasks.register(app, ["sandbox"])
    name = uuid7()
    app.tasks["tasks.sandbox"].run(str(name), 2)
    assert ran == [(name, 2)]


# --- the backstop ---------------------------------------------------------------------------------


def limit(provider: Any, amount: int, window: str, **fields: Any) -> None:
    given = {"unit": "requests", **fields}
    Limit.objects.create(provider=provider, amount=amount, window=window, **given)


def test_a_provider_with_a_limit_of_requests_has_a_backstop_at_twice_its_rate(account):
    second = factories.provider(name="second")
    factories.provider(name="free")
    limit(account, 600, "minute")
    limit(account, 50, "second")
    limit(account, 10, "minute", unit="tokens")
    limit(account, 10, "minute", model="echo")
    limit(account, 10, "minute", tenant=factories.tenant())
    limit(None, 1, "second")
    limit(second, 100, "day")
    found = tasks.backstops()
    assert set(found) == {"tasks.sandbox"}
    bucket = found["tasks.sandbox"]
    assert bucket.fill_rate == 20
    # All that the dispatcher releases ahead passes at once.
    assert [bucket.can_consume() for _ in range(41)].count(True) in (40, 41)


def test_where_a_provider_may_fill_the_lane_there_is_no_backstop(account, settings):
    limit(account, 600, "minute")
    settings.LLMTASKS = {**settings.LLMTASKS, "PROVIDER_SHARE": 1.0}
    assert tasks.backstops() == {}


# --- purge ----------------------------------------------------------------------------------------


def old_id(at: datetime) -> uuid.UUID:
    return uuid.UUID(int=tasks.first_id_of(at).int | uuid7().int & ((1 << 80) - 1))


def ended(days_ago: float, made_days_ago: float | None = None, **fields: Any) -> Task:
    now = timezone.now()
    made = now - timedelta(days=days_ago if made_days_ago is None else made_days_ago)
    given = {"status": "succeeded", "finished_at": now - timedelta(days=days_ago), **fields}
    return factories.task(id=old_id(made), created_at=made, **given)


def test_bodies_are_deleted_after_their_retention_and_bills_are_kept(account):
    old, young = ended(31), ended(29, made_days_ago=60)
    waits = ended(31, status="waiting", finished_at=None)
    assert tasks.purge()["bodies"] == 1
    assert set(TaskPayload.objects.values_list("task_id", flat=True)) == {young.id, waits.id}
    assert Task.objects.filter(id=old.id).exists()


def test_expired_keys_and_processes_long_gone_are_deleted(account):
    tenant = factories.tenant()
    for hours in (-1, 1):
        task = factories.task(tenant)
        given = Idempotency(endpoint="/v1/tasks", key=str(hours), body_hash="h")
        row = submit.key_row(task, given)
        row.expires_at = timezone.now() + timedelta(hours=hours)
        row.save(force_insert=True)
    gone = factories.worker(alive=False)
    Worker.objects.filter(id=gone.id).update(lease_until=timezone.now() - timedelta(days=2))
    kept = factories.worker(alive=False)
    assert tasks.purge() == {"bodies": 0, "webhooks": 0, "keys": 1, "workers": 1}
    assert IdempotencyKey.objects.get().key == "1"
    assert Worker.objects.filter(id=kept.id).exists()


def test_a_purge_goes_on_until_nothing_is_left(account, monkeypatch):
    monkeypatch.setattr(tasks, "PURGE_BATCH", 2)
    for _ in range(5):
        ended(40)
    assert tasks.purge()["bodies"] == 5


@pytest.mark.parametrize("at", [datetime(2026, 1, 1, tzinfo=timezone.get_current_timezone())])
def test_ids_are_ordered_by_time(at):
    assert tasks.first_id_of(at) <= old_id(at) < tasks.first_id_of(at + timedelta(milliseconds=1))
