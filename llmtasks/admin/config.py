"""Providers. An edit is in force in every process within a second."""

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.forms import ModelForm
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    HttpResponseNotAllowed,
    HttpResponseRedirect,
)
from django.urls import URLPattern, path, reverse
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline
from unfold.widgets import UnfoldAdminSelectWidget

from llmtasks import health, routing
from llmtasks.admin import cells, limits
from llmtasks.admin.lists import Rows
from llmtasks.guards import accounts
from llmtasks.models import Provider, ProviderModel
from providers import registry

# The start page's and the provider's page's buttons.
VERBS = ("pause", "resume", "recover")


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
    actions = ("pause", "resume", "recover")
    inlines = (ModelInline,)
    readonly_fields = ("credential_leads",)
    change_form_outer_before_template = "admin/llmtasks/provider_alert.html"
    change_form_outer_after_template = "admin/llmtasks/provider_health.html"
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
        """The buttons of the start page, and of the provider's own page."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        if not self.has_change_permission(request) or verb not in VERBS:
            raise PermissionDenied
        getattr(self, verb)(request, Provider.objects.filter(pk=pk))
        if "stay" in request.POST:
            return HttpResponseRedirect(reverse("admin:llmtasks_provider_change", args=(pk,)))
        return HttpResponseRedirect(reverse("admin:index"))

    @admin.action(description="Pause: its queued work waits", permissions=["change"])
    def pause(self, request: HttpRequest, queryset: Rows) -> None:
        self.set_paused(request, queryset, True)

    @admin.action(description="Resume", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: Rows) -> None:
        self.set_paused(request, queryset, False)

    @admin.action(description="Use the credential again", permissions=["change"])
    def recover(self, request: HttpRequest, queryset: Rows) -> None:
        for provider in queryset:
            if accounts.recover(provider.name, request.user.get_username()):
                self.log_change(request, provider, "Credential in use again.")
                messages.success(request, f"{provider.name} is used again.")
            else:
                messages.info(request, f"{provider.name}: its credential was not refused.")

    def save_model(self, request: HttpRequest, obj: Provider, form: Any, change: bool) -> None:
        """Another credential deserves another try."""
        super().save_model(request, obj, form, change)
        is_other = change and "credential" in form.changed_data
        if is_other and accounts.recover(obj.name, request.user.get_username()):
            messages.success(request, f"{obj.name} is used again, with its new credential.")

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any
    ) -> HttpResponse:
        provider = kwargs.get("obj")
        if provider is not None:
            context["refused"] = limits.refused_of(provider)
            context["may_switch"] = self.has_change_permission(request)
            context["models"] = limits.models_of(health.now(), provider.name)
            context["events"] = limits.events(provider.name)
        response: HttpResponse = super().render_change_form(request, context, *args, **kwargs)
        return response

    def set_paused(self, request: HttpRequest, queryset: Rows, is_paused: bool) -> None:
        word = "paused" if is_paused else "resumed"
        for provider in queryset.filter(is_paused=not is_paused):
            Provider.objects.filter(pk=provider.pk).update(is_paused=is_paused)
            self.log_change(request, provider, f"{word.capitalize()}.")
            messages.success(request, f"{provider.name} is {word}.")

    @admin.display(description="state")
    def state_label(self, provider: Provider) -> SafeString:
        if provider.refused_at is not None:
            return cells.label("refused")
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
