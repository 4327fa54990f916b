"""Redis and Postgres go away and come back: everything goes on by itself."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from project.stack import postgres
from project.stack.layout import Layout
from project.stack.owner import Servers
from project.stack.processes import Child
from tests.acceptance.cluster import FIRST_PORT, Cluster, chat, wait_for

NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """A PostgreSQL and a Valkey that only this module's cluster uses."""
    # Not below pytest's own folder, which another run closes for Postgres's user.
    with tempfile.TemporaryDirectory(prefix="llmtasks-") as folder:
        made = Servers(Layout.at(folder), "outages", test=False)
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def whole(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(
        tmp_path_factory.mktemp("outages"),
        servers.database_url,
        servers.redis_url,
        first_port=FIRST_PORT + 1000 * (NUMBER % 4 + 4),
        names=("sandbox", "web", "dispatcher", "worker-default"),
    )
    cluster.prepare()
    with cluster:
        yield cluster


@pytest.fixture
def cluster(whole: Cluster, servers: Servers) -> Cluster:
    """Everything runs when the test begins, whatever the one before it stopped."""
    assert servers.valkey is not None
    assert servers.postgres is not None
    if not servers.valkey.is_alive():
        servers.valkey.start()
    if not servers.postgres.is_alive():
        servers.postgres.start()
        postgres.wait_until_ready(servers.postgres, servers.layout)
    whole.start_all()
    return whole


def kill(server: Child | None) -> None:
    assert server is not None
    assert server.process is not None
    server.process.kill()
    server.process.wait()


class Beside(threading.Thread):
    """A request under way beside the test."""

    def __init__(self, cluster: Cluster, body: dict[str, Any]) -> None:
        super().__init__()
        self.cluster, self.body = cluster, body
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = self.cluster.api.post("/v1/tasks", json=self.body)

    def result(self) -> httpx.Response:
        self.join(30)
        assert self.answer is not None
        return self.answer


def under_way(cluster: Cluster, task_id: str) -> None:
    """Wait until its call is with the vendor: before that it may still ask for room."""
    sent = "SELECT 1 FROM llmtasks_attempt WHERE task_id = %s AND state = 'sent'"
    wait_for(lambda: cluster.rows(sent, [task_id]), 20)


def test_redis_is_killed(cluster: Cluster, servers: Servers):
    slow = cluster.queue("slow-2000")
    under_way(cluster, slow)
    kill(servers.valkey)
    # Inline work needs no Redis.
    for _ in range(3):
        inline = cluster.api.post("/v1/tasks", json=chat("echo", mode="inline"), timeout=10)
        assert (inline.status_code, inline.json()["status"]) == (200, "succeeded")
    # Queued work is a row; what was under way ends.
    ids = [cluster.queue("echo") for _ in range(5)]
    assert cluster.finished(slow)["status"] == "succeeded"
    assert all(cluster.task(task_id)["status"] != "succeeded" for task_id in ids)
    assert cluster.api.get("/healthz").status_code == 200
    assert servers.valkey is not None
    servers.valkey.start()
    for task_id in ids:
        assert cluster.finished(task_id, 40)["status"] == "succeeded"
    wait_for(lambda: cluster.api.get("/readyz").status_code == 200, 20)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_postgres_goes_away(cluster: Cluster, servers: Servers, how: str):
    assert servers.postgres is not None
    slow = [cluster.queue("slow-2000", f"{how} {n}") for n in range(3)]
    waiting = cluster.queue("echo", run_at=in_(6))
    for task_id in slow:
        under_way(cluster, task_id)
    # Over before a process that lost Postgres drops its calls: DROP_AFTER_S.
    inline = Beside(cluster, chat("slow-3000", mode="inline"))
    wait_for(
        lambda: cluster.rows(
            "SELECT 1 FROM llmtasks_task t JOIN llmtasks_attempt a ON a.task_id = t.id"
            " WHERE t.mode = 'inline' AND a.state = 'sent'"
        ),
        10,
    )
    if how == "killed":
        # Its children notice and end too.
        servers.postgres.process.send_signal(signal.SIGQUIT)
        servers.postgres.process.wait()
    else:
        servers.postgres.stop()

    # What needs it is refused at once; every connection has a timeout.
    for mode in ("inline", "queued"):
        began = time.monotonic()
        refused = cluster.api.post("/v1/tasks", json={**chat("echo"), "mode": mode}, timeout=20)
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert time.monotonic() - began < 10
    assert cluster.api.get("/healthz").status_code == 200
    assert cluster.api.get("/readyz", timeout=20).status_code == 503
    # The answer that the vendor gave meanwhile is passed on, with a warning.
    answer = inline.result()
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "succeeded"
    assert "Postgres" in str(answer.headers)

    servers.postgres.start()
    postgres.wait_until_ready(servers.postgres, servers.layout)
    for task_id in (*slow, waiting):
        assert cluster.finished(task_id, 60)["status"] == "succeeded"
    wait_for(lambda: cluster.api.get("/readyz").status_code == 200, 20)
    assert cluster.finished(answer.json()["id"])["status"] == "succeeded"
    assert cluster.finished(cluster.queue("claude-echo"))["status"] == "succeeded"
    open_ = cluster.rows("SELECT id FROM llmtasks_attempt WHERE state = 'sent'")
    assert open_ == []
    [(wrong,)] = cluster.rows(
        "SELECT count(*) FROM llmtasks_task t WHERE cost_state <> 'unpriced' AND coalesce(cost, 0)"
        " <> (SELECT coalesce(sum(cost), 0) FROM llmtasks_attempt a WHERE a.task_id = t.id)"
    )
    assert wrong == 0


def in_(seconds: float) -> str:
    from datetime import UTC, datetime, timedelta

    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
