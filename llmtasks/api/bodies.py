"""From bytes to a checked body: the JSON, the types, and an error that names the field.

Everything that a client can get wrong ends here as an `InvalidInput`; what passes can be stored
(no NUL, no lone surrogate, no NaN, no bottomless nesting).
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

import jsonschema  # type: ignore[import-untyped]
import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from llmtasks.errors import InvalidInput

Checked = TypeVar("Checked")

MAX_DEPTH = 40
MAX_ERRORS = 20
MAX_METADATA = 16
MAX_DEADLINE_S = 30 * 86_400
# A tag of ours in pydantic's path to a value; the caller knows no such step.
TAG = re.compile(r"<.*>\Z")
# The type of an error that names the field itself.
AT = "at."

SCHEMA_DRAFTS = {
    "http://json-schema.org/draft-04/schema": jsonschema.Draft4Validator,
    "http://json-schema.org/draft-06/schema": jsonschema.Draft6Validator,
    "http://json-schema.org/draft-07/schema": jsonschema.Draft7Validator,
    "https://json-schema.org/draft/2019-09/schema": jsonschema.Draft201909Validator,
}


class InvalidBody(InvalidInput):
    """A body with one or more wrong fields; `errors` lists them as (field, what to do)."""

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        param, message = errors[0]
        super().__init__(f"{param}: {message}" if param else message, param=param or None)
        self.errors = errors


class Body(BaseModel):
    """What clients send: nothing that we don't know, nothing converted silently."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def decode(raw: bytes) -> Any:
    """The JSON value of a body. Raises InvalidInput."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if not raw.strip():
            raise InvalidInput("The body is empty: send a JSON object.") from None
        raise InvalidInput(f"The body is not valid JSON in UTF-8: {error}.") from None
    # The escape is the only way to a NUL in JSON; most bodies end the search here.
    if b"\\u0000" in raw:
        for path in nul_paths(value, ""):
            raise InvalidInput(
                "Text must not hold the character U+0000: remove it.", param=path or None
            )
    return value


def nul_paths(value: Any, path: str) -> Iterator[str]:
    """Where a text holds a NUL, which Postgres can't store."""
    if isinstance(value, str):
        if "\0" in value:
            yield path
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from nul_paths(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if "\0" in key:
                yield path
            yield from nul_paths(item, f"{path}.{key}" if path else key)


def check(adapter: TypeAdapter[Checked], value: Any, prefix: str = "") -> Checked:
    """The value as the adapter's type. Raises InvalidBody, its fields named below `prefix`."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise InvalidBody([(path_of(e, prefix), advice(e)) for e in found[:MAX_ERRORS]]) from None


def path_of(error: Any, prefix: str) -> str:
    """`messages[0].content` for pydantic's ("messages", 0, "<user>", "content")."""
    path = prefix
    loc: tuple[int | str, ...] = error["loc"]
    if error["type"].startswith(AT):
        loc += (error["type"].removeprefix(AT),)
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not TAG.match(step):
            path += f".{step}" if path else step
    return path


# Fields that clients of other servers know, and that can't be honoured here.
REFUSED = {
    "audio": "audio is not supported: leave it out",
    "custom": "only tools of type function are supported",
    "file": "files are not supported: send text or an image_url",
    "function_call": "this is deprecated: use tool_choice, and tool_calls in messages",
    "functions": "this is deprecated: use tools",
    "input_audio": "audio is not supported: leave it out",
    "modalities": 'only ["text"] is supported',
    "moderation": "this is not supported: leave it out",
    "n": "one answer a request: leave it out, or send several requests",
    "prompt_cache_breakpoint": 'use "cache_control": {"type": "ephemeral"}',
    "store": "answers are kept as tasks, not in OpenAI's store: leave it out",
}
ADVICE = {
    "missing": "this field is required",
    "extra_forbidden": "there is no such field: remove it",
    "model_type": "give an object",
    "dict_type": "give an object",
    "model_attributes_type": "give an object",
    "list_type": "give a list",
    "string_type": "give a string",
    "int_type": "give a whole number",
    "float_type": "give a number",
    "bool_type": "give true or false",
    "none_required": "leave this out",
}

# How pydantic's messages begin → how ours do; the first that fits.
BETTER_WORDS = {
    "Value error, ": "",
    "Input should be less": "give a number less",
    "Input should be greater": "give a number greater",
    "Input should be": "give",
    "List should have": "give a list of",
    "String should have": "give a text of",
    "String should match": "give a text that matches the",
}


def advice(error: Any) -> str:
    """What to do about one of pydantic's errors."""
    field = next((step for step in reversed(error["loc"]) if isinstance(step, str)), "")
    known = REFUSED.get(field) or ADVICE.get(error["type"])
    if known:
        return known
    message: str = error["msg"].partition(" after validation")[0]
    for begins, better in BETTER_WORDS.items():
        if message.startswith(begins):
            return better + message.removeprefix(begins)
    return message


# --- Types of fields ------------------------------------------------------------------------


def at(field: str, advice: str) -> PydanticCustomError:
    """A fault of `field` that its whole object shows."""
    return PydanticCustomError(f"{AT}{field}", advice)


def depth_of(value: Any, limit: int) -> int:
    """How deeply lists and objects are nested; more than `limit` is not looked into."""
    deepest, level = 0, [value]
    while level and deepest <= limit:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not any(isinstance(item, dict | list) for item in level):
            break
        deepest, level = deepest + 1, inner
    return deepest


def not_too_deep(value: Any) -> Any:
    if depth_of(value, MAX_DEPTH) > MAX_DEPTH:
        raise ValueError(f"this is nested more than {MAX_DEPTH} levels deep: flatten it")
    return value


def is_schema(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema; checked once per text, since clients send the same tools over and over."""
    not_too_deep(value)
    if fault := schema_fault(orjson.dumps(value)):
        raise ValueError(fault)
    return value


@lru_cache(maxsize=2048)
def schema_fault(text: bytes) -> str:
    """What makes this no JSON schema; empty if it is one."""
    schema = orjson.loads(text)
    draft = schema.get("$schema")
    named = SCHEMA_DRAFTS.get(draft.rstrip("#")) if isinstance(draft, str) else None
    try:
        (named or jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        place = ".".join(str(step) for step in error.absolute_path)
        return f"this is no JSON schema: {place + ': ' if place else ''}{error.message[:200]}"
    except RecursionError:
        return "this is no JSON schema that can be checked: it is nested too deeply"
    return ""


def is_metadata(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("give an object of names and values")
    if len(value) > MAX_METADATA:
        raise ValueError(f"give at most {MAX_METADATA} pairs")
    for name, item in value.items():
        if not 1 <= len(name) <= 64:
            raise ValueError("a name has 1 to 64 characters")
        if not isinstance(item, str | int | float | bool):
            raise ValueError(f"{name!r}: give a string, a number, true or false")
        if isinstance(item, str) and len(item) > 512:
            raise ValueError(f"{name!r}: give at most 512 characters")
    return value


def is_moment(value: Any) -> datetime:
    """A time with its offset, as RFC 3339 writes it."""
    try:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError
        moment = moment.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("give a time with its offset, like 2030-01-31T12:00:00Z") from None
    if moment < datetime.now(UTC) - timedelta(days=1):
        raise ValueError("this time is long past: leave it out to run now")
    return moment


Json = Annotated[dict[str, Any], AfterValidator(not_too_deep)]
Schema = Annotated[dict[str, Any], AfterValidator(is_schema)]
Metadata = Annotated[
    dict[str, Any],
    BeforeValidator(is_metadata),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_METADATA,
            "additionalProperties": {"type": ["string", "number", "boolean"]},
            "description": "Kept with the task: cost per feature or customer is found by it.",
        }
    ),
]
Moment = Annotated[
    datetime,
    BeforeValidator(is_moment),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
Seconds = Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)]
User = Annotated[str, Field(max_length=200)]
ModelName = Annotated[
    str, Field(min_length=1, max_length=100, description="One of GET /v1/models.")
]


class Scheduling(Body):
    """When and how urgently work runs; the same in every body that makes a task."""

    lane: Literal["interactive", "default", "bulk"] = "default"
    deadline_s: Seconds | None = Field(None, description="One deadline from end to end.")
    run_at: Moment | None = Field(None, description="Queued work: not before this time.")
    on_unknown: Literal["retry", "fail"] = Field(
        "retry", description="Queued work whose process died during a vendor's call."
    )
