"""Which adapters there are, and what of an account's configuration is refused."""

import pytest

from providers import registry
from providers.base import Account, Provider
from providers.compatible import Compatible
from providers.http import Exchange
from providers.types import EmbeddingRequest, Request


def account(**fields):
    return Account(**{"name": "a", "base_url": "https://example.com/v1", **fields})


def test_every_adapter_can_be_built():
    assert registry.adapters() == ("anthropic", "azure", "compatible", "ollama", "openai", "vllm")
    for adapter in registry.adapters():
        provider = registry.build(adapter, account())
        assert isinstance(provider, Provider)
        assert provider.supports_chat
        assert provider.supports_embeddings == (adapter != "anthropic")


def test_an_unknown_adapter_is_refused_with_those_there_are():
    for call in (
        lambda: registry.build("gemini", account()),
        lambda: registry.check_options("gemini", {}),
    ):
        with pytest.raises(ValueError, match=r"unknown adapter 'gemini'.*anthropic.*vllm"):
            call()


def test_default_base_urls():
    assert registry.build("openai", account(base_url="")).account.base_url == (
        "https://api.openai.com/v1"
    )
    with pytest.raises(ValueError, match="base URL of azure"):
        registry.build("azure", account(base_url=""))


def test_rows_set_a_flavour_and_options_win():
    openai = registry.build("openai", account())
    assert isinstance(openai, Compatible)
    assert openai.flavour.max_tokens_field == "max_completion_tokens"
    options = {"max_tokens_field": "max_tokens", "stream_usage": False}
    openai = registry.build("openai", account(options=options))
    assert openai.flavour.max_tokens_field == "max_tokens"
    assert not openai.flavour.stream_usage


@pytest.mark.parametrize(
    ("adapter", "options", "words"),
    [
        ("compatible", {"nope": 1}, "unknown option 'nope' of compatible: there are headers, max"),
        ("anthropic", {"api_version": "x"}, "unknown option 'api_version' of anthropic"),
        ("anthropic", {"version": "latest"}, "option 'version' of anthropic must be a date"),
        ("anthropic", {"version": 20261021}, "option 'version'"),
        ("anthropic", {"max_tokens": 0}, "option 'max_tokens' of anthropic must be a number"),
        ("anthropic", {"max_tokens": True}, "option 'max_tokens'"),
        ("openai", {"max_tokens_field": "n"}, "max_tokens or max_completion_tokens"),
        ("openai", {"stream_usage": "yes"}, "option 'stream_usage'"),
        ("openai", {"organization": ""}, "option 'organization'"),
        ("openai", {"project": "a\nb"}, "option 'project'"),
        ("azure", {"deployments": True}, "needs 'api_version'"),
        ("openai", {"headers": {"Authorization": "Bearer x"}}, "option 'headers'"),
        ("openai", {"headers": {"X-A": "a\r\nb"}}, "option 'headers'"),
        ("openai", {"headers": {"X A": "a"}}, "option 'headers'"),
        ("openai", {"headers": {1: "a"}}, "option 'headers'"),
        ("openai", {"headers": []}, "option 'headers'"),
    ],
)
def test_options_that_are_refused(adapter, options, words):
    with pytest.raises(ValueError, match=words):
        registry.check_options(adapter, options)
    with pytest.raises(ValueError, match=words):
        registry.build(adapter, account(options=options))


def test_options_that_are_taken():
    registry.check_options("azure", {"deployments": True, "api_version": "2024-10-21"})
    registry.check_options("anthropic", {"version": "2023-06-01", "max_tokens": 4096})
    registry.check_options("openai", {"headers": {"X-A": "b"}, "organization": "o", "project": "p"})


@pytest.mark.parametrize(
    "url",
    [
        "", "example.com", "ftp://example.com", "https://", "https://u:p@example.com",
        "https://example.com/?a=b", "https://example.com/#x", "https://exa mple.com",
        "https://example.com/\n", "https://[::1", "https://example.com:99999",
    ],
)  # fmt: skip
def test_base_urls_that_are_refused(url):
    with pytest.raises(ValueError, match="base URL"):
        registry.build("compatible", account(base_url=url))


def test_an_adapter_must_say_what_it_does():
    bare = Provider(account())
    request = Request(model="m", messages=())
    for call in (
        lambda: bare.unsupported(request),
        lambda: bare.complete(request, Exchange()),
        lambda: bare.stream(request, Exchange()),
        lambda: bare.embed(EmbeddingRequest(model="m", inputs=()), Exchange()),
    ):
        with pytest.raises(NotImplementedError):
            call()
