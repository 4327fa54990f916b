"""Tenants and their keys. A key's secret is shown once, in the answer to its making."""

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin

from llmtasks.admin import cells
from llmtasks.admin.lists import Rows, TenantFilter
from llmtasks.admin.words import words
from llmtasks.models import ApiKey, Scope, Tenant
from llmtasks.tools.registry import registry as tools
from providers import registry


class TenantForm(ModelForm):  # type: ignore[type-arg]
    tools = words(Tenant, "tools")

    class Meta:
        model = Tenant
        fields = ("name", "is_active", "weight", "tools", "webhook_url", "webhook_secret")

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        url, secret = values.get("webhook_url"), values.get("webhook_secret")
        if url and not secret and "webhook_secret" not in self.errors:
            self.add_error("webhook_secret", "What is sent has to be signed: give a reference.")
        try:
            if url:
                registry.check_base_url("the webhook", url)
        except ValueError as error:
            self.add_error("webhook_url", str(error))
        return values


@admin.register(Tenant)
class TenantAdmin(ModelAdmin):
    """Switched off, not deleted: tasks and bills refer to it."""

    form = TenantForm
    list_display = ("name", "is_active", "weight", "created", "rows")
    search_fields = ("name",)
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    readonly_fields = ("id", "created_at", "rows")

    def get_fields(self, request: HttpRequest, obj: Tenant | None = None) -> tuple[str, ...]:
        fields = ("name", "is_active", "weight", "tools", "webhook_url", "webhook_secret")
        return (*fields, *(self.readonly_fields if obj else ()))

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    @admin.display(description="created")
    def created(self, tenant: Tenant) -> SafeString | str:
        return cells.moment(tenant.created_at)

    @admin.display(description="its")
    def rows(self, tenant: Tenant) -> SafeString:
        query = f"tenant={tenant.pk}"
        links = [cells.list_link(name, query, f"{name}s") for name in ("task", "attempt")]
        links.append(cells.list_link("apikey", query, "keys"))
        return SafeString(" · ".join(links))


def scopes() -> list[tuple[str, str]]:
    """Ours, and those that tools ask for."""
    asked = sorted({scope for tool in tools.all() for scope in tool.scopes} - set(Scope.values))
    return [*Scope.choices, *((scope, f"tools that ask for {scope!r}") for scope in asked)]


class KeyForm(ModelForm):  # type: ignore[type-arg]
    scopes = forms.MultipleChoiceField(
        choices=scopes, widget=forms.CheckboxSelectMultiple, initial=Scope.values
    )

    tools = words(ApiKey, "tools")

    class Meta:
        model = ApiKey
        fields = ("tenant", "name", "scopes", "tools", "expires_at")


@admin.register(ApiKey)
class ApiKeyAdmin(ModelAdmin):
    """Revoked, not deleted: tasks refer to it."""

    form = KeyForm
    list_display = (
        "name", "tenant", "public_part", "may", "state_label", "created", "expires", "last_used",
    )  # fmt: skip
    list_filter = (TenantFilter,)
    list_select_related = ("tenant",)
    search_fields = ("=prefix", "name")
    search_help_text = "A name, or the 12 characters after lt_"
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    actions = ("revoke",)
    autocomplete_fields = ("tenant",)
    list_fullwidth = True
    shown = ("public_part", "state_label", "created_at", "last_used_at", "revoked_at")

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> tuple[str, ...]:
        fields = ("tenant", "name", "scopes", "tools", "expires_at")
        return (*fields, *(self.shown if obj else ()))

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return ("tenant", *self.shown) if obj else ()

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if not change:
            made, secret = ApiKey.issue(obj.tenant, obj.name)
            obj.prefix, obj.secret_hash = made.prefix, made.secret_hash
            # On the request alone: neither a session nor a cookie ever holds it.
            request.issued_secret = secret  # type: ignore[attr-defined]
        super().save_model(request, obj, form, change)

    def response_add(
        self, request: HttpRequest, obj: ApiKey, post_url_continue: Any = None
    ) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": "The new key",
            "opts": self.opts,
            "key": obj,
            "secret": request.issued_secret,  # type: ignore[attr-defined]
        }
        return TemplateResponse(
            request,
            "admin/llmtasks/key_issued.html",
            context,
            headers={"Cache-Control": "no-store"},
        )

    @admin.action(description="Revoke: refused within a second, for good", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: Rows) -> None:
        keys = list(queryset.filter(revoked_at=None))
        ApiKey.objects.filter(pk__in=[key.pk for key in keys]).update(revoked_at=timezone.now())
        for key in keys:
            self.log_change(request, key, "Revoked.")
        messages.success(request, f"{len(keys)} keys revoked.")

    @admin.display(description="key")
    def public_part(self, key: ApiKey) -> str:
        return f"lt_{key.prefix}_…"

    @admin.display(description="may")
    def may(self, key: ApiKey) -> str:
        return ", ".join(key.scopes) or cells.NOTHING

    @admin.display(description="created")
    def created(self, key: ApiKey) -> SafeString | str:
        return cells.moment(key.created_at)

    @admin.display(description="expires")
    def expires(self, key: ApiKey) -> SafeString | str:
        return cells.moment(key.expires_at)

    @admin.display(description="last used")
    def last_used(self, key: ApiKey) -> SafeString | str:
        return cells.moment(key.last_used_at)

    @admin.display(description="state")
    def state_label(self, key: ApiKey) -> SafeString:
        return cells.label(state_of(key))


def state_of(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if not key.tenant.is_active:
        return "tenant is off"
    return "usable" if key.is_usable(timezone.now()) else "expired"
