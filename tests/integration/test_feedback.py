"""Feedback on answers, and the export of tasks with it."""

import io
from pathlib import Path
from typing import Any

import orjson
import pytest
from django.core.management import CommandError, call_command

from llmtasks import feedback
from llmtasks.models import Feedback, Provider, TaskPayload
from tests import factories
from tests.callers import Caller, body_of


@pytest.fixture
def caller(account: Provider) -> Caller:
    factories.route("echo", (account, "echo"))
    return Caller(factories.tenant())


@pytest.fixture
def task_id(caller: Caller) -> str:
    return str(caller.task(mode="inline").json()["id"])


def give(caller: Caller, task_id: str, **fields: Any) -> Any:
    return caller.post(f"/v1/tasks/{task_id}/feedback", fields)


def test_feedback_is_given_replaced_and_shown_with_the_task(caller: Caller, task_id: str) -> None:
    first = give(caller, task_id, score=-1, comment="wrong order")
    assert first.status_code == 201
    [row] = first.json()["data"]
    assert (row["source"], row["score"], row["comment"]) == ("user", -1.0, "wrong order")
    second = give(caller, task_id, score=1)
    assert second.status_code == 200
    [row] = second.json()["data"]
    assert (row["score"], row["comment"]) == (1.0, None)
    assert row["updated_at"] > row["created_at"]
    give(caller, task_id, label="grounded", source="judge", score=0.5)
    shown = caller.get(f"/v1/tasks/{task_id}").json()["feedback"]
    assert [(row["source"], row["label"]) for row in shown] == [
        ("judge", "grounded"),
        ("user", None),
    ]
    assert caller.get(f"/v1/tasks/{task_id}/feedback").json()["data"] == shown
    assert Feedback.objects.count() == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "score"),
        ({"score": 2}, "score"),
        ({"score": 10**18}, "score"),
        ({"score": -1.01}, "score"),
        ({"score": True}, "score"),
        ({"score": "1"}, "score"),
        ({"label": ""}, "label"),
        ({"label": "x" * 65}, "label"),
        ({"comment": "x" * 10_001}, "comment"),
        ({"score": 1, "source": ""}, "source"),
        ({"score": 1, "rating": 5}, "rating"),
    ],
)
def test_feedback_that_is_wrong_is_named(
    caller: Caller, task_id: str, body: Any, param: str
) -> None:
    answer = give(caller, task_id, **body)
    assert (answer.status_code, answer.json()["param"]) == (400, param)
    assert not Feedback.objects.exists()


def test_another_tenants_task_is_not_there(caller: Caller, task_id: str) -> None:
    other = Caller(factories.tenant())
    give(caller, task_id, score=1)
    assert give(other, task_id, score=-1).status_code == 404
    assert other.get(f"/v1/tasks/{task_id}/feedback").status_code == 404
    assert body_of(other.get("/v1/feedback/export")) == b""
    assert Feedback.objects.get().score == 1
    reader = Caller(caller.tenant, scopes=["read"])
    assert give(reader, task_id, score=1).status_code == 403
    writer = Caller(caller.tenant, scopes=["write"])
    assert writer.get("/v1/feedback/export").status_code == 403


# --- export ---------------------------------------------------------------------------------------


def lines(raw: bytes | str) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in raw.splitlines()]


def test_the_export_has_each_task_with_feedback_once(caller: Caller) -> None:
    ids = [str(caller.task(mode="inline", user=f"u{n}").json()["id"]) for n in range(4)]
    for task_id in (ids[2], ids[0]):
        give(caller, task_id, score=1, comment="line one\nline two\u2028")
        give(caller, task_id, score=0, source="judge")
    TaskPayload.objects.filter(task_id=ids[2]).delete()
    answer = caller.get("/v1/feedback/export")
    assert answer["Content-Type"] == "application/jsonl"
    first, second = lines(body_of(answer))
    assert [first["id"], second["id"]] == [ids[0], ids[2]]
    assert [row["source"] for row in first["feedback"]] == ["judge", "user"]
    assert first["feedback"][1]["comment"] == "line one\nline two\u2028"
    assert first["request"]["messages"] and first["response"]["parts"]
    # Bodies only where they are still kept.
    assert (second["request"], second["response"]) == (None, None)
    assert (first["user"], first["model"], first["cost_state"]) == ("u0", "echo", "final")


def test_the_export_goes_on_in_batches(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, django_assert_max_num_queries: Any
) -> None:
    monkeypatch.setattr(feedback, "BATCH", 3)
    made = [factories.task(caller.tenant) for _ in range(10)]
    for task in made:
        feedback.put(Feedback(tenant=caller.tenant, task_id=task.id, source="user", score=0.5))
    found = list(feedback.exported(caller.tenant.id))
    assert [len(lines(batch)) for batch in found] == [3, 3, 3, 1]
    assert [line["id"] for line in lines(b"".join(found))] == [str(task.id) for task in made]
    with django_assert_max_num_queries(4):
        next(feedback.exported(caller.tenant.id))


def test_the_export_is_bounded_by_time(caller: Caller, task_id: str) -> None:
    give(caller, task_id, score=1)
    made = caller.get(f"/v1/tasks/{task_id}").json()["created_at"]

    def found(query: str) -> int:
        return len(lines(body_of(caller.get(f"/v1/feedback/export?{query}"))))

    assert found("created_after=2020-01-01T00:00:00Z") == 1
    assert found(f"created_after={made}") == 1
    assert found(f"created_before={made}") == 0
    assert found("created_after=2999-01-01T00:00:00Z") == 0
    wrong = caller.get("/v1/feedback/export?after=1")
    assert (wrong.status_code, wrong.json()["param"]) == (400, "after")


def test_the_command_writes_the_same(caller: Caller, task_id: str, tmp_path: Path) -> None:
    give(caller, task_id, score=1)
    api = body_of(caller.get("/v1/feedback/export"))
    out = io.StringIO()
    call_command("export_feedback", caller.tenant.name, stdout=out)
    assert out.getvalue().encode() == api
    file = tmp_path / "out.jsonl"
    call_command("export_feedback", caller.tenant.name, "--output", str(file))
    assert file.read_bytes() == api
    out = io.StringIO()
    call_command("export_feedback", caller.tenant.name, "--after", "2999-01-01", stdout=out)
    assert out.getvalue() == ""
    with pytest.raises(CommandError, match="no tenant 'nobody'"):
        call_command("export_feedback", "nobody")
    with pytest.raises(CommandError, match="--before: give a time"):
        call_command("export_feedback", caller.tenant.name, "--before", "soon")
