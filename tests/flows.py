"""What tests of workflows share: tools that note their calls, blocks, and runs to the end."""

from typing import Any

import pytest

from llmtasks import execute, steps, submit
from llmtasks.models import Kind, Provider, Status, Step, Task, Tenant
from llmtasks.tools import registry as tools
from llmtasks.tools.registry import ToolError, of_function
from llmtasks.workflows import children, spec, store
from tests import factories
from tests.integration.working import work_off

CALLS: list[str] = []


def put_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """`look_up`, `fails`, `works_at` and `delete` (which needs approval), and no others."""
    CALLS.clear()
    box = tools.Registry()
    monkeypatch.setattr(tools.registry, "tools", box.tools)
    monkeypatch.setattr(children, "RETRY_S", 0.01)

    def look_up(order: int) -> dict[str, Any]:
        CALLS.append(f"look_up {order}")
        return {"order": order, "state": "sent"}

    def fails() -> str:
        CALLS.append("fails")
        raise ToolError("the warehouse is closed")

    def works_at(attempt: int) -> str:
        """Fails until it was called so often."""
        CALLS.append("works_at")
        if len(CALLS) < attempt:
            raise ToolError("not yet")
        return f"at {len(CALLS)}"

    def delete(order: int) -> str:
        CALLS.append(f"delete {order}")
        return "gone"

    box.add(of_function(look_up, idempotent=True))
    box.add(of_function(fails))
    box.add(of_function(works_at))
    box.add(of_function(delete, needs_approval=True))


def tenant_with_routes(account: Provider) -> Tenant:
    factories.route("echo", (account, "echo"))
    factories.route("broken", (account, "error-400"))
    factories.route("slow", (account, "slow-3000"))
    factories.route("embed", (account, "embed"), kind=Kind.EMBEDDING)
    return factories.tenant()


def prompt(name: str | None, text: str, model: str = "echo", **fields: Any) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {"kind": "prompt", "model": model, "text": text, **named, **fields}


def tool(name: str, tool_name: str, /, **fields: Any) -> dict[str, Any]:
    arguments = fields.pop("arguments", {})
    return {"kind": "tool", "name": name, "tool": tool_name, "arguments": arguments, **fields}


def pipeline(*stages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"kind": "pipeline", "stages": list(stages), **fields}


def queue(tenant: Tenant, do: dict[str, Any], given: Any = None, **fields: Any) -> Task:
    declared = {name: fields.pop(name) for name in ("max_cost", "variables") if name in fields}
    workflow = store.ready(spec.parse({"do": do, **declared}), tenant.id)
    values = children.with_defaults(workflow, given or {})
    request = children.request_of(workflow, workflow.do.kind, values)
    work = submit.Work(
        tenant_id=tenant.id, key_id=None, kind=Kind.WORKFLOW, request=request, **fields
    )
    [task] = submit.queued([work])
    assert isinstance(task, Task), task
    return task


def done(tenant: Tenant, do: dict[str, Any], given: Any = None, **fields: Any) -> Any:
    """The value of a workflow that is run to its end."""
    task = queue(tenant, do, given, **fields)
    work_off()
    task = Task.objects.select_related("payload").get(id=task.id)
    assert task.status == Status.SUCCEEDED, (task.error_class, task.error_message)
    return task.payload.response["value"]


def failed(tenant: Tenant, do: dict[str, Any], given: Any = None, **fields: Any) -> tuple[str, str]:
    task = queue(tenant, do, given, **fields)
    work_off()
    task.refresh_from_db()
    assert task.status == Status.FAILED
    return task.error_class, task.error_message


def run_now(task: Task) -> None:
    """This one alone, as a worker would; a parent that waits is woken before."""
    steps.wake([task.id])
    moved = Task.objects.filter(id=task.id, status="waiting").update(status="queued", seq=1)
    assert moved == 1, Task.objects.get(id=task.id).status
    execute.run_queued(task.id, 1)


def shown(task: Task) -> list[tuple[int, str, str, str]]:
    rows = Step.objects.filter(task_id=task.id).order_by("number")
    return [(row.number, row.kind, row.name, row.status) for row in rows]
