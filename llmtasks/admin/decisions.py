"""A run on its task's page: the graph, each step, and a person's word on those that wait for one.

Who decides must see what is decided on: it needs the permission to change steps and the one to read
prompts and answers.
"""

import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from django.contrib import messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.db import OperationalError
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseNotAllowed,
    HttpResponseRedirect,
)
from django.urls import URLPattern, path, reverse
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin

from llmtasks import steps
from llmtasks.admin import cells, runs
from llmtasks.models import Step, Task
from llmtasks.stores import fetch

log = logging.getLogger(__name__)

VIEW_BODIES = "llmtasks.view_bodies"
DECIDE = "llmtasks.change_step"
SHOWN = 200
MAX_TEXT = 4_000
MAX_COMMENT = 2_000

# A model's answer as its text and the names of what it calls; of anything else what it gave.
ROWS = """
SELECT s.id, s.number, s.kind, s.name, s.status, s.error_class, s.child_id, s.started_at,
    s.finished_at, s.decided_by, s.comment,
    coalesce(octet_length(s.input::text), 0), coalesce(octet_length(s.output::text), 0),
    CASE WHEN %(bodies)s THEN left(s.input::text, %(most)s) END,
    CASE WHEN %(bodies)s THEN left(CASE
        WHEN jsonb_typeof(s.output->'parts') = 'array' THEN (
            SELECT string_agg(coalesce(part->>'text', 'calls ' || (part->>'name')), E'\\n')
            FROM jsonb_array_elements(s.output->'parts') AS part)
        ELSE coalesce(s.output->>'content', s.output::text) END, %(most)s) END,
    a.cost, coalesce(a.unpriced, false), coalesce(a.estimated, false)
FROM llmtasks_step s LEFT JOIN LATERAL (
    SELECT sum(cost) AS cost, bool_or(cost_state = 'unpriced') AS unpriced,
        bool_or(cost_state = 'estimated') AS estimated
    FROM llmtasks_attempt WHERE task_id = s.task_id AND step = s.number AND state <> 'sent'
) AS a ON true
WHERE s.task_id = %(task)s
ORDER BY s.status NOT IN ('approval', 'unknown'), s.number LIMIT %(shown)s
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A step as the page shows it."""

    id: UUID
    number: int
    kind: str
    name: str
    status: str
    error: str
    child: UUID | None
    started_at: datetime
    finished_at: datetime | None
    decided_by: str
    comment: str
    input_bytes: int
    output_bytes: int
    input: str | None
    output: str | None
    cost: Any
    unpriced: bool
    estimated: bool

    @property
    def label(self) -> SafeString:
        return cells.label(runs.worded(self.status))

    @property
    def child_link(self) -> SafeString | str:
        return "" if self.child is None else cells.link("task", self.child, cells.short(self.child))

    @property
    def shown_cost(self) -> SafeString | str:
        return runs.shown_money(self.cost, self.unpriced, self.estimated)

    @property
    def began(self) -> SafeString:
        return cells.brief(self.started_at)

    @property
    def duration(self) -> str:
        return "" if self.finished_at is None else cells.span(self.started_at, self.finished_at)

    @property
    def waits(self) -> bool:
        return self.status in steps.UNDECIDED

    @property
    def is_interrupted(self) -> bool:
        return self.status == Step.Status.UNKNOWN

    @property
    def is_cut(self) -> bool:
        return any(text is not None and len(text) >= MAX_TEXT for text in (self.input, self.output))


def run_of(request: HttpRequest, task: Task) -> dict[str, Any] | None:
    """What the page says of the run; None for a task that is none."""
    if task.kind in runs.LEAVES:
        return None
    sees = request.user.has_perm(VIEW_BODIES)
    values = {"task": task.id, "bodies": sees, "most": MAX_TEXT, "shown": SHOWN + 1}
    rows = [Row(*row) for row in fetch(ROWS, values)]
    return {
        **graph_of(task),
        "steps": sorted(rows[:SHOWN], key=lambda row: row.number),
        "waiting": [row for row in rows if row.waits],
        "is_cut": len(rows) > SHOWN,
        "sees_bodies": sees,
        "may_decide": sees and request.user.has_perm(DECIDE),
        "children": f"{reverse('admin:llmtasks_task_changelist')}?part_of={task.id}",
    }


def graph_of(task: Task) -> dict[str, Any]:
    """The drawing and what it came to. Where that takes too long, as it may for ten thousand tasks
    that Postgres has no statistics of yet, the page goes without."""
    try:
        return {"graph": runs.drawn(task), "total": runs.total_of(task)}
    except OperationalError:
        log.warning("a run is too large to be drawn now", extra={"task": task.id})
        return {"graph": None, "total": None}


class DecidingAdmin(ModelAdmin):
    """The view of an admin of tasks by which a person decides on a step."""

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.decide)
        return [path("decide/", view, name="llmtasks_task_decide"), *super().get_urls()]

    def decide(self, request: HttpRequest) -> HttpResponse:
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        if not (request.user.has_perm(DECIDE) and request.user.has_perm(VIEW_BODIES)):
            raise PermissionDenied
        run = request.POST.get("decision") == "approve"
        step = step_named(request.POST.get("step", ""))
        comment = request.POST.get("comment", "").replace("\0", "")[:MAX_COMMENT]
        who = request.user.get_username()
        decided = steps.decide(step.id, step.tenant_id, run=run, by=who, comment=comment)
        page = reverse("admin:llmtasks_task_change", args=(step.task_id,))
        if decided is None:
            messages.error(request, f"Step {step.number} waits for nobody any more.")
            return HttpResponseRedirect(page)
        word = "Approved" if run else "Refused"
        rows: Any = [Task(pk=step.task_id)]
        pk: Any = request.user.pk
        LogEntry.objects.log_actions(pk, rows, CHANGE, f"{word} step {step.number}, {step.name}.")
        messages.success(request, f"{word} step {step.number}, {step.name}: the run goes on.")
        return HttpResponseRedirect(page)


def step_named(text: str) -> Step:
    try:
        return Step.objects.get(pk=UUID(text))
    except (ValueError, Step.DoesNotExist):
        raise SuspiciousOperation("no step's id") from None
