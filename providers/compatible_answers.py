"""Reading OpenAI-compatible answers: whole, streamed, and their usage.

Written against the openai SDK 3.52 (`types/chat/chat_completion.py`, `chat_completion_chunk.py`,
`types/completion_usage.py`). What other servers do differently and is read too: `reasoning`
(vLLM, Ollama) or `reasoning_content` (DeepSeek, older vLLM) beside `content`; tool calls without
an id, without an index, or all with index 0 (Ollama); arguments as an object; `finish_reason`
`stop` beside tool calls (OpenAI itself, where the tool was forced).
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from providers import wire
from providers.errors import BadResponse, ProviderError
from providers.faults import is_error
from providers.types import (
    FinishReason,
    JsonObject,
    Part,
    Refusal,
    Response,
    StreamEvent,
    Text,
    TextDelta,
    Thinking,
    ThinkingDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)

_FINISH: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}
# What servers say of an answer that they did not finish.
_UNFINISHED: Final = frozenset({"error", "abort"})
MAX_TOOL_CALLS: Final = 1024


def response_from_wire(answer: Mapping[str, Any], model: str) -> Response:
    """Raises `BadResponse`."""
    choices = wire.array(answer.get("choices"), "choices")
    if not choices:
        raise BadResponse("the answer has no choices")
    choice = wire.obj(choices[0], "choices[0]")
    message = wire.obj(choice.get("message"), "message")
    calls = [
        _call_from_wire(item)
        for item in wire.optional_array(message.get("tool_calls"), "tool_calls")
    ]
    parts: list[Part] = []
    if reasoning := _reasoning(message):
        parts.append(Thinking(text=reasoning))
    if content := _content(message.get("content")):
        parts.append(Text(text=content))
    if refusal := wire.optional_text(message.get("refusal"), "refusal"):
        parts.append(Refusal(text=refusal))
    usage, raw = usage_from_wire(answer)
    return Response(
        id=wire.optional_text(answer.get("id"), "id") or "",
        model=wire.optional_text(answer.get("model"), "model") or model,
        parts=(*parts, *calls),
        finish_reason=_finish(choice.get("finish_reason"), bool(calls)),
        usage=usage,
        raw_usage=raw,
        logprobs=wire.optional_obj(choice.get("logprobs"), "logprobs") or None,
        service_tier=wire.optional_text(answer.get("service_tier"), "service_tier"),
    )


def _reasoning(message: Mapping[str, Any]) -> str:
    for name in ("reasoning_content", "reasoning"):
        if value := message.get(name):
            return wire.text(value, name)
    return ""


def _content(value: Any) -> str:
    if isinstance(value, list):
        items = [wire.obj(item, "content[]") for item in value]
        return "".join(
            wire.text(item.get("text"), "content[].text")
            for item in items
            if item.get("type") == "text"
        )
    return wire.optional_text(value, "content") or ""


def _call_from_wire(item: Any) -> ToolCall:
    call = wire.obj(item, "tool_calls[]")
    function = wire.obj(call.get("function"), "tool_calls[].function")
    name = wire.text(function.get("name"), "tool_calls[].function.name")
    if not name:
        raise BadResponse("a tool call has no name")
    return ToolCall(
        id=wire.optional_text(call.get("id"), "tool_calls[].id") or _new_call_id(),
        name=name,
        arguments=_arguments(function.get("arguments")) or "{}",
    )


def _arguments(value: Any) -> str:
    if isinstance(value, dict):
        return wire.dump(value).decode()
    return wire.optional_text(value, "arguments") or ""


def _new_call_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def _finish(value: Any, calls: bool) -> FinishReason:
    reason = wire.text(value, "finish_reason")
    if reason in _UNFINISHED:
        raise BadResponse(f"the vendor ended the answer with finish_reason {reason}")
    # A reason that we do not know is still an end that the vendor vouches for.
    known = _FINISH.get(reason, "stop")
    return "tool_calls" if calls and known == "stop" else known


def usage_from_wire(answer: Mapping[str, Any]) -> tuple[Usage | None, JsonObject | None]:
    """Our usage and the vendor's own, or None and None where there is none.

    `prompt_tokens` includes cached and cache-written tokens, `completion_tokens` includes
    reasoning. Where the details exceed the totals, the totals hold (they are what is billed) and
    the details are cut.
    """
    raw = wire.optional_obj(answer.get("usage"), "usage")
    if raw.get("prompt_tokens") is None and raw.get("completion_tokens") is None:
        return None, raw or None
    prompt = wire.count(raw.get("prompt_tokens"), "usage.prompt_tokens")
    completion = wire.count(raw.get("completion_tokens"), "usage.completion_tokens")
    inputs = wire.optional_obj(raw.get("prompt_tokens_details"), "prompt_tokens_details")
    outputs = wire.optional_obj(raw.get("completion_tokens_details"), "completion_tokens_details")
    cached = min(wire.count(inputs.get("cached_tokens"), "cached_tokens"), prompt)
    written = wire.count(inputs.get("cache_write_tokens"), "cache_write_tokens")
    written = min(written, prompt - cached)
    reasoning = wire.count(outputs.get("reasoning_tokens"), "reasoning_tokens")
    reasoning = min(reasoning, completion)
    usage = Usage(
        input_tokens=prompt - cached - written,
        cached_input_tokens=cached,
        cache_write_5m_tokens=written,
        output_tokens=completion - reasoning,
        reasoning_tokens=reasoning,
    )
    return usage, raw


def embedding_usage(answer: Mapping[str, Any]) -> tuple[Usage | None, JsonObject | None]:
    raw = wire.optional_obj(answer.get("usage"), "usage")
    if raw.get("prompt_tokens") is None:
        return None, raw or None
    return Usage(input_tokens=wire.count(raw["prompt_tokens"], "usage.prompt_tokens")), raw


class _Call:
    """A tool call while its pieces come in."""

    def __init__(self, index: int, call_id: str | None, key: int | None) -> None:
        self.index = index
        self.key = key
        self.given_id = call_id
        self.id = call_id or _new_call_id()
        self.name = ""
        self.arguments: list[str] = []
        self.told = False


class ChatStream:
    """Builds a `Response` from a stream's chunks, telling its deltas on the way.

    `error` makes an error of an error object (`http.Answer.error`).
    """

    def __init__(self, model: str, error: Callable[[Any], ProviderError]) -> None:
        self._error = error
        self._id = ""
        self._model = model
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._refusal: list[str] = []
        self._calls: list[_Call] = []
        self._logprobs: dict[str, list[Any]] = {}
        self._finish: str | None = None
        self._tier: str | None = None
        self._usage: Mapping[str, Any] = {}

    def feed(self, data: str) -> Iterator[StreamEvent]:
        """Raises `BadResponse`; the class of an `error` object in the stream."""
        chunk = wire.parse_object(data, "a chunk of the stream")
        if is_error(chunk):
            raise self._error(chunk)
        self._id = self._id or wire.optional_text(chunk.get("id"), "id") or ""
        self._model = wire.optional_text(chunk.get("model"), "model") or self._model
        tier = wire.optional_text(chunk.get("service_tier"), "service_tier")
        self._tier = tier or self._tier
        if chunk.get("usage") is not None:
            self._usage = {"usage": wire.obj(chunk["usage"], "usage")}
        for item in wire.optional_array(chunk.get("choices"), "choices")[:1]:
            yield from self._choice(wire.obj(item, "choices[0]"))

    def _choice(self, choice: Mapping[str, Any]) -> Iterator[StreamEvent]:
        delta = wire.optional_obj(choice.get("delta"), "delta")
        if reasoning := _reasoning(delta):
            self._thinking.append(reasoning)
            yield ThinkingDelta(text=reasoning)
        if content := _content(delta.get("content")):
            self._text.append(content)
            yield TextDelta(text=content)
        if refusal := wire.optional_text(delta.get("refusal"), "refusal"):
            self._refusal.append(refusal)
        for item in wire.optional_array(delta.get("tool_calls"), "tool_calls"):
            yield from self._tool_call(wire.obj(item, "tool_calls[]"))
        logprobs = wire.optional_obj(choice.get("logprobs"), "logprobs")
        for name, tokens in logprobs.items():
            if tokens is not None:
                self._logprobs.setdefault(name, []).extend(wire.array(tokens, "logprobs"))
        finish = wire.optional_text(choice.get("finish_reason"), "finish_reason")
        self._finish = finish or self._finish

    def _tool_call(self, item: Mapping[str, Any]) -> Iterator[StreamEvent]:
        function = wire.optional_obj(item.get("function"), "tool_calls[].function")
        call = self._call(item)
        name = wire.optional_text(function.get("name"), "tool_calls[].function.name")
        call.name = call.name or name or ""
        arguments = _arguments(function.get("arguments"))
        call.arguments.append(arguments)
        if not call.told and call.name:
            call.told = True
            arguments = "".join(call.arguments)
            yield ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments=arguments)
        elif call.told and arguments:
            yield ToolCallDelta(index=call.index, arguments=arguments)

    def _call(self, item: Mapping[str, Any]) -> _Call:
        """The call that a piece belongs to: by its index, unless its id says otherwise."""
        call_id = wire.optional_text(item.get("id"), "tool_calls[].id") or None
        key = item.get("index")
        if key is not None:
            key = wire.integer(key, "tool_calls[].index")
        for call in reversed(self._calls):
            same_place = key is None or call.key == key
            if same_place and call_id in (None, call.given_id):
                return call
        if len(self._calls) >= MAX_TOOL_CALLS:
            raise BadResponse(f"the answer has more than {MAX_TOOL_CALLS} tool calls")
        self._calls.append(_Call(len(self._calls), call_id, key))
        return self._calls[-1]

    def finish(self) -> Response:
        """The whole answer. Raises `BadResponse` where the stream ended before it did."""
        if self._finish is None:
            raise BadResponse("the stream ended without a finish reason")
        parts: list[Part] = []
        if self._thinking:
            parts.append(Thinking(text="".join(self._thinking)))
        if self._text:
            parts.append(Text(text="".join(self._text)))
        if self._refusal:
            parts.append(Refusal(text="".join(self._refusal)))
        if not all(call.name for call in self._calls):
            raise BadResponse("a tool call has no name")
        calls = [
            ToolCall(id=call.id, name=call.name, arguments="".join(call.arguments) or "{}")
            for call in self._calls
        ]
        usage, raw = usage_from_wire(self._usage)
        return Response(
            id=self._id,
            model=self._model,
            parts=(*parts, *calls),
            finish_reason=_finish(self._finish, bool(calls)),
            usage=usage,
            raw_usage=raw,
            logprobs=self._logprobs or None,
            service_tier=self._tier,
        )
