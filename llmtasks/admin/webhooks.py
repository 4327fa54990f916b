"""What tenants were told, and what is still on its way."""

from django.contrib import admin, messages
from django.http import HttpRequest
from django.utils.safestring import SafeString

from llmtasks import webhooks
from llmtasks.admin import cells
from llmtasks.admin.lists import BoundedAdmin, ReadOnly, Rows, TenantFilter, choice_filter
from llmtasks.models import Delivery


@admin.register(Delivery)
class DeliveryAdmin(ReadOnly, BoundedAdmin):
    list_display = (
        "short_id", "event", "tenant", "task", "state_label", "tries", "http_status", "created",
        "due", "error",
    )  # fmt: skip
    list_filter = (TenantFilter, choice_filter("state", Delivery.State.choices))
    list_select_related = ("tenant",)
    actions = ("send_again",)

    def has_send_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("llmtasks.change_delivery")

    @admin.action(description="Send again what was given up", permissions=["send"])
    def send_again(self, request: HttpRequest, queryset: Rows) -> None:
        messages.success(request, f"{webhooks.again(queryset)} are sent again.")

    @admin.display(description="id")
    def short_id(self, row: Delivery) -> str:
        return cells.short(row.pk)

    @admin.display(description="task")
    def task(self, row: Delivery) -> SafeString | str:
        return cells.link("task", row.task_id, cells.short(row.task_id))

    @admin.display(description="state")
    def state_label(self, row: Delivery) -> SafeString:
        return cells.label(row.state)

    @admin.display(description="created")
    def created(self, row: Delivery) -> SafeString | str:
        return cells.moment(row.created_at)

    @admin.display(description="due")
    def due(self, row: Delivery) -> SafeString | str:
        return cells.moment(row.due_at if row.state == Delivery.State.PENDING else None)
