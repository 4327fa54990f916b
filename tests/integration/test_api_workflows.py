"""Workflows over the API: stored, versioned, run, and never another tenant's."""

from typing import Any

import pytest
from django.db import IntegrityError

from llmtasks.models import Provider, Step, Task, Tenant, Workflow, WorkflowVersion
from llmtasks.tools import registry as tools
from llmtasks.tools.registry import of_function
from llmtasks.workflows import spec, store
from tests import factories
from tests.callers import Caller
from tests.integration.working import work_off


def look_up(order: int) -> str:
    """Look an order up."""
    return f"order {order} is on its way"


@pytest.fixture(autouse=True)
def toolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    box = tools.Registry()
    monkeypatch.setattr(tools.registry, "tools", box.tools)
    box.add(of_function(look_up))
    box.add(of_function(look_up, version=2))
    box.add(of_function(look_up, name="secret", scopes=["audit"]))


@pytest.fixture
def tenant(account: Provider) -> Tenant:
    factories.route("echo", (account, "echo"))
    return factories.tenant()


@pytest.fixture
def caller(tenant: Tenant, settings: Any) -> Caller:
    # There is no worker: nobody waits for one.
    settings.LLMTASKS = {**settings.LLMTASKS, "AUTO_WAIT_S": 0.0}
    return Caller(tenant)


def stages(*texts: str) -> dict[str, Any]:
    made = [
        {"kind": "prompt", "name": f"s{n}", "model": "echo", "text": text}
        for n, text in enumerate(texts)
    ]
    return {"do": {"kind": "pipeline", "stages": made}}


def task(**given: Any) -> dict[str, Any]:
    return {"kind": "workflow", "input": given}


def test_from_a_declaration_to_its_value(caller: Caller) -> None:
    declared = stages("Hello {{ input.name }}", "{{ steps.s0.output }}!")
    made = caller.post("/v1/tasks", task(spec=declared, input={"name": "Ann"}) | {"mode": "queued"})
    assert made.status_code == 202, made.json()
    work_off()
    body = caller.get(made["Location"]).json()
    assert body["status"] == "succeeded", body
    assert (body["kind"], body["model"]) == ("workflow", "pipeline")
    assert body["output"] == {"workflow": "pipeline", "value": "Hello Ann!"}
    assert float(body["cost"]) > 0 and body["usage"]["input_tokens"] > 0
    page = caller.get(f"{made['Location']}/steps?limit=1").json()
    assert [(s["kind"], s["name"], s["status"]) for s in page["data"]] == [("prompt", "s0", "done")]
    assert (page["has_more"], page["next_after"]) == (True, 0)
    rest = caller.get(f"{made['Location']}/steps?after=0").json()
    assert [s["name"] for s in rest["data"]] == ["s1"]
    assert (rest["has_more"], rest["next_after"]) == (False, None)
    child = caller.get(f"/v1/tasks/{rest['data'][0]['task']}").json()
    assert child["output"]["choices"][0]["message"]["content"] == "Hello Ann!"
    assert caller.get(f"{made['Location']}/steps?limit=0").status_code == 400


def test_versions(caller: Caller) -> None:
    first = caller.post("/v1/workflows", {"name": "greet", "spec": stages("Hello {{ input.n }}")})
    assert (first.status_code, first["Location"]) == (201, "/v1/workflows/greet@1")
    assert first.json()["reference"] == "greet@1"
    same = caller.post("/v1/workflows", {"name": "greet", "spec": stages("Hello {{ input.n }}")})
    assert (same.status_code, same.json()["version"]) == (200, 1)
    other = {"name": "greet", "spec": stages("Bye {{ input.n }}"), "comment": "kinder"}
    assert caller.post("/v1/workflows", other).json()["version"] == 2
    latest = caller.get("/v1/workflows/greet").json()
    assert (latest["version"], latest["versions"], latest["comment"]) == (2, [2, 1], "kinder")
    assert latest["created_by"] == caller.key.prefix
    assert caller.get("/v1/workflows/greet@1").json()["spec"] == stages("Hello {{ input.n }}")
    assert caller.get("/v1/workflows/greet@3").status_code == 404
    [row] = caller.get("/v1/workflows").json()["data"]
    assert row["reference"] == "greet@2"
    for name, said in (("greet", "Bye x"), ("greet@1", "Hello x")):
        made = caller.post("/v1/tasks", task(workflow=name, input={"n": "x"}))
        work_off()
        body = caller.get(made["Location"]).json()
        assert body["output"]["value"] == said
        assert body["model"] == ("greet@2" if name == "greet" else name)


def test_a_version_is_never_changed(caller: Caller) -> None:
    caller.post("/v1/workflows", {"name": "greet", "spec": stages("a")})
    with pytest.raises(IntegrityError, match="kept as it is"):
        WorkflowVersion.objects.update(comment="x")


def test_one_tenant_beside_another(caller: Caller) -> None:
    caller.post("/v1/workflows", {"name": "own", "spec": stages("mine")})
    store.save(None, "shared", spec.parse(stages("for all")), by="operator")
    store.save(None, "both", spec.parse(stages("for all")), by="operator")
    stranger = Caller(factories.tenant())
    stranger.post("/v1/workflows", {"name": "both", "spec": stages("the stranger's")})
    assert stranger.get("/v1/workflows/own").status_code == 404
    refused = stranger.post("/v1/tasks", task(workflow="own"))
    assert (refused.status_code, refused.json()["param"]) == (404, "input.workflow")
    names = [row["name"] for row in stranger.get("/v1/workflows").json()["data"]]
    assert names == ["both", "shared"]
    # A tenant's own comes first, and takes no one else's name.
    assert stranger.get("/v1/workflows/both").json()["is_shared"] is False
    assert caller.get("/v1/workflows/both").json()["is_shared"] is True
    assert caller.get("/v1/workflows/both").json()["created_by"] is None
    own = {"kind": "workflow", "workflow": "own"}
    nested = stranger.post("/v1/workflows", {"name": "x", "spec": {"do": own}})
    assert (nested.status_code, nested.json()["param"]) == (404, "spec.do.workflow")
    assert Workflow.objects.filter(name="x").count() == 0
    first = stranger.get("/v1/workflows?limit=1").json()
    assert (first["has_more"], first["next_cursor"]) == (True, "both")
    rest = stranger.get("/v1/workflows?cursor=both").json()
    assert [row["name"] for row in rest["data"]] == ["shared"]


def test_a_workflow_in_a_workflow(caller: Caller) -> None:
    caller.post("/v1/workflows", {"name": "inner", "spec": stages("<{{ input.word }}>")})
    outer = {
        "do": {
            "kind": "pipeline",
            "stages": [
                {
                    "kind": "workflow", "name": "wrapped", "workflow": "inner",
                    "input": {"word": "{{ input.w }}"},
                }
            ],
        }
    }  # fmt: skip
    stored = caller.post("/v1/workflows", {"name": "outer", "spec": outer}).json()
    # Which version it uses is written down.
    assert stored["spec"]["do"]["stages"][0]["workflow"] == "inner@1"
    caller.post("/v1/workflows", {"name": "inner", "spec": stages("other")})
    made = caller.post("/v1/tasks", task(workflow="outer", input={"w": "x"}))
    work_off()
    body = caller.get(made["Location"]).json()
    assert body["output"]["value"] == "<x>"
    inner = Task.objects.get(kind="workflow", route="inner@1")
    assert str(inner.parent_id) == body["id"]
    assert body["cost"] == f"{inner.cost.normalize():f}"
    # In a circle.
    back = {"do": {"kind": "workflow", "workflow": "outer", "input": {"w": "x"}}}
    for name in ("inner", "outer"):
        answer = caller.post("/v1/workflows", {"name": name, "spec": back})
        assert answer.status_code == 400, answer.json()
        assert "a cycle" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "status", "param", "about"),
    [
        ({"workflow": "nothing"}, 404, "input.workflow", "there is no workflow"),
        ({}, 400, "input.workflow", "either"),
        ({"spec": stages("x"), "workflow": "x"}, 400, "input.workflow", "either"),
        ({"spec": stages("{{ input.a }}")}, 400, "input.input.a", "missing variable"),
        ({"spec": stages("{{ steps.s1.output }}", "x")}, 400, "input.spec.do.stages[0].text",
         "a cycle"),
        ({"spec": stages("{{ steps.no.output }}")}, 400, "input.spec.do.stages[0].text",
         "there is no step"),
        ({"spec": {"do": {"kind": "pipeline", "stages": [{"kind": "nothing"}]}}}, 400,
         "input.spec.do.stages[0].kind", "give a block"),
        ({"spec": {"do": {"kind": "pipeline", "stages": []}}}, 400, "input.spec.do.stages", "list"),
        ({"spec": {"do": {"kind": "parallel", "items": "{{ input.a }}",
                          "do": {"kind": "prompt", "model": "echo", "text": "x"}}}}, 400,
         "input.spec.do.max_items", "unbounded"),
        ({"spec": {"do": {"kind": "pipeline", "stages": [
            {"kind": "prompt", "name": "a", "model": "nothing", "text": "x"}]}}}, 404,
         "input.spec.do.stages[0].model", "there is no model"),
        ({"spec": {"do": {"kind": "tool", "tool": "nothing"}}}, 404, "input.spec.do.tool",
         "there is no tool"),
        ({"spec": {"do": {"kind": "tool", "tool": "secret"}}}, 404, "input.spec.do.tool",
         "there is no tool"),
        ({"spec": {"do": {"kind": "prompt", "prompt": "nothing"}}}, 404, "input.spec.do.prompt",
         "there is no prompt"),
        ({"spec": {"do": {"kind": "workflow", "workflow": "nothing"}}}, 404,
         "input.spec.do.workflow", "there is no workflow"),
    ],
)  # fmt: skip
def test_wrong_declarations(
    caller: Caller, change: Any, status: int, param: str, about: str
) -> None:
    answer = caller.post("/v1/tasks", task(**change))
    body = answer.json()
    assert (answer.status_code, body["param"]) == (status, param), body
    assert about in body["detail"]
    assert not Task.objects.exists()


def test_inline_is_refused(caller: Caller) -> None:
    answer = caller.post("/v1/tasks", task(spec=stages("x")) | {"mode": "inline"})
    assert (answer.status_code, answer.json()["param"]) == (400, "mode")


def test_tools_hold_their_version(caller: Caller, tenant: Tenant) -> None:
    declared = {"do": {"kind": "tool", "tool": "look_up", "arguments": {"order": 1}}}
    made = caller.post("/v1/tasks", task(spec=declared))
    tools.registry.add(of_function(look_up, version=3))
    work_off()
    assert caller.get(made["Location"]).json()["output"]["value"] == "order 1 is on its way"
    assert Task.objects.get(kind="tool").route == "look_up@2"
    assert Step.objects.get().name == "tool"
    reader = Caller(tenant, scopes=["write", "read"])
    assert reader.post("/v1/tasks", task(spec=declared)).status_code == 403


def test_a_finished_one_can_be_retried(caller: Caller) -> None:
    made = caller.post("/v1/tasks", task(spec=stages("{{ input.a }}"), input={"a": "x"}))
    work_off()
    again = caller.post(f"{made['Location']}/retry")
    assert again.status_code == 202
    work_off()
    assert caller.get(again["Location"]).json()["output"]["value"] == "x"
