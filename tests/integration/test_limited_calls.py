"""Calls through the whole corridor under limits: what they reserve, use, and tell the limiter."""

import time
from dataclasses import replace
from typing import Any

import pytest

from llmtasks import execute, ledger, submit
from llmtasks.guards import rate_limit, rules
from llmtasks.models import Limit, Provider, Tenant
from providers.sandbox_answers import tokens
from providers.types import Image, Message, Request
from tests import factories
from tests.corridor import until
from tests.meters import OUTPUT, learnt, remember, used

TEXT = "one two three four"


@pytest.fixture
def tenant(account: Provider, redis: Any) -> Tenant:
    remember(redis)
    return factories.tenant()


def limit(account: Provider, unit: str, amount: int, window: str = "", **fields: Any) -> str:
    """A new limit; the key of its meter."""
    row = Limit.objects.create(
        provider=account, unit=unit, amount=amount, window=window, burst=None, **fields
    )
    rules._rules = None
    return f"{{limits}}:meter:{row.pk}"


def call(tenant: Tenant, account: Provider, model: str, **fields: Any) -> Any:
    factories.route("limited", (account, model))
    work = factories.work(tenant, "limited", TEXT, **fields)
    return execute.run(submit.inline(work), work.request).task


def test_an_answer_is_settled_to_its_usage(tenant, account, redis):
    both = limit(account, "tokens", 100_000, "minute")
    made = limit(account, "output_tokens", 100_000, "minute")
    at_once = limit(account, "concurrency", 5)
    assert call(tenant, account, "echo").status == "succeeded"
    until(lambda: not redis.keys("{limits}:taken:*"))
    assert used(redis, both) == 2 * tokens(TEXT)
    assert used(redis, made) == tokens(TEXT)
    assert redis.zcard(at_once) == 0
    assert learnt(redis, "sandbox/echo")[OUTPUT] > 0


def test_what_came_in_of_a_refused_call_may_count(tenant, account, redis):
    given = limit(account, "input_tokens", 100_000, "minute")
    made = limit(account, "output_tokens", 100_000, "minute")
    call(tenant, account, "error-400")
    assert used(redis, given) > 0
    assert used(redis, made) == 0


def test_an_image_is_not_counted_by_its_bytes(tenant, account, redis):
    given = limit(account, "input_tokens", 100_000, "minute")
    image = Image(url="data:image/png;base64," + "A" * 400_000)
    request = Request(model="limited", messages=(Message(role="user", parts=(image,)),))
    factories.route("limited", (account, "error-500"))
    work = replace(factories.work(tenant, "limited"), request=request)
    execute.run(submit.inline(work), work.request)
    # Five tries at the most, of 100,000 tokens if the bytes counted.
    assert 1000 < used(redis, given) < 5 * 2500


def test_a_call_that_was_held_up_counts_from_when_it_went_out(tenant, account, redis, monkeypatch):
    key = limit(account, "requests", 100, "second")
    begin = ledger.begin

    def slowly(*args: Any, **given: Any) -> None:
        begin(*args, **given)
        time.sleep(0.3)

    monkeypatch.setattr(ledger, "begin", slowly)
    taken_at: list[int] = []
    grant_at = rate_limit.put_granted

    def noted(grant: Any, *args: Any) -> None:
        grant_at(grant, *args)
        taken_at.append(int(grant.at))

    monkeypatch.setattr(rate_limit, "put_granted", noted)
    freshen = rate_limit.freshen

    def kept(grant: Any) -> Any:
        refusal = freshen(grant)
        # The meter of a second lives hardly longer.
        redis.persist(key)
        return refusal

    monkeypatch.setattr(rate_limit, "freshen", kept)
    call(tenant, account, "echo")
    slots = [int(name) for name, n in redis.hgetall(key).items() if name.isdigit() and int(n)]
    assert len(slots) == 1
    width_us = -(-1_000_000 // 120)
    assert slots[0] * width_us >= taken_at[0] + 250_000


def test_a_refusal_is_a_request_and_closes_the_gate(tenant, account, redis):
    requests = limit(account, "requests", 100, "minute")
    began = time.monotonic()
    task = call(tenant, account, "rate-limit-30", deadline_s=5)
    assert (task.status, task.error_class) == ("failed", "RateLimited")
    assert used(redis, requests) == 1
    left_s = redis.pttl("{limits}:gate:sandbox/rate-limit-30") / 1000
    assert 30 - (time.monotonic() - began) < left_s <= 31
    assert redis.hget("{limits}:errors", "sandbox/rate-limit-30 RateLimited") == b"1"


def test_what_never_went_out_is_given_back(tenant, account, redis):
    Provider.objects.update(base_url="http://127.0.0.1:1/v1")
    requests = limit(account, "requests", 100, "minute")
    assert call(tenant, account, "echo").error_class == "ConnectionFailed"
    assert used(redis, requests) == 0
