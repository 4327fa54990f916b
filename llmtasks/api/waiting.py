"""Queued work and its caller: 202 at once, or an answer if it is done in time.

Whoever waits holds no database connection: it is woken by the task's events, and looks at the
row every few seconds all the same, since an event can be lost.
"""

import time
from datetime import UTC, datetime
from uuid import UUID

from django.http import HttpResponse

from llmtasks import pulse, stores, watchers
from llmtasks.api.answers import json_response, task_row
from llmtasks.api.doors import Preferences
from llmtasks.api.errors import POSTGRES_AWAY
from llmtasks.errors import NotFound, TooManyWatchers
from llmtasks.models import FINAL, Task

LOOK_S = 2.0
# Without Redis nobody is woken: look more often.
LOOK_OFFLINE_S = 0.25


def load(task_id: UUID, tenant_id: UUID) -> Task:
    """The task with its answer. Raises NotFound, also for another tenant's."""
    task = (
        Task.objects.select_related("payload")
        .defer("payload__request")
        .filter(id=task_id, tenant_id=tenant_id)
        .first()
    )
    if task is None:
        raise NotFound(f"There is no task {task_id}.")
    return task


def look(task: Task) -> Task:
    """The task as it is by now; as it was where Postgres is away."""
    try:
        return load(task.id, task.tenant_id)
    except (*POSTGRES_AWAY, NotFound):
        return task
    finally:
        stores.release()


def look_interval() -> float:
    return LOOK_S if watchers.reader().is_online else LOOK_OFFLINE_S


def watched(task: Task, seconds: float) -> Task:
    """The task once it is final, the time is up or this process is to end. Without a free place
    to watch from it is not waited for: 202 is always right."""
    stores.release()
    until = time.monotonic() + seconds
    try:
        with watchers.watch(task.id) as watcher:
            while task.status not in FINAL and (left := until - time.monotonic()) > 0:
                if pulse.is_draining():
                    break
                event = watcher.next(min(left, look_interval()))
                if event is None or event.name == "done":
                    task = look(task)
    except TooManyWatchers:
        pass
    return task


def accepted(task: Task, prefer: Preferences) -> HttpResponse:
    """202: where the task is found, and when to ask."""
    url = url_of(task)
    body = task_row(task) | {"url": url, "events_url": f"{url}/events"}
    response = json_response(body, status=202)
    response["Location"] = url
    response["Retry-After"] = str(retry_after(task))
    return tell_preferences(response, prefer)


def url_of(task: Task) -> str:
    return f"/v1/tasks/{task.id}"


def retry_after(task: Task) -> int:
    if task.run_at is None:
        return 1
    return max(1, int((task.run_at - datetime.now(UTC)).total_seconds()) + 1)


def tell_preferences(response: HttpResponse, prefer: Preferences) -> HttpResponse:
    """Say which of the client's wishes were honoured."""
    applied = ["respond-async"] if prefer.respond_async else []
    if prefer.wait is not None:
        applied.append(f"wait={prefer.wait:.0f}")
    if applied:
        response["Preference-Applied"] = ", ".join(applied)
    return response
