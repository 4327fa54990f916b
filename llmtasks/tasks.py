"""Celery's tasks: one per provider, which names a row and calls one function; and maintenance.

A retry of a vendor's fault is a state of the row. Celery's own retry is around the claim only,
for faults of the database.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from celery import Celery, shared_task
from django.conf import settings
from django.db import OperationalError

from llmtasks import execute, pulse
from llmtasks.models import IdempotencyKey, TaskPayload, Worker
from llmtasks.queues import task_name

# Rows that one statement of the purge deletes.
PURGE_BATCH = 5000


def register(app: Celery, providers: Iterable[str]) -> None:
    """A Celery task for each provider that has none yet."""
    for provider in providers:
        if task_name(provider) not in app.tasks:
            app.task(
                name=task_name(provider),
                ignore_result=True,
                autoretry_for=(OperationalError,),
                retry_backoff=True,
                retry_jitter=True,
                max_retries=5,
            )(run)


def run(task_id: str, seq: int) -> None:
    execute.run_queued(UUID(task_id), seq)


@shared_task(name="maintenance.purge", ignore_result=True)
def purge() -> dict[str, int]:
    """Delete what is past its retention: bodies, idempotency keys, processes long gone."""
    now = pulse.now()
    payload_age = now - timedelta(days=settings.LLMTASKS["PAYLOAD_DAYS"])
    # Ids are ordered by time: only bodies of tasks that were made before can be of ended ones.
    old = TaskPayload.objects.filter(
        task_id__lt=first_id_of(payload_age), task__finished_at__lt=payload_age
    )
    return {
        "bodies": delete(old, "task_id"),
        "keys": delete(IdempotencyKey.objects.filter(expires_at__lt=now), "id"),
        "workers": delete(Worker.objects.filter(lease_until__lt=now - timedelta(days=1)), "id"),
    }


def first_id_of(time: datetime) -> UUID:
    """The smallest UUIDv7 of that millisecond."""
    return UUID(int=int(time.timestamp() * 1000) << 80)


def delete(rows: Any, key: str) -> int:
    """Delete in batches, each a transaction of its own: no lock is held for long."""
    total = 0
    while True:
        ids = list(rows.order_by(key).values_list(key, flat=True)[:PURGE_BATCH])
        if not ids:
            return total
        rows.model.objects.filter(**{f"{key}__in": ids}).delete()
        total += len(ids)
