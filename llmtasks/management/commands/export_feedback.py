"""`manage.py export_feedback`: a tenant's tasks with what was thought of them, as lines of JSON."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError, CommandParser

from llmtasks import feedback
from llmtasks.models import Tenant


class Command(BaseCommand):
    help = "Write a tenant's tasks with feedback as JSONL, the oldest first."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("tenant", metavar="TENANT")
        parser.add_argument("--after", metavar="TIME", help="tasks made from then on, ISO 8601")
        parser.add_argument("--before", metavar="TIME", help="tasks made before then")
        parser.add_argument("--output", metavar="FILE", help="default: standard output")

    def handle(self, *args: Any, tenant: str, **options: Any) -> None:
        owner = Tenant.objects.filter(name=tenant).first()
        if owner is None:
            raise CommandError(f"there is no tenant {tenant!r}")
        first = first_id("--after", options["after"], feedback.FIRST)
        before = first_id("--before", options["before"], feedback.LAST)
        lines = feedback.exported(owner.id, first, before)
        if options["output"]:
            with Path(options["output"]).open("wb") as file:
                file.writelines(lines)
            return
        for text in lines:
            self.stdout.write(text.decode(), ending="")


def first_id(name: str, text: str | None, default: UUID) -> UUID:
    """The smallest id of the moment; a time without an offset is UTC."""
    if text is None:
        return default
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(f"{name}: give a time, like 2030-01-31T12:00:00Z") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return UUID(int=min(max(int(moment.timestamp() * 1000), 0), 2**48 - 1) << 80)
