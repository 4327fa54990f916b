"""What the limiter costs a call: asking for it and settling it, by the caller's clock.

One thread; without limits, with an account's three (requests, tokens, calls at once), and with
those of a tenant and a key as well, all with room. Calls take no time, so that each one's
settlement goes with what the next one asks, or PAUSE_S, in which it is sent meanwhile. *in Redis*
is the server's own time for both.

*Cores* is where caller and server may run: on another core each trip waits for that one to wake.

*Idle script* is the same with one that lets everything through and keeps nothing: the trip, and
Python's part. *PING* is the least that any trip takes, over the limiter's own connection and by
redis-py's client. Both follow right after, with the same pauses.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from uuid import UUID

import psutil
import redis
from uuid_utils.compat import uuid7

from tests.benchmarks.tables import percentile

PROVIDER, MODEL = "limited", "bench"
# A very fast vendor.
PAUSE_S = 0.005
# It gives each meter of a call one unit.
IDLE_SCRIPT = b"""
redis.register_function(NAME, function(_, given)
  if given[1] ~= 'take' then return { '{}', '' } end
  return { '{}', struct.pack('<dd', 1, 0) ..
    string.rep(struct.pack('<dddd', 1, 1, 1, 1), #given[3] / 96) }
end)
"""
# (whose, unit, window, amount): far from being reached.
LIMITS = (
    ("provider", "requests", "minute", 1_000_000_000),
    ("provider", "tokens", "minute", 1_000_000_000_000),
    ("provider", "concurrency", "", 1_000_000),
    ("tenant", "requests", "second", 10_000_000),
    ("tenant", "tokens", "day", 1_000_000_000_000),
    ("key", "requests", "minute", 1_000_000_000),
)

COLUMNS = {
    "cores": "cores",
    "limits": "limits",
    "call_ms": "call ms",
    "acquire_p50_ms": "acquire p50 ms",
    "acquire_p99_ms": "p99",
    "settle_p50_ms": "settle p50 ms",
    "settle_p99_ms": "p99",
    "whole_p50_ms": "both p50 ms",
    "whole_p99_ms": "p99",
    "redis_us": "in Redis us",
    "idle_p50_ms": "idle script p50 ms",
    "ping_p50_ms": "PING p50 ms",
    "client_ping_p50_ms": "by redis-py",
}


def configure() -> None:
    """The limits, and whom they hold for."""
    import django

    django.setup()
    from django.core.management import call_command

    from llmtasks.guards import meters
    from llmtasks.models import ApiKey, Limit, Provider, ProviderModel, Tenant

    call_command("migrate", verbosity=0, interactive=False)
    # A late answer is measured, not refused.
    meters.TIMEOUT_S = 5.0
    provider, _ = Provider.objects.get_or_create(
        name=PROVIDER, defaults={"adapter": "compatible", "base_url": "http://127.0.0.1:9/v1"}
    )
    ProviderModel.objects.get_or_create(provider=provider, name=MODEL)
    tenant, _ = Tenant.objects.get_or_create(name="limited")
    if not (key := ApiKey.objects.filter(tenant=tenant).first()):
        key, _ = ApiKey.issue(tenant, "limited")
        key.save()
    whose: dict[str, dict[str, Any]] = {
        "provider": {"provider": provider, "model": MODEL},
        "tenant": {"tenant": tenant},
        "key": {"tenant": tenant, "key": key},
    }
    for who, unit, window, amount in LIMITS:
        Limit.objects.get_or_create(
            **whose[who], unit=unit, window=window, defaults={"amount": amount}
        )


def measure(redis_url: str, calls: int) -> list[dict[str, Any]]:
    """One round: calls without limits, with the account's three, with all six; on all cores, and
    where Linux can hold it there with the server on one. The server is this machine's."""
    from llmtasks.models import ApiKey
    from tests.meters import remember

    key = ApiKey.objects.get(tenant__name="limited")
    with redis.Redis.from_url(redis_url) as server:
        # It knows the script, and nothing waits for what was lost.
        timed("unlimited", uuid7(), None)
        remember(server)
        callers = (
            ("unlimited", uuid7(), None),
            (PROVIDER, uuid7(), None),
            (PROVIDER, key.tenant_id, key.pk),
        )
        found = []
        for cores, place in places(server).items():
            with place:
                found += [
                    {"cores": cores, **one(server, *caller, number, pause_s)}
                    for number, pause_s in ((calls, 0.0), (calls // 4, PAUSE_S))
                    for caller in callers
                ]
        return found


def places(server: "redis.Redis") -> dict[int, AbstractContextManager[None]]:
    """On how many cores it is measured."""
    found: dict[int, AbstractContextManager[None]] = {os.cpu_count() or 0: nullcontext()}
    if hasattr(os, "sched_setaffinity"):
        found[1] = on_one_core(server)
    return found


@contextmanager
def on_one_core(server: "redis.Redis") -> Iterator[None]:
    """This process and the server, with all their threads."""
    told: Any = server.info("server")
    threads = [
        thread.id
        for pid in (os.getpid(), told["process_id"])
        for thread in psutil.Process(pid).threads()
    ]
    before = os.sched_getaffinity(0)
    try:
        for thread in threads:
            os.sched_setaffinity(thread, {max(before)})
        yield
    finally:
        for thread in threads:
            os.sched_setaffinity(thread, before)


def one(
    server: "redis.Redis",
    provider: str,
    tenant: UUID,
    key: UUID | None,
    calls: int,
    pause_s: float,
) -> dict[str, Any]:
    from llmtasks.guards import meters

    acquired, settled = [], []
    for _ in range(calls // 10):
        timed(provider, tenant, key, pause_s)
    before = script_us(server)
    for _ in range(calls):
        limits, acquire_s, settle_s = timed(provider, tenant, key, pause_s)
        acquired.append(acquire_s * 1000)
        settled.append(settle_s * 1000)
    redis_us = (script_us(server) - before) / calls
    whole = [a + s for a, s in zip(acquired, settled, strict=True)]
    return {
        "limits": limits,
        "call_ms": pause_s * 1000,
        **percentiles("acquire", acquired),
        **percentiles("settle", settled),
        **percentiles("whole", whole),
        "redis_us": round(redis_us, 1),
        "idle_p50_ms": idle_ms(provider, tenant, key, calls // 4, pause_s),
        "ping_p50_ms": ping_ms(lambda: meters.exchange([("PING",)]), calls // 4, pause_s),
        "client_ping_p50_ms": ping_ms(server.ping, calls // 4, pause_s),
    }


def idle_ms(provider: str, tenant: UUID, key: UUID | None, calls: int, pause_s: float) -> float:
    """The median of so many calls, both halves, with the script that does nothing."""
    from llmtasks.guards import meters

    known = meters.NAME, meters.LIBRARY
    meters.flush()
    meters.NAME, meters.LIBRARY = meters.library(IDLE_SCRIPT)
    try:
        timed(provider, tenant, key)
        took = [sum(timed(provider, tenant, key, pause_s)[1:]) * 1000 for _ in range(calls)]
        meters.flush()
    finally:
        meters.NAME, meters.LIBRARY = known
    return round(percentile(took, 50), 4)


def ping_ms(ping: Callable[[], Any], count: int, pause_s: float) -> float:
    """The median of so many trips."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        ping()
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(pause_s)
    return round(percentile(took, 50), 4)


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_p{percent}_ms": round(percentile(values, percent), 4) for percent in (50, 99)}


def timed(
    provider: str, tenant: UUID, key: UUID | None, pause_s: float = 0.0
) -> tuple[int, float, float]:
    """How many limits held, and the seconds of asking and of settling."""
    from llmtasks.guards import rate_limit
    from llmtasks.guards.rate_limit import Used

    began = time.perf_counter()
    need = rate_limit.need_of(provider, MODEL, 400, 100)
    grant = rate_limit.grant_for(
        uuid7(), provider, MODEL, tenant, key, need, is_urgent=True, is_again=False, left_s=60.0
    )
    if (refusal := rate_limit.acquire(grant)) is not None:
        raise SystemExit(f"the limiter refused: {refusal}")
    granted = time.perf_counter()
    if pause_s:
        time.sleep(pause_s)
    used = Used(input_tokens=57, output_tokens=31)
    answered = time.perf_counter()
    rate_limit.settle(grant, used, health="ok", ms=120, input_bytes=400)
    settled_s = time.perf_counter() - answered
    if pause_s:
        time.sleep(pause_s)
    return len(grant.meters), granted - began, settled_s


def script_us(server: "redis.Redis") -> float:
    """Microseconds that the server spent on scripts so far."""
    stats: Any = server.info("commandstats")
    return sum(
        stats.get(f"cmdstat_{name}", {}).get("usec", 0) for name in ("evalsha", "eval", "fcall")
    )
