"""Tools that are rows, read once per version of the configuration."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from django.db import OperationalError

from llmtasks import pulse, stores
from llmtasks.models import HttpTool, McpTool
from llmtasks.tools import http, pins
from llmtasks.tools.registry import Tool

log = logging.getLogger(__name__)

Row = TypeVar("Row", HttpTool, McpTool)


# Documents are large, and most changes of the configuration are of something else: rows are read
# where one of them is another than it was.
MARKS = """
SELECT 'http', id, xmin::text FROM llmtasks_httptool UNION ALL
SELECT 'server', id, xmin::text FROM llmtasks_mcpserver UNION ALL
SELECT 'tool', id, xmin::text FROM llmtasks_mcptool ORDER BY 1, 2
"""

Marks = list[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    version: int
    marks: Marks
    tools: Mapping[str, Mapping[int, Tool]]


_snapshot: Snapshot | None = None
_lock = threading.Lock()


def tools() -> Mapping[str, Mapping[int, Tool]]:
    """Name → version → tool. Raises `OperationalError` when Postgres is away for longer than the
    last rows may be used."""
    global _snapshot
    known, version = _snapshot, pulse.config_version()
    if known is not None and known.version == version:
        if pulse.config_is_fresh():
            return known.tools
        raise OperationalError("the tools are too old: Postgres is away")
    with stores.reading(_lock):
        if _snapshot is None or _snapshot.version != version:
            marks = stores.fetch(MARKS)
            old = _snapshot
            found = old.tools if old is not None and old.marks == marks else read()
            _snapshot = Snapshot(version, marks, found)
            stores.release()
        return _snapshot.tools


def read() -> dict[str, dict[int, Tool]]:
    found: dict[str, dict[int, Tool]] = {}
    for tool in (*usable(http_rows(), http.tool_of), *usable(mcp_rows(), pins.tool_of)):
        if found.setdefault(tool.name, {}).setdefault(tool.version, tool) is not tool:
            log.error("there are two tools of this name", extra={"tool": tool.reference})
    return found


def http_rows() -> Iterable[HttpTool]:
    return HttpTool.objects.filter(is_active=True)


def mcp_rows() -> Iterable[McpTool]:
    rows = McpTool.objects.select_related("server").order_by("server__name", "name")
    return rows.filter(state=McpTool.State.ON, server__is_active=True)


def usable(rows: Iterable[Row], tool_of: Callable[[Row], Tool]) -> Iterator[Tool]:
    for row in rows:
        try:
            tool = tool_of(row)
            tool.check()
        except ValueError as error:
            # One that is set up wrongly must not take the others down.
            log.error("a tool can't be used", extra={"tool": str(row), "error": str(error)})
        else:
            yield tool
