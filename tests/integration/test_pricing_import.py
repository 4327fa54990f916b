"""Prices from genai-prices into the table, and from the table into a cost."""

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import IntegrityError, connection
from django.db.transaction import atomic
from django.utils import timezone

from llmtasks import pricing, pulse
from llmtasks.management.commands import import_prices
from llmtasks.models import Config, Price
from providers.types import Usage

pytestmark = pytest.mark.django_db

FLAT = tuple(map(Decimal, ("1", "0.1", "1.25", "2", "4", "4", "0")))
DEAR = tuple(map(Decimal, ("2", "0.2", "2.5", "4", "8", "8", "0")))
ALWAYS, LATER = import_prices.ALWAYS, datetime(2025, 6, 1, tzinfo=UTC)


def version() -> int:
    return Config.objects.get().version


def run(*arguments: str) -> str:
    out = StringIO()
    call_command("import_prices", *arguments, stdout=out)
    return out.getvalue()


@pytest.fixture
def fresh(monkeypatch):
    """The pricing of a process that has read nothing yet."""
    monkeypatch.setattr(pricing, "_prices", None)
    monkeypatch.setattr(pulse, "config_version", version)
    monkeypatch.setattr(pulse, "now", lambda: datetime.now(UTC))


def test_an_import_happens_once():
    assert ", 0 changed" in run()
    rows, before = Price.objects.count(), version()
    assert rows > 3000
    assert "0 new, 0 changed" in run()
    assert (Price.objects.count(), version()) == (rows, before)


def test_what_is_left_out_is_counted_and_named_when_asked_for():
    assert "left out, price by the hour: " in run()
    assert "  deepseek/deepseek-chat\n" in run("--left-out")


def test_what_changed_is_added_effective_now(fresh):
    import_prices.store({("v", "a", ALWAYS, 0): FLAT, ("v", "b", ALWAYS, 0): FLAT})
    old, before = list(Price.objects.values()), version()
    start = timezone.now()
    rows = {("v", "a", ALWAYS, 0): DEAR, ("v", "b", ALWAYS, 0): FLAT, ("v", "c", LATER, 0): FLAT}
    changes = import_prices.store(rows)
    assert (len(changes.added), len(changes.changed)) == (1, 1)
    assert version() > before
    assert [row for row in Price.objects.values() if row in old] == old
    new = Price.objects.get(input=2)
    assert start <= new.effective_from <= timezone.now()
    assert pricing.price_for("v", "a", 0).id == new.pk
    count, before = Price.objects.count(), version()
    changes = import_prices.store(rows)
    assert (changes.added, changes.changed, Price.objects.count()) == ({}, {}, count)
    assert version() == before


def test_the_amounts_of_a_month_ago_can_come_back(fresh):
    for columns in (FLAT, DEAR, FLAT, DEAR):
        import_prices.store({("v", "a", ALWAYS, 0): columns})
        assert pricing.price_for("v", "a", 0).input == columns[0]
    assert Price.objects.count() == 4


def test_a_tier_that_was_dropped_holds_no_more_and_a_model_that_was_dropped_does(fresh):
    import_prices.store(
        {
            ("v", "a", ALWAYS, 0): FLAT,
            ("v", "a", ALWAYS, 1000): DEAR,
            ("v", "gone", ALWAYS, 0): FLAT,
        }
    )
    assert pricing.price_for("v", "a", 1000).input == 2
    changes = import_prices.store({("v", "a", ALWAYS, 0): FLAT})
    assert changes.dropped == ["v/gone"]
    assert Price.objects.count() == 4
    assert pricing.price_for("v", "a", 1000).input == 1
    assert pricing.price_for("v", "gone", 0).input == 1


def test_a_correction_leaves_a_manual_price_in_force(fresh):
    import_prices.store({("v", "a", ALWAYS, 0): FLAT})
    manual = import_prices.price_row(("v", "a", LATER, 0), FLAT)
    manual.source = Price.Source.MANUAL
    manual.save()
    assert import_prices.store({("v", "a", ALWAYS, 0): DEAR}).held == ["v/a"]
    assert pricing.price_for("v", "a", 0).id == manual.pk


def test_what_was_kept_is_named_when_asked_for(monkeypatch):
    import_prices.store({("v", "gone", ALWAYS, 0): FLAT})
    monkeypatch.setattr(import_prices, "bundled", import_prices.Bundle)
    assert "kept, no longer in the package: 1\n  v/gone\n" in run("--left-out")
    assert "v/gone" not in run()


@pytest.mark.parametrize("source", Price.Source.values)
def test_the_database_keeps_every_price(source):
    row = import_prices.price_row(("v", "a", ALWAYS, 0), FLAT)
    row.source = source
    row.save()
    row.input = Decimal(9)
    for change in (row.save, row.delete, lambda: Price.objects.update(input=9)):
        with pytest.raises(IntegrityError, match="can't be changed or deleted"), atomic():
            change()
    assert Price.objects.get().input == 1


def test_an_import_never_touches_manual_rows():
    manual = import_prices.price_row(("v", "a", ALWAYS, 0), FLAT)
    manual.source = Price.Source.MANUAL
    manual.save()
    import_prices.store({("v", "a", ALWAYS, 0): DEAR})
    manual.refresh_from_db()
    assert manual.input == Decimal(1)
    assert Price.objects.count() == 2


def test_the_table_prices_a_call(fresh):
    run()
    usage = Usage(input_tokens=200_000, output_tokens=1_000_000)
    model = "claude-sonnet-4-5"
    cheap, dear = (
        pricing.cost_of(used, "anthropic", model)
        for used in (usage, replace(usage, input_tokens=200_001))
    )
    rows = Price.objects.filter(family="anthropic", model=model)
    assert cheap.price_id == rows.get(from_input_tokens=0).pk
    assert cheap.amount == Decimal("15.6")
    assert dear.price_id in rows.values_list("pk", flat=True)


def test_a_row_is_in_force_with_the_next_version(fresh):
    usage = Usage(input_tokens=1_000_000)
    assert pricing.cost_of(usage, "v", "a") == pricing.UNPRICED
    for moment, columns in ((ALWAYS, FLAT), (LATER, DEAR)):
        row = import_prices.price_row(("v", "a", moment, 0), columns)
        row.source = Price.Source.MANUAL
        row.save()
        assert pricing.cost_of(usage, "v", "a").amount == columns[0]


def test_the_table_is_read_in_one_statement(fresh, django_assert_num_queries):
    run()
    with django_assert_num_queries(1):
        pricing.read(1)
    assert connection.in_atomic_block
