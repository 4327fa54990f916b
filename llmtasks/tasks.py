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
from kombu.utils.limits import TokenBucket

from llmtasks import execute, pulse
from llmtasks.models import (
    WINDOWS,
    Delivery,
    IdempotencyKey,
    Limit,
    McpServer,
    TaskPayload,
    Worker,
)
from llmtasks.queues import task_name
from llmtasks.room import HORIZON_S
from llmtasks.tools import pins

# Rows that one statement of the purge deletes.
PURGE_BATCH = 5000
# The windows of limits that a rate of each second can stand behind.
SHORT = ("second", "minute")
LEAST_AHEAD = 10


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


def backstops() -> dict[str, TokenBucket]:
    """Celery's own rate limit of each provider that has a limit of requests: twice what the
    dispatcher releases, held by each worker for itself, should everything else fail.

    Tasks that wait for it are held in the worker's memory. Where a provider may fill the lane,
    they would keep others out: there is none then.
    """
    if settings.LLMTASKS["PROVIDER_SHARE"] >= 1:
        return {}
    whole = Limit.objects.filter(
        unit=Limit.Unit.REQUESTS, window__in=SHORT, provider__isnull=False, model="",
        tenant=None, key=None, each="",
    )  # fmt: skip
    rates: dict[str, tuple[float, int]] = {}
    for limit in whole.select_related("provider"):
        per_s = 2 * limit.amount / WINDOWS[limit.window]
        # What may come at once: all that the dispatcher releases ahead.
        ahead = int(max(per_s * HORIZON_S, limit.burst or 0, LEAST_AHEAD))
        name = task_name(limit.provider.name)  # type: ignore[union-attr]
        rates[name] = min((per_s, ahead), rates.get(name, (per_s, ahead)))
    return {name: TokenBucket(per_s, capacity=ahead) for name, (per_s, ahead) in rates.items()}


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
        "webhooks": delete(
            Delivery.objects.filter(id__lt=first_id_of(payload_age)).exclude(
                state=Delivery.State.PENDING
            ),
            "id",
        ),
        "keys": delete(IdempotencyKey.objects.filter(expires_at__lt=now), "id"),
        "workers": delete(Worker.objects.filter(lease_until__lt=now - timedelta(days=1)), "id"),
    }


@shared_task(name="maintenance.discover", ignore_result=True)
def discover() -> dict[str, str]:
    """Look at what every MCP server offers, one after the other."""
    return {
        server.name: str(pins.discover(server))
        for server in McpServer.objects.filter(is_active=True)
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
