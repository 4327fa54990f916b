"""Runs of workflows: people, cancel, deadlines, crashes, what the admin shows, wide fan-outs."""

import threading
import tracemalloc
from decimal import Decimal
from typing import Any

import pytest

from llmtasks import crash, events, execute, ledger, prompts, pulse, steps, sweep
from llmtasks.admin import runs
from llmtasks.errors import NotFound
from llmtasks.models import Attempt, Provider, Status, Task, Tenant
from providers.types import Usage
from tests import factories
from tests.corridor import sent, until
from tests.flows import (
    CALLS,
    done,
    failed,
    pipeline,
    prompt,
    put_tools,
    queue,
    run_now,
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
    until(lambda: sent(task_id=child.id))
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


def test_a_wide_fan_out_works_in_flat_memory(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 children, whose calls end by a statement: what is measured is the workflow itself."""
    # Another thread sends them, whenever it comes to it.
    monkeypatch.setattr(events, "publish", lambda *_: None)
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
