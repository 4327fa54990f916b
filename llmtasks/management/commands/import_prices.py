"""The prices that come with genai-prices, as effective-dated rows. Offline: its updater is never
called.

Only exact names are imported: a model's id and its `equals` clauses, where genai-prices itself
takes the name for that model. A kind of token that has no price of its own costs what the
vendor bills it as:

    cached input       the input price
    cache write, 5 m   the cache write price, else the input price
    cache write, 1 h   its own price, else twice the input price where a Claude model has a cache
                       write price (https://platform.claude.com/docs/en/build-with-claude/
                       prompt-caching#pricing), else the price of 5 m
    output             0 (embeddings have none)
    reasoning          the output price

Audio, images, searches, prices by the hour of the day and variants for service tiers are left
out. Amounts are rounded to the table's eight places. Manual rows are never touched.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, time
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import genai_prices
from django.core.management.base import BaseCommand, CommandParser
from django.db import transaction
from genai_prices import data
from genai_prices.types import (
    ClauseEquals,
    ClauseOr,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    StartDateConstraint,
    TieredPrices,
)

from llmtasks.models import Price

# When a price begins that names no day: before any of these models was sold.
ALWAYS = datetime(2020, 1, 1, tzinfo=UTC)
PLACES = Decimal("1e-8")
BATCH = 1000

KEY_FIELDS = ("family", "model", "effective_from", "from_input_tokens")
AMOUNT_FIELDS = (
    "input",
    "cached_input",
    "cache_write_5m",
    "cache_write_1h",
    "output",
    "reasoning",
    "per_request",
)

Key = tuple[str, str, datetime, int]
Amounts = tuple[Decimal, ...]


@dataclass
class Bundle:
    """What the package has for us: the rows, and by reason the names of what was left out."""

    rows: dict[Key, Amounts] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Changes:
    """What an import did to the table."""

    added: int
    changed: int
    removed: int
    kept: int


def bundled() -> Bundle:
    """Every row that the package's data make."""
    bundle = Bundle()
    for provider in data.providers:
        for model in provider.models:
            for name in exact_names(model):
                if provider.find_model(name) is model:
                    add_model(bundle, provider.id, name, model)
                else:
                    bundle.left_out["no vendor's name"].append(f"{provider.id}/{name}")
    return bundle


def exact_names(model: ModelInfo) -> list[str]:
    """The model's id and the names that its match takes as they are."""
    return list(dict.fromkeys([model.id, *equal_names(model.match)]))


def equal_names(clause: Any) -> Iterator[str]:
    if isinstance(clause, ClauseEquals):
        yield clause.equals
    elif isinstance(clause, ClauseOr):
        for part in clause.or_:
            yield from equal_names(part)


def add_model(bundle: Bundle, family: str, name: str, model: ModelInfo) -> None:
    if model.price_variants:
        bundle.left_out["variant for a service tier"].append(f"{family}/{name}")
    for conditional in conditional_prices(model):
        since = starts_at(conditional)
        if since is None:
            bundle.left_out["price by the hour"].append(f"{family}/{name}")
        elif conditional.prices.input_mtok is None:
            bundle.left_out["no price per token"].append(f"{family}/{name}")
        else:
            for tokens in tiers(conditional.prices):
                key = (family, name, since, tokens)
                bundle.rows[key] = amounts(conditional.prices, tokens, is_claude="claude" in name)


def conditional_prices(model: ModelInfo) -> list[ConditionalPrice]:
    if isinstance(model.prices, ModelPrice):
        return [ConditionalPrice(prices=model.prices)]
    return model.prices


def starts_at(price: ConditionalPrice) -> datetime | None:
    """Midnight (UTC) of the price's first day; None for one that holds at some hours only."""
    if price.constraint is None:
        return ALWAYS
    if isinstance(price.constraint, StartDateConstraint):
        return datetime.combine(price.constraint.start_date, time(), UTC)
    return None


def tiers(prices: ModelPrice) -> list[int]:
    """From how many tokens of input on each tier holds. The package's tiers begin *above* their
    start."""
    tiered = [value for value in vars(prices).values() if isinstance(value, TieredPrices)]
    return sorted({0} | {tier.start + 1 for value in tiered for tier in value.tiers})


def amounts(prices: ModelPrice, tokens: int, *, is_claude: bool) -> Amounts:
    """The columns `AMOUNT_FIELDS` of the tier that begins at `tokens`."""
    plain = price_at(prices.input_mtok, tokens)
    if plain is None:
        raise ValueError("a price of input is needed")
    write = price_at(prices.cache_write_mtok, tokens)
    write_1h = price_at(prices.cache_write_1h_mtok, tokens)
    if write_1h is None:
        write_1h = 2 * plain if is_claude and write is not None else either(write, plain)
    output = either(price_at(prices.output_mtok, tokens), Decimal(0))
    columns = (
        plain,
        either(price_at(prices.cache_read_mtok, tokens), plain),
        either(write, plain),
        write_1h,
        output,
        either(price_at(prices.output_reasoning_mtok, tokens), output),
        either(price_at(prices.requests_kcount, tokens), Decimal(0)) / 1000,
    )
    return tuple(column.quantize(PLACES, ROUND_HALF_EVEN) for column in columns)


def either(price: Decimal | None, otherwise: Decimal) -> Decimal:
    return otherwise if price is None else price


def price_at(value: Decimal | TieredPrices | None, tokens: int) -> Decimal | None:
    if not isinstance(value, TieredPrices):
        return value
    reached = [tier.price for tier in value.tiers if tier.start < tokens]
    return reached[-1] if reached else value.base


@transaction.atomic
def store(rows: dict[Key, Amounts]) -> Changes:
    """Make the imported rows those of `rows`. Nothing is written where nothing differs, so that
    the configuration's version stays.

    The rows of a model that the package no longer has stay as its last known prices; a date or
    tier that it dropped from a model must go, or it would still be used.
    """
    known = imported()
    changed = [key for key in rows.keys() & known.keys() if known[key][1] != rows[key]]
    added = list(rows.keys() - known.keys())
    names = {key[:2] for key in rows}
    removed = [known[key][0] for key in known.keys() - rows.keys() if key[:2] in names]
    if removed:
        Price.objects.filter(id__in=removed).delete()
    if added or changed:
        Price.objects.bulk_create(
            [price_row(key, rows[key]) for key in sorted(added + changed)],
            batch_size=BATCH,
            update_conflicts=True,
            unique_fields=[*KEY_FIELDS, "source"],
            update_fields=AMOUNT_FIELDS,
        )
    kept = len(rows) - len(added) - len(changed)
    return Changes(len(added), len(changed), len(removed), kept)


def imported() -> dict[Key, tuple[int, Amounts]]:
    """The imported rows that there are: their ids and amounts."""
    rows = Price.objects.filter(source=Price.Source.IMPORTED).order_by()
    known: dict[Key, tuple[int, Amounts]] = {}
    for family, model, since, tokens, row_id, *columns in rows.values_list(
        *KEY_FIELDS, "id", *AMOUNT_FIELDS
    ):
        known[family, model, since, tokens] = (row_id, tuple(columns))
    return known


def price_row(key: Key, columns: Amounts) -> Price:
    return Price(
        source=Price.Source.IMPORTED,
        **dict(zip(KEY_FIELDS, key, strict=True)),
        **dict(zip(AMOUNT_FIELDS, columns, strict=True)),
    )


class Command(BaseCommand):
    help = "Import the prices bundled with genai-prices (offline); idempotent."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--left-out", action="store_true", help="name every model that was left out, and why"
        )

    def handle(self, *args: Any, left_out: bool, **options: Any) -> None:
        bundle = bundled()
        changes = store(bundle.rows)
        self.stdout.write(
            f"genai-prices {genai_prices.__version__}: {len(bundle.rows)} rows, of which "
            f"{changes.added} new, {changes.changed} changed, {changes.kept} as they were; "
            f"{changes.removed} removed"
        )
        for reason, names in sorted(bundle.left_out.items()):
            distinct = sorted(set(names))
            self.stdout.write(f"left out, {reason}: {len(distinct)}")
            for name in distinct if left_out else ():
                self.stdout.write(f"  {name}")
