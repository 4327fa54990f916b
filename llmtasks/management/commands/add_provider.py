"""`manage.py add_provider`: a vendor's account and the routes that lead to it."""

import json
from typing import Any

from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from llmtasks import routing
from llmtasks.management.configure import put_candidate, put_provider
from llmtasks.models import Price, Provider, Route
from providers import registry

# The model's field → what the caller gave for it.
FLAGS = {
    "name": "NAME",
    "adapter": "--adapter",
    "base_url": "--base-url",
    "credential": "--key",
    "options": "--option",
    "price_family": "--price-family",
    "position": "--position",
}


class Command(BaseCommand):
    help = (
        "Add a vendor's account, or change it where a flag says so, and append it to routes. "
        "In force in running processes within a second."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", metavar="NAME", help="part of queue names: it never changes")
        parser.add_argument("--adapter", help=f"needed for a new one: {each(registry.adapters())}")
        parser.add_argument("--base-url", help="default: the adapter's, where it has one")
        parser.add_argument(
            "--key",
            metavar="env:NAME|file:PATH",
            help="where the servers find the vendor's key, never the key itself",
        )
        for flag, kind in (("--route", "chat"), ("--embedding-route", "embeddings")):
            parser.add_argument(
                flag,
                metavar="ALIAS=MODEL",
                action="append",
                default=[],
                help=f"clients' name of the vendor's model, for {kind}; repeatable",
            )
        parser.add_argument(
            "--option",
            metavar="NAME=VALUE",
            action="append",
            default=[],
            help="an option of the adapter; JSON, or else text; repeatable",
        )
        parser.add_argument("--price-family", help="whose prices hold; default: NAME")
        parser.add_argument(
            "--position", type=int, help="place among a route's candidates; default: the last"
        )

    @transaction.atomic
    def handle(self, *args: Any, name: str, **options: Any) -> None:
        try:
            provider, done = put_provider(name, values(options))
        except ValidationError as error:
            raise CommandError(told(error)) from None
        self.stdout.write(f"provider {provider.name}: {done}")
        self.warn_of_credential(provider)
        for flag, kind in (("route", Route.Kind.CHAT), ("embedding_route", Route.Kind.EMBEDDING)):
            for text in options[flag]:
                self.add_route(provider, f"--{flag.replace('_', '-')}", text, kind, options)

    def add_route(
        self, provider: Provider, flag: str, text: str, kind: str, options: dict[str, Any]
    ) -> None:
        alias, model = pair(flag, text, "ALIAS=MODEL")
        try:
            candidate, done = put_candidate(provider, alias, model, kind, options["position"])
        except ValidationError as error:
            raise CommandError(f"{flag} {text}: {told(error)}") from None
        except CommandError as error:
            raise CommandError(f"{flag} {text}: {error}") from None
        self.stdout.write(f"route {candidate}, position {candidate.position}: {done}")
        family = provider.price_family or provider.name
        if not Price.objects.filter(family=family, model=model).exists():
            self.stdout.write(
                f"  no price for {family}/{model}: its calls show as unpriced until the admin "
                "has one"
            )

    def warn_of_credential(self, provider: Provider) -> None:
        if provider.credential and routing.resolve(provider.credential) is None:
            self.stdout.write(
                f"  {provider.credential} leads to no key here: set it where the servers run"
            )


def each(words: tuple[str, ...]) -> str:
    return ", ".join(words)


def values(options: dict[str, Any]) -> dict[str, Any]:
    """The provider's fields that flags were given for."""
    given = {
        "adapter": options["adapter"],
        "base_url": options["base_url"],
        "credential": options["key"],
        "price_family": options["price_family"],
        "options": dict(option(text) for text in options["option"]) or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def option(text: str) -> tuple[str, Any]:
    name, value = pair("--option", text, "NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def pair(flag: str, text: str, shape: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise CommandError(f"{flag} {text!r}: give {shape}")
    return left, right


def told(error: ValidationError) -> str:
    """The faults, each after the flag that is to be changed."""
    if not hasattr(error, "error_dict"):
        return " ".join(error.messages)
    lines = []
    for name, messages in error.message_dict.items():
        label = "" if name == NON_FIELD_ERRORS else f"{FLAGS.get(name, name)}: "
        lines.append(label + " ".join(messages))
    return "\n".join(lines)
