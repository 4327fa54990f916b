"""How everything does, gathered once for all who ask: /metrics, /v1/providers and the admin.

    Postgres: accounts, processes, the backlog → Redis: limits, breakers, errors

Where a store is away, what it knows is missing; nothing is raised. A look is kept for a second, or
ten times as long as it took.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from django.db import Error

from llmtasks import backlog, pulse, stores
from llmtasks.backlog import Backlog
from llmtasks.errors import Unavailable
from llmtasks.guards import readings, rules
from llmtasks.guards.meters import Away
from llmtasks.guards.readings import Reading, Use
from llmtasks.models import Provider, ProviderModel
from llmtasks.stores import fetch

log = logging.getLogger(__name__)

KEPT_S = 1.0
KEPT_TIMES = 10
# One looks, the others wait for so long.
PATIENCE_S = 2.0
POSTGRES_AWAY = (Error, psycopg.Error, Unavailable)

PROCESSES = """
SELECT role, lane, count(*), coalesce(sum(slots), 0) FROM llmtasks_worker
WHERE lease_until > statement_timestamp() GROUP BY role, lane ORDER BY role, lane
"""
LEADER = """
SELECT count(*) FROM llmtasks_config
WHERE leader IS NOT NULL AND leader_until > statement_timestamp()
"""


@dataclass(frozen=True, slots=True)
class Model:
    """A vendor's model. `reading` is None while Redis is away."""

    row: ProviderModel
    reading: Reading | None

    @property
    def status(self) -> str:
        """`refused`, `degraded` (its breaker or gate is closed to calls) or `ok`."""
        if self.row.refused_at is not None:
            return "refused"
        is_well = self.reading is None or self.reading.is_well
        return "ok" if is_well else "degraded"


@dataclass(frozen=True, slots=True)
class Account:
    """A provider with its models, and how much of the limits that hold for it is used."""

    row: Provider
    models: tuple[Model, ...]
    uses: tuple[Use, ...]

    @property
    def status(self) -> str:
        """`refused` (the vendor refused the credential), `paused`, `degraded` (some of its models
        are not well) or `ok`."""
        if self.row.refused_at is not None:
            return "refused"
        if self.row.is_paused:
            return "paused"
        return "ok" if all(model.status == "ok" for model in self.models) else "degraded"


@dataclass(frozen=True, slots=True)
class Processes:
    """Live processes of a role and lane, and how many tasks they run at a time."""

    role: str
    lane: str
    number: int
    slots: int


@dataclass(slots=True)
class Health:
    """`has`: which store answered. What a store that is away knows is empty, or None."""

    has: dict[str, bool] = field(default_factory=lambda: {"postgres": False, "redis": False})
    accounts: list[Account] = field(default_factory=list)
    processes: list[Processes] = field(default_factory=list)
    has_leader: bool | None = None
    backlog: Backlog | None = None
    uses: list[Use] = field(default_factory=list)
    errors: dict[tuple[str, str, str], int] = field(default_factory=dict)
    # Those of them that are tried again.
    retries: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def use_of(self, limit_id: int) -> Use | None:
        return next((use for use in self.uses if use.rule.id == limit_id), None)


Found = TypeVar("Found")

_last: tuple[float, Health] | None = None
_lock = threading.Lock()


def now() -> Health:
    """How everything does, as of a moment ago; of longer ago while somebody looks for long, since a
    store hangs."""
    global _last
    if not _lock.acquire(timeout=PATIENCE_S):
        return Health() if _last is None else _last[1]
    try:
        began = time.monotonic()
        if _last is None or began >= _last[0]:
            health = look()
            _last = (time.monotonic() + kept_s(health, time.monotonic() - began), health)
        return _last[1]
    finally:
        _lock.release()


def kept_s(health: Health, took_s: float) -> float:
    """For how long a look is good enough."""
    is_whole = all(health.has.values())
    return max(KEPT_S, KEPT_TIMES * took_s) if is_whole else KEPT_S


def look() -> Health:
    """How everything does now."""
    health = Health()
    rows = tried(accounts, POSTGRES_AWAY)
    if rows is not None:
        health.has["postgres"] = True
        health.processes, health.has_leader = tried(processes, POSTGRES_AWAY) or ([], None)
        health.backlog = tried(backlog.look, POSTGRES_AWAY)
    errors = tried(readings.errors, Away)
    if errors is not None:
        health.has["redis"] = True
        health.errors = errors
        health.retries = tried(lambda: readings.errors(readings.RETRIES), Away) or {}
        health.uses = tried(lambda: limits(rows is not None), (Away, *POSTGRES_AWAY)) or []
    health.accounts = with_readings(rows or [], health)
    stores.release()
    return health


def tried(ask: Callable[[], Found], away: Any) -> Found | None:
    try:
        return ask()
    except away as error:
        told = str(error) or type(error).__name__
        log.warning("a part of the health can't be told", extra={"error": told})
        return None


def accounts() -> list[Provider]:
    """Raises `Unavailable`, `django.db.Error`s."""
    pulse.require_postgres()
    return list(Provider.objects.prefetch_related("models"))


def processes() -> tuple[list[Processes], bool]:
    [(leaders,)] = fetch(LEADER)
    return [Processes(*row) for row in fetch(PROCESSES)], leaders > 0


def limits(has_postgres: bool) -> list[Use]:
    """Of the limits that each has for himself only Postgres knows whose to look at."""
    known = rules.rules()
    of_providers = [rule for some in known.of_provider.values() for rule in some]
    every = [*of_providers, *known.others]
    return readings.uses([rule for rule in every if has_postgres or not rule.each])


def with_readings(rows: list[Provider], health: Health) -> list[Account]:
    """The providers with what Redis knows of them."""
    models = {row.pk: list(row.models.all()) for row in rows}
    places = [(row.name, model.name) for row in rows for model in models[row.pk]]
    found = (tried(lambda: readings.readings(places), Away) if health.has["redis"] else None) or {}
    return [
        Account(
            row=row,
            models=tuple(Model(m, found.get((row.name, m.name))) for m in models[row.pk]),
            uses=tuple(use for use in health.uses if use.rule.provider == row.name),
        )
        for row in rows
    ]
