"""Mode `auto` on real processes: inline while the web process has threads, queued beyond."""

import contextlib
from typing import Any

from tests.acceptance.cluster import Cluster, chat, wait_for

# The cluster's web process has 64 threads; more than three quarters of them.
CALLS = 50


def auto(cluster: Cluster) -> str:
    """How work in mode `auto` was run."""
    answer = cluster.api.post("/v1/tasks", json=chat("echo", mode="auto"))
    assert answer.status_code == 200, answer.text
    task: dict[str, Any] = answer.json()
    assert task["status"] == "succeeded"
    return str(task["mode"])


def test_a_busy_web_process_leaves_work_to_the_workers(cluster: Cluster):
    assert auto(cluster) == "inline"
    with contextlib.ExitStack() as callers:
        for _ in range(CALLS):
            body = chat("slow-20000", mode="inline")
            callers.enter_context(cluster.send("/v1/tasks", body))
        wait_for(lambda: cluster.bill()["under_way"] == CALLS, 20)
        assert auto(cluster) == "queued"
    # They hung up.
    wait_for(lambda: cluster.bill()["under_way"] == 0, 20)
    # The web process's threads end a moment after the vendor's connections.
    wait_for(lambda: auto(cluster) == "inline", 20)
