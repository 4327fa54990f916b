"""Calls through the whole corridor under limits: what they reserve, use, and tell the limiter."""

from typing import Any

import pytest

from llmtasks import execute, submit
from llmtasks.guards import rules
from llmtasks.models import Limit, Provider, Tenant
from providers.sandbox_answers import tokens
from tests import factories

TEXT = "one two three four"


@pytest.fixture
def tenant(account: Provider, redis: Any) -> Tenant:
    redis.set("{limits}:epoch", 1)  # it remembers since long ago
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


def used(redis: Any, key: str) -> int:
    return int(redis.hget(key, "sum") or 0)


def test_an_answer_is_settled_to_its_usage(tenant, account, redis):
    both = limit(account, "tokens", 100_000, "minute")
    made = limit(account, "output_tokens", 100_000, "minute")
    at_once = limit(account, "concurrency", 5)
    assert call(tenant, account, "echo").status == "succeeded"
    assert used(redis, both) == 2 * tokens(TEXT)
    assert used(redis, made) == tokens(TEXT)
    assert redis.zcard(at_once) == 0
    assert not redis.keys("{limits}:taken:*")
    assert redis.hget("{limits}:stats:sandbox/echo", "output") is not None


def test_a_refusal_is_a_request_and_closes_the_gate(tenant, account, redis):
    requests = limit(account, "requests", 100, "minute")
    task = call(tenant, account, "rate-limit-30", deadline_s=5)
    assert (task.status, task.error_class) == ("failed", "RateLimited")
    assert used(redis, requests) == 1
    assert 28 < redis.pttl("{limits}:gate:sandbox/rate-limit-30") / 1000 <= 31
    assert redis.hget("{limits}:errors", "sandbox/rate-limit-30 RateLimited") == b"1"


def test_what_never_went_out_is_given_back(tenant, account, redis):
    Provider.objects.update(base_url="http://127.0.0.1:1/v1")
    requests = limit(account, "requests", 100, "minute")
    assert call(tenant, account, "echo").error_class == "ConnectionFailed"
    assert used(redis, requests) == 0
