"""Workflows: shared ones are made here, tenants make their own by the API. Versions are added."""

from collections.abc import Sequence
from typing import Any, ClassVar

from django.contrib import admin
from django.core.exceptions import ValidationError
from django.db.models import Max
from django.forms import ModelForm
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.widgets import UnfoldAdminTextareaWidget

from llmtasks.admin import bodies, cells, facts
from llmtasks.admin.lists import Rows, TenantFilter, as_uuid
from llmtasks.admin.prompts import Indented
from llmtasks.errors import ApiError
from llmtasks.models import Workflow, WorkflowVersion
from llmtasks.workflows import store
from llmtasks.workflows.spec import parse


@admin.register(Workflow)
class WorkflowAdmin(ModelAdmin):
    list_display = ("name", "tenant_name", "latest", "created_at")
    list_filter = (TenantFilter,)
    list_select_related = ("tenant",)
    search_fields = ("name",)
    search_help_text = "A part of the name"
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    list_fullwidth = True
    fields = ("tenant", "name")

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Tasks name it."""
        return False

    def get_queryset(self, request: HttpRequest) -> Rows:
        rows: Rows = super().get_queryset(request).annotate(latest=Max("versions__number"))
        return rows

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Sequence[str]:
        return () if obj is None else ("tenant", "name")

    @admin.display(description="tenant")
    def tenant_name(self, row: Workflow) -> SafeString | str:
        if row.tenant is None:
            return "shared by all"
        return cells.link("tenant", row.tenant_id, row.tenant.name)

    @admin.display(description="latest version")
    def latest(self, row: Any) -> int | None:
        number: int | None = row.latest
        return number


class VersionForm(ModelForm):  # type: ignore[type-arg]
    """A new version. What is wrong is told with the place in the declaration."""

    spec = Indented(
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 30}),
        initial={"do": {"kind": "pipeline", "stages": []}},
        help_text="The declaration as JSON: docs/workflows.md.",
    )

    class Meta:
        model = WorkflowVersion
        fields = ("workflow", "spec", "comment")

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        if self.errors:
            return values
        row = values["workflow"]
        try:
            declared = parse(values["spec"])
            store.ready(declared, row.tenant_id, chain=(row.name,))
        except ApiError as error:
            self.add_error("spec", ValidationError(error.message))
        return values


@admin.register(WorkflowVersion)
class WorkflowVersionAdmin(facts.VersionsAdmin):
    form = VersionForm
    list_display = ("shown_name", "tenant_name", "comment", "created_by", "created_at")
    list_select_related = ("workflow__tenant",)
    search_fields = ("workflow__name",)
    fields = ("workflow", "spec", "comment")
    facts: ClassVar[Any] = (
        ("", ("shown_name", "tenant_name", "created_at", "created_by", "comment")),
        ("Declares", ("shown_spec",)),
    )
    wide_facts = frozenset({"shown_spec"})

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        """Of the version that it follows."""
        chosen = request.GET.get("workflow", "")
        if not as_uuid(chosen):
            return {}
        last = WorkflowVersion.objects.filter(workflow_id=chosen).order_by("-number").first()
        return {"workflow": chosen} | ({} if last is None else {"spec": last.spec})

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        values = form.cleaned_data
        version, _ = store.save(
            obj.workflow.tenant_id,
            obj.workflow.name,
            parse(values["spec"]),
            by=request.user.get_username(),
            comment=values["comment"],
        )
        obj.pk, obj.number = version.pk, version.number
        obj._state.adding = False

    @admin.display(description="tenant")
    def tenant_name(self, row: WorkflowVersion) -> SafeString | str:
        tenant = row.workflow.tenant
        if tenant is None:
            return "shared by all"
        return cells.link("tenant", tenant.pk, tenant.name)

    @admin.display(description="")
    def shown_spec(self, row: WorkflowVersion) -> SafeString:
        return bodies.as_json(row.spec)
