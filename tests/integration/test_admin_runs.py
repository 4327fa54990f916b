"""A run on its task's page: steps, the graph, a person's word."""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.db import OperationalError
from django.urls import reverse
from django.utils import timezone

from llmtasks.admin import runs
from llmtasks.models import CostState, Kind, Status, Step, Task, Tenant
from tests.admin_pages import EVIL, make_attempt, make_task, page, shown_tasks, text

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.get_default_timezone())
DECIDE = "/admin/llmtasks/task/decide/"


def make_step(task: Task, number: int, kind: str = "tool", **values: Any) -> Step:
    """A step from second `at` on, `took` seconds long; None: not ended."""
    at, took = values.pop("at", number), values.pop("took", 1)
    start = NOON + timedelta(seconds=at)
    given = {
        "name": "look_up@1", "status": "done", "started_at": start,
        "finished_at": None if took is None else start + timedelta(seconds=took), **values,
    }  # fmt: skip
    return Step.objects.create(
        task_id=task.pk, tenant_id=task.tenant_id, number=number, kind=kind, **given
    )


def paid(task: Task, amount: str, step: int = 0, **values: Any) -> None:
    make_attempt(
        task, step=step, number=1, cost=Decimal(amount), cost_state=CostState.FINAL, **values
    )


@pytest.fixture
def agent(tenant: Tenant) -> Task:
    """Two turns, a critical call, one in the background, one that waits for a person."""
    task = make_task(tenant, kind=Kind.AGENT, status=Status.BLOCKED)
    make_step(task, 0, "model", name="smart", output={"parts": [{"type": "text", "text": "hm"}]})
    make_step(task, 1, input={"order": 7}, output={"content": f"order 7 {EVIL}"})
    child = make_task(tenant, kind=Kind.TOOL, parent_id=task.pk, status=Status.RUNNING)
    make_step(task, 2, name="send_mail@1", child_id=child.pk, at=1)
    make_step(task, 3, "model", name="smart", at=4)
    make_step(task, 4, name="refund@1", status="approval", input={"cents": 900, "why": EVIL},
              took=None)  # fmt: skip
    paid(task, "0.25", step=0)
    paid(task, "0.50", step=3)
    paid(child, "0.125")
    return task


def waves(task: Task) -> list[list[tuple[str, str]]]:
    return [[(node.title, node.words) for node in wave] for wave in runs.drawn(task).waves]


# --- the graph ------------------------------------------------------------------------------------


def test_an_agent_is_drawn_by_turns(agent: Task) -> None:
    assert waves(agent) == [
        [("smart", "done")],
        [("look_up@1", "done"), ("send_mail@1", "running")],
        [("smart", "done")],
        [("refund@1", "waits for a person")],
    ]


def test_money_sums_up_over_all_that_is_below(agent: Task, tenant: Tenant) -> None:
    total = runs.total_of(agent)
    assert (total.tasks, total.cost) == (1, Decimal("0.875"))
    run = runs.drawn(agent)
    assert run.cost == total.cost
    assert [node.cost for node in run.nodes] == [
        Decimal("0.25"), None, Decimal("0.125"), Decimal("0.50"), None,
    ]  # fmt: skip
    # An earlier try of a step, and what is below a child, count too.
    child = Task.objects.get(parent_id=agent.pk)
    paid(make_task(tenant, kind=Kind.TOOL, parent_id=agent.pk, status=Status.FAILED), "0.01")
    paid(make_task(tenant, parent_id=child.pk), "0.001")
    make_attempt(agent, step=5, state="sent", cost=Decimal(9))
    run, total = runs.drawn(agent), runs.total_of(agent)
    assert run.cost == total.cost == Decimal("0.886")
    assert total.tasks == 3
    assert [node.title for node in run.waves[-1]] == ["other tasks"]


def test_a_turn_without_an_answer_is_drawn_too(agent: Task) -> None:
    Task.objects.filter(pk=agent.pk).update(status=Status.FAILED)
    agent.refresh_from_db()
    make_attempt(agent, step=5, cost=Decimal(1), cost_state=CostState.ESTIMATED)
    last = runs.drawn(agent).nodes[-1]
    assert (last.number, last.title, last.words) == (5, "turn", "failed")
    assert "≈ $1.00" in last.shown_cost


def test_what_is_not_priced_is_never_0(agent: Task, login: Any) -> None:
    make_attempt(agent, step=0, number=2, cost_state=CostState.UNPRICED)
    assert "$0.88 + unpriced" in runs.total_of(agent).shown_cost.replace("0.875", "0.88")
    alone = make_task(agent.tenant, kind=Kind.AGENT)
    make_step(alone, 0, "model")
    make_attempt(alone, step=0, cost_state=CostState.UNPRICED)
    assert ">unpriced<" in runs.total_of(alone).shown_cost
    assert "$0" not in text(login("*").get(page("task", alone.pk)))


def make_workflow(tenant: Tenant, **values: Any) -> Task:
    """A run by its rows alone: any kind that is not a single call."""
    return make_task(tenant, kind="workflow", **values)


def test_a_workflow_is_drawn_by_what_overlapped(tenant: Tenant) -> None:
    task = make_workflow(tenant, status=Status.RUNNING)
    for number, (name, at, took) in enumerate(
        [("plan", 0, 1), ("worker 0", 1, 3), ("worker 1", 1, 2), ("worker 2", 3, None)]
    ):
        made = make_task(tenant, parent_id=task.pk, status="running" if took is None else "failed")
        status = "open" if took is None else "done"
        make_step(task, number, "prompt", name=name, at=at, took=took, child_id=made.pk,
                  status=status)  # fmt: skip
    Task.objects.filter(parent_id=task.pk, status="failed").update(
        status="succeeded", finished_at=None
    )
    assert waves(task) == [
        [("plan", "succeeded")],
        [("worker 0", "succeeded"), ("worker 1", "succeeded"), ("worker 2", "running")],
    ]


def test_a_run_within_a_run_is_drawn_inside(tenant: Tenant) -> None:
    task = make_workflow(tenant)
    inner = make_workflow(tenant, parent_id=task.pk, status=Status.SUCCEEDED)
    make_step(task, 0, "pipeline", name="inner", child_id=inner.pk)
    make_step(inner, 0, "prompt", name="deep")
    paid(inner, "0.5")
    [node] = runs.drawn(task).nodes
    assert node.inner is not None
    assert [each.title for each in node.inner.nodes] == ["deep"]
    assert node.cost == Decimal("0.5")


def test_rows_that_name_each_other_end(tenant: Tenant) -> None:
    task = make_workflow(tenant)
    Task.objects.filter(pk=task.pk).update(parent_id=task.pk)
    make_step(task, 0, "pipeline", child_id=task.pk)
    assert runs.drawn(task).nodes


@pytest.mark.parametrize("number", [runs.MOST_BESIDE + 1, runs.MOST_STEPS + 50])
def test_many_steps_become_one_node(tenant: Tenant, number: int) -> None:
    task = make_workflow(tenant)
    make_step(task, 0, "prompt", name="plan", took=0)
    made = Task.objects.bulk_create(
        Task(tenant=tenant, kind="chat", mode="queued", route="smart", parent_id=task.pk,
             status="failed" if index % 5 == 0 else "succeeded",
             deadline=timezone.now())
        for index in range(number)
    )  # fmt: skip
    Step.objects.bulk_create(
        Step(task_id=task.pk, tenant=tenant, number=1 + index, kind="prompt",
             name=f"worker[{index}]", status="done", child_id=child.pk,
             started_at=NOON + timedelta(seconds=2), finished_at=NOON + timedelta(seconds=9))
        for index, child in enumerate(made)
    )  # fmt: skip
    for child in made[:3]:
        paid(child, "0.1")
    make_step(task, number + 1, "prompt", name="join", at=10)
    run = runs.drawn(task)
    assert [node.title for node in run.nodes] == ["plan", "worker", "join"]
    many = run.nodes[1]
    failed = len(range(0, number, 5))
    assert many.counts == {"failed": failed, "succeeded": number - failed}
    assert (many.count, many.cost) == (number, Decimal("0.3"))
    assert run.cost == runs.total_of(task).cost


# --- the page -------------------------------------------------------------------------------------


def test_the_page_shows_steps_and_their_bodies_to_whom_may_read_them(
    agent: Task, login: Any
) -> None:
    content = text(login("view_task", "view_bodies").get(page("task", agent.pk)))
    assert "$0.875</span> in all" in content and "1 task within" in content
    assert "look_up@1" in content and "{&quot;order&quot;: 7}" in content
    assert "order 7 &lt;script&gt;" in content and EVIL not in content
    child = Task.objects.get(parent_id=agent.pk)
    assert page("task", child.pk) in content
    content = text(login("view_task").get(page("task", agent.pk)))
    assert "order 7" not in content and "cents" not in content
    assert "bytes of arguments, which you may not read" in content and "12\xa0bytes" in content


def test_a_single_call_has_no_run(login: Any, tenant: Tenant) -> None:
    assert "lt-runcard" not in text(login("*").get(page("task", make_task(tenant).pk)))
    empty = make_task(tenant, kind=Kind.AGENT)
    assert "Nothing was done yet." in text(login("*").get(page("task", empty.pk)))


def test_the_tasks_of_a_run_are_a_list(agent: Task, login: Any) -> None:
    client = login("*")
    child = Task.objects.get(parent_id=agent.pk)
    assert shown_tasks(client, part_of=str(agent.pk)) == {child.pk}
    assert shown_tasks(client, part_of="nonsense") == set()


@pytest.mark.parametrize(
    ("decision", "status", "word"),
    [("approve", "approved", "Approved"), ("refuse", "failed", "Refused")],
)
def test_a_person_decides(agent: Task, login: Any, decision: str, status: str, word: str) -> None:
    client = login("view_task", "view_bodies", "change_step")
    step = Step.objects.get(task_id=agent.pk, status="approval")
    assert str(step.pk) in text(client.get(page("task", agent.pk)))
    values = {"step": str(step.pk), "decision": decision, "comment": "so be it"}
    answer = client.post(DECIDE, values)
    assert answer["Location"] == page("task", agent.pk)
    step.refresh_from_db()
    assert (step.status, step.comment) == (status, "so be it")
    assert step.decided_by.startswith("user-")
    agent.refresh_from_db()
    assert agent.status == Status.WAITING
    [entry] = LogEntry.objects.all()
    assert entry.change_message == f"{word} step 4, refund@1."
    assert entry.object_id == str(agent.pk)
    shown = text(client.get(page("task", agent.pk)))
    assert f"{step.decided_by}: so be it" in shown
    # Once is enough.
    assert "waits for nobody any more" in text(client.post(DECIDE, values, follow=True))
    assert LogEntry.objects.count() == 1


def test_who_may_not_decide(agent: Task, login: Any) -> None:
    step = Step.objects.get(task_id=agent.pk, status="approval")
    for permissions in (("view_task", "view_bodies", "change_task"), ("view_task", "change_step")):
        client = login(*permissions)
        shown = text(client.get(page("task", agent.pk)))
        assert "You may not decide." in shown and str(step.pk) not in shown
        assert client.post(DECIDE, {"step": step.pk, "decision": "approve"}).status_code == 403
    client = login("*")
    assert client.get(DECIDE).status_code == 405
    assert client.post(DECIDE, {"step": "x", "decision": "approve"}).status_code == 400
    assert reverse("admin:llmtasks_task_decide") == DECIDE
    step.refresh_from_db()
    assert step.status == "approval"


def test_an_interrupted_call_is_told_as_such(agent: Task, login: Any) -> None:
    Step.objects.filter(status="approval").update(status="unknown")
    assert "Run it again" in text(login("*").get(page("task", agent.pk)))


def test_the_page_costs_the_same_for_any_number_of_steps(
    agent: Task, login: Any, django_assert_max_num_queries: Any
) -> None:
    for number in range(5, 60):
        make_step(agent, number)
    client = login("*")
    client.get(page("task", agent.pk))
    with django_assert_max_num_queries(18):
        client.get(page("task", agent.pk))


def test_a_run_that_takes_too_long_to_draw_leaves_the_page(
    agent: Task, login: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(task: Task) -> Any:
        raise OperationalError("canceling statement due to statement timeout")

    monkeypatch.setattr(runs, "drawn", slow)
    content = text(login("*").get(page("task", agent.pk)))
    assert "too large to be drawn now" in content and "Approve" in content
