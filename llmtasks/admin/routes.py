"""Routes, the names that clients use, and the vendors' models that they lead to."""

from typing import Any

from django.contrib import admin
from django.db.models import ForeignKey
from django.http import HttpRequest
from unfold.admin import ModelAdmin, TabularInline

from llmtasks.admin.lists import Rows, choice_filter
from llmtasks.models import ProviderModel, Route, RouteCandidate


@admin.register(ProviderModel)
class ProviderModelAdmin(ModelAdmin):
    """Edited with its provider; here for the search in a route's candidates."""

    search_fields = ("name", "provider__name")
    list_display = ("name", "provider", "context_window", "max_output_tokens")
    list_select_related = ("provider",)
    show_full_result_count = False
    sortable_by = ()

    def get_queryset(self, request: HttpRequest) -> Rows:
        rows: Rows = super().get_queryset(request).select_related("provider")
        return rows


class CandidateInline(TabularInline):
    model = RouteCandidate
    extra = 0
    verbose_name = "candidate"
    fields = ("position", "model")
    autocomplete_fields = ("model",)

    def formfield_for_foreignkey(
        self, db_field: "ForeignKey[Any, Any]", request: HttpRequest, **kwargs: Any
    ) -> Any:
        if db_field.name == "model":
            kwargs["queryset"] = ProviderModel.objects.select_related("provider")
        return super().formfield_for_foreignkey(db_field, request, **kwargs)


@admin.register(Route)
class RouteAdmin(ModelAdmin):
    list_display = ("name", "kind", "is_active", "shown_candidates", "fallback", "hedges")
    list_select_related = ("fallback",)
    list_filter = (choice_filter("kind", Route.Kind.choices),)
    search_fields = ("name",)
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    inlines = (CandidateInline,)
    fields = (("name", "kind"), "is_active", ("fallback", "hedges"))

    def get_queryset(self, request: HttpRequest) -> Rows:
        rows: Rows = super().get_queryset(request).prefetch_related("candidates__model__provider")
        return rows

    @admin.display(description="candidates, in order")
    def shown_candidates(self, route: Route) -> str:
        names = [str(candidate.model) for candidate in route.candidates.all()]
        return " → ".join(names) or "none: add one"
