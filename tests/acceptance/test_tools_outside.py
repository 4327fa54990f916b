"""Tools of an HTTP API on real processes: a person is asked by webhook and lets a call through; a
call whose worker is killed in the middle of it is made once, and goes to a person."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.cluster import Cluster, wait_for
from tests.apiserver import SECRET, Api, verified

NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
CONFIGURE = """
from llmtasks.models import HttpTool, Tenant
for name, path, asks in (("find", "/orders/1", False), ("order", "/orders/2", True),
                         ("slow", "/slow", False)):
    operation = {{"operationId": "op", "responses": {{}}}}
    document = {{"openapi": "3.1.0", "paths": {{path: {{"post": operation}}}}}}
    HttpTool.objects.create(name=name, document=document, operation_id="op", base_url="{url}",
                            needs_approval=asks)
Tenant.objects.update(webhook_url="{url}/orders/hook", webhook_secret="env:HOOK")
"""


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with Api() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, api: Api) -> Iterator[Cluster]:
    settings = {"PRIVATE_NETWORKS": "127.0.0.0/8", "HOOK": SECRET}
    names = ("sandbox", "web", "dispatcher", "worker-default")
    folder = tmp_path_factory.mktemp("outside")
    with Cluster.fresh(folder, NUMBER % 2 + 2, settings=settings, names=names) as running:
        running.manage("shell", "-c", CONFIGURE.format(url=api.base_url))
        yield running


def agent(cluster: Cluster, *calls: str) -> str:
    """An agent that makes these calls in one turn; its id."""
    script = json.dumps([[{"name": name, "arguments": {}} for name in calls]])
    given = {"model": "script", "messages": [{"role": "user", "content": script}]}
    body = {"kind": "agent", "mode": "queued", "input": given | {"tools": list(calls)}}
    answer = wait_for(
        lambda: (made := cluster.api.post("/v1/tasks", json=body)).status_code == 202 and made, 10
    )
    return str(answer.json()["id"])


def posts(api: Api, path: str) -> list[tuple[dict[str, str], Any]]:
    return [(headers, body) for _, at, headers, body in list(api.seen) if at == path]


def told(api: Api, task_id: str) -> dict[str, Any]:
    """What the webhook said of the task, once it came."""

    def found() -> list[tuple[dict[str, str], Any]]:
        return [one for one in posts(api, "/orders/hook") if task_id.encode() in one[1]]

    headers, body = wait_for(found, 40)[0]
    assert verified(headers, body)
    return dict(json.loads(body)["data"])


def decide(cluster: Cluster, asked: dict[str, Any], decision: str) -> None:
    body = {"step": asked["step"], "decision": decision, "by": "ann"}
    answer = cluster.api.post(asked["decide"], json=body)
    assert answer.status_code == 200, answer.text


def test_a_person_is_asked_and_lets_the_call_through(cluster: Cluster, api: Api) -> None:
    task_id = agent(cluster, "find", "order")
    asked = told(api, task_id)
    assert (asked["name"], asked["status"]) == ("order@1", "approval")
    # The webhook may be there before the call that was made beside it.
    wait_for(lambda: len(posts(api, "/orders/1")) == 1, 10)
    assert not posts(api, "/orders/2")
    decide(cluster, asked, "approve")
    assert cluster.finished(task_id)["status"] == "succeeded"
    assert (len(posts(api, "/orders/1")), len(posts(api, "/orders/2"))) == (1, 1)


def test_a_call_whose_worker_is_killed_goes_to_a_person(cluster: Cluster, api: Api) -> None:
    task_id = agent(cluster, "slow")
    wait_for(lambda: posts(api, "/slow"), 20)
    cluster.kill9("worker-default")
    cluster.start_all()
    asked = told(api, task_id)
    assert (asked["name"], asked["status"]) == ("slow@1", "unknown")
    wait_for(lambda: cluster.task(task_id)["status"] == "blocked", 10)
    decide(cluster, asked, "refuse")
    assert cluster.finished(task_id)["status"] == "succeeded"
    assert len(posts(api, "/slow")) == 1
