"""Celery queues, task names, and the hints that name tasks in them.

Sends by task *name*, so that nothing needs to import `tasks`.
"""

import socket
import time
from collections.abc import Iterable
from functools import cache
from typing import Any
from uuid import UUID

import orjson
import redis
from celery import current_app
from kombu import pools

from llmtasks import crash
from llmtasks.models import Lane
from llmtasks.stores import hasty_client, redis_client

WAKE_CHANNEL = "llmtasks:wake"
# After a failure nobody tries to wake the dispatcher for so long: it polls all the same, and
# callers should not wait for timeouts.
AWAY_S = 1.0
# A caller who waits to be answered waits for this.
WAKE_S = 0.1
# Hints in one round trip.
BATCH = 200

_away_until = 0.0


def queue_name(provider: str, lane: str) -> str:
    return f"{provider}.{lane}"


def task_name(provider: str) -> str:
    """The Celery task of a provider: one each, so that Flower shows vendors by name."""
    return f"tasks.{provider}"


def all_queues(providers: Iterable[str], lane: str) -> list[str]:
    """The queues that a worker of `lane` serves."""
    return [queue_name(provider, lane) for provider in sorted(providers)]


@cache
def producers() -> Any:
    """Producers for batches, kept open: kombu sends no batch where its client may send twice."""
    options = {"retry_on_timeout": False}
    return pools.producers[current_app.connection_for_write(transport_options=options)]


def publish(hints: Iterable[tuple[UUID, int, str, str]]) -> None:
    """Send hints `(task id, seq, provider, lane)`, a round trip for BATCH of them.

    Raises `kombu.exceptions.KombuError`s, `redis.RedisError`s and `OSError`s where the broker is
    away; hints sent before that are sent, and stale once their tasks are put back.
    """
    with producers().acquire(block=True, timeout=5.0) as producer, producer.batch(BATCH):
        for task_id, seq, provider, lane in hints:
            headers, properties, body, _ = message(task_id, seq, provider)
            producer.publish(
                orjson.dumps(body).decode(),
                content_type="application/json",
                content_encoding="utf-8",
                exchange="",
                routing_key=queue_name(provider, lane),
                headers=headers,
                **properties,
            )
            crash.point("dispatch.publishing")


def message(task_id: UUID, seq: int, provider: str) -> Any:
    """A hint as Celery's protocol has it. `send_task` makes the same at four times the cost."""
    return current_app.amqp.as_task_v2(
        hint_id(task_id, seq),
        task_name(provider),
        args=(str(task_id), seq),
        argsrepr=f"('{task_id}', {seq})",
        kwargsrepr="{}",
        origin=origin(),
        ignore_result=True,
    )


def hint_id(task_id: UUID, seq: int) -> str:
    """The id of a hint's message in Celery and Flower."""
    return f"{task_id}.{seq}"


@cache
def origin() -> str:
    return f"dispatcher@{socket.gethostname()}"


def hints_in(names: Iterable[str]) -> set[str]:
    """The ids of the hints that lie in the queues: few, since the dispatcher bounds what is
    released. Raises `redis.RedisError`."""
    with redis_client().pipeline(transaction=False) as pipe:
        for name in names:
            pipe.lrange(name, 0, -1)
        return {orjson.loads(raw)["headers"]["id"] for found in pipe.execute() for raw in found}


def wake() -> None:
    """Tell the dispatcher that there is something to do. Its polling makes up for a lost one."""
    global _away_until
    if time.monotonic() < _away_until:
        return
    try:
        hasty_client(WAKE_S).publish(WAKE_CHANNEL, b"")
    except redis.RedisError:
        _away_until = time.monotonic() + AWAY_S


def lanes() -> list[str]:
    return [str(value) for value in Lane.values]
