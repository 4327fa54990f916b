"""OpenAPI 3.1 of every path, at /v1/schema and, browsable, /v1/docs."""

from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerView

from llmtasks.api import shapes
from llmtasks.api.bodies_chat import ChatBody
from llmtasks.api.bodies_embeddings import EmbeddingBody
from llmtasks.api.bodies_prompts import NewFeedback, NewLabel, NewVersion
from llmtasks.api.bodies_tasks import (
    BulkBody,
    Decision,
    Invocation,
    NewAgentTask,
    NewChatTask,
    NewEmbeddingTask,
    NewToolTask,
    NewWorkflow,
    NewWorkflowTask,
)

PROBLEM = "application/problem+json"
STREAM = "text/event-stream"


class ApiKeyScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """How the schema describes our authentication."""

    target_class = "llmtasks.api.auth.ApiKeyAuthentication"
    name = "ApiKey"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key `lt_…`, or a task token `tt_…` for its one task.",
        }


class Schema(SpectacularJSONAPIView):
    """GET /v1/schema"""

    authentication_classes: Any = ()
    permission_classes: Any = ()


class Docs(SpectacularSwaggerView):
    """GET /v1/docs"""

    authentication_classes: Any = ()
    permission_classes: Any = ()
    url_name = "schema"


def header(name: str, about: str) -> OpenApiParameter:
    return OpenApiParameter(name, str, OpenApiParameter.HEADER, description=about)


def query(name: str, about: str, kind: type = str) -> OpenApiParameter:
    return OpenApiParameter(name, kind, OpenApiParameter.QUERY, description=about)


KEY = header(
    "Idempotency-Key",
    "1 to 255 visible ASCII characters. The same key with the same body gets the same answer;"
    " with another body 422; while the first still runs 409.",
)
PREFER = header(
    "Prefer",
    "`respond-async`: queue it. `wait=N`: queue it and wait for at most N seconds, then 200 or"
    " 202 (RFC 7240).",
)
STATUSES = {
    400: "The field named by `param` is wrong.",
    401: "The API key is missing, wrong, expired or revoked.",
    403: "The API key lacks the scope.",
    404: "There is no such thing for this tenant.",
    409: "The state does not allow it, or the same Idempotency-Key still runs.",
    413: "The body is too large.",
    422: "The Idempotency-Key came with another body before.",
    429: "The provider's rate limit; see Retry-After.",
    502: "The provider failed.",
    503: "Something is away; see Retry-After.",
    504: "The provider did not answer in time, or the deadline passed.",
}
CREATING = (400, 401, 409, 413, 422, 503)
CALLING = (*CREATING, 429, 502, 504)
READING = (400, 401, 404, 503)


def problems(*statuses: int) -> dict[Any, Any]:
    """Errors of the native door."""
    return {
        (status, PROBLEM): OpenApiResponse(shapes.Problem, description=STATUSES[status])
        for status in statuses
    }


def openai_errors(*statuses: int) -> dict[Any, Any]:
    return {
        status: OpenApiResponse(shapes.OpenAIError, description=STATUSES[status])
        for status in statuses
    }


def told(shape: Any, about: str) -> OpenApiResponse:
    return OpenApiResponse(shape, description=about)


ACCEPTED = told(shapes.AcceptedTask, "Queued; Location is the task, Retry-After says when to ask.")

chat_completions = extend_schema(
    operation_id="chat_completions",
    summary="Chat, as OpenAI's clients call it",
    description="Runs inline. `stream: true` answers with server-sent chunks."
    ' `"background": true` or `Prefer: respond-async` queues it.',
    tags=["OpenAI"],
    parameters=[KEY, PREFER],
    request={"application/json": ChatBody},
    responses={
        (200, "application/json"): told(shapes.ChatCompletion, "The answer."),
        (200, STREAM): told(str, "Chunks, with stream: true."),
        (202, "application/json"): ACCEPTED,
        **openai_errors(*CALLING),
    },
)
embeddings = extend_schema(
    operation_id="embeddings",
    summary="Embeddings, as OpenAI's clients call them",
    tags=["OpenAI"],
    parameters=[KEY, PREFER],
    request={"application/json": EmbeddingBody},
    responses={
        200: told(shapes.EmbeddingList, "The vectors, in the order of the inputs."),
        202: ACCEPTED,
        **openai_errors(*CALLING),
    },
)
models = extend_schema(
    operation_id="models",
    summary="The models that may be used",
    tags=["OpenAI"],
    responses={200: told(shapes.ModelPage, "Every route."), **openai_errors(401, 503)},
)
model = extend_schema(
    operation_id="model",
    summary="One model",
    tags=["OpenAI"],
    parameters=[OpenApiParameter("name", str, OpenApiParameter.PATH, description="Its name.")],
    responses={200: told(shapes.ModelShape, "The route."), **openai_errors(401, 404, 503)},
)
list_providers = extend_schema(
    operation_id="list_providers",
    summary="How the vendors do",
    description="For your operators: what is paused, refused or failing, how much of each limit is"
    " used, what waits. As of a moment ago.",
    tags=["Providers"],
    responses={200: told(shapes.ProviderPage, "Every provider."), **problems(401, 403, 503)},
)
create_task = extend_schema(
    operation_id="create_task",
    summary="Create a task",
    description="`mode: inline` runs it in this request, `queued` answers 202 at once, `auto`"
    " (the default) runs it inline where an answer can be expected within a few seconds, else"
    " queues it and waits for so long. The answer is the task, whatever became of it: look at its"
    " status.",
    tags=["Tasks"],
    parameters=[KEY, PREFER],
    request={
        "application/json": NewChatTask,
        "application/vnd.embedding+json": NewEmbeddingTask,
        "application/vnd.agent+json": NewAgentTask,
        "application/vnd.tool+json": NewToolTask,
        "application/vnd.workflow+json": NewWorkflowTask,
    },
    responses={
        200: told(shapes.Task, "Final, or run inline."),
        202: ACCEPTED,
        **problems(*CREATING),
    },
)
create_tasks = extend_schema(
    operation_id="create_tasks",
    summary="Create up to 1,000 queued tasks",
    description="All that are valid are saved in one transaction; each item has its own result.",
    tags=["Tasks"],
    parameters=[KEY],
    request={"application/json": BulkBody},
    responses={200: told(shapes.BulkResult, "A result per item."), **problems(*CREATING)},
)
list_tasks = extend_schema(
    operation_id="list_tasks",
    summary="List tasks, newest first",
    description="Also `metadata.<name>=<value>`, for tasks with that pair.",
    tags=["Tasks"],
    parameters=[
        query("limit", "1 to 100, 20 if left out.", int),
        query("cursor", "`next_cursor` of the page before."),
        query("status", "One or more, parted by commas."),
        query("lane", "One or more, parted by commas."),
        query("kind", "One or more, parted by commas."),
        query("model", "The route."),
        query("user", "Your end user."),
        query("prompt", "The version of a prompt, name@number."),
        query("created_after", "Not before this time, 2030-01-31T12:00:00Z."),
        query("created_before", "Before this time."),
    ],
    responses={200: told(shapes.TaskPage, "A page."), **problems(400, 401, 503)},
)
get_task = extend_schema(
    operation_id="get_task",
    summary="A task",
    tags=["Tasks"],
    responses={200: told(shapes.TaskWithFeedback, "The task."), **problems(*READING)},
)
cancel_task = extend_schema(
    operation_id="cancel_task",
    summary="Cancel a task",
    description="One that waits is cancelled at once, one that runs within a second.",
    tags=["Tasks"],
    parameters=[KEY],
    request=None,
    responses={
        200: told(shapes.Task, "Cancelled."),
        202: told(shapes.Task, "It runs still, and will be within a second."),
        **problems(401, 404, 409, 503),
    },
)
retry_task = extend_schema(
    operation_id="retry_task",
    summary="Run a finished task again, as a new one",
    tags=["Tasks"],
    parameters=[KEY],
    request=None,
    responses={202: ACCEPTED, **problems(401, 404, 409, 422, 503)},
)
mint_token = extend_schema(
    operation_id="mint_token",
    summary="A short-lived token for a browser",
    description="Good for reading and cancelling this one task.",
    tags=["Tasks"],
    parameters=[KEY],
    request=None,
    responses={201: told(shapes.TaskToken, "The token."), **problems(401, 404, 503)},
)
watch_task = extend_schema(
    operation_id="watch_task",
    summary="A task's events, as they happen",
    description="Server-sent events `state`, `delta`, `thinking`, `tool_call`, `reset`,"
    " `step`, `snapshot`, `done`. Ends after a while; EventSource comes back by itself with"
    " Last-Event-ID. 204 after `done` was seen.",
    tags=["Tasks"],
    parameters=[
        header("Last-Event-ID", "Go on after this event."),
        query("last_event_id", "The same, for who can't send the header."),
        query("token", "A task token, for EventSource, which can't send headers."),
    ],
    responses={
        (200, STREAM): told(str, "Events."),
        204: told(None, "The end was seen already."),
        **problems(401, 404, 503),
    },
)
tools = extend_schema(
    operation_id="tools",
    summary="The tools that may be used",
    description="Every version of each, with the JSON schema of its arguments.",
    tags=["Tools"],
    responses={200: told(shapes.ToolPage, "The tools."), **problems(401, 403, 503)},
)
invoke_tool = extend_schema(
    operation_id="invoke_tool",
    summary="Run a tool",
    description="A critical one runs in this request; any other is queued: 202.",
    tags=["Tools"],
    parameters=[KEY, PREFER],
    request={"application/json": Invocation},
    responses={
        200: told(shapes.Task, "It ran: look at the task's status."),
        202: ACCEPTED,
        **problems(*CREATING, 404),
    },
)
task_steps = extend_schema(
    operation_id="task_steps",
    summary="What an agent or a workflow did, step by step",
    tags=["Tasks"],
    parameters=[
        query("limit", "1 to 1000, 1000 if left out.", int),
        query("after", "`next_after` of the page before.", int),
    ],
    responses={200: told(shapes.StepPage, "The steps in order."), **problems(*READING)},
)
create_version = extend_schema(
    operation_id="create_workflow_version",
    summary="Store a workflow, or a new version of one",
    description="Versions never change. The same declaration as the latest version's is that"
    " version.",
    tags=["Workflows"],
    request={"application/json": NewWorkflow},
    responses={
        200: told(shapes.WorkflowShape, "It is the latest version already."),
        201: told(shapes.WorkflowShape, "The new version."),
        **problems(400, 401, 403, 404, 413, 503),
    },
)
list_workflows = extend_schema(
    operation_id="list_workflows",
    summary="The workflows that may be used",
    description="The latest version of each: your own, and those that are shared.",
    tags=["Workflows"],
    parameters=[
        query("limit", "1 to 100, 20 if left out.", int),
        query("cursor", "`next_cursor` of the page before."),
    ],
    responses={200: told(shapes.WorkflowPage, "A page."), **problems(400, 401, 403, 503)},
)
get_workflow = extend_schema(
    operation_id="get_workflow",
    summary="A workflow's version",
    description="`name@3`, or `name` for the latest.",
    tags=["Workflows"],
    parameters=[
        OpenApiParameter("name", str, OpenApiParameter.PATH, description="`name` or `name@3`.")
    ],
    responses={200: told(shapes.WorkflowShape, "The version."), **problems(*READING, 403)},
)
decide_step = extend_schema(
    operation_id="decide_step",
    summary="Approve or refuse a step that waits for a person",
    tags=["Tasks"],
    request={"application/json": Decision},
    responses={200: told(shapes.StepShape, "The step."), **problems(*READING, 409)},
)
list_prompts = extend_schema(
    operation_id="list_prompts",
    summary="Your prompts, by name",
    tags=["Prompts"],
    parameters=[query("cursor", "`next_cursor` of the page before.")],
    responses={200: told(shapes.PromptPage, "A page."), **problems(401, 403, 503)},
)
create_prompt = extend_schema(
    operation_id="create_prompt",
    summary="Add a prompt's next version",
    description="The first makes the prompt. One that says what the last says is the last: 200.",
    tags=["Prompts"],
    request={"application/json": NewVersion},
    responses={
        200: told(shapes.PromptVersionShape, "The last version says just that."),
        201: told(shapes.PromptVersionShape, "The new version."),
        **problems(400, 401, 403, 413, 503),
    },
)
get_prompt = extend_schema(
    operation_id="get_prompt",
    summary="A prompt with its newest versions",
    tags=["Prompts"],
    responses={200: told(shapes.PromptWithVersions, "The prompt."), **problems(*READING)},
)
get_prompt_version = extend_schema(
    operation_id="get_prompt_version",
    summary="One version of a prompt",
    tags=["Prompts"],
    responses={200: told(shapes.PromptVersionShape, "The version."), **problems(*READING)},
)
set_label = extend_schema(
    operation_id="set_label",
    summary="Have a label stand for a version",
    description="In force at once. `production` is what runs where no version is named; `canary`"
    " takes its share of that.",
    tags=["Prompts"],
    request={"application/json": NewLabel},
    responses={200: told(shapes.PromptShape, "The prompt."), **problems(*READING, 403)},
)
get_feedback = extend_schema(
    operation_id="get_feedback",
    summary="What was thought of a task's answer",
    tags=["Feedback"],
    responses={200: told(shapes.FeedbackPage, "One for each source."), **problems(*READING)},
)
give_feedback = extend_schema(
    operation_id="give_feedback",
    summary="Say what was thought of a task's answer",
    description="A source's feedback replaces its earlier one, so that repeating it is harmless.",
    tags=["Feedback"],
    request={"application/json": NewFeedback},
    responses={
        200: told(shapes.FeedbackPage, "It replaced the source's earlier one."),
        201: told(shapes.FeedbackPage, "The source's first."),
        **problems(*READING, 403),
    },
)
export_feedback = extend_schema(
    operation_id="export_feedback",
    summary="Your tasks with feedback, as lines of JSON",
    description="The oldest first, with request and response where they are still kept.",
    tags=["Feedback"],
    parameters=[
        query("created_after", "Tasks made not before this time, 2030-01-31T12:00:00Z."),
        query("created_before", "Tasks made before this time."),
    ],
    responses={
        (200, "application/jsonl"): told(str, "A line for each task."),
        **problems(400, 401, 403, 503),
    },
)
