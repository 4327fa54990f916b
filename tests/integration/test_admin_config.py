"""The admin's pages of tenants, keys, providers and routes."""

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.urls import reverse

from llmtasks.models import (
    Adjustment,
    ApiKey,
    Provider,
    ProviderModel,
    Route,
    RouteCandidate,
    Scope,
    Tenant,
)
from llmtasks.models.tenancy import split
from llmtasks.tools import registry as tools
from tests.admin_pages import changelist, page, squeezed, text

pytestmark = pytest.mark.django_db


# --- tenants and keys ---------------------------------------------------------------------------


def test_a_keys_secret_is_shown_once(login, tenant):
    client = login("*")
    values = {"tenant": tenant.pk, "name": "backend", "scopes": ["read"]}
    response = client.post(reverse("admin:llmtasks_apikey_add"), values)
    secret = response.context["secret"]
    assert secret in text(response) and "no-store" in response["Cache-Control"]
    key = ApiKey.objects.get()
    assert key.matches(split(secret)[1]) and key.scopes == [Scope.READ]
    end = secret.split("_", 2)[2]
    for url in (changelist("apikey"), page("apikey", key.pk)):
        content = text(client.get(url))
        assert end not in content and key.secret_hash not in content
    assert end not in str(client.session.items()) + str(client.cookies)
    assert end not in str(list(LogEntry.objects.values_list("change_message", "object_repr")))


def test_an_edit_keeps_the_secret(login, tenant):
    key, _ = ApiKey.issue(tenant, "backend")
    key.save()
    other = Tenant.objects.create(name="other")
    values = {"name": "renamed", "scopes": ["read"], "tenant": other.pk}
    assert login("*").post(page("apikey", key.pk), values).status_code == 302
    changed = ApiKey.objects.get()
    assert (changed.name, changed.secret_hash, changed.tenant) == (
        "renamed",
        key.secret_hash,
        tenant,
    )


def test_tools_are_named_one_by_one_or_by_their_beginning(login, tenant):
    client = login("*")
    values = {"name": "acme", "is_active": "on", "weight": "1", "tools": "look_up,shop_*,mail@2"}
    assert client.post(page("tenant", tenant.pk), values).status_code == 302
    tenant.refresh_from_db()
    assert tenant.tools == ["look_up", "shop_*", "mail@2"]
    for wrong in ("two words", "*shop", "mail@0"):
        refused = client.post(page("tenant", tenant.pk), values | {"tools": wrong})
        assert "Give a tool" in str(refused.context["adminform"].form.errors["tools"])
    assert client.post(page("tenant", tenant.pk), values | {"tools": ""}).status_code == 302
    tenant.refresh_from_db()
    assert tenant.tools == []


def test_a_key_can_have_the_scope_that_a_tool_asks_for(login, tenant, monkeypatch):
    box = tools.Registry()
    monkeypatch.setattr(tools.registry, "tools", box.tools)
    box.add(tools.of_function(lambda: None, name="audited", scopes=["audit"]))
    values = {"tenant": tenant.pk, "name": "k", "scopes": ["tools", "audit"], "tools": "audited"}
    assert login("*").post(reverse("admin:llmtasks_apikey_add"), values).status_code == 200
    key = ApiKey.objects.get()
    assert (key.scopes, key.tools) == (["tools", "audit"], ["audited"])


def test_keys_are_revoked_and_it_is_logged(login, tenant):
    key, _ = ApiKey.issue(tenant, "backend")
    key.save()
    values = {"action": "revoke", "_selected_action": [str(key.pk)], "index": "0"}
    client = login("*")
    client.post(changelist("apikey"), values)
    first = ApiKey.objects.get().revoked_at
    client.post(changelist("apikey"), values)
    assert first is not None and ApiKey.objects.get().revoked_at == first
    assert LogEntry.objects.get().change_message == "Revoked."
    assert "revoked" in text(client.get(changelist("apikey")))


def test_tenants_and_keys_are_never_deleted(login, everything):
    client = login("*")
    for model in ("tenant", "apikey", "price", "adjustment", "attempt", "worker"):
        url = reverse(f"admin:llmtasks_{model}_delete", args=(everything_pk(everything, model),))
        assert client.post(url, {"post": "yes"}).status_code == 403


def everything_pk(everything, model: str):
    if model == "adjustment":
        return Adjustment.objects.get().pk
    return everything["key" if model == "apikey" else model].pk


# --- configuration ------------------------------------------------------------------------------


def provider_values(**changes: str) -> dict[str, str]:
    return {
        "name": "new", "adapter": "compatible", "base_url": "https://api.example.com/v1",
        "credential": "env:NEW_KEY", "options": "{}", "price_family": "",
        "connect_timeout_s": "5", "read_timeout_s": "120", "total_timeout_s": "600",
        "models-TOTAL_FORMS": "0", "models-INITIAL_FORMS": "0", **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"adapter": "nope"}, "Select a valid choice"),
        ({"options": '{"colour": 1}'}, "unknown option"),
        ({"options": "{"}, "valid JSON"),
        ({"credential": "sk-live-123"}, "Give a reference"),
        ({"base_url": "ftp://x.io"}, "must begin with http"),
        ({"base_url": "https://user:pass@x.io"}, "must not hold a credential"),
        ({"name": "Upper"}, "Lower-case"),
    ],
)
def test_a_wrong_provider_is_refused(login, change, message):
    response = login("*").post(reverse("admin:llmtasks_provider_add"), provider_values(**change))
    assert message in text(response)
    assert not Provider.objects.exists()


def test_whether_a_credential_leads_to_a_key_is_shown_and_the_key_is_not(login, monkeypatch):
    client = login("*")
    response = client.post(reverse("admin:llmtasks_provider_add"), provider_values())
    assert response.status_code == 302, response.context["errors"]
    row = Provider.objects.get()
    assert ">\nno\n<" in squeezed(client.get(changelist("provider")))
    monkeypatch.setenv("NEW_KEY", "sk-live-0123456789")
    for url in (changelist("provider"), page("provider", row.pk)):
        content = squeezed(client.get(url))
        assert ">\nyes\n<" in content and "sk-live" not in content


def test_a_providers_name_never_changes(login, provider):
    values = provider_values(name="other", price_family="openai")
    assert login("*").post(page("provider", provider.pk), values).status_code == 302
    provider.refresh_from_db()
    assert (provider.name, provider.price_family) == ("vendor", "openai")


def test_pause_and_resume(login, provider):
    client = login("*")
    for verb, is_paused in (("pause", True), ("resume", False)):
        url = reverse("admin:llmtasks_provider_switch", args=(provider.pk, verb))
        assert client.get(url).status_code == 405
        assert client.post(url).url == reverse("admin:index")
        provider.refresh_from_db()
        assert provider.is_paused is is_paused
    values = {"action": "pause", "_selected_action": [provider.pk], "index": "0"}
    client.post(changelist("provider"), values)
    provider.refresh_from_db()
    assert provider.is_paused
    messages = LogEntry.objects.order_by("id").values_list("change_message", flat=True)
    assert list(messages) == ["Paused.", "Resumed.", "Paused."]
    unknown = reverse("admin:llmtasks_provider_switch", args=(provider.pk, "explode"))
    assert client.post(unknown).status_code == 403


def test_pausing_needs_a_csrf_token(login, provider):
    from django.test import Client

    login("*")
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(User.objects.get())
    url = reverse("admin:llmtasks_provider_switch", args=(provider.pk, "pause"))
    assert strict.post(url).status_code == 403


def test_a_route_is_made_with_its_candidates(login, provider):
    client = login("*")
    model = ProviderModel.objects.create(provider=provider, name="m-1")
    values = {
        "name": "smart", "kind": "chat", "is_active": "on",
        "candidates-TOTAL_FORMS": "1", "candidates-INITIAL_FORMS": "0",
        "candidates-0-position": "0", "candidates-0-model": model.pk,
    }  # fmt: skip
    response = client.post(reverse("admin:llmtasks_route_add"), values)
    assert response.status_code == 302, response.context["errors"]
    assert "vendor/m-1" in text(client.get(changelist("route")))


def test_the_list_of_routes_asks_a_fixed_number_of_questions(
    login, provider, django_assert_max_num_queries
):
    client = login("*")
    for number in range(30):
        model = ProviderModel.objects.create(provider=provider, name=f"m-{number}")
        route = Route.objects.create(name=f"r-{number}")
        RouteCandidate.objects.create(route=route, model=model)
    client.get(changelist("route"))
    with django_assert_max_num_queries(8):
        client.get(changelist("route"))
    with django_assert_max_num_queries(13):
        client.get(page("route", route.pk))
