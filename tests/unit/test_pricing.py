"""Cost: the right price, and exact arithmetic on it."""

from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import genai_prices
import pytest
from django.db import OperationalError
from genai_prices.types import ModelPrice
from hypothesis import example, given
from hypothesis import strategies as st

from llmtasks import pricing, pulse
from llmtasks.management.commands.import_prices import (
    ALWAYS,
    AMOUNT_FIELDS,
    Rows,
    bundled,
    compare,
)
from llmtasks.management.commands.import_prices import (
    amounts as amounts_of,
)
from llmtasks.models import CostState
from llmtasks.pricing import Prices, Rates
from providers.types import Usage

# In the evening: no price of the package that holds at some hours only is in force.
NOW = datetime(2026, 11, 20, 20, tzinfo=UTC)
DAY = timedelta(days=1)
KINDS = tuple(Usage.__dataclass_fields__)


def rates(row_id: int = 1, **changes: object) -> Rates:
    base = Rates(
        id=row_id,
        effective_from=datetime(2024, 1, 1, tzinfo=UTC),
        from_input_tokens=0,
        is_manual=False,
        input=Decimal("3"),
        cached_input=Decimal("0.3"),
        cache_write_5m=Decimal("3.75"),
        cache_write_1h=Decimal("6"),
        output=Decimal("15"),
        reasoning=Decimal("15"),
        per_request=Decimal("0"),
    )
    return replace(base, **changes)


@pytest.fixture
def table(monkeypatch):
    """Call it with the rows of the model `v/m`."""
    monkeypatch.setattr(pulse, "config_version", lambda: 1)
    monkeypatch.setattr(pulse, "now", lambda: NOW)

    def use(*rows: Rates) -> None:
        ordered = tuple(sorted(rows, key=lambda row: row.rank, reverse=True))
        monkeypatch.setattr(pricing, "_prices", Prices(1, {("v", "m"): ordered}))

    use()
    return use


counts = st.integers(min_value=0, max_value=10**12)
amounts = st.decimals(min_value=0, max_value=10_000, places=8)
usages = st.builds(Usage, **dict.fromkeys(KINDS, counts))
all_rates = st.builds(rates, **dict.fromkeys(AMOUNT_FIELDS, amounts))


def exact(usage: Usage, price: Rates) -> Fraction:
    pairs = zip(
        KINDS,
        ("input", "cached_input", "cache_write_5m", "cache_write_1h", "output", "reasoning"),
        strict=True,
    )
    total = sum(Fraction(getattr(usage, kind)) * Fraction(getattr(price, of)) for kind, of in pairs)
    return total / 1_000_000 + Fraction(price.per_request)


@given(usages, all_rates)
def test_the_sum_is_exact_to_ten_places(usage, price):
    amount = pricing.amount_of(usage, price)
    if amount is None:
        assert exact(usage, price) >= 10**10 - 2
        return
    assert type(amount) is Decimal
    assert amount.as_tuple().exponent == -10
    assert abs(Fraction(amount) - exact(usage, price)) <= Fraction(1, 2 * 10**10)


@given(usages, all_rates, st.sampled_from(KINDS), st.integers(1, 10**9))
def test_more_tokens_never_cost_less(usage, price, kind, more):
    larger = replace(usage, **{kind: getattr(usage, kind) + more})
    before, after = pricing.amount_of(usage, price), pricing.amount_of(larger, price)
    assert before is None or after is None or after >= before


@given(st.lists(usages, max_size=5), all_rates)
def test_parts_cost_what_the_whole_costs(parts, price):
    price = replace(price, per_request=Decimal(0))
    whole = Usage(**{kind: sum(getattr(part, kind) for part in parts) for kind in KINDS})
    amount = pricing.amount_of(whole, price)
    pieces = [pricing.amount_of(part, price) for part in parts]
    if amount is not None and None not in pieces:
        assert abs(amount - sum(pieces)) <= (len(parts) + 1) * Decimal("0.5e-10")


def test_halves_are_rounded_to_even():
    price = rates(input=Decimal("0.00005"))
    assert pricing.amount_of(Usage(input_tokens=1), price) == Decimal("0E-10")
    assert pricing.amount_of(Usage(input_tokens=3), price) == Decimal("2E-10")


def test_each_kind_has_its_price(table):
    table(rates(per_request=Decimal("0.01"), reasoning=Decimal("20")))
    usage = Usage(
        input_tokens=1_000_000,
        cached_input_tokens=2_000_000,
        cache_write_5m_tokens=3_000_000,
        cache_write_1h_tokens=4_000_000,
        output_tokens=5_000_000,
        reasoning_tokens=6_000_000,
    )
    cost = pricing.cost_of(usage, "v", "m")
    assert cost.amount == Decimal("3") + Decimal("0.6") + Decimal(
        "11.25"
    ) + 24 + 75 + 120 + Decimal("0.01")
    assert (cost.state, cost.price_id) == (CostState.FINAL, 1)


@pytest.mark.parametrize("family, model", [("w", "m"), ("v", "M"), ("v", "m-2"), ("v", "")])
def test_no_row_is_unpriced_and_never_0(table, family, model):
    table(rates())
    assert pricing.cost_of(Usage(input_tokens=5), family, model) == pricing.UNPRICED
    assert pricing.estimate(family, model, 100, 5) == pricing.UNPRICED


def test_a_price_of_0_is_final(table):
    table(rates(**dict.fromkeys(AMOUNT_FIELDS, Decimal(0))))
    cost = pricing.cost_of(Usage(input_tokens=5), "v", "m")
    assert (cost.amount, cost.state) == (Decimal(0), CostState.FINAL)


@pytest.mark.parametrize(
    "tokens, row", [(0, 1), (199_999, 1), (200_000, 2), (200_001, 2), (500_000, 3)]
)
def test_a_tier_holds_from_its_first_token_on(table, tokens, row):
    table(rates(1), rates(2, from_input_tokens=200_000), rates(3, from_input_tokens=500_000))
    assert pricing.price_for("v", "m", tokens).id == row


def test_the_tier_is_that_of_all_the_input(table):
    table(rates(1), rates(2, from_input_tokens=10))
    usage = Usage(input_tokens=2, cached_input_tokens=4, cache_write_1h_tokens=4)
    assert pricing.cost_of(usage, "v", "m").price_id == 2
    assert pricing.cost_of(replace(usage, input_tokens=1, output_tokens=50), "v", "m").price_id == 1


def test_the_latest_day_holds_once_it_has_come(table):
    table(rates(1), rates(2, effective_from=NOW - DAY), rates(3, effective_from=NOW + DAY))
    assert pricing.price_for("v", "m", 0).id == 2
    table(rates(3, effective_from=NOW + DAY))
    assert pricing.price_for("v", "m", 0) is None
    table(rates(4, effective_from=NOW))
    assert pricing.price_for("v", "m", 0).id == 4


def test_a_manual_row_beats_an_imported_one_of_the_same_day(table):
    morning = NOW.replace(hour=3)
    table(
        rates(1, effective_from=morning, is_manual=True),
        rates(2, effective_from=morning + timedelta(hours=2)),
        rates(3, effective_from=morning, from_input_tokens=100),
    )
    assert pricing.price_for("v", "m", 0).id == 1
    assert pricing.price_for("v", "m", 100).id == 1


def test_a_later_import_beats_an_older_manual_row(table):
    table(rates(1, is_manual=True), rates(2, effective_from=NOW - DAY))
    assert pricing.price_for("v", "m", 0).id == 2


def test_an_estimate_takes_bytes_and_the_cap(table):
    table(rates())
    cost = pricing.estimate("v", "m", 401, 10)
    assert cost.amount == (101 * Decimal(3) + 10 * Decimal(15)) / 1_000_000
    assert cost.state == CostState.ESTIMATED
    assert pricing.estimate("v", "m", 0, None).amount == Decimal(15 * 1024) / 1_000_000
    assert pricing.estimate("v", "m", 0, 0).amount == 0


def test_usage_that_no_ledger_can_hold_has_no_cost(table):
    table(rates(7))
    cost = pricing.cost_of(Usage(input_tokens=10**400), "v", "m")
    assert cost == pricing.Cost(None, CostState.UNPRICED, 7)


def test_a_set_of_tiers_holds_whole(table):
    """Never a tier of one moment beside a tier of another."""
    tiered = (rates(1), rates(2, from_input_tokens=200_000))
    table(*tiered, rates(3, effective_from=NOW - DAY))
    assert pricing.price_for("v", "m", 500_000).id == 3
    later = NOW - timedelta(minutes=5)
    table(
        *tiered,
        rates(3, effective_from=later, from_input_tokens=100),
        rates(4, effective_from=later),
    )
    assert [pricing.price_for("v", "m", n).id for n in (0, 99, 100, 200_000)] == [4, 4, 3, 3]


def test_a_tier_that_the_set_lacks_is_unpriced(table):
    table(rates(1), rates(2, effective_from=NOW - DAY, from_input_tokens=100))
    assert pricing.price_for("v", "m", 99) is None
    assert pricing.price_for("v", "m", 100).id == 2


def test_the_later_set_of_a_day_holds(table):
    table(
        rates(1, effective_from=NOW - timedelta(minutes=2)),
        rates(2, effective_from=NOW - timedelta(minutes=2), from_input_tokens=5),
        rates(3, effective_from=NOW - timedelta(minutes=1)),
        rates(4, effective_from=NOW + timedelta(minutes=1)),
    )
    assert pricing.price_for("v", "m", 10).id == 3


# --- the snapshot -----------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The versions that were read; `reads.fail` makes reading fail."""

    class Reads(list):
        fail = False

    seen = Reads()

    def read(version: int) -> Prices:
        if seen.fail:
            raise OperationalError("away")
        seen.append(version)
        return Prices(version, {})

    monkeypatch.setattr(pricing, "read", read)
    monkeypatch.setattr(pricing, "reading", lambda lock: lock)
    monkeypatch.setattr(pricing, "_prices", None)
    monkeypatch.setattr(pricing, "_read_again_at", float("-inf"))
    return seen


def test_the_table_is_read_once_per_version(reads, monkeypatch):
    for version in (1, 1, 2, 2):
        monkeypatch.setattr(pulse, "config_version", lambda version=version: version)
        pricing.prices()
    assert reads == [1, 2]


def test_the_last_table_holds_while_postgres_is_away(reads, monkeypatch):
    monkeypatch.setattr(pulse, "config_version", lambda: 1)
    monkeypatch.setattr(pricing, "READ_AGAIN_S", 3600.0)
    known = pricing.prices()
    monkeypatch.setattr(pulse, "config_version", lambda: 2)
    reads.fail = True
    assert pricing.prices() is known
    reads.fail = False
    assert pricing.prices() is known, "read again, and waited for, by every single call"
    monkeypatch.setattr(pricing, "_read_again_at", float("-inf"))
    assert pricing.prices().version == 2


def test_a_thread_that_waited_for_the_reader_reads_nothing(reads, monkeypatch):
    known = Prices(1, {})

    @contextmanager
    def reading(lock):
        pricing._prices = known
        yield

    monkeypatch.setattr(pulse, "config_version", lambda: 1)
    monkeypatch.setattr(pricing, "reading", reading)
    assert pricing.prices() is known
    assert reads == []


def test_without_any_table_postgres_away_is_an_error(reads, monkeypatch):
    monkeypatch.setattr(pulse, "config_version", lambda: 1)
    reads.fail = True
    with pytest.raises(OperationalError):
        pricing.prices()


# --- what genai-prices says -------------------------------------------------------------------

GOLDEN = [
    ("anthropic", "claude-opus-4-6"),
    ("anthropic", "claude-sonnet-4-5"),
    ("anthropic", "claude-haiku-4-5"),
    ("anthropic", "claude-opus-4-20250514"),
    ("anthropic", "claude-haiku-5-5"),
    ("azure", "text-embedding-3-small"),
    ("cohere", "command-r"),
    ("deepseek", "deepseek-chat"),
    ("google", "gemini-2.5-flash"),
    ("google", "gemini-2.5-pro"),
    ("groq", "llama-3.3-70b-versatile"),
    ("mistral", "mistral-large-latest"),
    ("openai", "gpt-4o"),
    ("openai", "gpt-4o-mini"),
    ("openai", "gpt-4.1"),
    ("openai", "gpt-5"),
    ("openai", "gpt-5-mini"),
    ("openai", "o3"),
    ("openai", "text-embedding-3-large"),
    ("perplexity", "sonar-deep-research"),
    ("perplexity", "sonar-pro"),
    ("x-ai", "grok-4"),
]
USAGES = [
    Usage(input_tokens=1),
    Usage(input_tokens=1234, output_tokens=567),
    Usage(input_tokens=10, cached_input_tokens=90_001, output_tokens=3, reasoning_tokens=1000),
    Usage(input_tokens=100, cache_write_5m_tokens=1001, output_tokens=3),
    *(Usage(input_tokens=n, output_tokens=7) for n in (100_000, 100_001, 200_000, 200_001)),
    *(Usage(input_tokens=n, cached_input_tokens=1) for n in (271_999, 272_000, 1_000_000)),
]


@pytest.fixture(scope="module")
def package():
    """The imported rows, as `prices()` would hold them."""
    by_name: dict[tuple[str, str], list[Rates]] = {}
    for number, (key, columns) in enumerate(sorted(bundled().rows.items())):
        family, model, since, tokens = key
        by_name.setdefault((family, model), []).append(
            Rates(number, since, tokens, False, *columns)
        )
    ordered = {
        key: tuple(sorted(rows, key=lambda row: row.rank, reverse=True))
        for key, rows in by_name.items()
    }
    return Prices(1, ordered)


def told_by_package(usage: Usage, family: str, model: str) -> Decimal:
    theirs = genai_prices.Usage(
        input_tokens=usage.total_input_tokens,
        cache_read_tokens=usage.cached_input_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        output_tokens=usage.total_output_tokens,
        output_reasoning_tokens=usage.reasoning_tokens,
    )
    calculated = genai_prices.calc_price(
        theirs, model, provider_id=family, genai_request_timestamp=NOW
    )
    return calculated.total_price


@pytest.mark.parametrize("family, model", GOLDEN)
def test_we_say_what_genai_prices_says(package, table, monkeypatch, family, model):
    monkeypatch.setattr(pricing, "_prices", package)
    assert (family, model) in package.of_model
    for usage in USAGES:
        expected = told_by_package(usage, family, model).quantize(pricing.PLACES)
        assert pricing.cost_of(usage, family, model).amount == expected


def test_every_imported_name_costs_what_the_package_says(package, table, monkeypatch):
    """To within the rounding of the few prices that the package has with 16 places."""
    monkeypatch.setattr(pricing, "_prices", package)
    usage = Usage(input_tokens=70_000, cached_input_tokens=40_000, output_tokens=50_000)
    for family, model in package.of_model:
        ours = pricing.cost_of(usage, family, model).amount
        assert abs(ours - told_by_package(usage, family, model)) < Decimal("1e-9"), (family, model)


def test_an_hour_in_anthropics_cache_costs_twice_the_input(package):
    for (family, model), rows in package.of_model.items():
        if family == "anthropic" and model != "claude-2":
            assert all(row.cache_write_1h in (2 * row.input, row.input) for row in rows), model
    opus = package.of_model["anthropic", "claude-opus-4-6"][0]
    assert (opus.input, opus.cache_write_1h) == (Decimal(5), Decimal(10))
    resold = package.of_model["openrouter", "anthropic/claude-opus-4.6"][0]
    assert resold.cache_write_1h == 2 * resold.input


def test_no_amount_is_a_float(package):
    for rows in package.of_model.values():
        for row in rows:
            assert all(type(getattr(row, field)) is Decimal for field in AMOUNT_FIELDS)


def test_a_price_without_input_makes_no_row():
    with pytest.raises(ValueError, match="price of input"):
        amounts_of(ModelPrice(output_mtok=Decimal(1)), 0, is_claude=False)


def test_what_is_left_out_is_told():
    left_out = bundled().left_out
    assert "deepseek/deepseek-chat" in left_out["price by the hour"]
    assert "openai/whisper-1" in left_out["no price per token"]
    assert "openai/ft:gpt-4o" in left_out["no vendor's name"]


# --- one data set after another ---------------------------------------------------------------

TOKENS = (0, 1000, 200_000)
A_MOMENT = timedelta(milliseconds=1)
START = NOW.replace(hour=0)
DATES = (ALWAYS, START - 300 * DAY, START, START + DAY, START + 2 * DAY)
tiers = st.dictionaries(st.sampled_from(TOKENS), st.integers(1, 3)).map(lambda more: {0: 1} | more)
# What a package may say of one model: at each of some dates a set of tiers; or nothing of it.
data_sets = st.dictionaries(st.sampled_from(DATES), tiers)


def as_rows(sets: dict[datetime, dict[int, int]]) -> Rows:
    return {
        ("v", "m", moment, tokens): (Decimal(amount),) * len(AMOUNT_FIELDS)
        for moment, of_moment in sets.items()
        for tokens, amount in of_moment.items()
    }


def told(sets: dict[datetime, dict[int, int]], moment: datetime, tokens: int) -> Decimal | None:
    """The price as the package means it."""
    begun = [date for date in sets if date <= moment]
    if not begun:
        return None
    of_moment = sets[max(begun)]
    return Decimal(of_moment[max(start for start in of_moment if start <= tokens)])


def ours(stored: Rows, moment: datetime, tokens: int) -> Decimal | None:
    made = [Rates(0, since, start, False, *of) for (_, _, since, start), of in stored.items()]
    ordered = tuple(sorted(made, key=lambda row: row.rank, reverse=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pulse, "config_version", lambda: 1)
        patch.setattr(pulse, "now", lambda: moment)
        patch.setattr(pricing, "_prices", Prices(1, {("v", "m"): ordered}))
        found = pricing.price_for("v", "m", tokens)
    return found and found.input


@example([({ALWAYS: {0: 1}}, 0), ({ALWAYS: {0: 2}}, 0), ({ALWAYS: {0: 1}}, 0), ({}, 0)])
@given(st.lists(st.tuples(data_sets, st.sampled_from((0, 1, 3600, 86_400))), max_size=5))
def test_imports_one_after_another_give_the_last_ones_prices(imports):
    """From each import on, and without a change to any row."""
    stored: Rows = {}
    now = NOW
    for sets, seconds in imports:
        now += timedelta(seconds=seconds)
        wanted = as_rows(sets)
        before = {
            # A correction made at once is in force a microsecond after what it corrects.
            (moment + A_MOMENT, tokens): ours(stored, moment + A_MOMENT, tokens)
            for moment in (now, now + DAY, now + 3 * DAY)
            for tokens in TOKENS
        }
        changes = compare(stored, wanted, {}, now)
        added = {**changes.added, **changes.changed}
        assert not added.keys() & stored.keys()
        assert all(moment >= now for _, _, moment, _ in changes.changed)
        stored |= added
        again = compare(stored, wanted, {}, now + timedelta(seconds=1))
        assert not again.added and not again.changed
        for (at, tokens), last in before.items():
            expected = told(sets, at, tokens)
            # What the package says nothing of keeps its last price.
            assert ours(stored, at, tokens) == (last if expected is None else expected)


ONE, TWO = as_rows({ALWAYS: {0: 1}}), as_rows({ALWAYS: {0: 2}})


def test_a_correction_takes_no_price_away_from_who_set_it():
    manual = {("v", "m"): NOW - DAY}
    changes = compare(ONE, TWO, manual, NOW)
    assert (changes.changed, changes.held) == ({}, ["v/m"])
    assert compare(ONE, ONE, manual, NOW).held == []
    dated = ONE | as_rows({START: {0: 1}})
    changes = compare(dated, TWO, manual, NOW)
    assert len(changes.changed) == 1, "no manual price is in force: a later day's import is"
    assert changes.held == []


def test_a_price_to_come_is_corrected_on_its_day():
    day = START + 2 * DAY
    changes = compare(as_rows({ALWAYS: {0: 1}, day: {0: 2}}), ONE, {("v", "m"): NOW}, NOW)
    assert list(changes.changed) == [("v", "m", day + timedelta(microseconds=1), 0)]
