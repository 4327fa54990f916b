"""The limits in force: which of them hold for a call, read once per version of the configuration.

A rule counts the calls that match every selector it names. Its meter in Redis is its own, one for
all of them, or one for each tenant or key.
"""

import logging
import math
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from uuid import UUID

from django.conf import settings
from django.db.models import Count

from llmtasks import pulse, stores
from llmtasks.models import WINDOWS, Limit, Provider

log = logging.getLogger(__name__)

# The slots of a rate's window are 120ths of it; calls may reach a vendor by so much later than
# they were let through, which is a slot at least.
SLOTS = 120
DELAY_S = 0.1
# Of the amount, what may be used at once after a pause, where a limit does not say.
BURST = {Limit.Unit.REQUESTS: 0.02, Limit.Unit.CONCURRENCY: 0.2}
TOKEN_BURST = 0.05
LEAST_BURST = 10
# Callers whose rules are remembered. Beyond that all are forgotten, and looked up again.
MAX_CALLERS = 10_000

# A meter, as the script unpacks it: what a call tells, and what the rule says.
CALL, TERMS = struct.Struct("<5d"), struct.Struct("<7d")
UNTOLD = (-1, -1)

# (provider, the vendor's model, tenant, key)
Caller = tuple[str, str, UUID, UUID | None]


@dataclass(frozen=True)
class Rule:
    """A limit, as the script wants it. Selectors that are empty or None match every call."""

    id: int | str
    name: str
    provider: str
    model: str
    tenant_id: UUID | None
    key_id: UUID | None
    each: str
    unit: str
    window: str
    amount: int
    burst: int
    # Whether a vendor's headers speak of the very calls that it counts.
    is_told: bool = False
    # When it was made: what was used before, no meter counted.
    made_us: int = 0

    @property
    def is_own(self) -> bool:
        """Whether it is the caller's own limit, which the caller is told of. What all callers
        share tells of the others."""
        return not self.provider and bool(self.tenant_id or self.key_id or self.each)

    @cached_property
    def per_us(self) -> int:
        return WINDOWS[self.window] * 1_000_000 if self.window else 0

    @property
    def seeds(self) -> bool:
        """Whether Postgres is asked what was used of a window that no meter knows."""
        return self.window not in ("", Limit.Window.SECOND)

    @cached_property
    def slack_us(self) -> int:
        """How much later than it was let through a call may reach the vendor."""
        width = -(-self.per_us // SLOTS)
        return math.ceil(DELAY_S * 1e6 / width) * width if width else 0

    def matches(self, provider: str, model: str, tenant_id: UUID, key_id: UUID | None) -> bool:
        return (
            self.provider in ("", provider)
            and self.model in ("", model)
            and self.tenant_id in (None, tenant_id)
            and self.key_id in (None, key_id)
            and not (self.each == Limit.Each.KEY and key_id is None)
        )

    def meter(self, tenant_id: UUID, key_id: UUID | None) -> str:
        """The key of its meter for a call of that tenant and key."""
        who = {"": "", Limit.Each.TENANT: f":{tenant_id}", Limit.Each.KEY: f":{key_id}"}[self.each]
        return f"{{limits}}:meter:{self.id}{who}"

    def wire(
        self, need: int = 0, pace: int = 0, used: int = 0, told: tuple[int, int] = UNTOLD
    ) -> bytes:
        """What the script is told of it: the call reserves `need`, is expected to use `pace`, has
        `used`. `told` is the vendor's limit, and what is left of it."""
        return CALL.pack(need, pace, used, *told) + self.terms

    @cached_property
    def terms(self) -> bytes:
        """What the script is told of it whatever the call."""
        width = -(-self.per_us // SLOTS)
        slack = self.slack_us // width if width else 0
        made_us = self.made_us if self.seeds else 0
        return TERMS.pack(
            self.amount, self.burst, self.keep, self.per_us, slack, self.seeds, made_us
        )

    @property
    def keep(self) -> float:
        """What background work leaves of the burst for those who wait."""
        kept = self.burst * float(settings.LLMTASKS["INTERACTIVE_RESERVE"])
        return kept if self.per_us else math.floor(kept)


@dataclass(frozen=True, slots=True)
class Rules:
    """`others` name no provider: those of one tenant or key are found by it alone."""

    version: int
    of_provider: dict[str, tuple[Rule, ...]]
    others: tuple[Rule, ...]
    of_caller: dict[UUID | None, tuple[Rule, ...]]
    # What was looked up before: the rules of a caller, each with the key of its meter.
    held: dict[Caller, tuple[tuple[Rule, str], ...]] = field(default_factory=dict)

    def candidates(self, provider: str, tenant_id: UUID, key_id: UUID | None) -> Iterator[Rule]:
        yield from self.of_provider.get(provider, ())
        yield from self.of_caller.get(None, ())
        yield from self.of_caller.get(tenant_id, ())
        if key_id is not None:
            yield from self.of_caller.get(key_id, ())


_rules: Rules | None = None
_lock = threading.Lock()


def rules() -> Rules:
    """The rules in force. Raises `django.db.Error` where Postgres is away and none are known."""
    global _rules
    known, version = _rules, pulse.config_version()
    if known is not None and known.version == version:
        return known
    with stores.reading(_lock):
        if _rules is None or _rules.version != version:
            _rules = read(version)
        return _rules


def read(version: int) -> Rules:
    of_provider: dict[str, list[Rule]] = {}
    of_caller: dict[UUID | None, list[Rule]] = {}
    counts = dict(Provider.objects.annotate(n=Count("models")).values_list("pk", "n"))
    for row in Limit.objects.select_related("provider", "tenant", "key").order_by("id"):
        if not row.is_sound:
            log.error("a limit can't be held", extra={"limit": row.pk, "says": str(row)})
            continue
        rule = rule_of(row, counts.get(row.provider_id or 0, 0))
        if rule.provider:
            of_provider.setdefault(rule.provider, []).append(rule)
        else:
            of_caller.setdefault(rule.key_id or rule.tenant_id, []).append(rule)
    return Rules(
        version,
        of_provider={name: tuple(found) for name, found in of_provider.items()},
        others=tuple(rule for found in of_caller.values() for rule in found),
        of_caller={who: tuple(found) for who, found in of_caller.items()},
    )


def rule_of(row: Limit, models: int = 0) -> Rule:
    """`models`: how many the provider has."""
    is_whole = not (row.tenant_id or row.key_id or row.each)
    return Rule(
        id=row.pk,
        name=str(row),
        provider=row.provider.name if row.provider else "",
        model=row.model,
        tenant_id=row.tenant_id,
        key_id=row.key_id,
        each=row.each,
        unit=row.unit,
        window=row.window,
        amount=row.amount,
        burst=min(row.amount, row.burst or usual_burst(row)),
        is_told=bool(row.provider)
        and is_whole
        and row.window == Limit.Window.MINUTE
        and bool(row.model or models <= 1),
        made_us=int(row.created_at.timestamp() * 1e6),
    )


def usual_burst(row: Limit) -> int:
    if row.window in (Limit.Window.HOUR, Limit.Window.DAY):
        return row.amount
    share = math.ceil(row.amount * BURST.get(Limit.Unit(row.unit), TOKEN_BURST))
    return max(share, LEAST_BURST) if row.window else share


def holding(
    provider: str, model: str, tenant_id: UUID, key_id: UUID | None
) -> tuple[tuple[Rule, str], ...]:
    """The rules that hold for a call, each with the key of its meter."""
    known = rules()
    caller = (provider, model, tenant_id, key_id)
    if (held := known.held.get(caller)) is not None:
        return held
    if len(known.held) >= MAX_CALLERS:
        known.held.clear()
    held = tuple(
        (rule, rule.meter(tenant_id, key_id))
        for rule in known.candidates(provider, tenant_id, key_id)
        if rule.matches(provider, model, tenant_id, key_id)
    )
    known.held[caller] = held
    return held


def matching(provider: str, model: str, tenant_id: UUID, key_id: UUID | None) -> Iterator[Rule]:
    """The rules that hold for a call."""
    return (rule for rule, _ in holding(provider, model, tenant_id, key_id))
