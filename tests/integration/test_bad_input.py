"""What is wrong is named with what to do, at the request, in the admin's forms and at the start;
what stands in the tables all the same takes nothing else down."""

import io
import itertools
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import ProgrammingError

from llmtasks import checks, routing
from llmtasks.models import (
    ApiKey,
    Attempt,
    Limit,
    Provider,
    ProviderModel,
    Route,
    Status,
    Task,
    Tenant,
)
from providers.sandbox import Sandbox
from tests import factories
from tests.callers import Caller
from tests.corridor import errors_of, inline


def found() -> list[str]:
    """What the checks of `migrate` say: id, message and hint of each."""
    return [
        f"{one.id} {one.msg} {one.hint}"
        for one in checks.configuration(app_configs=None, databases=["default"])
    ]


def logged(caplog: Any, message: str) -> list[dict[str, Any]]:
    return [record.__dict__ for record in caplog.records if record.msg == message]


# --- limits ---------------------------------------------------------------------------------------


def wrong(**fields: Any) -> dict[str, list[str]]:
    """What is wrong with a limit, by field."""
    given = {"unit": "requests", "window": "minute", "amount": 60, **fields}
    with pytest.raises(ValidationError) as raised:
        Limit(**given).full_clean()
    return raised.value.message_dict


@pytest.fixture
def vendor(account: Provider) -> Provider:
    ProviderModel.objects.create(
        provider=account, name="m", vendor_limits={"requests": 500, "tokens": 30_000}
    )
    return account


@pytest.mark.parametrize(
    ("fields", "field", "fix"),
    [
        ({"amount": 0}, "amount", "pause the provider"),
        ({"amount": -1}, "amount", "At least 1"),
        ({"amount": 2**63}, "amount", "less than or equal"),
        ({"burst": 0}, "burst", "greater than or equal to 1"),
        ({"burst": 61}, "burst", "At most the amount, 60."),
        ({"window": ""}, "window", "Choose the window"),
        ({"window": "week"}, "window", "not a valid choice"),
        ({"unit": "dollars"}, "unit", "not a valid choice"),
        ({"unit": "concurrency"}, "window", "empty it"),
        ({"unit": "concurrency", "window": "", "burst": 3}, "burst", "empty it"),
        ({"model": "m"}, "provider", "Choose whose model"),
    ],
)
def test_a_limit_that_makes_no_sense(
    vendor: Provider, fields: dict[str, Any], field: str, fix: str
):
    messages = wrong(**fields)[field]
    assert any(fix in message for message in messages)


def test_a_limit_of_what_is_not_there(vendor: Provider):
    assert "add it there" in wrong(provider=vendor, model="unheard-of")["model"][0]
    one, other = factories.tenant("one"), factories.tenant("other")
    key, _ = ApiKey.issue(other, "k")
    key.save()
    assert wrong(tenant=one, key=key)["key"] == ["This key is not one of one's."]
    Limit(tenant=other, key=key, unit="requests", window="minute", amount=1).full_clean()


@pytest.mark.parametrize(
    ("unit", "window", "amount", "is_wrong"),
    [
        ("requests", "minute", 501, True),
        ("requests", "minute", 500, False),
        ("requests", "day", 500 * 1440 + 1440, True),
        ("requests", "day", 500 * 1440, False),
        # A minute's calls may come in one second, unless another limit says no.
        ("requests", "second", 500, False),
        ("requests", "second", 501, True),
        ("tokens", "hour", 60 * 30_060, True),
        ("output_tokens", "minute", 10**9, False),
    ],
)
def test_a_limit_above_the_vendors(
    vendor: Provider, unit: str, window: str, amount: int, is_wrong: bool
):
    given = {"provider": vendor, "model": "m", "unit": unit, "window": window, "amount": amount}
    if is_wrong:
        assert "The vendor allows" in wrong(**given)["amount"][0]
    else:
        Limit(**given).full_clean()


def test_limits_that_contradict_each_other(vendor: Provider):
    Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=100)
    message = wrong(provider=vendor, window="day", amount=99)["amount"][0]
    assert message == (
        "100 per minute can never be reached under 99 per day: lower the one or raise the other."
    )
    assert (
        "can never be reached" in wrong(provider=vendor, window="second", amount=101)["amount"][0]
    )
    # Of others there is nothing to contradict.
    Limit(provider=vendor, window="day", amount=99, unit="tokens").full_clean()
    Limit(window="day", amount=99, unit="requests").full_clean()


@pytest.mark.parametrize(
    "fields",
    [
        {"amount": 0},
        {"amount": 5, "window": ""},
        {"amount": 5, "window": "week"},
        {"amount": 5, "unit": "concurrency"},
    ],
)
def test_a_limit_that_can_not_be_held_is_named_and_stops_nobody(
    account: Provider, caplog: Any, fields: dict[str, Any]
):
    """Not made in the admin: written to the table."""
    row = Limit.objects.create(**{"unit": "requests", "window": "minute", **fields})
    factories.route("echo", (account, "echo"))
    assert inline(factories.tenant(), "echo").task.status == "succeeded"
    [record] = logged(caplog, "a limit can't be held")
    assert record["limit"] == row.pk
    [warning] = found()
    assert warning.startswith(f"llmtasks.W003 limit {row.pk} (")


def test_a_vendor_that_lowered_its_limit_is_told_at_the_start(vendor: Provider):
    Limit.objects.create(provider=vendor, model="m", unit="requests", window="minute", amount=500)
    assert found() == []
    ProviderModel.objects.update(vendor_limits={"requests": 50})
    [warning] = found()
    assert "sandbox / m: 500 requests per minute" in warning
    assert "amount" in warning and "The vendor allows 50 a minute" in warning


# --- routes ---------------------------------------------------------------------------------------


@pytest.fixture
def caller(account: Provider) -> Caller:
    Route.objects.create(name="hollow")
    factories.route("echo", (account, "echo"))
    return Caller(factories.tenant())


@pytest.mark.parametrize("mode", ["inline", "queued", "auto"])
def test_a_route_without_candidates_is_refused_and_nothing_is_begun(caller: Caller, mode: str):
    answer = caller.task("hollow", mode=mode)
    assert (answer.status_code, answer.json()["param"]) == (400, "input.model")
    assert answer.json()["detail"] == "'hollow' has no candidates: add one in the admin"
    answer = caller.chat("hollow", stream=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert not Task.objects.exists()
    assert not Attempt.objects.exists()


def test_a_route_without_candidates_is_told_at_the_start(caller: Caller, caplog: Any):
    [warning] = found()
    assert warning.startswith("llmtasks.W001 route 'hollow' has no candidates")
    with pytest.raises(SystemCheckError, match="'hollow' has no candidates"):
        call_command("check", databases=["default"], fail_level="WARNING", stderr=io.StringIO())
    routing.snapshot()
    [record] = logged(caplog, "a route has no candidates: its calls are refused")
    assert record["route"] == "hollow"
    Route.objects.filter(name="hollow").update(is_active=False)
    assert found() == []


def test_before_the_tables_are_there_nothing_is_told(
    transactional_db: None, monkeypatch: pytest.MonkeyPatch
):
    def missing() -> Any:
        raise ProgrammingError("there is no such table")

    monkeypatch.setattr(checks, "routes_found", missing)
    assert found() == []
    assert checks.configuration(app_configs=None, databases=None) == []


# --- fallbacks ------------------------------------------------------------------------------------


def fall_back(name: str, other: str) -> None:
    Route.objects.filter(name=name).update(fallback=Route.objects.get(name=other))


def test_the_candidates_of_a_fallback_come_after_the_routes_own(
    account: Provider, sandbox: Sandbox
):
    second = factories.provider(sandbox.base_url, "second")
    for name, model in (("first", "error-401"), ("spare", "echo"), ("last", "slow-1")):
        factories.route(name, (second if name == "spare" else account, model))
    fall_back("first", "spare")
    fall_back("spare", "last")
    models = [c.model for c in routing.find("first", "chat").candidates]
    assert models == ["error-401", "echo", "slow-1"]
    task = inline(factories.tenant(), "first").task
    assert (task.route, task.provider, errors_of(task)) == (
        "first", "second", ["AuthenticationFailed", ""],
    )  # fmt: skip


def test_a_fallback_alone_is_enough(account: Provider):
    Route.objects.create(name="alias")
    factories.route("echo", (account, "echo"))
    fall_back("alias", "echo")
    assert inline(factories.tenant(), "alias").task.status == "succeeded"
    assert found() == []
    Route.objects.filter(name="echo").update(is_active=False)
    assert found()[0].startswith("llmtasks.W001 route 'alias' has no candidates")


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_a_cycle_of_fallbacks(account: Provider, caplog: Any, names: tuple[str, ...]):
    for name in names:
        factories.route(name, (account, f"slow-{ord(name)}"))
    for name, other in itertools.pairwise(names):
        fall_back(name, other)
    last = Route.objects.get(name=names[-1])
    last.fallback = Route.objects.get(name="a")
    with pytest.raises(ValidationError) as raised:
        last.full_clean()
    assert raised.value.message_dict == {
        "fallback": ["It leads back to this route: choose another, or none."]
    }
    other = Route(name="other", fallback=last)
    last.save()
    with pytest.raises(ValidationError, match=f"It leads back to '{names[-1]}'"):
        other.full_clean()
    # In the table all the same: each candidate is called once, and it is told.
    for name in names:
        mine = routing.find(name, "chat").candidates
        assert mine[0].model == f"slow-{ord(name)}"
        assert len({c.model for c in mine}) == len(mine) == len(names)
    assert len(logged(caplog, "a fallback leads back to its route")) == len(names)
    warnings = found()
    assert len(warnings) == len(names)
    assert " → ".join([*names, "a"]) in warnings[0]
    assert warnings[0].startswith("llmtasks.W002 route 'a': its fallback leads back")


def test_a_fallback_of_another_kind(account: Provider, caplog: Any):
    chat = factories.route("chat", (account, "echo"))
    spare = factories.route("spare", (account, "slow-1"))
    chat.fallback = spare
    chat.full_clean()
    chat.save()
    spare.kind = "embedding"
    with pytest.raises(ValidationError) as raised:
        spare.full_clean()
    assert raised.value.message_dict == {
        "kind": ["'chat' falls back to this route: it must stay chat."]
    }
    spare.save()
    assert [c.model for c in routing.find("chat", "chat").candidates] == ["echo"]
    assert logged(caplog, "a fallback is of another kind")
    [warning] = found()
    assert "route 'chat': it is for chat, its fallback for embedding: chat → spare" in warning
    with pytest.raises(ValidationError) as raised:
        Route.objects.get(name="chat").full_clean()
    assert raised.value.message_dict == {
        "fallback": ["'spare' is for embedding, not for chat: choose another, or none."]
    }


# --- work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "expired"])
def test_a_finished_task_is_not_cancelled(caller: Caller, status: str):
    task = factories.task(caller.tenant, status=Status(status))
    before = Task.objects.filter(id=task.id).values().get()
    answer = caller.post(f"/v1/tasks/{task.id}/cancel")
    if status == "cancelled":
        # Who repeats a cancel whose answer was lost.
        assert answer.status_code == 200
    else:
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert answer.json()["detail"] == (
            f"the task is {status} already: there is nothing left to cancel"
        )
    assert Task.objects.filter(id=task.id).values().get() == before


def test_a_model_that_is_none_names_the_list_of_models(caller: Caller):
    answer = caller.chat("nope")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    assert "GET /v1/models" in answer.json()["error"]["message"]


def test_a_key_of_another_tenant_finds_nothing(caller: Caller):
    task = factories.task(Tenant.objects.exclude(id=caller.tenant.id).first())
    assert caller.get(f"/v1/tasks/{task.id}").status_code == 404
    assert caller.post(f"/v1/tasks/{task.id}/cancel").status_code == 404
