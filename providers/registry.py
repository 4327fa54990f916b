"""Which adapters there are. An OpenAI-compatible server is a row, any other vendor a module.

A new row names its `Flavour` in `SERVERS`; a new module its dotted path in `MODULES`.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, Final
from urllib.parse import urlsplit

from providers.base import Account, Provider

# Adapter → where its class is. Imported when first built.
MODULES: Final[Mapping[str, str]] = {
    "anthropic": "providers.anthropic.Anthropic",
    "compatible": "providers.compatible.Compatible",
}

# OpenAI-compatible server → its `compatible.Flavour`. What each lacks or names differently:
# OpenAI deprecates `max_tokens`, its reasoning models refuse it (openai SDK,
# `types/chat/completion_create_params.py`); Azure authenticates by `api-key` (openai SDK,
# `lib/azure.py`); Ollama lists no `logit_bias`
# (https://docs.ollama.com/api/openai-compatibility), a knob that it passes over.
SERVERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "azure": {"key_header": "api-key", "max_tokens_field": "max_completion_tokens"},
    "ollama": {},
    "openai": {"max_tokens_field": "max_completion_tokens"},
    "vllm": {},
}

# Where an account without a base URL goes. Azure's is each customer's own.
BASE_URLS: Final[Mapping[str, str]] = {
    "anthropic": "https://api.anthropic.com",
    "ollama": "http://127.0.0.1:11434/v1",
    "openai": "https://api.openai.com/v1",
    "vllm": "http://127.0.0.1:8000/v1",
}


def adapters() -> tuple[str, ...]:
    return tuple(sorted((*MODULES, *SERVERS)))


def adapter_class(adapter: str) -> type[Provider]:
    """Raises `ValueError` for an unknown adapter, naming those there are."""
    if adapter not in MODULES and adapter not in SERVERS:
        raise ValueError(f"unknown adapter {adapter!r}: there are {', '.join(adapters())}")
    module, _, name = MODULES["compatible" if adapter in SERVERS else adapter].rpartition(".")
    found: type[Provider] = getattr(import_module(module), name)
    return found


def build(adapter: str, account: Account) -> Provider:
    """The adapter for `account`. Raises `ValueError` for what is wrong in its configuration."""
    kind = adapter_class(adapter)
    account = replace(account, base_url=account.base_url or BASE_URLS.get(adapter, ""))
    check_options(adapter, account.options)
    check_base_url(adapter, account.base_url)
    if adapter not in SERVERS:
        return kind(account)
    compatible = import_module("providers.compatible")
    provider: Provider = compatible.Compatible(account, compatible.Flavour(**SERVERS[adapter]))
    return provider


def check_options(adapter: str, options: Mapping[str, Any]) -> None:
    """Raises `ValueError` that names the first option that is unknown or not valid."""
    known = adapter_class(adapter).options
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"unknown option {name!r} of {adapter}: there are {', '.join(known)}")
        if not known[name].valid(value):
            raise ValueError(f"option {name!r} of {adapter} must be {known[name].wanted}")
    if options.get("deployments") and not options.get("api_version"):
        raise ValueError(f"option 'deployments' of {adapter} needs 'api_version' beside it")


def check_base_url(adapter: str, url: str) -> None:
    """Raises `ValueError` for what is no plain http or https URL."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        plain = False
    if not plain:
        raise ValueError(f"base URL of {adapter} must begin with http:// or https:// and a host")
    if parts.username or parts.password:
        raise ValueError(f"base URL of {adapter} must not hold a credential")
    if parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ValueError(f"base URL of {adapter} must not hold a query, a fragment or white space")
