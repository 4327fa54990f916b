"""The support agent as its README runs it: an order found at once, a mail in the background."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.cluster import ROOT, Cluster

NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NAMES = ("sandbox", "web", "dispatcher", "worker-default")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("support")
    settings = {"APPS": "examples.support"}
    with Cluster.fresh(folder, NUMBER % 2 + 4, names=NAMES, settings=settings) as cluster:
        yield cluster


def asked(desk: Cluster, order: str) -> Any:
    done = subprocess.run(
        (sys.executable, "examples/support/run.py", order),
        cwd=ROOT,
        env={**os.environ, "BASE": desk.base_url, "KEY": desk.key},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_an_order_is_found_at_once_and_the_mail_is_queued(desk: Cluster) -> None:
    found = asked(desk, "1001")
    task, steps = found["task"], found["steps"]
    assert (task["status"], task["mode"]) == ("succeeded", "inline")
    assert [(step["kind"], step["name"], step["status"]) for step in steps] == [
        ("model", "script", "done"),
        ("tool", "find_order@1", "done"),
        ("model", "script", "done"),
        ("tool", "send_mail@1", "done"),
        ("model", "script", "done"),
    ]
    assert "DHL" in json.dumps(steps[1]["content"]) and steps[1]["task"] is None
    [mail] = found["mails"]
    assert (mail["kind"], mail["mode"], mail["status"]) == ("tool", "queued", "succeeded")
    assert mail["output"]["content"] == "sent to ann@example.com"


def test_the_model_hears_of_an_order_that_is_not_there(desk: Cluster) -> None:
    found = asked(desk, "1009")
    assert found["task"]["status"] == "succeeded"
    assert (found["steps"][1]["status"], found["steps"][1]["error"]) == ("failed", "ToolError")
    assert "there is no order 1009" in json.dumps(found["steps"][1]["content"])
