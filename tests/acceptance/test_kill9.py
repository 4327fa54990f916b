"""What a client sees of a web server that was killed, and of a worker that is told to end.

The kill loop over queued work is `tests/chaos/kills.py`.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.acceptance.cluster import Cluster, chat, wait_for


def test_inline_work_of_a_killed_web_server_can_be_sent_again(cluster: Cluster):
    headers = {"Idempotency-Key": f"again-{time.time()}"}
    body = chat("slow-2000", mode="inline")

    def send() -> httpx.Response:
        return cluster.api.post("/v1/tasks", json=body, headers=headers)

    def under_way() -> list[str]:
        return cluster.rows(
            "SELECT id::text FROM llmtasks_task WHERE mode = 'inline' AND status = 'running'"
        )

    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(send)
        [(task_id,)] = wait_for(under_way, 20)
        cluster.kill9("web")
        with pytest.raises(httpx.HTTPError):
            first.result()
    cluster.start_all()
    # Until the lease of the dead runs out nobody can tell that it is dead.
    assert wait_for(lambda: (answer := send()).status_code != 409 and answer, 30).json()["id"]
    lost = cluster.task(task_id)
    assert (lost["status"], lost["error"]["class"]) == ("failed", "Interrupted")
    assert lost["cost_state"] == "estimated"
    again = send().json()
    assert (again["status"], again["attempts"]) == ("succeeded", 1)
    assert again["id"] != task_id


def test_a_worker_that_is_told_to_end_ends_its_work_first(cluster: Cluster):
    ids = cluster.queue_many([chat("slow-3000", f"last {n}") for n in range(6)])
    running = "SELECT count(*) FROM llmtasks_task WHERE status = 'running' AND id = ANY(%s)"
    wait_for(lambda: cluster.rows(running, [ids])[0][0] == 6, 20)
    cluster.terminate("worker-default")
    tasks = [cluster.task(task_id) for task_id in ids]
    assert {(task["status"], task["attempts"]) for task in tasks} == {("succeeded", 1)}
