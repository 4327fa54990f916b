"""Feedback: each one, and how prompts, routes and models do by it."""

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString

from llmtasks.admin import cells
from llmtasks.admin.facts import FactsAdmin, Group
from llmtasks.admin.lists import BoundedAdmin, CreatedFilter, TenantFilter, first_id
from llmtasks.models import Feedback
from llmtasks.stores import fetch

VIEW_BODIES = "llmtasks.view_bodies"
LOOKED_AT = 20_000
SHOWN = 10
WINDOW = "30d"

# The model is the one that gave the last answer.
GROUPS = """
WITH recent AS (
    SELECT task_id, tenant_id, score FROM llmtasks_feedback
    WHERE id >= %(since)s ORDER BY id DESC LIMIT %(looked_at)s
), named AS (
    SELECT g.what, g.name, r.score FROM recent r
    JOIN llmtasks_task t ON t.id = r.task_id AND t.tenant_id = r.tenant_id
    JOIN llmtasks_tenant n ON n.id = r.tenant_id
    LEFT JOIN LATERAL (
        SELECT provider || '/' || model AS name FROM llmtasks_attempt
        WHERE task_id = t.id AND state = 'settled' AND error_class = ''
        ORDER BY step DESC, number DESC LIMIT 1
    ) AS m ON true
    CROSS JOIN LATERAL (
        VALUES ('prompt', CASE WHEN t.prompt <> '' THEN n.name || '/' || t.prompt END),
            ('route', t.route), ('model', m.name)
    ) AS g(what, name)
    WHERE g.name IS NOT NULL
), counted AS (
    SELECT what, name, count(*) AS number, avg(score) AS score,
        count(*) FILTER (WHERE score < 0) AS bad,
        row_number() OVER (PARTITION BY what ORDER BY count(*) DESC, name) AS place
    FROM named GROUP BY what, name
)
SELECT what, name, number, score, bad FROM counted WHERE place <= %(shown)s ORDER BY what, place
"""


def groups() -> list[dict[str, Any]]:
    """Prompts, routes and models with the most feedback of late, and what it says."""
    since = first_id(CreatedFilter.NEWER[WINDOW])
    values = {"since": since, "looked_at": LOOKED_AT, "shown": SHOWN}
    found: dict[str, list[dict[str, Any]]] = {"prompt": [], "route": [], "model": []}
    for what, name, number, score, bad in fetch(GROUPS, values):
        found[what].append(
            {"name": name, "number": number, "bad": bad, "score": shown_score(score)}
        )
    return [{"what": what, "rows": rows} for what, rows in found.items()]


def shown_score(score: float | None) -> str:
    return cells.NOTHING if score is None else f"{score:+.2f}"


@admin.register(Feedback)
class FeedbackAdmin(FactsAdmin, BoundedAdmin):
    list_display = ("short_id", "given", "task_link", "tenant_name", "source", "scored", "label")
    list_display_links = None
    list_filter = (TenantFilter, CreatedFilter)
    list_select_related = ("tenant",)
    list_deferred = ("comment",)
    search_help_text = "A feedback's whole id"
    list_before_template = "admin/llmtasks/feedback_head.html"
    wide_facts = frozenset({"shown_comment"})

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        return super().changelist_view(request, {"groups": groups(), **(extra_context or {})})

    def get_facts(self, request: HttpRequest, obj: Any) -> list[Group]:
        names = ["task_link", "tenant_name", "source", "scored", "label", "created_at"]
        names.append("updated_at")
        # What an end user wrote is read by whoever may read prompts and answers.
        if request.user.has_perm(VIEW_BODIES):
            names.append("shown_comment")
        return [("", names)]

    @admin.display(description="id")
    def short_id(self, row: Feedback) -> SafeString | str:
        return cells.link("feedback", row.pk, cells.short(row.pk))

    @admin.display(description="given")
    def given(self, row: Feedback) -> SafeString:
        return cells.brief(row.updated_at)

    @admin.display(description="task")
    def task_link(self, row: Feedback) -> SafeString | str:
        return cells.link("task", row.task_id, cells.short(row.task_id))

    @admin.display(description="tenant")
    def tenant_name(self, row: Feedback) -> SafeString | str:
        return cells.link("tenant", row.tenant_id, row.tenant.name)

    @admin.display(description="score")
    def scored(self, row: Feedback) -> str:
        return shown_score(row.score)

    @admin.display(description="comment")
    def shown_comment(self, row: Feedback) -> SafeString | str:
        if not row.comment:
            return cells.NOTHING
        return format_html('<pre class="lt-text">{}</pre>', row.comment)
