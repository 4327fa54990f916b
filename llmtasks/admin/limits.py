"""Limits with what is used of them, and the history of the providers' health."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin

from llmtasks import health
from llmtasks.admin import cells
from llmtasks.admin.lists import BoundedAdmin, ReadOnly, Rows, choice_filter, providers
from llmtasks.guards.readings import Use
from llmtasks.health import Health
from llmtasks.models import ApiKey, Limit, Provider, ProviderEvent, ProviderModel, Tenant

EVENTS_SHOWN = 20
MODELS_SHOWN = 40


@admin.register(Limit)
class LimitAdmin(ModelAdmin):
    """What a limit counts in is part of its meter: another unit or window is another limit."""

    list_display = ("calls", "counted_for", "shown_amount", "shown_burst", "use")
    list_select_related = ("provider", "tenant", "key")
    list_filter = (
        choice_filter("unit", Limit.Unit.choices),
        choice_filter("window", Limit.Window.choices),
    )
    search_fields = ("provider__name", "model", "tenant__name")
    search_help_text = "A provider, a model or a tenant"
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()
    list_fullwidth = True
    autocomplete_fields = ("tenant", "key")
    readonly_fields = ("use",)
    fieldsets = (
        (
            "Which calls",
            {
                "description": "It counts the calls that match all that is given here; with"
                " nothing given, every call.",
                "fields": (("provider", "model"), ("tenant", "key"), "each"),
            },
        ),
        ("How much", {"fields": (("unit", "window"), ("amount", "burst"), "use")}),
    )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return (*self.readonly_fields, *(("unit", "window", "each") if obj else ()))

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """There is no use of what is not saved yet."""
        if obj is not None:
            return self.fieldsets
        return (
            self.fieldsets[0],
            ("How much", {"fields": (("unit", "window"), "amount", "burst")}),
        )

    @admin.display(description="calls of")
    def calls(self, limit: Limit) -> str:
        named = (limit.provider, limit.model, limit.tenant, limit.key)
        return " / ".join(str(part) for part in named if part) or "all"

    @admin.display(description="counted for")
    def counted_for(self, limit: Limit) -> str:
        return limit.get_each_display() or "all together"

    @admin.display(description="limit")
    def shown_amount(self, limit: Limit) -> SafeString:
        return cells.number(
            limit.amount, f"{limit.get_unit_display()} {limit.get_window_display()}"
        )

    @admin.display(description="burst")
    def shown_burst(self, limit: Limit) -> SafeString | str:
        if limit.unit == Limit.Unit.CONCURRENCY:
            return cells.NOTHING
        return "usual" if limit.burst is None else cells.number(limit.burst)

    @admin.display(description="used now")
    def use(self, limit: Limit) -> SafeString | str:
        found = health.now().use_of(limit.pk)
        return cells.NOTHING if found is None else shown_use(found)


def shown_use(use: Use) -> SafeString:
    text = f"{use.used:,} of {use.amount:,} · {use.share:.0%}"
    return cells.bar(use.share, f"{text} by {holder(use)}" if use.who else text)


def holder(use: Use) -> str:
    """Who is closest to a limit that each has for himself."""
    kind: Any = Tenant if use.rule.each == Limit.Each.TENANT else ApiKey
    row = kind.objects.filter(pk=use.who).first()
    return cells.short(use.who) if row is None else row.name


@admin.register(ProviderEvent)
class ProviderEventAdmin(ReadOnly, BoundedAdmin):
    """One row for each change. Nobody edits history."""

    list_display = ("moment", "provider", "model", "label", "detail")
    list_display_links = None
    list_filter = (
        choice_filter("provider", providers, is_indexed=True),
        choice_filter("event", ProviderEvent.Event.choices),
    )
    search_fields = ()

    def get_search_results(
        self, request: HttpRequest, queryset: Rows, search_term: str
    ) -> tuple[Rows, bool]:
        return queryset, False

    @admin.display(description="at")
    def moment(self, event: ProviderEvent) -> SafeString | str:
        return cells.moment(event.at)

    @admin.display(description="what")
    def label(self, event: ProviderEvent) -> SafeString:
        return cells.label(event.get_event_display())


# --- parts of other pages -------------------------------------------------------------------------


def events(provider: str = "") -> list[dict[str, Any]]:
    """The latest changes, of one provider or of all."""
    rows = ProviderEvent.objects.filter(provider=provider) if provider else ProviderEvent.objects
    return [
        {
            "at": cells.moment(row.at),
            "of": f"{row.provider}/{row.model}" if row.model else row.provider,
            "label": cells.label(row.get_event_display()),
            "detail": row.detail,
        }
        for row in rows.order_by("-id")[:EVENTS_SHOWN]
    ]


def models_of(found: Health, provider: str) -> list[dict[str, Any]]:
    """Breakers, gates and what was learnt, of a provider's models."""
    return [
        shown_model(account, model)
        for account in found.accounts
        if account.row.name == provider
        for model in account.models
    ]


def notable_models(found: Health) -> tuple[list[dict[str, Any]], int]:
    """The models that are not well, then those that were called, and how many others there are."""
    known = [(account, model) for account in found.accounts for model in account.models]
    notable = [one for one in known if one[1].status != "ok" or p95(one[1].reading) is not None]
    notable.sort(key=lambda one: one[1].status == "ok")
    shown = [shown_model(*one) for one in notable[:MODELS_SHOWN]]
    return shown, len(known) - len(shown)


def shown_model(account: health.Account, model: health.Model) -> dict[str, Any]:
    return {
        "of": f"{account.row.name}/{model.row.name}",
        "state": cells.label(state_of(model)),
        "closed": seconds(closed_s(model.reading)),
        "p95": cells.milliseconds(p95(model.reading)),
        "told": told(model.row.vendor_limits),
    }


def state_of(model: health.Model) -> str:
    if model.row.refused_at is not None:
        return "refused"
    return "unknown" if model.reading is None else model.reading.breaker.replace("_", " ")


def closed_s(reading: Any) -> float:
    return 0.0 if reading is None else max(reading.open_s, reading.gate_s)


def p95(reading: Any) -> int | None:
    return None if reading is None or reading.p95_ms is None else round(reading.p95_ms)


def seconds(number: float) -> str:
    return cells.duration(timedelta(seconds=number)) if number > 0 else cells.NOTHING


def told(limits: Mapping[str, int]) -> str:
    """What the vendor's answers told of its own limits, a minute."""
    parts = (f"{amount:,} {unit.replace('_', ' ')}" for unit, amount in sorted(limits.items()))
    return ", ".join(parts) or cells.NOTHING


def refused() -> list[dict[str, Any]]:
    """What vendors refused, of all providers: for the alert on the start page."""
    rows = Provider.objects.exclude(refused_at=None)
    models = ProviderModel.objects.exclude(refused_at=None).select_related("provider")
    return alerts(rows, models)


def refused_of(provider: Provider) -> list[dict[str, Any]]:
    rows = [provider] if provider.refused_at is not None else []
    return alerts(rows, provider.models.exclude(refused_at=None).select_related("provider"))


def alerts(rows: Iterable[Provider], models: Iterable[ProviderModel]) -> list[dict[str, Any]]:
    accounts: list[tuple[Provider, Provider | ProviderModel, str]]
    accounts = [(row, row, "its credential") for row in rows]
    parts = [(row.provider, row, f"the model {row.name}") for row in models]
    return [
        {
            "provider": provider,
            "what": what,
            "is_model": isinstance(row, ProviderModel),
            "since": cells.moment(row.refused_at),
            "why": row.refused_reason,
        }
        for provider, row, what in (*accounts, *parts)
    ]
