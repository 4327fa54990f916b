"""`manage.py sandbox`: a vendor of our own on loopback, steered by model name."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from providers import sandbox


class Command(BaseCommand):
    help = "Serve the sandbox vendor: OpenAI's and Anthropic's wire formats, without a model."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, default=8089)

    def handle(self, **options: Any) -> None:
        sandbox.serve(options["host"], options["port"])
