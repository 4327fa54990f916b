"""Workflows on real stores and the sandbox: each pattern, each policy, costs."""

from typing import Any

import pytest

from llmtasks import steps
from llmtasks.models import Provider, Status, Step, Task, Tenant
from tests.flows import (
    CALLS,
    done,
    failed,
    pipeline,
    prompt,
    put_tools,
    queue,
    run_now,
    shown,
    tenant_with_routes,
    tool,
)
from tests.integration.working import work_off


@pytest.fixture(autouse=True)
def toolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    put_tools(monkeypatch)


@pytest.fixture
def tenant(account: Provider) -> Tenant:
    return tenant_with_routes(account)


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
        "kind": "parallel", "items": [1, 2, 3], "max_items": 3, "max_concurrency": 1,
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
