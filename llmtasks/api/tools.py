"""/v1/tools: what a key may use, and one run of one; a person's word on an agent's step."""

from typing import Any
from uuid import UUID

from django.http import HttpResponse
from rest_framework.request import Request

from llmtasks import bodies as stored
from llmtasks import execute, steps, submit
from llmtasks.api import answers, bodies, listing, schema
from llmtasks.api.auth import Principal
from llmtasks.api.bodies_tasks import DECISION, INVOCATION
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
    work_of,
)
from llmtasks.api.openai import socket_of
from llmtasks.api.waiting import accepted, load, url_of
from llmtasks.errors import Conflict, InvalidInput, NotFound
from llmtasks.models import Kind, Mode, Scope, Step, Task
from llmtasks.tools import allowed
from llmtasks.tools.registry import Tool, registry
from llmtasks.tools.run import fault_of

# Of one page.
MOST_STEPS = 1000


class Tools(ApiView):
    """GET /v1/tools"""

    @schema.tools
    def get(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.TOOLS)
        data = [shown(tool) for tool in registry.all() if may_use(principal, tool)]
        return answers.json_response({"object": "list", "data": data})


class Invoke(ApiView):
    """POST /v1/tools/{name}/invoke"""

    @schema.invoke_tool
    def post(self, request: Request, name: str) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        tool = usable(principal, name)
        raw = read_body(request)
        body = bodies.check(INVOCATION, bodies.decode(raw) if raw.strip() else {})
        check_arguments(tool, body.arguments, "arguments")
        prefer = preferences_of(request)
        work = work_of(
            principal,
            Kind.TOOL,
            stored.ToolRequest(tool=tool.reference, arguments=body.arguments),
            body,
            metadata=body.metadata,
            user=body.user,
            idempotency=idempotency_of(request, raw, "/v1/tools/{name}/invoke"),
        )
        if earlier := earlier_task(work.tenant_id, work.idempotency):
            return tell_replayed(of_task(earlier, prefer))
        if tool.critical and body.run_at is None and not prefer.respond_async:
            task = submit.inline(work)
            outcome = execute.run(task, work.request, client_socket=socket_of(request))
            return located(answers.task_body(outcome.task, outcome.response), outcome.task)
        return accepted(queue(work), prefer)


class Steps(ApiView):
    """GET /v1/tasks/{id}/steps"""

    @schema.task_steps
    def get(self, request: Request, task_id: UUID) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ, task_id)
        load(task_id, principal.tenant_id)
        after = listing.whole_number(request.GET, "after", -1, least=-1, most=2**31 - 1)
        limit = listing.whole_number(request.GET, "limit", MOST_STEPS, least=1, most=MOST_STEPS)
        rows = steps.page(task_id, after, limit + 1)
        shown_rows = rows[:limit]
        has_more = len(rows) > limit
        return answers.json_response(
            {
                "object": "list",
                "data": [answers.step(row) for row in shown_rows],
                "has_more": has_more,
                "next_after": shown_rows[-1].number if has_more else None,
            }
        )


class Decide(ApiView):
    """POST /v1/tasks/{id}/decide"""

    @schema.decide_step
    def post(self, request: Request, task_id: UUID) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        body = bodies.check(DECISION, bodies.decode(read_body(request)))
        load(task_id, principal.tenant_id)
        row = Step.objects.filter(task_id=task_id, number=body.step).first()
        if row is None:
            raise NotFound(f"The task has no step {body.step}.")
        approves = body.decision == "approve"
        decided = steps.decide(
            row.id, principal.tenant_id, run=approves, by=body.by, comment=body.comment
        )
        if decided is None:
            raise Conflict(f"Step {body.step} waits for nobody: it is {row.status}.")
        return answers.json_response(answers.step(decided))


def located(body: dict[str, Any], task: Task) -> HttpResponse:
    response = answers.json_response(body)
    response["Location"] = url_of(task)
    return response


def of_task(task: Task, prefer: Preferences) -> HttpResponse:
    if task.mode == Mode.QUEUED:
        return accepted(task, prefer)
    return located(answers.task_row(task), task)


def shown(tool: Tool) -> dict[str, Any]:
    return {
        "object": "tool",
        "name": tool.name,
        "version": tool.version,
        "reference": tool.reference,
        "description": tool.description,
        "parameters": tool.parameters,
        "critical": tool.critical,
        "idempotent": tool.idempotent,
        "needs_approval": tool.needs_approval,
        "timeout_s": tool.timeout_s,
    }


def may_use(principal: Principal, tool: Tool) -> bool:
    return not allowed.fault(tool, principal.tenant_id, principal.key_id)


def usable(principal: Principal, reference: str, param: str | None = None) -> Tool:
    """The tool, if the key may use it. Raises NotFound: also for one that it may not."""
    principal.require(Scope.TOOLS)
    tool = registry.find(reference)
    if not may_use(principal, tool):
        raise NotFound(
            f"there is no tool {reference!r}: GET /v1/tools lists those that you may use",
            param=param,
        )
    return tool


def check_arguments(tool: Tool, arguments: dict[str, Any], param: str) -> None:
    """Raises InvalidInput for arguments that fit no call of the tool."""
    if fault := fault_of(tool.parameters, arguments):
        raise InvalidInput(f"{param}: {fault}", param=param)


def check_work(principal: Principal, request: Any) -> Any:
    """The request of an agent or a tool with its tools' exact versions, which hold to its end,
    whatever is deployed meanwhile. Raises NotFound, InvalidInput."""
    if isinstance(request, stored.ToolRequest):
        tool = usable(principal, request.tool, "input.tool")
        check_arguments(tool, dict(request.arguments), "input.arguments")
        return stored.ToolRequest(tool=tool.reference, arguments=request.arguments)
    if isinstance(request, stored.AgentRequest):
        found = [usable(principal, name, "input.tools") for name in request.tools]
        return stored.AgentRequest(
            chat=request.chat,
            tools=tuple(dict.fromkeys(tool.reference for tool in found)),
            max_turns=request.max_turns,
            max_tokens=request.max_tokens,
            max_cost=request.max_cost,
        )
    return request
