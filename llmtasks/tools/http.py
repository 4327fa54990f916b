"""A tool that is an operation of an HTTP API: one request, and what its answer says."""

import contextlib
from collections.abc import Mapping
from typing import Any

from llmtasks import routing
from llmtasks.models import HttpTool
from llmtasks.models.tools import Reached
from llmtasks.network import may_reach
from llmtasks.tools import openapi
from llmtasks.tools.openapi import Operation
from llmtasks.tools.registry import Tool, ToolError, ToolFault
from llmtasks.tools.run import fault_of, left_s
from providers import http, wire
from providers.base import Account
from providers.errors import AuthenticationFailed, BadResponse, ProviderError, Timeout

CONNECT_TIMEOUT_S = 5.0
MARGIN_S = 0.05
NO_CONTENT = 204
# Of an error's body, what the model sees.
ERROR_SHOWN = 2000
# Shorter secrets would be found in words.
LEAST_SECRET = 8


def tool_of(row: HttpTool) -> Tool:
    """The row as a tool. Raises ValueError for a document that can't be used."""
    operation = openapi.read(row.document, row.operation_id)
    return Tool(
        name=row.name,
        version=row.version,
        description=row.description or operation.description,
        parameters=operation.arguments,
        run=lambda values: run(row, operation, values),
        critical=row.critical,
        idempotent=row.idempotent,
        needs_approval=row.needs_approval,
        timeout_s=row.timeout_s,
        retries=row.retries if row.idempotent else 0,
        per_minute=row.per_minute,
        concurrency=row.concurrency,
        scopes=frozenset(row.scopes),
        max_result_bytes=row.max_result_bytes,
    )


def run(row: HttpTool, operation: Operation, values: Mapping[str, Any]) -> Any:
    """Send the call and read its answer. Raises `BadArguments`, `ToolError`, `ToolFault`."""
    wanted = openapi.call(operation, values)
    secret = secret_of(row)
    seconds = time_of(row)
    account = Account(
        name=row.name, base_url=row.base_url, api_key=secret, connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=seconds, total_timeout=seconds, may_reach=may_reach,
    )  # fmt: skip
    exchange = http.Exchange()
    try:
        headers = {"Accept": "application/json", **auth(row, account)}
        # The credential's header is nobody's argument.
        own = {name.lower() for name in headers} | {row.auth_header.lower()}
        headers |= {k: v for k, v in wanted.headers.items() if k.lower() not in own}
        with http.ask(
            account, operation.method, wanted.path, wanted.payload, headers, exchange
        ) as answer:
            if not 200 <= answer.status <= 299:
                raise refusal(row, answer.status, without(secret, answer.read_error()))
            body = without(secret, read(row, answer))
    except Timeout as error:
        raise ToolFault(f"{row.name}: {error}", "ToolTimeout") from None
    except AuthenticationFailed as error:
        raise ToolError(f"{row.name} is not set up: {error}") from None
    except ProviderError as error:
        raise ToolFault(f"{row.name}: {error}") from None
    kind = answer.headers.get("content-type", "")
    return value_of(row.name, operation, answer.status, kind, body)


def time_of(row: Reached) -> float:
    """What a call may take, so that it ends before its thread is given up."""
    return max(MARGIN_S, min(row.timeout_s, left_s()) - MARGIN_S)


def secret_of(row: Reached) -> str:
    """The secret that the row refers to, empty for none. Raises `ToolError`."""
    if not row.credential:
        return ""
    if not (secret := routing.resolve(row.credential)):
        raise ToolError(f"it is not set up: its credential {row.credential} leads to no secret")
    return secret


def auth(row: Reached, account: Account) -> dict[str, str]:
    """The header that carries the secret. Raises `AuthenticationFailed` for one that no header
    can."""
    if not account.api_key:
        return {}
    return {row.auth_header: f"{row.auth_scheme} {http.api_key(account)}".strip()}


def read(row: HttpTool, answer: http.Answer) -> bytes:
    """The body. Raises `ToolFault` where it is larger than results may be."""
    try:
        return answer.read(row.max_result_bytes)
    except BadResponse as error:
        raise ToolFault(f"{row.name}: {error}", "BadResult") from None


def refusal(row: HttpTool, status: int, body: bytes) -> Exception:
    """The error of an answer that is none. What the server can't do now counts as its fault."""
    said = wire.clean(body.decode(errors="replace")).strip()[:ERROR_SHOWN]
    text = f"{row.name} answered with status {status}{': ' + said if said else ''}"
    return ToolFault(text) if status in (408, 429) or status >= 500 else ToolError(text)


def without(secret: str, body: bytes) -> bytes:
    """A server that repeats the secret gives it to no model."""
    return body.replace(secret.encode(), b"***") if len(secret) >= LEAST_SECRET else body


def value_of(name: str, operation: Operation, status: int, kind: str, body: bytes) -> Any:
    """The answer as JSON or text. Raises `ToolFault` for what its schema forbids, or what is
    neither."""
    if not body and status == NO_CONTENT:
        return {"status": status}
    schema = operation.schema_of(status)
    if not body:
        value: Any = None
    elif openapi.is_json(kind) or schema is not None:
        try:
            value = wire.parse(body)
        except ValueError:
            raise ToolFault(f"{name} answered with what is no JSON", "BadResult") from None
    else:
        with contextlib.suppress(UnicodeDecodeError):
            return wire.clean(body.decode())
        raise ToolFault(f"{name} answered with what is no text: {kind}", "BadResult")
    if schema is not None and (fault := fault_of(schema, value)):
        raise ToolFault(f"{name} answered with what its schema forbids: {fault}", "BadResult")
    return {"status": status} if value is None and not body else value
