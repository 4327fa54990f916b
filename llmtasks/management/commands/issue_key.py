"""`manage.py issue_key`: an API key, whose secret is shown this once."""

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from llmtasks.management.configure import put
from llmtasks.models import ApiKey, Scope, Tenant
from llmtasks.models.tenancy import all_tools
from llmtasks.tools.registry import registry


class Command(BaseCommand):
    help = "Issue an API key. Its secret goes to standard output, once; it can't be shown again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("tenant", metavar="TENANT")
        parser.add_argument("name", metavar="NAME", help="what the key is for")
        parser.add_argument(
            "--scope",
            action="append",
            help=f"{', '.join(Scope.values)}, or one that a tool asks for; repeatable;"
            " default: all of ours",
        )
        parser.add_argument(
            "--tool",
            action="append",
            help="a tool that it may use: a name, name@version, or shop_*; repeatable; default: *",
        )
        parser.add_argument("--create-tenant", action="store_true", help="where there is none")

    @transaction.atomic
    def handle(self, *args: Any, tenant: str, name: str, **options: Any) -> None:
        owner = self.tenant(tenant, may_create=options["create_tenant"])
        scopes = list(dict.fromkeys(options["scope"] or Scope.values))
        tools = list(dict.fromkeys(options["tool"] or all_tools()))
        known = {*Scope.values, *(scope for tool in registry.all() for scope in tool.scopes)}
        if unknown := [scope for scope in scopes if scope not in known]:
            raise CommandError(f"--scope {unknown[0]}: there is {', '.join(sorted(known))}")
        key, secret = ApiKey.issue(owner, name, scopes=scopes, tools=tools)
        try:
            key.full_clean()
        except ValidationError as error:
            where = "--tool" if "tools" in error.message_dict else "NAME"
            raise CommandError(f"{where}: {' '.join(error.messages)}") from None
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
