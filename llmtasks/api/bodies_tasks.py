"""The bodies of /v1/tasks: a task, or many."""

from decimal import Decimal, InvalidOperation
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

from llmtasks.api.bodies import Body, Json, Metadata, Scheduling, User, at
from llmtasks.api.bodies_chat import ChatInput
from llmtasks.api.bodies_embeddings import EmbeddingInput
from llmtasks.bodies import AgentRequest, ToolRequest
from llmtasks.workflows.spec import Stored, Workflow
from providers.types import ToolSpec

MAX_BULK = 1000


def as_money(value: Any) -> Decimal:
    """Dollars as a decimal string; a JSON number would be a float."""
    try:
        amount = Decimal(value) if isinstance(value, str) else None
    except InvalidOperation:
        amount = None
    if amount is None or not amount.is_finite() or not 0 < amount < 10**9:
        raise ValueError('give dollars as a decimal string, like "0.25"')
    return amount


Money = Annotated[
    Decimal,
    BeforeValidator(as_money),
    WithJsonSchema({"type": "string", "description": "Dollars."}),
]
ToolName = Annotated[
    str,
    Field(
        pattern="^[a-zA-Z][a-zA-Z0-9_-]*(@[1-9][0-9]{0,7})?$",
        max_length=80,
        description="One of GET /v1/tools, like `find_order`, or `find_order@2` for a version.",
    ),
]


class NewTask(Scheduling):
    """What every kind of task has."""

    mode: Literal["inline", "queued", "auto"] | None = Field(
        None,
        description="inline: run in this request. queued: 202 at once. auto (the default):"
        " inline where an answer can be expected within a few seconds, else queued, and watched"
        " for so long in case it is done by then.",
    )
    metadata: Metadata | None = None
    user: User | None = Field(None, description="Your end user; tasks can be listed by it.")


class NewChatTask(NewTask):
    kind: Literal["chat"]
    input: ChatInput


class NewEmbeddingTask(NewTask):
    kind: Literal["embedding"]
    input: EmbeddingInput


class AgentInput(ChatInput):
    """A chat whose tools are those of GET /v1/tools: they are called here, until the model
    answers."""

    tools: list[ToolName] | None = Field(None, max_length=128)  # type: ignore[assignment]
    max_turns: int = Field(10, ge=1, le=100, description="Calls of the model at the most.")
    max_total_tokens: int | None = Field(None, ge=1, le=10**12)
    max_cost: Money | None = None

    def function_names(self) -> set[str]:
        return {name.partition("@")[0] for name in self.tools or ()}

    def specs(self) -> tuple[ToolSpec, ...]:
        return ()

    def request(self) -> AgentRequest:  # type: ignore[override]
        return AgentRequest(
            chat=super().request(),
            tools=tuple(dict.fromkeys(self.tools or ())),
            max_turns=self.max_turns,
            max_tokens=self.max_total_tokens,
            max_cost=self.max_cost,
        )


class NewAgentTask(NewTask):
    kind: Literal["agent"]
    input: AgentInput


class ToolInput(Body):
    tool: ToolName
    arguments: Json = Field(default_factory=dict)

    def request(self) -> ToolRequest:
        return ToolRequest(tool=self.tool, arguments=self.arguments)


class NewToolTask(NewTask):
    kind: Literal["tool"]
    input: ToolInput


class WorkflowInput(Body):
    """A stored workflow by its name, or a declaration."""

    workflow: Stored | None = Field(
        None, description="One of GET /v1/workflows: `name@3`, or `name` for its latest version."
    )
    spec: Workflow | None = None
    input: Json = Field(default_factory=dict, description="What `{{ input.… }}` names.")

    @model_validator(mode="after")
    def one_of_two(self) -> "WorkflowInput":
        if (self.workflow is None) == (self.spec is None):
            raise at("workflow", "give either workflow or spec")
        return self

    def request(self) -> "WorkflowInput":
        # What a name stands for depends on who asks: `api/workflows.py`.
        return self


class NewWorkflowTask(NewTask):
    kind: Literal["workflow"]
    input: WorkflowInput


class NewWorkflow(Body):
    """What POST /v1/workflows takes."""

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,63}$")]
    spec: Workflow
    comment: str = Field("", max_length=200)


class Invocation(Scheduling):
    """What POST /v1/tools/{name}/invoke takes."""

    arguments: Json = Field(default_factory=dict)
    metadata: Metadata | None = None
    user: User | None = None


class Decision(Body):
    """A person's word on a step that waits for one."""

    step: int = Field(ge=0)
    decision: Literal["approve", "refuse"]
    by: str = Field(min_length=1, max_length=150, description="Who decided; kept with the step.")
    comment: str = Field("", max_length=2000, description="The model is told, where refused.")


def tag_of_task(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"<{kind}>" if isinstance(kind, str) else None


AnyNewTask = Annotated[
    Annotated[NewChatTask, Tag("<chat>")]
    | Annotated[NewEmbeddingTask, Tag("<embedding>")]
    | Annotated[NewAgentTask, Tag("<agent>")]
    | Annotated[NewToolTask, Tag("<tool>")]
    | Annotated[NewWorkflowTask, Tag("<workflow>")],
    Discriminator(
        tag_of_task,
        custom_error_type="at.kind",
        custom_error_message="give an object whose kind is chat, embedding, agent, tool or"
        " workflow",
    ),
]


class BulkBody(Body):
    tasks: list[Any] = Field(min_length=1, max_length=MAX_BULK)


TASK: TypeAdapter[NewChatTask | NewEmbeddingTask | NewAgentTask | NewToolTask | NewWorkflowTask] = (
    TypeAdapter(AnyNewTask)
)
NEW_VERSION = TypeAdapter(NewWorkflow)
BULK = TypeAdapter(BulkBody)
INVOCATION = TypeAdapter(Invocation)
DECISION = TypeAdapter(Decision)
