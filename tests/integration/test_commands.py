"""The commands that configure: add_provider, issue_key, seed_demo."""

import json
from io import StringIO

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.utils import timezone

from llmtasks.management.commands import seed_demo as seed
from llmtasks.models import (
    ApiKey,
    Config,
    Price,
    Provider,
    ProviderEvent,
    Route,
    RouteCandidate,
    Tenant,
)
from llmtasks.models.tenancy import split

pytestmark = pytest.mark.django_db

SECRET = "sk-live-0123456789abcdef"
NEW = ("vendor", "--adapter", "compatible", "--base-url", "https://api.example.com/v1")


def run(name: str, *arguments: str) -> str:
    out = StringIO()
    call_command(name, *arguments, stdout=out, stderr=StringIO())
    return out.getvalue()


def version() -> int:
    return Config.objects.get().version


def candidates(route: str) -> list[str]:
    rows = RouteCandidate.objects.filter(route__name=route).select_related("model__provider")
    return [str(row.model) for row in rows]


# --- add_provider -------------------------------------------------------------------------------


def test_a_provider_is_added_with_its_routes():
    out = run(
        "add_provider",
        *NEW,
        *("--key", "env:VENDOR_KEY", "--price-family", "openai"),
        *("--route", "smart=gpt-5", "--embedding-route", "vectors=text-embedding-3-small"),
        *("--option", "organization=org-1", "--option", "stream_usage=false"),
    )
    row = Provider.objects.get()
    assert (row.adapter, row.credential, row.price_family) == (
        "compatible",
        "env:VENDOR_KEY",
        "openai",
    )
    assert row.options == {"organization": "org-1", "stream_usage": False}
    assert candidates("smart") == ["vendor/gpt-5"]
    assert Route.objects.get(name="vectors").kind == Route.Kind.EMBEDDING
    assert "provider vendor: made" in out
    assert "env:VENDOR_KEY leads to no key here" in out
    assert "no price for openai/gpt-5" in out


def test_the_same_again_changes_nothing():
    arguments = (*NEW, "--key", "env:VENDOR_KEY", "--route", "smart=gpt-5")
    run("add_provider", *arguments)
    before = version()
    assert "provider vendor: as it was" in run("add_provider", *arguments)
    assert version() == before


def test_another_key_is_used_where_the_one_before_was_refused():
    run("add_provider", *NEW, "--key", "env:A")
    Provider.objects.update(refused_at=timezone.now(), refused_reason="AuthenticationFailed: no")
    run("add_provider", "vendor", "--key", "env:A", "--price-family", "openai")
    assert Provider.objects.get().refused_at is not None
    run("add_provider", "vendor", "--key", "env:B")
    row = Provider.objects.get()
    assert (row.refused_at, row.refused_reason, row.credential) == (None, "", "env:B")
    assert ProviderEvent.objects.get().detail == "by add_provider"


def test_only_what_a_flag_names_is_changed():
    run("add_provider", *NEW, "--key", "env:A")
    assert "provider vendor: changed" in run("add_provider", "vendor", "--key", "env:B")
    row = Provider.objects.get()
    assert (row.credential, row.base_url) == ("env:B", NEW[-1])


def test_the_base_url_is_the_adapters_where_none_is_given():
    run("add_provider", "mine", "--adapter", "openai")
    assert Provider.objects.get().base_url == "https://api.openai.com/v1"


def test_candidates_are_appended_unless_a_position_is_given():
    run("add_provider", *NEW, "--route", "smart=a", "--route", "smart=b")
    assert candidates("smart") == ["vendor/a", "vendor/b"]
    run("add_provider", "vendor", "--route", "smart=c")
    assert candidates("smart") == ["vendor/a", "vendor/b", "vendor/c"]
    run("add_provider", "vendor", "--route", "smart=c", "--position", "0")
    run("add_provider", "vendor", "--route", "smart=a", "--position", "5")
    assert candidates("smart") == ["vendor/c", "vendor/b", "vendor/a"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("vendor", "--adapter", "nope", "--base-url", "http://x.io"),
            "--adapter: Unknown adapter",
        ),
        (("vendor", "--base-url", "http://x.io"), "--adapter: This field cannot be blank"),
        (("vendor", "--adapter", "azure"), "--base-url: This field cannot be blank"),
        ((*NEW[:3], "--base-url", "ftp://x.io"), "--base-url: base URL of compatible must begin"),
        (
            (*NEW[:3], "--base-url", "http://a:b@x.io"),
            "--base-url: base URL of compatible",
        ),
        (("Vendor X", *NEW[1:]), "NAME: Lower-case letters"),
        ((*NEW, "--option", "colour=red"), "--option: unknown option 'colour'"),
        ((*NEW, "--option", "colour"), "--option 'colour': give NAME=VALUE"),
        ((*NEW, "--route", "smart"), "--route 'smart': give ALIAS=MODEL"),
        ((*NEW, "--route", "=m"), "--route '=m': give ALIAS=MODEL"),
        ((*NEW, "--route", f"{'a' * 101}=m"), "--route"),
        ((*NEW, "--route", "a=m", "--position", "-1"), "--position"),
        (
            (*NEW, "--route", "a=m", "--embedding-route", "a=n"),
            "--embedding-route a=n: the route 'a' is one for chat, not for embedding",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left_behind(arguments, message):
    with pytest.raises(CommandError) as raised:
        run("add_provider", *arguments)
    assert message in str(raised.value)
    assert not Provider.objects.exists() and not Route.objects.exists()


def test_a_key_itself_is_refused_and_not_repeated():
    with pytest.raises(CommandError) as raised:
        run("add_provider", *NEW, "--key", SECRET)
    assert "--key: Give a reference" in str(raised.value)
    assert SECRET not in str(raised.value)
    assert not Provider.objects.exists()


def test_a_key_that_is_there_is_not_warned_of(monkeypatch):
    monkeypatch.setenv("VENDOR_KEY", SECRET)
    out = run("add_provider", *NEW, "--key", "env:VENDOR_KEY")
    assert "leads to no key" not in out and SECRET not in out


# --- issue_key ----------------------------------------------------------------------------------


def test_a_key_is_issued_and_only_its_hash_is_kept():
    Tenant.objects.create(name="acme")
    secret = run("issue_key", "acme", "backend", "--scope", "read").strip()
    row = ApiKey.objects.get()
    prefix, hashed = split(secret)
    assert row.prefix == prefix and row.matches(hashed) and row.scopes == ["read"]
    assert secret.split("_", 2)[2] not in str(ApiKey.objects.values().get())


def test_a_key_is_issued_for_some_tools_alone():
    Tenant.objects.create(name="acme")
    run("issue_key", "acme", "backend", "--tool", "look_up", "--tool", "shop_*")
    assert ApiKey.objects.get().tools == ["look_up", "shop_*"]
    with pytest.raises(CommandError, match="--tool: "):
        run("issue_key", "acme", "backend", "--tool", "two words")
    with pytest.raises(CommandError, match="--scope other: there is"):
        run("issue_key", "acme", "backend", "--scope", "other")


def test_a_tenant_is_made_only_when_asked_for():
    with pytest.raises(CommandError, match="no tenant 'acme'"):
        run("issue_key", "acme", "backend")
    run("issue_key", "acme", "backend", "--create-tenant")
    assert ApiKey.objects.get().scopes == ["write", "read", "tools", "prompts"]
    with pytest.raises(CommandError, match="TENANT: "):
        run("issue_key", "not a slug", "backend", "--create-tenant")
    with pytest.raises(CommandError, match="NAME: "):
        run("issue_key", "acme", "n" * 101)


# --- seed_demo ----------------------------------------------------------------------------------


@pytest.fixture
def seed_demo(monkeypatch):
    for name in ("DEMO_API_KEY", "ADMIN_USER", "ADMIN_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SANDBOX_URL", "http://127.0.0.1:9/")
    return lambda *arguments: json.loads(run("seed_demo", *arguments))


def test_the_demo_is_seeded(seed_demo):
    summary = seed_demo()
    prefix, hashed = split(summary["api_key"])
    assert ApiKey.objects.get(prefix=prefix).matches(hashed)
    user = get_user_model().objects.get(username=summary["admin_user"])
    assert user.is_superuser and user.check_password(summary["admin_password"])
    assert Provider.objects.get(name="sandbox").base_url == "http://127.0.0.1:9/v1"
    assert Provider.objects.get(name="sandbox-anthropic").base_url == "http://127.0.0.1:9"
    assert candidates("smart") == ["sandbox/echo", "sandbox-anthropic/claude-echo"]
    assert candidates("fallback") == ["sandbox/error-503", "sandbox-anthropic/claude-echo"]
    assert candidates("claude-long-2000") == ["sandbox-anthropic/claude-long-2000"]
    # What takes its account out of use has one of its own.
    assert candidates("error-401") == ["sandbox-refused/error-401"]
    assert candidates("claude-error-402") == ["sandbox-anthropic-refused/claude-error-402"]
    assert Route.objects.get(name="embed").kind == Route.Kind.EMBEDDING
    assert not Route.objects.filter(name="claude-embed").exists()
    assert Price.objects.filter(family="openai").exists()


def test_every_sandbox_model_has_a_price_but_that_of_unpriced(seed_demo):
    seed_demo()
    models = set(RouteCandidate.objects.values_list("model__name", flat=True))
    priced = set(Price.objects.filter(family=seed.FAMILY).values_list("model", flat=True))
    assert models - priced == {"slow-1", "claude-slow-1"}
    assert candidates("unpriced") == ["sandbox/slow-1"]


def test_seeding_again_changes_nothing(seed_demo):
    seed_demo()
    before = version()
    again = seed_demo()
    assert version() == before
    assert (again["api_key"], again["admin_password"], again["routes"]["made"]) == (None, None, 0)
    assert again["prices"]["new"] == again["prices"]["changed"] == 0


def test_seeding_again_keeps_what_somebody_changed(seed_demo):
    seed_demo()
    later = {**seed.CHAT_PRICE, "input": 7}
    Price.objects.create(family=seed.FAMILY, model="echo", **later)
    RouteCandidate.objects.filter(route__name="smart", model__name="echo").update(position=5)
    seed_demo()
    rows = Price.objects.filter(family=seed.FAMILY, model="echo").order_by("effective_from")
    assert [row.input for row in rows] == [1, 7]
    assert candidates("smart") == ["sandbox-anthropic/claude-echo", "sandbox/echo"]


def test_the_environment_names_key_and_administrator(seed_demo, monkeypatch):
    given = f"lt_0123456789ab_{'s' * 32}"
    monkeypatch.setenv("DEMO_API_KEY", given)
    monkeypatch.setenv("ADMIN_USER", "ann")
    monkeypatch.setenv("ADMIN_PASSWORD", "one")
    assert seed_demo()["api_key"] == given
    monkeypatch.setenv("ADMIN_PASSWORD", "two")
    monkeypatch.setenv("SANDBOX_URL", "http://127.0.0.1:10")
    seed_demo()
    assert ApiKey.objects.get().prefix == "0123456789ab"
    assert get_user_model().objects.get(username="ann").check_password("two")
    assert Provider.objects.get(name="sandbox").base_url == "http://127.0.0.1:10/v1"


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("SANDBOX_URL", "", "SANDBOX_URL is not set"),
        ("SANDBOX_URL", "nowhere", "base URL"),
        ("DEMO_API_KEY", "secret-words", "DEMO_API_KEY is no key"),
    ],
)
def test_a_wrong_environment_is_named(seed_demo, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(CommandError, match=message) as raised:
        seed_demo()
    assert "secret-words" not in str(raised.value)


def test_further_names_of_the_sandbox_become_routes(seed_demo):
    seed_demo("--route", "slow-1234", "--route", "claude-flaky-2", "--route", "embed-8")
    assert candidates("slow-1234") == ["sandbox/slow-1234"]
    assert candidates("claude-slow-1234") == ["sandbox-anthropic/claude-slow-1234"]
    assert Route.objects.get(name="embed-8").kind == Route.Kind.EMBEDDING
    assert Price.objects.filter(family=seed.FAMILY, model="slow-1234").exists()
