"""The spend ledger: every call, to be looked at and taken out as CSV."""

import csv
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponseBase, StreamingHttpResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from llmtasks.admin import bodies, cells
from llmtasks.admin.facts import FactsAdmin
from llmtasks.admin.lists import (
    BoundedAdmin,
    CreatedFilter,
    Rows,
    TenantFilter,
    choice_filter,
    nth_newest,
    providers,
)
from llmtasks.models import Attempt, CostState, Price, Tenant
from llmtasks.stores import release

# Rows that one statement of an export looks at: it is short whatever the filter.
EXPORT_BATCH = 5_000

TEXTS = ("provider", "model", "state", "error_class", "vendor_request_id", "cost_state")
NUMBERS = (
    "step", "number", "http_status", "latency_ms", "first_token_ms", "input_tokens",
    "cached_input_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "output_tokens",
    "reasoning_tokens", "price_id",
)  # fmt: skip
COLUMNS = ("id", "task_id", "tenant", "started_at", "finished_at", *TEXTS, *NUMBERS, "cost")


class AttemptCells:
    """What is shown of an attempt, in the list of all and beside its task."""

    @admin.display(description="state")
    def state_label(self, row: Attempt) -> SafeString:
        return cells.label(row.state)

    @admin.display(description="result")
    def result(self, row: Attempt) -> str:
        return cells.result(row)

    @admin.display(description="tokens in / out")
    def tokens(self, row: Attempt) -> SafeString | str:
        return cells.attempt_tokens(row)

    @admin.display(description="cost")
    def shown_cost(self, row: Attempt) -> SafeString | str:
        return cells.money(row.cost, row.cost_state)

    @admin.display(description="latency")
    def latency(self, row: Attempt) -> str:
        return cells.milliseconds(row.latency_ms)

    @admin.display(description="first token")
    def first_token(self, row: Attempt) -> str:
        return cells.milliseconds(row.first_token_ms)


@admin.register(Attempt)
class AttemptAdmin(AttemptCells, FactsAdmin, BoundedAdmin):
    list_display = (
        "short_id", "started", "task_link", "tenant_name", "shown_provider", "state_label",
        "result", "tokens", "shown_cost", "latency",
    )  # fmt: skip
    list_display_links = None
    list_filter = (
        choice_filter("provider", providers, is_indexed=True),
        TenantFilter,
        CreatedFilter,
        choice_filter("state", Attempt.State.choices),
        choice_filter("cost_state", CostState.choices),
    )
    list_select_related = ("tenant",)
    list_deferred = ("raw_usage", "error_message")
    search_help_text = "An attempt's whole id"
    list_before_template = "admin/llmtasks/attempts_head.html"
    facts = (
        ("", ("state_label", "result", "shown_cost", "cost_state")),
        (
            "Call",
            (
                "task_link", "tenant_name", "provider", "model",
                "started_at", "finished_at", "latency", "first_token",
                "step", "number", "vendor_request_id", "price_link", "shown_error",
            ),
        ),
        (
            "Usage",
            (
                "input_tokens", "cached_input_tokens", "cache_write_5m_tokens",
                "cache_write_1h_tokens", "output_tokens", "reasoning_tokens", "shown_usage",
            ),
        ),
    )  # fmt: skip
    wide_facts = frozenset({"shown_error", "shown_usage"})

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.export)
        return [path("export/", view, name="llmtasks_attempt_export"), *super().get_urls()]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        url = f"{reverse('admin:llmtasks_attempt_export')}?{request.GET.urlencode()}"
        return super().changelist_view(request, {"export_url": url, **(extra_context or {})})

    def export(self, request: HttpRequest) -> HttpResponseBase:
        """The list's filter as CSV: all of it, in batches, amounts as exact decimals."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        changes = self.get_changelist_instance(request)
        name = f"attempts-{timezone.now():%Y%m%d-%H%M%S}.csv"
        return StreamingHttpResponse(
            exported(changes.whole.select_related(None), changes.indexed),
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )

    @admin.display(description="id")
    def short_id(self, row: Attempt) -> SafeString | str:
        return cells.link("attempt", row.pk, cells.short(row.pk))

    @admin.display(description="started")
    def started(self, row: Attempt) -> SafeString:
        return cells.brief(row.started_at)

    @admin.display(description="task")
    def task_link(self, row: Attempt) -> SafeString | str:
        return cells.link("task", row.task_id, cells.short(row.task_id))

    @admin.display(description="tenant")
    def tenant_name(self, row: Attempt) -> SafeString | str:
        return cells.link("tenant", row.tenant_id, row.tenant.name)

    @admin.display(description="called")
    def shown_provider(self, row: Attempt) -> str:
        return f"{row.provider}/{row.model}"

    @admin.display(description="usage as the vendor told it")
    def shown_usage(self, row: Attempt) -> SafeString | str:
        return bodies.as_json(row.raw_usage) if row.raw_usage else cells.NOTHING

    @admin.display(description="price")
    def price_link(self, row: Attempt) -> SafeString | str:
        """No constraint holds the reference: a row that is gone doesn't break the page."""
        price = Price.objects.filter(pk=row.price_id).first() if row.price_id else None
        return cells.NOTHING if price is None else cells.link("price", price.pk, str(price))

    @admin.display(description="error")
    def shown_error(self, row: Attempt) -> SafeString | str:
        if not row.error_message:
            return cells.NOTHING
        return format_html('<pre class="lt-text">{}</pre>', row.error_message)


class Line:
    """What `csv` writes to, to get its text back."""

    def write(self, text: str) -> str:
        return text


def exported(rows: Rows, indexed: Rows) -> Iterator[str]:
    """The lines of the CSV. No connection is held while the reader is slow."""
    writer = csv.writer(Line())
    yield writer.writerow(COLUMNS)
    tenants = dict(Tenant.objects.values_list("pk", "name"))
    for batch in batches(rows, indexed):
        release()
        yield "".join(writer.writerow(cells_of(row, tenants)) for row in batch)


def batches(rows: Rows, indexed: Rows) -> Iterator[list[Attempt]]:
    """The rows by ranges of ids, the newest first. A range is cut from what the indexed filters
    leave, so that no statement has to look further than `EXPORT_BATCH` rows for a filter that
    seldom matches."""
    lowest = nth_newest(indexed, EXPORT_BATCH)
    while True:
        batch = list(rows if lowest is None else rows.filter(pk__gte=lowest))
        if batch:
            yield batch
        if lowest is None:
            return
        rows, indexed = rows.filter(pk__lt=lowest), indexed.filter(pk__lt=lowest)
        lowest = nth_newest(indexed, EXPORT_BATCH)


def cells_of(row: Attempt, tenants: dict[UUID, str]) -> list[Any]:
    """The row's columns. A spreadsheet must not take a vendor's text for a formula."""
    values: dict[str, Any] = {
        **{name: unlike_formula(str(getattr(row, name))) for name in TEXTS},
        **{name: getattr(row, name) for name in NUMBERS},
        "id": row.pk,
        "task_id": row.task_id,
        "tenant": unlike_formula(str(tenants.get(row.tenant_id, row.tenant_id))),
        "started_at": row.started_at.isoformat(),
        "finished_at": row.finished_at.isoformat() if row.finished_at else "",
        "cost": "" if row.cost is None else f"{row.cost:f}",
    }
    return [values[name] for name in COLUMNS]


def unlike_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
