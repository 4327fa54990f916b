"""How everything does: one look at both stores, and with one of them away."""

import time
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.db import OperationalError
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import backlog, health, pulse
from llmtasks.guards import meters, rate_limit, readings, rules
from llmtasks.guards.rate_limit import Need, Used
from llmtasks.models import ApiKey, Config, Limit, Provider, ProviderModel
from tests import factories
from tests.meters import remember


@pytest.fixture
def vendor(transactional_db: None, redis: Any) -> Provider:
    remember(redis)
    account = factories.provider(name="vendor")
    ProviderModel.objects.create(provider=account, name="m")
    ProviderModel.objects.create(provider=account, name="other")
    return account


def call(
    number: int = 1, *, model: str = "m", tenant: Any = None, key: Any = None, **ends: Any
) -> None:
    """Calls that the limiter let through, and how they ended."""
    rules._rules = None
    for _ in range(number):
        grant = rate_limit.grant_for(
            uuid7(), "vendor", model, tenant or uuid7(), key, Need(10, 20, 10, 20),
            is_urgent=True, is_again=False, left_s=30.0,
        )  # fmt: skip
        assert rate_limit.acquire(grant) is None
        if ends:
            rate_limit.settle(grant, Used(True, 10, 20), **ends)


def fail(number: int = 20, **given: Any) -> None:
    call(number, health="fault", error="ServerError", **given)


@pytest.fixture
def no_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: Any, **kwargs: Any) -> Any:
        raise meters.Away

    monkeypatch.setattr(meters, "run", away)
    monkeypatch.setattr(readings, "errors", away)


# --- what is seen ---------------------------------------------------------------------------------


def test_how_close_each_limit_is(vendor: Provider) -> None:
    whole = Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=10)
    tokens = Limit.objects.create(
        provider=vendor, model="m", unit="tokens", window="minute", amount=1000, burst=1000
    )
    at_once = Limit.objects.create(provider=vendor, unit="concurrency", amount=8)
    call(2, ms=500.0, input_bytes=40)
    call(2)
    found = health.look()
    used = {use.rule.id: (use.used, use.amount) for use in found.uses}
    assert used[whole.pk] == (4, 10)
    assert used[at_once.pk] == (2, 8)
    # Two settled to 30, two that hold 30 still.
    assert used[tokens.pk] == (120, 1000)
    use = found.use_of(whole.pk)
    assert use is not None and use.share == pytest.approx(0.4)
    assert found.use_of(0) is None
    [account] = found.accounts
    assert {use.rule.id for use in account.uses} == {whole.pk, tokens.pk, at_once.pk}


def test_looking_takes_nothing(vendor: Provider) -> None:
    limit = Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=100)
    call(3)
    for _ in range(5):
        use = health.look().use_of(limit.pk)
        assert use is not None and use.used == 3


def test_a_limit_for_each_shows_who_is_closest(vendor: Provider) -> None:
    each = Limit.objects.create(unit="requests", window="minute", amount=10, each="tenant")
    by_key = Limit.objects.create(unit="requests", window="minute", amount=10, each="key")
    keys = []
    for number in (1, 5, 2):
        tenant = factories.tenant()
        key, _ = ApiKey.issue(tenant, "k", last_used_at=timezone.now())
        key.save()
        keys.append(key)
        call(number, tenant=tenant.pk, key=key.pk)
    found = health.look()
    for limit, who in ((each, keys[1].tenant_id), (by_key, keys[1].pk)):
        use = found.use_of(limit.pk)
        assert use is not None and (use.used, use.who) == (5, who)


def test_a_limit_for_each_that_nobody_used_is_not_shown(vendor: Provider) -> None:
    Limit.objects.create(unit="requests", window="minute", amount=10, each="tenant")
    assert health.look().uses == []


def test_more_limits_and_models_than_are_asked_for_at_once(
    vendor: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "MOST_AT_ONCE", 2)
    for amount in range(1, 6):
        model = ProviderModel.objects.create(provider=vendor, name=f"m{amount}")
        Limit.objects.create(
            provider=vendor, model=model.name, unit="requests", window="day", amount=amount
        )
    found = health.look()
    assert [use.amount for use in found.uses] == [1, 2, 3, 4, 5]
    assert all(model.reading is not None for model in found.accounts[0].models)


def test_an_account_whose_model_fails_is_degraded(vendor: Provider) -> None:
    call(1, ms=200.0, health="ok", input_bytes=40)
    [account] = health.look().accounts
    assert account.status == "ok"
    began = time.monotonic()
    fail(19)
    [account] = health.look().accounts
    m, other = account.models
    assert (account.status, m.status, other.status) == ("degraded", "degraded", "ok")
    assert m.reading is not None and m.reading.breaker == "open"
    assert 10 - (time.monotonic() - began) < m.reading.open_s <= 10
    assert m.reading.p95_ms == pytest.approx(200)
    assert m.reading.output_tokens == pytest.approx(20)
    assert m.reading.tokens_per_byte == pytest.approx(0.25)


def test_a_closed_gate_is_seen(vendor: Provider) -> None:
    began = time.monotonic()
    call(1, error="RateLimited", gate_s=30.0)
    [account] = health.look().accounts
    reading = account.models[0].reading
    assert account.status == "degraded"
    assert reading is not None and reading.breaker == "closed"
    assert 30 - (time.monotonic() - began) < reading.gate_s <= 30


def test_errors_by_class(vendor: Provider) -> None:
    call(2, error="RateLimited")
    call(1, error="Timeout", health="fault", model="a model/with spaces")
    assert health.look().errors == {
        ("vendor", "m", "RateLimited"): 2,
        ("vendor", "a model/with spaces", "Timeout"): 1,
    }


@pytest.mark.parametrize(
    "fields, status",
    [
        ({}, "ok"),
        ({"is_paused": True}, "paused"),
        ({"refused_at": timezone.now()}, "refused"),
        ({"is_paused": True, "refused_at": timezone.now()}, "refused"),
    ],
)
def test_the_status_of_an_account(vendor: Provider, fields: dict[str, Any], status: str) -> None:
    Provider.objects.update(**fields)
    assert health.look().accounts[0].status == status


def test_a_model_that_was_refused(vendor: Provider) -> None:
    ProviderModel.objects.filter(name="m").update(refused_at=timezone.now())
    [account] = health.look().accounts
    assert [model.status for model in account.models] == ["refused", "ok"]
    assert account.status == "degraded"


def test_processes_and_who_leads(vendor: Provider) -> None:
    factories.worker(lane="bulk", slots=3)
    factories.worker(lane="bulk", slots=4)
    factories.worker(lane="bulk", slots=50, alive=False)
    found = health.look()
    assert found.has_leader is False
    [bulk] = [some for some in found.processes if some.lane == "bulk"]
    assert (bulk.role, bulk.number, bulk.slots) == ("worker", 2, 7)
    Config.objects.update(leader=uuid7(), leader_until=timezone.now() + timedelta(hours=1))
    assert health.look().has_leader is True


# --- a store is away ------------------------------------------------------------------------------


def test_without_redis_the_rest_is_there(vendor: Provider, no_redis: None) -> None:
    Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=10)
    factories.task(provider="vendor")
    found = health.look()
    assert found.has == {"postgres": True, "redis": False}
    assert found.uses == [] and found.errors == {}
    [account] = found.accounts
    assert account.status == "ok" and account.models[0].reading is None
    assert found.backlog and found.has_leader is not None


def test_without_postgres_the_rest_is_there(
    vendor: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(1, error="Timeout")
    with pulse.start().lock:
        monkeypatch.setattr(pulse.start(), "is_away", True)
        found = health.look()
    assert found.has == {"postgres": False, "redis": True}
    assert found.errors and found.accounts == [] and found.backlog is None


def test_without_postgres_nobody_waits_for_it(
    vendor: Provider, monkeypatch: pytest.MonkeyPatch, django_assert_num_queries: Any
) -> None:
    whole = Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=10)
    Limit.objects.create(unit="requests", window="minute", amount=10, each="key")
    call(1)
    with pulse.start().lock, django_assert_num_queries(0):
        monkeypatch.setattr(pulse.start(), "is_away", True)
        found = health.look()
    assert [use.rule.id for use in found.uses] == [whole.pk]


@pytest.mark.parametrize("error", [OperationalError("cut"), psycopg.OperationalError("cut")])
def test_a_backlog_that_takes_too_long_is_missing_alone(
    vendor: Provider, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def slow() -> Any:
        raise error

    monkeypatch.setattr(backlog, "look", slow)
    found = health.look()
    assert found.has["postgres"] and found.accounts and found.backlog is None


def test_errors_that_redis_does_not_tell(vendor: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("gone")

    monkeypatch.setattr(meters, "client", broken)
    with pytest.raises(meters.Away):
        readings.errors()
    meters.outage.found(OSError("gone"))
    with pytest.raises(meters.Away):
        readings.errors()


# --- a look is kept -------------------------------------------------------------------------------


def test_a_look_is_kept_for_a_moment(vendor: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "KEPT_S", 60.0)
    first = health.now()
    assert health.now() is first
    monkeypatch.setattr(health, "_last", (time.monotonic() - 0.001, first))
    assert health.now() is not first


def test_a_dear_look_is_kept_longer_but_not_where_a_store_was_away() -> None:
    whole = health.Health(has={"postgres": True, "redis": True})
    assert health.kept_s(whole, 0.001) == health.KEPT_S
    assert health.kept_s(whole, 0.5) == 5.0
    assert health.kept_s(health.Health(), 3.0) == health.KEPT_S


def test_while_a_store_hangs_others_get_what_was_seen_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PATIENCE_S", 0.01)
    monkeypatch.setattr(health, "look", lambda: pytest.fail("one look at a time"))
    seen = health.Health()
    with health._lock:
        assert health.now().has == {"postgres": False, "redis": False}
        monkeypatch.setattr(health, "_last", (0.0, seen))
        assert health.now() is seen
