"""Is it alive, is it ready: for load balancers and people."""

import time
from collections.abc import Callable
from typing import Any

import orjson
import redis
from django.http import HttpRequest, HttpResponse

from llmtasks import stores
from llmtasks.api.answers import json_response
from llmtasks.api.errors import POSTGRES_AWAY
from llmtasks.guards import rate_limit
from llmtasks.models import Lane

# Who leads, and how many workers each lane has, by leases that are not over.
PROCESSES = """
SELECT coalesce((SELECT leader_until > clock_timestamp() FROM llmtasks_config WHERE id = 1), false),
       (SELECT coalesce(jsonb_object_agg(lane, workers), '{}')::text FROM (
            SELECT lane, count(*) AS workers FROM llmtasks_worker
            WHERE role = 'worker' AND lease_until > clock_timestamp() GROUP BY lane
       ) alive)
"""


def healthz(request: HttpRequest) -> HttpResponse:
    """GET /healthz: the process answers. Asks no store, so that an outage kills no process."""
    return json_response({"status": "ok"})


def readyz(request: HttpRequest) -> HttpResponse:
    """GET /readyz: 503 while Postgres is away; else 200, and what is degraded."""
    parts = {"postgres": timed(ask_postgres), "redis": timed(ask_redis)}
    processes = parts["postgres"].pop("found", None)
    parts["dispatcher"] = {"ok": bool(processes and processes["dispatcher"])}
    workers = processes["workers"] if processes else {}
    parts["workers"] = {
        "ok": all(workers.get(lane) for lane in Lane.values),
        "lanes": {lane: workers.get(lane, 0) for lane in Lane.values},
    }
    # Not ok: this process keeps to a share of the limits of its own, since Redis is away.
    parts["limits"] = {"ok": not rate_limit.is_degraded()}
    is_ready = parts["postgres"]["ok"]
    all_well = all(part["ok"] for part in parts.values())
    status = "ready" if all_well else "degraded" if is_ready else "unavailable"
    response = json_response({"status": status, **parts}, status=200 if is_ready else 503)
    if not is_ready:
        response["Retry-After"] = "2"
    return response


def timed(ask: Callable[[], Any]) -> dict[str, Any]:
    """Whether a part answers, how fast, and what it said or why not."""
    began = time.monotonic()
    try:
        found = ask()
    except (*POSTGRES_AWAY, redis.RedisError) as error:
        # The class alone: a message may hold addresses and names.
        return {"ok": False, "error": type(error).__name__}
    milliseconds = round((time.monotonic() - began) * 1000, 1)
    return {"ok": True, "ms": milliseconds} | ({"found": found} if found else {})


def ask_postgres() -> dict[str, Any]:
    try:
        [(dispatcher, workers)] = stores.fetch(PROCESSES)
    finally:
        stores.release()
    return {"dispatcher": dispatcher, "workers": orjson.loads(workers)}


def ask_redis() -> None:
    stores.redis_client().ping()
