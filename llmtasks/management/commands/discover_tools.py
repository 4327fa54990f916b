"""`manage.py discover_tools`: look at what MCP servers offer."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from llmtasks.models import McpServer
from llmtasks.tools import pins


class Command(BaseCommand):
    help = "Look at what MCP servers offer. What is new or changed waits for a person."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("names", metavar="SERVER", nargs="*", help="default: all that are on")

    def handle(self, *args: Any, names: list[str], **options: Any) -> None:
        servers = McpServer.objects.filter(is_active=True)
        if names:
            servers = McpServer.objects.filter(name__in=names)
            if unknown := set(names) - {server.name for server in servers}:
                raise CommandError(f"there is no MCP server {', '.join(sorted(unknown))}")
        failed = []
        for server in servers:
            found = pins.discover(server)
            self.stdout.write(f"{server.name}: {found}")
            failed += [server.name] if found.fault else []
        if failed:
            raise CommandError(f"no list of tools came from {', '.join(failed)}")
