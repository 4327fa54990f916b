"""The limits in force: which of them hold for a call, read once per version of the configuration.

A rule counts the calls that match every selector it names. Its meter in Redis is its own, one for
all of them, or one for each tenant or key.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.conf import settings

from llmtasks import pulse
from llmtasks.models import WINDOWS, Limit

# The slots of a rate's window are 120ths of it; calls may reach a vendor by so much later than
# they were let through, which is a slot at least.
SLOTS = 120
DELAY_S = 0.1
# Of the amount, what may be used at once after a pause, where a limit does not say.
BURST = {Limit.Unit.REQUESTS: 0.02, Limit.Unit.CONCURRENCY: 0.2}
TOKEN_BURST = 0.05
LEAST_BURST = 10


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit, as the script wants it. Selectors that are empty or None match every call."""

    id: int
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

    @property
    def is_own(self) -> bool:
        """Whether it is the caller's own limit, which the caller is told of. What all callers
        share tells of the others."""
        return not self.provider and bool(self.tenant_id or self.key_id or self.each)

    @property
    def per_us(self) -> int:
        return WINDOWS[self.window] * 1_000_000 if self.window else 0

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

    def wire(self, need: int, pace: int) -> dict[str, Any]:
        """What the script is told of it: the call reserves `need` and is expected to use `pace`."""
        width_s = self.per_us / 1e6 / SLOTS
        return {
            "need": need,
            "pace": pace,
            "amount": self.amount,
            "burst": self.burst,
            "keep": self.keep,
            "per": self.per_us,
            "slack": math.ceil(DELAY_S / width_s) if width_s else 0,
            "seeds": self.window in (Limit.Window.HOUR, Limit.Window.DAY),
        }

    @property
    def keep(self) -> float:
        """What background work leaves of the burst for those who wait."""
        kept = self.burst * float(settings.LLMTASKS["INTERACTIVE_RESERVE"])
        return kept if self.per_us else math.floor(kept)


@dataclass(frozen=True, slots=True)
class Rules:
    version: int
    of_provider: dict[str, tuple[Rule, ...]]
    others: tuple[Rule, ...]


_rules: Rules | None = None
_lock = threading.Lock()


def rules() -> Rules:
    """The rules in force. Raises `django.db.Error` where Postgres is away and none are known."""
    global _rules
    known, version = _rules, pulse.config_version()
    if known is not None and known.version == version:
        return known
    with _lock:
        if _rules is None or _rules.version != version:
            _rules = read(version)
        return _rules


def read(version: int) -> Rules:
    of_provider: dict[str, list[Rule]] = {}
    others = []
    for row in Limit.objects.select_related("provider", "tenant", "key").order_by("id"):
        rule = rule_of(row)
        if rule.provider:
            of_provider.setdefault(rule.provider, []).append(rule)
        else:
            others.append(rule)
    return Rules(version, {name: tuple(of) for name, of in of_provider.items()}, tuple(others))


def rule_of(row: Limit) -> Rule:
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
    )


def usual_burst(row: Limit) -> int:
    if row.window in (Limit.Window.HOUR, Limit.Window.DAY):
        return row.amount
    return max(math.ceil(row.amount * BURST.get(Limit.Unit(row.unit), TOKEN_BURST)), LEAST_BURST)


def matching(provider: str, model: str, tenant_id: UUID, key_id: UUID | None) -> Iterator[Rule]:
    """The rules that hold for a call."""
    known = rules()
    for rule in (*known.of_provider.get(provider, ()), *known.others):
        if rule.matches(provider, model, tenant_id, key_id):
            yield rule
