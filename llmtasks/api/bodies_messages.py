"""The messages of a chat's body and their parts, and what they are in our vocabulary."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from llmtasks.api.bodies import Body, at
from providers.types import (
    Image,
    Message,
    Part,
    Refusal,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
)

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
