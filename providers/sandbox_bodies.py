"""The sandbox's answers in both vendors' shapes, whole and as streams.

Written against the pages that the classes name and the SDKs' types (`openai/types/chat`,
`anthropic/types`), so that the official clients can read them.
"""

import re
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson

from providers.sandbox_answers import WORD, Answer, Prompt


def pieces(text: str) -> Iterator[str]:
    """The text as a stream would bring it: a token or a word at a time."""
    yield from re.findall(rf"{WORD}|\S{{1,16}}\s*|\s+", text)


class OpenAI:
    """Bodies of https://developers.openai.com/api/reference/resources/chat."""

    def __init__(self, prompt: Prompt, reply: Answer, usage: bool) -> None:
        self.prompt = prompt
        self.reply = reply
        self.with_usage = usage
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.call_ids = [f"call_{uuid.uuid4().hex}" for _ in reply.tools]

    @property
    def finish(self) -> str:
        if self.reply.tools:
            return "tool_calls"
        return "length" if self.reply.cut else "stop"

    def usage(self) -> dict[str, Any]:
        given, made = self.reply.input_tokens, self.reply.output_tokens
        return {
            "prompt_tokens": given,
            "completion_tokens": made,
            "total_tokens": given + made,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def _call(self, index: int, arguments: str) -> dict[str, Any]:
        function = {"name": self.reply.tools[index][0], "arguments": arguments}
        return {"id": self.call_ids[index], "type": "function", "function": function}

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.reply.text or None}
        if self.reply.tools:
            called = enumerate(self.reply.tools)
            message["tool_calls"] = [self._call(index, given) for index, (_, given) in called]
        else:
            message["content"] = self.reply.text
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish}
        body = self._shell("chat.completion", [choice])
        if self.with_usage:
            body["usage"] = self.usage()
        return body

    def _shell(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.prompt.model,
            "choices": choices,
        }

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event(None, self._shell("chat.completion.chunk", [choice]))

    def opening(self) -> bytes:
        return self._chunk({"role": "assistant", "content": None if self.reply.tools else ""})

    def deltas(self) -> Iterator[bytes]:
        if not self.reply.tools:
            for piece in pieces(self.reply.text):
                yield self._chunk({"content": piece})
        for index, (_, arguments) in enumerate(self.reply.tools):
            yield self._chunk({"tool_calls": [{"index": index, **self._call(index, "")}]})
            for piece in pieces(arguments):
                given = {"index": index, "function": {"arguments": piece}}
                yield self._chunk({"tool_calls": [given]})

    def closing(self) -> bytes:
        end = self._chunk({}, self.finish)
        if self.with_usage and self.prompt.include_usage:
            end += event(None, {**self._shell("chat.completion.chunk", []), "usage": self.usage()})
        return end + b"data: [DONE]\n\n"


class Anthropic:
    """Bodies of https://platform.claude.com/docs/en/api/messages and its streaming page."""

    def __init__(self, prompt: Prompt, reply: Answer, usage: bool) -> None:
        self.prompt = prompt
        self.reply = reply
        self.with_usage = usage
        self.id = f"msg_{uuid.uuid4().hex}"
        self.call_ids = [f"toolu_{uuid.uuid4().hex}" for _ in reply.tools]

    @property
    def stop(self) -> str:
        if self.reply.tools:
            return "tool_use"
        return "max_tokens" if self.reply.cut else "end_turn"

    def _message(self, content: list[Any], stop: str | None, made: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.prompt.model,
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
        }
        if self.with_usage:
            body["usage"] = {
                "input_tokens": self.reply.input_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": made,
            }
        return body

    def _blocks(self) -> list[tuple[dict[str, Any], str]]:
        """Each content block, empty, and the text or JSON that fills it."""
        if not self.reply.tools:
            return [({"type": "text", "text": ""}, self.reply.text)]
        shown = {"type": "tool_use", "input": {}}
        return [
            (shown | {"id": call_id, "name": name}, made)
            for call_id, (name, made) in zip(self.call_ids, self.reply.tools, strict=True)
        ]

    def _start(self, index: int) -> bytes:
        block = self._blocks()[index][0]
        start = {"type": "content_block_start", "index": index, "content_block": block}
        return event("content_block_start", start)

    def whole(self) -> dict[str, Any]:
        blocks = [
            block | ({"text": made} if block["type"] == "text" else {"input": orjson.loads(made)})
            for block, made in self._blocks()
        ]
        return self._message(blocks, self.stop, self.reply.output_tokens)

    def opening(self) -> bytes:
        message = self._message([], None, 1)
        return (
            event("message_start", {"type": "message_start", "message": message})
            + self._start(0)
            + event("ping", {"type": "ping"})
        )

    def deltas(self) -> Iterator[bytes]:
        for index, (block, made) in enumerate(self._blocks()):
            if index:
                yield self._start(index)
            kind, name = ("text_delta", "text")
            if block["type"] == "tool_use":
                kind, name = ("input_json_delta", "partial_json")
            for piece in pieces(made):
                delta = {"type": kind, name: piece}
                given = {"type": "content_block_delta", "index": index, "delta": delta}
                yield event("content_block_delta", given)
            yield event("content_block_stop", {"type": "content_block_stop", "index": index})

    def closing(self) -> bytes:
        last: dict[str, Any] = {
            "type": "message_delta",
            "delta": {"stop_reason": self.stop, "stop_sequence": None},
        }
        if self.with_usage:
            last["usage"] = {"output_tokens": self.reply.output_tokens}
        return event("message_delta", last) + event("message_stop", {"type": "message_stop"})


def event(name: str | None, data: Mapping[str, Any]) -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_OPENAI_CODES: Final = {
    401: "invalid_api_key",
    404: "model_not_found",
    429: "rate_limit_exceeded",
}


def error_body(
    status: int, message: str, anthropic: bool, kind: str | None = None
) -> dict[str, Any]:
    """`kind` is OpenAI's type, where the status alone does not say it."""
    if anthropic:
        other = "api_error" if status >= 500 else "invalid_request_error"
        error = {"type": _ANTHROPIC_TYPES.get(status, other), "message": message}
        return {"type": "error", "error": error, "request_id": f"req_{uuid.uuid4().hex}"}
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    code = _OPENAI_CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
