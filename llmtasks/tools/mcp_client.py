"""Calls of MCP servers, through the official client. Each has a connection (or a process) and an
event loop of its own, which its timeout ends whatever the server does.

    connect → list: is the tool still what was pinned? → call → text
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import orjson
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from pydantic import ValidationError

from llmtasks import routing
from llmtasks.bodies import replaced
from llmtasks.models import McpServer, McpTool
from llmtasks.network import may_reach
from llmtasks.tools import http, mcp_http
from llmtasks.tools.mcp import NotAsPinned, Offered, name_of, without_patterns
from llmtasks.tools.registry import ToolError, ToolFault
from llmtasks.tools.run import fault_of
from providers import wire
from providers.base import Account
from providers.errors import AuthenticationFailed

MAX_TOOLS = 500
MAX_NAME = 128
MAX_PAGES = 20
# A look at what is offered takes no longer: others wait for their turn.
LOOK_S = 30.0
# Of an answer, framing and escapes beside the result itself.
FRAMING_BYTES = 1_000_000
ERROR_SHOWN = 2000
INVALID_PARAMS = -32602

T = TypeVar("T")


def offered_by(server: McpServer) -> list[Offered]:
    """The tools that a server offers. Raises `ToolError`, `ToolFault`."""

    async def work(client: Client) -> list[Offered]:
        return await listed(client)

    return run(server, work, min(server.timeout_s, LOOK_S))


def call(row: McpTool, values: Mapping[str, Any]) -> Any:
    """Call a tool. Raises `ToolError` (`NotAsPinned`), `ToolFault`."""

    async def work(client: Client) -> Any:
        found = next((each for each in await listed(client) if each.name == row.name), None)
        if found is None or found.hash != row.pinned_hash:
            raise NotAsPinned(name_of(row), found)
        # Its own check would use the server's patterns, which can hold up the whole process.
        vars(client.session)["validate_tool_result"] = nothing_checked
        return parts_of(await client.call_tool(row.name, dict(values)))

    return value_of(row, run(row.server, work, http.time_of(row.server)))


async def nothing_checked(name: str, result: Any) -> None:
    """In place of the session's check of results: `value_of` does it."""


# --- One connection -------------------------------------------------------------------------------


def run(server: McpServer, work: Callable[[Client], Awaitable[T]], seconds: float) -> T:
    """Connect and do the work, within so many seconds. Raises `ToolError`, `ToolFault`."""
    secrets = secrets_of(server)

    async def timed() -> T:
        with anyio.fail_after(seconds):
            async with connected(server, secrets, seconds) as client:
                return await work(client)

    try:
        return shown(anyio.run(timed), secrets.values())
    except Exception as error:  # noqa: BLE001 - whatever a server makes of its client is its fault
        raise explained(server, error, secrets.values(), seconds) from None


def secrets_of(server: McpServer) -> dict[str, str]:
    """The secrets that the server gets: by variable, or under "" for HTTP. Raises `ToolError`."""
    if server.transport == McpServer.Transport.HTTP:
        return {"": http.secret_of(server)}
    found = {name: routing.resolve(place) for name, place in server.environment.items()}
    for name, value in found.items():
        if value is None:
            place = server.environment[name]
            raise ToolError(f"{server.name} is not set up: {name}: {place} leads to no secret")
    return {name: value for name, value in found.items() if value is not None}


@asynccontextmanager
async def connected(
    server: McpServer, secrets: Mapping[str, str], seconds: float
) -> AsyncIterator[Client]:
    if server.transport == McpServer.Transport.STDIO:
        program, *arguments = server.command
        parameters = StdioServerParameters(command=program, args=arguments, env=dict(secrets))
        with open(os.devnull, "w") as nowhere:
            async with Client(stdio_client(parameters, nowhere), cache=None) as client:
                yield client
        return
    account = Account(name=server.name, base_url=server.url, api_key=secrets[""])
    transport = mcp_http.Transport(may_reach, server.max_result_bytes + FRAMING_BYTES)
    try:
        headers = http.auth(server, account)
        async with mcp_http.client(transport, headers, seconds) as over:
            async with Client(
                streamable_http_client(server.url, http_client=over), cache=None
            ) as client:
                yield client
    except Exception:
        if transport.fault is not None:
            raise transport.fault from None
        raise


async def listed(client: Client) -> list[Offered]:
    """Everything that the server offers, page by page."""
    found: dict[str, Offered] = {}
    cursor = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            one = Offered(
                wire.clean(tool.name), wire.clean(tool.description or ""),
                replaced(tool.input_schema), replaced(tool.output_schema),
            )  # fmt: skip
            if found.setdefault(one.name, one) is not one or len(found) > MAX_TOOLS:
                raise ToolFault(f"it offers two tools of one name, or more than {MAX_TOOLS}")
            if len(one.name) > MAX_NAME:
                raise ToolFault(f"the name of a tool is longer than {MAX_NAME} characters")
        cursor = page.next_cursor
        if cursor is None:
            return list(found.values())
    raise ToolFault(f"its list of tools has more than {MAX_PAGES} pages")


def value_of(row: McpTool, result: Mapping[str, Any]) -> Any:
    """What a call gave: its structured content, checked against what is pinned, else its texts.
    Raises `ToolError`, `ToolFault`."""
    if result["is_error"]:
        raise ToolError(result["text"][:ERROR_SHOWN] or "the tool failed")
    structured, schema = result["structured"], row.pinned.get("result_schema")
    if schema is not None:
        if fault := fault_of(without_patterns(schema), structured):
            raise ToolFault(f"{name_of(row)}: its schema forbids its result: {fault}", "BadResult")
    return result["text"] if structured is None else structured


def parts_of(result: Any) -> dict[str, Any]:
    return {
        "is_error": bool(result.is_error),
        "text": "\n".join(text_of(part) for part in result.content),
        "structured": result.structured_content,
    }


def text_of(part: Any) -> str:
    if part.type == "text":
        return str(part.text)
    if part.type == "resource" and getattr(part.resource, "text", None) is not None:
        return str(part.resource.text)
    return f"[{part.type}: not shown]"


# --- What went wrong ------------------------------------------------------------------------------


def shown(value: T, secrets: Iterable[str]) -> T:
    """The value without the secrets that its server was given."""
    if isinstance(value, list) and value and isinstance(value[0], Offered):
        return value
    text = orjson.dumps(value)
    for secret in secrets:
        text = http.without(secret, text)
    return wire.parse(text)  # type: ignore[no-any-return]


def explained(
    server: McpServer, error: Exception, secrets: Iterable[str], seconds: float
) -> Exception:
    """The error as the caller is told it: ours as it is, any other as the server's fault."""
    found = list(leaves(error))
    for each in found:
        if isinstance(each, ToolError):
            return each
    for each in found:
        if isinstance(each, ToolFault):
            return ToolFault(f"{server.name}: {each}", each.error)
    if any(isinstance(each, TimeoutError) for each in found):
        return ToolFault(f"{server.name} gave no answer within {seconds:.1f} s", "ToolTimeout")
    text = without_all(words(found[0]), secrets)
    if isinstance(found[0], MCPError) and found[0].error.code == INVALID_PARAMS:
        return ToolError(f"{server.name}: {text}")
    is_result = isinstance(found[0], RuntimeError | ValidationError)
    return ToolFault(f"{server.name}: {text}", "BadResult" if is_result else "ToolFailed")


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors that a group of tasks ended with."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error


def words(error: BaseException) -> str:
    if isinstance(error, AuthenticationFailed):
        return f"it is not set up: {error}"
    if isinstance(error, ValidationError):
        return "it answered with what the protocol forbids"
    text = wire.clean(str(error)).strip()
    return text[:ERROR_SHOWN] or type(error).__name__


def without_all(text: str, secrets: Iterable[str]) -> str:
    found = text.encode()
    for secret in secrets:
        found = http.without(secret, found)
    return found.decode(errors="replace")
