"""Configuration as the commands write it: validated, idempotent, only where something differs.

A row that is as it should be is not written: an UPDATE would raise the configuration's version
and make every process read it anew.
"""

from typing import Any, TypeVar

from django.core.exceptions import ValidationError
from django.core.management.base import CommandError
from django.db.models import Max, Model

from llmtasks.guards import accounts
from llmtasks.models import Provider, ProviderModel, Route, RouteCandidate
from providers import registry

Row = TypeVar("Row", bound=Model)

MADE, CHANGED, KEPT = "made", "changed", "as it was"


def put(kind: type[Row], values: dict[str, Any], **key: Any) -> tuple[Row, str]:
    """The row of that key with those values, and what was done for it. Raises
    `ValidationError`."""
    known = kind._default_manager.filter(**key).first()
    row = known or kind(**key, **values)
    done = MADE if known is None else KEPT
    for name, value in values.items():
        if getattr(row, name) != value:
            setattr(row, name, value)
            done = CHANGED
    if done != KEPT:
        row.full_clean()
        row.save()
    return row, done


def put_provider(name: str, values: dict[str, Any]) -> tuple[Provider, str]:
    """The provider; its base URL, where none is given, is that of its adapter. Another credential
    is used, where the one before was refused. Raises `ValidationError`."""
    known = Provider.objects.filter(name=name).first() or Provider(name=name)
    adapter = values.get("adapter", known.adapter)
    base_url = values.get("base_url") or known.base_url or registry.BASE_URLS.get(adapter, "")
    if base_url:
        try:
            registry.check_base_url(adapter, base_url)
        except ValueError as error:
            raise ValidationError({"base_url": str(error)}) from None
    before = known.credential
    row, done = put(Provider, {**values, "base_url": base_url}, name=name)
    if row.credential != before:
        # One that was refused says nothing of another.
        accounts.recover(row.name, "add_provider")
    return row, done


def put_candidate(
    provider: Provider, route_name: str, model_name: str, kind: str, position: int | None = None
) -> tuple[RouteCandidate, str]:
    """The route with that model among its candidates, the last where no position is given.
    Raises `ValidationError`; `CommandError` where the route is of another kind."""
    model, _ = put(ProviderModel, {}, provider=provider, name=model_name)
    route = Route.objects.filter(name=route_name).first()
    if route is not None and route.kind != kind:
        raise CommandError(f"the route {route_name!r} is one for {route.kind}, not for {kind}")
    if route is None:
        route, _ = put(Route, {"kind": kind}, name=route_name)
    return put(RouteCandidate, wanted_position(route, model, position), route=route, model=model)


def wanted_position(route: Route, model: ProviderModel, position: int | None) -> dict[str, int]:
    if position is not None:
        return {"position": position}
    candidates = RouteCandidate.objects.filter(route=route)
    if candidates.filter(model=model).exists():
        return {}
    last = candidates.aggregate(last=Max("position"))["last"]
    return {"position": 0 if last is None else last + 1}
