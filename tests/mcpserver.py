"""An MCP server of the tests' own, a process: over HTTP on loopback, or stdin and stdout.

    python -m tests.mcpserver http CONTROL
    python -m tests.mcpserver stdio CONTROL

CONTROL is a JSON file that is read at every request: `{"tools": {name: {…}}, "hang": true}` lays
changes over what is offered, or has lists hang. Calls are written to CONTROL.calls, the port to
CONTROL.port.
"""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import anyio
import mcp_types as types
import orjson
import uvicorn
from mcp.server.lowlevel.server import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError

ANYTHING: dict[str, Any] = {"type": "object"}
ORDER = {
    "type": "object",
    "properties": {"number": {"type": "string", "pattern": "^(a+)+$"}},
    "required": ["number"],
}
FOUND = {"type": "object", "properties": {"state": {"type": "string"}}, "required": ["state"]}

TOOLS: dict[str, dict[str, Any]] = {
    "find.order": {
        "description": "Look an order up.", "input_schema": ORDER, "output_schema": FOUND,
    },
    "say": {"description": "Say it.", "input_schema": ANYTHING},
    "fails": {"description": "Fails.", "input_schema": ANYTHING},
    "refuses": {"description": "Refuses.", "input_schema": ANYTHING},
    "hangs": {"description": "Hangs.", "input_schema": ANYTHING},
    "dies": {"description": "Dies.", "input_schema": ANYTHING},
    "floods": {"description": "Floods.", "input_schema": ANYTHING},
    "lies": {"description": "Lies.", "input_schema": ANYTHING, "output_schema": FOUND},
    "variables": {"description": "What it was given.", "input_schema": ANYTHING},
}  # fmt: skip


def control(path: Path) -> dict[str, Any]:
    return orjson.loads(path.read_bytes()) if path.exists() else {}


def tools(path: Path) -> list[types.Tool]:
    changes = control(path).get("tools", {})
    names = [*TOOLS, *(name for name in changes if name not in TOOLS)]
    found = []
    for name in names:
        given = changes.get(name, {})
        if given is not None:
            found.append(
                types.Tool(name=name, **({"input_schema": ANYTHING} | TOOLS.get(name, {}) | given))
            )
    return found


async def result(name: str, arguments: dict[str, Any]) -> types.CallToolResult:
    text, structured = "done", None
    if name == "find.order":
        structured = {"state": f"order {arguments['number']} is on its way"}
    elif name == "say":
        text, structured = str(arguments.get("text")), arguments.get("structured")
    elif name == "fails":
        content = [types.TextContent(type="text", text="the warehouse is closed")]
        return types.CallToolResult(content=content, is_error=True)
    elif name == "refuses":
        raise MCPError(-32000, "I would rather not")
    elif name == "hangs":
        await anyio.sleep(60)
    elif name == "dies":
        os._exit(3)
    elif name == "floods":
        text = "x" * 3_000_000
    elif name == "lies":
        structured = {"state": 7}
    elif name == "variables":
        text = orjson.dumps(dict(os.environ)).decode()
    content = [types.TextContent(type="text", text=text)]
    return types.CallToolResult(content=content, structured_content=structured)


def server(path: Path) -> Server[Any]:
    async def on_list(ctx: Any, params: Any) -> types.ListToolsResult:
        if control(path).get("hang"):
            await anyio.sleep(60)
        return types.ListToolsResult(tools=tools(path))

    async def on_call(ctx: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        with Path(f"{path}.calls").open("a") as calls:
            calls.write(f"{params.name}\n")
        return await result(params.name, params.arguments or {})

    return Server("tests", version="1", on_list_tools=on_list, on_call_tool=on_call)


async def over_stdio(path: Path) -> None:
    made = server(path)
    async with stdio_server() as (reads, writes):
        await made.run(reads, writes, made.create_initialization_options())


def put(path: str, data: bytes) -> None:
    """Whoever reads it meanwhile finds all of it, or what was there before."""
    Path(f"{path}.new").write_bytes(data)
    os.replace(f"{path}.new", path)


class Headers:
    """Notes what callers send, in CONTROL.headers."""

    def __init__(self, app: Any, path: Path) -> None:
        self.app = app
        self.path = path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            found = {name.decode(): value.decode() for name, value in scope["headers"]}
            put(f"{self.path}.headers", orjson.dumps(found))
        await self.app(scope, receive, send)


def main() -> None:
    if sys.argv[1] == "stdio":
        anyio.run(over_stdio, Path(sys.argv[2]))
        return
    path = Path(sys.argv[2])
    app = Headers(server(path).streamable_http_app(), path)
    # One that nobody else has: what is free at a look may be taken a moment later.
    listening = socket.create_server(("127.0.0.1", 0))
    put(f"{path}.port", str(listening.getsockname()[1]).encode())
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run([listening])


if __name__ == "__main__":
    main()
