"""Tools as declarations, and one run of each kind of fault."""

import threading
import time
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from llmtasks.errors import NotFound
from llmtasks.guards import rate_limit
from llmtasks.tools import allowed
from llmtasks.tools import run as tool_run
from llmtasks.tools.allowed import Allowance
from llmtasks.tools.registry import Registry, Tool, ToolError, of_function
from llmtasks.tools.run import Caller, Result

ANYONE = Caller(tenant_id=UUID(int=1), key_id=None, is_urgent=True, left_s=5.0)


@pytest.fixture(autouse=True)
def without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limiter has its own tests; here everything is let through."""
    monkeypatch.setattr(allowed, "fault", lambda *who: "")
    monkeypatch.setattr(rate_limit, "acquire", lambda grant: None)
    monkeypatch.setattr(rate_limit, "settle", lambda *args, **fields: None)


class Order(BaseModel):
    number: str
    state: Literal["open", "sent"]


def find_order(number: Annotated[str, Field(pattern="^[0-9]+$")], detailed: bool = False) -> Order:
    """Look an order up.

    All of the customer's orders are there.

    Args:
        number: as on the invoice
    """
    return Order(number=number, state="open")


def run(function: Any, arguments: Any = "{}", **options: Any) -> Result:
    return tool_run.run(of_function(function, **options), arguments, ANYONE)


def test_the_schema_comes_from_the_signature_and_the_docstring() -> None:
    tool = of_function(find_order, version=2)
    assert tool.reference == "find_order@2"
    assert tool.description == "Look an order up.\n\nAll of the customer's orders are there."
    assert tool.parameters == {
        "type": "object",
        "additionalProperties": False,
        "required": ["number"],
        "properties": {
            "number": {"type": "string", "pattern": "^[0-9]+$", "description": "as on the invoice"},
            "detailed": {"type": "boolean", "default": False},
        },
    }
    assert tool.result_schema is not None
    assert tool.result_schema["required"] == ["number", "state"]


def test_a_run_gives_json() -> None:
    result = run(find_order, '{"number": "42"}')
    assert result == Result('{"number":"42","state":"open"}')


def test_a_text_stays_as_it_is() -> None:
    def greet() -> str:
        return 'say "hello"'

    assert run(greet) == Result('say "hello"')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "'number' is a required property"),
        ('{"number": "x"}', "number: 'x' does not match"),
        ('{"number": "1", "more": 1}', "Additional properties"),
        ('{"number": 1}', "1 is not of type 'string'"),
    ],
)
def test_arguments_that_fit_no_call(arguments: str, message: str) -> None:
    result = run(find_order, arguments)
    assert result.error == "BadArguments"
    assert message in result.content


def test_a_tool_that_raises() -> None:
    def fails() -> str:
        raise RuntimeError("the password is 1234")

    def refuses() -> str:
        raise ToolError("there is no such customer")

    assert run(fails) == Result("fails failed by a fault of its own", "ToolFailed")
    assert run(refuses) == Result("there is no such customer", "ToolError")


def test_a_tool_that_is_too_late() -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def sleeps() -> str:
        goes_on.wait(10)
        ended.set()
        return "late"

    result = run(sleeps, timeout_s=0.05)
    assert result.error == "ToolTimeout"
    assert not ended.is_set()
    assert tool_run._abandoned == 1
    goes_on.set()
    assert ended.wait(5)
    while tool_run._abandoned:
        time.sleep(0.01)


def test_a_tool_that_returns_too_much_or_no_json() -> None:
    def floods() -> str:
        return "x" * 1000

    def confuses() -> Any:
        return object()

    def lies() -> dict[str, int]:
        return {"a": "no number"}  # type: ignore[dict-item]

    assert run(floods, max_result_bytes=100).error == "BadResult"
    assert run(confuses).error == "BadResult"
    assert run(lies) == Result(
        "lies returned what its schema forbids: a: 'no number' is not of type 'integer'",
        "BadResult",
    )


def test_an_idempotent_tool_is_run_again() -> None:
    calls = []

    def flaky() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise OSError
        return len(calls)

    assert run(flaky, idempotent=True, retries=2) == Result("3")


def test_versions_live_side_by_side() -> None:
    tools = Registry()
    tools.add(of_function(find_order))
    tools.add(of_function(find_order, version=3))
    assert tools.find("find_order").version == 3
    assert tools.find("find_order@1").version == 1
    for unknown in ("find_order@2", "find_order@x", "find_order@", "other"):
        if unknown == "find_order@":
            continue
        with pytest.raises(NotFound):
            tools.find(unknown)
    with pytest.raises(ValueError, match="two tools find_order@3"):
        tools.add(of_function(find_order, version=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "with space"}, "a letter, then letters"),
        ({"version": 0}, "version is 1 or more"),
        ({"timeout_s": 0}, "timeout_s is more than 0"),
        ({"retries": 1}, "only an idempotent tool"),
        ({"concurrency": 0}, "concurrency is 1 or more"),
    ],
)
def test_a_faulty_declaration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Registry().add(of_function(find_order, **options))


def test_a_function_without_types_is_no_tool() -> None:
    def untyped(what) -> None:  # type: ignore[no-untyped-def]
        pass

    def many(*what: int) -> None:
        pass

    with pytest.raises(TypeError, match="give what a type"):
        of_function(untyped)
    with pytest.raises(TypeError, match="no schema"):
        of_function(many)


def test_its_limits_are_the_limiters() -> None:
    tool: Tool = of_function(find_order, per_minute=100, concurrency=3)
    minute, at_once = tool_run.meters_of(tool)
    assert (minute.rule.amount, minute.rule.per_us) == (100, 60_000_000)
    assert (at_once.rule.amount, at_once.rule.per_us, at_once.need) == (3, 0, 1)


@pytest.mark.parametrize(
    ("tenant", "key", "scopes", "fault"),
    [
        (["*"], ["*"], ["tools"], ""),
        (["find_*"], ["find_order"], ["tools"], ""),
        (["*"], ["find_order@1"], ["tools"], ""),
        ([], ["*"], ["tools"], "the tenant may not use find_order"),
        (["shop_*", "find"], ["*"], ["tools"], "the tenant may not use find_order"),
        (["*"], ["find_order@2"], ["tools"], "the API key may not use find_order"),
        (["*"], [], ["tools"], "the API key may not use find_order"),
        (["*"], ["*"], ["read"], "the API key lacks the scope 'tools' that find_order needs"),
    ],
)
def test_who_may_use_a_tool(tenant: Any, key: Any, scopes: Any, fault: str) -> None:
    tool = of_function(find_order)
    assert Allowance(tuple(tenant), tuple(key), frozenset(scopes)).fault(tool) == fault


def test_work_that_no_key_asked_for_has_its_tenants_tools() -> None:
    tool = of_function(find_order, scopes=["audit"])
    assert Allowance(("*",)).fault(tool) == ""
    of_key = Allowance(("*",), ("*",), frozenset({"tools"}))
    assert of_key.fault(tool) == "the API key lacks the scope 'audit' that find_order needs"
