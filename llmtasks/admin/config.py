"""Providers and routes. An edit is in force in every process within a second."""

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import ForeignKey
from django.forms import ModelForm
from django.http import (
    HttpRequest,
    HttpResponseBase,
    HttpResponseNotAllowed,
    HttpResponseRedirect,
)
from django.urls import URLPattern, path, reverse
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline
from unfold.widgets import UnfoldAdminSelectWidget

from llmtasks import routing
from llmtasks.admin import cells
from llmtasks.admin.lists import Rows, choice_filter
from llmtasks.models import Provider, ProviderModel, Route, RouteCandidate
from providers import registry


class ProviderForm(ModelForm):  # type: ignore[type-arg]
    adapter = forms.ChoiceField(
        choices=[(name, name) for name in registry.adapters()], widget=UnfoldAdminSelectWidget
    )

    class Meta:
        model = Provider
        fields = (
            "name", "adapter", "base_url", "credential", "options", "price_family", "is_paused",
            "connect_timeout_s", "read_timeout_s", "total_timeout_s",
        )  # fmt: skip

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        adapter, url = values.get("adapter"), values.get("base_url")
        if adapter and url:
            try:
                registry.check_base_url(adapter, url)
            except ValueError as error:
                self.add_error("base_url", str(error))
        return values


class ModelInline(TabularInline):
    model = ProviderModel
    extra = 0
    verbose_name = "model"
    fields = ("name", "context_window", "max_output_tokens")


@admin.register(Provider)
class ProviderAdmin(ModelAdmin):
    form = ProviderForm
    list_display = (
        "name", "adapter", "base_url", "state_label", "credential", "credential_leads",
        "price_family", "rows",
    )  # fmt: skip
    show_full_result_count = False
    sortable_by = ()
    list_fullwidth = True
    actions = ("pause", "resume")
    inlines = (ModelInline,)
    readonly_fields = ("credential_leads",)
    fieldsets = (
        (None, {"fields": (("name", "adapter"), "base_url", "is_paused")}),
        (
            "Credential",
            {
                "description": "A reference to where the servers find the key, env:NAME or "
                "file:/path. The key itself is stored nowhere.",
                "fields": (("credential", "credential_leads"),),
            },
        ),
        ("Cost", {"fields": ("price_family",)}),
        (
            "Calls",
            {
                "fields": (
                    ("connect_timeout_s", "read_timeout_s", "total_timeout_s"),
                    "options",
                )
            },
        ),
    )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        """The name is part of queue names."""
        return (*self.readonly_fields, *(("name",) if obj else ()))

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.switch)
        own = path("<int:pk>/<str:verb>/", view, name="llmtasks_provider_switch")
        return [*super().get_urls()[:-1], own, *super().get_urls()[-1:]]

    def switch(self, request: HttpRequest, pk: int, verb: str) -> HttpResponseBase:
        """The start page's buttons."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        if not self.has_change_permission(request) or verb not in {"pause", "resume"}:
            raise PermissionDenied
        self.set_paused(request, Provider.objects.filter(pk=pk), verb == "pause")
        return HttpResponseRedirect(reverse("admin:index"))

    @admin.action(description="Pause: its queued work waits", permissions=["change"])
    def pause(self, request: HttpRequest, queryset: Rows) -> None:
        self.set_paused(request, queryset, True)

    @admin.action(description="Resume", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: Rows) -> None:
        self.set_paused(request, queryset, False)

    def set_paused(self, request: HttpRequest, queryset: Rows, is_paused: bool) -> None:
        word = "paused" if is_paused else "resumed"
        for provider in queryset.filter(is_paused=not is_paused):
            Provider.objects.filter(pk=provider.pk).update(is_paused=is_paused)
            self.log_change(request, provider, f"{word.capitalize()}.")
            messages.success(request, f"{provider.name} is {word}.")

    @admin.display(description="state")
    def state_label(self, provider: Provider) -> SafeString:
        return cells.label("paused" if provider.is_paused else "on")

    @admin.display(description="key found here")
    def credential_leads(self, provider: Provider) -> SafeString:
        """Whether the reference leads to a key in this process; never the key."""
        if not provider.credential:
            return cells.label("not needed")
        return cells.label("yes" if routing.resolve(provider.credential) else "no")

    @admin.display(description="its")
    def rows(self, provider: Provider) -> SafeString:
        query = f"provider={provider.name}"
        links = [cells.list_link(name, query, f"{name}s") for name in ("task", "attempt")]
        return SafeString(" · ".join(links))


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
    list_display = ("name", "kind", "is_active", "shown_candidates")
    list_filter = (choice_filter("kind", Route.Kind.choices),)
    search_fields = ("name",)
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    inlines = (CandidateInline,)
    fields = (("name", "kind"), "is_active")

    def get_queryset(self, request: HttpRequest) -> Rows:
        rows: Rows = super().get_queryset(request).prefetch_related("candidates__model__provider")
        return rows

    @admin.display(description="candidates, in order")
    def shown_candidates(self, route: Route) -> str:
        names = [str(candidate.model) for candidate in route.candidates.all()]
        return " → ".join(names) or "none: add one"
