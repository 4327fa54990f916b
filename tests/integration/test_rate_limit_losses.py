"""What becomes of the limits when Redis loses what it knew, wholly or in part, or is another."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import stores
from llmtasks.guards import meters, rate_limit, rules, seeds
from llmtasks.guards.rate_limit import Grant, Need, Refusal, Used
from llmtasks.models import Attempt, Limit, Provider
from tests import factories
from tests.meters import LONG_AGO, remember, remembers_since, settle_at_once, used

NEED = Need(input_tokens=10, output_tokens=20, expected_input=10, expected_output=20)


@pytest.fixture
def vendor(transactional_db: None, redis: Any) -> Provider:
    return factories.provider(name="vendor")


def limit(vendor: Provider, unit: str, amount: int, window: str = "", **fields: Any) -> str:
    """A new limit; the key of its meter."""
    row = Limit.objects.create(provider=vendor, unit=unit, amount=amount, window=window, **fields)
    rules._rules = None
    return f"{{limits}}:meter:{row.pk}"


def take(tenant: Any = None) -> Refusal | Grant:
    grant = rate_limit.grant_for(
        uuid7(), "vendor", "m", tenant or uuid7(), None, NEED,
        is_urgent=True, is_again=False, left_s=30.0,
    )  # fmt: skip
    return rate_limit.acquire(grant) or grant


def attempt(tokens: int = 0, **fields: Any) -> None:
    factories.attempt(
        factories.tenant(), "vendor", "m", input_tokens=tokens, output_tokens=0, **fields
    )


def test_a_minute_is_counted_from_postgres(vendor: Provider, redis: Any) -> None:
    limit(vendor, "requests", 10, "minute", burst=10)
    for seconds in (5, 30, 59, 70, 300):
        attempt(started_at=timezone.now() - timedelta(seconds=seconds))
    found = [take() for _ in range(8)]
    # Seven are left of ten, since three were within the minute.
    assert [isinstance(one, Grant) for one in found] == [True] * 7 + [False]


def test_what_is_under_way_counts_as_much_as_others(vendor: Provider, redis: Any) -> None:
    key = limit(vendor, "tokens", 1000, "minute", burst=1000)
    attempt(tokens=100, state=Attempt.State.SETTLED)
    attempt(tokens=200, state=Attempt.State.SETTLED)
    attempt(state=Attempt.State.SENT)
    assert isinstance(take(), Grant)
    assert used(redis, key) == 100 + 200 + 150 + 30


def test_a_clock_of_postgres_that_is_ahead_loses_nothing(
    vendor: Provider, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(vendor, "requests", 3, "minute", burst=3)
    ahead = timedelta(minutes=50)
    monkeypatch.setattr(seeds.pulse, "now", lambda: timezone.now() + ahead)
    for seconds in (1, 30):
        attempt(started_at=timezone.now() + ahead - timedelta(seconds=seconds))
    assert isinstance(take(), Grant)
    assert isinstance(take(), Refusal)


def test_one_asks_postgres_and_the_others_wait(
    vendor: Provider, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(vendor, "requests", 100, "day")
    asked, go_on = threading.Event(), threading.Event()
    times = []
    count = seeds.used

    def slowly(*args: Any) -> Any:
        times.append(args)
        asked.set()
        go_on.wait(10)
        return count(*args)

    monkeypatch.setattr(seeds, "used", slowly)
    found: list[Any] = []
    first = threading.Thread(target=lambda: (found.append(take()), stores.release()))
    first.start()
    assert asked.wait(10)
    refused = take()
    assert isinstance(refused, Refusal)
    assert refused.wait_s < 0.1
    go_on.set()
    first.join()
    assert isinstance(found[0], Grant)
    assert isinstance(take(), Grant)
    assert len(times) == 1


def test_a_count_that_takes_too_long_is_a_full_window(
    vendor: Provider, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(vendor, "requests", 240, "day")

    def cancelled(*_: Any) -> Any:
        raise OperationalError from seeds.psycopg.errors.QueryCanceled()

    monkeypatch.setattr(seeds, "fetch", cancelled)
    refused = take()
    assert isinstance(refused, Refusal)
    # The first of a hundred and twenty slots falls out, rather late.
    assert 0 < refused.wait_s <= 86_400 / 120 * 3


def test_what_another_run_of_the_server_knew_may_be_old(vendor: Provider, redis: Any) -> None:
    """It read it from its disk, or from the server that it replaces."""
    remember(redis)
    key = limit(vendor, "requests", 10, "minute", burst=10)
    assert isinstance(take(), Grant)
    for _ in range(8):
        attempt()
    redis.set(meters.PLACE, "f" * 40 + f" {LONG_AGO}")
    assert isinstance(take(), Grant)
    assert remembers_since(redis) > LONG_AGO
    assert used(redis, key) == 9
    assert isinstance(take(), Grant)
    assert isinstance(take(), Refusal)


def test_another_release_goes_on_with_what_the_server_knows(
    vendor: Provider, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(redis)
    key = limit(vendor, "requests", 10, "minute", burst=10)
    assert [type(take()) for _ in range(9)] == [Grant] * 9
    # Its script is one that this server never ran, since others use the server as well.
    name, library = meters.library(meters.SCRIPT + b"\n-- " + uuid7().hex.encode())
    monkeypatch.setattr(meters, "NAME", name)
    monkeypatch.setattr(meters, "LIBRARY", library)
    assert [type(take()) for _ in range(2)] == [Grant, Refusal]
    assert remembers_since(redis) == LONG_AGO
    assert used(redis, key) == 10


def test_a_second_passes_before_a_second_is_used_again(vendor: Provider, redis: Any) -> None:
    limit(vendor, "requests", 10, "second")
    redis.delete("{limits}:since")
    refused = take()
    assert isinstance(refused, Refusal)
    assert 0.9 < refused.wait_s < 1.2


def test_leases_come_back_before_others_are_given(
    vendor: Provider, redis: Any, settings: Any
) -> None:
    settings.LLMTASKS = settings.LLMTASKS | {"LEASE_S": 30, "RENEW_S": 10.0}
    key = limit(vendor, "concurrency", 1)
    remember(redis)
    held = take()
    assert isinstance(held, Grant)
    redis.delete("{limits}:since", key)
    refused = take()
    assert isinstance(refused, Refusal)
    assert 10.0 < refused.wait_s <= 15.0
    rate_limit.leases.renew()
    assert redis.zcard(key) == 1


def test_a_renewal_does_not_bring_back_what_has_ended(
    vendor: Provider, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_at_once(monkeypatch)
    remember(redis)
    key = limit(vendor, "concurrency", 1)
    held = take()
    assert isinstance(held, Grant)
    late = rate_limit.Leases(held={held.attempt_id: [key]})
    rate_limit.settle(held, Used())
    late.renew()
    assert redis.zcard(key) == 0


def test_a_connection_that_the_server_closed_is_no_outage(vendor: Provider, redis: Any) -> None:
    assert isinstance(take(), Grant)
    for connection in list(meters._idle):
        connection._sock.shutdown(2)
    assert isinstance(take(), Grant)
    assert meters.outage.since is None


def test_a_limit_whose_window_was_changed_counts_all_as_used_now(
    vendor: Provider, redis: Any
) -> None:
    remember(redis)
    limit(vendor, "requests", 2, "minute", burst=2)
    assert isinstance(take(), Grant)
    Limit.objects.update(window="hour")
    rules._rules = None
    assert isinstance(take(), Grant)
    refused = take()
    assert isinstance(refused, Refusal)
    assert 3600 <= refused.wait_s < 3700
    Limit.objects.update(window="second")
    rules._rules = None
    assert isinstance(take(), Grant)


def test_a_limit_that_was_raised_has_room_at_once(vendor: Provider, redis: Any) -> None:
    remember(redis)
    limit(vendor, "requests", 12, "hour", burst=10)
    assert [type(take()) for _ in range(11)] == [Grant] * 10 + [Refusal]
    Limit.objects.update(amount=120, burst=24)
    rules._rules = None
    # Ten are still in the bucket, of twenty-four.
    assert [type(take()) for _ in range(15)] == [Grant] * 14 + [Refusal]


def test_a_limit_that_was_lowered_is_a_full_bucket_at_most(vendor: Provider, redis: Any) -> None:
    remember(redis)
    limit(vendor, "requests", 1_200, "minute", burst=1000)
    assert [type(take()) for _ in range(300)] == [Grant] * 300
    Limit.objects.update(amount=600, burst=2)
    rules._rules = None
    refused = take()
    assert isinstance(refused, Refusal)
    # One of ten a second, and not three hundred of them.
    assert 0 < refused.wait_s < 0.2


def test_no_key_stays_for_ever(
    vendor: Provider, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that outlasts its window leaves nothing behind."""
    settle_at_once(monkeypatch)
    remember(redis)
    key = limit(vendor, "tokens", 1000, "second")
    held = take()
    assert isinstance(held, Grant)
    redis.delete(key)  # as if its time were over
    rate_limit.settle(held, Used(input_tokens=1, output_tokens=2), ms=100, health="ok")
    assert not redis.exists(key)
    for name in redis.keys("{limits}:*"):
        if name not in (b"{limits}:since", b"{limits}:errors"):
            # -1: for ever. -2: its time was over since it was listed.
            assert redis.pttl(name) != -1, name
