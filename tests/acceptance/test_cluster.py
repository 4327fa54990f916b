"""A task each way through the whole product."""

from tests.acceptance.cluster import Cluster, chat


def test_inline_work_is_answered_with_its_cost(cluster: Cluster):
    answer = cluster.api.post("/v1/tasks", json=chat("echo", "hello there", mode="inline"))
    assert answer.status_code == 200, answer.text
    task = answer.json()
    assert (task["status"], task["attempts"]) == ("succeeded", 1)
    assert (task["cost_state"], float(task["cost"]) > 0) == ("final", True)


def test_queued_work_is_run_by_the_worker_of_its_lane(cluster: Cluster):
    for lane in ("interactive", "default", "bulk"):
        task = cluster.finished(cluster.queue("claude-echo", lane=lane))
        assert (task["status"], task["lane"]) == ("succeeded", lane)
        assert task["provider"] == "sandbox-anthropic"
