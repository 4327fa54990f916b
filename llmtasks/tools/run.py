"""One run of a tool: check the arguments, take its limits, run it under its timeout, check what
it gave. Whatever goes wrong becomes a result that says so: a tool never ends a task by itself.
"""

import logging
import random
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import jsonschema  # type: ignore[import-untyped]
import orjson
from django.db import OperationalError
from pydantic_core import PydanticSerializationError, to_json
from referencing import Registry
from referencing.exceptions import Unresolvable
from uuid_utils.compat import uuid7

from llmtasks import stores
from llmtasks.guards import rate_limit
from llmtasks.guards.rate_limit import Grant, Meter, Need, Used
from llmtasks.guards.rules import Rule
from llmtasks.models import Limit
from llmtasks.routing import TOOLS
from llmtasks.tools import allowed
from llmtasks.tools.registry import BadArguments, Tool, ToolError, ToolFault

log = logging.getLogger(__name__)

ONE = Need(input_tokens=0, output_tokens=0, expected_input=0, expected_output=0)
BACKOFF_S = 0.2
# Runs that went on past their timeout: beyond that none is begun in this process.
MAX_ABANDONED = 64
MAX_ARGUMENT_BYTES = 200_000

# Without it, a schema's reference to another document is fetched.
NO_DOCUMENTS: Registry[Any] = Registry()

# When the run of this thread is given up (monotonic).
_ends: ContextVar[float] = ContextVar("ends", default=float("inf"))
_abandoned = 0
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gave: JSON text (a text as it is), or why there is none. `error` is the class of
    what went wrong, empty where nothing did."""

    content: str
    error: str = ""

    @property
    def is_error(self) -> bool:
        return bool(self.error)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a tool runs for, and how long they may wait."""

    tenant_id: UUID
    key_id: UUID | None
    is_urgent: bool
    left_s: float


def run(tool: Tool, arguments: str | Mapping[str, Any], caller: Caller) -> Result:
    """Run the tool to its end. `arguments` may be JSON text as a model wrote it. Never raises."""
    values = values_of(arguments)
    if isinstance(values, Result):
        return values
    if refusal := refused(tool, caller):
        return refusal
    until = time.monotonic() + caller.left_s
    result = once(tool, values, caller, until, is_again=False)
    for number in range(tool.retries):
        if result.error not in ("ToolFailed", "ToolTimeout"):
            break
        pause_s = random.uniform(0, BACKOFF_S * 2**number)  # noqa: S311 - no secret
        if time.monotonic() + pause_s >= until:
            break
        time.sleep(pause_s)
        log.info("retry", extra={"tool": tool.reference, "error": result.error, "wait_s": pause_s})
        result = once(tool, values, caller, until, is_again=True)
    return result


def refused(tool: Tool, caller: Caller) -> Result | None:
    """What whoever may not use the tool is told."""
    try:
        fault = allowed.fault(tool, caller.tenant_id, caller.key_id)
    except OperationalError:
        return Result("who may use tools can't be read now: try later", "ToolUnavailable")
    return Result(fault, "NotAllowed") if fault else None


def values_of(arguments: str | Mapping[str, Any]) -> Mapping[str, Any] | Result:
    if not isinstance(arguments, str):
        return arguments
    if len(arguments) > MAX_ARGUMENT_BYTES:
        return Result(f"the arguments are longer than {MAX_ARGUMENT_BYTES} bytes", "BadArguments")
    try:
        values = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError as error:
        return Result(f"the arguments are not valid JSON: {error}", "BadArguments")
    if not isinstance(values, dict):
        return Result("the arguments must be a JSON object", "BadArguments")
    return values


def once(
    tool: Tool, values: Mapping[str, Any], caller: Caller, until: float, *, is_again: bool
) -> Result:
    if fault := fault_of(tool.parameters, values):
        return Result(f"the arguments fit no call of {tool.name}: {fault}", "BadArguments")
    grant = admitted(tool, caller, until, is_again=is_again)
    if isinstance(grant, Result):
        return grant
    result = timed(tool, values, min(tool.timeout_s, until - time.monotonic()))
    is_fault = result.error in ("ToolFailed", "ToolTimeout")
    rate_limit.settle(
        grant, Used(), health="fault" if is_fault else "ok", error=result.error,
    )  # fmt: skip
    return result


def fault_of(schema: Mapping[str, Any], value: Any) -> str:
    """What makes the value unfit for the schema; empty where nothing does."""
    try:
        validator = jsonschema.Draft202012Validator(schema, registry=NO_DOCUMENTS)
        found = next(validator.iter_errors(value), None)
    except RecursionError:
        return "it is nested too deeply"
    except Unresolvable as error:
        return f"its schema refers to what is not there: {error}"
    if found is None:
        return ""
    place = ".".join(str(step) for step in found.absolute_path)
    return f"{place + ': ' if place else ''}{found.message[:300]}"


# --- Limits and breaker ---------------------------------------------------------------------------


def admitted(tool: Tool, caller: Caller, until: float, *, is_again: bool) -> Grant | Result:
    """The tool's place in the limiter, waited for within the caller's time."""
    while True:
        left_s = until - time.monotonic()
        grant = Grant(
            attempt_id=uuid7(), provider=TOOLS, model=tool.reference, need=ONE,
            meters=meters_of(tool), is_urgent=caller.is_urgent, is_again=is_again,
            left_s=left_s, patience_s=left_s,
        )  # fmt: skip
        refusal = rate_limit.acquire(grant)
        if refusal is None:
            return grant
        if refusal.why in ("breaker", "retries"):
            return Result(f"{tool.name} fails too often now: try later", "ToolUnavailable")
        if time.monotonic() + refusal.wait_s >= until:
            return Result(f"{tool.name} is at its rate limit: try later", "ToolLimited")
        time.sleep(refusal.wait_s)


def meters_of(tool: Tool) -> list[Meter]:
    """The declaration's limits, as the limiter has them."""
    found = []
    for unit, window, amount in (
        (Limit.Unit.REQUESTS, Limit.Window.MINUTE, tool.per_minute),
        (Limit.Unit.CONCURRENCY, "", tool.concurrency),
    ):
        if amount is not None:
            rule = Rule(
                id=f"tool:{tool.reference}:{unit}", name=f"{tool.reference} {unit}",
                provider=TOOLS, model=tool.reference, tenant_id=None, key_id=None, each="",
                unit=unit, window=window, amount=amount, burst=min(amount, max(10, amount // 10)),
            )  # fmt: skip
            found.append(Meter(rule, f"{{limits}}:meter:{rule.id}", *ONE.of(unit)))
    return found


# --- The run itself -------------------------------------------------------------------------------


class Run(threading.Thread):
    """One run in a thread of its own, since nothing else can be left behind."""

    def __init__(self, tool: Tool, values: Mapping[str, Any], seconds: float) -> None:
        super().__init__(name=f"tool-{tool.name}", daemon=True)
        self.tool = tool
        self.values = values
        self.ends = time.monotonic() + seconds
        self.result = Result("")
        self.is_abandoned = False

    def run(self) -> None:
        global _abandoned
        _ends.set(self.ends)
        try:
            self.result = given(self.tool, self.values)
        finally:
            stores.release()
            with _lock:
                _abandoned -= self.is_abandoned


def left_s() -> float:
    """For a tool that can end by itself: how long whoever waits for this run still does."""
    return _ends.get() - time.monotonic()


def timed(tool: Tool, values: Mapping[str, Any], seconds: float) -> Result:
    """Run it for so long at the most; a run that goes on is left to itself, its result dropped."""
    global _abandoned
    if _abandoned >= MAX_ABANDONED:
        return Result("too many tool runs never ended: restart the process", "ToolUnavailable")
    # Whoever waits for the tool keeps no connection that it may want.
    stores.release()
    run = Run(tool, values, max(0.0, seconds))
    run.start()
    run.join(max(0.0, seconds))
    with _lock:
        if run.is_alive():
            run.is_abandoned = True
            _abandoned += 1
    if run.is_abandoned:
        log.error("a tool did not end in time", extra={"tool": tool.reference, "s": seconds})
        return Result(f"{tool.name} gave no result within {seconds:.1f} s", "ToolTimeout")
    return run.result


def given(tool: Tool, values: Mapping[str, Any]) -> Result:
    """What the function gives, checked, as text."""
    try:
        value = tool.run(values)
    except BadArguments as error:
        return Result(f"the arguments fit no call of {tool.name}: {error}", "BadArguments")
    except ToolError as error:
        return Result(str(error) or f"{tool.name} failed", "ToolError")
    except ToolFault as error:
        return Result(str(error), error.error)
    except Exception:
        # Its words are for the log: they may hold what no model should read.
        log.exception("a tool failed", extra={"tool": tool.reference})
        return Result(f"{tool.name} failed by a fault of its own", "ToolFailed")
    return checked(tool, value)


def checked(tool: Tool, value: Any) -> Result:
    try:
        text = to_json(value)
    except (PydanticSerializationError, ValueError, RecursionError):
        return Result(f"{tool.name} returned what is no JSON", "BadResult")
    if len(text) > tool.max_result_bytes:
        return Result(
            f"{tool.name} returned {len(text)} bytes: {tool.max_result_bytes} at most", "BadResult"
        )
    if tool.result_schema is not None:
        if fault := fault_of(tool.result_schema, orjson.loads(text)):
            return Result(f"{tool.name} returned what its schema forbids: {fault}", "BadResult")
    return Result(value if isinstance(value, str) else text.decode())
