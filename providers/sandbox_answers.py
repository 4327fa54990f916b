"""What the sandbox answers: model names, token counts, prompts, texts, arguments, vectors.

Tokens are counted by one rule, so that a test can compute a bill: UTF-8 bytes divided by four,
rounded down, at least 1. Input is all text of all messages joined (system, tool results and tool
calls' arguments too); output is the answer's text, for a tool call its name and arguments.
"""

import base64
import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

DEFAULT_RATE: Final = 200  # tokens per second of long-<n>
DEFAULT_DIMENSIONS: Final = 256
MAX_LONG_TOKENS: Final = 1_000_000
WORD: Final = "word"  # four bytes: one token

MODELS: Final = (
    "echo", "slow-500", "flaky-2", "error-500", "rate-limit-2", "cut", "garbage", "tool",
    "script", "long-200", "no-usage", "embed",
)  # fmt: skip

_NAME: Final = re.compile(
    r"(?:claude-)?(?:(echo|cut|garbage|tool|script|no-usage|embed)|(slow|flaky|error|rate-limit|embed)"
    r"-(\d{1,7})|(long)-(\d{1,7})(?:-(\d{1,6}))?)"
)

_RECEIPT: Final = re.compile(r'\{"queued": ?"([0-9a-f-]{1,64})"\}')


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a model name asks for; `number` and `rate` are 0 where the name has none."""

    kind: str
    number: int = 0
    rate: int = 0


def behaviour(model: str) -> Behaviour | None:
    """None for a name that is no model of the sandbox."""
    match = _NAME.fullmatch(model)
    if match is None:
        return None
    plain, kind, number, long, tokens, rate = match.groups()
    if plain:
        return Behaviour(plain)
    if long:
        count = int(tokens)
        return Behaviour("long", count, int(rate or DEFAULT_RATE)) if _long(count, rate) else None
    if kind == "error" and not 400 <= int(number) <= 599:
        return None
    if kind == "embed" and not 1 <= int(number) <= 4096:
        return None
    return Behaviour(kind, int(number))


def _long(count: int, rate: str | None) -> bool:
    return 1 <= count <= MAX_LONG_TOKENS and (rate is None or int(rate) > 0)


def tokens(text: str) -> int:
    return max(1, len(text.encode(errors="replace")) // 4)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the sandbox reads of a chat request."""

    model: str
    stream: bool
    input_tokens: int
    first_text: str
    last_text: str
    # The ids of `{"queued": "<id>"}`, in order: receipts for calls that are made later.
    receipts: tuple[str, ...]
    # How often the model spoke already.
    turn: int
    after_tool: bool
    tool: tuple[str, Mapping[str, Any]] | None
    schema: Mapping[str, Any] | None
    max_tokens: int | None
    include_usage: bool


@dataclass(frozen=True, slots=True)
class Answer:
    text: str = ""
    # Names and arguments (JSON) of what it calls.
    tools: tuple[tuple[str, str], ...] = ()
    cut: bool = False
    input_tokens: int = 0

    @property
    def output_tokens(self) -> int:
        return tokens("".join(map("".join, self.tools)) if self.tools else self.text)


def read_prompt(body: Mapping[str, Any], anthropic: bool) -> Prompt:
    """Raises `ValueError` that says what is wrong with the request."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a non-empty array")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must hold objects")
    if anthropic and not isinstance(body.get("max_tokens"), int):
        raise ValueError("max_tokens: Field required")
    system = _text(body.get("system")) if anthropic else ""
    texts = [_text(message.get("content")) + _calls(message) for message in messages]
    users = [
        text
        for message, text in zip(messages, texts, strict=True)
        if message.get("role") in ("user", "tool")
    ]
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    options = body.get("stream_options")
    return Prompt(
        model=body["model"],
        stream=body.get("stream") is True,
        input_tokens=tokens(system + "".join(texts)),
        first_text=users[0] if users else "",
        last_text=users[-1] if users else "",
        receipts=tuple(_RECEIPT.findall("".join(users[1:]))),
        turn=sum(message.get("role") == "assistant" for message in messages),
        after_tool=_is_result(messages[-1]),
        tool=_tool(body, anthropic),
        schema=_schema(body, anthropic),
        max_tokens=limit if isinstance(limit, int) and limit > 0 else None,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_text(item) for item in content)
    if isinstance(content, dict):
        return _text(content.get("text") or content.get("content"))
    return ""


def _calls(message: Mapping[str, Any]) -> str:
    """The arguments of a message's tool calls, in either shape."""
    found = []
    for call in message.get("tool_calls") or ():
        found.append(str(call["function"]["arguments"]))
    content = message.get("content")
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "tool_use":
            found.append(orjson.dumps(block.get("input")).decode())
    return "".join(found)


def _is_result(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return message.get("role") == "tool" or (
        isinstance(content, list)
        and any(isinstance(item, dict) and item.get("type") == "tool_result" for item in content)
    )


def _script(prompt: Prompt) -> list[tuple[tuple[str, str], ...]]:
    """The calls of each turn: JSON like `[[{"name": …, "arguments": {…}}], …]`. Text for arguments
    is sent as it is; an argument `"$queued"` becomes the list of receipts."""
    return [
        tuple((call["name"], _arguments(call.get("arguments", {}), prompt)) for call in turn)
        for turn in orjson.loads(prompt.first_text)
    ]


def _arguments(given: Any, prompt: Prompt) -> str:
    if isinstance(given, str):
        return given
    receipts = orjson.dumps(prompt.receipts).decode()
    return orjson.dumps(given).decode().replace('"$queued"', receipts)


def _tool(body: Mapping[str, Any], anthropic: bool) -> tuple[str, Mapping[str, Any]] | None:
    """Name and schema of the tool to ask for: the one that is chosen, else the first."""
    choice = body.get("tool_choice")
    if choice == "none" or choice == {"type": "none"}:
        return None
    found = []
    for tool in body.get("tools") or ():
        spec = tool if anthropic else tool["function"]
        found.append((spec["name"], spec.get("input_schema" if anthropic else "parameters") or {}))
    if isinstance(choice, dict):
        wanted = choice.get("name") if anthropic else choice.get("function", {}).get("name")
        found = [item for item in found if item[0] == wanted] or found
    return found[0] if found else None


def _schema(body: Mapping[str, Any], anthropic: bool) -> Mapping[str, Any] | None:
    """The schema that the answer must fit; an empty one stands for any object."""
    wanted = (body.get("output_config") or {}).get("format") if anthropic else None
    wanted = wanted or body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        schema: Mapping[str, Any] = (wanted.get("json_schema") or wanted).get("schema") or {}
        return schema
    return {"type": "object"} if wanted.get("type") == "json_object" else None


def answer(prompt: Prompt, wanted: Behaviour) -> Answer:
    """The answer that `wanted` leads to in the end, whatever trouble comes before it."""
    given = prompt.input_tokens
    if wanted.kind == "tool" and prompt.tool is not None and not prompt.after_tool:
        name, schema = prompt.tool
        given_to_tool = minimal({"type": "object", **schema}, schema)
        call = (name, orjson.dumps(given_to_tool).decode())
        return Answer(tools=(call,), input_tokens=given)
    if wanted.kind == "script" and prompt.turn < len(script := _script(prompt)):
        return Answer(tools=script[prompt.turn], input_tokens=given)
    if wanted.kind == "long":
        text = WORD * wanted.number
    elif prompt.schema is not None:
        text = orjson.dumps(minimal(prompt.schema, prompt.schema)).decode()
    else:
        text = prompt.last_text
    if prompt.max_tokens is not None and tokens(text) > prompt.max_tokens:
        short = text.encode(errors="replace")[: prompt.max_tokens * 4].decode(errors="ignore")
        return Answer(text=short, cut=True, input_tokens=given)
    return Answer(text=text, input_tokens=given)


_FORMATS: Final = {
    "date": "2025-01-01",
    "date-time": "2025-01-01T00:00:00Z",
    "email": "someone@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def minimal(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Any:
    """A small value that fits a plain JSON schema (patterns and conditions are not read)."""
    if not isinstance(schema, dict) or depth > 16:
        return None
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    if "$ref" in schema:
        return minimal(_referred(str(schema["$ref"]), root), root, depth + 1)
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            return minimal(schema[name][0], root, depth + 1)
    kind = schema.get("type") or ("object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties") or {}
        return {
            name: minimal(properties.get(name, {}), root, depth + 1)
            for name in schema.get("required") or ()
        }
    if kind == "array":
        item = minimal(schema.get("items", {}), root, depth + 1)
        return [item] * min(int(schema.get("minItems", 0)), 100)
    return _scalar(kind, schema)


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(name) if name and isinstance(found, dict) else found
    return found


def _scalar(kind: str, schema: Mapping[str, Any]) -> Any:
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        return max(least, 0) if "maximum" not in schema else min(max(least, 0), schema["maximum"])
    if kind == "string":
        text = _FORMATS.get(str(schema.get("format")), "text")
        text = text.ljust(min(int(schema.get("minLength", 0)), 10_000), "x")
        return text[: schema.get("maxLength", len(text))]
    return False if kind == "boolean" else None


def vector(text: str, dimensions: int) -> list[float]:
    """A unit vector that depends on the text alone."""
    raw = hashlib.shake_256(text.encode(errors="replace")).digest(4 * dimensions)
    numbers = [value / 2**31 - 1 for (value,) in struct.iter_unpack("<I", raw)]
    length = sum(number * number for number in numbers) ** 0.5 or 1.0
    return [number / length for number in numbers]


def embeddings(body: Mapping[str, Any], wanted: Behaviour) -> tuple[dict[str, Any], int]:
    """The body and the input's tokens. Raises `ValueError` for a wrong request."""
    given = body.get("input")
    if isinstance(given, str) or (isinstance(given, list) and given and _is_ids(given)):
        given = [given]
    if not isinstance(given, list) or not 1 <= len(given) <= 2048:
        raise ValueError("input must be a text or an array of 1 to 2048 texts")
    if not all(isinstance(item, str) or _is_ids(item) for item in given):
        raise ValueError("input must hold texts or arrays of token ids")
    size = body.get("dimensions") or (wanted.number if wanted.kind == "embed" else 0)
    size = min(size, 4096) if isinstance(size, int) and size > 0 else DEFAULT_DIMENSIONS
    count = sum(tokens(item) if isinstance(item, str) else len(item) for item in given)
    data = []
    for index, item in enumerate(given):
        numbers: Any = vector(item if isinstance(item, str) else repr(item), size)
        if body.get("encoding_format") == "base64":
            numbers = base64.b64encode(struct.pack(f"<{size}f", *numbers)).decode()
        data.append({"object": "embedding", "index": index, "embedding": numbers})
    reply: dict[str, Any] = {"object": "list", "data": data, "model": body["model"]}
    if wanted.kind != "no-usage":
        reply["usage"] = {"prompt_tokens": count, "total_tokens": count}
    return reply, count


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
