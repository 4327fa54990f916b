"""A worker that dies by kill -9 with two calls under way for one answer."""

import contextlib

import redis

from tests.acceptance.cluster import Cluster, wait_for
from tests.meters import put_p95

ROUTE = "slow-2000"
ATTEMPTS = """
SELECT number, state, cost_state, error_class, cost FROM llmtasks_attempt
WHERE task_id = %s ORDER BY number
"""


def queue_until_it_dies(cluster: Cluster) -> str:
    """The task whose second call its worker died of. Where the limiter's answer was late there was
    no second call."""
    for _ in range(5):
        task_id = cluster.queue(ROUTE)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not cluster.is_alive("worker-default"), 6)
            return task_id
    raise AssertionError("none of five had a second call")


def test_a_worker_that_dies_between_two_calls_leaves_both_unknown(cluster: Cluster):
    with redis.Redis.from_url(cluster.environment["REDIS_URL"]) as client:
        put_p95(client, f"sandbox/{ROUTE}", 100)
    cluster.rows("UPDATE llmtasks_route SET hedges = true WHERE name = %s", [ROUTE])
    try:
        cluster.kill9("worker-default")
        # Right after the second attempt was written down.
        cluster.start("worker-default", LLMTASKS_CRASH="attempt.begun:2")
        cluster.wait_until_ready()
        task_id = queue_until_it_dies(cluster)
        rows = cluster.rows(ATTEMPTS, [task_id])
        assert [(number, state) for number, state, *_ in rows] == [(1, "sent"), (2, "sent")]
        cluster.start_all()
        task = cluster.finished(task_id, 60)
        assert task["status"] == "succeeded"

        def is_settled() -> bool:
            return not any(state == "sent" for _, state, *_ in cluster.rows(ATTEMPTS, [task_id]))

        wait_for(is_settled, 10)
        first, second, *others = cluster.rows(ATTEMPTS, [task_id])
        for _, state, cost_state, _, cost in (first, second):
            assert (state, cost_state) == ("unknown", "estimated")
            assert cost > 0
        # It was run again, with two calls again.
        assert sorted(error for *_, error, _ in others) == ["", "Outrun"]
        [(cost,)] = cluster.rows("SELECT cost FROM llmtasks_task WHERE id = %s", [task_id])
        assert cost == sum(cost for *_, cost in (first, second, *others))
    finally:
        cluster.rows("UPDATE llmtasks_route SET hedges = false WHERE name = %s", [ROUTE])
