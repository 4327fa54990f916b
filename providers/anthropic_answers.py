"""Reading answers of Anthropic's Messages API: whole, streamed, and their usage.

Written against the anthropic SDK 2.11 (`types/message.py`, `types/usage.py`,
`types/raw_message_stream_event.py` and the types that they name). Blocks of the vendor's own
tools, which we never ask for, and events of types that we don't know are passed over, as
https://platform.claude.com/docs/en/api/versioning asks of clients.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from providers import wire
from providers.errors import BadResponse, ProviderError
from providers.faults import is_error
from providers.types import (
    Done,
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
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def response_from_wire(answer: Mapping[str, Any], model: str) -> Response:
    """Raises `BadResponse`."""
    parts = [
        part
        for item in wire.array(answer.get("content"), "content")
        if (part := _part_from_wire(wire.obj(item, "content[]"))) is not None
    ]
    return _response(answer, answer, answer.get("usage"), parts, model)


def _response(
    message: Mapping[str, Any],
    end: Mapping[str, Any],
    usage: Any,
    parts: list[Part],
    model: str,
) -> Response:
    """`message` has id and model, `end` the stop reason and its details."""
    reason = wire.text(end.get("stop_reason"), "stop_reason")
    details = wire.optional_obj(end.get("stop_details"), "stop_details")
    if explanation := wire.optional_text(details.get("explanation"), "explanation"):
        parts = [*parts, Refusal(text=explanation)]
    raw = wire.optional_obj(usage, "usage") or None
    return Response(
        id=wire.optional_text(message.get("id"), "id") or "",
        model=wire.optional_text(message.get("model"), "model") or model,
        parts=tuple(parts),
        # A reason that we do not know is still an end that the vendor vouches for.
        finish_reason=_FINISH.get(reason, "stop"),
        usage=usage_from_wire(raw) if raw else None,
        raw_usage=raw,
        service_tier=wire.optional_text(raw.get("service_tier"), "service_tier") if raw else None,
    )


def _part_from_wire(block: Mapping[str, Any]) -> Part | None:
    kind = block.get("type")
    if kind == "text":
        text = wire.text(block.get("text"), "content[].text")
        return Text(text=text) if text else None
    if kind == "thinking":
        return Thinking(
            text=wire.text(block.get("thinking"), "content[].thinking"),
            signature=wire.optional_text(block.get("signature"), "content[].signature") or None,
        )
    if kind == "redacted_thinking":
        return Thinking(redacted=wire.text(block.get("data"), "content[].data"))
    if kind == "tool_use":
        given = wire.obj(block.get("input"), "content[].input")
        return ToolCall(
            id=wire.text(block.get("id"), "content[].id"),
            name=wire.text(block.get("name"), "content[].name"),
            arguments=wire.dump(given).decode(),
        )
    return None


def usage_from_wire(raw: JsonObject) -> Usage | None:
    """None where neither input nor output was counted.

    `input_tokens` excludes what the cache read or wrote; `cache_creation` tells the writes'
    lifetimes, and where it is missing or does not add up, the total holds and the rest counts as
    5 minutes, the vendor's default. `thinking_tokens` is a part of `output_tokens`.
    """
    if raw.get("input_tokens") is None and raw.get("output_tokens") is None:
        return None
    lifetimes = wire.optional_obj(raw.get("cache_creation"), "cache_creation")
    short = wire.count(lifetimes.get("ephemeral_5m_input_tokens"), "ephemeral_5m_input_tokens")
    long = wire.count(lifetimes.get("ephemeral_1h_input_tokens"), "ephemeral_1h_input_tokens")
    if raw.get("cache_creation_input_tokens") is not None:
        written = wire.count(raw["cache_creation_input_tokens"], "cache_creation_input_tokens")
        long = min(long, written)
        short = written - long
    made = wire.count(raw.get("output_tokens"), "usage.output_tokens")
    details = wire.optional_obj(raw.get("output_tokens_details"), "output_tokens_details")
    thought = min(wire.count(details.get("thinking_tokens"), "thinking_tokens"), made)
    return Usage(
        input_tokens=wire.count(raw.get("input_tokens"), "usage.input_tokens"),
        cached_input_tokens=wire.count(
            raw.get("cache_read_input_tokens"), "usage.cache_read_input_tokens"
        ),
        cache_write_5m_tokens=short,
        cache_write_1h_tokens=long,
        output_tokens=made - thought,
        reasoning_tokens=thought,
    )


class _Block:
    """A content block while its deltas come in."""

    def __init__(self, start: Mapping[str, Any], call_index: int) -> None:
        self.start = start
        self.kind = start.get("type")
        self.call_index = call_index
        self.pieces: list[str] = []
        self.signature: list[str] = []

    def part(self) -> Part | None:
        """Raises `BadResponse` for a block that lacks what its type needs."""
        text = "".join(self.pieces)
        if self.kind == "text":
            return _part_from_wire({"type": "text", "text": text})
        if self.kind == "thinking":
            signature = "".join(self.signature) or self.start.get("signature")
            return _part_from_wire({"type": "thinking", "thinking": text, "signature": signature})
        part = _part_from_wire(self.start)
        if isinstance(part, ToolCall) and text:
            return ToolCall(id=part.id, name=part.name, arguments=text)
        return part


# Type of delta → its field, and the type of block that it may come in.
_DELTAS: Final[Mapping[str, tuple[str, str]]] = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "input_json_delta": ("partial_json", "tool_use"),
}


class MessageStream:
    """Builds a `Response` from a stream's events, telling its deltas on the way.

    `error` makes an error of an error event (`http.Answer.error`).
    """

    def __init__(self, model: str, error: Callable[[Any], ProviderError]) -> None:
        self.ended = False
        self._model = model
        self._error = error
        self._message: Mapping[str, Any] = {}
        self._end: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._blocks: dict[int, _Block] = {}
        self._calls = 0

    def feed(self, data: str) -> Iterator[StreamEvent]:
        """Raises `BadResponse`; the class of an `error` event."""
        event = wire.parse_object(data, "an event of the stream")
        kind = event.get("type")
        if is_error(event):
            raise self._error(event)
        if kind == "message_start":
            self._message = wire.obj(event.get("message"), "message")
            self._add_usage(self._message.get("usage"))
        elif kind == "content_block_start":
            yield from self._begin(event)
        elif kind == "content_block_delta":
            yield from self._delta(event)
        elif kind == "message_delta":
            delta = wire.obj(event.get("delta"), "delta")
            self._end.update({name: value for name, value in delta.items() if value is not None})
            self._add_usage(event.get("usage"))
        elif kind == "message_stop":
            self.ended = True

    def _add_usage(self, usage: Any) -> None:
        # The counts of a later event are cumulative, and leave out what did not change.
        given = wire.optional_obj(usage, "usage")
        self._usage.update({name: value for name, value in given.items() if value is not None})

    def _begin(self, event: Mapping[str, Any]) -> Iterator[StreamEvent]:
        index = wire.integer(event.get("index"), "index")
        block = _Block(wire.obj(event.get("content_block"), "content_block"), self._calls)
        self._blocks[index] = block
        if block.kind == "tool_use":
            self._calls += 1
            call_id = wire.text(block.start.get("id"), "content_block.id")
            name = wire.text(block.start.get("name"), "content_block.name")
            wire.obj(block.start.get("input"), "content_block.input")
            yield ToolCallDelta(index=block.call_index, id=call_id, name=name)
        for name in ("text", "thinking"):
            if block.kind == name and block.start.get(name):
                text = wire.text(block.start[name], f"content_block.{name}")
                yield from self._add(block, name, text)

    def _delta(self, event: Mapping[str, Any]) -> Iterator[StreamEvent]:
        block = self._blocks.get(wire.integer(event.get("index"), "index"))
        if block is None:
            raise BadResponse("a delta of the stream belongs to no block")
        delta = wire.obj(event.get("delta"), "delta")
        kind = delta.get("type")
        if kind == "signature_delta":
            block.signature.append(wire.text(delta.get("signature"), "delta.signature"))
            return
        field, holder = _DELTAS.get(kind, ("", "")) if isinstance(kind, str) else ("", "")
        if field and holder == block.kind:
            yield from self._add(block, holder, wire.text(delta.get(field), f"delta.{field}"))

    def _add(self, block: _Block, kind: str, text: str) -> Iterator[StreamEvent]:
        if not text:
            return
        block.pieces.append(text)
        if kind == "text":
            yield TextDelta(text=text)
        elif kind == "thinking":
            yield ThinkingDelta(text=text)
        else:
            yield ToolCallDelta(index=block.call_index, arguments=text)

    def finish(self) -> Done:
        """The whole answer. Raises `BadResponse` where the stream ended before it did."""
        if not self.ended:
            raise BadResponse("the stream ended without message_stop")
        parts = [part for block in self._blocks.values() if (part := block.part()) is not None]
        usage = self._usage or None
        return Done(response=_response(self._message, self._end, usage, parts, self._model))
