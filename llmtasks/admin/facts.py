"""The page of a row that nobody edits: its values in groups, told rather than put into a form."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest, HttpResponse

from llmtasks.admin import cells
from llmtasks.admin.lists import ReadOnly

# A title, and the names of fields or of the admin's own methods.
Group = tuple[str, Sequence[str]]


class FactsAdmin(ReadOnly):
    """`facts` are the page's groups. `wide_facts` have a line of their own."""

    facts: ClassVar[Sequence[Group]] = ()
    wide_facts: ClassVar[frozenset[str]] = frozenset()
    change_form_outer_before_template = "admin/llmtasks/facts.html"

    def get_facts(self, request: HttpRequest, obj: Any) -> Sequence[Group]:
        return self.facts

    def get_fieldsets(self, request: HttpRequest, obj: Model | None = None) -> list[Any]:
        """No form at all."""
        return []

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any
    ) -> HttpResponse:
        row = kwargs.get("obj")
        if row is not None:
            context["groups"] = [
                (title, [self.fact(row, name) for name in names])
                for title, names in self.get_facts(request, row)
            ]
        response: HttpResponse = super().render_change_form(request, context, *args, **kwargs)
        return response

    def fact(self, row: Model, name: str) -> dict[str, Any]:
        """One value with its label; empty ones have a dash."""
        method: Any = getattr(self, name, None)
        if not hasattr(method, "short_description"):
            field: Any = row._meta.get_field(name)
            label, value = field.verbose_name, getattr(row, name)
        else:
            label, value = method.short_description, method(row)
        if isinstance(value, datetime):
            value = cells.moment(value)
        shown = cells.NOTHING if value is None or value == "" else value
        return {"label": label, "value": shown, "is_wide": name in self.wide_facts}


class VersionsAdmin(FactsAdmin):
    """Versions of something: added by a form, never edited."""

    list_filter: ClassVar[Any] = ()
    show_full_result_count = False
    ordering = ("-id",)
    sortable_by: ClassVar[Any] = ()

    def has_add_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm(f"llmtasks.add_{self.opts.model_name}")

    def get_fieldsets(self, request: HttpRequest, obj: Model | None = None) -> list[Any]:
        return [(None, {"fields": self.fields})] if obj is None else []

    @admin.display(description="version")
    def shown_name(self, row: Model) -> str:
        return str(row)
