"""Which tools a tenant and a key may use: read once per version of the configuration, as keys are.

A tenant's and a key's list hold names: `find_order` (every version), `find_order@2`, or a
beginning, `shop_*`. Both have to name a tool, and the key's scopes have to hold those that the tool
asks for. A key that was revoked begins nothing more; what it began goes on with its tools.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from llmtasks import pulse, stores
from llmtasks.models import ApiKey, Scope, Tenant
from llmtasks.tools.registry import Tool

MOST_KNOWN = 10_000

Who = tuple[UUID, UUID | None]


@dataclass(frozen=True, slots=True)
class Allowance:
    """`key` and `scopes` are None for work that no key asked for."""

    tenant: tuple[str, ...]
    key: tuple[str, ...] | None = None
    scopes: frozenset[str] | None = None

    def fault(self, tool: Tool) -> str:
        """Why the tool may not be used; empty where it may."""
        if not names(self.tenant, tool):
            return f"the tenant may not use {tool.name}"
        if self.key is not None and not names(self.key, tool):
            return f"the API key may not use {tool.name}"
        missing = (
            sorted({Scope.TOOLS.value, *tool.scopes} - self.scopes)
            if self.scopes is not None
            else []
        )
        return (
            f"the API key lacks the scope {missing[0]!r} that {tool.name} needs" if missing else ""
        )


NOTHING = Allowance(())


def names(patterns: Sequence[str], tool: Tool) -> bool:
    return any(
        tool.name.startswith(pattern[:-1])
        if pattern.endswith("*")
        else pattern in (tool.name, tool.reference)
        for pattern in patterns
    )


_known: dict[Who, Allowance] = {}
_version = -1
_lock = threading.Lock()


def of(tenant_id: UUID, key_id: UUID | None) -> Allowance:
    """What they may use. Raises `OperationalError`: Postgres is away, and nothing is known."""
    global _known, _version
    version = pulse.config_version()
    if version != _version:
        with _lock:
            _known, _version = {}, version
    who = (tenant_id, key_id)
    found = _known.get(who)
    if found is not None and pulse.config_is_fresh():
        return found
    found = read(tenant_id, key_id)
    stores.release()
    with _lock:
        # A version that changed meanwhile emptied what was known: this may be older.
        if _version == version:
            if len(_known) >= MOST_KNOWN:
                _known = {}
            _known[who] = found
    return found


def read(tenant_id: UUID, key_id: UUID | None) -> Allowance:
    tenant = Tenant.objects.filter(id=tenant_id).only("tools").first()
    if tenant is None:
        return NOTHING
    if key_id is None:
        return Allowance(tuple(tenant.tools))
    key = ApiKey.objects.filter(id=key_id, tenant_id=tenant_id).only("tools", "scopes").first()
    if key is None:
        return NOTHING
    return Allowance(tuple(tenant.tools), tuple(key.tools), frozenset(key.scopes))


def fault(tool: Tool, tenant_id: UUID, key_id: UUID | None) -> str:
    """Why they may not use the tool; empty where they may. Raises `OperationalError`."""
    return of(tenant_id, key_id).fault(tool)
