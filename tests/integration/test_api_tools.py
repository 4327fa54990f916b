"""Tools, agents and decisions over the API, one tenant beside another."""

from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from django.test import Client

from llmtasks.models import ApiKey, Provider, Scope, Task, Tenant
from llmtasks.tools import registry as tools
from llmtasks.tools.registry import of_function
from tests import factories
from tests.integration.working import work_off


def look_up(order: int) -> str:
    """Look an order up."""
    return f"order {order} is on its way"


def delete(order: int) -> str:
    return f"order {order} is gone"


def send_mail(to: str) -> str:
    return f"sent to {to}"


@pytest.fixture(autouse=True)
def toolbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[tools.Registry]:
    box = tools.Registry()
    monkeypatch.setattr(tools.registry, "tools", box.tools)
    box.add(of_function(look_up))
    box.add(of_function(look_up, version=2))
    box.add(of_function(delete, needs_approval=True))
    box.add(of_function(send_mail, critical=False, idempotent=True))
    box.add(of_function(look_up, name="secret", scopes=["audit"]))
    yield box


class Caller:
    def __init__(self, tenant: Tenant, *scopes: str, **fields: Any) -> None:
        self.key, text = ApiKey.issue(
            tenant, "k", scopes=list(scopes) or list(Scope.values), **fields
        )
        self.key.save()
        self.client = Client(headers={"authorization": f"Bearer {text}"})

    def get(self, path: str) -> Any:
        return self.client.get(path)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.client.post(path, body, content_type="application/json", headers=headers)


@pytest.fixture
def tenant(account: Provider) -> Tenant:
    factories.route("script", (account, "script"))
    return factories.tenant()


@pytest.fixture
def caller(tenant: Tenant) -> Caller:
    return Caller(tenant)


def agent(*turns: Any, tools: Any = ("look_up", "delete", "send_mail"), **fields: Any) -> Any:
    text = orjson.dumps([[{"name": n, "arguments": a} for n, a in turn] for turn in turns]).decode()
    given = {"model": "script", "messages": [{"role": "user", "content": text}]}
    mode = fields.pop("mode", "queued")
    return {"kind": "agent", "mode": mode, "input": given | {"tools": list(tools)} | fields}


def test_the_list_holds_what_the_key_may_use(caller: Caller, tenant: Tenant) -> None:
    names = [one["reference"] for one in caller.get("/v1/tools").json()["data"]]
    assert names == ["delete@1", "look_up@1", "look_up@2", "send_mail@1"]
    assert Caller(tenant, "read", "write").get("/v1/tools").status_code == 403
    auditor = Caller(tenant, "read", "write", "tools", "audit")
    assert len(auditor.get("/v1/tools").json()["data"]) == 5
    assert auditor.post("/v1/tools/secret/invoke", {"arguments": {"order": 1}}).status_code == 200
    assert caller.post("/v1/tools/secret/invoke", {"arguments": {"order": 1}}).status_code == 404


def test_what_a_tenant_and_a_key_may_use(account: Provider) -> None:
    factories.route("script", (account, "script"))
    tenant = factories.tenant(tools=["look_up", "delete", "secret"])
    caller = Caller(tenant, tools=["look_up@1", "send_*", "secret"])
    names = [one["reference"] for one in caller.get("/v1/tools").json()["data"]]
    assert names == ["look_up@1"]
    body = {"arguments": {"order": 1}}
    assert caller.post("/v1/tools/look_up@1/invoke", body).status_code == 200
    for name in ("look_up", "look_up@2", "delete", "send_mail", "secret"):
        answer = caller.post(f"/v1/tools/{name}/invoke", body)
        assert answer.status_code == 404
        assert "GET /v1/tools lists those that you may use" in answer.json()["detail"]
    refused = caller.post("/v1/tasks", agent(tools=["look_up"]))
    assert (refused.status_code, refused.json()["param"]) == (404, "input.tools")
    assert caller.post("/v1/tasks", agent(tools=["look_up@1"])).status_code == 202


@pytest.mark.parametrize("is_tenants", [True, False])
def test_a_list_that_is_edited_holds_for_agents_under_way(
    caller: Caller, tenant: Tenant, is_tenants: bool
) -> None:
    turn = [("look_up", {"order": 1}), ("delete", {"order": 1}), ("send_mail", {"to": "a@b"})]
    url = caller.post("/v1/tasks", agent(turn))["Location"]
    queued = caller.post("/v1/tools/send_mail/invoke", {"arguments": {"to": "a@b"}})
    (tenant if is_tenants else caller.key).tools = ["look_up"]
    (tenant if is_tenants else caller.key).save(update_fields=["tools"])
    factories.in_force()
    work_off()
    steps = caller.get(f"{url}/steps").json()["data"]
    assert [s["error"] for s in steps[1:4]] == [
        None, "NotAllowed", "NotAllowed",
    ]  # fmt: skip
    error = caller.get(queued["Location"]).json()["error"]
    assert (error["class"], error["message"].split(":")[0]) == ("ToolFailed", "NotAllowed")


def test_a_tool_that_is_gone_is_told_to_the_model(caller: Caller, toolbox: tools.Registry) -> None:
    turn = [("look_up", {"order": 1}), ("delete", {"order": 1})]
    url = caller.post("/v1/tasks", agent(turn))["Location"]
    del toolbox.tools["delete"]
    work_off()
    assert caller.get(url).json()["status"] == "succeeded"
    steps = caller.get(f"{url}/steps").json()["data"]
    assert [s["error"] for s in steps[1:3]] == [None, "UnknownTool"]


def test_a_critical_tool_runs_in_the_request(caller: Caller) -> None:
    answer = caller.post("/v1/tools/look_up/invoke", {"arguments": {"order": 7}})
    body = answer.json()
    assert (answer.status_code, body["status"], body["mode"]) == (200, "succeeded", "inline")
    assert body["output"] == {"tool": "look_up@2", "content": "order 7 is on its way"}
    assert caller.get(answer["Location"]).json() == body
    assert (body["attempts"], body["cost"]) == (0, None)


def test_any_other_is_queued(caller: Caller) -> None:
    answer = caller.post("/v1/tools/send_mail/invoke", {"arguments": {"to": "a@b"}})
    assert answer.status_code == 202
    work_off()
    body = caller.get(answer["Location"]).json()
    assert (body["status"], body["output"]["content"]) == ("succeeded", "sent to a@b")


def test_the_same_key_runs_it_once(caller: Caller) -> None:
    body = {"arguments": {"order": 7}}
    first, second = (
        caller.post("/v1/tools/look_up/invoke", body, **{"Idempotency-Key": "k"}) for _ in range(2)
    )
    assert first.json() == second.json()
    assert second["Idempotent-Replayed"] == "true"
    assert Task.objects.count() == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("look_up", {"arguments": {"order": "x"}}, 400, "arguments"),
        ("look_up", {"arguments": {}}, 400, "arguments"),
        ("look_up", {"argument": {}}, 400, "argument"),
        ("look_up@3", {"arguments": {"order": 1}}, 404, None),
        ("nothing", {}, 404, None),
    ],
)
def test_wrong_requests(caller: Caller, path: str, body: Any, status: int, param: Any) -> None:
    answer = caller.post(f"/v1/tools/{path}/invoke", body)
    assert answer.status_code == status
    assert answer.json().get("param") == param
    assert not Task.objects.exists()


def test_an_agent_from_its_request_to_its_answer(caller: Caller) -> None:
    wanted = agent([("look_up", {"order": 1}), ("send_mail", {"to": "a@b"})])
    made = caller.post("/v1/tasks", wanted)
    assert made.status_code == 202, made.json()
    work_off()
    url = made["Location"]
    body = caller.get(url).json()
    assert body["status"] == "succeeded"
    assert body["output"]["choices"][0]["message"]["content"].startswith('{"queued"')
    steps = caller.get(f"{url}/steps").json()["data"]
    assert [(s["kind"], s["name"], s["status"]) for s in steps] == [
        ("model", "script", "done"), ("tool", "look_up@2", "done"),
        ("tool", "send_mail@1", "done"), ("model", "script", "done"),
    ]  # fmt: skip
    assert steps[1]["content"] == "order 1 is on its way"
    assert caller.get(f"/v1/tasks/{steps[2]['task']}").json()["status"] == "succeeded"


def test_a_person_decides(caller: Caller, tenant: Tenant) -> None:
    url = caller.post("/v1/tasks", agent([("delete", {"order": 1})]))["Location"]
    work_off()
    assert caller.get(url).json()["status"] == "blocked"
    word = {"step": 1, "decision": "approve", "by": "ann"}
    stranger = Caller(factories.tenant())
    assert stranger.post(f"{url}/decide", word).status_code == 404
    assert stranger.get(f"{url}/steps").status_code == 404
    assert caller.post(f"{url}/decide", word | {"step": 9}).status_code == 404
    assert caller.post(f"{url}/decide", word | {"step": 0}).status_code == 409
    decided = caller.post(f"{url}/decide", word).json()
    assert (decided["status"], decided["decided_by"]) == ("approved", "ann")
    assert caller.post(f"{url}/decide", word).status_code == 409
    work_off()
    assert caller.get(url).json()["status"] == "succeeded"
    assert caller.get(f"{url}/steps").json()["data"][1]["content"] == "order 1 is gone"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": ["nothing"]}, None),
        ({"tools": ["secret"]}, "input.tools"),
        ({"tools": ["two words"]}, "input.tools[0]"),
        ({"max_turns": 0}, "input.max_turns"),
        ({"max_cost": 0.5}, "input.max_cost"),
        ({"max_cost": "-1"}, "input.max_cost"),
    ],
)
def test_wrong_agents(caller: Caller, change: Any, param: Any) -> None:
    answer = caller.post("/v1/tasks", agent(**change))
    assert answer.status_code in (400, 404)
    assert answer.json().get("param") == param
    assert not Task.objects.exists()
