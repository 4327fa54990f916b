"""Programs are told to end and started again under load: nothing is lost, no caller is failed."""

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from project.stack.ports import free_port
from project.stack.programs import Places, programs
from tests.acceptance.cluster import FIRST_PORT, Cluster, chat, wait_for

NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
GRACE_S = 8
ROUNDS = 2
CALLERS = 6
MODELS = ("echo", "slow-100", "slow-1000", "claude-echo", "claude-slow-100")
ROLLED = ("web", "web-2", "dispatcher", "worker-default", "worker-bulk")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    names = ("sandbox", "web", "dispatcher", "worker-default", "worker-bulk")
    with Cluster.fresh(
        tmp_path_factory.mktemp("restarts"),
        NUMBER % 4 + 4,
        names=names,
        # A hint that is lost would not be found again in time.
        settings={"GRACE_S": str(GRACE_S), "HINT_LOST_S": "600"},
    ) as cluster:
        yield cluster


@pytest.fixture
def cluster(whole: Cluster) -> Cluster:
    whole.start_all()
    return whole


def add_web(cluster: Cluster) -> str:
    """A second web server, as behind a load balancer; its URL."""
    port = free_port(FIRST_PORT + 1000 * (NUMBER % 4 + 4) + 800, 200)
    places = Places(port=port, web_workers=1, web_threads=64)
    cluster.commands["web-2"] = programs(sys.executable, places)[0].command
    cluster.start("web-2")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(url), 30)
    return url


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


class Caller(threading.Thread):
    """Sends one inline call after the other until `stopped`. What breaks is sent again to the
    next server with the same key, as a load balancer and the official clients do."""

    def __init__(self, cluster: Cluster, urls: list[str], stopped: threading.Event) -> None:
        super().__init__()
        self.urls, self.stopped = urls, stopped
        self.headers = {"Authorization": f"Bearer {cluster.key}"}
        self.statuses: list[int] = []
        self.broken: list[str] = []
        self.longest_s = 0.0
        self.start()

    def run(self) -> None:
        with httpx.Client(timeout=30, headers=self.headers) as client:
            number = 0
            while not self.stopped.is_set():
                number += 1
                body = chat(MODELS[number % len(MODELS)], mode="inline")
                began = time.monotonic()
                self.statuses.append(self.send(client, body, number))
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    def send(self, client: httpx.Client, body: dict[str, Any], number: int) -> int:
        key = {"Idempotency-Key": str(uuid.uuid4())}
        for turn in range(50):
            url = self.urls[(number + turn) % len(self.urls)]
            try:
                answer = client.post(f"{url}/v1/tasks", json=body, headers=key)
            except httpx.TransportError as error:
                self.broken.append(type(error).__name__)
                time.sleep(0.1)
                continue
            if answer.status_code != 409:
                return answer.status_code if answer.json()["status"] == "succeeded" else 0
            time.sleep(0.2)
        return -1


def all_finished(cluster: Cluster) -> bool:
    return not cluster.rows(
        "SELECT 1 FROM llmtasks_task WHERE status IN ('waiting', 'queued', 'running')"
    )


def check_nothing_was_cut_short(cluster: Cluster) -> None:
    """Every call was short enough for the grace time: each was made once, and ended."""
    assert (
        cluster.rows(
            "SELECT status, mode, attempts, count(*) FROM llmtasks_task"
            " WHERE (status, attempts) <> ('succeeded', 1) GROUP BY 1, 2, 3"
        )
        == []
    )
    assert (
        cluster.rows(
            "SELECT state, error_class, count(*) FROM llmtasks_attempt"
            " WHERE (state, error_class) <> ('settled', '') GROUP BY 1, 2"
        )
        == []
    )


def test_rolling_restarts_under_load_lose_nothing(cluster: Cluster):
    urls = [cluster.base_url, add_web(cluster)]
    stopped = threading.Event()
    callers = [Caller(cluster, urls, stopped) for _ in range(CALLERS)]
    ids: list[str] = []
    try:
        for _ in range(ROUNDS):
            for name in ROLLED:
                with httpx.Client(
                    base_url=urls[name == "web"], headers=callers[0].headers, timeout=30
                ) as api:
                    bodies = [
                        chat(MODELS[n % 5], lane=("default", "bulk")[n % 2]) for n in range(20)
                    ]
                    sent = api.post("/v1/tasks/bulk", json={"tasks": bodies})
                assert sent.status_code == 200, sent.text
                ids += [item["task"]["id"] for item in sent.json()["data"]]
                cluster.restart(name)
                cluster.wait_until_ready()
                wait_for(lambda: answers(urls[1]), 30)
    finally:
        stopped.set()
        for caller in callers:
            caller.join(60)
    wait_for(lambda: all_finished(cluster), 60)
    statuses = [status for caller in callers for status in caller.statuses]
    assert len(statuses) > 10 * ROUNDS
    assert set(statuses) == {200}
    # A door is closed or open: who was let in is answered.
    assert {name for caller in callers for name in caller.broken} <= {"ConnectError"}
    [(known,)] = cluster.rows("SELECT count(*) FROM llmtasks_task WHERE id = ANY(%s)", [ids])
    assert known == len(ids) == 20 * ROUNDS * len(ROLLED)
    check_nothing_was_cut_short(cluster)
    assert max(caller.longest_s for caller in callers) < GRACE_S + 10


def test_a_reload_of_the_web_server_breaks_no_connection(cluster: Cluster):
    stopped = threading.Event()
    callers = [Caller(cluster, [cluster.base_url], stopped) for _ in range(CALLERS)]
    try:
        for _ in range(ROUNDS):
            cluster.running["web"].send_signal(signal.SIGHUP)
            time.sleep(3)
    finally:
        stopped.set()
        for caller in callers:
            caller.join(60)
    assert {status for caller in callers for status in caller.statuses} == {200}
    assert [name for caller in callers for name in caller.broken] == []
    check_nothing_was_cut_short(cluster)


def test_what_outlives_the_grace_time_is_handed_back(cluster: Cluster):
    queued = cluster.queue("slow-20000")
    body = chat("slow-20000", mode="inline")
    with ThreadPoolExecutor(2) as beside:
        native = beside.submit(cluster.api.post, "/v1/tasks", json=body)
        openai = beside.submit(cluster.api.post, "/v1/chat/completions", json=body["input"])
        running = "SELECT count(*) FROM llmtasks_attempt WHERE state = 'sent'"
        wait_for(lambda: cluster.rows(running)[0][0] == 3, 20)
        began = time.monotonic()
        cluster.running["web"].terminate()
        cluster.running["worker-default"].terminate()
        told = openai.result()
        assert (told.status_code, told.headers["retry-after"]) == (503, "1")
        assert told.json()["error"]["code"] == "interrupted"
        assert native.result().json()["error"]["class"] == "Interrupted"
        assert GRACE_S - 1 < time.monotonic() - began < GRACE_S + 10
    for name in ("web", "worker-default"):
        assert cluster.running[name].wait(GRACE_S + 5) == 0
    waits = "SELECT status, owner_id, error_class FROM llmtasks_task WHERE id = %s"
    # Nobody needs to wait for a lease: its owner gave it back.
    assert cluster.rows(waits, [queued]) == [("waiting", None, "")]
    cluster.start_all()
    sent = "SELECT 1 FROM llmtasks_attempt WHERE task_id = %s AND state = 'sent'"
    wait_for(lambda: cluster.rows(sent, [queued]), 20)
    cluster.api.post(f"/v1/tasks/{queued}/cancel")
    task = cluster.finished(queued)
    assert (task["status"], task["attempts"]) == ("cancelled", 2)
