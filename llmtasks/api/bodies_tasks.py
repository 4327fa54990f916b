"""The bodies of /v1/tasks: a task, or many."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from llmtasks.api.bodies import Body, Metadata, Scheduling, User
from llmtasks.api.bodies_chat import ChatInput
from llmtasks.api.bodies_embeddings import EmbeddingInput

MAX_BULK = 1000


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


def tag_of_task(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"<{kind}>" if isinstance(kind, str) else None


AnyNewTask = Annotated[
    Annotated[NewChatTask, Tag("<chat>")] | Annotated[NewEmbeddingTask, Tag("<embedding>")],
    Discriminator(
        tag_of_task,
        custom_error_type="at.kind",
        custom_error_message="give an object whose kind is chat or embedding",
    ),
]


class BulkBody(Body):
    tasks: list[Any] = Field(min_length=1, max_length=MAX_BULK)


TASK: TypeAdapter[NewChatTask | NewEmbeddingTask] = TypeAdapter(AnyNewTask)
BULK = TypeAdapter(BulkBody)
