"""Prices and corrections. The ledger itself is in `attempts`."""

from typing import Any

from django import forms
from django.contrib import admin
from django.core.exceptions import ValidationError
from django.forms import ModelForm
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin

from llmtasks.admin import cells
from llmtasks.admin.lists import BoundedAdmin, TenantFilter, choice_filter
from llmtasks.models import Adjustment, Attempt, Price

AMOUNTS = (
    ("input", "cached_input"),
    ("cache_write_5m", "cache_write_1h"),
    ("output", "reasoning"),
    "per_request",
)


@admin.register(Price)
class PriceAdmin(ModelAdmin):
    list_display = (
        "model", "family", "source_label", "day", "tier", "per_input", "per_cached", "per_output",
    )  # fmt: skip
    list_filter = (choice_filter("source", Price.Source.choices),)
    search_fields = ("family", "model")
    search_help_text = "A family or a part of a model's name"
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    list_fullwidth = True
    fieldsets = (
        (
            None,
            {
                "description": "Dollars per million tokens. For a price that changes, add a row "
                "from the day on that it holds: the ledger refers to the rows that it was "
                "computed from.",
                "fields": (("family", "model"), ("effective_from", "from_input_tokens")),
            },
        ),
        ("Per million tokens", {"fields": AMOUNTS}),
    )

    def has_change_permission(self, request: HttpRequest, obj: Price | None = None) -> bool:
        """An imported row is the import's: the next one would undo an edit."""
        is_ours = obj is None or obj.source == Price.Source.MANUAL
        return is_ours and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Price | None = None) -> bool:
        """A price may be what an attempt refers to."""
        return False

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        return {"from_input_tokens": 0, **super().get_changeform_initial_data(request)}

    @admin.display(description="source")
    def source_label(self, row: Price) -> SafeString:
        return cells.label(row.source)

    @admin.display(description="from")
    def day(self, row: Price) -> str:
        return f"{row.effective_from:%Y-%m-%d}"

    @admin.display(description="for prompts")
    def tier(self, row: Price) -> str:
        tokens = row.from_input_tokens
        return f"from {tokens:,} tokens" if tokens else "of any size"

    @admin.display(description="input")
    def per_input(self, row: Price) -> str:
        return cells.dollars(row.input)

    @admin.display(description="cached input")
    def per_cached(self, row: Price) -> str:
        return cells.dollars(row.cached_input)

    @admin.display(description="output")
    def per_output(self, row: Price) -> str:
        return cells.dollars(row.output)


class AdjustmentForm(ModelForm):  # type: ignore[type-arg]
    """The attempt is typed by its id: a select of the ledger would list all of it."""

    class Meta:
        model = Adjustment
        fields = ("tenant", "attempt", "amount", "reason")

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        attempt: Attempt | None = values.get("attempt")
        tenant = values.get("tenant")
        if attempt is not None and tenant is not None and attempt.tenant_id != tenant.pk:
            raise ValidationError({"attempt": "That attempt is another tenant's."})
        if values.get("amount") == 0:
            raise ValidationError({"amount": "An adjustment of nothing."})
        return values


@admin.register(Adjustment)
class AdjustmentAdmin(BoundedAdmin):
    """Added, never edited: a mistake is put right by another row."""

    form = AdjustmentForm
    list_display = ("short_id", "created", "tenant", "shown_amount", "reason", "created_by")
    list_display_links = None
    list_filter = (TenantFilter,)
    list_select_related = ("tenant",)
    search_help_text = "An adjustment's whole id"
    raw_id_fields = ("attempt",)
    fields = ("tenant", "attempt", "amount", "reason")

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_fields(self, request: HttpRequest, obj: Adjustment | None = None) -> Any:
        added = ("created_by", "created_at") if obj else ()
        return (*self.fields, *added)

    def save_model(
        self, request: HttpRequest, obj: Adjustment, form: forms.Form, change: bool
    ) -> None:
        obj.created_by = request.user.get_username()
        super().save_model(request, obj, form, change)

    @admin.display(description="id")
    def short_id(self, row: Adjustment) -> SafeString | str:
        return cells.link("adjustment", row.pk, cells.short(row.pk))

    @admin.display(description="created")
    def created(self, row: Adjustment) -> SafeString:
        return cells.brief(row.created_at)

    @admin.display(description="amount")
    def shown_amount(self, row: Adjustment) -> str:
        return cells.dollars(row.amount)
