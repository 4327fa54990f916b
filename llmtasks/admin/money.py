"""Prices and corrections, which are added and never edited. The ledger itself is in `attempts`."""

from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

from django import forms
from django.contrib import admin
from django.contrib.admin.utils import flatten
from django.core.exceptions import ValidationError
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponseRedirect
from django.shortcuts import get_object_or_404
from django.urls import reverse
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import action

from llmtasks.admin import cells
from llmtasks.admin.lists import BoundedAdmin, TenantFilter, choice_filter
from llmtasks.models import Adjustment, Attempt, Price

AMOUNTS = (
    ("input", "cached_input"),
    ("cache_write_5m", "cache_write_1h"),
    ("output", "reasoning"),
    "per_request",
)
NAMES = (("family", "model"), ("effective_from", "from_input_tokens"))


class PriceForm(ModelForm):  # type: ignore[type-arg]
    """A new manual row. One of another moment is another set of tiers."""

    class Meta:
        model = Price
        fields = tuple(flatten((*NAMES, *AMOUNTS)))
        help_texts = {  # noqa: RUF012 - as Django has it
            "effective_from": "UTC. A price dated now is in force at once.",
            "from_input_tokens": "For prompts of at least so many tokens: 0 for all, or for the "
            "first of several tiers.",
        }

    def clean(self) -> dict[str, Any]:
        values = super().clean() or {}
        if self.errors:
            return values
        tokens = values["from_input_tokens"]
        same = {name: values[name] for name in ("family", "model", "effective_from")}
        rows = Price.objects.filter(**same, source=Price.Source.MANUAL)
        known = set(rows.values_list("from_input_tokens", flat=True))
        if tokens in known:
            message = "There is a price of that moment, and it stays. Give a later one."
            self.add_error("effective_from", message)
        elif tokens and 0 not in known:
            message = "First add the price from 0 tokens, effective from the same moment."
            self.add_error("from_input_tokens", message)
        return values


@admin.register(Price)
class PriceAdmin(ModelAdmin):
    """Added, never edited: an attempt refers to the very row that it was billed at."""

    form = PriceForm
    list_display = (
        "model", "family", "source_label", "day", "tier", "per_input", "per_cached", "per_output",
    )  # fmt: skip
    list_filter = (choice_filter("source", Price.Source.choices),)
    search_fields = ("family", "model")
    search_help_text = "A family or a part of a model's name"
    actions_detail = ("supersede",)
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    list_fullwidth = True
    fieldsets = (
        (
            None,
            {
                "description": "A price is added, never changed or deleted: the ledger refers to "
                "the rows that it was computed from. To correct one, or for a price that "
                "changes, add a row that is effective later; dated now it is in force at once. "
                "The tiers of a model hold together: give each the same moment, some minutes "
                "ahead, so that none holds before all are there.",
                "fields": NAMES,
            },
        ),
        ("Per million tokens", {"fields": AMOUNTS}),
    )

    def has_change_permission(self, request: HttpRequest, obj: Price | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Price | None = None) -> bool:
        return False

    def has_supersede_permission(self, request: HttpRequest, object_id: Any = None) -> bool:
        """Whoever may add. Unfold's check would look for `llmtasks.add_price` in a database that
        may have no tables yet, and `add` is not asked with a row's id, as Unfold does."""
        may_add: bool = self.has_add_permission(request)
        return may_add

    @action(description="Supersede", icon="add", permissions=["supersede"])  # type: ignore[untyped-decorator]
    def supersede(self, request: HttpRequest, object_id: int) -> HttpResponseRedirect:
        """The form for another price, filled in with this one's, effective now."""
        price = get_object_or_404(Price, pk=object_id)
        kept = [name for name in PriceForm.base_fields if name != "effective_from"]
        query = urlencode({name: plain(getattr(price, name)) for name in kept})
        return HttpResponseRedirect(f"{reverse('admin:llmtasks_price_add')}?{query}")

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        return {"from_input_tokens": 0, **super().get_changeform_initial_data(request)}

    @admin.display(description="source")
    def source_label(self, row: Price) -> SafeString:
        return cells.label(row.source)

    @admin.display(description="from")
    def day(self, row: Price) -> str:
        return f"{row.effective_from:%Y-%m-%d %H:%M}"

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


def plain(value: Any) -> Any:
    """A decimal as one types it, and not as 0E-8."""
    return f"{value.normalize():f}" if isinstance(value, Decimal) else value


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
