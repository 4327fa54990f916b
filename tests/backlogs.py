"""Tasks that wait, and the workers that they wait for."""

from typing import Any

from llmtasks.models import Task
from tests import factories


def waiting(count: int, of: Any = None, **fields: Any) -> list[Task]:
    of = of or factories.tenant()
    return [factories.task(of, **fields) for _ in range(count)]


def serve(*names: str, slots: int = 8, **fields: Any) -> None:
    """A live worker that lists the queues of these providers."""
    lane = fields.get("lane", "default")
    factories.worker(*(f"{name}.{lane}" for name in names), slots=slots, **fields)


def end_one() -> None:
    task = Task.objects.filter(status="queued").order_by("queued_at").first()
    Task.objects.filter(id=task.id).update(status="succeeded")
