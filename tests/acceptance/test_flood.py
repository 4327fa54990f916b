"""A provider that is flooded with slow work holds up nobody else."""

from tests.acceptance.cluster import Cluster, chat, wait_for

FLOOD = 300
FINAL = "('succeeded', 'failed', 'cancelled', 'expired')"


def done(cluster: Cluster, ids: list[str]) -> int:
    return cluster.rows(
        f"SELECT count(*) FROM llmtasks_task WHERE status IN {FINAL} AND id = ANY(%s)", [ids]
    )[0][0]


def left(cluster: Cluster, ids: list[str]) -> int:
    return len(ids) - done(cluster, ids)


def test_another_providers_tasks_are_not_delayed(cluster: Cluster):
    slow = cluster.queue_many([chat("slow-2000", f"slow {n}") for n in range(FLOOD)])
    wait_for(
        lambda: cluster.rows("SELECT 1 FROM llmtasks_task WHERE status = 'running' LIMIT 1"), 10
    )
    for _ in range(3):
        quick = cluster.queue_many([chat("claude-echo", f"quick {n}") for n in range(10)])
        wait_for(lambda ids=quick: left(cluster, ids) == 0, 20)
        # All of it was released, run and finished while the flood still stood.
        assert left(cluster, slow) > FLOOD / 2
        [(held,)] = cluster.rows(
            "SELECT count(*) FROM llmtasks_task WHERE provider = 'sandbox' AND lane = 'default'"
            " AND status IN ('queued', 'running') AND mode = 'queued'"
        )
        # No provider holds more than its share of a lane's slots (3/4 of 24).
        assert held <= 18
    for task_id in slow:
        cluster.api.post(f"/v1/tasks/{task_id}/cancel")
    wait_for(lambda: left(cluster, slow) == 0, 30)


def test_running_queued_work_is_cancelled_at_once(cluster: Cluster):
    task_id = cluster.queue("slow-20000")
    wait_for(lambda: cluster.bill()["tasks"].get(task_id, {}).get("under_way"), 20)
    answer = cluster.api.post(f"/v1/tasks/{task_id}/cancel")
    # 200 where its worker was faster than the answer.
    assert answer.status_code in (200, 202)
    task = cluster.finished(task_id, 10)
    [(took_s,)] = cluster.rows(
        "SELECT extract(epoch FROM finished_at - cancel_requested_at) FROM llmtasks_task"
        " WHERE id = %s",
        [task_id],
    )
    assert took_s < 3
    assert (task["status"], task["error"]["class"]) == ("cancelled", "Cancelled")
    wait_for(lambda: cluster.bill()["tasks"][task_id]["under_way"] == 0, 10)


def test_a_provider_that_is_added_is_served_by_running_processes(cluster: Cluster):
    cluster.manage(
        *("add_provider", "late", "--adapter", "compatible", "--key", "env:SANDBOX_KEY"),
        *("--base-url", f"{cluster.sandbox_url}/v1", "--route", "late-echo=echo"),
    )
    wait_for(lambda: cluster.api.post("/v1/tasks", json=chat("late-echo")).status_code == 202, 5)
    task = cluster.finished(cluster.queue("late-echo", lane="bulk"), 20)
    assert (task["status"], task["provider"]) == ("succeeded", "late")
    inline = cluster.api.post("/v1/tasks", json=chat("late-echo", mode="inline"))
    assert inline.json()["status"] == "succeeded"


def everybody_knows(cluster: Cluster) -> None:
    """Once every process renewed its lease: the same statement reads what is configured."""
    [(now,)] = cluster.rows("SELECT clock_timestamp()")
    late = (
        "SELECT 1 FROM llmtasks_worker WHERE lease_until > clock_timestamp()"
        " AND lease_until < %s + make_interval(secs => %s)"
    )
    lease_s = float(cluster.environment["LEASE_S"])
    wait_for(lambda: not cluster.rows(late, [now, lease_s]), 10)


def test_a_paused_providers_work_waits_until_it_is_resumed(cluster: Cluster):
    cluster.rows("UPDATE llmtasks_provider SET is_paused = true WHERE name = 'sandbox-anthropic'")
    everybody_knows(cluster)
    task_id = cluster.queue("claude-echo")
    other = cluster.finished(cluster.queue("echo"))
    assert other["status"] == "succeeded"
    assert cluster.task(task_id)["status"] == "waiting"
    cluster.rows("UPDATE llmtasks_provider SET is_paused = false WHERE name = 'sandbox-anthropic'")
    assert cluster.finished(task_id)["status"] == "succeeded"
