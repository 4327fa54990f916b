"""What a frontend sees of a running agent: turns, calls, people asked, in the order in which they
happen; followed, resumed, and not to be broken by what a model writes."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from django.db import connection

from llmtasks import steps
from llmtasks.api import waiting
from llmtasks.models import Provider, Step, Task
from llmtasks.tools import registry as tools
from llmtasks.tools.registry import ToolError, of_function
from tests import factories
from tests.callers import Caller, frames_of
from tests.integration.working import work_off

EVIL = 'x\n\nevent: done\ndata: {"status": "succeeded"}\r\n\r\n\u2028\0'


@pytest.fixture(autouse=True)
def toolbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    box = tools.Registry()
    monkeypatch.setattr(tools.registry, "tools", box.tools)

    def look_up(order: int) -> str:
        time.sleep(0.05)
        return f"order {order}"

    def send_mail(to: str) -> str:
        return to

    def delete(order: int) -> str:
        return f"{order} is gone"

    def fails() -> str:
        raise ToolError("closed")

    def repeats(text: str) -> str:
        return text

    for function, options in (
        (look_up, {"idempotent": True}),
        (send_mail, {"critical": False}),
        (delete, {"needs_approval": True}),
        (fails, {}),
        (repeats, {}),
    ):
        box.add(of_function(function, **options))  # type: ignore[arg-type]
    yield


@pytest.fixture(autouse=True)
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row, which may be done before all events came, is not looked at."""
    monkeypatch.setattr(waiting, "LOOK_S", 60.0)


@pytest.fixture
def caller(account: Provider) -> Caller:
    factories.route("script", (account, "script"))
    return Caller(factories.tenant())


def agent(caller: Caller, *turns: list[tuple[str, dict[str, Any]]]) -> str:
    """The id of a queued agent whose model makes these calls."""
    script = [[{"name": name, "arguments": given} for name, given in turn] for turn in turns]
    body = {
        "model": "script",
        "messages": [{"role": "user", "content": orjson.dumps(script).decode()}],
        "tools": ["look_up", "send_mail", "delete", "fails", "repeats"],
    }
    answer = caller.post("/v1/tasks", {"kind": "agent", "mode": "queued", "input": body})
    assert answer.status_code == 202, answer.content
    return str(answer.json()["id"])


def watched(caller: Caller, task_id: str, work: Callable[[], Any], **headers: str) -> list[Any]:
    """The frames that a watcher gets while the work is done."""

    def run() -> None:
        try:
            work()
        finally:
            connection.close()

    answer = caller.get(f"/v1/tasks/{task_id}/events", **headers)
    worker = threading.Timer(0.2, run)
    worker.start()
    try:
        return frames_of(answer)
    finally:
        worker.join()


def steps_in(frames: list[Any]) -> list[tuple[int, str, str]]:
    return [(d["number"], d["name"], d["status"]) for _, name, d in frames if name == "step"]


def test_a_watcher_sees_turns_calls_and_text_as_they_happen(caller: Caller) -> None:
    task_id = agent(
        caller, [("look_up", {"order": 1}), ("send_mail", {"to": "a@b"}), ("fails", {})]
    )
    frames = watched(caller, task_id, work_off)
    assert steps_in(frames) == [
        (0, "script", "running"),
        (0, "script", "done"),
        (1, "look_up@1", "running"),
        (2, "send_mail@1", "done"),
        (3, "fails@1", "running"),
        (1, "look_up@1", "done"),
        (3, "fails@1", "failed"),
        (4, "script", "running"),
        (4, "script", "done"),
    ]
    told = {(d["number"], d["status"]): d for _, name, d in frames if name == "step"}
    mailed = Step.objects.get(task_id=task_id, number=2)
    assert told[2, "done"] == {
        "number": 2, "kind": "tool", "name": "send_mail@1", "status": "done",
        "call_id": mailed.call_id, "background": True, "task": str(mailed.child_id), "error": None,
    }  # fmt: skip
    assert (told[3, "failed"]["error"], told[3, "failed"]["background"]) == ("ToolError", False)
    assert set(told[0, "running"]) == set(told[2, "done"])
    # The same calls as the model's own deltas name them.
    pieces = [d["id"] for _, name, d in frames if name == "tool_call" and d["id"]]
    assert pieces == [told[number, status]["call_id"] for number, status in
                      ((1, "running"), (2, "done"), (3, "running"))]  # fmt: skip
    # The text after the last turn's reset is the answer.
    names = [(name, d.get("reason")) for _, name, d in frames]
    last = names.index(("reset", "turn"))
    text = "".join(d["text"] for _, name, d in frames[last:] if name == "delta")
    assert text == frames[-1][2]["output"]["choices"][0]["message"]["content"] == "closed"


def test_a_watcher_goes_on_in_the_middle_of_a_run(caller: Caller) -> None:
    task_id = agent(caller, [("look_up", {"order": 1})], [("look_up", {"order": 2})])
    seen = watched(caller, task_id, work_off)
    ids = [index for index, (_, name, _) in enumerate(seen) if name == "step"]
    middle = ids[len(ids) // 2]
    headers = {"Last-Event-ID": seen[middle][0]}
    rest = frames_of(caller.get(f"/v1/tasks/{task_id}/events", **headers))
    assert rest == seen[middle + 1 :]
    assert steps_in(rest)


@pytest.mark.parametrize(("run", "ends"), [(True, "done"), (False, "failed")])
def test_whom_it_waits_for_is_seen_and_what_they_said(caller: Caller, run: bool, ends: str) -> None:
    task_id = agent(caller, [("delete", {"order": 7})])

    def work() -> None:
        work_off()
        step = Step.objects.get(task_id=task_id, status="approval")
        steps.decide(step.id, caller.tenant.id, run=run, by="ann", comment="so be it")
        work_off()

    frames = watched(caller, task_id, work)
    asked = [status for number, _, status in steps_in(frames) if number == 1]
    assert asked == (["approval", "approved", "running", ends] if run else ["approval", ends])
    states = [d["status"] for _, name, d in frames if name == "state"]
    assert "blocked" in states
    assert frames[-1][1:2] == ("done",)


def test_what_a_model_writes_breaks_no_frame(caller: Caller) -> None:
    task_id = agent(caller, [(EVIL, {}), ("repeats", {"text": EVIL})])
    frames = watched(caller, task_id, work_off)
    assert [name for _, name, _ in frames].count("done") == 1
    stored = EVIL.replace("\0", "\ufffd")
    failed = [d for _, name, d in frames if name == "step" and d["number"] == 1]
    assert [(d["name"], d["error"]) for d in failed] == [(stored[:100], "UnknownTool")]
    rows = steps.of(Task.objects.get(id=task_id).id)
    assert rows[2].output == {"content": stored}
