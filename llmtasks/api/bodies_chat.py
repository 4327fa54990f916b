"""The body of a chat, as the official `openai` client sends it, and as our vocabulary has it.

Fields that vendors of the same format understand and we don't look at go on as they are
(`PASSED_ON`). What we can't honour is refused by name, with what to do instead.

Three things are not OpenAI's: `cache_control` on parts (a prompt-cache breakpoint), `thinking`
(a budget in tokens), and `thinking_blocks` of an assistant's message (what a model thought, to
be sent back with its tool calls).
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from llmtasks.api.bodies import (
    Body,
    Json,
    Metadata,
    ModelName,
    Scheduling,
    Schema,
    User,
    at,
)
from providers.types import (
    Image,
    Message,
    Part,
    Refusal,
    Request,
    ResponseFormat,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
    ToolSpec,
)

PASSED_ON = (
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "verbosity",
    "web_search_options",
)
NAME = "^[a-zA-Z0-9_-]{1,64}$"
IMAGE_URLS = ("https://", "http://", "data:image/")


class CacheControl(Body):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class TextPart(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: None = None

    def part(self) -> Text:
        return Text(text=self.text, cache=self.cache_control.ttl if self.cache_control else None)


class ImageURL(Body):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


def is_image_url(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("url"), str):
        url: str = value["url"]
        is_data = url.startswith("data:")
        if not url.startswith(IMAGE_URLS) or (is_data and ";base64," not in url[:100]):
            raise ValueError("give a url https://… or data:image/…;base64,…")
    return value


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(is_image_url)]
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: None = None

    def part(self) -> Image:
        return Image(
            url=self.image_url.url,
            detail=self.image_url.detail,
            cache=self.cache_control.ttl if self.cache_control else None,
        )


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str

    def part(self) -> Refusal:
        return Refusal(text=self.refusal)


def tag_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if isinstance(kind, str) else None


def part_type(tag: str) -> Discriminator:
    return Discriminator(
        tag_of_part,
        custom_error_type="part_type",
        custom_error_message=f"give an object whose type is {tag}",
    )


def as_parts(value: Any) -> Any:
    """A content is a string or a list of parts; a string is one text part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


TEXTS = "A string, or a list of text parts."
TEXTS_AND_IMAGES = "A string, or a list of text and image_url parts."
TEXTS_AND_REFUSALS = "A string, or a list of text and refusal parts."
UserPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    part_type("text or image_url"),
]
AssistantPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    part_type("text or refusal"),
]
TextContent = Annotated[
    list[TextPart], BeforeValidator(as_parts), Field(min_length=1, description=TEXTS)
]
UserContent = Annotated[
    list[UserPart], BeforeValidator(as_parts), Field(min_length=1, description=TEXTS_AND_IMAGES)
]
AssistantContent = Annotated[
    list[AssistantPart],
    BeforeValidator(as_parts),
    Field(min_length=1, description=TEXTS_AND_REFUSALS),
]


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: TextContent
    name: str | None = Field(None, max_length=64)

    def message(self) -> Message:
        return Message(role="system", parts=parts_of(self.content), name=self.name)


class UserMessage(Body):
    role: Literal["user"]
    content: UserContent
    name: str | None = Field(None, max_length=64)

    def message(self) -> Message:
        return Message(role="user", parts=parts_of(self.content), name=self.name)


class CalledFunction(Body):
    name: str = Field(min_length=1, max_length=64)
    arguments: str


class ToolCallParam(Body):
    id: str = Field(min_length=1, max_length=200)
    type: Literal["function"]
    function: CalledFunction
    index: int | None = Field(None, description="Ignored: streamed answers bring it.")

    def part(self) -> ToolCall:
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


class ThinkingBlock(Body):
    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""
    signature: str | None = None
    data: str | None = None

    def part(self) -> Thinking:
        return Thinking(text=self.thinking, signature=self.signature, redacted=self.data)


class AssistantMessage(Body):
    """An earlier answer. What the client's own answer object carries besides is accepted, so
    that it can be sent back as it came."""

    role: Literal["assistant"]
    content: AssistantContent | None = None
    name: str | None = Field(None, max_length=64)
    refusal: str | None = None
    tool_calls: list[ToolCallParam] | None = None
    thinking_blocks: list[ThinkingBlock] | None = None
    reasoning_content: str | None = Field(None, description="Ignored: see thinking_blocks.")
    annotations: list[Any] | None = Field(None, description="Ignored.")
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def says_something(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise at("content", "give content, tool_calls or refusal")
        return self

    def message(self) -> Message:
        parts: tuple[Part, ...] = parts_of(self.thinking_blocks or ())
        parts += parts_of(self.content or ())
        if self.refusal is not None:
            parts += (Refusal(text=self.refusal),)
        return Message(
            role="assistant", parts=parts + parts_of(self.tool_calls or ()), name=self.name
        )


class ToolMessage(Body):
    role: Literal["tool"]
    content: TextContent
    tool_call_id: str = Field(min_length=1, max_length=200)

    def message(self) -> Message:
        result = ToolResult(
            call_id=self.tool_call_id,
            content="".join(part.text for part in self.content),
            cache=parts_of(self.content)[-1].cache,
        )
        return Message(role="tool", parts=(result,))


def parts_of(found: Any) -> Any:
    return tuple(item.part() for item in found)


ROLES = {
    "system": "<system>",
    "developer": "<system>",
    "user": "<user>",
    "assistant": "<assistant>",
    "tool": "<tool>",
}


def tag_of_message(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return ROLES.get(role) if isinstance(role, str) else None


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(
        tag_of_message,
        custom_error_type="role",
        custom_error_message="give an object whose role is system, developer, user, assistant"
        " or tool",
    ),
]


class Function(Body):
    name: str = Field(pattern=NAME)
    description: str = ""
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    def spec(self) -> ToolSpec:
        given = self.function
        fields: dict[str, Any] = {"parameters": given.parameters} if given.parameters else {}
        return ToolSpec(
            name=given.name, description=given.description, strict=given.strict, **fields
        )


class JsonSchemaFormat(Body):
    name: str = Field(pattern=NAME)
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def has_its_schema(self) -> "Format":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise at("json_schema", 'this goes with type "json_schema", and with no other')
        return self

    def format(self) -> ResponseFormat:
        given = self.json_schema
        if given is None:
            return ResponseFormat(type=self.type)
        return ResponseFormat(
            type=self.type,
            name=given.name,
            schema=given.schema_,
            strict=given.strict,
            description=given.description,
        )


def as_choice(value: Any) -> Any:
    """A named function's choice in our words: {"name": …}."""
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise ValueError("give none, auto, required, or a function to call")
        return value
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or value.get("type") != "function" or set(value) - CHOICE:
        raise ValueError('give none, auto, required or {"type": "function", "function": {"name"}}')
    return {"name": name}


CHOICE = {"type", "function"}
ToolChoice = Annotated[
    Any,
    BeforeValidator(as_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                        },
                    },
                },
            ]
        }
    ),
]


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class ThinkingOption(Body):
    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = Field(None, ge=1, le=10_000_000)

    @model_validator(mode="after")
    def has_its_budget(self) -> "ThinkingOption":
        if (self.budget_tokens is None) == (self.type == "enabled"):
            raise at("budget_tokens", 'this goes with type "enabled", and with no other')
        return self


Penalty = Annotated[float, Field(ge=-2, le=2)]
Limit = Annotated[int, Field(ge=1, le=10_000_000)]


class ChatInput(Body):
    """A chat, as POST /v1/chat/completions of OpenAI has it."""

    model: ModelName
    messages: list[ChatMessage] = Field(min_length=1)
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    max_completion_tokens: Limit | None = None
    max_tokens: Limit | None = Field(None, description="The older name of max_completion_tokens.")
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    prediction: Json | None = None
    presence_penalty: Penalty | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Json | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    response_format: Format | None = None
    safety_identifier: str | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    stop: Annotated[list[str], BeforeValidator(as_list), Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    tool_choice: ToolChoice | None = None
    tools: list[Tool] | None = Field(None, max_length=512)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    top_p: float | None = Field(None, ge=0, le=1)
    user: User | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: Json | None = None
    thinking: ThinkingOption | None = Field(None, description="A budget for reasoning.")
    extra: Json | None = Field(None, description="Goes into the vendor's body as it is.")

    # Known, and refused unless they say what holds anyway (`bodies.REFUSED` says why).
    audio: None = None
    function_call: None = None
    functions: None = None
    modalities: list[Literal["text"]] | None = None
    moderation: None = None
    n: Literal[1] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def fits_together(self) -> "ChatInput":
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise at("max_tokens", "this differs from max_completion_tokens: give one of them")
        if self.stream_options is not None and not self.stream:
            raise at("stream_options", "this goes with stream: true only")
        if self.top_logprobs is not None and not self.logprobs:
            raise at("top_logprobs", "this needs logprobs: true")
        names = {tool.function.name for tool in self.tools or ()}
        if isinstance(self.tool_choice, dict) and self.tool_choice["name"] not in names:
            raise at("tool_choice", "this names a function that is not among the tools")
        return self

    def request(self) -> Request:
        extra = {name: value for name in PASSED_ON if (value := getattr(self, name)) is not None}
        return Request(
            model=self.model,
            messages=tuple(message.message() for message in self.messages),
            tools=tuple(tool.spec() for tool in self.tools or ()),
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.response_format.format() if self.response_format else None,
            max_output_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            reasoning_effort=self.reasoning_effort,
            thinking_budget=self.thinking.budget_tokens if self.thinking else None,
            service_tier=self.service_tier,
            user=self.user,
            extra=extra | (self.extra or {}),
        )


class ChatBody(ChatInput, Scheduling):
    """The same, and when it is to run: what POST /v1/chat/completions takes."""

    background: bool = Field(False, description="Queue it: 202 with the task's URL.")


CHAT = TypeAdapter(ChatBody)
