"""Prices from genai-prices into the table, and from the table into a cost."""

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import connection

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
    assert "0 removed" in run()
    rows, before = Price.objects.count(), version()
    assert rows > 3000
    assert "0 new, 0 changed" in run()
    assert (Price.objects.count(), version()) == (rows, before)


def test_what_is_left_out_is_counted_and_named_when_asked_for():
    assert "left out, price by the hour: " in run()
    assert "  deepseek/deepseek-chat\n" in run("--left-out")


def test_an_import_makes_the_rows_what_the_package_says():
    import_prices.store({("v", "a", ALWAYS, 0): FLAT, ("v", "b", ALWAYS, 0): FLAT})
    before = version()
    changes = import_prices.store(
        {("v", "a", ALWAYS, 0): DEAR, ("v", "a", LATER, 0): FLAT, ("v", "b", ALWAYS, 0): FLAT}
    )
    assert changes == import_prices.Changes(added=1, changed=1, removed=0, kept=1)
    assert version() > before
    assert Price.objects.get(model="a", effective_from=ALWAYS).input == Decimal(2)


def test_a_tier_that_was_dropped_goes_and_a_model_that_was_dropped_stays():
    import_prices.store(
        {
            ("v", "a", ALWAYS, 0): FLAT,
            ("v", "a", ALWAYS, 1000): DEAR,
            ("v", "gone", ALWAYS, 0): FLAT,
        }
    )
    changes = import_prices.store({("v", "a", ALWAYS, 0): FLAT})
    assert changes.removed == 1
    assert set(Price.objects.values_list("model", "from_input_tokens")) == {("a", 0), ("gone", 0)}


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


def test_an_edit_is_in_force_with_the_next_version(fresh):
    row = import_prices.price_row(("v", "a", ALWAYS, 0), FLAT)
    row.source = Price.Source.MANUAL
    row.save()
    usage = Usage(input_tokens=1_000_000)
    assert pricing.cost_of(usage, "v", "a").amount == 1
    row.input = Decimal("1.5")
    row.save()
    assert pricing.cost_of(usage, "v", "a").amount == Decimal("1.5")
    assert pricing.cost_of(usage, "v", "b") == pricing.UNPRICED


def test_the_table_is_read_in_one_statement(fresh, django_assert_num_queries):
    run()
    with django_assert_num_queries(1):
        pricing.read(1)
    assert connection.in_atomic_block
