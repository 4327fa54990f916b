"""A warehouse as an MCP server: what is in stock, and reservations.

Over stdin and stdout, or with a port over HTTP on loopback:

    python examples/mcp_server/server.py
    python examples/mcp_server/server.py 8900
"""

import sys
from typing import Annotated

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

STOCK = {"chair": 12, "table": 3, "lamp": 0}

server = MCPServer("warehouse")


class Stock(BaseModel):
    item: str
    pieces: int


@server.tool()
def find_stock(item: Annotated[str, Field(description="As in the catalogue: chair")]) -> Stock:
    """How many pieces of an item are in stock."""
    if item not in STOCK:
        raise ToolError(f"there is no {item}: there are {', '.join(STOCK)}")
    return Stock(item=item, pieces=STOCK[item])


@server.tool()
def reserve(item: str, pieces: Annotated[int, Field(ge=1)]) -> str:
    """Put pieces of an item aside."""
    left = STOCK.get(item, 0)
    if pieces > left:
        raise ToolError(f"there are {left} pieces of {item} only")
    return f"{pieces} × {item} put aside"  # noqa: RUF001 - as it is written


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
