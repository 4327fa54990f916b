"""The body of an embedding, as the official `openai` client sends it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, WithJsonSchema

from llmtasks.api.bodies import Body, Metadata, ModelName, Scheduling, User
from providers.types import EmbeddingRequest

MAX_INPUTS = 2048
MAX_TOKEN_ID = 2**31


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and value != []
        and all(type(token) is int and 0 <= token < MAX_TOKEN_ID for token in value)
    )


def as_inputs(value: Any) -> Any:
    """One text, texts, token ids, or lists of token ids: as a list of inputs."""
    if is_text(value) or is_tokens(value):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > MAX_INPUTS:
            raise ValueError(f"give at most {MAX_INPUTS} inputs, or several requests")
        if all(is_text(item) for item in value) or all(is_tokens(item) for item in value):
            return value
    raise ValueError("give a text, a list of texts, or token ids; none of them empty")


Inputs = Annotated[
    list[Any],
    BeforeValidator(as_inputs),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "maxItems": MAX_INPUTS},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class EmbeddingInput(Body):
    """Texts to embed, as POST /v1/embeddings of OpenAI has it."""

    model: ModelName
    input: Inputs
    dimensions: int | None = Field(None, ge=1, le=100_000)
    encoding_format: Literal["float", "base64"] | None = None
    metadata: Metadata | None = None
    user: User | None = None

    def request(self) -> EmbeddingRequest:
        return EmbeddingRequest(
            model=self.model,
            inputs=tuple(tuple(item) if isinstance(item, list) else item for item in self.input),
            dimensions=self.dimensions,
            user=self.user,
        )


class EmbeddingBody(EmbeddingInput, Scheduling):
    """The same, and when it is to run: what POST /v1/embeddings takes."""

    background: bool = Field(False, description="Queue it: 202 with the task's URL.")


EMBEDDING = TypeAdapter(EmbeddingBody)
