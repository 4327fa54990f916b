"""What MCP servers offer as tools. The client itself is in `mcp_client`, which is imported at the
first use: it is large.

What a server says is untrusted: its words are text for the model, its schemas fetch nothing, and
its patterns, which could take for ever, are not used.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import orjson

from llmtasks.models import McpServer, McpTool
from llmtasks.tools.registry import Tool, ToolError

MAX_SCHEMA_BYTES = 100_000
UNUSED = ("pattern", "patternProperties")


@dataclass(frozen=True, slots=True)
class Offered:
    """What a server says of a tool."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    result_schema: Mapping[str, Any] | None

    @property
    def content(self) -> dict[str, Any]:
        return {
            "description": self.description,
            "parameters": self.parameters,
            "result_schema": self.result_schema,
        }

    @property
    def hash(self) -> str:
        text = orjson.dumps([self.name, self.content], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(text).hexdigest()


class NotAsPinned(ToolError):
    """The server offers something else than what was confirmed; None: nothing of that name."""

    def __init__(self, name: str, offered: Offered | None) -> None:
        what = "is not offered by its server any more" if offered is None else "was changed"
        super().__init__(f"{name} {what}: a person has to look at it")
        self.offered = offered


def offered_by(server: McpServer) -> list[Offered]:
    """The tools that a server offers. Raises `ToolError`, `ToolFault`."""
    from llmtasks.tools import mcp_client

    return mcp_client.offered_by(server)


def call(row: McpTool, values: Mapping[str, Any]) -> Any:
    """Call a tool. Raises `ToolError` (`NotAsPinned`), `ToolFault`."""
    from llmtasks.tools import mcp_client

    return mcp_client.call(row, values)


def name_of(row: McpTool) -> str:
    """The name that models call it by. A server's name has no `_`, so that the first tells."""
    return f"{row.server.name}_{re.sub('[^A-Za-z0-9_-]', '_', row.name)}"


def tool_of(row: McpTool, run: Callable[[McpTool, Mapping[str, Any]], Any] = call) -> Tool:
    """The row as a tool, as it is pinned. Raises ValueError where it can't be one."""
    parameters = without_patterns(row.pinned.get("parameters"))
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise ValueError("the schema of its arguments is no object's")
    if len(orjson.dumps(parameters)) > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema of its arguments is larger than {MAX_SCHEMA_BYTES} bytes")
    try:
        jsonschema.Draft202012Validator.check_schema(parameters)
    except jsonschema.SchemaError as error:
        raise ValueError(f"the schema of its arguments is wrong: {error.message[:300]}") from None
    tool = Tool(
        name=name_of(row),
        version=1,
        description=row.pinned.get("description", ""),
        parameters=parameters,
        run=lambda values: run(row, values),
        critical=row.critical,
        idempotent=row.idempotent,
        needs_approval=row.needs_approval,
        timeout_s=row.server.timeout_s,
        retries=row.retries if row.idempotent else 0,
        per_minute=row.per_minute,
        concurrency=row.concurrency,
        scopes=frozenset(row.scopes),
        max_result_bytes=row.server.max_result_bytes,
    )
    tool.check()
    return tool


def without_patterns(schema: Any) -> Any:
    """Regular expressions from outside can take for ever; the server checks its own."""
    if isinstance(schema, list):
        return [without_patterns(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            made[name] = {key: without_patterns(each) for key, each in value.items()}
        elif name not in UNUSED:
            made[name] = without_patterns(value)
    return made
