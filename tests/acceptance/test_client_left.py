"""Callers that hang up in the middle, over real sockets, under both policies."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.cluster import Cluster, wait_for

NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Answers after 3 s; one that takes 4 s, with a delta every 10 ms.
SLOW, LONG = "slow-3000", "long-400-100"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module", params=["drop", "drain"])
def policy(request: Any, tmp_path_factory: Any) -> Iterator[tuple[str, Cluster]]:
    with Cluster.fresh(
        tmp_path_factory.mktemp("left"),
        NUMBER % 2 + 6,
        names=("sandbox", "web"),
        settings={"CLIENT_LEFT": request.param},
    ) as cluster:
        cluster.manage("seed_demo", "--route", SLOW, "--route", LONG)
        yield request.param, cluster


def under_way(cluster: Cluster) -> str | None:
    """The task that the sandbox answers now."""
    tasks = cluster.bill()["tasks"]
    return next((task for task, tally in tasks.items() if tally["under_way"]), None)


def ended(cluster: Cluster, task_id: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The task and its one attempt, once nothing is open any more."""
    task = cluster.finished(task_id, 15)
    [attempt] = cluster.rows(
        "SELECT state, cost_state, cost, output_tokens FROM llmtasks_attempt WHERE task_id = %s",
        [task_id],
    )
    assert attempt[0] == "settled"
    assert cluster.bill()["tasks"][task_id]["overlaps"] == 0
    return task, attempt


@pytest.mark.parametrize(
    ("model", "stream"), [(SLOW, False), (SLOW, True), (LONG, True)], ids=["plain", "first", "mid"]
)
def test_a_caller_that_hangs_up(policy: tuple[str, Cluster], model: str, stream: bool):
    name, cluster = policy
    body = {"model": model, "messages": MESSAGES, "stream": stream}
    with cluster.send("/v1/chat/completions", body) as caller:
        task_id = wait_for(lambda: under_way(cluster), 10)
        if model == LONG:
            assert caller.recv(100).startswith(b"HTTP/1.1 200")
    task, (_, cost_state, cost, output_tokens) = ended(cluster, task_id)
    bill = cluster.bill()["tasks"][task_id]
    assert cost > 0
    if name == "drop":
        assert (task["status"], task["error"]["class"]) == ("cancelled", "ClientLeft")
        assert (cost_state, bill["answered"], task["output"]) == ("estimated", 0, None)
    else:
        assert (task["status"], cost_state) == ("succeeded", "final")
        assert output_tokens == bill["output_tokens"]
        assert task["output"]["choices"][0]["message"]["content"]
    wait_for(lambda: under_way(cluster) is None, 5)


def test_who_asks_again_with_his_key_finds_the_answer_of_a_drained_call(
    policy: tuple[str, Cluster],
):
    name, cluster = policy
    body = {"model": SLOW, "messages": MESSAGES}
    with cluster.send("/v1/chat/completions", body, Idempotency_Key="left"):
        task_id = wait_for(lambda: under_way(cluster), 10)
    cluster.finished(task_id, 15)
    # The same bytes.
    again = cluster.api.post(
        "/v1/chat/completions",
        content=json.dumps(body),
        headers={"Idempotency-Key": "left", "Content-Type": "application/json"},
    )
    assert again.status_code == 200
    is_replayed = again.headers["x-llmtasks-task-id"] == task_id
    assert is_replayed == (name == "drain") == ("Idempotent-Replayed" in again.headers)
