"""Lists that stay fast with a million rows.

Rows are shown newest first, by their time-ordered ids. Nothing is counted further than `COUNTED`,
no filter asks the table which values there are, and a filter on a column without an index looks
through the newest `LOOKED_THROUGH` rows only (of those that the indexed filters leave); the list
says so.
"""

from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cached_property
from typing import Any, ClassVar
from uuid import UUID

from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from unfold.admin import ModelAdmin
from unfold.views import ChangeList

from llmtasks.models import Provider, Tenant

COUNTED = 10_000
LOOKED_THROUGH = 50_000
# More choices than that are no choice; a tenant's own page links to its rows.
TENANTS_SHOWN = 100

Rows = QuerySet[Any]
Choices = Iterable[tuple[str, str]]


class BoundedPaginator(Paginator):  # type: ignore[type-arg]
    """Counts no further than `COUNTED`, which is also as far as its pages go."""

    template_name = "admin/llmtasks/pagination.html"

    @cached_property
    def _reached(self) -> int:
        rows: Any = self.object_list
        return int(rows.order_by("-pk").values("pk")[: COUNTED + 1].count())

    @cached_property
    def count(self) -> int:
        return min(self._reached, COUNTED)

    @property
    def is_capped(self) -> bool:
        return self._reached > COUNTED


class ChoiceFilter(admin.SimpleListFilter):
    """A filter whose choices are known without asking the table."""

    # Whether an index leads from the column's value to its newest rows.
    is_indexed: ClassVar[bool] = False
    field: ClassVar[str]
    of: ClassVar[Callable[[], Choices]]

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, str]]:
        return list(type(self).of())

    def has_output(self) -> bool:
        """History outlives configuration: a value is filtered by whether or not it is a choice."""
        return self.value() is not None or bool(super().has_output())

    def queryset(self, request: HttpRequest, queryset: Rows) -> Rows:
        value = self.value()
        return queryset if value is None else queryset.filter(**{self.field: value})


def choice_filter(
    name: str, choices: Choices | Callable[[], Choices], *, is_indexed: bool = False
) -> type[ChoiceFilter]:
    """A `ChoiceFilter` of that column."""
    found = choices if callable(choices) else lambda: choices
    return type(
        f"{name.title()}Filter",
        (ChoiceFilter,),
        {
            "title": name.replace("_", " "),
            "parameter_name": name,
            "field": name,
            "of": staticmethod(found),
            "is_indexed": is_indexed,
        },
    )


class TenantFilter(ChoiceFilter):
    title = "tenant"
    parameter_name = "tenant"
    is_indexed = True

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, str]]:
        names = Tenant.objects.order_by("name").values_list("pk", "name")[:TENANTS_SHOWN]
        return [(str(pk), name) for pk, name in names]

    def queryset(self, request: HttpRequest, queryset: Rows) -> Rows:
        value = self.value()
        if value is None:
            return queryset
        tenant = as_uuid(value)
        return queryset.none() if tenant is None else queryset.filter(tenant_id=tenant)


class CreatedFilter(ChoiceFilter):
    """By age, which the id knows: a range of the primary key."""

    title = "age"
    parameter_name = "age"
    is_indexed = True
    NEWER: ClassVar[dict[str, timedelta]] = {
        "1h": timedelta(hours=1),
        "1d": timedelta(days=1),
        "7d": timedelta(days=7),
        "30d": timedelta(days=30),
    }
    OLDER: ClassVar[dict[str, timedelta]] = {
        "over-1d": timedelta(days=1),
        "over-7d": timedelta(days=7),
        "over-30d": timedelta(days=30),
    }

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, str]]:
        return [
            ("1h", "last hour"),
            ("1d", "last 24 hours"),
            ("7d", "last 7 days"),
            ("30d", "last 30 days"),
            ("over-1d", "older than 24 hours"),
            ("over-7d", "older than 7 days"),
            ("over-30d", "older than 30 days"),
        ]

    def queryset(self, request: HttpRequest, queryset: Rows) -> Rows:
        value = self.value() or ""
        if value in self.NEWER:
            return queryset.filter(pk__gte=first_id(self.NEWER[value]))
        if value in self.OLDER:
            return queryset.filter(pk__lt=first_id(self.OLDER[value]))
        return queryset


class ParentFilter(ChoiceFilter):
    """The tasks of one run: a run's own page links to them."""

    title = "run"
    parameter_name = "part_of"
    is_indexed = True

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[Any, str]]:
        value = self.used_parameters.get(self.parameter_name)
        return [(value, f"…{str(value)[-8:]}")] if value else []

    def queryset(self, request: HttpRequest, queryset: Rows) -> Rows:
        value = self.value()
        if value is None:
            return queryset
        parent = as_uuid(value)
        return queryset.none() if parent is None else queryset.filter(parent_id=parent)


def providers() -> Choices:
    return [(name, name) for name in Provider.objects.values_list("name", flat=True)]


def first_id(age: timedelta) -> UUID:
    """The smallest UUIDv7 of that time ago."""
    milliseconds = int((timezone.now() - age).timestamp() * 1000)
    return UUID(int=milliseconds << 80)


def as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text.strip())
    except ValueError:
        return None


class BoundedList(ChangeList):
    """`whole` is what the filters say; the list is what is looked through of it, down to `oldest`.
    `indexed` are the rows that the indexed filters leave."""

    whole: Rows
    indexed: Rows
    oldest: UUID | None = None

    def get_ordering(self, request: HttpRequest, queryset: Rows) -> list[str]:
        return ["-pk"]

    def get_results(self, request: HttpRequest) -> None:
        """The count stands at the pages' numbers, where it says that it may be more."""
        super().get_results(request)
        self.full_result_count = self.result_count

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> Rows:
        self.whole = super().get_queryset(request, exclude_parameters)
        specs = [spec for spec in self.filter_specs if isinstance(spec, ChoiceFilter)]
        self.indexed = self.root_queryset
        for spec in specs:
            if spec.is_indexed:
                self.indexed = spec.queryset(request, self.indexed)
        if all(spec.is_indexed or spec.value() is None for spec in specs):
            return self.whole
        self.oldest = nth_newest(self.indexed, LOOKED_THROUGH)
        return self.whole if self.oldest is None else self.whole.filter(pk__gte=self.oldest)


def nth_newest(rows: Rows, number: int) -> UUID | None:
    """The id of the row of that number, the newest first; None where there are fewer."""
    found = list(rows.order_by("-pk").values_list("pk", flat=True)[number - 1 : number])
    return found[0] if found else None


class BoundedAdmin(ModelAdmin):
    """An admin over a table that may have millions of rows."""

    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    list_per_page = 50
    list_max_show_all = 50
    sortable_by: ClassVar[Any] = ()
    list_before_template = "admin/llmtasks/list_note.html"
    list_fullwidth = True
    # What the list doesn't show and a row may have much of.
    list_deferred: ClassVar[tuple[str, ...]] = ()
    search_fields: ClassVar[Any] = ("pk",)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[BoundedList]:
        return BoundedList

    def get_search_results(
        self, request: HttpRequest, queryset: Rows, search_term: str
    ) -> tuple[Rows, bool]:
        """By exact id only: nothing else has an index of its own."""
        rows = queryset.defer(*self.list_deferred)
        if search_term:
            found = as_uuid(search_term)
            rows = rows.none() if found is None else rows.filter(pk=found)
        return rows, False

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest | None = None) -> bool:
        """Only the list's own filters: any other could be a scan of the whole table."""
        return lookup in {spec.parameter_name for spec in self.list_filter}


class ReadOnly(ModelAdmin):
    """Rows that are looked at, never edited."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False
