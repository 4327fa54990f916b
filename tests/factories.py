"""Rows and work for tests: plain functions, each with defaults for all that a test does not say."""

from datetime import timedelta
from decimal import Decimal
from itertools import count
from typing import Any
from uuid import UUID

from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import bodies, pulse
from llmtasks.models import (
    Attempt,
    CostState,
    Kind,
    Lane,
    Mode,
    Price,
    Provider,
    ProviderModel,
    Route,
    RouteCandidate,
    Status,
    Task,
    TaskPayload,
    Tenant,
    Worker,
)
from llmtasks.submit import Work
from providers.types import EmbeddingRequest, Message, Request, Text

numbers = count(1)

# Dollars per million tokens: a token in costs 1e-6, a token out 4e-6.
PRICES = {
    "input": Decimal(1),
    "cached_input": Decimal("0.1"),
    "cache_write_5m": Decimal("1.25"),
    "cache_write_1h": Decimal(2),
    "output": Decimal(4),
    "reasoning": Decimal(4),
}


# --- who asks, what is configured -----------------------------------------------------------------


def tenant(name: str = "", **fields: Any) -> Tenant:
    return Tenant.objects.create(name=name or f"tenant-{next(numbers)}", **fields)


def provider(url: str = "http://127.0.0.1:9", name: str = "sandbox", **fields: Any) -> Provider:
    """An account at the sandbox of `url`; `adapter` says in which wire format."""
    given = {"adapter": "compatible", "credential": "env:SANDBOX_KEY", **fields}
    base_url = f"{url}/v1" if given["adapter"] == "compatible" else url
    return Provider.objects.create(name=name, base_url=base_url, **given)


def route(
    name: str, *candidates: tuple[Provider, str], kind: str = Kind.CHAT, priced: bool = True
) -> Route:
    """The route `name` to each (provider, vendor's model), in that order."""
    row = Route.objects.create(name=name, kind=kind)
    for position, (account, model) in enumerate(candidates):
        known, _ = ProviderModel.objects.get_or_create(provider=account, name=model)
        RouteCandidate.objects.create(route=row, model=known, position=position)
        if priced:
            price(account.name, model)
    return row


def price(family: str, model: str, **fields: Any) -> Price:
    since = timezone.now() - timedelta(days=1)
    row, _ = Price.objects.get_or_create(
        family=family, model=model, defaults={"effective_from": since, **PRICES, **fields}
    )
    return row


def in_force() -> None:
    """Have this process see a change of configuration now, not within half a second."""
    pulse.start().tick()


# --- work -----------------------------------------------------------------------------------------


def request(model: str = "echo", text: str = "hello", **fields: Any) -> Request:
    message = Message(role="user", parts=(Text(text=text),))
    return Request(model=model, messages=(message,), **fields)


def work(of: Tenant | UUID, model: str = "echo", text: str = "hello", **fields: Any) -> Work:
    """A chat with the route `model`; `request=` for another body."""
    given = {"kind": Kind.CHAT, "request": request(model, text), **fields}
    return Work(tenant_id=of.id if isinstance(of, Tenant) else of, key_id=None, **given)


def embedding(of: Tenant, model: str = "embed", *inputs: str, **fields: Any) -> Work:
    body = EmbeddingRequest(model=model, inputs=inputs or ("hello",))
    return work(of, kind=Kind.EMBEDDING, request=body, **fields)


def task(of: Tenant | UUID | None = None, **fields: Any) -> Task:
    """A stored task in any state, with its body."""
    body = fields.pop("body", None) or bodies.dump_request(Kind.CHAT, request())
    now = timezone.now()
    row = Task.objects.create(
        **{
            "tenant_id": of.id if isinstance(of, Tenant) else of or uuid7(),
            "kind": Kind.CHAT,
            "mode": Mode.QUEUED,
            "lane": Lane.DEFAULT,
            "status": Status.WAITING,
            "route": "echo",
            "provider": "sandbox",
            "not_before": now - timedelta(seconds=1),
            "deadline": now + timedelta(hours=1),
            **fields,
        }
    )
    TaskPayload.objects.create(task=row, request=bodies.orjson.loads(body))
    return row


def attempt(tenant: Tenant, provider: str = "sandbox", model: str = "echo", **fields: Any) -> Any:
    """A settled attempt of a task that nobody looks at."""
    given: dict[str, Any] = {
        "task_id": uuid7(), "number": 1, "state": Attempt.State.SETTLED,
        "cost": Decimal(0), "cost_state": CostState.FINAL, **fields,
    }  # fmt: skip
    return Attempt.objects.create(tenant=tenant, provider=provider, model=model, **given)


def worker(
    *queues: str, lane: str = Lane.DEFAULT, slots: int = 8, alive: bool = True, **fields: Any
) -> Worker:
    """A process that lists `queues`, alive or past its lease."""
    lease = timedelta(minutes=5) if alive else timedelta(seconds=-1)
    return Worker.objects.create(
        **{
            "role": Worker.Role.WORKER,
            "lane": lane,
            "host": "test",
            "pid": 1,
            "slots": slots,
            "queues": list(queues),
            "lease_until": timezone.now() + lease,
            **fields,
        }
    )
