"""A running agent as a frontend sees it, from real processes: its steps, a person asked, the
connection lost and taken up again."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.cluster import Cluster

NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NAMES = ("sandbox", "web", "dispatcher", "worker-default")
Frame = tuple[str, str, dict[str, Any]]


@pytest.fixture
def shop(tmp_path: Any) -> Iterator[Cluster]:
    settings = {"APPS": "tests.acceptance.shop"}
    with Cluster.fresh(tmp_path, NUMBER % 2 + 4, names=NAMES, settings=settings) as cluster:
        yield cluster


def frames(cluster: Cluster, task_id: str, after: str | None = None) -> Iterator[Frame]:
    """(id, event, data), each when it comes."""
    headers = {"Last-Event-ID": after} if after else {}
    with cluster.api.stream("GET", f"/v1/tasks/{task_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        found: dict[str, str] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name:
                found[name] = value
            elif "data" in found:
                yield found.get("id", ""), found["event"], json.loads(found["data"])
                found = {}
            else:
                found = {}


def steps(of: list[Frame]) -> list[tuple[int, str, str]]:
    return [(d["number"], d["name"], d["status"]) for _, name, d in of if name == "step"]


def test_an_agent_is_followed_through_a_persons_decision(shop: Cluster) -> None:
    calls = [("find_order", {"number": 7}), ("send_mail", {"to": "a@b"}), ("refund", {"cents": 9})]
    script = [[{"name": name, "arguments": given} for name, given in calls]]
    body = {
        "kind": "agent",
        "mode": "queued",
        "input": {
            "model": "script",
            "messages": [{"role": "user", "content": json.dumps(script)}],
            "tools": [name for name, _ in calls],
        },
    }
    answer = shop.api.post("/v1/tasks", json=body)
    assert answer.status_code == 202, answer.text
    task_id = answer.json()["id"]

    seen: list[Frame] = []
    for frame in frames(shop, task_id):
        seen.append(frame)
        if frame[1:] == ("state", {"status": "blocked"}):
            break
    told = steps(seen)
    assert told == [
        (0, "script", "running"),
        (0, "script", "done"),
        (1, "find_order@1", "running"),
        (2, "send_mail@1", "done"),
        (3, "refund@1", "approval"),
        (1, "find_order@1", "done"),
    ]
    assert shop.task(task_id)["status"] == "blocked"
    # The mail was queued at once, and is a task that ends by itself.
    [mail] = [d for _, name, d in seen if name == "step" and d["background"]]
    assert shop.finished(mail["task"])["output"]["content"] == "sent to a@b"

    decision = {"step": 3, "decision": "approve", "by": "ann"}
    decided = shop.api.post(f"/v1/tasks/{task_id}/decide", json=decision)
    assert decided.status_code == 200, decided.text
    rest = list(frames(shop, task_id, after=seen[-1][0]))
    # Two processes tell of it: who decided, and who runs it.
    of_refund = [status for number, _, status in steps(rest) if number == 3]
    assert sorted(of_refund) == ["approved", "done", "running"]
    assert of_refund[-1] == "done"
    assert steps(rest)[-1] == (4, "script", "done")
    assert "snapshot" not in [name for _, name, _ in rest]
    _, name, task = rest[-1]
    assert (name, task["status"]) == ("done", "succeeded")
    text = "".join(data["text"] for _, name, data in rest if name == "delta")
    assert text == task["output"]["choices"][0]["message"]["content"]
    # Nothing came twice on the two connections.
    ids = [one for one, _, _ in [*seen[1:], *rest]]
    assert len(ids) == len(set(ids))
