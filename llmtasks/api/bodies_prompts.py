"""The bodies of /v1/prompts and of feedback."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from llmtasks.api.bodies import Body, Json, at

PromptName = Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,62}$")]
LabelName = Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,31}$")]


class PromptMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(min_length=1, description="Text with `{{ variable }}`.")


class NewVersion(Body):
    """A prompt's next version; the prompt itself where there is none of that name."""

    name: PromptName
    messages: list[PromptMessage] = Field(min_length=1, max_length=100)
    variables: Json | None = Field(
        None,
        description="A JSON schema of an object whose properties are the variables. One with a"
        " default may be left out. Without a schema every `{{ variable }}` takes any value.",
    )
    model: str | None = Field(None, max_length=100, description="The route where none is given.")
    parameters: Json | None = Field(
        None, description="Of the chat, like `temperature`, where the caller gives none."
    )
    description: str | None = Field(None, max_length=500)
    note: str | None = Field(None, max_length=500, description="What changed, and why.")
    labels: list[LabelName] | None = Field(
        None, max_length=10, description="That stand for this version from now on."
    )


class NewLabel(Body):
    label: LabelName
    version: int | None = Field(ge=1, description="null: there is no such label any more.")
    share: int | None = Field(
        None, ge=0, le=100, description="Of `canary` alone: percent of production's use."
    )


class NewFeedback(Body):
    """What somebody thought of a task's answer. A source's feedback replaces its earlier one."""

    score: float | None = Field(None, ge=-1, le=1, description="-1 is bad, 1 is good.")
    label: str | None = Field(None, min_length=1, max_length=64)
    comment: str | None = Field(None, max_length=10_000)
    source: str = Field(
        "user", min_length=1, max_length=64, description="Who or what thought so: user, judge …"
    )

    @model_validator(mode="before")
    @classmethod
    def as_number(cls, value: Any) -> Any:
        """1 is as good as 1.0; true is no score."""
        score = value.get("score") if isinstance(value, dict) else None
        if isinstance(score, int) and not isinstance(score, bool):
            return {**value, "score": float(max(min(score, 2), -2))}
        return value

    @model_validator(mode="after")
    def says_something(self) -> "NewFeedback":
        if self.score is None and not self.label and not self.comment:
            raise at("score", "give a score, a label or a comment")
        return self


VERSION = TypeAdapter(NewVersion)
LABEL = TypeAdapter(NewLabel)
FEEDBACK = TypeAdapter(NewFeedback)
