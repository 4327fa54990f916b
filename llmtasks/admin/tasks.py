"""Tasks: looked at, cancelled and retried, never edited."""

from typing import Any

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.admin import TabularInline

from llmtasks.admin import bodies, cells, decisions, facts, feedback, steering
from llmtasks.admin.attempts import AttemptCells
from llmtasks.admin.lists import (
    CreatedFilter,
    ParentFilter,
    Rows,
    TenantFilter,
    choice_filter,
    providers,
)
from llmtasks.models import Attempt, Feedback, Kind, Lane, Mode, PromptVersion, Status, Task

VIEW_BODIES = "llmtasks.view_bodies"

FIRST = (
    "status_label", "kind", "mode", "lane",
    "tenant_name", "user", "route", "provider", "shown_prompt",
    "tokens", "shown_cost", "attempts", "duration",
)  # fmt: skip
DETAILS = (
    "created_at", "run_at", "not_before", "deadline",
    "queued_at", "started_at", "finished_at", "cancel_requested_at",
    "request_id", "api_key", "on_unknown", "relations",
    "owner", "seq", "fence", "retry_after",
    "shown_metadata",
)  # fmt: skip


class AttemptInline(AttemptCells, TabularInline):
    """The calls of a task, in order."""

    model = Attempt
    extra = 0
    can_delete = False
    ordering = ("step", "number")
    verbose_name_plural = "attempts"
    fields = readonly_fields = (
        "call", "state_label", "result", "tokens", "shown_cost", "latency", "first_token",
    )  # fmt: skip

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> Rows:
        rows: Rows = super().get_queryset(request).defer("raw_usage")
        return rows

    @admin.display(description="call")
    def call(self, row: Attempt) -> SafeString | str:
        number = f"{row.step}.{row.number}" if row.step else str(row.number)
        return cells.link("attempt", row.pk, f"{number} · {row.provider}/{row.model}")


@admin.register(Task)
class TaskAdmin(facts.FactsAdmin, steering.SteeringAdmin, decisions.DecidingAdmin):
    list_display = (
        "short_id", "created", "status_label", "kind", "lane", "route", "provider",
        "tenant_name", "tokens", "shown_cost", "duration",
    )  # fmt: skip
    list_display_links = None
    list_filter = (
        choice_filter("status", Status.choices, is_indexed=True),
        TenantFilter,
        CreatedFilter,
        choice_filter("lane", Lane.choices),
        choice_filter("provider", providers),
        choice_filter("mode", Mode.choices),
        choice_filter("kind", Kind.choices),
        ParentFilter,
    )
    list_select_related = ("tenant",)
    list_deferred = ("metadata", "error_message")
    search_help_text = "A task's whole id"
    inlines = (AttemptInline,)
    wide_facts = frozenset({"shown_error", "conversation", "shown_metadata", "shown_feedback"})

    # --- the list -------------------------------------------------------------------------------

    @admin.display(description="id")
    def short_id(self, task: Task) -> SafeString | str:
        return cells.link("task", task.pk, cells.short(task.pk))

    @admin.display(description="created")
    def created(self, task: Task) -> SafeString:
        return cells.brief(task.created_at)

    @admin.display(description="status")
    def status_label(self, task: Task) -> SafeString:
        return cells.label(task.status)

    @admin.display(description="tenant")
    def tenant_name(self, task: Task) -> SafeString | str:
        return cells.link("tenant", task.tenant_id, task.tenant.name)

    @admin.display(description="tokens")
    def tokens(self, task: Task) -> SafeString | str:
        given = task.input_tokens + task.cached_input_tokens + task.cache_write_tokens
        made = task.output_tokens + task.reasoning_tokens
        return cells.tokens(given, made)

    @admin.display(description="cost")
    def shown_cost(self, task: Task) -> SafeString | str:
        return cells.money(task.cost, task.cost_state)

    @admin.display(description="duration")
    def duration(self, task: Task) -> str:
        return cells.span(task.started_at, task.finished_at)

    # --- the page of one task -------------------------------------------------------------------

    def get_facts(self, request: HttpRequest, obj: Task) -> list[facts.Group]:
        # Most tasks have no prompt: no dash for it.
        first = FIRST if obj.prompt else [name for name in FIRST if name != "shown_prompt"]
        groups: list[facts.Group] = [("", first)]
        if obj.error_class:
            groups.append(("Error", ("error_class", "error_status", "error_param", "shown_error")))
        if request.user.has_perm(VIEW_BODIES):
            groups.append(("Prompt and answer", ("conversation",)))
        return [*groups, ("", ("shown_feedback",)), ("Details", DETAILS)]

    @admin.display(description="error")
    def shown_error(self, task: Task) -> SafeString:
        return format_html('<pre class="lt-text">{}</pre>', task.error_message)

    @admin.display(description="")
    def conversation(self, task: Task) -> SafeString:
        return bodies.shown(task)

    @admin.display(description="prompt")
    def shown_prompt(self, task: Task) -> SafeString | str:
        name, _, number = task.prompt.partition("@")
        rows = PromptVersion.objects.filter(
            prompt__tenant_id=task.tenant_id, prompt__name=name, number=int(number)
        )
        version = rows.first()
        return (
            task.prompt if version is None else cells.link("promptversion", version.pk, task.prompt)
        )

    @admin.display(description="feedback")
    def shown_feedback(self, task: Task) -> SafeString | str:
        """Without comments: those are on the feedback's own pages."""
        return (
            format_html_join(
                " · ",
                "{} {} {}",
                (
                    (
                        cells.link("feedback", row.pk, row.source),
                        feedback.shown_score(row.score),
                        row.label,
                    )
                    for row in Feedback.objects.filter(task_id=task.pk).order_by("source")[:50]
                ),
            )
            or cells.NOTHING
        )

    @admin.display(description="API key")
    def api_key(self, task: Task) -> SafeString | str:
        if task.key_id is None:
            return cells.NOTHING
        return cells.link("apikey", task.key_id, cells.short(task.key_id))

    @admin.display(description="related tasks")
    def relations(self, task: Task) -> SafeString | str:
        for of, name in ((task.retry_of, "retry of"), (task.parent_id, "part of")):
            if of is not None:
                return format_html("{} {}", name, cells.link("task", of, cells.short(of)))
        return cells.NOTHING

    @admin.display(description="run by")
    def owner(self, task: Task) -> SafeString | str:
        if task.owner_id is None:
            return cells.NOTHING
        return cells.link("worker", task.owner_id, cells.short(task.owner_id))

    @admin.display(description="metadata")
    def shown_metadata(self, task: Task) -> SafeString | str:
        return bodies.as_json(task.metadata) if task.metadata else cells.NOTHING

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any
    ) -> HttpResponse:
        task = kwargs.get("obj")
        if task is not None and self.has_steer_permission(request):
            context["verbs"] = [v for v in steering.VERBS.values() if task.status in v.of_one]
        if task is not None:
            context["run"] = decisions.run_of(request, task)
        response: HttpResponse = super().render_change_form(request, context, *args, **kwargs)
        return response
