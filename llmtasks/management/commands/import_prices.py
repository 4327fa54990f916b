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
out. Amounts are rounded to the table's eight places.

Rows are only ever added. A date of a model that the table doesn't have is added as it is. Where
from now on another set of tiers would hold than the package says (amounts or tiers changed, a
price to come was called off), the package's whole set is added, effective now, or on the day to
come right after the set that it supersedes. What was in force in the past stays as it was:
attempts were billed at it. The rows of a model that the package dropped hold on. Where a manual
price is in force, no set is added that would be effective now: a correction in the package takes
no price away from the people who set it.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache
from typing import Any

import genai_prices
from django.core.management.base import BaseCommand, CommandParser
from django.db import connection, transaction
from django.db.models import Max
from django.utils import timezone
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
# Two imports take turns, by a lock of this number that ends with the transaction.
LOCK = 0x70726963
# The step of Postgres's time: what is effective this much later is in force instead.
NEXT = timedelta(microseconds=1)

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
Rows = dict[Key, Amounts]
Name = tuple[str, str]
# The rows of one moment, which hold together: amounts by `from_input_tokens`.
Tiers = dict[int, Amounts]
Timeline = dict[datetime, Tiers]


@dataclass
class Bundle:
    """What the package has for us: the rows, and by reason the names of what was left out."""

    rows: Rows = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Changes:
    """What an import adds to the table, and the names of models where it does not."""

    added: Rows = field(default_factory=dict)  # dates that the table did not have
    changed: Rows = field(default_factory=dict)  # sets that supersede stored ones
    dropped: list[str] = field(default_factory=list)  # the package has them no more
    held: list[str] = field(default_factory=list)  # a manual price is in force


@cache
def bundled() -> Bundle:
    """Every row that the package's data make: a second's work. Not to be changed."""
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
def store(rows: Rows, now: datetime | None = None) -> Changes:
    """Add what makes the imported prices those of `rows` from now on. Nothing is written where
    nothing differs, so that the configuration's version stays."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
    now = now or timezone.now()
    changes = compare(imported(), rows, manual_since(now), now)
    missing = {**changes.added, **changes.changed}
    if missing:
        Price.objects.bulk_create(
            [price_row(key, missing[key]) for key in sorted(missing)], batch_size=BATCH
        )
    return changes


def imported() -> Rows:
    """The imported rows that there are."""
    rows = Price.objects.filter(source=Price.Source.IMPORTED).order_by()
    return {
        (family, model, since, tokens): tuple(columns)
        for family, model, since, tokens, *columns in rows.values_list(*KEY_FIELDS, *AMOUNT_FIELDS)
    }


def manual_since(now: datetime) -> dict[Name, datetime]:
    """By model, since when its latest manual price that has begun is effective."""
    rows = Price.objects.filter(source=Price.Source.MANUAL, effective_from__lte=now).order_by()
    latest = rows.values("family", "model").annotate(since=Max("effective_from"))
    return {
        (family, model): since
        for family, model, since in latest.values_list("family", "model", "since")
    }


def compare(stored: Rows, wanted: Rows, manual: dict[Name, datetime], now: datetime) -> Changes:
    """What to add to the stored rows. `manual` is since when manual prices are in force."""
    changes = Changes()
    known_of, wanted_of = timelines(stored), timelines(wanted)
    changes.dropped.extend("/".join(name) for name in sorted(known_of.keys() - wanted_of.keys()))
    for name, sets in wanted_of.items():
        known = known_of.get(name, {})
        new = {moment: tiers for moment, tiers in sets.items() if moment not in known}
        superseding = corrections({**known, **new}, sets, now)
        today = [moment for moment in superseding if day_of(moment) == day_of(now)]
        if today and is_in_force(manual.get(name), sets={**known, **new}, now=now):
            changes.held.append("/".join(name))
            del superseding[today[0]]
        changes.added.update(keyed(name, new))
        changes.changed.update(keyed(name, superseding))
    return changes


def timelines(rows: Rows) -> dict[Name, Timeline]:
    found: dict[Name, Timeline] = defaultdict(dict)
    for (family, model, moment, tokens), columns in rows.items():
        found[family, model].setdefault(moment, {})[tokens] = columns
    return found


def keyed(name: Name, sets: Timeline) -> Rows:
    return {
        (*name, moment, tokens): columns
        for moment, tiers in sets.items()
        for tokens, columns in tiers.items()
    }


def corrections(known: Timeline, wanted: Timeline, now: datetime) -> Timeline:
    """The sets that make `known`, which has every moment of `wanted`, hold on each day from now on
    what `wanted` says. None for a day before the first of `wanted`."""
    made: Timeline = {}
    today = day_of(now)
    for day in sorted({today, *(day_of(moment) for moment in known if day_of(moment) > today)}):
        first, last = latest(wanted, day), latest({**known, **made}, day)
        if first is None or last is None:
            continue
        if {**known, **made}[last] != wanted[first]:
            start = now if day == today else datetime.combine(day, time(), UTC)
            made[max(start, last + NEXT)] = wanted[first]
    return made


def latest(sets: Timeline, day: date) -> datetime | None:
    """The moment of the set that holds at the end of that day."""
    return max((moment for moment in sets if day_of(moment) <= day), default=None)


def is_in_force(manual: datetime | None, sets: Timeline, now: datetime) -> bool:
    """Whether the manual price of that moment holds before the sets. See `pricing`."""
    return manual is not None and not any(
        day_of(manual) < day_of(moment) <= day_of(now) for moment in sets
    )


def day_of(moment: datetime) -> date:
    return moment.astimezone(UTC).date()


def price_row(key: Key, columns: Amounts) -> Price:
    return Price(
        source=Price.Source.IMPORTED,
        **dict(zip(KEY_FIELDS, key, strict=True)),
        **dict(zip(AMOUNT_FIELDS, columns, strict=True)),
    )


class Command(BaseCommand):
    help = "Import the prices bundled with genai-prices (offline); adds rows only; idempotent."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--left-out",
            action="store_true",
            help="name every model that was left out or kept as it was, and why",
        )

    def handle(self, *args: Any, left_out: bool, **options: Any) -> None:
        bundle = bundled()
        changes = store(bundle.rows)
        self.stdout.write(
            f"genai-prices {genai_prices.__version__}: {len(bundle.rows)} rows; "
            f"{len(changes.added)} new, {len(changes.changed)} changed"
        )
        reasons = {f"left out, {reason}": names for reason, names in bundle.left_out.items()}
        reasons["kept, no longer in the package"] = changes.dropped
        reasons["kept, a manual price is in force"] = changes.held
        for reason, names in sorted(reasons.items()):
            distinct = sorted(set(names))
            self.stdout.write(f"{reason}: {len(distinct)}")
            for name in distinct if left_out else ():
                self.stdout.write(f"  {name}")
