"""The paths of OpenAI's API that the official client calls, over our corridor."""

from typing import Any

from django.http import HttpResponse
from django.http.response import HttpResponseBase
from rest_framework.request import Request

from llmtasks import execute, routing, submit
from llmtasks.api import answers, bodies, limits, prompts, schema
from llmtasks.api.bodies_chat import CHAT, ChatBody
from llmtasks.api.bodies_embeddings import EMBEDDING, EmbeddingBody
from llmtasks.api.doors import (
    ApiView,
    Preferences,
    earlier_task,
    idempotency_of,
    preferences_of,
    principal_of,
    queue,
    read_body,
    tell_replayed,
    within_patience,
    work_of,
)
from llmtasks.api.errors import Ended
from llmtasks.api.streaming import replay_chat, stream_chat
from llmtasks.api.waiting import accepted, tell_preferences, watched
from llmtasks.errors import Conflict, InvalidInput, UnknownModel
from llmtasks.execute import Outcome
from llmtasks.models import FINAL, Kind, Mode, Scope, Task
from llmtasks.submit import Work

NOT_STREAMED = (
    "a queued chat can't be streamed here: leave it out, and follow the task's events_url"
)


class ChatCompletions(ApiView):
    """POST /v1/chat/completions"""

    @schema.chat_completions
    def post(self, request: Request) -> HttpResponseBase:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        raw = read_body(request)
        given, prompt = prompts.of_chat(principal, bodies.decode(raw))
        body = bodies.check(CHAT, given)
        prefer = preferences_of(request)
        in_background = wants_queue(body, prefer)
        if in_background and body.stream:
            raise InvalidInput(f"stream: {NOT_STREAMED}", param="stream")
        work = work_of(
            principal,
            Kind.CHAT,
            body.request(),
            body,
            metadata=body.metadata,
            user=body.user,
            stream=True if body.stream else None,
            idempotency=idempotency_of(request, raw, "/v1/chat/completions"),
            prompt=prompt,
        )
        if earlier := earlier_task(work.tenant_id, work.idempotency):
            return tell_replayed(replayed_chat(earlier, body, prefer))
        if in_background:
            return queued(work, prefer)
        if body.stream:
            task = submit.inline(work)
            return stream_chat(task, work.request, includes_usage(body), socket_of(request))
        task = submit.inline(within_patience(work, prefer))
        return answered(execute.run(task, work.request, client_socket=socket_of(request)))


class Embeddings(ApiView):
    """POST /v1/embeddings"""

    @schema.embeddings
    def post(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        raw = read_body(request)
        body = bodies.check(EMBEDDING, bodies.decode(raw))
        prefer = preferences_of(request)
        work = work_of(
            principal,
            Kind.EMBEDDING,
            body.request(),
            body,
            metadata=body.metadata,
            user=body.user,
            idempotency=idempotency_of(request, raw, "/v1/embeddings"),
        )
        as_base64 = body.encoding_format == "base64"
        if earlier := earlier_task(work.tenant_id, work.idempotency):
            return tell_replayed(replayed(earlier, prefer, as_base64))
        if wants_queue(body, prefer):
            return queued(work, prefer, as_base64)
        task = submit.inline(within_patience(work, prefer))
        outcome = execute.run(task, work.request, client_socket=socket_of(request))
        return answered(outcome, as_base64)


class Models(ApiView):
    """GET /v1/models"""

    @schema.models
    def get(self, request: Request) -> HttpResponse:
        principal_of(request).require(Scope.READ)
        names = sorted(usable_routes())
        return answers.json_response({"object": "list", "data": [model(name) for name in names]})


class Model(ApiView):
    """GET /v1/models/{id}"""

    @schema.model
    def get(self, request: Request, name: str) -> HttpResponse:
        principal_of(request).require(Scope.READ)
        if name not in usable_routes():
            raise UnknownModel(
                f"there is no model {name!r}: GET /v1/models lists those that you may use",
                param="model",
            )
        return answers.json_response(model(name))


def usable_routes() -> list[str]:
    return [name for name, route in routing.snapshot().routes.items() if route.candidates]


def model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llmtasks"}


def wants_queue(body: ChatBody | EmbeddingBody, prefer: Preferences) -> bool:
    if body.background or prefer.respond_async or prefer.wait is not None:
        return True
    if body.run_at is not None:
        raise InvalidInput("run_at: queue it with background: true", param="run_at")
    return False


def includes_usage(body: ChatBody) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def socket_of(request: Request) -> Any:
    """The caller's socket, so that a hang-up is seen while the vendor is waited for."""
    return request._request.META.get("gunicorn.socket")


# --- Answers --------------------------------------------------------------------------------


def answered(outcome: Outcome, as_base64: bool = False) -> HttpResponse:
    """The answer of inline work. Raises Ended where it failed."""
    if outcome.response is None:
        raise Ended(outcome.task, limits.headers(outcome.limits))
    return tell_outcome(rendered(outcome.task, outcome.response, as_base64), outcome)


def tell_outcome(response: HttpResponse, outcome: Outcome) -> HttpResponse:
    """What the headers say of a call beside its answer."""
    if outcome.warning:
        response["x-llmtasks-warning"] = outcome.warning
    for name, value in limits.headers(outcome.limits).items():
        response[name] = value
    return response


def rendered(task: Task, answer: Any, as_base64: bool = False) -> HttpResponse:
    if task.kind == Kind.EMBEDDING:
        response = answers.json_response(answers.embeddings(task, answer, as_base64))
    else:
        response = answers.json_response(answers.completion(task, answer))
    response["x-llmtasks-task-id"] = str(task.id)
    response["x-llmtasks-provider"] = task.provider
    if task.cost is not None:
        response["x-llmtasks-cost"] = answers.money(task.cost) or ""
    return response


def queued(work: Work, prefer: Preferences, as_base64: bool = False) -> HttpResponse:
    """Queue it; with `Prefer: wait=N`, the answer if it is there in time."""
    task = queue(work)
    if prefer.wait is not None:
        task = watched(task, prefer.wait)
    return of_queued(task, prefer, as_base64)


def of_queued(task: Task, prefer: Preferences, as_base64: bool = False) -> HttpResponse:
    if prefer.wait is None or task.status not in FINAL:
        return accepted(task, prefer)
    return tell_preferences(rendered(task, final_answer(task), as_base64), prefer)


def final_answer(task: Task) -> Any:
    """The stored answer of a final task. Raises Ended where it has none."""
    answer = answers.stored_response(task)
    if answer is None:
        if not task.error_class:
            raise Conflict("The answer was deleted: send the request again with a new key.")
        raise Ended(task)
    return answer


def replayed(task: Task, prefer: Preferences, as_base64: bool = False) -> HttpResponse:
    """The answer that this request got before."""
    if task.mode == Mode.QUEUED:
        if prefer.wait is not None:
            task = watched(task, prefer.wait)
        return of_queued(task, prefer, as_base64)
    return rendered(task, final_answer(task), as_base64)


def replayed_chat(task: Task, body: ChatBody, prefer: Preferences) -> HttpResponseBase:
    if task.mode == Mode.INLINE and body.stream:
        return replay_chat(task, final_answer(task), includes_usage(body))
    return replayed(task, prefer)
