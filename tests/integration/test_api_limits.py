"""The caller's own limits on the wire, through both doors: headers, and the 429."""

from typing import Any

import pytest

from llmtasks.models import Attempt, Limit, Provider, Task
from tests import factories
from tests.callers import Caller, body_of
from tests.meters import remember

OPENAI = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")


@pytest.fixture
def caller(account: Provider, redis: Any) -> Caller:
    remember(redis)
    factories.route("echo", (account, "echo"))
    factories.route("embed", (account, "embed"), kind="embedding")
    return Caller(factories.tenant())


def limit(unit: str, amount: int, window: str = "", **fields: Any) -> Limit:
    """A limit that is in force."""
    made = Limit.objects.create(unit=unit, amount=amount, window=window, **fields)
    factories.in_force()
    return made


def ask(caller: Caller, door: str) -> Any:
    if door == "embeddings":
        return caller.post("/v1/embeddings", {"model": "embed", "input": "a"})
    if door == "tasks":
        return caller.task(mode="inline")
    return caller.chat(stream=door == "stream")


DOORS = ("chat", "stream", "embeddings", "tasks")


@pytest.mark.parametrize("door", DOORS)
def test_an_answer_tells_what_is_left_of_the_callers_own_limits(caller: Caller, door: str):
    limit("requests", 30, "minute", burst=30, tenant=caller.tenant)
    for left in (29, 28):
        answer = ask(caller, door)
        body_of(answer)
        assert answer.status_code == 200
        assert [answer[name] for name in OPENAI] == ["30", str(left)]
        assert answer["RateLimit-Policy"] == (
            '"tenant-requests-per-minute";q=30;qu="requests";w=60'
        )
        assert answer["RateLimit"].startswith(f'"tenant-requests-per-minute";r={left};t=')
        assert answer["x-ratelimit-reset-requests"].endswith("s")


def test_a_callers_limits_of_all_kinds(caller: Caller):
    limit("tokens", 100_000, "minute", tenant=caller.tenant)
    limit("requests", 500, "day", each="key")
    limit("concurrency", 4, key=caller.key)
    answer = caller.chat(max_tokens=100)
    assert answer["x-ratelimit-limit-tokens"] == "100000"
    # Input and output are reserved.
    assert 99_000 < int(answer["x-ratelimit-remaining-tokens"]) <= 99_900
    assert answer["x-ratelimit-remaining-requests"] == "499"
    assert '"key-concurrency";r=3' in answer["RateLimit"]
    assert '"key-concurrency";q=4;qu="concurrent-requests"' in answer["RateLimit-Policy"]


def test_nothing_is_told_of_others(caller: Caller, account: Provider):
    limit("requests", 30, "minute", provider=account)
    limit("requests", 10, "minute", provider=account, tenant=caller.tenant)
    limit("requests", 1000, "minute")
    limit("requests", 40, "minute", tenant=factories.tenant())
    limit("requests", 40, "minute", key=Caller(caller.tenant).key)
    told = [name for name in caller.chat().headers if "ratelimit" in name.lower()]
    assert told == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_without_room_before_the_deadline_is_a_429(caller: Caller, stream: bool):
    limit("requests", 1, "minute", burst=1, key=caller.key)
    body_of(caller.chat())
    answer = caller.chat(stream=stream, deadline_s=5)
    assert answer.status_code == 429
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "1 requests per minute" in error["message"]
    assert 55 < int(answer["Retry-After"]) <= 62
    # We waited for as long as there was time.
    assert answer["x-should-retry"] == "false"
    assert answer["x-ratelimit-remaining-requests"] == "0"
    assert answer["RateLimit-Policy"] == '"key-requests-per-minute";q=1;qu="requests";w=60'
    assert answer["RateLimit"].startswith('"key-requests-per-minute";r=0;t=')
    task = Task.objects.get(id=answer["x-llmtasks-task-id"])
    assert (task.status, task.error_class, task.attempts) == ("failed", "LimitReached", 0)
    assert Attempt.objects.count() == 1


def test_the_native_door_tells_it_in_the_task(caller: Caller):
    limit("requests", 1, "minute", burst=1, tenant=caller.tenant)
    caller.task(mode="inline")
    answer = caller.task(mode="inline", deadline_s=5)
    assert (answer.status_code, answer["x-ratelimit-remaining-requests"]) == (200, "0")
    task = answer.json()
    assert (task["status"], task["error"]["class"]) == ("failed", "LimitReached")
    assert 55 < task["error"]["retry_after"] < 62


def test_a_providers_limit_is_told_by_retry_after_alone(caller: Caller, account: Provider):
    limit("requests", 1, "minute", burst=1, provider=account)
    caller.chat()
    answer = caller.chat(deadline_s=5)
    assert answer.status_code == 429
    assert "provider's rate limit" in answer.json()["error"]["message"]
    assert int(answer["Retry-After"]) > 50
    assert not answer.has_header("RateLimit")


# --- whose limit it is ----------------------------------------------------------------------------


def spend(caller: Caller, calls: int) -> list[int]:
    return [caller.chat(deadline_s=3).status_code for _ in range(calls)]


def test_one_tenants_limit_does_not_touch_another(caller: Caller):
    limit("requests", 1, "minute", burst=1, tenant=caller.tenant)
    other = Caller(factories.tenant())
    assert spend(caller, 2) == [200, 429]
    assert spend(other, 3) == [200, 200, 200]


def test_each_tenant_has_its_own(caller: Caller):
    limit("requests", 2, "minute", burst=2, each="tenant")
    other, same = Caller(factories.tenant()), Caller(caller.tenant)
    assert spend(caller, 1) + spend(same, 2) == [200, 200, 429]
    assert spend(other, 3) == [200, 200, 429]


def test_each_key_has_its_own(caller: Caller):
    limit("requests", 1, "minute", burst=1, each="key")
    other = Caller(caller.tenant)
    assert spend(caller, 2) == [200, 429]
    assert spend(other, 2) == [200, 429]


def test_one_key_has_a_limit_and_its_tenants_others_have_none(caller: Caller):
    limit("requests", 1, "minute", burst=1, key=caller.key)
    assert spend(caller, 2) == [200, 429]
    assert spend(Caller(caller.tenant), 2) == [200, 200]


def test_a_tenants_share_of_a_provider(caller: Caller, account: Provider):
    limit("requests", 1, "minute", burst=1, provider=account, each="tenant")
    assert spend(caller, 2) == [200, 429]
    assert spend(Caller(factories.tenant()), 1) == [200]
