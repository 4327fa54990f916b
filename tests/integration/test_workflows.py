"""Workflows on real stores and the sandbox: each pattern, each policy, costs, cancel."""

import threading
import time
import tracemalloc
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from llmtasks import crash, execute, ledger, prompts, pulse, steps, submit, sweep
from llmtasks.admin import runs
from llmtasks.errors import NotFound
from llmtasks.models import Attempt, Kind, Provider, Status, Step, Task, Tenant
from llmtasks.tools import registry as tools
from llmtasks.tools.registry import ToolError, of_function
from llmtasks.workflows import children, spec, store
from providers.types import Usage
from tests import factories
from tests.integration.working import work_off

CALLS: list[str] = []
FAILS: list[int] = []


@pytest.fixture(autouse=True)
def toolbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    CALLS.clear()
    FAILS.clear()
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
    yield


@pytest.fixture
def tenant(account: Provider) -> Tenant:
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


# --- Pipelines ------------------------------------------------------------------------------------


def test_a_pipeline_of_prompts(tenant: Tenant) -> None:
    do = pipeline(
        prompt("first", "one {{ input.word }}"),
        prompt("second", "two {{ steps.first.output }}", lane="bulk"),
        prompt("third", "{{ steps.second.output }} and {{ steps.first.output }}"),
    )
    task = queue(tenant, do, {"word": "x"})
    work_off(once=True)
    task.refresh_from_db()
    assert task.status == Status.BLOCKED
    assert task.owner_id is None
    work_off()
    task = Task.objects.select_related("payload").get(id=task.id)
    assert task.payload.response == {"value": "two one x and one x"}
    assert shown(task) == [
        (0, "prompt", "first", "done"), (1, "prompt", "second", "done"),
        (2, "prompt", "third", "done"),
    ]  # fmt: skip
    rows = list(Task.objects.filter(parent_id=task.id).order_by("id"))
    assert [(row.kind, row.route, row.lane) for row in rows] == [
        ("chat", "echo", "default"), ("chat", "echo", "bulk"), ("chat", "echo", "default"),
    ]  # fmt: skip
    assert {row.deadline for row in rows} == {task.deadline}
    assert task.cost == sum(row.cost for row in rows) > 0
    assert task.input_tokens == sum(row.input_tokens for row in rows) > 0
    assert task.cost_state == "final"
    assert task.attempts == 0


def test_tools_and_transforms(tenant: Tenant) -> None:
    do = pipeline(
        tool("order", "look_up", arguments={"order": "{{ input.number }}"}),
        {
            "kind": "transform", "name": "text",
            "value": ["{{ steps.order.output.state }}", "b"], "do": [{"op": "join", "by": "+"}],
        },
        output={"said": "{{ steps.text.output }}", "order": "{{ steps.order.output.order }}"},
    )  # fmt: skip
    assert done(tenant, do, {"number": 7}) == {"said": "sent+b", "order": 7}
    assert CALLS == ["look_up 7"]


def test_what_a_model_says_is_never_read_as_a_template(tenant: Tenant) -> None:
    do = pipeline(prompt("said", "{{ input.text }}"), prompt("again", "> {{ steps.said.output }}"))
    text = "{{ input.secret }} {{ steps.said.output }}"
    assert done(tenant, do, {"text": text, "secret": "s"}) == f"> {text}"


# --- What goes wrong ------------------------------------------------------------------------------


def test_a_failing_step_fails_the_workflow(tenant: Tenant) -> None:
    do = pipeline(prompt("first", "x"), tool("second", "fails"), prompt("third", "y"))
    error, message = failed(tenant, do)
    assert error == "StepFailed"
    assert "step 'second' failed: ToolFailed" in message
    assert "the warehouse is closed" in message
    assert Step.objects.filter(name="third").count() == 0


@pytest.mark.parametrize(
    ("policy", "value", "status"),
    [
        ({"on_error": "skip"}, None, "skipped"),
        ({"on_error": "default", "default": {"a": 1}}, {"a": 1}, "done"),
    ],
)
def test_a_failing_step_that_is_no_matter(
    tenant: Tenant, policy: dict[str, Any], value: Any, status: str
) -> None:
    do = pipeline(tool("broken", "fails", **policy), output={"got": "{{ steps.broken.output }}"})
    assert done(tenant, do) == {"got": value}
    step = Step.objects.get(name="broken")
    assert (step.status, step.error_class) == (status, "ToolFailed")


def test_a_step_is_tried_again(tenant: Tenant) -> None:
    do = pipeline(tool("late", "works_at", arguments={"attempt": 3}, retries=3))
    assert done(tenant, do) == "at 3"
    step = Step.objects.get(name="late")
    assert (step.status, step.tries) == ("done", 3)
    tries = list(Task.objects.filter(parent_id=step.task_id).order_by("id"))
    assert [row.status for row in tries] == ["failed", "failed", "succeeded"]
    assert [row.retry_of for row in tries] == [None, tries[0].id, tries[1].id]


def test_retries_end(tenant: Tenant) -> None:
    do = pipeline(tool("late", "works_at", arguments={"attempt": 9}, retries=1))
    assert failed(tenant, do)[0] == "StepFailed"
    assert len(CALLS) == 2


def test_a_request_that_the_vendor_refuses_is_not_tried_again(tenant: Tenant) -> None:
    do = pipeline(prompt("bad", "x", "broken", retries=5))
    assert "InvalidRequest" in failed(tenant, do)[1]
    assert Step.objects.get(name="bad").tries == 1


def test_a_missing_value_is_told_at_its_step(tenant: Tenant) -> None:
    do = pipeline(
        tool("order", "look_up", arguments={"order": 1}),
        prompt("said", "{{ steps.order.output.price }}"),
    )
    error, message = failed(tenant, do)
    assert error == "StepFailed"
    assert "step 'said' failed: MissingValue" in message and "'price'" in message


def test_an_answer_that_is_no_json(tenant: Tenant) -> None:
    do = pipeline(prompt("said", "no json", answer="json", on_error="default", default=[]))
    assert done(tenant, do) == []
    do = pipeline(prompt("said", '```json\n{"a": [1]}\n```', answer="json"))
    assert done(tenant, do) == {"a": [1]}


# --- Parallel, votes ------------------------------------------------------------------------------


def test_branches(tenant: Tenant) -> None:
    do = {
        "kind": "parallel",
        "branches": [
            prompt("a", "1"), prompt("b", "2"), tool("c", "fails", on_error="skip"),
        ],
    }  # fmt: skip
    assert done(tenant, do) == {"a": "1", "b": "2", "c": None}


def test_items_a_few_at_a_time(tenant: Tenant) -> None:
    do = {
        "kind": "parallel", "items": "{{ input.list }}", "max_items": 20, "max_concurrency": 4,
        "do": prompt(None, "{{ index }}:{{ item.t }}{{ input.end }}"),
    }  # fmt: skip
    task = queue(tenant, do, {"list": [{"t": n} for n in range(10)], "end": "!"})
    work_off(once=True)
    assert Task.objects.filter(parent_id=task.id).count() == 4
    task.refresh_from_db()
    assert (task.status, len(task.waits_for), task.may_be_open) == (Status.BLOCKED, 4, 3)
    work_off()
    task = Task.objects.select_related("payload").get(id=task.id)
    assert task.payload.response["value"] == [f"{n}:{n}!" for n in range(10)]
    assert [name for _, _, name, _ in shown(task)] == [f"item[{n}]" for n in range(10)]
    children_of = Task.objects.filter(parent_id=task.id)
    assert task.cost == sum(row.cost for row in children_of)


def test_no_items(tenant: Tenant) -> None:
    do = {"kind": "parallel", "items": [], "max_items": 2, "do": prompt(None, "x")}
    assert done(tenant, do) == []


def test_items_that_can_not_be(tenant: Tenant) -> None:
    do = {"kind": "parallel", "items": "{{ input.list }}", "max_items": 2, "do": prompt(None, "x")}
    error, message = failed(tenant, do, {"list": [1, 2, 3]})
    assert (error, "max_items=2" in message) == ("WorkflowStopped", True)
    assert not Task.objects.filter(parent_id__isnull=False).exists()
    error, message = failed(tenant, do, {"list": "abc"})
    assert (error, "a text, not a list" in message) == ("StepFailed", True)


def test_policies_of_items(tenant: Tenant) -> None:
    route = {
        "kind": "parallel", "items": [1, 2, 3], "max_items": 3,
        "do": tool("one", "works_at", arguments={"attempt": 2}, on_error="skip"),
    }  # fmt: skip
    assert done(tenant, route) == ["at 2", "at 3"]
    CALLS.clear()
    route["do"] |= {"on_error": "default", "default": "none"}
    assert done(tenant, route) == ["none", "at 2", "at 3"]
    CALLS.clear()
    assert done(tenant, route | {"collect": "none"}) == {"count": 3, "done": 3, "skipped": 0}


def test_one_that_fails_calls_the_others_off(tenant: Tenant) -> None:
    do = {
        "kind": "parallel", "max_concurrency": 10,
        "branches": [tool("bad", "fails"), *[prompt(f"s{n}", "x", "slow") for n in range(3)]],
    }  # fmt: skip
    task = queue(tenant, do)
    work_off(once=True)
    run_now(Task.objects.get(parent_id=task.id, kind="tool"))
    run_now(task)
    work_off()
    task.refresh_from_db()
    assert (task.status, task.error_class) == (Status.FAILED, "StepFailed")
    assert "step 'bad'" in task.error_message
    states = set(Task.objects.filter(parent_id=task.id, kind="chat").values_list("status"))
    assert states == {("cancelled",)}
    assert [status for *_, status in shown(task)] == ["failed", *["skipped"] * 3]


def votes_on(*answers: str, quorum: int, **vote: Any) -> dict[str, Any]:
    return {
        "kind": "parallel", "vote": {"quorum": quorum, **vote},
        "branches": [prompt(f"v{n}", text) for n, text in enumerate(answers)],
    }  # fmt: skip


def test_votes(tenant: Tenant) -> None:
    assert done(tenant, votes_on("Yes", " yes", "no", quorum=2))["winner"] == "Yes"
    choices = ["spam", "ham"]
    said = done(
        tenant, votes_on("It is spam.", "ham or spam", "**Spam**", quorum=2, choices=choices)
    )
    assert said == {"winner": "spam", "votes": {"spam": 2}, "invalid": 1}
    error, message = failed(tenant, votes_on("a", "b", "c", quorum=2))
    assert error == "StepFailed" and "no quorum of 2" in message


def test_a_vote_ends_with_its_quorum(tenant: Tenant) -> None:
    do = votes_on("yes", "yes", "yes", "yes", "yes", quorum=2)
    for branch in do["branches"][2:]:
        branch["model"] = "slow"
    task = queue(tenant, do)
    work_off(once=True)
    for child in Task.objects.filter(parent_id=task.id, route="echo"):
        run_now(child)
    run_now(task)
    work_off()
    task = Task.objects.select_related("payload").get(id=task.id)
    assert task.payload.response["value"]["winner"] == "yes"
    slow = Task.objects.filter(parent_id=task.id, route="slow").values_list("status", flat=True)
    assert set(slow) == {"cancelled"}


def test_copies_vote_on_a_field(tenant: Tenant) -> None:
    do = {
        "kind": "parallel", "copies": 3, "vote": {"quorum": 2, "path": "verdict"},
        "do": prompt(None, '{"verdict": {"ok": true}}', answer="json"),
    }  # fmt: skip
    assert done(tenant, do)["winner"] == {"ok": True}


# --- Routes ---------------------------------------------------------------------------------------


def test_a_route_by_rule(tenant: Tenant) -> None:
    do = {
        "kind": "route", "by": "rule", "on": "{{ input.text }}",
        "choices": [
            {"name": "refund", "when": {"contains": "refund"}, "do": prompt(None, "money")},
            {"name": "order", "when": {"contains": "order"}, "do": prompt(None, "goods")},
        ],
        "otherwise": prompt(None, "a person"),
    }  # fmt: skip
    assert done(tenant, do, {"text": "My ORDER, please"}) == "goods"
    assert done(tenant, do, {"text": "hello"}) == "a person"
    del do["otherwise"]
    assert "no choice fits" in failed(tenant, do, {"text": "hello"})[1]
    task = Task.objects.filter(kind="workflow").order_by("id").first()
    assert shown(task) == [(0, "decision", "decision", "done"), (1, "prompt", "order", "done")]


def test_a_route_by_classifier(tenant: Tenant) -> None:
    do = {
        "kind": "route", "by": "classifier", "on": "{{ input.text }}", "model": "echo",
        "choices": [
            {"name": "refund", "about": "wants money back", "do": prompt(None, "money")},
            {"name": "order", "about": "asks for goods", "do": prompt(None, "goods")},
        ],
    }  # fmt: skip
    assert done(tenant, do, {"text": "a refund {{ input.x }}"}) == "money"
    error, message = failed(tenant, do, {"text": "hello"})
    assert error == "StepFailed" and "the model named none of refund, order" in message
    do["otherwise"] = prompt(None, "else")
    assert done(tenant, do, {"text": "hello"}) == "else"


def test_a_route_by_likeness(tenant: Tenant) -> None:
    do = {
        "kind": "route", "by": "embedding", "on": "{{ input.text }}", "model": "embed",
        "least": 0.9,
        "choices": [
            {"name": "a", "examples": ["where is it", "when"], "do": prompt(None, "goods")},
            {"name": "b", "examples": ["money back"], "do": prompt(None, "money")},
        ],
        "otherwise": prompt(None, "else"),
    }  # fmt: skip
    assert done(tenant, do, {"text": "money back"}) == "money"
    assert done(tenant, do, {"text": "something"}) == "else"


# --- Orchestrator, evaluate, nesting --------------------------------------------------------------


def test_a_planner_workers_and_a_joiner(tenant: Tenant) -> None:
    do = {
        "kind": "orchestrator", "max_workers": 5, "max_concurrency": 2,
        "planner": prompt(None, "{{ input.plan }}"),
        "worker": prompt("section", "about {{ item }}", lane="bulk"),
        "join": prompt(None, "all: {{ results }}"),
    }  # fmt: skip
    assert done(tenant, do, {"plan": '["a", "b", "c"]'}) == ('all: ["about a","about b","about c"]')
    task = Task.objects.get(kind="workflow")
    assert [name for _, _, name, _ in shown(task)] == [
        "planner", "section[0]", "section[1]", "section[2]", "join",
    ]  # fmt: skip
    assert set(Task.objects.filter(lane="bulk").values_list("kind", flat=True)) == {"chat"}
    error, message = failed(tenant, do, {"plan": "no list"})
    assert error == "StepFailed" and "step 'planner' failed: BadOutput" in message
    error, message = failed(tenant, do, {"plan": "[1,2,3,4,5,6]"})
    assert error == "WorkflowStopped" and "max_workers=5" in message


def test_until_it_is_good(tenant: Tenant) -> None:
    do = {
        "kind": "evaluate", "max_turns": 4, "good": {"contains": "xxx"},
        "generate": prompt(None, "{{ draft }}x"),
        "critique": prompt(None, "I read {{ draft }}"),
    }  # fmt: skip
    found = done(tenant, do)
    assert found == {"draft": "xxx", "critique": "I read xxx", "good": True, "turns": 3}
    names = [name for _, _, name, _ in shown(Task.objects.get(kind="workflow"))]
    assert names == [f"{what}[{n}]" for n in range(3) for what in ("generate", "critique")]
    found = done(tenant, do | {"max_turns": 2})
    assert (found["good"], found["turns"], found["draft"]) == (False, 2, "xx")
    assert failed(tenant, do | {"max_turns": 2, "never_good": "fail"})[0] == "WorkflowStopped"
    found = done(tenant, do | {"max_cost": "0.000001"})
    assert (found["good"], found["turns"]) == (False, 1)


def test_money_stops_a_workflow(tenant: Tenant) -> None:
    do = pipeline(prompt("a", "x"), prompt("b", "y"), prompt("c", "z"))
    error, message = failed(tenant, do, max_cost="0.000001")
    assert (error, message) == ("WorkflowStopped", "no result within max_cost=0.000001")
    assert Step.objects.count() == 1


def test_blocks_within_blocks(tenant: Tenant) -> None:
    do = pipeline(
        prompt("title", "T"),
        {
            "kind": "parallel", "name": "parts", "items": "{{ input.list }}", "max_items": 3,
            "do": pipeline(
                prompt("draft", "{{ steps.title.output }} {{ item }}"),
                prompt("final", "{{ steps.draft.output }}{{ input.end }}"),
            ),
        },
        prompt("all", "{{ steps.parts.output }}"),
    )  # fmt: skip
    given = {"list": ["a", "b"], "end": "!", "unused": "u" * 100}
    assert done(tenant, do, given) == '["T a!","T b!"]'
    root = Task.objects.get(kind="workflow", parent_id=None)
    fan = Task.objects.get(kind="workflow", parent_id=root.id)
    rows = {row.id: row for row in Task.objects.select_related("payload").filter(parent_id=fan.id)}
    inner = [rows[step.child_id] for step in steps.of(fan.id)]
    assert [row.route for row in inner] == ["pipeline", "pipeline"]
    assert inner[0].payload.request["scope"] == {
        "input": {"end": "!"}, "steps": {"title": {"output": "T"}}, "item": "a",
    }  # fmt: skip
    leaves = Task.objects.filter(kind="chat")
    assert len(leaves) == 6
    assert root.cost == sum(row.cost for row in leaves)
    assert fan.cost == sum(row.cost for row in inner) > 0


# --- People, cancel, deadline ---------------------------------------------------------------------


def test_a_tool_that_needs_approval(tenant: Tenant) -> None:
    do = pipeline(
        tool("gone", "delete", arguments={"order": "{{ input.n }}"}),
        prompt("said", "{{ steps.gone.output }}"),
    )
    task = queue(tenant, do, {"n": 7})
    work_off()
    task.refresh_from_db()
    assert (task.status, CALLS) == (Status.BLOCKED, [])
    [step] = steps.of(task.id)
    assert (step.status, step.input) == ("approval", {"arguments": {"order": 7}})
    assert steps.decide(step.id, tenant.id, run=True, by="ann", comment="")
    work_off()
    task.refresh_from_db()
    assert (task.status, CALLS) == (Status.SUCCEEDED, ["delete 7"])


@pytest.mark.parametrize(("policy", "status"), [("fail", "failed"), ("skip", "succeeded")])
def test_a_person_refuses(tenant: Tenant, policy: str, status: str) -> None:
    do = pipeline(tool("gone", "delete", arguments={"order": 1}, on_error=policy))
    task = queue(tenant, do)
    work_off()
    assert steps.decide(steps.of(task.id)[0].id, tenant.id, run=False, by="ann", comment="no")
    work_off()
    task.refresh_from_db()
    assert (task.status, CALLS) == (status, [])
    assert steps.of(task.id)[0].error_class == "Refused"


def test_cancel_goes_down(tenant: Tenant) -> None:
    do = pipeline(
        {"kind": "parallel", "name": "many", "items": [1, 2, 3], "max_items": 3,
         "do": pipeline(prompt("a", "x"), prompt("b", "y"))},
    )  # fmt: skip
    task = queue(tenant, do)
    for _ in range(3):
        work_off(once=True)
    assert Task.objects.filter(kind="chat").count() == 3
    execute.cancel(task.id)
    assert set(Task.objects.values_list("status", flat=True)) == {"cancelled"}
    assert Task.objects.count() == 8
    work_off()
    assert Task.objects.count() == 8


def test_cancel_of_what_runs_comes_back_with_its_cost(tenant: Tenant) -> None:
    task = queue(tenant, pipeline(prompt("a", "x", "slow")))
    work_off(once=True)
    [child] = Task.objects.filter(parent_id=task.id)
    Task.objects.filter(id=child.id).update(status="queued", seq=1)
    thread = threading.Thread(target=execute.run_queued, args=(child.id, 1))
    thread.start()
    while not Attempt.objects.exists():
        time.sleep(0.01)
    execute.cancel(task.id)
    thread.join()
    task.refresh_from_db()
    child.refresh_from_db()
    assert (task.status, child.status) == ("cancelled", "cancelled")
    assert child.cost > 0
    # As the dispatcher does for parents of what ended lately.
    steps.wake_parents(10)
    task.refresh_from_db()
    assert task.cost == child.cost


def test_what_is_left_open_below_an_ended_one_is_swept(tenant: Tenant) -> None:
    task = queue(tenant, pipeline(prompt("a", "x")))
    work_off(once=True)
    # As if the process had died right after the first of two statements.
    Task.objects.filter(id=task.id).update(status="cancelled")
    assert sweep.cancel_left_below() == 1
    assert Task.objects.get(parent_id=task.id).status == "cancelled"
    assert sweep.cancel_left_below() == 0


def test_a_late_settlement_is_counted_upward(tenant: Tenant) -> None:
    do = pipeline(pipeline(prompt("a", "x"), name="inner"))
    done(tenant, do)
    child = Task.objects.get(kind="chat")
    late = factories.attempt(
        tenant, task_id=child.id, number=2, state="unknown", cost=1, cost_state="estimated"
    )
    ledger.settle_apart(child.id, late.id, settled(cost=Decimal(3)))
    child.refresh_from_db()
    assert child.cost > 3
    for parent in Task.objects.filter(kind="workflow"):
        assert parent.cost == child.cost


def settled(**fields: Any) -> ledger.Outcome:
    return ledger.Outcome(usage=Usage(), cost_state="final", **fields)


# --- Crashes --------------------------------------------------------------------------------------


class Killed(BaseException):
    """As kill -9: nothing is caught, nothing is written."""


EVERYTHING = {
    "kind": "orchestrator", "max_workers": 4, "max_concurrency": 2,
    "planner": prompt(None, '["a", "b", "c"]'),
    "worker": {
        "kind": "evaluate", "max_turns": 2, "good": {"contains": "never"},
        "generate": prompt(None, "{{ item }}{{ draft }}"),
        "critique": tool("read", "look_up", arguments={"order": 1}),
    },
    "join": pipeline(prompt("last", "{{ results.0.draft }}{{ results.2.turns }}")),
}  # fmt: skip


@pytest.mark.parametrize("point", ["workflow.advanced", "workflow.waiting"])
def test_a_crash_at_each_step(tenant: Tenant, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """At every pass of the point the process dies once; nothing is done twice."""
    died: set[int] = set()
    passes = 0

    def die(name: str) -> None:
        nonlocal passes
        if name == point:
            passes += 1
            if passes % 2:
                died.add(passes)
                raise Killed

    monkeypatch.setattr(crash, "point", die)
    task = queue(tenant, EVERYTHING)
    for _ in range(500):
        try:
            work_off()
            break
        except Killed:
            # Its lease runs out, and the sweep puts what it ran back.
            Task.objects.filter(status="running").update(status="waiting", owner_id=None)
            Task.objects.filter(status="queued").update(status="waiting")
    assert len(died) >= 8
    task = Task.objects.select_related("payload").get(id=task.id)
    assert task.status == Status.SUCCEEDED, task.error_message
    assert task.payload.response["value"] == "aa2"
    # A planner, three workers with two turns of two steps each, a joiner of one step.
    assert Task.objects.filter(kind="chat").count() == 1 + 3 * 2 + 1
    assert Task.objects.filter(kind="tool").count() == len(CALLS) == 6
    assert Attempt.objects.count() == 8
    assert task.cost == sum(row.cost for row in Task.objects.filter(kind="chat"))


def test_a_stored_prompt_says_what_is_asked(tenant: Tenant) -> None:
    said = [{"role": "user", "content": "Hello {{ name }}"}]
    prompts.add_version(tenant.id, "greet", messages=said, model="echo", labels=["production"])
    first = {
        "kind": "prompt",
        "name": "a",
        "prompt": "greet",
        "variables": {"name": "{{ input.who }}"},
    }
    second = {
        **first,
        "name": "b",
        "prompt": "greet@1",
        "variables": {"name": "{{ steps.a.output }}"},
    }
    assert done(tenant, pipeline(first, second), {"who": "Ann"}) == "Hello Hello Ann"
    asked = Task.objects.filter(kind="chat").order_by("id").values_list("prompt", "route")
    assert list(asked) == [("greet@1", "echo")] * 2
    [(kind, message)] = [failed(tenant, pipeline({**first, "variables": {}}))]
    assert "variables.name: greet@1 needs this variable" in message, kind
    for asks, reference in ((tenant, "greet@9"), (factories.tenant(), "greet")):
        with pytest.raises(NotFound) as caught:
            queue(asks, pipeline({**first, "prompt": reference}), {"who": "Ann"})
        assert caught.value.param == "do.stages[0].prompt"


def test_the_admin_draws_what_was_done(tenant: Tenant) -> None:
    many = {"kind": "parallel", "name": "all", "items": "{{ input.names }}", "max_items": 50,
            "do": prompt(None, "{{ item }}")}  # fmt: skip
    do = pipeline(
        prompt("plan", "{{ input.names }}"), many, prompt("join", "{{ steps.all.output }}")
    )
    task = queue(tenant, do, {"names": [f"n{number}" for number in range(30)]})
    work_off()
    task.refresh_from_db()
    assert task.status == Status.SUCCEEDED
    run = runs.drawn(task)
    assert [[(node.title, node.words) for node in wave] for wave in run.waves] == [
        [("plan", "succeeded")], [("all", "succeeded")], [("join", "succeeded")],
    ]  # fmt: skip
    inner = run.waves[1][0].inner
    assert inner is not None
    [node] = inner.nodes
    assert (node.count, node.words) == (30, "30 succeeded")
    total = runs.total_of(task)
    assert (total.tasks, total.cost) == (33, run.cost)
    assert total.cost and total.cost == task.cost
    assert inner.cost == run.waves[1][0].cost


def test_a_wide_fan_out_works_in_flat_memory(tenant: Tenant) -> None:
    """10,000 children, whose calls end by a statement: what is measured is the workflow itself."""
    do = {
        "kind": "parallel", "items": "{{ input.list }}", "max_items": 10_000,
        "max_concurrency": 1000, "collect": "none", "do": prompt(None, "{{ item }}"),
    }  # fmt: skip
    task = queue(tenant, do, {"list": list(range(10_000))})
    peaks: dict[int, int] = {}
    most = runs = 0
    while Task.objects.get(id=task.id).status not in ("succeeded", "failed"):
        runs += 1
        # Tracing is slow: the first two runs and those far from them.
        if runs in (1, 2, 9, 10):
            tracemalloc.start()
            run_now(task)
            peaks[runs] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        else:
            run_now(task)
        open_ = Task.objects.filter(parent_id=task.id, status="waiting")
        most = max(most, open_.count())
        open_.update(status="succeeded", finished_at=pulse.now(), cost=Decimal("0.001"))
    task = Task.objects.select_related("payload").get(id=task.id)
    counts = {"count": 10_000, "done": 10_000, "skipped": 0}
    assert task.payload.response["value"] == counts
    assert task.cost == 10
    assert most == 1000
    assert runs == 11
    # Far from the first batch it is as large as at the first.
    assert max(peaks[9], peaks[10]) < 1.5 * max(peaks[1], peaks[2])
