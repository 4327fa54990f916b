"""`manage.py seed_demo`: what a first look needs, again and again the same.

A tenant with a key, an administrator, the sandbox's accounts (one for each wire format, and one
more of each whose credential gets refused), a route for each thing that the sandbox can do, its
prices and those of genai-prices. What is there already stays; so do later prices that somebody
added.

One route, `unpriced`, has no price, so that the state can be seen.
"""

import json
import os
import secrets
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from llmtasks.management.commands import import_prices
from llmtasks.management.configure import Row, put, put_provider
from llmtasks.models import (
    ApiKey,
    Price,
    Provider,
    ProviderModel,
    Route,
    RouteCandidate,
    Tenant,
)
from llmtasks.models.tenancy import split

TENANT = "demo"
KEY_NAME = "demo"
FAMILY = "sandbox"
CREDENTIAL = "env:SANDBOX_KEY"
SINCE = datetime(2024, 1, 1, tzinfo=UTC)

STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 529)
CHAT = (
    "echo",
    *(f"slow-{ms}" for ms in (50, 100, 200, 300, 500, 1000, 1500, 2000, 3000, 5000, 10000, 30000)),
    *(f"flaky-{times}" for times in (1, 2, 3, 4, 5, 9)),
    *(f"error-{status}" for status in STATUSES),
    *(f"rate-limit-{seconds}" for seconds in (1, 2, 3, 5, 10, 30)),
    *("cut", "garbage", "tool", "no-usage"),
    *(f"long-{tokens}" for tokens in (5, 10, 20, 50, 100, 200, 500, 1000, 2000)),
)
EMBEDDING = ("embed",)
# Answers by which a vendor refuses the credential. They have accounts of their own: an account
# whose credential was refused is used no more.
REFUSING = frozenset({"error-401", "error-402"})
# A name that the sandbox obeys and that nothing else uses: the one model without a price.
UNPRICED = "slow-1"

# Dollars per million tokens.
CHAT_PRICE = {
    "input": Decimal("1"),
    "cached_input": Decimal("0.1"),
    "cache_write_5m": Decimal("1.25"),
    "cache_write_1h": Decimal("2"),
    "output": Decimal("4"),
    "reasoning": Decimal("4"),
}
EMBEDDING_PRICE = dict.fromkeys(CHAT_PRICE, Decimal("0.1")) | {
    "output": Decimal(0),
    "reasoning": Decimal(0),
}


class Command(BaseCommand):
    help = (
        "Seed the demo: tenant, key, administrator, sandbox providers, routes, prices. Reads "
        "SANDBOX_URL, DEMO_API_KEY, ADMIN_USER and ADMIN_PASSWORD; prints JSON; idempotent."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--route",
            metavar="NAME",
            action="append",
            default=[],
            help="another steered name of the sandbox (slow-1234), in both formats; repeatable",
        )

    @transaction.atomic
    def handle(self, *args: Any, route: list[str], **options: Any) -> None:
        try:
            summary = {
                **seed_key(),
                **seed_administrator(),
                **seed_sandbox(sandbox_url(), [name.removeprefix("claude-") for name in route]),
                **seed_prices(),
            }
        except ValidationError as error:
            raise CommandError("; ".join(error.messages)) from None
        self.stdout.write(json.dumps(summary, indent=2))


def sandbox_url() -> str:
    url = os.environ.get("SANDBOX_URL", "").strip().rstrip("/")
    if not url:
        raise CommandError("SANDBOX_URL is not set: give the address of `manage.py sandbox`")
    return url


# --- who asks -----------------------------------------------------------------------------------


def seed_key() -> dict[str, Any]:
    """DEMO_API_KEY's key; without one, a new key unless the tenant has a usable one. `api_key`
    is None where its secret is not to be had any more."""
    tenant, _ = put(Tenant, {}, name=TENANT)
    given = os.environ.get("DEMO_API_KEY", "").strip()
    if given:
        return {"tenant": TENANT, "api_key": keep_key(tenant, given)}
    if ApiKey.objects.filter(tenant=tenant, name=KEY_NAME, revoked_at=None).exists():
        return {"tenant": TENANT, "api_key": None}
    key, secret = ApiKey.issue(tenant, KEY_NAME)
    key.save()
    return {"tenant": TENANT, "api_key": secret}


def keep_key(tenant: Tenant, text: str) -> str:
    try:
        prefix, hashed = split(text)
    except ValueError:
        raise CommandError(
            "DEMO_API_KEY is no key: it must be lt_<12 characters>_<20 or more characters>"
        ) from None
    wanted = {"tenant": tenant, "name": KEY_NAME, "secret_hash": hashed, "revoked_at": None}
    put(ApiKey, wanted, prefix=prefix)
    return text


def seed_administrator() -> dict[str, Any]:
    """ADMIN_USER with ADMIN_PASSWORD; a password is made up for a new one that has none."""
    name = os.environ.get("ADMIN_USER", "").strip() or "admin"
    given = os.environ.get("ADMIN_PASSWORD", "")
    users = get_user_model()._default_manager
    user = users.filter(username=name).first()
    made_up = secrets.token_urlsafe(12) if user is None and not given else None
    if user is None:
        users.create_superuser(name, password=given or made_up)
    elif given and not user.check_password(given):
        user.set_password(given)
        user.save()
    return {"admin_user": name, "admin_password": made_up or given or None}


# --- what is called -----------------------------------------------------------------------------


def seed_sandbox(url: str, more: list[str]) -> dict[str, Any]:
    """The two accounts and their routes, and two more accounts that get refused."""
    compatible, anthropic = (seed_account(name, url) for name in ("compatible", "anthropic"))
    refused = [seed_account(name, url, "-refused") for name in ("compatible", "anthropic")]
    embedding = [*EMBEDDING, *(name for name in more if name.startswith("embed"))]
    chat = [*CHAT, *(name for name in more if not name.startswith("embed"))]
    pairs = []
    for name in chat:
        first, second = refused if name in REFUSING else (compatible, anthropic)
        pairs += [(first, name, name), (second, f"claude-{name}", f"claude-{name}")]
    pairs += [
        (compatible, "unpriced", UNPRICED),
        (anthropic, "claude-unpriced", f"claude-{UNPRICED}"),
        (compatible, "smart", "echo"),
        (anthropic, "smart", "claude-echo"),
        (compatible, "fallback", "error-503"),
        (anthropic, "fallback", "claude-echo"),
    ]
    made = add_routes(pairs, Route.Kind.CHAT)
    made += add_routes([(compatible, name, name) for name in embedding], Route.Kind.EMBEDDING)
    price([*chat, *(f"claude-{name}" for name in chat)], CHAT_PRICE)
    price(embedding, EMBEDDING_PRICE)
    return {
        "providers": [account.name for account in (compatible, anthropic, *refused)],
        "routes": {"made": made, "all": Route.objects.count()},
    }


def seed_account(adapter: str, url: str, ending: str = "") -> Provider:
    is_compatible = adapter == "compatible"
    fields = {
        "adapter": adapter,
        "base_url": f"{url}/v1" if is_compatible else url,
        "credential": CREDENTIAL,
        "price_family": FAMILY,
    }
    name = "sandbox" if is_compatible else "sandbox-anthropic"
    return put_provider(f"{name}{ending}", fields)[0]


def add_routes(pairs: list[tuple[Provider, str, str]], kind: str) -> int:
    """Like `put_candidate` for each of them, in a few statements: there are hundreds. How many
    candidates had to be made."""
    models = {
        (model.provider_id, model.name): model
        for model in ProviderModel.objects.filter(provider__price_family=FAMILY)
    }
    add(models, {(p.pk, name): ProviderModel(provider=p, name=name) for p, _, name in pairs})
    names = [name for _, name, _ in pairs]
    routes = {route.name: route for route in Route.objects.filter(name__in=names)}
    if other := next((route for route in routes.values() if route.kind != kind), None):
        raise CommandError(f"the route {other.name!r} is one for {other.kind}, not for {kind}")
    add(routes, {name: Route(name=name, kind=kind) for name in names})
    stored = RouteCandidate.objects.filter(route__name__in=names)
    candidates = {(row.route_id, row.model_id): row for row in stored}
    after = {row.route_id: row.position + 1 for row in stored.order_by("position")}
    made = {}
    for provider, name, model_name in pairs:
        route, model = routes[name], models[provider.pk, model_name]
        if (route.pk, model.pk) not in candidates and (route.pk, model.pk) not in made:
            position = after.get(route.pk, 0)
            made[route.pk, model.pk] = RouteCandidate(route=route, model=model, position=position)
            after[route.pk] = position + 1
    return add(candidates, made)


def add(known: dict[Any, Row], wanted: dict[Any, Row]) -> int:
    """Make the rows that are not known, and add them there. Raises `ValidationError`."""
    missing = {key: row for key, row in wanted.items() if key not in known}
    for row in missing.values():
        row.clean_fields()
    if missing:
        type(next(iter(missing.values())))._default_manager.bulk_create(missing.values())
    known.update(missing)
    return len(missing)


def price(models: list[str], amounts: dict[str, Decimal]) -> None:
    """The sandbox's prices of those models that have none yet."""
    rows = Price.objects.filter(family=FAMILY, source=Price.Source.MANUAL, effective_from=SINCE)
    known = set(rows.values_list("model", flat=True))
    missing = [name for name in dict.fromkeys(models) if name not in known]
    if missing:
        Price.objects.bulk_create(
            Price(family=FAMILY, model=name, effective_from=SINCE, **amounts) for name in missing
        )


def seed_prices() -> dict[str, Any]:
    rows = import_prices.bundled().rows
    changes = import_prices.store(rows)
    counts = {"new": len(changes.added), "changed": len(changes.changed)}
    return {"prices": {"imported": len(rows), **counts}}
