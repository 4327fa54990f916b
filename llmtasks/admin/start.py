"""The start page: what waits and runs where, who works, what is paused, what fails.

Every figure is bounded: a cell is counted as far as `COUNTED`, what is under way is few by
construction, and failures are looked for among the newest `LOOKED_AT` of the last hour.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse

from llmtasks.admin import limits
from llmtasks.admin.lists import first_id
from llmtasks.models import Lane, Provider
from llmtasks.stores import fetch

COUNTED = 10_000
LOOKED_AT = 5_000
LONGEST_LIST = 12

BACKLOG = """
SELECT 'waiting', room.provider, room.lane, waiting.number
FROM unnest(%(providers)s::text[]) AS p(provider)
     CROSS JOIN unnest(%(lanes)s::text[]) AS l(lane)
     CROSS JOIN LATERAL (SELECT p.provider, l.lane) AS room
     CROSS JOIN LATERAL (
         SELECT count(*) AS number FROM (
             SELECT 1 FROM llmtasks_task
             WHERE status = 'waiting' AND provider = room.provider AND lane = room.lane
             LIMIT %(counted)s + 1
         ) AS capped
     ) AS waiting
UNION ALL
SELECT status, provider, lane, count(*) FROM llmtasks_task
WHERE status IN ('queued', 'running')
GROUP BY status, provider, lane
"""

ALIVE = """
SELECT role, lane, count(*), sum(slots) FROM llmtasks_worker
WHERE lease_until > clock_timestamp()
GROUP BY role, lane ORDER BY role, lane
"""

FAILURES = """
SELECT error_class, status, count(*), max(id::text) FROM (
    (SELECT error_class, status, id FROM llmtasks_task
     WHERE status = 'failed' AND id >= %(since)s ORDER BY id DESC LIMIT %(looked_at)s)
    UNION ALL
    (SELECT error_class, status, id FROM llmtasks_task
     WHERE status = 'expired' AND id >= %(since)s ORDER BY id DESC LIMIT %(looked_at)s)
) AS recent
GROUP BY error_class, status ORDER BY count(*) DESC, error_class LIMIT %(longest)s
"""


@dataclass
class Cell:
    """One provider's work in one lane."""

    waiting: int = 0
    queued: int = 0
    running: int = 0

    @property
    def shown_waiting(self) -> str:
        return f"{COUNTED:,}+" if self.waiting > COUNTED else f"{self.waiting:,}"


@dataclass
class Row:
    """One provider's work."""

    name: str
    provider: Provider | None = None
    cells: dict[str, Cell] = field(default_factory=lambda: defaultdict(Cell))

    @property
    def lanes(self) -> list[tuple[str, Cell]]:
        return [(lane, self.cells[lane]) for lane in Lane.values]


def context(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """What Unfold's start page is filled with; each part for those who may see it."""
    may = request.user.has_perm
    context["lanes"] = Lane.values
    if may("llmtasks.view_task"):
        context["backlog"] = backlog()
        context["failures"] = failures()
    if may("llmtasks.view_worker"):
        context["workers"] = workers()
    if may("llmtasks.view_provider"):
        context["refused"] = limits.refused()
    context["may_switch"] = may("llmtasks.change_provider")
    context["links"] = links()
    return context


def backlog() -> list[Row]:
    """A row for each provider, and for any other name that work is under way for."""
    providers = list(Provider.objects.order_by("name"))
    rows = {provider.name: Row(provider.name, provider) for provider in providers}
    values = {
        "providers": [*rows, ""],
        "lanes": Lane.values,
        "counted": COUNTED,
    }
    for status, name, lane, number in fetch(BACKLOG, values):
        if number:
            row = rows.setdefault(name, Row(name))
            setattr(row.cells[lane], status, number)
    return list(rows.values())


def workers() -> list[dict[str, Any]]:
    return [
        {"name": f"{role} {lane}".strip(), "number": number, "slots": slots}
        for role, lane, number, slots in fetch(ALIVE)
    ]


def failures() -> list[dict[str, Any]]:
    """What failed of the last hour's tasks, the most frequent first."""
    values = {
        "since": first_id(timedelta(hours=1)),
        "looked_at": LOOKED_AT,
        "longest": LONGEST_LIST,
    }
    return [
        {
            "error": error or "no error class",
            "status": status,
            "number": number,
            "latest": latest,
            "is_capped": number >= LOOKED_AT,
        }
        for error, status, number, latest in fetch(FAILURES, values)
    ]


def links() -> list[dict[str, str]]:
    about = "how close each limit is, breakers, how long work waits"
    found = [{"title": "Queues and limits", "url": reverse("queues"), "about": about}]
    if url := getattr(settings, "FLOWER_URL", ""):
        found.append({"title": "Flower", "url": url, "about": "the broker's queues and workers"})
    for name, title, about in (("docs", "API docs", "every endpoint, to try out"),):
        try:
            found.append({"title": title, "url": reverse(name), "about": about})
        except NoReverseMatch:
            continue
    return found
