"""GET /v1/providers: how the vendors do, for a product's own operators.

Limits are told as shares, and only those that hold for everybody: a tenant learns nothing of the
others. Neither credentials nor what vendors said of them are told.
"""

from typing import Any

from django.http import HttpResponse
from rest_framework.request import Request

from llmtasks import backlog, health, pulse
from llmtasks.api import answers, schema
from llmtasks.api.doors import ApiView, principal_of
from llmtasks.backlog import Depth
from llmtasks.errors import Unavailable
from llmtasks.guards.readings import Use
from llmtasks.health import Account, Health, Model
from llmtasks.models import Lane, Scope


class Providers(ApiView):
    """GET /v1/providers"""

    @schema.list_providers
    def get(self, request: Request) -> HttpResponse:
        principal_of(request).require(Scope.READ)
        pulse.require_postgres()
        found = health.now()
        if not found.has["postgres"]:
            raise Unavailable("Postgres is away: try again shortly.", retry_after=2)
        lanes = None if found.backlog is None else backlog.by_lane(found.backlog)
        data = [provider(account, lanes) for account in found.accounts]
        return answers.json_response({"object": "list", "data": data, "sees": sees(found)})


def sees(found: Health) -> dict[str, bool]:
    """Whether breakers and limits, and the queue, could be looked at."""
    return {"limits": found.has["redis"], "queue": found.backlog is not None}


def provider(account: Account, lanes: dict[tuple[str, str], Depth] | None) -> dict[str, Any]:
    name = account.row.name
    return {
        "id": name,
        "object": "provider",
        "status": account.status,
        "refused_at": account.row.refused_at,
        "models": [model(each) for each in account.models],
        "limits": [limit(use) for use in account.uses if is_for_all(use)],
        "queue": None
        if lanes is None
        else {str(lane): depth(lanes.get((name, lane), Depth())) for lane in Lane.values},
    }


def model(found: Model) -> dict[str, Any]:
    reading = found.reading
    closed_s = 0.0 if reading is None else max(reading.open_s, reading.gate_s)
    return {
        "id": found.row.name,
        "status": found.status,
        "refused_at": found.row.refused_at,
        "breaker": reading and reading.breaker,
        "closed_for_s": round(closed_s, 3),
        "p95_ms": reading and reading.p95_ms,
    }


def is_for_all(use: Use) -> bool:
    """Whether a limit is the provider's own, and nobody's in particular."""
    rule = use.rule
    return not (rule.tenant_id or rule.key_id or rule.each)


def limit(use: Use) -> dict[str, Any]:
    rule = use.rule
    return {
        "model": rule.model or None,
        "unit": rule.unit,
        "window": rule.window or None,
        "used_share": round(use.share, 4),
    }


def depth(found: Depth) -> dict[str, Any]:
    return {
        "waiting": found.due,
        "scheduled": found.later,
        "queued": found.queued,
        "running": found.running,
        "oldest_waiting_s": round(found.oldest_s, 3),
        "is_at_least": found.is_capped,
    }
