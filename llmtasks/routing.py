"""From a model name to the calls that may answer it.

The configuration is read once per `config_version` into an immutable snapshot; no call asks the
database. While Postgres is away the last snapshot holds for as long as the pulse says.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from django.db import OperationalError

from llmtasks import pulse, stores
from llmtasks.errors import InvalidInput, UnknownModel
from llmtasks.models import Kind, RouteCandidate
from llmtasks.models import Provider as ProviderRow
from llmtasks.models import Route as RouteRow
from providers import registry
from providers.base import Account, Provider
from providers.errors import AuthenticationFailed
from providers.types import EmbeddingRequest, Request

log = logging.getLogger(__name__)

# Stand for a provider in the names of queues of tasks that call none themselves; no provider is
# called so. Apart, since a tool may take long, and a workflow's steps are short.
TOOLS = "tools"
WORKFLOWS = "workflows"
# A key in a file: longer ones are no key.
MAX_CREDENTIAL_BYTES = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One provider and one model of its, for a route."""

    provider: str
    model: str
    adapter: Provider
    credential: str
    price_family: str
    is_paused: bool
    # The vendor refused the account's credential, or this model to it.
    is_refused: bool
    context_window: int | None
    max_output_tokens: int | None
    # Unit → amount a minute, as the vendor's answers told last.
    vendor_limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        return not (self.is_paused or self.is_refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    name: str
    kind: str
    candidates: tuple[Candidate, ...]
    hedges: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    version: int
    routes: dict[str, Route]
    # Every provider's name → whether it is paused.
    providers: dict[str, bool]


_snapshot: Snapshot | None = None
_lock = threading.Lock()


def snapshot() -> Snapshot:
    """The configuration in force. Raises `OperationalError` when Postgres is away for longer than
    the last one may be used."""
    global _snapshot
    known, version = _snapshot, pulse.config_version()
    if known is not None and known.version == version:
        if pulse.config_is_fresh():
            return known
        raise OperationalError("the configuration is too old: Postgres is away")
    with stores.reading(_lock):
        if _snapshot is None or _snapshot.version != version:
            _snapshot = read(version)
        return _snapshot


def read(version: int) -> Snapshot:
    """The snapshot of what the tables say now."""
    candidates: dict[int, list[Candidate]] = {}
    rows = RouteCandidate.objects.select_related("model__provider").order_by("position", "id")
    for row in rows:
        try:
            candidates.setdefault(row.route_id, []).append(candidate(row))
        except ValueError as error:
            # One account that is set up wrongly must not take the others down.
            log.error(
                "a candidate can't be used", extra={"candidate": str(row), "error": str(error)}
            )
    rows_of = {row.pk: row for row in RouteRow.objects.filter(is_active=True)}
    routes = {
        row.name: Route(
            name=row.name,
            kind=row.kind,
            candidates=tuple(with_fallbacks(row, rows_of, candidates)),
            hedges=row.hedges,
        )
        for row in rows_of.values()
    }
    for route in routes.values():
        if not route.candidates:
            log.error(
                "a route has no candidates: its calls are refused", extra={"route": route.name}
            )
    paused = {TOOLS: False, WORKFLOWS: False} | dict(
        ProviderRow.objects.values_list("name", "is_paused")
    )
    return Snapshot(version=version, routes=routes, providers=paused)


def with_fallbacks(
    row: RouteRow, rows_of: Mapping[int, RouteRow], candidates: Mapping[int, list[Candidate]]
) -> Iterator[Candidate]:
    """The route's own candidates, then those of the routes that it falls back to, each once."""
    seen, given = set(), set()
    next_: RouteRow | None = row
    while next_ is not None and next_.pk not in seen:
        seen.add(next_.pk)
        for known in candidates.get(next_.pk, ()):
            if (known.provider, known.model) not in given:
                given.add((known.provider, known.model))
                yield known
        next_ = rows_of.get(next_.fallback_id or 0)
        if next_ is not None and next_.pk in seen:
            log.error("a fallback leads back to its route", extra={"route": row.name})
        if next_ is not None and next_.kind != row.kind:
            log.error("a fallback is of another kind", extra={"route": row.name})
            return


def candidate(chosen: RouteCandidate) -> Candidate:
    """Raises ValueError where the provider's adapter or options are wrong."""
    row = chosen.model.provider
    return Candidate(
        provider=row.name,
        model=chosen.model.name,
        adapter=registry.build(row.adapter, account(row)),
        credential=row.credential,
        price_family=row.price_family or row.name,
        is_paused=row.is_paused,
        is_refused=bool(row.refused_at or chosen.model.refused_at),
        vendor_limits=chosen.model.vendor_limits,
        context_window=chosen.model.context_window,
        max_output_tokens=chosen.model.max_output_tokens,
    )


def account(row: ProviderRow) -> Account:
    """The account as its adapter wants it; an unresolved credential is left empty (a call says
    so: `check_credential`)."""
    return Account(
        name=row.name,
        base_url=row.base_url,
        api_key=resolve(row.credential) or "",
        options=row.options,
        connect_timeout=row.connect_timeout_s,
        read_timeout=row.read_timeout_s,
        total_timeout=row.total_timeout_s,
    )


def resolve(reference: str) -> str | None:
    """The secret that `env:NAME` or `file:/path` refers to; None where there is none."""
    kind, _, place = reference.partition(":")
    if kind == "env":
        return os.environ.get(place, "").strip() or None
    if kind == "file":
        try:
            with Path(place).open(encoding="utf-8") as file:
                return file.read(MAX_CREDENTIAL_BYTES).strip() or None
        except (OSError, UnicodeDecodeError):
            return None
    return None


def check_credential(chosen: Candidate) -> None:
    """Raises `AuthenticationFailed` where the candidate's reference leads to no secret."""
    if chosen.credential and not chosen.adapter.account.api_key:
        raise AuthenticationFailed(
            f"provider {chosen.provider}: its credential {chosen.credential} leads to no key"
        )


def find(name: str, kind: str) -> Route:
    """The route of a model name. Raises `InvalidInput` where there is none of that kind,
    `OperationalError` where Postgres is away and none is known."""
    route = snapshot().routes.get(name) or made_since(name)
    if route is None:
        raise UnknownModel(
            f"there is no model {name!r}: GET /v1/models lists those that you may use",
            param="model",
        )
    if route.kind != (Kind.CHAT if kind == Kind.AGENT else kind):
        wanted = "/v1/embeddings" if route.kind == Kind.EMBEDDING else "/v1/chat/completions"
        raise InvalidInput(f"{name!r} is a model for {route.kind}: use {wanted}", param="model")
    if not route.candidates:
        raise InvalidInput(f"{name!r} has no candidates: add one in the admin", param="model")
    return route


def made_since(name: str) -> Route | None:
    """A route that was made after our pulse looked last: another process may have accepted work for
    it already. Raises `OperationalError`."""
    if not RouteRow.objects.filter(name=name, is_active=True).exists():
        return None
    pulse.look()
    return snapshot().routes.get(name)


def supporting(route: Route, request: Request | EmbeddingRequest) -> tuple[Candidate, ...]:
    """The candidates that can do what the request asks. Raises `InvalidInput` naming the field
    where none can."""
    missing = [(c, unsupported(c.adapter, request)) for c in route.candidates]
    able = tuple(c for c, field in missing if field is None)
    if not able:
        field = missing[0][1]
        raise InvalidInput(
            f"no provider of {route.name!r} supports {field}: leave it out or use another model",
            param=field,
        )
    return able


def unsupported(adapter: Provider, request: Request | EmbeddingRequest) -> str | None:
    """The field of the request that the adapter can't honour, or None."""
    if isinstance(request, Request):
        return adapter.unsupported(request)
    return None if adapter.supports_embeddings else "input"
