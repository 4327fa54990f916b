"""Chat completions and embeddings as OpenAI defined them and many servers speak them.

Written against the openai SDK 3.52 (`types/chat/completion_create_params.py`,
`types/create_embedding_response.py`, `lib/azure.py`), Ollama's page
https://docs.ollama.com/api/openai-compatibility and vLLM's
https://docs.vllm.ai/en/stable/serving/openai_compatible_server/. Servers differ in what stands in
a `Flavour`; the answers are read by `compatible_answers`.
"""

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal
from urllib.parse import quote, urlencode

from providers import http, wire
from providers.base import Account, Option, Provider, as_stream, is_text
from providers.compatible_answers import (
    ChatStream,
    embedding_usage,
    response_from_wire,
)
from providers.errors import BadResponse
from providers.http import Exchange
from providers.types import (
    Done,
    EmbeddingRequest,
    EmbeddingResponse,
    Image,
    JsonObject,
    Message,
    Part,
    Refusal,
    Request,
    Response,
    ResponseFormat,
    StreamEvent,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """What an OpenAI-compatible server does its own way."""

    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    key_header: Literal["Authorization", "api-key"] = "Authorization"
    stream_usage: bool = True
    deployments: bool = False


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


class Compatible(Provider):
    """An OpenAI-compatible server."""

    supports_embeddings: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        **Provider.options,
        "max_tokens_field": Option(
            "max_tokens or max_completion_tokens",
            lambda value: value in ("max_tokens", "max_completion_tokens"),
        ),
        "stream_usage": Option("true or false (ask for usage at a stream's end)", _is_bool),
        "deployments": Option("true or false (Azure's paths by deployment)", _is_bool),
        "api_version": Option("a text such as 2024-10-21 (Azure)", is_text),
        "organization": Option("an id (OpenAI)", is_text),
        "project": Option("an id (OpenAI)", is_text),
    }

    def __init__(self, account: Account, flavour: Flavour | None = None) -> None:
        super().__init__(account)
        flavour = flavour or Flavour()
        options = account.options
        self.flavour = Flavour(
            max_tokens_field=options.get("max_tokens_field", flavour.max_tokens_field),
            key_header=flavour.key_header,
            stream_usage=options.get("stream_usage", flavour.stream_usage),
            deployments=options.get("deployments", flavour.deployments),
        )

    def unsupported(self, request: Request) -> str | None:
        return "messages" if any(map(_misplaced, request.messages)) else None

    def complete(self, request: Request, exchange: Exchange) -> Response:
        body = request_to_wire(request, self.flavour)
        answer = http.post_json(
            self.account, self._path("chat/completions", request.model), body,
            self._headers(), exchange,
        )  # fmt: skip
        return response_from_wire(answer, request.model)

    def stream(self, request: Request, exchange: Exchange) -> Iterator[StreamEvent]:
        body = {**request_to_wire(request, self.flavour), "stream": True}
        if self.flavour.stream_usage:
            body["stream_options"] = {"include_usage": True}
        path = self._path("chat/completions", request.model)
        with http.send(self.account, path, body, self._headers(), exchange) as answer:
            if answer.is_json:
                events = as_stream(response_from_wire(answer.json(), request.model))
            else:
                events = self._events(answer, request.model)
            for event in events:
                exchange.mark_first_byte()
                yield event

    def _events(self, answer: http.Answer, model: str) -> Iterator[StreamEvent]:
        stream = ChatStream(model, answer.error)
        for event in answer.events():
            if event.data == "[DONE]":
                answer.drain()
                break
            yield from stream.feed(event.data)
        yield Done(response=stream.finish())

    def embed(self, request: EmbeddingRequest, exchange: Exchange) -> EmbeddingResponse:
        body: dict[str, Any] = {
            "model": request.model,
            "input": [item if isinstance(item, str) else list(item) for item in request.inputs],
            # Base64 is a quarter of the bytes, and no vector is parsed digit by digit.
            "encoding_format": "base64",
        }
        if request.dimensions is not None:
            body["dimensions"] = request.dimensions
        if request.user is not None:
            body["user"] = request.user
        answer = http.post_json(
            self.account, self._path("embeddings", request.model), body, self._headers(), exchange
        )
        return embeddings_from_wire(answer, request)

    def _path(self, name: str, model: str) -> str:
        version = self.account.options.get("api_version")
        query = f"?{urlencode({'api-version': version})}" if version else ""
        if self.flavour.deployments:
            return f"/openai/deployments/{quote(model, safe='')}/{name}{query}"
        return f"/{name}{query}"

    def _headers(self) -> dict[str, str]:
        options = self.account.options
        headers = dict(options.get("headers", {}))
        if "organization" in options:
            headers["OpenAI-Organization"] = options["organization"]
        if "project" in options:
            headers["OpenAI-Project"] = options["project"]
        # Local servers often want no key.
        if key := http.api_key(self.account):
            bearer = self.flavour.key_header == "Authorization"
            headers[self.flavour.key_header] = f"Bearer {key}" if bearer else key
        return headers


# Whether an answer is streamed is the caller's of the adapter; of several choices one is read.
_NEVER_EXTRA: Final = frozenset({"stream", "stream_options", "n"})

# Our field → theirs, where value and meaning are the same.
_SAME: Final = (
    "temperature",
    "top_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "reasoning_effort",
    "service_tier",
    "user",
)


def request_to_wire(request: Request, flavour: Flavour) -> dict[str, Any]:
    body = {name: value for name, value in request.extra.items() if name not in _NEVER_EXTRA}
    body["model"] = request.model
    body["messages"] = [wired for message in request.messages for wired in message_to_wire(message)]
    for name in _SAME:
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.max_output_tokens is not None:
        body[flavour.max_tokens_field] = request.max_output_tokens
    if request.stop:
        body["stop"] = list(request.stop)
    if request.response_format is not None:
        body["response_format"] = _format_to_wire(request.response_format)
    if request.tools:
        body.update(_tools_to_wire(request))
    return body


def _format_to_wire(wanted: ResponseFormat) -> JsonObject:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    schema: dict[str, Any] = {"name": wanted.name or "answer", "schema": wanted.schema or {}}
    if wanted.strict is not None:
        schema["strict"] = wanted.strict
    if wanted.description is not None:
        schema["description"] = wanted.description
    return {"type": "json_schema", "json_schema": schema}


def _tools_to_wire(request: Request) -> dict[str, Any]:
    tools = []
    for tool in request.tools:
        function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters}
        if tool.description:
            function["description"] = tool.description
        if tool.strict is not None:
            function["strict"] = tool.strict
        tools.append({"type": "function", "function": function})
    body: dict[str, Any] = {"tools": tools}
    choice = request.tool_choice
    if isinstance(choice, str):
        body["tool_choice"] = choice
    elif choice is not None:
        body["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    if request.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = request.parallel_tool_calls
    return body


def _misplaced(message: Message) -> bool:
    """Whether a part stands in a message whose role can't hold it on this wire."""
    for part in message.parts:
        if isinstance(part, Image) and message.role != "user":
            return True
        if isinstance(part, (ToolCall, Refusal)) and message.role != "assistant":
            return True
        if isinstance(part, Text) and message.role == "tool":
            return True
    return False


def message_to_wire(message: Message) -> Iterator[dict[str, Any]]:
    """The wire's messages for one of ours: each tool result is a message of its own.

    Reasoning is not sent back: the wire has no field for it.
    """
    rest: list[Part] = []
    for part in message.parts:
        if isinstance(part, ToolResult):
            yield {"role": "tool", "tool_call_id": part.call_id, "content": part.content}
        elif not isinstance(part, Thinking):
            rest.append(part)
    if message.role == "tool" or (not rest and message.role != "assistant"):
        return
    wired: dict[str, Any] = {"role": message.role}
    if message.name is not None:
        wired["name"] = message.name
    if message.role == "assistant":
        wired.update(_assistant_to_wire(rest))
    else:
        wired["content"] = _content_to_wire(rest)
    yield wired


def _assistant_to_wire(parts: list[Part]) -> dict[str, Any]:
    wired: dict[str, Any] = {}
    calls = [part for part in parts if isinstance(part, ToolCall)]
    refusals = [part.text for part in parts if isinstance(part, Refusal)]
    texts = [part.text for part in parts if isinstance(part, Text)]
    if calls:
        wired["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
    if refusals:
        wired["refusal"] = "".join(refusals)
    wired["content"] = "".join(texts) if texts or not (calls or refusals) else None
    return wired


def _content_to_wire(parts: list[Part]) -> str | list[JsonObject]:
    # A plain string where it says the same: every server takes it.
    if len(parts) == 1 and isinstance(parts[0], Text):
        return parts[0].text
    content: list[JsonObject] = []
    for part in parts:
        if isinstance(part, Image):
            image = {"url": part.url}
            if part.detail is not None:
                image["detail"] = part.detail
            content.append({"type": "image_url", "image_url": image})
        elif isinstance(part, (Text, Refusal)):
            content.append({"type": "text", "text": part.text})
    return content


def embeddings_from_wire(answer: Mapping[str, Any], request: EmbeddingRequest) -> EmbeddingResponse:
    """Raises `BadResponse` unless there is exactly one vector per input, whatever their order."""
    vectors: dict[int, tuple[float, ...]] = {}
    for position, item in enumerate(wire.array(answer.get("data"), "data")):
        entry = wire.obj(item, "data[]")
        index = wire.integer(entry.get("index", position), "data[].index")
        vectors[index] = _vector(entry.get("embedding"))
    if sorted(vectors) != list(range(len(request.inputs))):
        raise BadResponse(f"{len(vectors)} vectors came for {len(request.inputs)} inputs")
    usage, raw = embedding_usage(answer)
    return EmbeddingResponse(
        model=wire.optional_text(answer.get("model"), "model") or request.model,
        vectors=tuple(vectors[index] for index in range(len(vectors))),
        usage=usage,
        raw_usage=raw,
    )


def _vector(value: Any) -> tuple[float, ...]:
    # Servers that do not know `encoding_format` send numbers.
    if not isinstance(value, str):
        return wire.vector(value, "data[].embedding")
    try:
        data = base64.b64decode(value, validate=True)
        numbers = struct.unpack(f"<{len(data) // 4}f", data)
    except (binascii.Error, ValueError, struct.error):
        raise BadResponse("data[].embedding is no base64 of 32-bit floats") from None
    return wire.vector(list(numbers), "data[].embedding")
