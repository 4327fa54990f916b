"""The admin's pages of limits, of the providers' health, of what waits."""

import re
from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.urls import reverse
from django.utils import timezone

from llmtasks import health
from llmtasks.guards import meters, readings
from llmtasks.models import (
    ApiKey,
    Lane,
    Limit,
    Provider,
    ProviderEvent,
    ProviderModel,
    Route,
    Status,
    Tenant,
)
from tests import factories
from tests.admin_pages import EVIL, changelist, make_task, page, squeezed, text
from tests.integration.test_admin_config import provider_values
from tests.integration.test_health import call, no_redis, vendor

__all__ = ["no_redis", "vendor"]

pytestmark = pytest.mark.django_db


@pytest.fixture
def refused(provider: Provider) -> Provider:
    Provider.objects.update(
        refused_at=timezone.now() - timedelta(hours=1),
        refused_reason=f"AuthenticationFailed: {EVIL}",
    )
    provider.refresh_from_db()
    return provider


def limit_values(**changes: object) -> dict[str, object]:
    return {
        "provider": "", "model": "", "tenant": "", "key": "", "each": "", "unit": "requests",
        "window": "minute", "amount": "60", "burst": "", **changes,
    }  # fmt: skip


ADD_LIMIT = "admin:llmtasks_limit_add"


# --- limits ---------------------------------------------------------------------------------------


def test_a_limit_is_made(login, provider):
    response = login("*").post(reverse(ADD_LIMIT), limit_values(provider=provider.pk, burst="5"))
    assert response.status_code == 302, response.context["errors"]
    row = Limit.objects.get()
    assert (row.provider, row.amount, row.burst, row.window) == (provider, 60, 5, "minute")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"amount": "0"}, "greater than or equal to 1"),
        ({"amount": "-1"}, "greater than or equal to"),
        ({"amount": "many"}, "Enter a whole number"),
        ({"amount": ""}, "This field is required"),
        ({"window": ""}, "Choose the window of the amount."),
        ({"unit": "concurrency"}, "Calls at once have no window"),
        ({"unit": "concurrency", "window": "", "burst": "1"}, "Calls at once have no burst"),
        ({"burst": "61"}, "At most the amount, 60."),
        ({"model": "m"}, "Choose whose model this is."),
        ({"provider": "PROVIDER", "model": "nope"}, "The provider has no such model"),
        ({"tenant": "TENANT", "each": "tenant"}, "The limit is for one already"),
        ({"tenant": "TENANT", "key": "KEY"}, "This key is not one of acme"),
        ({"window": "hour", "amount": "9"}, "can never be reached under 9 per hour"),
    ],
)
def test_a_wrong_limit_is_refused_with_what_to_do(login, provider, tenant, changes, message):
    if "hour" in changes.values():
        Limit.objects.create(unit="requests", window="minute", amount=10)
    key, _ = ApiKey.issue(factories.tenant(), "k")
    key.save()
    known = {"PROVIDER": provider.pk, "TENANT": tenant.pk, "KEY": key.pk}
    before = Limit.objects.count()
    values = limit_values(**{k: known.get(v, v) for k, v in changes.items()})
    content = text(login("*").post(reverse(ADD_LIMIT), values))
    assert message in content
    assert Limit.objects.count() == before


def test_the_same_limit_twice_is_refused(login):
    client = login("*")
    assert client.post(reverse(ADD_LIMIT), limit_values()).status_code == 302
    assert "There is a limit of this unit" in text(client.post(reverse(ADD_LIMIT), limit_values()))


def test_more_than_the_vendor_allows_is_refused(login, provider):
    ProviderModel.objects.create(provider=provider, name="m", vendor_limits={"requests": 50})
    values = limit_values(provider=provider.pk, model="m")
    content = text(login("*").post(reverse(ADD_LIMIT), values))
    assert "The vendor allows 50 a minute" in content


def test_what_a_limit_counts_in_never_changes(login):
    """Its meter has a shape of its own for each unit and window."""
    row = Limit.objects.create(unit="requests", window="minute", amount=10)
    values = limit_values(unit="concurrency", window="", each="tenant", amount="20")
    assert login("*").post(page("limit", row.pk), values).status_code == 302
    row.refresh_from_db()
    assert (row.unit, row.window, row.each, row.amount) == ("requests", "minute", "", 20)


@pytest.mark.django_db(transaction=True)
def test_the_list_shows_how_close_each_limit_is(login, vendor):
    tenant = Tenant.objects.create(name="acme")
    Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=10)
    Limit.objects.create(provider=vendor, unit="concurrency", amount=8)
    Limit.objects.create(each="tenant", unit="requests", window="minute", amount=20)
    key, _ = ApiKey.issue(tenant, "k", last_used_at=timezone.now())
    key.save()
    call(8, tenant=tenant.pk, key=key.pk)
    content = text(login("view_limit").get(changelist("limit")))
    assert "8 of 10 · 80%" in content and "lt-high" in content and "width: 80.0%" in content
    assert "8 of 8 · 100%" in content and "lt-full" in content
    assert "8 of 20 · 40% by acme" in content


@pytest.mark.django_db(transaction=True)
def test_while_redis_is_away_limits_are_listed_without_their_use(login, vendor, no_redis):
    row = Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=10)
    client = login("*")
    assert "10" in text(client.get(changelist("limit")))
    assert "of 10" not in text(client.get(page("limit", row.pk)))


def test_tenants_have_a_weight(login, tenant):
    client = login("*")
    assert (
        client.post(page("tenant", tenant.pk), {"name": "acme", "weight": "7"}).status_code == 302
    )
    tenant.refresh_from_db()
    assert tenant.weight == 7
    for weight in ("0", "1001"):
        values = {"name": "acme", "weight": weight}
        assert "Ensure this value" in text(client.post(page("tenant", tenant.pk), values))


def route_values(**changes: object) -> dict[str, object]:
    return {
        "name": "smart", "kind": "chat", "is_active": "on",
        "candidates-TOTAL_FORMS": "0", "candidates-INITIAL_FORMS": "0", **changes,
    }  # fmt: skip


def test_routes_fall_back_and_hedge(login):
    other = Route.objects.create(name="other")
    values = route_values(fallback=other.pk, hedges="on")
    response = login("*").post(reverse("admin:llmtasks_route_add"), values)
    assert response.status_code == 302, response.context["errors"]
    made = Route.objects.get(name="smart")
    assert made.fallback == other and made.hedges


def test_a_fallback_that_leads_back_is_refused(login):
    route = Route.objects.create(name="smart")
    other = Route.objects.create(name="other", fallback=route)
    content = text(login("*").post(page("route", route.pk), route_values(fallback=other.pk)))
    assert "leads back to this route" in content
    embedding = Route.objects.create(name="embed", kind="embedding")
    content = text(login("*").post(page("route", route.pk), route_values(fallback=embedding.pk)))
    assert "is for embedding, not for chat" in content


# --- refused credentials --------------------------------------------------------------------------


def test_a_refused_credential_is_an_alert(login, refused):
    client = login("*")
    since = f"{refused.refused_at:%Y-%m-%d %H:%M:%S}"
    for url in (reverse("admin:index"), page("provider", refused.pk)):
        content = text(client.get(url))
        assert "vendor refused its credential" in content and since in content
        assert "AuthenticationFailed: &lt;script&gt;" in content and EVIL not in content
        assert "Use the credential again" in content
    assert ">\nrefused\n<" in squeezed(client.get(changelist("provider")))


def test_a_refused_model_is_one_too(login, provider):
    ProviderModel.objects.create(provider=provider, name="m", refused_at=timezone.now())
    client = login("*")
    for url in (reverse("admin:index"), page("provider", provider.pk)):
        assert "vendor refused the model m" in text(client.get(url))


def test_without_a_refusal_there_is_no_alert(login, provider):
    client = login("*")
    for url in (reverse("admin:index"), page("provider", provider.pk)):
        assert "vendor refused" not in text(client.get(url))


@pytest.mark.parametrize("stays", [True, False])
def test_the_button_uses_the_credential_again_and_logs_it(login, refused, stays):
    client = login("*")
    url = reverse("admin:llmtasks_provider_switch", args=(refused.pk, "recover"))
    back = page("provider", refused.pk) if stays else reverse("admin:index")
    assert client.post(url, {"stay": "1"} if stays else {}).url == back
    refused.refresh_from_db()
    assert refused.refused_at is None and refused.refused_reason == ""
    assert LogEntry.objects.get().change_message == "Credential in use again."
    event = ProviderEvent.objects.get()
    assert (event.event, event.detail) == ("recovered", "by user-0")
    assert "is used again" in text(client.get(back))


def test_the_lists_action_does_the_same(login, refused):
    values = {"action": "recover", "_selected_action": [refused.pk], "index": "0"}
    client = login("*")
    client.post(changelist("provider"), values)
    client.post(changelist("provider"), values)
    refused.refresh_from_db()
    assert refused.refused_at is None
    assert LogEntry.objects.count() == ProviderEvent.objects.count() == 1


def test_who_may_only_look_sees_the_alert_and_no_button(login, refused):
    client = login("view_provider")
    for url in (reverse("admin:index"), page("provider", refused.pk)):
        content = text(client.get(url))
        assert "vendor refused" in content and "Use the credential again" not in content
    url = reverse("admin:llmtasks_provider_switch", args=(refused.pk, "recover"))
    assert client.post(url).status_code == 403
    refused.refresh_from_db()
    assert refused.refused_at is not None


def test_who_may_not_see_providers_sees_no_alert(login, refused):
    assert "vendor refused" not in text(login("view_task").get(reverse("admin:index")))


def test_another_credential_is_used_at_once(login, refused):
    client = login("*")
    response = client.post(page("provider", refused.pk), provider_values(credential="env:OTHER"))
    assert response.status_code == 302
    refused.refresh_from_db()
    assert refused.refused_at is None and refused.credential == "env:OTHER"
    assert ProviderEvent.objects.get().event == "recovered"


def test_another_edit_leaves_it_refused(login, refused):
    Provider.objects.update(credential="env:NEW_KEY")
    values = provider_values(price_family="openai")
    assert login("*").post(page("provider", refused.pk), values).status_code == 302
    refused.refresh_from_db()
    assert refused.refused_at is not None and refused.price_family == "openai"


# --- health and its history -----------------------------------------------------------------------


def test_history_is_read_and_never_edited(login, provider):
    ProviderEvent.objects.create(provider="vendor", model="m", event="opened", detail=EVIL)
    ProviderEvent.objects.create(provider="other", event="refused")
    client = login("*")
    content = squeezed(client.get(changelist("providerevent")))
    assert ">\nbreaker opened\n<" in content and ">\ncredential refused\n<" in content
    assert EVIL not in content
    content = squeezed(client.get(changelist("providerevent", provider="vendor")))
    assert "breaker opened\n</span" in content and "credential refused\n</span" not in content
    row = ProviderEvent.objects.first()
    assert client.post(page("providerevent", row.pk), {"detail": "x"}).status_code == 403
    url = reverse("admin:llmtasks_providerevent_delete", args=(row.pk,))
    assert client.post(url, {"post": "yes"}).status_code == 403
    assert client.get(reverse("admin:llmtasks_providerevent_add")).status_code == 403


@pytest.mark.django_db(transaction=True)
def test_a_providers_page_shows_its_breakers_and_their_history(login, vendor):
    call(20, health="fault", error="ServerError")
    ProviderEvent.objects.create(provider="another", event="refused", detail="not shown here")
    content = squeezed(login("*").get(page("provider", vendor.pk)))
    assert "vendor/m<" in content and ">\nopen\n<" in content and ">\nclosed\n<" in content
    assert ">\nbreaker opened\n<" in content and "ServerError" in content
    assert "not shown here" not in content


# --- queues and limits ----------------------------------------------------------------------------


def board(client):
    health._last = None
    return client.get(reverse("queues"))


@pytest.mark.django_db(transaction=True)
def test_the_board_shows_what_waits_how_close_limits_are_and_what_fails(login, vendor):
    heavy = factories.tenant(weight=30)
    for _ in range(3):
        make_task(heavy, not_before=timezone.now() - timedelta(seconds=125), lane=Lane.BULK)
    make_task(heavy, status=Status.RUNNING, lane=Lane.BULK)
    make_task(heavy, provider="forgotten", not_before=timezone.now() + timedelta(hours=1))
    Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=80, burst=80)
    call(20, health="fault", error="ServerError")
    factories.worker(lane="bulk", slots=64)
    response = board(login("*"))
    content = squeezed(response)
    depths = {(bar.group, bar.name): bar for bar in response.context["depths"]}
    assert depths["vendor", "bulk"].text == "3 waiting · 1 under way"
    assert [part.title for part in depths["vendor", "bulk"].parts] == ["3 due", "1 running"]
    assert [part.width for part in depths["vendor", "bulk"].parts] == ["75.00", "25.00"]
    assert depths["vendor", "interactive"].parts == ()
    assert [part.title for part in depths["forgotten", "default"].parts] == ["1 later"]
    assert re.search(r"lt-age[^>]*2 min \d\d s", content)
    assert "10-99" in content and "worker bulk" in content and "none</span>" in content
    assert "20 of 80 · 25%" in content
    assert ">\nopen\n<" in content and ">\nbreaker opened\n<" in content
    assert "20 ServerError" in content


@pytest.mark.django_db(transaction=True)
def test_the_board_names_models_that_are_not_well_and_those_that_were_called(login, vendor):
    for number in range(50):
        ProviderModel.objects.create(provider=vendor, name=f"quiet-{number}")
    ProviderModel.objects.create(provider=vendor, name="called")
    ProviderModel.objects.create(provider=vendor, name="zz-refused", refused_at=timezone.now())
    call(1, model="called", health="ok", ms=80)
    response = board(login("*"))
    shown = [model["of"] for model in response.context["models"]]
    assert shown == ["vendor/zz-refused", "vendor/called"]
    others = ProviderModel.objects.count() - 2
    assert f"{others} more let calls through." in text(response)


@pytest.mark.django_db(transaction=True)
def test_the_board_says_which_store_is_away(login, vendor, no_redis, monkeypatch):
    client = login("*")
    content = text(board(client))
    assert "Redis gives no answer" in content and "Queue depth" in content

    def away():
        raise meters.Away

    monkeypatch.setattr("llmtasks.backlog.look", away)
    monkeypatch.setattr(health, "POSTGRES_AWAY", meters.Away)
    assert "It can't be looked at now." in text(board(client))


def test_each_part_of_the_board_is_for_who_may_see_it(login, provider, monkeypatch):
    monkeypatch.setattr(readings, "errors", lambda *_: {})
    parts = {
        "view_task": "Queue depth",
        "view_limit": "how close",
        "view_provider": "Breakers",
        "view_providerevent": "Latest changes",
    }
    for permission, title in parts.items():
        content = text(board(login(permission)))
        others = [other for other in parts.values() if other != title]
        assert title in content and not [other for other in others if other in content]
        assert reverse("queues") in text(login(permission).get(reverse("admin:index")))


def test_nobody_else_sees_it(login, client):
    assert client.get(reverse("queues")).url.startswith("/admin/login/")
    staff = login("view_price")
    assert board(staff).status_code == 403


def test_what_is_longer_than_a_chart_is_said(login, provider, monkeypatch):
    from llmtasks.admin import board as module

    monkeypatch.setattr(module, "MOST_BARS", 1)
    uses = [
        readings.Use(rule, used, 10)
        for used in (1, 9, 4)
        for rule in [type("Rule", (), {"name": f"limit {used}", "each": ""})()]
    ]
    shown = module.of_limits(health.Health(uses=uses))
    assert [use["name"] for use in shown["uses"]] == ["limit 9"] and shown["uses_left"] == 2
