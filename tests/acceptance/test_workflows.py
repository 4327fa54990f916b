"""Workflows on real processes: the examples as they are, a kill in between, a cancel."""

import json
import os
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest

from tests.acceptance.cluster import ROOT, Cluster, wait_for

SUMS = """
SELECT t.cost, (SELECT sum(cost) FROM llmtasks_task WHERE parent_id = t.id)
FROM llmtasks_task t WHERE t.kind = 'workflow' AND t.status = 'succeeded'
"""


def example(cluster: Cluster, name: str) -> tuple[dict[str, Any], list[str]]:
    """What an example printed: its task, and a line for each step's change."""
    done = subprocess.run(
        (sys.executable, "examples/workflows/run.py", name),
        cwd=ROOT,
        env={**os.environ, "BASE": cluster.base_url, "KEY": cluster.key},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    task: dict[str, Any] = json.loads(done.stdout)
    assert task["status"] == "succeeded", task
    return task, done.stderr.splitlines()


def test_the_document_pipeline(cluster: Cluster) -> None:
    task, told = example(cluster, "document")
    value = task["output"]["value"]
    assert value["summaries"] == [
        "Rain fell all night.", "In the morning the river rose.", "Nobody left.",
    ]  # fmt: skip
    assert value["title"] == json.dumps(value["summaries"], separators=(",", ":"))
    assert task["model"].startswith("document@")
    assert Decimal(task["cost"]) > 0
    assert told[0].split() == ["0", "parts", "done"]
    assert told[-1].split() == ["2", "title", "done"]


def test_the_review_with_votes(cluster: Cluster) -> None:
    task, _ = example(cluster, "review")
    assert task["output"]["value"]["winner"] == "accept"


def test_the_orchestrator_over_50_documents(cluster: Cluster) -> None:
    task, told = example(cluster, "risks")
    found = json.loads(task["output"]["value"])
    assert found == [f"Contract {n}: Clause {n} is new." for n in range(50)]
    assert sum(line.endswith(" done") for line in told) == 52
    for whole, parts in cluster.rows(SUMS):
        assert whole == parts


def fan(model: str, count: int) -> dict[str, Any]:
    do = {
        "kind": "parallel", "items": "{{ input.list }}", "max_items": 1000,
        "max_concurrency": 10,
        "do": {"kind": "pipeline", "stages": [
            {"kind": "prompt", "name": "a", "model": model, "text": "{{ item }}"},
            {"kind": "prompt", "name": "b", "model": model, "text": "{{ steps.a.output }}!"},
        ]},
    }  # fmt: skip
    given = {"spec": {"do": do}, "input": {"list": [str(n) for n in range(count)]}}
    return {"kind": "workflow", "mode": "queued", "input": given}


@pytest.mark.parametrize("name", ["worker-default", "dispatcher"])
def test_a_kill_in_between(cluster: Cluster, name: str) -> None:
    made = cluster.api.post("/v1/tasks", json=fan("slow-100", 20))
    assert made.status_code == 202, made.text
    task_id = made.json()["id"]
    below = "SELECT count(*) FROM llmtasks_task WHERE parent_id = %s AND status = 'succeeded'"
    wait_for(lambda: cluster.rows(below, (task_id,))[0][0] >= 5, 30)
    cluster.kill9(name)
    cluster.start_all()
    task = cluster.finished(task_id, 90)
    assert task["status"] == "succeeded", task
    assert task["output"]["value"] == [f"{n}!" for n in range(20)]
    [(steps,)] = cluster.rows(
        "SELECT count(*) FROM llmtasks_step WHERE task_id = %s AND status = 'done'", (task_id,)
    )
    assert steps == 20


def test_a_cancel_reaches_all_below(cluster: Cluster) -> None:
    task_id = cluster.api.post("/v1/tasks", json=fan("slow-20000", 30)).json()["id"]
    running = """
        SELECT count(*) FROM llmtasks_task t JOIN llmtasks_task p ON p.id = t.parent_id
        WHERE p.parent_id = %s AND t.status = 'running'
    """
    wait_for(lambda: cluster.rows(running, (task_id,))[0][0] >= 5, 30)
    assert cluster.api.post(f"/v1/tasks/{task_id}/cancel").status_code == 200
    assert cluster.task(task_id)["status"] == "cancelled"
    below = """
        WITH RECURSIVE below AS (
            SELECT id, status FROM llmtasks_task WHERE parent_id = %s
            UNION ALL SELECT t.id, t.status FROM llmtasks_task t JOIN below b ON b.id = t.parent_id
        ) SELECT status, count(*) FROM below GROUP BY status
    """
    wait_for(lambda: [s for s, _ in cluster.rows(below, (task_id,))] == ["cancelled"], 10)
