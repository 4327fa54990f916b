"""Agents on real stores and the sandbox: turns, tools at once and in the background, approval,
interruption. The model's `script` makes the calls that the first message lists."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from django.db import connections

from llmtasks import execute, pulse, steps, submit
from llmtasks.admin import runs
from llmtasks.bodies import AgentRequest
from llmtasks.execute import Outcome
from llmtasks.models import Attempt, Kind, Provider, Status, Step, Task, Tenant
from llmtasks.tools import registry as tools
from llmtasks.tools.registry import ToolError, of_function
from tests import factories
from tests.integration.working import work_off

CALLS: list[str] = []


@pytest.fixture(autouse=True)
def toolbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[tools.Registry]:
    CALLS.clear()
    box = tools.Registry()
    monkeypatch.setattr(tools.registry, "tools", box.tools)

    def look_up(order: int) -> dict[str, Any]:
        """Look an order up."""
        CALLS.append(f"look_up {order}")
        time.sleep(0.1)
        return {"order": order, "state": "sent"}

    def send_mail(to: str) -> str:
        CALLS.append(f"send_mail {to}")
        return f"sent to {to}"

    def delete(order: int) -> str:
        CALLS.append(f"delete {order}")
        return "gone"

    def fails() -> str:
        raise ToolError("the warehouse is closed")

    box.add(of_function(look_up, idempotent=True))
    box.add(of_function(send_mail, critical=False))
    box.add(of_function(delete, needs_approval=True))
    box.add(of_function(fails))
    yield box


@pytest.fixture
def tenant(account: Provider) -> Tenant:
    factories.route("script", (account, "script"))
    return factories.tenant()


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def agent_work(tenant: Tenant, *turns: list[dict[str, Any]], **fields: Any) -> submit.Work:
    chat = factories.request("script", orjson.dumps(turns).decode())
    names = ("look_up", "send_mail", "delete", "fails")
    caps = {n: fields.pop(n) for n in ("max_turns", "max_tokens", "max_cost") if n in fields}
    request = AgentRequest(chat=chat, tools=fields.pop("tools", names), **caps)
    return submit.Work(tenant_id=tenant.id, key_id=None, kind=Kind.AGENT, request=request, **fields)


def inline(work: submit.Work) -> Outcome:
    return execute.run(submit.inline(work), work.request)


def queue(work: submit.Work) -> Task:
    [task] = submit.queued([work])
    assert isinstance(task, Task), task
    return task


def shown(task: Task) -> list[tuple[int, str, str, str]]:
    return [(s.number, s.kind, s.name, s.status) for s in steps.of(task.id)]


def test_without_calls_it_is_a_chat(tenant: Tenant) -> None:
    outcome = inline(agent_work(tenant))
    assert outcome.task.status == Status.SUCCEEDED
    assert outcome.response.text == "[]"
    assert shown(outcome.task) == [(0, "model", "script", "done")]


def test_critical_calls_of_one_turn_run_at_the_same_time(tenant: Tenant) -> None:
    turns = [[call("look_up", order=n) for n in range(4)], [call("look_up", order=9)]]
    outcome = inline(agent_work(tenant, *turns))
    assert outcome.task.status == Status.SUCCEEDED
    assert outcome.response.text == '{"order":9,"state":"sent"}'
    assert sorted(CALLS[:4]) == [f"look_up {n}" for n in range(4)]
    rows = steps.of(outcome.task.id)
    assert [row.kind for row in rows] == ["model", *["tool"] * 4, "model", "tool", "model"]
    first = rows[1:5]
    assert max(r.started_at for r in first) < min(r.finished_at for r in first if r.finished_at)
    # Each turn is an attempt of its own step; the task's money is their sum.
    attempts = Attempt.objects.filter(task_id=outcome.task.id).order_by("step")
    assert [a.step for a in attempts] == [0, 5, 7]
    turns_began = [row.started_at for row in rows if row.kind == "model"]
    assert turns_began == [a.started_at for a in attempts]
    outcome.task.refresh_from_db()
    assert outcome.task.cost == sum(a.cost for a in attempts)


@pytest.mark.parametrize("count", [1, 3])
def test_no_connection_is_kept_while_tools_run(
    tenant: Tenant, toolbox: tools.Registry, count: int
) -> None:
    callers, kept = connections["default"], []

    def look(number: int) -> str:
        kept.append(callers.connection is not None)
        return "seen"

    toolbox.add(of_function(look))
    turn = [call("look", number=n) for n in range(count)]
    task = queue(agent_work(tenant, turn, tools=("look",)))
    work_off()
    task.refresh_from_db()
    assert task.status == Status.SUCCEEDED
    assert kept == [False] * count


def test_queued_and_in_the_background(tenant: Tenant) -> None:
    task = queue(agent_work(tenant, [call("look_up", order=1), call("send_mail", to="a@b")]))
    work_off()
    task.refresh_from_db()
    assert task.status == Status.SUCCEEDED
    rows = steps.of(task.id)
    assert orjson.loads(rows[2].output["content"]) == {"queued": str(rows[2].child_id)}
    child = Task.objects.select_related("payload").get(id=rows[2].child_id)
    assert (child.kind, child.status, child.parent_id) == ("tool", Status.SUCCEEDED, task.id)
    assert child.payload.response == {"content": "sent to a@b"}
    assert CALLS == ["look_up 1", "send_mail a@b"]


def test_a_failing_or_unknown_tool_is_a_result(tenant: Tenant) -> None:
    wrong = {"name": "look_up", "arguments": "{no json"}
    turns = [[call("fails"), call("nothing"), wrong, call("look_up", order="x")]]
    outcome = inline(agent_work(tenant, *turns))
    assert outcome.task.status == Status.SUCCEEDED
    errors = [row.error_class for row in steps.of(outcome.task.id) if row.kind == "tool"]
    assert errors == ["ToolError", "UnknownTool", "BadArguments", "BadArguments"]
    assert CALLS == []


def test_it_stops_at_its_caps(tenant: Tenant) -> None:
    turns = [[call("look_up", order=n)] for n in range(5)]
    outcome = inline(agent_work(tenant, *turns, max_turns=2))
    assert (outcome.task.status, outcome.task.error_class) == (Status.FAILED, "AgentStopped")
    assert "max_turns=2" in outcome.task.error_message
    outcome = inline(agent_work(tenant, *turns, max_tokens=10))
    assert "max_tokens=10" in outcome.task.error_message


def test_the_same_call_again_and_again(tenant: Tenant) -> None:
    outcome = inline(agent_work(tenant, *[[call("look_up", order=1)] for _ in range(5)]))
    errors = [row.error_class for row in steps.of(outcome.task.id) if row.kind == "tool"]
    assert errors == ["", "", "", "Repeated", "Repeated"]
    assert len(CALLS) == 3


def test_waiting_for_results_holds_no_worker(tenant: Tenant) -> None:
    turns = [[call("send_mail", to="a@b")], [call("await_results", ids="$queued")]]
    task = queue(agent_work(tenant, *turns))
    work_off(once=True)
    task.refresh_from_db()
    [child] = Task.objects.filter(parent_id=task.id)
    assert (task.status, task.owner_id, child.status) == (Status.BLOCKED, None, Status.WAITING)
    assert task.waits_for == [child.id]
    work_off()
    task.refresh_from_db()
    assert task.status == Status.SUCCEEDED
    assert CALLS == ["send_mail a@b"]
    [content] = [row.output["content"] for row in steps.of(task.id) if row.kind == "wait"]
    results = {str(child.id): {"status": "succeeded", "result": "sent to a@b"}}
    assert orjson.loads(content) == {"results": results}


def test_approval_blocks_until_a_person_decides(tenant: Tenant) -> None:
    task = queue(agent_work(tenant, [call("delete", order=7), call("look_up", order=1)]))
    work_off()
    task.refresh_from_db()
    assert task.status == Status.BLOCKED
    assert shown(task)[1:] == [
        (1, "tool", "delete@1", "approval"), (2, "tool", "look_up@1", "done"),
    ]  # fmt: skip
    assert CALLS == ["look_up 1"]
    step = steps.of(task.id)[1]
    other = factories.tenant()
    assert steps.decide(step.id, other.id, run=True, by="x", comment="") is None
    assert steps.decide(step.id, tenant.id, run=True, by="ann", comment="fine") is not None
    assert steps.decide(step.id, tenant.id, run=True, by="bob", comment="") is None
    work_off()
    task.refresh_from_db()
    assert task.status == Status.SUCCEEDED
    assert CALLS == ["look_up 1", "delete 7"]


def test_a_refused_call_is_told_to_the_model(tenant: Tenant) -> None:
    task = queue(agent_work(tenant, [call("delete", order=7)]))
    work_off()
    step = steps.of(task.id)[1]
    assert steps.decide(step.id, tenant.id, run=False, by="ann", comment="too early")
    work_off()
    task.refresh_from_db()
    assert task.status == Status.SUCCEEDED
    assert CALLS == []
    assert "a person refused this call: too early" in str(steps.of(task.id)[1].output)


def test_inline_nobody_can_be_asked(tenant: Tenant) -> None:
    outcome = inline(agent_work(tenant, [call("delete", order=7)]))
    [error] = [row.error_class for row in steps.of(outcome.task.id) if row.kind == "tool"]
    assert error == "NeedsApproval"


@pytest.mark.parametrize(
    ("name", "arguments", "status", "calls"),
    [("look_up", {"order": 1}, Status.SUCCEEDED, 1), ("delete", {"order": 1}, Status.BLOCKED, 0)],
)
def test_what_was_under_way_when_its_process_died(
    tenant: Tenant, toolbox: tools.Registry, name: str, arguments: Any, status: str, calls: int
) -> None:
    task = queue(agent_work(tenant, [call(name, **arguments)]))
    work_off()
    step = steps.of(task.id)[1]
    # As if the worker had died in the middle of the call.
    Step.objects.filter(id=step.id).update(status="running", output=None, finished_at=None)
    Step.objects.filter(task_id=task.id, number__gt=1).delete()
    Task.objects.filter(id=task.id).update(status="waiting", finished_at=None)
    CALLS.clear()
    work_off()
    task.refresh_from_db()
    assert task.status == status
    assert len(CALLS) == calls
    if status == Status.BLOCKED:
        assert steps.of(task.id)[1].status == "unknown"


def test_a_cancel_between_two_turns(tenant: Tenant) -> None:
    turns = [[call("look_up", order=n)] for n in range(40)]
    work = agent_work(tenant, *turns, max_turns=50)
    task = submit.inline(work)
    ended: list[Outcome] = []
    thread = threading.Thread(target=lambda: ended.append(execute.run(task, work.request)))
    thread.start()
    while len(CALLS) < 2:
        time.sleep(0.01)
    execute.cancel(task.id)
    thread.join()
    assert ended[0].task.status == Status.CANCELLED
    assert len(CALLS) < 40
    assert pulse.start().calls == {}


def test_the_admin_draws_what_was_done(tenant: Tenant) -> None:
    turns = [[call("look_up", order=1), call("send_mail", to="a@b")], [call("fails")]]
    task = queue(agent_work(tenant, *turns))
    work_off()
    task.refresh_from_db()
    run = runs.drawn(task)
    assert [[(node.title, node.words) for node in wave] for wave in run.waves] == [
        [("script", "done")],
        [("look_up@1", "done"), ("send_mail@1", "succeeded")],
        [("script", "done")],
        [("fails@1", "failed")],
        [("script", "done")],
    ]
    assert task.cost and run.cost == runs.total_of(task).cost == task.cost
