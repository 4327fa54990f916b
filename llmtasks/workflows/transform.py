"""The operations of a transform: declared, bounded, no code."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from llmtasks.workflows.templates import MissingValue, as_text, look_up

MAX_OUTPUT_BYTES = 4_000_000
MAX_PIECES = 100_000


class BadOutput(Exception):
    """A value that can't be what was declared."""


class Plain(BaseModel):
    """An operation without parameters: `json` reads a text as JSON, in a code block too; `text`
    makes a text of any value; `strip` and `lower` change a text; `lines` parts one; `unique`,
    `flatten` and `compact` (without nulls and empty texts) change a list; `count` counts one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    op: Literal["json", "text", "strip", "lower", "lines", "unique", "flatten", "compact", "count"]


class By(BaseModel):
    """`split` a text, `join` a list."""

    model_config = ConfigDict(extra="forbid", strict=True)
    op: Literal["split", "join"]
    by: Annotated[str, Field(min_length=1, max_length=100)]


class Sized(BaseModel):
    """`chunk` a text or list into pieces of a size; the `first` so many of one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    op: Literal["chunk", "first"]
    size: int = Field(ge=1, le=10_000_000)


class Pick(BaseModel):
    """The value at a path; with `each`, of each item of a list."""

    model_config = ConfigDict(extra="forbid", strict=True)
    op: Literal["pick"]
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")]
    each: bool = False


def tag_of(value: Any) -> str | None:
    op = value.get("op") if isinstance(value, dict) else getattr(value, "op", None)
    if not isinstance(op, str):
        return None
    return {"split": "<by>", "join": "<by>", "chunk": "<sized>", "first": "<sized>",
            "pick": "<pick>"}.get(op, "<plain>")  # fmt: skip


Operation = Annotated[
    Annotated[Plain, Tag("<plain>")]
    | Annotated[By, Tag("<by>")]
    | Annotated[Sized, Tag("<sized>")]
    | Annotated[Pick, Tag("<pick>")],
    Discriminator(
        tag_of, custom_error_type="at.op", custom_error_message="give an object with an op"
    ),
]


def apply(value: Any, operations: list[Operation]) -> Any:
    """Raises `BadOutput`, `MissingValue`."""
    for operation in operations:
        value = one(value, operation)
    if len(orjson.dumps(value)) > MAX_OUTPUT_BYTES:
        raise BadOutput(f"the value is larger than {MAX_OUTPUT_BYTES} bytes")
    return value


def one(value: Any, operation: Operation) -> Any:
    if isinstance(operation, Pick):
        path = tuple(operation.path.split("."))
        if operation.each:
            return [look_up(path, item) for item in of_list(value, "pick")]
        return look_up(path, value)
    if isinstance(operation, By):
        if operation.op == "split":
            return pieces(of_text(value, "split").split(operation.by))
        return operation.by.join(as_text(item) for item in of_list(value, "join"))
    if isinstance(operation, Sized):
        return sized(value, operation)
    return PLAIN[operation.op](value)


def sized(value: Any, operation: Sized) -> Any:
    if not isinstance(value, str | list):
        raise BadOutput(f"{operation.op} needs a text or a list, not {name_of(value)}")
    if operation.op == "first":
        return value[: operation.size]
    starts = range(0, len(value), operation.size)
    if len(starts) > MAX_PIECES:
        raise BadOutput(f"more than {MAX_PIECES} pieces")
    return [value[at : at + operation.size] for at in starts]


def pieces(found: list[str]) -> list[str]:
    if len(found) > MAX_PIECES:
        raise BadOutput(f"more than {MAX_PIECES} pieces")
    return found


def as_value(value: Any) -> Any:
    """A text as the JSON that it is, also within a Markdown code block. Raises `BadOutput`."""
    text = of_text(value, "json").strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.partition("\n")[2].removesuffix("```")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadOutput(f"the text is no JSON: {error}") from None


def unique(value: Any) -> list[Any]:
    seen: dict[bytes, Any] = {}
    for item in of_list(value, "unique"):
        seen.setdefault(orjson.dumps(item, option=orjson.OPT_SORT_KEYS), item)
    return list(seen.values())


def flatten(value: Any) -> list[Any]:
    found: list[Any] = []
    for item in of_list(value, "flatten"):
        found.extend(item if isinstance(item, list) else [item])
    return found


def of_text(value: Any, op: str) -> str:
    if not isinstance(value, str):
        raise BadOutput(f"{op} needs a text, not {name_of(value)}")
    return value


def of_list(value: Any, op: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadOutput(f"{op} needs a list, not {name_of(value)}")
    return value


def name_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a truth value", str: "a text", list: "a list"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), "a number")


PLAIN: dict[str, Callable[[Any], Any]] = {
    "json": as_value,
    "text": as_text,
    "strip": lambda value: of_text(value, "strip").strip(),
    "lower": lambda value: of_text(value, "lower").lower(),
    "lines": lambda value: pieces(of_text(value, "lines").splitlines()),
    "unique": unique,
    "flatten": flatten,
    "compact": lambda value: [v for v in of_list(value, "compact") if v is not None and v != ""],
    "count": lambda value: len(of_list(value, "count")),
}

__all__ = ["BadOutput", "MissingValue", "Operation", "apply", "as_value"]
