"""What a call costs: exact decimals from a vendor's usage and the price table.

A price is found by the exact family and model. Its rows of one moment are one set, of one row for
each tier. Of the sets that have begun one holds, whole: the one of the latest day, on one day a
manual one before an imported one, among those the latest. In it the row with the largest
`from_input_tokens` that the prompt reaches is used. A tier that the set lacks is never looked for
in an older one. No row means `unpriced`, which is not the same as 0.

Prices are a vendor's standard ones: a service tier (batch, flex, priority) that was asked for
through `service_tier` is not told apart.
"""

import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from operator import attrgetter

from django.db import Error

from llmtasks import pulse
from llmtasks.models import CostState, Price
from llmtasks.stores import reading, release
from providers.types import Usage

log = logging.getLogger(__name__)

# Enough for any product of a count of tokens and a price: nothing is rounded before the end.
EXACT = Context(prec=100, rounding=ROUND_HALF_EVEN)
PLACES = Decimal("1e-10")
# The ledger's column holds ten digits before the point.
TOO_LARGE = Decimal(10) ** 10

# What an estimate takes for granted: four bytes of JSON a token, and an answer of this length
# where the caller set no limit.
BYTES_PER_TOKEN = 4
ASSUMED_OUTPUT_TOKENS = 1024

# After a read that failed, the prices that are known are used for so long before the next.
READ_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Dollars, and how sure they are. `amount` is None where the cost is not known."""

    amount: Decimal | None
    state: CostState
    price_id: int | None


UNPRICED = Cost(None, CostState.UNPRICED, None)


@dataclass(frozen=True, slots=True)
class Rates:
    """A row of the price table: dollars per million tokens of each kind."""

    id: int
    effective_from: datetime
    from_input_tokens: int
    is_manual: bool
    input: Decimal
    cached_input: Decimal
    cache_write_5m: Decimal
    cache_write_1h: Decimal
    output: Decimal
    reasoning: Decimal
    per_request: Decimal

    @property
    def tier_set(self) -> tuple[datetime, bool]:
        """What the rows of a model that hold together have in common."""
        return self.effective_from, self.is_manual

    @property
    def rank(self) -> tuple[date, bool, datetime, int]:
        """By the sets' precedence, and in a set by tier."""
        day = self.effective_from.astimezone(UTC).date()
        return day, self.is_manual, self.effective_from, self.from_input_tokens


@dataclass(frozen=True, slots=True)
class Prices:
    """The whole table under one version of the configuration, each model's best rank first."""

    version: int
    of_model: dict[tuple[str, str], tuple[Rates, ...]]


_prices: Prices | None = None
_read_again_at = float("-inf")
_lock = threading.Lock()


def prices() -> Prices:
    """The table as it was read last; read anew after each change of the configuration. While
    Postgres is away the last one holds; where there is none, raises `django.db.Error`."""
    global _prices, _read_again_at
    known, version = _prices, pulse.config_version()
    if known is None or (known.version != version and time.monotonic() >= _read_again_at):
        try:
            with reading(_lock):
                if _prices is None or _prices.version != version:
                    _prices = read(version)
                return _prices
        except Error:
            if known is None:
                raise
            log.warning("the prices can't be read: the last ones hold", exc_info=True)
            _read_again_at = time.monotonic() + READ_AGAIN_S
    return known


def read(version: int) -> Prices:
    """The table as it is now."""
    of_model: dict[tuple[str, str], list[Rates]] = {}
    rows = Price.objects.order_by().values_list(
        "family",
        "model",
        "source",
        "id",
        "effective_from",
        "from_input_tokens",
        "input",
        "cached_input",
        "cache_write_5m",
        "cache_write_1h",
        "output",
        "reasoning",
        "per_request",
    )
    try:
        for family, model, source, row_id, since, tokens, *amounts in rows:
            rates = Rates(row_id, since, tokens, source == Price.Source.MANUAL, *amounts)
            of_model.setdefault((family, model), []).append(rates)
    finally:
        release()
    by_rank = attrgetter("rank")
    ordered = {key: tuple(sorted(of, key=by_rank, reverse=True)) for key, of in of_model.items()}
    return Prices(version, ordered)


def price_for(family: str, model: str, total_input_tokens: int) -> Rates | None:
    """The price in force now for a prompt of that size."""
    now = pulse.now()
    rows = prices().of_model.get((family, model), ())
    begun = [rates for rates in rows if rates.effective_from <= now]
    for rates in begun:
        if rates.tier_set == begun[0].tier_set and rates.from_input_tokens <= total_input_tokens:
            return rates
    return None


def cost_of(usage: Usage, family: str, model: str) -> Cost:
    """What a call cost whose usage the vendor told."""
    return _cost(usage, family, model, CostState.FINAL)


def estimate(family: str, model: str, input_bytes: int, max_output_tokens: int | None) -> Cost:
    """What a call may cost at the most likely, before its usage is known."""
    output = ASSUMED_OUTPUT_TOKENS if max_output_tokens is None else max_output_tokens
    usage = Usage(input_tokens=-(-input_bytes // BYTES_PER_TOKEN), output_tokens=output)
    return _cost(usage, family, model, CostState.ESTIMATED)


def _cost(usage: Usage, family: str, model: str, state: CostState) -> Cost:
    rates = price_for(family, model, usage.total_input_tokens)
    if rates is None:
        return UNPRICED
    amount = amount_of(usage, rates)
    if amount is None:
        log.error("usage that can't be: no cost", extra={"model": model, "usage": str(usage)})
        return Cost(None, CostState.UNPRICED, rates.id)
    return Cost(amount, state, rates.id)


def amount_of(usage: Usage, rates: Rates) -> Decimal | None:
    """Dollars to ten places. None where no ledger could hold them: a vendor's faulty usage must
    not make the settlement fail."""
    with localcontext(EXACT):
        per_million = (
            usage.input_tokens * rates.input
            + usage.cached_input_tokens * rates.cached_input
            + usage.cache_write_5m_tokens * rates.cache_write_5m
            + usage.cache_write_1h_tokens * rates.cache_write_1h
            + usage.output_tokens * rates.output
            + usage.reasoning_tokens * rates.reasoning
        )
        amount = per_million.scaleb(-6) + rates.per_request
        return amount.quantize(PLACES) if abs(amount) < TOO_LARGE - 1 else None
