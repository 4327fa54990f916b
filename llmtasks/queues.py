"""Celery queues, task names, and the hints that name tasks in them.

Sends by task *name*, so that nothing needs to import `tasks`.
"""

import time
from collections.abc import Iterable
from uuid import UUID

import redis
from celery import current_app

from llmtasks import crash
from llmtasks.models import Lane
from llmtasks.stores import redis_client

WAKE_CHANNEL = "llmtasks:wake"
# After a failure nobody tries to wake the dispatcher for so long: it polls all the same, and
# callers should not wait for timeouts.
AWAY_S = 1.0

_away_until = 0.0


def queue_name(provider: str, lane: str) -> str:
    return f"{provider}.{lane}"


def task_name(provider: str) -> str:
    """The Celery task of a provider: one each, so that Flower shows vendors by name."""
    return f"tasks.{provider}"


def all_queues(providers: Iterable[str], lane: str) -> list[str]:
    """The queues that a worker of `lane` serves."""
    return [queue_name(provider, lane) for provider in sorted(providers)]


def publish(hints: Iterable[tuple[UUID, int, str, str]]) -> None:
    """Send hints `(task id, seq, provider, lane)` over one connection.

    Raises `kombu.exceptions.OperationalError` where the broker is away; hints sent before that
    are sent, the sweep brings the others back.
    """
    with current_app.amqp.producer_pool.acquire(block=True, timeout=5.0) as producer:
        for task_id, seq, provider, lane in hints:
            current_app.send_task(
                task_name(provider),
                args=(str(task_id), seq),
                queue=queue_name(provider, lane),
                producer=producer,
                retry=False,
                ignore_result=True,
            )
            crash.point("dispatch.publishing")


def depths(names: list[str]) -> dict[str, int]:
    """Messages that lie in each queue. Raises `redis.RedisError`."""
    with redis_client().pipeline(transaction=False) as pipe:
        for name in names:
            pipe.llen(name)
        return dict(zip(names, pipe.execute(), strict=True))


def wake() -> None:
    """Tell the dispatcher that there is something to do. Its polling makes up for a lost one."""
    global _away_until
    if time.monotonic() < _away_until:
        return
    try:
        redis_client().publish(WAKE_CHANNEL, b"")
    except redis.RedisError:
        _away_until = time.monotonic() + AWAY_S


def lanes() -> list[str]:
    return [str(value) for value in Lane.values]
