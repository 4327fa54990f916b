"""Tools that are rows. An edit is in force in every process within a second."""

from typing import Any

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
from unfold.admin import ModelAdmin

from llmtasks import routing
from llmtasks.admin import bodies, cells
from llmtasks.admin.lists import Rows, choice_filter
from llmtasks.admin.words import words
from llmtasks.models import HttpTool, McpServer, McpTool
from llmtasks.models.tools import Reached
from llmtasks.tools import http, mcp, openapi, pins
from llmtasks.tools.registry import registry as functions
from providers import registry

CREDENTIAL = (
    "Credential",
    {
        "description": "A reference to where the servers find the secret, env:NAME or file:/path."
        " The secret itself is stored nowhere.",
        "fields": (("credential", "credential_leads"), ("auth_header", "auth_scheme")),
    },
)
HANDLED = (
    ("critical", "idempotent", "needs_approval"),
    ("retries", "per_minute", "concurrency"),
    "scopes",
)


def credential_leads(row: Reached) -> SafeString:
    """Whether the reference leads to a secret in this process; never the secret."""
    if not row.credential:
        return cells.label("not needed")
    return cells.label("yes" if routing.resolve(row.credential) else "no")


def check_header(form: "ModelForm[Any]", values: dict[str, Any]) -> None:
    if values.get("auth_header", "").lower() in openapi.RESERVED | {"content-type", "accept"}:
        form.add_error("auth_header", "This header is the request's own.")


class HttpToolForm(ModelForm):  # type: ignore[type-arg]
    scopes = words(HttpTool, "scopes")

    class Meta:
        model = HttpTool
        fields = "__all__"  # noqa: DJ007 - the admin's fieldsets choose

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        check_header(self, values)
        if values.get("base_url"):
            try:
                registry.check_base_url("the tool", values["base_url"])
            except ValueError as error:
                self.add_error("base_url", str(error))
        if values.get("document") and values.get("operation_id"):
            try:
                openapi.read(values["document"], values["operation_id"])
            except ValueError as error:
                self.add_error("document", str(error))
        if values.get("retries") and not values.get("idempotent"):
            self.add_error("retries", "Only an idempotent tool can have retries.")
        if values.get("version") in functions.tools.get(values.get("name", ""), {}):
            self.add_error("name", "There is a function of this name and version: it goes first.")
        return values


@admin.register(HttpTool)
class HttpToolAdmin(ModelAdmin):
    form = HttpToolForm
    list_display = (
        "name", "version", "operation_id", "base_url", "state_label", "critical", "idempotent",
        "needs_approval", "credential", "leads",
    )  # fmt: skip
    search_fields = ("name", "operation_id")
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    list_fullwidth = True
    readonly_fields = ("credential_leads", "parameters")
    fieldsets = (
        (None, {"fields": (("name", "version"), "is_active", "description")}),
        ("Operation", {"fields": ("base_url", "operation_id", "document", "parameters")}),
        CREDENTIAL,
        ("Runs", {"fields": (*HANDLED, ("timeout_s", "max_result_bytes"))}),
    )

    @admin.display(description="state")
    def state_label(self, row: HttpTool) -> SafeString:
        return cells.label("on" if row.is_active else "off")

    @admin.display(description="secret found here")
    def credential_leads(self, row: HttpTool) -> SafeString:
        return credential_leads(row)

    @admin.display(description="secret found here")
    def leads(self, row: HttpTool) -> SafeString:
        return credential_leads(row)

    @admin.display(description="what models see")
    def parameters(self, row: HttpTool) -> SafeString | str:
        if row.pk is None:
            return cells.NOTHING
        try:
            tool = http.tool_of(row)
        except ValueError as error:
            return str(error)
        return bodies.as_json({"description": tool.description, "parameters": tool.parameters})


# --- MCP ------------------------------------------------------------------------------------------

# What runs on our machines is the operators' to say.
OF_SUPERUSERS = ("transport", "command", "environment")


class McpServerForm(ModelForm):  # type: ignore[type-arg]
    class Meta:
        model = McpServer
        fields = "__all__"  # noqa: DJ007 - the admin's fieldsets choose

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        check_header(self, values)
        # A field that the user may not edit is not in the form.
        transport = values.get("transport", self.instance.transport)
        if transport == McpServer.Transport.STDIO:
            if not values.get("command", self.instance.command):
                self.add_error("command", "Give the program and its arguments.")
            return values
        try:
            registry.check_base_url("the server", values.get("url") or "")
        except ValueError as error:
            self.add_error("url", str(error))
        return values


@admin.register(McpServer)
class McpServerAdmin(ModelAdmin):
    """What the first look at a server finds is pinned; later changes wait for a person."""

    form = McpServerForm
    list_display = ("name", "transport", "place", "state_label", "leads", "looked", "fault", "its")
    search_fields = ("name",)
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    list_fullwidth = True
    actions = ("discover",)
    readonly_fields = ("credential_leads", "looked", "fault")
    fieldsets = (
        (None, {"fields": (("name", "transport"), "is_active", ("looked", "fault"))}),
        ("Over HTTP", {"fields": ("url",)}),
        CREDENTIAL,
        (
            "A program",
            {
                "description": "Run on these servers for each call. Superusers only.",
                "fields": ("command", "environment"),
            },
        ),
        ("Runs", {"fields": (("timeout_s", "max_result_bytes"),)}),
    )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        name = ("name",) if obj else ()
        return (
            *self.readonly_fields, *name,
            *(() if request.user.is_superuser else OF_SUPERUSERS),
        )  # fmt: skip

    @admin.action(description="Look at what they offer", permissions=["change"])
    def discover(self, request: HttpRequest, queryset: Rows) -> None:
        for server in queryset:
            found = pins.discover(server)
            tell = messages.error if found.fault else messages.success
            tell(request, f"{server.name}: {found}")

    @admin.display(description="at")
    def place(self, server: McpServer) -> str:
        if server.transport == McpServer.Transport.HTTP:
            return server.url
        return " ".join(server.command)

    @admin.display(description="state")
    def state_label(self, server: McpServer) -> SafeString:
        return cells.label("on" if server.is_active else "off")

    @admin.display(description="secret found here")
    def credential_leads(self, server: McpServer) -> SafeString:
        return credential_leads(server)

    @admin.display(description="secret found here")
    def leads(self, server: McpServer) -> SafeString:
        return credential_leads(server)

    @admin.display(description="looked at")
    def looked(self, server: McpServer) -> SafeString | str:
        return cells.moment(server.looked_at)

    @admin.display(description="its")
    def its(self, server: McpServer) -> SafeString:
        return cells.list_link("mcptool", f"server__id__exact={server.pk}", "tools")


class McpToolForm(ModelForm):  # type: ignore[type-arg]
    scopes = words(McpTool, "scopes")

    class Meta:
        model = McpTool
        fields = "__all__"  # noqa: DJ007 - the admin's fieldsets choose

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        if values.get("retries") and not values.get("idempotent"):
            self.add_error("retries", "Only an idempotent tool can have retries.")
        return values


@admin.register(McpTool)
class McpToolAdmin(ModelAdmin):
    """Found by looking at servers, never added. What waits for a person is shown beside what is
    pinned; a person confirms what was shown."""

    form = McpToolForm
    list_display = (
        "as_called", "server", "state_label", "critical", "idempotent", "needs_approval",
        "confirmed_by",
    )  # fmt: skip
    list_filter = ("server", choice_filter("state", McpTool.State.choices))
    list_select_related = ("server",)
    search_fields = ("name",)
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    list_fullwidth = True
    actions = ("switch_off", "switch_on")
    readonly_fields = ("as_called", "server", "state_label", "is_pinned", "is_offered", "confirmed")
    change_form_outer_before_template = "admin/llmtasks/mcp_confirm.html"
    fieldsets = (
        (None, {"fields": (("as_called", "server", "state_label"), "confirmed")}),
        ("What models see", {"fields": ("is_pinned",)}),
        ("What its server offers", {"fields": ("is_offered",)}),
        ("Runs", {"fields": HANDLED}),
    )

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.confirm)
        own = path("<int:pk>/confirm/", view, name="llmtasks_mcptool_confirm")
        return [own, *super().get_urls()]

    def confirm(self, request: HttpRequest, pk: int) -> HttpResponseBase:
        """The button beside what is offered."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        if not self.has_change_permission(request):
            raise PermissionDenied
        by = request.user.get_username()
        if pins.confirm(pk, request.POST.get("hash", ""), by):
            self.log_change(request, McpTool.objects.get(pk=pk), "Confirmed.")
            messages.success(request, "It is on, as it was shown.")
        else:
            messages.error(request, "It is not what was shown any more: look again.")
        return HttpResponseRedirect(reverse("admin:llmtasks_mcptool_change", args=(pk,)))

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any
    ) -> HttpResponse:
        row = kwargs.get("obj")
        waits = row is not None and row.state in (McpTool.State.NEW, McpTool.State.CHANGED)
        context["waiting"] = row if waits and self.has_change_permission(request) else None
        response: HttpResponse = super().render_change_form(request, context, *args, **kwargs)
        return response

    @admin.action(description="Switch off", permissions=["change"])
    def switch_off(self, request: HttpRequest, queryset: Rows) -> None:
        messages.success(request, f"{pins.switch(queryset, on=False)} tools switched off.")

    @admin.action(description="Switch on again", permissions=["change"])
    def switch_on(self, request: HttpRequest, queryset: Rows) -> None:
        messages.success(request, f"{pins.switch(queryset, on=True)} tools switched on.")

    @admin.display(description="name")
    def as_called(self, row: McpTool) -> str:
        return mcp.name_of(row)

    @admin.display(description="state")
    def state_label(self, row: McpTool) -> SafeString:
        return cells.label(row.state)

    @admin.display(description="pinned")
    def is_pinned(self, row: McpTool) -> SafeString | str:
        return bodies.as_json(row.pinned) if row.pinned else cells.NOTHING

    @admin.display(description="offered")
    def is_offered(self, row: McpTool) -> SafeString | str:
        same = row.offered_hash == row.pinned_hash
        return "the same" if same else bodies.as_json(row.offered)

    @admin.display(description="confirmed")
    def confirmed(self, row: McpTool) -> SafeString | str:
        if row.confirmed_by:
            return f"by {row.confirmed_by}"
        return "by the first look at its server" if row.pinned_hash else "by nobody yet"
