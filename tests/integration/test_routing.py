"""From a model's name to its candidates, and where their keys come from."""

import pytest

from llmtasks import routing
from llmtasks.errors import InvalidInput
from llmtasks.models import Provider, Route
from providers.errors import AuthenticationFailed
from tests import factories

pytestmark = pytest.mark.usefixtures("account")


def test_candidates_come_in_their_order(account):
    second = factories.provider(name="second", price_family="openai", credential="")
    factories.route("smart", (second, "b"), (account, "a"))
    found = routing.find("smart", "chat")
    assert [(c.provider, c.model) for c in found.candidates] == [("second", "b"), ("sandbox", "a")]
    assert [c.price_family for c in found.candidates] == ["openai", "sandbox"]


def test_one_account_that_is_set_up_wrongly_takes_no_other_down(account, caplog):
    wrong = factories.provider(name="wrong", options={"unheard-of": 1})
    unknown = factories.provider(name="unknown")
    Provider.objects.filter(id=unknown.id).update(adapter="nothing")
    factories.route("smart", (wrong, "a"), (unknown, "a"), (account, "a"))
    factories.route("only", (wrong, "a"))
    assert [c.provider for c in routing.find("smart", "chat").candidates] == ["sandbox"]
    assert "smart → wrong/a" in str([record.__dict__ for record in caplog.records])
    with pytest.raises(InvalidInput):
        routing.find("only", "chat")


def test_an_inactive_route_is_none(account):
    factories.route("smart", (account, "a"))
    Route.objects.update(is_active=False)
    with pytest.raises(InvalidInput, match="smart"):
        routing.find("smart", "chat")


def test_a_route_that_another_process_knows_already_is_found(account):
    """Ours would see it with the next beat of its pulse."""
    assert "smart" not in routing.snapshot().routes
    factories.route("smart", (account, "a"))
    assert [c.model for c in routing.find("smart", "chat").candidates] == ["a"]


@pytest.mark.parametrize(("kind", "path"), [("chat", "chat"), ("embedding", "embeddings")])
def test_a_model_of_another_kind_names_the_right_path(account, kind, path):
    factories.route("smart", (account, "a"), kind=kind)
    other = "embedding" if kind == "chat" else "chat"
    with pytest.raises(InvalidInput, match=path):
        routing.find("smart", other)


# --- where a key is found -------------------------------------------------------------------------


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_KEY", " secret \n")
    assert routing.resolve("env:SOME_KEY") == "secret"
    monkeypatch.setenv("SOME_KEY", "  ")
    assert routing.resolve("env:SOME_KEY") is None
    assert routing.resolve("env:NOT_SET_ANYWHERE") is None


def test_a_key_comes_from_a_file(tmp_path):
    file = tmp_path / "key"
    assert routing.resolve(f"file:{file}") is None
    file.write_text("secret\n")
    assert routing.resolve(f"file:{file}") == "secret"
    file.write_bytes(b"\xff\xfe")
    assert routing.resolve(f"file:{file}") is None
    file.write_text("x" * 100_000)
    assert len(routing.resolve(f"file:{file}")) == routing.MAX_CREDENTIAL_BYTES
    assert routing.resolve(f"file:{tmp_path}") is None


@pytest.mark.parametrize("reference", ["", "sk-live-1234", "vault:x"])
def test_nothing_else_is_a_reference(reference):
    assert routing.resolve(reference) is None


def test_a_missing_key_is_told_by_its_reference_alone(account):
    Provider.objects.update(credential="env:NOT_SET_ANYWHERE")
    factories.route("smart", (account, "a"))
    [candidate] = routing.find("smart", "chat").candidates
    with pytest.raises(AuthenticationFailed, match="env:NOT_SET_ANYWHERE"):
        routing.check_credential(candidate)


def test_an_account_may_need_no_key(account):
    Provider.objects.update(credential="")
    factories.route("smart", (account, "a"))
    [candidate] = routing.find("smart", "chat").candidates
    routing.check_credential(candidate)


def test_a_key_is_never_shown(account, monkeypatch):
    monkeypatch.setenv("SANDBOX_KEY", "sk-very-secret")
    factories.route("smart", (account, "a"))
    assert "sk-very-secret" not in repr(routing.snapshot())
