"""/v1/tasks: the native door. Every kind of work, inline or queued, and what became of it."""

import hashlib
from typing import Any
from uuid import UUID

from django.conf import settings
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from rest_framework.request import Request

from llmtasks import execute, feedback, pulse, sla, submit
from llmtasks.api import answers, auth, bodies, prompts, schema
from llmtasks.api.bodies_tasks import (
    BULK,
    TASK,
    NewAgentTask,
    NewChatTask,
    NewEmbeddingTask,
    NewToolTask,
    NewWorkflowTask,
    WorkflowInput,
)
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
from llmtasks.api.errors import problem
from llmtasks.api.listing import tasks_of
from llmtasks.api.openai import NOT_STREAMED, socket_of, tell_outcome
from llmtasks.api.streaming import stream_events
from llmtasks.api.tools import check_work
from llmtasks.api.waiting import accepted, load, tell_preferences, url_of, watched
from llmtasks.api.workflows import requested
from llmtasks.errors import ApiError, Conflict, InvalidInput, KeyReused, NotFound
from llmtasks.execute import Outcome
from llmtasks.models import FINAL, IdempotencyKey, Mode, Scope, Status, Task
from llmtasks.submit import Idempotency, Work

AnyNewTask = NewChatTask | NewEmbeddingTask | NewAgentTask | NewToolTask | NewWorkflowTask
BULK_ENDPOINT = "/v1/tasks/bulk"


class Tasks(ApiView):
    """POST and GET /v1/tasks"""

    @schema.create_task
    def post(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        raw = read_body(request)
        given, prompt = prompts.of_task(principal, bodies.decode(raw))
        body = bodies.check(TASK, given)
        idempotency = idempotency_of(request, raw, "/v1/tasks")
        work = work_for(principal, body, idempotency, prompt)
        wishes = preferences_of(request)
        if earlier := earlier_task(work.tenant_id, idempotency):
            return tell_replayed(of_earlier(earlier, body, wishes))
        try:
            if runs_inline(work, body, wishes):
                return run_inline(within_patience(work, wishes), request)
            return of_queued(queue(work), body, wishes)
        except InvalidInput as error:
            error.param = within_input(error.param)
            raise

    @schema.list_tasks
    def get(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ)
        return answers.json_response(answers.page(*tasks_of(principal.tenant_id, request.GET)))


class Bulk(ApiView):
    """POST /v1/tasks/bulk"""

    @schema.create_tasks
    def post(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        raw = read_body(request)
        items = bodies.check(BULK, bodies.decode(raw)).tasks
        given = idempotency_of(request, raw, BULK_ENDPOINT)
        keys = [key_of_item(given, index) for index in range(len(items))]
        is_replay = bulk_was_sent(principal.tenant_id, keys)
        works = [
            parsed_item(principal, item, f"tasks[{index}]", keys[index])
            for index, item in enumerate(items)
        ]
        response = answers.json_response(bulk_answer(works))
        return tell_replayed(response) if is_replay else response


class OneTask(ApiView):
    """GET /v1/tasks/{id}"""

    @schema.get_task
    def get(self, request: Request, task_id: UUID) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ, task_id)
        task = load(task_id, principal.tenant_id)
        given = [feedback.shown(row) for row in feedback.of(task_id, principal.tenant_id)]
        with_it = {"feedback": given} if given else {}
        return answers.json_response(answers.task_row(task) | with_it)


class Cancel(ApiView):
    """POST /v1/tasks/{id}/cancel"""

    @schema.cancel_task
    def post(self, request: Request, task_id: UUID) -> HttpResponse:
        principal = principal_of(request)
        principal.require(auth.CANCEL, task_id)
        # Repeating it is harmless: the key is checked, and needs no memory.
        idempotency_of(request, read_body(request, is_json=False), "/v1/tasks/{id}/cancel")
        try:
            execute.cancel(task_id, principal.tenant_id)
        except Conflict:
            # Who repeats a cancel whose answer was lost gets the same answer.
            if load(task_id, principal.tenant_id).status != Status.CANCELLED:
                raise
        task = load(task_id, principal.tenant_id)
        status = 200 if task.status in FINAL else 202
        return answers.json_response(answers.task_row(task), status=status)


class Retry(ApiView):
    """POST /v1/tasks/{id}/retry"""

    @schema.retry_task
    def post(self, request: Request, task_id: UUID) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        idempotency = idempotency_of(
            request, read_body(request, is_json=False), "/v1/tasks/{id}/retry"
        )
        if earlier := earlier_task(principal.tenant_id, idempotency):
            return tell_replayed(accepted(earlier, Preferences()))
        return accepted(submit.retry(task_id, principal.tenant_id, idempotency), Preferences())


class Token(ApiView):
    """POST /v1/tasks/{id}/token"""

    @schema.mint_token
    def post(self, request: Request, task_id: UUID) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ)
        idempotency_of(request, read_body(request, is_json=False), "/v1/tasks/{id}/token")
        load(task_id, principal.tenant_id)
        token = auth.mint(principal, task_id)
        return answers.json_response(
            {
                "object": "task_token",
                "token": token,
                "expires_in": settings.LLMTASKS["TASK_TOKEN_S"],
                "events_url": f"/v1/tasks/{task_id}/events?token={token}",
            },
            status=201,
        )


class Events(ApiView):
    """GET /v1/tasks/{id}/events"""

    @schema.watch_task
    def get(self, request: Request, task_id: UUID) -> HttpResponseBase:
        principal = principal_of(request)
        principal.require(Scope.READ, task_id)
        task = load(task_id, principal.tenant_id)
        after = request.headers.get("Last-Event-ID") or request.GET.get("last_event_id")
        return stream_events(task, after or None)


# --- One task -------------------------------------------------------------------------------


def work_for(
    principal: auth.Principal,
    body: AnyNewTask,
    idempotency: Idempotency | None,
    prompt: str,
) -> Work:
    """What the body asks for. Raises InvalidInput."""
    given = body.input
    streams = bool(getattr(given, "stream", None))
    if streams and body.mode == "inline":
        raise InvalidInput(f"input.stream: {NOT_STREAMED}", param="input.stream")
    return work_of(
        principal,
        body.kind,
        asked(principal, given),
        body,
        metadata=getattr(given, "metadata", None) if body.metadata is None else body.metadata,
        user=getattr(given, "user", None) if body.user is None else body.user,
        stream=streams or None,
        idempotency=idempotency,
        prompt=prompt,
    )


def asked(principal: auth.Principal, given: Any) -> Any:
    """What is to be done, with all that it names looked up. Raises InvalidInput, NotFound."""
    if isinstance(given, WorkflowInput):
        return requested(principal, given)
    return check_work(principal, given.request())


def within_input(param: str | None) -> str | None:
    """A field that the corridor names, as this door's body has it."""
    if param is None or param in NewChatTask.model_fields or param.startswith("input."):
        return param
    return f"input.{param}"


def runs_inline(work: Work, body: AnyNewTask, wishes: Preferences) -> bool:
    if body.mode == "inline" or body.mode == "queued":
        return body.mode == "inline"
    return not wishes.respond_async and sla.runs_inline(work, wait_of(wishes))


def wait_of(wishes: Preferences) -> float:
    """How long the caller of work in mode `auto` waits for its end."""
    if wishes.wait is not None:
        return wishes.wait
    return min(settings.LLMTASKS["AUTO_WAIT_S"], wishes.patience)


def run_inline(work: Work, request: Request) -> HttpResponse:
    """Run it in this request. The answer is the task, whatever became of it."""
    task = submit.inline(work)
    return of_outcome(execute.run(task, work.request, client_socket=socket_of(request)))


def of_outcome(outcome: Outcome) -> HttpResponse:
    response = answers.json_response(answers.task_body(outcome.task, outcome.response))
    response["Location"] = url_of(outcome.task)
    return tell_outcome(response, outcome)


def of_queued(task: Task, body: AnyNewTask, wishes: Preferences) -> HttpResponse:
    """202 at once, or 200 if the task is done within the time that the caller waits."""
    wait = wishes.wait
    if wait is None and body.mode != "queued" and not wishes.respond_async:
        wait = wait_of(wishes)
    if wait is not None and body.run_at is None:
        task = watched(task, wait)
    if wait is None or task.status not in FINAL:
        return accepted(task, wishes)
    response = answers.json_response(answers.task_row(task))
    response["Location"] = url_of(task)
    return tell_preferences(response, wishes)


def of_earlier(task: Task, body: AnyNewTask, wishes: Preferences) -> HttpResponse:
    if task.mode == Mode.QUEUED:
        return of_queued(task, body, wishes)
    return of_outcome(Outcome(task, answers.stored_response(task)))


# --- Many tasks -----------------------------------------------------------------------------


def parsed_item(
    principal: auth.Principal, item: Any, place: str, idempotency: Idempotency | None
) -> Work | ApiError:
    try:
        given, prompt = prompts.of_task(principal, item, f"{place}.")
        body = bodies.check(TASK, given, place)
        if body.mode == "inline":
            raise InvalidInput("many tasks are queued: leave mode out", param=f"{place}.mode")
        return work_for(principal, body, idempotency, prompt)
    except (InvalidInput, NotFound) as error:
        return error


def bulk_answer(works: list[Work | ApiError]) -> dict[str, Any]:
    """Save what is valid, in one transaction; a result for each item, in order."""
    saved = iter(submit.queued([work for work in works if isinstance(work, Work)]))
    results = [next(saved) if isinstance(work, Work) else work for work in works]
    data = [result_of_item(index, result) for index, result in enumerate(results)]
    accepted_count = sum("task" in item for item in data)
    return {
        "object": "list",
        "data": data,
        "accepted": accepted_count,
        "refused": len(data) - accepted_count,
    }


def result_of_item(index: int, result: Task | ApiError) -> dict[str, Any]:
    if isinstance(result, Task):
        return {"index": index, "task": answers.summary(result)}
    error = problem(result)
    place = f"tasks[{index}]"
    if result.param and not result.param.startswith(place):
        # Found by the corridor, which knows no places in a list.
        error["param"] = f"{place}.{within_input(result.param)}"
    return {"index": index, "error": error}


def key_of_item(given: Idempotency | None, index: int) -> Idempotency | None:
    """Each item has a key of its own, made from the request's."""
    if given is None:
        return None
    digest = hashlib.sha256(given.key.encode()).hexdigest()
    return Idempotency(endpoint=given.endpoint, key=f"{digest}:{index}", body_hash=given.body_hash)


def bulk_was_sent(tenant_id: UUID, keys: list[Idempotency | None]) -> bool:
    """Whether this bulk was sent before. Raises KeyReused if the key came with another body."""
    wanted = [key for key in keys if key is not None]
    if not wanted:
        return False
    hashes = set(
        IdempotencyKey.objects.filter(
            tenant_id=tenant_id,
            endpoint=BULK_ENDPOINT,
            key__in=[key.key for key in wanted],
            expires_at__gt=pulse.now(),
        ).values_list("body_hash", flat=True)
    )
    if hashes - {wanted[0].body_hash}:
        raise KeyReused("This Idempotency-Key came with another body before: use a new key.")
    return bool(hashes)
