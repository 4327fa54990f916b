"""Tools: typed Python functions that models, workflows and callers may use.

    @tool(critical=True, timeout_s=5)
    def find_order(order_id: Annotated[str, Field(pattern="^[0-9]+$")]) -> dict[str, str]:
        \"\"\"Look an order up.

        Args:
            order_id: the number on the invoice
        \"\"\"

in the `tools.py` of any installed Django app. The JSON schema that models see comes from the
signature and the docstring. A version is part of a tool's identity: `find_order@2` lives beside
`find_order@1`, and `find_order` is the latest.
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from django.utils.module_loading import autodiscover_modules
from docstring_parser import parse as parse_docstring
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from llmtasks.errors import NotFound

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

# What vendors take for a function's name, with room for a version.
NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]{0,59}\Z")
MAX_TIMEOUT_S = 3600.0
MAX_RESULT_BYTES = 100_000


class ToolError(Exception):
    """What a tool's author tells the model: the call failed, and this is why."""


class ToolFault(Exception):
    """What stands behind a tool failed it, in words that the model may read. `error` is the class
    of the result: `ToolFailed` and `ToolTimeout` count for retries and the breaker."""

    def __init__(self, message: str, error: str = "ToolFailed") -> None:
        super().__init__(message)
        self.error = error


class BadArguments(Exception):
    """The arguments fit no call of the tool; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One version of a tool.

    `critical`: whoever asked waits for it; else it is queued and the model gets a receipt.
    `idempotent`: it may be run again where its process died during it. `timeout_s` and
    `max_result_bytes` bound each run, `retries` are runs more after a fault. `per_minute` and
    `concurrency` hold over all processes. `scopes` are what the caller's key must have beside
    `write`. `needs_approval`: a person lets each call through.
    """

    name: str
    version: int
    description: str
    parameters: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], Any]
    critical: bool = True
    idempotent: bool = False
    needs_approval: bool = False
    timeout_s: float = 30.0
    retries: int = 0
    per_minute: int | None = None
    concurrency: int | None = None
    scopes: frozenset[str] = frozenset()
    max_result_bytes: int = MAX_RESULT_BYTES
    result_schema: Mapping[str, Any] | None = None

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"

    def check(self) -> None:
        """Raises ValueError naming what is wrong with the declaration."""
        if not NAME.match(self.name):
            raise ValueError(f"{self.name!r}: a letter, then letters, digits, _ and - (60 at most)")
        if self.version < 1:
            raise ValueError(f"{self.name}: version is 1 or more")
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"{self.name}: timeout_s is more than 0, {MAX_TIMEOUT_S:.0f} at most")
        if not 0 <= self.retries <= 10:
            raise ValueError(f"{self.name}: retries is 0 to 10")
        for name in ("per_minute", "concurrency"):
            if (most := getattr(self, name)) is not None and most < 1:
                raise ValueError(f"{self.name}: {name} is 1 or more")
        if self.retries and not self.idempotent:
            raise ValueError(f"{self.name}: only an idempotent tool can have retries")


@dataclass
class Registry:
    """Every version of every tool by name. `stored` gives those that are rows; a function goes
    before a row of the same name and version."""

    tools: dict[str, dict[int, Tool]] = field(default_factory=dict)
    stored: Callable[[], Mapping[str, Mapping[int, Tool]]] = dict

    def add(self, tool: Tool) -> None:
        """Raises ValueError for a faulty declaration, or a version that is there already."""
        tool.check()
        versions = self.tools.setdefault(tool.name, {})
        if tool.version in versions:
            raise ValueError(f"there are two tools {tool.reference}: give one another version")
        versions[tool.version] = tool

    def find(self, reference: str) -> Tool:
        """The tool of `name` (its latest version) or `name@version`. Raises NotFound."""
        name, _, version = reference.partition("@")
        versions = {**self.stored().get(name, {}), **self.tools.get(name, {})}
        if not versions:
            raise NotFound(f"there is no tool {name!r}: GET /v1/tools lists those that you may use")
        if not version:
            return versions[max(versions)]
        found = versions.get(int(version)) if version.isdecimal() and len(version) < 9 else None
        if found is None:
            known = ", ".join(f"{name}@{number}" for number in sorted(versions))
            raise NotFound(f"there is no tool {reference!r}: there is {known}")
        return found

    def all(self) -> list[Tool]:
        found = [*self.stored().values(), *self.tools.values()]
        known = {tool.reference: tool for versions in found for tool in versions.values()}
        return sorted(known.values(), key=lambda tool: (tool.name, tool.version))


registry = Registry()


def discover() -> None:
    """Import `tools.py` of every installed app."""
    autodiscover_modules("tools", register_to=None)


def tool(
    *, name: str = "", version: int = 1, **options: Any
) -> Callable[[AnyFunction], AnyFunction]:
    """Make a function a tool; `options` are `Tool`'s. The function stays as it is.

    Raises ValueError or TypeError, at import, for what can't be a tool.
    """

    def decorate(function: AnyFunction) -> AnyFunction:
        registry.add(of_function(function, name=name, version=version, **options))
        return function

    return decorate


def of_function(
    function: Callable[..., Any],
    *,
    name: str = "",
    version: int = 1,
    scopes: Iterable[str] = (),
    **options: Any,
) -> Tool:
    """The tool that a function is. Raises TypeError for a parameter without a type."""
    given = parse_docstring(inspect.getdoc(function) or "")
    arguments = model_of(function, {p.arg_name: p.description or "" for p in given.params})

    def run(values: Mapping[str, Any]) -> Any:
        try:
            checked = arguments.model_validate(dict(values))
        except ValidationError as error:
            raise BadArguments(advice(error)) from None
        return function(**{field: getattr(checked, field) for field in arguments.model_fields})

    description = "\n\n".join(
        text for text in (given.short_description, given.long_description) if text
    )
    return Tool(
        name=name or function.__name__,
        version=version,
        description=description,
        parameters=without_titles(arguments.model_json_schema()),
        run=run,
        scopes=frozenset(scopes),
        **({"result_schema": result_schema(function)} | options),
    )


def model_of(function: Callable[..., Any], about: Mapping[str, str]) -> type[BaseModel]:
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{function.__name__}: *args and **kwargs have no schema")
        if parameter.name not in hints:
            raise TypeError(f"{function.__name__}: give {parameter.name} a type")
        default = ... if parameter.default is parameter.empty else parameter.default
        described = FieldInfo(default=default, description=about.get(parameter.name) or None)
        fields[parameter.name] = (hints[parameter.name], described)
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def result_schema(function: Callable[..., Any]) -> Mapping[str, Any] | None:
    """The schema of the annotated result, which is checked after each run; None for none."""
    hint = typing.get_type_hints(function, include_extras=True).get("return", Any)
    if hint in (Any, None, type(None)):
        return None
    schema: Mapping[str, Any] = TypeAdapter(hint).json_schema(mode="serialization")
    return without_titles(schema)  # type: ignore[no-any-return]


def without_titles(schema: Any) -> Any:
    """Pydantic titles every field by its name, which tells a model nothing."""
    if isinstance(schema, dict):
        return {
            name: without_titles(value)
            for name, value in schema.items()
            if not (name == "title" and isinstance(value, str))
        }
    return [without_titles(item) for item in schema] if isinstance(schema, list) else schema


def advice(error: ValidationError) -> str:
    """Which arguments are wrong, for a model to mend."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}" for one in found[:10]
    )
