"""`make bench` works: a quick run over the sandbox, whose JSON has every figure. No time is
asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OF_A_RUN = {
    "date", "commit", "machine", "postgres", "quick", "upstream", "load", "rounds", "web",
    "inline", "queue", "seconds",
}  # fmt: skip
OF_A_CELL = {
    "upstream_ms", "concurrency", "requests_per_s", "p50_ms", "p99_ms", "direct_per_s",
    "direct_p50_ms", "direct_p99_ms", "added_p50_ms", "added_p99_ms", "ratio", "app_cpu_s",
    "postgres_cpu_s", "web_rss_mb", "answered", "rows",
}  # fmt: skip
OF_THE_QUEUE = {
    "start_p50_ms", "start_p99_ms", "accept_p50_ms", "accept_p99_ms", "answer_p50_ms",
    "answer_p99_ms", "tasks", "tasks_per_s", "drained_per_s", "worker_cpu_s", "dispatcher_cpu_s",
    "web_cpu_s", "postgres_cpu_s", "valkey_cpu_s", "worker_rss_mb",
}  # fmt: skip


OF_RELEASES = {
    "waiting", "heavy_percent", "released", "seconds", "released_per_s", "least_per_s", "newcomers",
    "newcomer_p50_ms", "newcomer_max_ms", "newcomer_p50_rounds", "newcomer_max_rounds",
    "dispatcher_cpu_s", "postgres_cpu_s", "valkey_cpu_s", "consumer_cpu_s", "rss_first_mb",
    "rss_last_mb",
}  # fmt: skip
OF_IDLENESS = {"why", "waiting", "dispatcher_cpu", "postgres_cpu", "valkey_cpu"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return run_quickly(tmp_path_factory.mktemp("bench"), "--upstream", "sandbox")


def run_quickly(folder: Path, *arguments: str) -> dict[str, object]:
    # Servers of its own: other tests' rows must not be counted, nor its own be seen by them.
    bench = [sys.executable, "-m", "tests.benchmarks", "--quick", *arguments]
    stack = [sys.executable, "-m", "project.stack", "--data", str(folder / "servers"), "run"]
    kept = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [*stack, "--durable", "--", *bench, "--out", str(folder)],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [written] = folder.glob("*.json")
    found: dict[str, object] = json.loads(written.read_text())
    return found


def test_the_run_is_described(result: dict[str, object]) -> None:
    assert set(result) == OF_A_RUN
    assert result["quick"] is True
    assert result["upstream"] == "sandbox"
    assert result["postgres"]["fsync"] == "on"  # type: ignore[index]


def test_every_cell_has_every_figure(result: dict[str, object]) -> None:
    cells = result["inline"]
    assert isinstance(cells, list)
    levels = [(cell["upstream_ms"], cell["concurrency"]) for cell in cells]
    assert levels == [(0, 1), (0, 8), (50, 1), (50, 8)]
    for cell in cells:
        assert set(cell) == OF_A_CELL
        assert cell["rows"] >= cell["answered"] > 0
        assert None not in cell.values()


def test_the_queue_has_every_figure(result: dict[str, object]) -> None:
    queue = result["queue"]
    assert isinstance(queue, dict)
    assert set(queue) == OF_THE_QUEUE
    assert None not in queue.values()


def test_the_dispatchers_run_has_every_figure(tmp_path: Path) -> None:
    result = run_quickly(tmp_path, "dispatch")
    found = result["dispatch"]
    assert isinstance(found, dict)
    assert set(found) == {"slots", "releases", "idle", "handover"}
    for one in found["releases"]:
        assert set(one) == OF_RELEASES
        assert one["released"] > 0
    assert [set(one) for one in found["idle"]] == [OF_IDLENESS] * 4
    assert set(found["handover"]) == {"handovers_s", "longest_s"}


def test_the_limiter_is_measured_with_and_without_limits(tmp_path: Path) -> None:
    cells = run_quickly(tmp_path, "limiter")["limiter"]
    assert [cell["limits"] for cell in cells] == [0, 3, 6] * 4  # type: ignore[attr-defined]
    assert [cell["cores"] for cell in cells][6:] == [1] * 6  # type: ignore[attr-defined]
    for cell in cells:  # type: ignore[attr-defined]
        assert min(cell.values()) >= 0 < cell["whole_p50_ms"] <= cell["whole_p99_ms"]
        assert min(cell["idle_p50_ms"], cell["ping_p50_ms"], cell["client_ping_p50_ms"]) > 0


def test_agents_and_workflows_are_measured(tmp_path: Path) -> None:
    found = run_quickly(tmp_path, "agents")["agents"]
    assert isinstance(found, dict)
    assert set(found) == {"loop", "fan_out", "blocked", "rounds", "aims"}
    assert set(found["loop"]) == {
        "turn_ms", "chat_ms", "postgres_ms", "four_tools_p50_ms", "four_tools_p99_ms",
        "background_ms",
    }  # fmt: skip
    assert found["loop"]["four_tools_p50_ms"] >= 100
    blocked, fan = found["blocked"], found["fan_out"]
    assert (blocked["agents"], blocked["running"], blocked["slots_taken"]) == (20, 0, 0)
    assert blocked["chat_ms"] > 0 <= blocked["woken_s"]
    assert fan["children"] == 20 and fan["whole_ms"] > 0 < fan["plain_ms"]
    assert set(found["aims"]) == {"turn_ms", "four_tools_p50_ms", "background_ms", "child_ms"}
