"""Anthropic's Messages API.

Written against the anthropic SDK 2.11 (`types/message_create_params.py` and the types beside it)
and https://platform.claude.com/docs/en/api/versioning. What a model takes depends on its version
(https://platform.claude.com/docs/en/build-with-claude/thinking,
https://platform.claude.com/docs/en/build-with-claude/adaptive-thinking,
https://platform.claude.com/docs/en/build-with-claude/effort):

- Sampling knobs: none at all from API version 2026-10-21; before it, none for models from 4.7.
- Thinking: a budget up to models 4.5, adaptive from 4.6, which takes an effort in its place.

A knob that the model would refuse is left out. The answers are read by `anthropic_answers`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from providers import http, wire
from providers.anthropic_answers import MessageStream, response_from_wire
from providers.base import Option, Provider, as_stream
from providers.errors import BadResponse, Unsupported
from providers.http import Exchange
from providers.types import (
    CacheLifetime,
    Image,
    JsonObject,
    Message,
    Part,
    Refusal,
    Request,
    Response,
    StreamEvent,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
    Usage,
)

DEFAULT_VERSION: Final = "2026-10-21"
# The first version that refuses temperature, top_p and top_k.
VERSION_WITHOUT_SAMPLING: Final = "2026-10-21"
# The API wants `max_tokens`; this is what a request that names none may write.
DEFAULT_MAX_TOKENS: Final = 8192
MIN_THINKING_BUDGET: Final = 1024

Model = tuple[int, int]
_ADAPTIVE_FROM: Final[Model] = (4, 6)
_NO_SAMPLING_FROM: Final[Model] = (4, 7)
_XHIGH_FROM: Final[Model] = (4, 7)
# A name without a version (`claude-mythos-preview`, a gateway's alias) is taken for a new model:
# leaving a knob out changes an answer a little, sending one that is refused ends the request.
_UNKNOWN: Final[Model] = (99, 0)
_VERSION: Final = re.compile(r"claude-(?:[a-z]+-)*(\d{1,2})(?:[-.](\d{1,2}))?(?![\d])")

_EFFORTS: Final[Mapping[str, str]] = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}
_TIERS: Final[Mapping[str, str]] = {
    "auto": "auto",
    "default": "standard_only",
    "standard_only": "standard_only",
}
_DATA_URL: Final = re.compile(r"data:(image/(?:jpeg|png|gif|webp));base64,(.*)", re.DOTALL)


class Anthropic(Provider):
    """Anthropic itself, or a server that speaks its Messages API."""

    options: ClassVar[Mapping[str, Option]] = {
        **Provider.options,
        "version": Option(
            "a date such as 2026-10-21 (the header anthropic-version)",
            lambda value: (
                isinstance(value, str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value) is not None
            ),
        ),
        "max_tokens": Option(
            "a number of tokens above 0 (for requests that name no limit)",
            lambda value: type(value) is int and 0 < value <= wire.MAX_TOKENS,
        ),
    }

    def limited_input(self, usage: Usage) -> int:
        """Reads of the prompt cache don't count ("Rate limits", "Cache-aware ITPM")."""
        return usage.total_input_tokens - usage.cached_input_tokens

    def unsupported(self, request: Request) -> str | None:
        if request.logprobs:
            return "logprobs"
        if request.response_format is not None and request.response_format.type == "json_object":
            return "response_format"
        return "messages" if any(map(_misplaced, request.messages)) else None

    def complete(self, request: Request, exchange: Exchange) -> Response:
        body = request_to_wire(request, self.account.options)
        answer = http.post_json(self.account, "/v1/messages", body, self._headers(), exchange)
        return response_from_wire(answer, request.model)

    def stream(self, request: Request, exchange: Exchange) -> Iterator[StreamEvent]:
        body = {**request_to_wire(request, self.account.options), "stream": True}
        with http.send(self.account, "/v1/messages", body, self._headers(), exchange) as answer:
            if answer.is_json:
                events = as_stream(response_from_wire(answer.json(), request.model))
            else:
                events = self._events(answer, request.model)
            for event in events:
                exchange.mark_first_byte()
                yield event

    def _events(self, answer: http.Answer, model: str) -> Iterator[StreamEvent]:
        stream = MessageStream(model, answer.error)
        for event in answer.events():
            yield from stream.feed(event.data)
            if stream.ended:
                answer.drain()
                break
        yield stream.finish()

    def _headers(self) -> dict[str, str]:
        options = self.account.options
        headers = dict(options.get("headers", {}))
        headers["anthropic-version"] = options.get("version", DEFAULT_VERSION)
        if key := http.api_key(self.account):
            headers["x-api-key"] = key
        return headers


def model_version(name: str) -> Model:
    """(4, 5) for `claude-sonnet-4-5-20250929`; higher than any for a name without a version."""
    match = _VERSION.search(name)
    return (int(match[1]), int(match[2] or 0)) if match else _UNKNOWN


def request_to_wire(request: Request, options: Mapping[str, Any]) -> dict[str, Any]:
    """Raises `Unsupported` for an image that the API can't take."""
    body = {name: value for name, value in request.extra.items() if name != "stream"}
    body["model"] = request.model
    system, messages = messages_to_wire(request.messages)
    if system:
        body["system"] = system
    body["messages"] = messages
    body["max_tokens"] = request.max_output_tokens or options.get("max_tokens", DEFAULT_MAX_TOKENS)
    body.update(_thinking_to_wire(request, body["max_tokens"]))
    version = options.get("version", DEFAULT_VERSION)
    body.update(_sampling_to_wire(request, version, thinking="thinking" in body))
    body.update(_tools_to_wire(request))
    config = _output_config(request)
    if config:
        given = body.get("output_config")
        body["output_config"] = {**given, **config} if isinstance(given, dict) else config
    if request.stop:
        body["stop_sequences"] = list(request.stop)
    if request.user is not None:
        body["metadata"] = {"user_id": request.user}
    if tier := _TIERS.get(request.service_tier or ""):
        body["service_tier"] = tier
    return body


def _thinking_to_wire(request: Request, max_tokens: int) -> dict[str, Any]:
    effort = request.reasoning_effort in _EFFORTS
    if model_version(request.model) >= _ADAPTIVE_FROM:
        return {"thinking": {"type": "adaptive"}} if effort or request.thinking_budget else {}
    if not request.thinking_budget:
        return {}
    budget = max(request.thinking_budget, MIN_THINKING_BUDGET)
    if request.max_output_tokens is None:
        # The caller's budget comes on top of what the answer may write.
        return _budget(budget, max_tokens + budget)
    # Thinking counts towards the limit that the caller set, and must leave room below it.
    budget = min(budget, max_tokens - 1)
    return _budget(budget, max_tokens) if budget >= MIN_THINKING_BUDGET else {}


def _budget(budget: int, max_tokens: int) -> dict[str, Any]:
    thinking = {"type": "enabled", "budget_tokens": budget}
    return {"thinking": thinking, "max_tokens": max_tokens}


def _sampling_to_wire(request: Request, version: str, *, thinking: bool) -> dict[str, Any]:
    if version >= VERSION_WITHOUT_SAMPLING:
        return {}
    if model_version(request.model) >= _NO_SAMPLING_FROM:
        return {}
    if thinking:
        # Beside thinking only a top_p near 1 is taken.
        near = request.top_p is not None and 0.95 <= request.top_p <= 1
        return {"top_p": request.top_p} if near else {}
    # Newer models refuse the two together; OpenAI's scale goes to 2, this one to 1.
    if request.temperature is not None:
        return {"temperature": min(request.temperature, 1.0)}
    return {"top_p": request.top_p} if request.top_p is not None else {}


def _output_config(request: Request) -> dict[str, Any]:
    config: dict[str, Any] = {}
    version = model_version(request.model)
    effort = _EFFORTS.get(request.reasoning_effort or "")
    if version >= _ADAPTIVE_FROM and effort is not None:
        config["effort"] = "high" if effort == "xhigh" and version < _XHIGH_FROM else effort
    wanted = request.response_format
    if wanted is not None and wanted.type == "json_schema":
        config["format"] = {"type": "json_schema", "schema": wanted.schema or {}}
    return config


def _tools_to_wire(request: Request) -> dict[str, Any]:
    if not request.tools:
        return {}
    tools = []
    for tool in request.tools:
        wired: dict[str, Any] = {"name": tool.name, "input_schema": tool.parameters}
        if tool.description:
            wired["description"] = tool.description
        if tool.strict is not None:
            wired["strict"] = tool.strict
        tools.append(wired)
    choice = _choice_to_wire(request)
    return {"tools": tools, "tool_choice": choice} if choice else {"tools": tools}


def _choice_to_wire(request: Request) -> dict[str, Any]:
    choice = request.tool_choice
    wired: dict[str, Any] = {}
    if choice is not None and not isinstance(choice, str):
        wired = {"type": "tool", "name": choice["name"]}
    elif choice is not None:
        wired = {"type": {"required": "any"}.get(choice, choice)}
    if request.parallel_tool_calls is not None and choice != "none":
        wired = wired or {"type": "auto"}
        wired["disable_parallel_tool_use"] = not request.parallel_tool_calls
    return wired


def _misplaced(message: Message) -> bool:
    """Whether a part stands where this wire can't hold it."""
    for part in message.parts:
        if isinstance(part, Image) and (message.role != "user" or not _is_image(part.url)):
            return True
        if isinstance(part, ToolCall) and message.role != "assistant":
            return True
        if isinstance(part, ToolResult) and message.role not in ("tool", "user"):
            return True
    return False


def _is_image(url: str) -> bool:
    return url.startswith(("https://", "http://")) or _DATA_URL.match(url) is not None


def messages_to_wire(
    messages: Sequence[Message],
) -> tuple[list[JsonObject], list[dict[str, Any]]]:
    """The system prompt and the turns. System messages go to the top, wherever they stood;
    messages of one side that follow each other become one turn, tool results first in it."""
    system: list[JsonObject] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        blocks = [block for part in message.parts if (block := _part_to_wire(part)) is not None]
        if message.role == "system":
            system.extend(blocks)
            continue
        role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"].extend(blocks)
        else:
            turns.append({"role": role, "content": blocks})
    for turn in turns:
        turn["content"].sort(key=lambda block: block["type"] != "tool_result")
    return system, [turn for turn in turns if turn["content"]]


def _part_to_wire(part: Part) -> dict[str, Any] | None:
    """None for what the API refuses or has no place for: empty text, another vendor's thinking."""
    match part:
        case Text(text=text, cache=cache):
            return _cached({"type": "text", "text": text}, cache) if text else None
        case Refusal(text=text):
            return {"type": "text", "text": text} if text else None
        case Image(cache=cache):
            return _cached({"type": "image", "source": _image_source(part.url)}, cache)
        case Thinking():
            return _thinking_block(part)
        case ToolCall():
            given = _input(part.arguments)
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": given}
        case _:
            return _result_block(part)


def _thinking_block(part: Thinking) -> dict[str, Any] | None:
    if part.redacted is not None:
        return {"type": "redacted_thinking", "data": part.redacted}
    if part.signature is None:
        return None
    return {"type": "thinking", "thinking": part.text, "signature": part.signature}


def _result_block(part: ToolResult) -> dict[str, Any]:
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": part.call_id}
    if part.content:
        result["content"] = part.content
    if part.is_error:
        result["is_error"] = True
    return _cached(result, part.cache)


def _cached(block: dict[str, Any], cache: CacheLifetime | None) -> dict[str, Any]:
    if cache is not None:
        block["cache_control"] = {"type": "ephemeral", "ttl": cache}
    return block


def _image_source(url: str) -> JsonObject:
    match = _DATA_URL.match(url)
    if match is not None:
        return {"type": "base64", "media_type": match[1], "data": match[2]}
    if not _is_image(url):
        raise Unsupported(
            "images must be https or data URLs of JPEG, PNG, GIF or WebP", param="messages"
        )
    return {"type": "url", "url": url}


def _input(arguments: str) -> JsonObject:
    """A tool call's input must be an object. Broken JSON is wrapped as the vendor's page on
    fine-grained tool streaming proposes, so that the model sees what it wrote."""
    try:
        return wire.parse_object(arguments or "{}", "arguments")
    except BadResponse:
        return {"INVALID_JSON": arguments}
