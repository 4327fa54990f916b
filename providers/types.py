"""The vocabulary that every adapter speaks. Plain, immutable, free of any vendor.

A chat is a `Request` of `Message`s made of `Part`s; the answer is a `Response`. A stream is
`TextDelta`, `ThinkingDelta` and `ToolCallDelta` events, ended by exactly one `Done` that carries
the whole `Response`. Embeddings are `EmbeddingRequest` → `EmbeddingResponse`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
CacheLifetime = Literal["5m", "1h"]
JsonObject = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    text: str
    # A prompt-cache breakpoint after this part (Anthropic's `cache_control`).
    cache: CacheLifetime | None = None
    type: Literal["text"] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """`url` is `https://…` or `data:<media type>;base64,<data>`."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    cache: CacheLifetime | None = None
    type: Literal["image"] = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """A model's reasoning. `signature` must be sent back unchanged where a vendor gave one;
    `redacted` is the vendor's opaque data in place of text."""

    text: str = ""
    signature: str | None = None
    redacted: str | None = None
    type: Literal["thinking"] = "thinking"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """`arguments` is JSON text exactly as the model wrote it; it may be invalid."""

    id: str
    name: str
    arguments: str
    type: Literal["tool_call"] = "tool_call"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    call_id: str
    content: str
    is_error: bool = False
    cache: CacheLifetime | None = None
    type: Literal["tool_result"] = "tool_result"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What a model said in place of an answer that it would not give."""

    text: str
    type: Literal["refusal"] = "refusal"


Part = Text | Image | Thinking | ToolCall | ToolResult | Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: Role
    parts: tuple[Part, ...]
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool of the caller's; `parameters` is a JSON schema of type object."""

    name: str
    description: str = ""
    parameters: JsonObject = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """`json_schema` needs `schema` and `name`; `json_object` is any JSON object."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: JsonObject | None = None
    strict: bool | None = None
    description: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One chat call. `None` means that the caller said nothing: the vendor's default holds.

    `tool_choice` is `auto`, `none`, `required` or `{"name": …}`. `thinking_budget` is in tokens.
    `extra` goes into the vendor's body as it is; keys that the adapter writes itself win.
    """

    model: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = None
    service_tier: str | None = None
    user: str | None = None
    extra: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens by kind. The kinds never overlap, so that the total is their sum.

    `input_tokens` is uncached input; `output_tokens` is output without `reasoning_tokens`
    (a vendor that does not tell them apart leaves reasoning at 0). `cache_write_5m_tokens` are
    writes of the vendor's standard lifetime (5 minutes at Anthropic, 30 at OpenAI).
    """

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def cache_write_tokens(self) -> int:
        return self.cache_write_5m_tokens + self.cache_write_1h_tokens

    @property
    def total_input_tokens(self) -> int:
        return self.input_tokens + self.cached_input_tokens + self.cache_write_tokens

    @property
    def total_output_tokens(self) -> int:
        return self.output_tokens + self.reasoning_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A whole answer. `usage` is None where the vendor gave none; `raw_usage` is what it sent."""

    id: str
    model: str
    parts: tuple[Part, ...]
    finish_reason: FinishReason
    usage: Usage | None = None
    raw_usage: JsonObject | None = None
    logprobs: JsonObject | None = None
    service_tier: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolCall))


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """`inputs` are texts or token ids, one vector each."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingResponse:
    """`vectors` has the order of the request's inputs."""

    model: str
    vectors: tuple[tuple[float, ...], ...]
    usage: Usage | None = None
    raw_usage: JsonObject | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingDelta:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """`index` counts the answer's tool calls from 0; `id` and `name` come with the first piece."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    response: Response


StreamEvent = TextDelta | ThinkingDelta | ToolCallDelta | Done
