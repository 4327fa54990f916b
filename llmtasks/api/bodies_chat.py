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
    ConfigDict,
    Field,
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
from llmtasks.api.bodies_messages import ChatMessage
from providers.types import Request, ResponseFormat, ToolSpec

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


# They are put into the body before it is checked (`api/prompts.py`).
OF_A_PROMPT = {
    "prompt": {
        "type": "string",
        "description": "A prompt of GET /v1/prompts: `name`, `name@3` or `name@label`. Its messages"
        " come first; `model` and `messages` may then be left out.",
    },
    "variables": {"type": "object", "description": "The prompt's."},
}


def with_prompt(schema: dict[str, Any]) -> None:
    schema["properties"] = OF_A_PROMPT | schema["properties"]
    schema.pop("required", None)


class ChatInput(Body):
    """A chat, as POST /v1/chat/completions of OpenAI has it, or one that a prompt gives."""

    model_config = ConfigDict(json_schema_extra=with_prompt)

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
        chosen = self.tool_choice
        if isinstance(chosen, dict) and chosen["name"] not in self.function_names():
            raise at("tool_choice", "this names a function that is not among the tools")
        return self

    def function_names(self) -> set[str]:
        return {tool.function.name for tool in self.tools or ()}

    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(tool.spec() for tool in self.tools or ())

    def request(self) -> Request:
        extra = {name: value for name in PASSED_ON if (value := getattr(self, name)) is not None}
        return Request(
            model=self.model,
            messages=tuple(message.message() for message in self.messages),
            tools=self.specs(),
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
