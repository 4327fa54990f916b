"""What MCP servers offer, as rows: pinned by hash when it is seen first, and used while its server
offers the same.

The first look at a server pins what it offers: whoever set it up wanted that. What it adds or
changes later waits for a person, who confirms what was shown, told by its hash. What it offers no
more is gone, and is on again when it offers the same again.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from django.db import transaction

from llmtasks import stores
from llmtasks.ledger import ClockTimestamp
from llmtasks.models import McpServer, McpTool
from llmtasks.tools import mcp
from llmtasks.tools.mcp import NotAsPinned, Offered
from llmtasks.tools.registry import Tool, ToolError, ToolFault

log = logging.getLogger(__name__)

State = McpTool.State


@dataclass
class Found:
    """What a look at a server found: names of tools by what became of them; `fault` where it gave
    no list."""

    moved: dict[str, list[str]] = field(default_factory=dict)
    fault: str = ""

    def __str__(self) -> str:
        parts = [f"{state}: {', '.join(sorted(names))}" for state, names in self.moved.items()]
        return self.fault or "; ".join(parts) or "nothing new"


def tool_of(row: McpTool) -> Tool:
    return mcp.tool_of(row, call)


def call(row: McpTool, values: Mapping[str, Any]) -> Any:
    """As `mcp.call`; a tool that is not what was pinned is used no more."""
    try:
        return mcp.call(row, values)
    except NotAsPinned as error:
        note(row, error.offered)
        raise


def note(row: McpTool, offered: Offered | None) -> None:
    """What a call found out. Another process may have been faster, or a person."""
    mine = McpTool.objects.filter(pk=row.pk, state=State.ON, pinned_hash=row.pinned_hash)
    changed = (
        mine.update(state=State.GONE)
        if offered is None
        else mine.update(state=State.CHANGED, offered=offered.content, offered_hash=offered.hash)
    )
    stores.release()
    if changed:
        log.warning("an MCP tool is not what was pinned", extra={"tool": mcp.name_of(row)})


def discover(server: McpServer) -> Found:
    """Look at what the server offers, and write down what is new."""
    stores.release()
    try:
        offered = {each.name: each for each in mcp.offered_by(server)}
    except (ToolError, ToolFault) as error:
        McpServer.objects.filter(pk=server.pk).update(
            looked_at=ClockTimestamp(), fault=str(error)[:2000]
        )
        log.warning(
            "an MCP server gave no tools", extra={"server": server.name, "error": str(error)}
        )
        return Found(fault=str(error))
    found = Found()
    with transaction.atomic():
        # Two looks at once take turns.
        now = McpServer.objects.select_for_update().get(pk=server.pk)
        rows = {row.name: row for row in McpTool.objects.filter(server=now)}
        for name, each in offered.items():
            tell(found, name, seen(now, rows.get(name), each))
        for name in rows.keys() - offered.keys():
            tell(found, name, gone(rows[name]))
        McpServer.objects.filter(pk=now.pk).update(
            looked_at=ClockTimestamp(), discovered_at=ClockTimestamp(), fault=""
        )
    if found.moved:
        log.info("looked at an MCP server", extra={"server": server.name, "found": str(found)})
    return found


def tell(found: Found, name: str, state: str) -> None:
    if state:
        found.moved.setdefault(state, []).append(name)


def seen(server: McpServer, row: McpTool | None, each: Offered) -> str:
    """Write down what the server offers; the tool's new state, empty where nothing changed."""
    content = {"offered": each.content, "offered_hash": each.hash}
    if row is None:
        is_first = server.discovered_at is None
        pinned = {"pinned": each.content, "pinned_hash": each.hash} if is_first else {}
        state = State.ON if is_first else State.NEW
        McpTool.objects.create(server=server, name=each.name, state=state, **content, **pinned)
        return state
    if row.state in (State.ON, State.OFF) and row.pinned_hash == each.hash:
        return ""
    if row.state in (State.NEW, State.CHANGED) and row.offered_hash == each.hash:
        return ""
    state = State.ON if row.pinned_hash == each.hash else State.CHANGED
    if row.state == State.NEW or not row.pinned_hash:
        state = State.NEW
    McpTool.objects.filter(pk=row.pk).update(state=state, **content)
    return state


def gone(row: McpTool) -> str:
    if row.state in (State.GONE, State.OFF):
        return ""
    McpTool.objects.filter(pk=row.pk).update(state=State.GONE)
    return State.GONE


# --- A person's word ------------------------------------------------------------------------------


def confirm(pk: int, offered_hash: str, by: str) -> bool:
    """Pin what the server offers, as it was shown; whether it was still that."""
    row = McpTool.objects.filter(pk=pk, offered_hash=offered_hash).first()
    if row is None:
        return False
    waiting = McpTool.objects.filter(
        pk=pk, offered_hash=offered_hash, state__in=(State.NEW, State.CHANGED)
    )
    return bool(
        waiting.update(
            state=State.ON, pinned=row.offered, pinned_hash=row.offered_hash,
            confirmed_by=by, confirmed_at=ClockTimestamp(),
        )
    )  # fmt: skip


def switch(rows: Any, *, on: bool) -> int:
    """Switch tools off, or those that are off on again; how many."""
    before, after = (State.OFF, State.ON) if on else (State.ON, State.OFF)
    return int(rows.filter(state=before).exclude(pinned_hash="").update(state=after))
