"""The limiter on a real Valkey: what it lets through, as an observer with a log of its own sees."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from uuid_utils.compat import uuid7

from llmtasks import stores
from llmtasks.guards import meters, rate_limit, rules
from llmtasks.guards.rate_limit import Grant, Need, Refusal, Told, Used
from llmtasks.models import Limit, Provider, ProviderEvent
from tests import factories
from tests.corridor import until
from tests.meters import open_breaker, remember, settle_at_once, used

NEED = Need(input_tokens=10, output_tokens=20, expected_input=10, expected_output=20)


@pytest.fixture
def vendor(transactional_db: None, redis: Any) -> Provider:
    remember(redis)
    return factories.provider(name="vendor")


def limit(
    vendor: Provider | None, unit: str, amount: int, window: str = "", **fields: Any
) -> Limit:
    made = Limit(provider=vendor, unit=unit, amount=amount, window=window, **fields)
    made.save()
    rules._rules = None
    return made


def grant(
    need: Need = NEED, *, tenant: Any = None, key: Any = None, urgent: bool = True,
    again: bool = False, model: str = "m",
) -> Grant:  # fmt: skip
    return rate_limit.grant_for(
        uuid7(), "vendor", model, tenant or uuid7(), key, need,
        is_urgent=urgent, is_again=again, left_s=30.0,
    )  # fmt: skip


def take(**given: Any) -> Refusal | Grant:
    asked = grant(**given)
    return rate_limit.acquire(asked) or asked


def test_no_limit_lets_everything_through(vendor: Provider) -> None:
    assert all(isinstance(take(), Grant) for _ in range(100))


def test_never_above_the_limit_in_any_window(vendor: Provider) -> None:
    limit(vendor, "requests", 400, "second")
    seen: list[float] = []
    end = time.monotonic() + 4.0

    def run() -> None:
        while time.monotonic() < end:
            found = take(urgent=False)
            if isinstance(found, Grant):
                seen.append(time.monotonic())
            else:
                assert 0 < found.wait_s <= 1.2
                assert found.why in ("limit", "away")
                time.sleep(min(found.wait_s, max(0.0, end - time.monotonic())))
        stores.release()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.sort()
    peak = max(sum(at <= other < at + 1.0 for other in seen) for at in seen)
    assert peak <= 400
    assert seen


def test_a_burst_then_the_window(vendor: Provider) -> None:
    limit(vendor, "requests", 5, "hour", burst=5)
    found = [take() for _ in range(6)]
    assert [isinstance(one, Grant) for one in found] == [True] * 5 + [False]
    refused = found[-1]
    assert isinstance(refused, Refusal)
    assert 3550 < refused.wait_s < 3700
    assert refused.rule is not None
    assert refused.rule.unit == "requests"


def test_all_or_none(vendor: Provider, redis: Any) -> None:
    limit(vendor, "requests", 1000, "minute", burst=1000)
    limit(vendor, "tokens", 50, "minute", burst=50)
    assert isinstance(take(), Grant)
    assert isinstance(take(), Refusal)
    counted = [used(redis, key) for key in sorted(redis.keys("{limits}:meter:*"))]
    assert sorted(counted) == [1, 30]


def test_asked_twice_takes_once(vendor: Provider, redis: Any) -> None:
    limit(vendor, "requests", 100, "minute")
    asked = grant()
    assert rate_limit.acquire(asked) is None
    assert rate_limit.acquire(asked) is None
    [key] = redis.keys("{limits}:meter:*")
    assert used(redis, key) == 1


def test_settle_replaces_the_estimate_once(vendor: Provider, redis: Any) -> None:
    limit(vendor, "tokens", 1000, "minute", burst=1000)
    asked = grant()
    assert rate_limit.acquire(asked) is None
    for _ in range(2):
        rate_limit.settle(asked, Used(input_tokens=4, output_tokens=3), health="ok")
    [key] = redis.keys("{limits}:meter:*")
    until(lambda: not redis.exists(f"{{limits}}:taken:{asked.attempt_id}"))
    assert used(redis, key) == 7


@pytest.fixture
def flush(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What is to be sent later waits for whoever asks next, or for this."""
    flush = meters.flush
    monkeypatch.setattr(meters, "flush", lambda: None)
    monkeypatch.setattr(meters, "_later", meters.Later())
    return flush


def test_a_settlement_goes_with_what_is_asked_next(
    vendor: Provider, redis: Any, flush: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(vendor, "concurrency", 1)
    trips: list[int] = []
    exchange = meters.exchange
    monkeypatch.setattr(
        meters, "exchange", lambda commands: trips.append(len(commands)) or exchange(commands)
    )
    held = take()
    for _ in range(3):
        assert isinstance(held, Grant)
        rate_limit.settle(held, Used(), health="ok")
        held = take()
    assert isinstance(take(), Refusal)
    assert trips == [1, 2, 2, 2, 1]


def test_settlements_that_are_many_go_in_several_trips(
    vendor: Provider, redis: Any, flush: Callable[[], None]
) -> None:
    limit(vendor, "concurrency", 100)
    for held in [take() for _ in range(2 * meters.MOST_A_TRIP + 1)]:
        assert isinstance(held, Grant)
        rate_limit.settle(held, Used(), health="ok")
    [key] = redis.keys("{limits}:meter:*")
    assert redis.zcard(key) == 2 * meters.MOST_A_TRIP + 1
    assert isinstance(take(), Grant)
    assert redis.zcard(key) == meters.MOST_A_TRIP + 2
    flush()
    assert redis.zcard(key) == 1


def test_a_settlement_waits_for_redis_to_come_back(
    vendor: Provider, redis: Any, flush: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody asks by itself whether it is back.
    monkeypatch.setattr(meters, "AGAIN_S", 60.0)
    monkeypatch.setattr(meters, "AWAY_AFTER_S", 60.0)
    limit(vendor, "concurrency", 1)
    held = take()
    assert isinstance(held, Grant)
    meters.outage.found(OSError("gone"))
    rate_limit.settle(held, Used(), health="ok")
    flush()
    [key] = redis.keys("{limits}:meter:*")
    assert redis.zcard(key) == 1
    meters.outage.found(None)

    def lost(commands: Any) -> None:
        raise meters.redis.ConnectionError("away")

    with monkeypatch.context() as patched:
        patched.setattr(meters, "exchange", lost)
        assert isinstance(take(), Refusal)
    meters.outage.found(None)
    flush()
    assert redis.zcard(key) == 0


def test_one_that_the_script_refuses_takes_nobody_along(
    vendor: Provider, flush: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    meters.later("nonsense", (), {}, (), lambda _: None)
    assert isinstance(take(), Grant)
    assert "the limiter refused what it was told" in caplog.text


def test_a_child_sends_nothing_of_its_parent(vendor: Provider, flush: Callable[[], None]) -> None:
    held = take()
    assert isinstance(held, Grant)
    rate_limit.settle(held, Used(), health="ok")
    parents = meters._later
    assert len(parents.waiting) == 1
    meters.begin_anew()
    assert isinstance(take(), Grant)
    assert len(parents.waiting) == 1


def test_what_was_not_sent_is_given_back(
    vendor: Provider, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_at_once(monkeypatch)
    limit(vendor, "requests", 1, "minute", burst=1)
    limit(vendor, "concurrency", 1)
    first = take()
    assert isinstance(first, Grant)
    assert isinstance(take(), Refusal)
    rate_limit.settle(first, Used(is_sent=False))
    assert isinstance(take(), Grant)


def test_more_than_was_estimated_is_charged(
    vendor: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_at_once(monkeypatch)
    limit(vendor, "tokens", 100, "minute", burst=100)
    first = take()
    assert isinstance(first, Grant)
    rate_limit.settle(first, Used(input_tokens=50, output_tokens=50))
    assert isinstance(take(), Refusal)


def test_a_call_larger_than_the_limit_gets_all_of_it(vendor: Provider) -> None:
    limit(vendor, "tokens", 10, "minute", burst=10)
    assert isinstance(take(), Grant)
    assert isinstance(take(), Refusal)


def test_calls_at_once_are_leases(vendor: Provider, redis: Any, settings: Any) -> None:
    settings.LLMTASKS = settings.LLMTASKS | {"LEASE_S": 30, "RENEW_S": 0.05}
    limit(vendor, "concurrency", 2)
    held = [take(), take()]
    assert all(isinstance(one, Grant) for one in held)
    assert isinstance(take(), Refusal)
    [key] = redis.keys("{limits}:meter:*")

    def ends() -> dict[bytes, float]:
        return dict(redis.zrange(key, 0, -1, withscores=True))

    # Kept up while its process lives.
    first = ends()
    until(lambda: all(end > first[attempt] for attempt, end in ends().items()))
    in_s = [end / 1e6 - time.time() for end in ends().values()]
    assert len(in_s) == 2
    assert all(25 < left <= 30 for left in in_s)
    assert isinstance(take(), Refusal)
    # As if it had died, and its leases were over; a renewal may be on its way.
    rate_limit.leases.held.clear()

    def is_free() -> bool:
        redis.zadd(key, dict.fromkeys(first, 1.0), xx=True)
        return isinstance(take(), Grant)

    until(is_free)


def test_background_work_leaves_a_reserve(vendor: Provider) -> None:
    limit(vendor, "requests", 60, "hour", burst=20)
    background = [take(urgent=False) for _ in range(20)]
    assert sum(isinstance(one, Grant) for one in background) == 10
    urgent = [take() for _ in range(20)]
    assert sum(isinstance(one, Grant) for one in urgent) == 10


def test_each_tenant_by_itself(vendor: Provider) -> None:
    limit(None, "requests", 1, "minute", burst=1, each="tenant")
    one, other = uuid7(), uuid7()
    assert isinstance(take(tenant=one), Grant)
    assert isinstance(take(tenant=one), Refusal)
    assert isinstance(take(tenant=other), Grant)


def test_the_gate_closes_until_retry_after(vendor: Provider) -> None:
    first = take()
    assert isinstance(first, Grant)
    began = time.monotonic()
    rate_limit.settle(first, Used(), error="RateLimited", gate_s=2.0)
    refused = take()
    assert isinstance(refused, Refusal)
    assert refused.why == "gate"
    assert max(0.0, 2.0 - (time.monotonic() - began)) < refused.wait_s <= 2.0
    assert isinstance(take(model="other"), Grant)
    time.sleep(refused.wait_s)
    assert isinstance(take(), Grant)


def test_the_vendor_counts_more_than_we_do(
    vendor: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_at_once(monkeypatch)
    limit(vendor, "requests", 100, "minute", burst=100)
    first = take()
    assert isinstance(first, Grant)
    rate_limit.settle(first, Used(), told=[Told("requests", limit=50, left=1)])
    assert isinstance(take(), Grant)
    assert isinstance(take(), Refusal)


def test_a_vendor_that_allows_more_changes_nothing(vendor: Provider) -> None:
    limit(vendor, "requests", 10, "minute", burst=10)
    first = take()
    assert isinstance(first, Grant)
    rate_limit.settle(first, Used(), told=[Told("requests", limit=10_000, left=0)])
    assert isinstance(take(), Grant)


def fail(times: int, **given: Any) -> None:
    for _ in range(times):
        found = take(**given)
        assert isinstance(found, Grant), found
        rate_limit.settle(found, Used(), health="fault", error="ServerError")


def test_the_breaker_opens_probes_and_closes(vendor: Provider, redis: Any) -> None:
    fail(19)
    assert isinstance(take(), Grant)
    began = time.monotonic()
    fail(1)
    refused = take()
    assert isinstance(refused, Refusal)
    assert refused.why == "breaker"
    assert 10 - (time.monotonic() - began) < refused.wait_s <= 10
    # Another model of the account goes on.
    assert isinstance(take(model="other"), Grant)

    open_breaker(redis, "vendor/m", until_us=1)
    probes = [take() for _ in range(4)]
    assert [isinstance(one, Grant) for one in probes] == [True, True, True, False]
    assert all(one.is_probe for one in probes[:3] if isinstance(one, Grant))
    for probe in probes[:2]:
        assert isinstance(probe, Grant)
        rate_limit.settle(probe, Used(), health="ok")
    assert all(isinstance(take(), Grant) for _ in range(10))
    events = list(ProviderEvent.objects.order_by("id").values_list("event", flat=True))
    assert events == ["opened", "half_open", "closed"]


def test_a_probe_that_fails_opens_it_for_twice_as_long(vendor: Provider, redis: Any) -> None:
    fail(20)
    open_breaker(redis, "vendor/m", until_us=1)
    began = time.monotonic()
    fail(1)
    refused = take()
    assert isinstance(refused, Refusal)
    assert 20 - (time.monotonic() - began) < refused.wait_s <= 20


def test_a_few_faults_among_many_open_nothing(vendor: Provider) -> None:
    for _ in range(15):
        for _ in range(2):
            found = take()
            assert isinstance(found, Grant)
            rate_limit.settle(found, Used(), health="ok")
        fail(1)
    for _ in range(50):
        found = take()
        assert isinstance(found, Grant)
        rate_limit.settle(found, Used(), error="InvalidRequest")


def test_calls_again_have_a_budget(vendor: Provider) -> None:
    for _ in range(100):
        assert isinstance(take(), Grant)
    again = [take(again=True) for _ in range(25)]
    assert sum(isinstance(one, Grant) for one in again) == 20
    refused = again[-1]
    assert isinstance(refused, Refusal)
    assert refused.why == "retries"


def test_after_a_loss_buckets_start_empty(vendor: Provider, redis: Any) -> None:
    limit(vendor, "requests", 30, "minute", burst=2)
    redis.flushdb()
    refused = take()
    assert isinstance(refused, Refusal)
    # Until the first of thirty a minute.
    assert 0 < refused.wait_s <= 2.1
    time.sleep(refused.wait_s)
    assert isinstance(take(), Grant)


def test_after_a_loss_a_day_is_counted_from_postgres(vendor: Provider, redis: Any) -> None:
    limit(vendor, "requests", 3, "day")
    tenant = factories.tenant()
    for _ in range(2):
        factories.attempt(tenant=tenant, provider="vendor", model="m")
    redis.flushdb()
    found = [take() for _ in range(2)]
    assert [isinstance(one, Grant) for one in found] == [True, False]
    refused = found[-1]
    assert isinstance(refused, Refusal)
    assert refused.wait_s > 80_000


def test_without_redis_each_process_keeps_to_its_share(
    vendor: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(vendor, "requests", 30, "minute")
    monkeypatch.setattr(meters, "send", unreachable)
    monkeypatch.setattr(meters, "AWAY_AFTER_S", 3.0)
    background, urgent = take(urgent=False), take()
    assert isinstance(background, Refusal)
    assert isinstance(urgent, Refusal)
    assert {background.why, urgent.why} == {"away"}
    assert not rate_limit.is_degraded()
    time.sleep(meters.AWAY_AFTER_S)
    first = take()
    assert isinstance(first, Refusal)
    time.sleep(first.wait_s)
    local = take()
    assert isinstance(local, Grant)
    assert local.is_local
    assert isinstance(take(), Refusal)
    assert isinstance(take(urgent=False), Refusal)
    assert rate_limit.is_degraded()


def unreachable(*_: Any) -> None:
    raise meters.redis.ConnectionError("away")


def test_rooms(vendor: Provider) -> None:
    limit(vendor, "requests", 6000, "minute", burst=120)
    tenant = uuid7()
    limit(None, "requests", 60, "minute", burst=10, each="tenant")
    models, tenants = rate_limit.rooms([("vendor", "m"), ("free", "x")], [tenant], 2.0)
    # Half of the burst, and two seconds' worth.
    assert 250 < models["vendor", "m"] <= 261
    assert ("free", "x") not in models
    assert 6 < tenants[tenant] <= 7.1
    for _ in range(20):
        fail(1, tenant=uuid7())
    models, _ = rate_limit.rooms([("vendor", "m")], [], 2.0)
    assert models["vendor", "m"] == 0
