"""`manage.py issue_key`: an API key, whose secret is shown this once."""

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from llmtasks.management.configure import put
from llmtasks.models import ApiKey, Scope, Tenant


class Command(BaseCommand):
    help = "Issue an API key. Its secret goes to standard output, once; it can't be shown again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("tenant", metavar="TENANT")
        parser.add_argument("name", metavar="NAME", help="what the key is for")
        parser.add_argument(
            "--scope",
            choices=Scope.values,
            action="append",
            help="what it may do; repeatable; default: everything",
        )
        parser.add_argument("--create-tenant", action="store_true", help="where there is none")

    @transaction.atomic
    def handle(self, *args: Any, tenant: str, name: str, **options: Any) -> None:
        owner = self.tenant(tenant, may_create=options["create_tenant"])
        scopes = list(dict.fromkeys(options["scope"] or Scope.values))
        key, secret = ApiKey.issue(owner, name, scopes=scopes)
        try:
            key.full_clean()
        except ValidationError as error:
            raise CommandError(f"NAME: {' '.join(error.messages)}") from None
        key.save()
        self.stderr.write(f"{key} of {owner.name} may {', '.join(scopes)}; keep the secret:")
        self.stdout.write(secret)

    def tenant(self, name: str, *, may_create: bool) -> Tenant:
        if not may_create:
            found = Tenant.objects.filter(name=name).first()
            if found is None:
                raise CommandError(f"there is no tenant {name!r}: --create-tenant makes it")
            return found
        try:
            return put(Tenant, {}, name=name)[0]
        except ValidationError as error:
            raise CommandError(f"TENANT: {' '.join(error.messages)}") from None
