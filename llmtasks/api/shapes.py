"""What answers look like, for the schema's readers. Answers themselves are rendered by
`answers.py`; a test holds the two against each other."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorOfField(BaseModel):
    param: str
    detail: str


class Problem(BaseModel):
    """RFC 9457; `code` is a stable word for programs, `param` names the field."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    param: str | None = None
    errors: list[ErrorOfField] | None = None
    request_id: str


class OpenAIErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    error: OpenAIErrorDetail


class TaskUsage(BaseModel):
    """Kinds of tokens that never overlap."""

    input_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int


class TaskError(BaseModel):
    class_: str = Field(serialization_alias="class")
    message: str
    retry_after: float | None


class TaskSummary(BaseModel):
    """A task without its answer, as lists have it."""

    id: str
    object: Literal["task"]
    kind: Literal["chat", "embedding", "tool", "agent", "workflow"]
    status: Literal[
        "waiting", "queued", "running", "blocked", "succeeded", "failed", "cancelled", "expired"
    ]
    mode: Literal["inline", "queued"]
    lane: Literal["interactive", "default", "bulk"]
    model: str = Field(description="The route that was asked for.")
    provider: str | None
    prompt: str | None = Field(description="The version of a prompt that ran, `name@number`.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempts: int
    usage: TaskUsage | None
    cost: str | None = Field(description="Decimal; null while unknown or where there is no price.")
    currency: Literal["USD"]
    cost_state: Literal["final", "estimated", "unpriced"] | None
    error: TaskError | None
    metadata: dict[str, Any]
    user: str | None


class Task(TaskSummary):
    """A task. `output` is what its kind's own path would have answered."""

    output: dict[str, Any] | None


class FeedbackShape(BaseModel):
    source: str
    score: float | None = Field(description="From -1 (bad) to 1 (good).")
    label: str | None
    comment: str | None
    created_at: datetime
    updated_at: datetime


class FeedbackPage(BaseModel):
    object: Literal["list"]
    data: list[FeedbackShape]


class TaskWithFeedback(Task):
    """`feedback` is there where somebody gave any."""

    feedback: list[FeedbackShape] | None = None


class PromptVersionShape(BaseModel):
    object: Literal["prompt_version"]
    prompt: str = Field(description="`name@number`: what a chat names, and what its task says.")
    name: str
    version: int
    messages: list[dict[str, str]]
    variables: dict[str, Any]
    model: str | None
    parameters: dict[str, Any]
    note: str
    created_by: str | None
    created_at: datetime


class PromptShape(BaseModel):
    object: Literal["prompt"]
    name: str
    description: str
    latest: int | None
    labels: dict[str, dict[str, int]]
    created_at: datetime


class PromptWithVersions(PromptShape):
    versions: list[PromptVersionShape]


class PromptPage(BaseModel):
    object: Literal["list"]
    data: list[PromptShape]
    has_more: bool
    next_cursor: str | None


class AcceptedTask(Task):
    url: str
    events_url: str


class TaskPage(BaseModel):
    object: Literal["list"]
    data: list[TaskSummary]
    has_more: bool
    next_cursor: str | None


class BulkItem(BaseModel):
    """Either a task or what refused it."""

    index: int
    task: TaskSummary | None = None
    error: Problem | None = None


class BulkResult(BaseModel):
    object: Literal["list"]
    data: list[BulkItem]
    accepted: int
    refused: int


class TaskToken(BaseModel):
    object: Literal["task_token"]
    token: str
    expires_in: float
    events_url: str


class ProviderModelShape(BaseModel):
    """`breaker` is null while it can't be looked at. Nothing is sent for `closed_for_s` seconds."""

    id: str
    status: Literal["ok", "degraded", "refused"]
    refused_at: datetime | None
    breaker: Literal["closed", "half_open", "open"] | None
    closed_for_s: float
    p95_ms: float | None = Field(description="95 % of the calls took less, as learnt.")


class LimitShape(BaseModel):
    """A limit that holds for all calls of the provider, or of one model."""

    model: str | None
    unit: Literal["requests", "tokens", "input_tokens", "output_tokens", "concurrency"]
    window: Literal["second", "minute", "hour", "day"] | None
    used_share: float = Field(description="0.5 where half of it is used.")


class QueueShape(BaseModel):
    """`waiting` is due, `scheduled` has to wait; with `is_at_least` they may be more."""

    waiting: int
    scheduled: int
    queued: int
    running: int
    oldest_waiting_s: float
    is_at_least: bool


class QueuesShape(BaseModel):
    interactive: QueueShape
    default: QueueShape
    bulk: QueueShape


class ProviderShape(BaseModel):
    """`refused`: the vendor refused its credential, nothing is sent. `degraded`: some of its models
    are refused or failing."""

    id: str
    object: Literal["provider"]
    status: Literal["ok", "degraded", "paused", "refused"]
    refused_at: datetime | None
    models: list[ProviderModelShape]
    limits: list[LimitShape]
    queue: QueuesShape | None


class SeenShape(BaseModel):
    """What could be looked at. Without `limits`, breakers are null and limits are missing."""

    limits: bool
    queue: bool


class ProviderPage(BaseModel):
    object: Literal["list"]
    data: list[ProviderShape]
    sees: SeenShape


class ToolShape(BaseModel):
    object: Literal["tool"]
    name: str
    version: int
    reference: str
    description: str
    parameters: dict[str, Any]
    critical: bool
    idempotent: bool
    needs_approval: bool
    timeout_s: float


class ToolPage(BaseModel):
    object: Literal["list"]
    data: list[ToolShape]


class StepShape(BaseModel):
    """One thing that an agent or a workflow did. `arguments` and `content` are a tool's; a
    workflow's step has its answer in its `task`, and `content` is what it has without one: a
    transform's value, a default, or why it failed."""

    number: int
    kind: Literal[
        "model", "tool", "wait", "prompt", "agent", "transform", "workflow", "pipeline",
        "parallel", "route", "orchestrator", "evaluate", "decision",
    ]  # fmt: skip
    name: str
    status: Literal[
        "running", "open", "approval", "approved", "done", "failed", "skipped", "unknown"
    ]
    arguments: dict[str, Any] | None
    content: Any
    error: str | None
    task: str | None
    tries: int
    started_at: datetime | None
    finished_at: datetime | None
    decided_by: str | None
    comment: str | None


class StepPage(BaseModel):
    """`next_after` goes into `after` for the next page."""

    object: Literal["list"]
    data: list[StepShape]
    has_more: bool
    next_after: int | None


class WorkflowShape(BaseModel):
    """A stored workflow's version. `versions` are the numbers that there are."""

    object: Literal["workflow"]
    name: str
    version: int
    reference: str
    is_shared: bool
    comment: str | None
    created_at: datetime
    created_by: str | None
    spec: dict[str, Any]
    versions: list[int] | None


class WorkflowPage(BaseModel):
    object: Literal["list"]
    data: list[WorkflowShape]
    has_more: bool
    next_cursor: str | None


class ModelShape(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelPage(BaseModel):
    object: Literal["list"]
    data: list[ModelShape]


class CalledFunctionShape(BaseModel):
    name: str
    arguments: str


class ToolCallShape(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunctionShape


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCallShape] | None = None
    reasoning_content: str | None = None
    thinking_blocks: list[dict[str, Any]] | None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]


class PromptDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int
    audio_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage | None
    service_tier: str | None = None


class EmbeddingShape(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingShape]
    model: str
    usage: EmbeddingUsage
