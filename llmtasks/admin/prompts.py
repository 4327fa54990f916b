"""Prompts: versions are added and compared, labels are moved, nothing is deleted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar

from django import forms
from django.contrib import admin
from django.core.exceptions import ValidationError
from django.db.models import Max
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline
from unfold.widgets import UnfoldAdminTextareaWidget

from llmtasks import prompts
from llmtasks.admin import bodies, cells, facts
from llmtasks.admin.lists import CreatedFilter, Rows, TenantFilter, as_uuid, first_id
from llmtasks.errors import InvalidInput
from llmtasks.models import Prompt, PromptLabel, PromptVersion
from llmtasks.stores import fetch

COMPARED = 12
# The newest tasks of a version that are looked at.
LOOKED_AT = 5_000
DEFAULT_AGE = "7d"

# Of the newest tasks of each version in the time: what they cost, how long they took, how they
# ended, and what was thought of them.
STATS = """
SELECT v.name, s.*
FROM unnest(%(names)s::text[]) AS v(name) CROSS JOIN LATERAL (
    SELECT count(*), count(*) FILTER (WHERE t.status IN ('failed', 'expired')),
        count(*) FILTER (WHERE t.finished_at IS NOT NULL),
        avg(t.cost), count(*) FILTER (WHERE t.cost_state = 'unpriced'),
        percentile_cont(0.5) WITHIN GROUP (ORDER BY t.took_s),
        percentile_cont(0.95) WITHIN GROUP (ORDER BY t.took_s),
        avg(f.score), coalesce(sum(f.number), 0)::bigint
    FROM (
        SELECT id, status, finished_at, cost, cost_state,
            CASE WHEN status = 'succeeded'
                 THEN extract(epoch FROM finished_at - started_at)::float END AS took_s
        FROM llmtasks_task
        WHERE tenant_id = %(tenant)s AND prompt = v.name AND prompt <> '' AND id >= %(since)s
        ORDER BY id DESC LIMIT %(looked_at)s
    ) AS t LEFT JOIN LATERAL (
        SELECT avg(score) AS score, count(*) AS number FROM llmtasks_feedback
        WHERE tenant_id = %(tenant)s AND task_id = t.id
    ) AS f ON true
) AS s
"""


@dataclass(frozen=True, slots=True)
class Stats:
    """How a version did. What nobody knows yet has a dash."""

    version: PromptVersion
    labels: Sequence[str]
    tasks: int
    failed: int
    ended: int
    cost: Any
    unpriced: int
    p50_s: float | None
    p95_s: float | None
    score: float | None
    feedback: int

    @property
    def shown_tasks(self) -> str:
        return f"{self.tasks:,}{'+' if self.tasks >= LOOKED_AT else ''}"

    @property
    def error_rate(self) -> str:
        return f"{100 * self.failed / self.ended:.1f}%" if self.ended else cells.NOTHING

    @property
    def shown_cost(self) -> SafeString | str:
        if self.cost is None:
            return cells.money(None, "unpriced") if self.unpriced else cells.NOTHING
        return cells.dollars(round(self.cost, 6))

    @property
    def p50(self) -> str:
        return seconds(self.p50_s)

    @property
    def p95(self) -> str:
        return seconds(self.p95_s)

    @property
    def shown_score(self) -> str:
        return cells.NOTHING if self.score is None else f"{self.score:+.2f}"


def seconds(value: float | None) -> str:
    return cells.NOTHING if value is None else cells.milliseconds(round(value * 1000))


def stats_of(prompt: Prompt, age: str) -> list[Stats]:
    """The newest versions and those with a label, side by side."""
    labels: dict[int, list[str]] = {}
    for label in prompt.labels.select_related("version"):
        share = f" {label.share}%" if label.name == PromptLabel.CANARY else ""
        labels.setdefault(label.version.number, []).append(f"{label.name}{share}")
    newest = prompt.versions.order_by("-number")
    found = {row.number: row for row in newest[:COMPARED]}
    found |= {row.number: row for row in newest.filter(number__in=labels)}
    since = first_id(CreatedFilter.NEWER[age])
    names = {f"{prompt.name}@{number}": number for number in sorted(found, reverse=True)}
    values = {
        "tenant": prompt.tenant_id, "names": list(names), "since": since, "looked_at": LOOKED_AT,
    }  # fmt: skip
    rows = {names[name]: figures for name, *figures in fetch(STATS, values)}
    return [
        Stats(found[number], labels.get(number, ()), *rows[number]) for number in names.values()
    ]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of two texts beside each other; `kind` is `same`, or what differs."""

    left: str
    right: str
    kind: str


def beside(left: str, right: str) -> list[Line]:
    """Two texts line by line, what is the same at the same height."""
    one, other = left.splitlines(), right.splitlines()
    found = []
    for kind, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        for index in range(max(b - a, d - c)):
            found.append(
                Line(
                    one[a + index] if a + index < b else "",
                    other[c + index] if c + index < d else "",
                    "same" if kind == "equal" else "differs",
                )
            )
    return found


def as_text(version: PromptVersion) -> str:
    """A version as lines: what it says, then what it sets."""
    said = [f"[{message['role']}]\n{message['content']}" for message in version.messages]
    given = [f"model: {version.model}" if version.model else ""]
    given += [f"{name}: {bodies.text_of(value)}" for name, value in
              sorted(version.parameters.items())]  # fmt: skip
    given += [f"{{{{ {name} }}}}: {bodies.text_of(of)}" for name, of in
              sorted(prompts.properties_of(version.variables).items())]  # fmt: skip
    return "\n".join([*said, *filter(None, given)])


def compared(request: HttpRequest, prompt: Prompt) -> dict[str, Any]:
    """What the page of a prompt says of its versions."""
    age = request.GET.get("age", DEFAULT_AGE)
    rows = stats_of(prompt, age if age in CreatedFilter.NEWER else DEFAULT_AGE)
    known = {str(row.version.number): row.version for row in rows}
    numbers = list(known)
    labelled = [str(row.version.number) for row in rows if row.labels]
    right = request.GET.get("right", numbers[0] if numbers else "")
    left = request.GET.get("left") or next((n for n in [*labelled, *numbers] if n != right), right)
    pair = [known[number] for number in (left, right) if number in known]
    return {
        "rows": rows,
        "age": age,
        "ages": CreatedFilter.NEWER,
        "numbers": numbers,
        "pair": pair if len(pair) == 2 else None,
        "lines": beside(*map(as_text, pair)) if len(pair) == 2 else (),
    }


class LabelForm(ModelForm):  # type: ignore[type-arg]
    class Meta:
        model = PromptLabel
        fields = ("name", "version", "share")

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        if values.get("share") and values.get("name") != PromptLabel.CANARY:
            self.add_error("share", f"Only {PromptLabel.CANARY} has a share.")
        version = values.get("version")
        if version is not None and version.prompt_id != self.instance.prompt_id:
            self.add_error("version", "This is another prompt's.")
        return values


class LabelInline(TabularInline):
    model = PromptLabel
    form = LabelForm
    extra = 0
    fields = ("name", "version", "share", "changed_by", "changed_at")
    readonly_fields = ("changed_by", "changed_at")
    verbose_name_plural = "labels: what runs where no version is named"

    def get_formset(self, request: HttpRequest, obj: Prompt | None = None, **options: Any) -> Any:
        formset = super().get_formset(request, obj, **options)
        if "version" in formset.form.base_fields:
            versions = PromptVersion.objects.select_related("prompt").filter(prompt=obj)
            formset.form.base_fields["version"].queryset = versions
        return formset


@admin.register(Prompt)
class PromptAdmin(ModelAdmin):
    list_display = ("name", "tenant_name", "shown_labels", "latest", "description")
    list_filter = (TenantFilter,)
    list_select_related = ("tenant",)
    search_fields = ("name",)
    search_help_text = "A part of the name"
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    list_fullwidth = True
    fields = ("tenant", "name", "description")
    inlines = (LabelInline,)
    change_form_outer_before_template = "admin/llmtasks/prompt.html"

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Tasks name it."""
        return False

    def get_queryset(self, request: HttpRequest) -> Rows:
        rows: Rows = super().get_queryset(request)
        rows = rows.annotate(latest=Max("versions__number"))
        return rows.prefetch_related("labels__version")

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Sequence[str]:
        return () if obj is None else ("tenant", "name")

    def get_inlines(self, request: HttpRequest, obj: Any = None) -> Any:
        return () if obj is None else self.inlines

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        for row in formset.save(commit=False):
            row.changed_by = request.user.get_username()
            row.save()
        for row in formset.deleted_objects:
            row.delete()

    @admin.display(description="tenant")
    def tenant_name(self, row: Prompt) -> SafeString | str:
        return cells.link("tenant", row.tenant_id, row.tenant.name)

    @admin.display(description="labels")
    def shown_labels(self, row: Prompt) -> str:
        told = [
            f"{label.name}: {label.version.number}"
            + (f" ({label.share}%)" if label.name == label.CANARY else "")
            for label in row.labels.all()
        ]
        return ", ".join(told) or cells.NOTHING

    @admin.display(description="latest version")
    def latest(self, row: Any) -> int | None:
        number: int | None = row.latest
        return number

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any
    ) -> HttpResponse:
        prompt = kwargs.get("obj")
        if prompt is not None:
            context["compared"] = compared(request, prompt)
            context["may_add"] = request.user.has_perm("llmtasks.add_promptversion")
        response: HttpResponse = super().render_change_form(request, context, *args, **kwargs)
        return response


class Indented(forms.JSONField):
    """JSON as a person edits it."""

    def prepare_value(self, value: Any) -> Any:
        if isinstance(value, list | dict):
            return json.dumps(value, indent=2, ensure_ascii=False)
        return super().prepare_value(value)


class VersionForm(ModelForm):  # type: ignore[type-arg]
    """A new version. What is wrong is told at its field."""

    messages = Indented(
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 14}),
        initial=[{"role": "system", "content": ""}, {"role": "user", "content": "{{ text }}"}],
        help_text='A list of {"role", "content"}; {{ name }} in a content stands for a variable.',
    )
    variables = Indented(
        required=False,
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 8}),
        help_text="A JSON schema of an object whose properties are the variables; one with a "
        "default may be left out. Empty: each {{ name }} takes any value.",
    )
    parameters = Indented(
        required=False,
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 4}),
        help_text="Like temperature, where the caller gives none.",
    )

    class Meta:
        model = PromptVersion
        fields = ("prompt", "messages", "variables", "model", "parameters", "note")

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        if self.errors:
            return values
        try:
            prompts.check_content(values["messages"], values["variables"], values["parameters"])
        except InvalidInput as error:
            name = (error.param or "").partition(".")[0].partition("[")[0]
            self.add_error(name if name in self.fields else None, ValidationError(error.message))
        return values


@admin.register(PromptVersion)
class PromptVersionAdmin(facts.VersionsAdmin):
    form = VersionForm
    list_display = ("shown_name", "note", "created_by", "created_at")
    list_select_related = ("prompt",)
    search_fields = ("prompt__name",)
    fields = ("prompt", "messages", "variables", "model", "parameters", "note")
    facts: ClassVar[Any] = (
        ("", ("prompt_link", "number", "model", "created_at", "created_by", "note")),
        ("Says", ("shown_messages",)),
        ("Takes", ("shown_variables", "shown_parameters")),
    )
    wide_facts = frozenset({"shown_messages", "shown_variables", "shown_parameters"})

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        """Of the version that it follows."""
        prompt = request.GET.get("prompt", "")
        rows = PromptVersion.objects.filter(prompt_id=prompt) if as_uuid(prompt) else None
        last = rows.order_by("-number").first() if rows is not None else None
        if last is None:
            return {"prompt": prompt} if as_uuid(prompt) else {}
        names = ("prompt", "messages", "variables", "model", "parameters")
        return {name: getattr(last, name) for name in names}

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        values = form.cleaned_data
        version, _ = prompts.add_version(
            obj.prompt.tenant_id,
            obj.prompt.name,
            messages=values["messages"],
            variables=values["variables"],
            model=values["model"],
            parameters=values["parameters"],
            note=values["note"],
            by=request.user.get_username(),
        )
        obj.pk, obj.number = version.pk, version.number
        obj._state.adding = False

    @admin.display(description="prompt")
    def prompt_link(self, row: PromptVersion) -> SafeString | str:
        return cells.link("prompt", row.prompt_id, row.prompt.name)

    @admin.display(description="")
    def shown_messages(self, row: PromptVersion) -> SafeString:
        return format_html('<pre class="lt-text">{}</pre>', as_text(row))

    @admin.display(description="variables")
    def shown_variables(self, row: PromptVersion) -> SafeString | str:
        return bodies.as_json(row.variables) if row.variables else cells.NOTHING

    @admin.display(description="parameters")
    def shown_parameters(self, row: PromptVersion) -> SafeString | str:
        return bodies.as_json(row.parameters) if row.parameters else cells.NOTHING
