"""The outbox alone: what is put together, and what happens to pieces when Redis is away."""

from typing import Any

import orjson
import pytest
import redis
from uuid_utils.compat import uuid7

from llmtasks import events
from llmtasks.events import Outbox, Unsent


class Sent:
    """In place of Redis: what arrived, or an outage."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.is_away = False

    def __call__(self, batch: list[Unsent]) -> None:
        if self.is_away:
            raise redis.ConnectionError("away")
        self.events += [(unsent.name, orjson.loads(unsent.json())) for unsent in batch]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    found = Sent()
    monkeypatch.setattr(events, "send", found)
    return found


@pytest.fixture
def outbox() -> Outbox:
    made = Outbox()
    made.thread = object()  # type: ignore[assignment] # flushed by hand
    return made


TASK = uuid7()


def write(outbox: Outbox, text: str, attempt: int = 1) -> None:
    outbox.grow(TASK, "delta", {"attempt": attempt}, "text", text)


def test_pieces_that_wait_are_put_together_and_keep_their_place(outbox: Outbox, sent: Sent):
    outbox.put(TASK, "state", {"status": "running"})
    write(outbox, "a")
    write(outbox, "b")
    outbox.put(TASK, "done", {"status": "succeeded"})
    outbox.flush()
    assert sent.events == [
        ("state", {"status": "running"}),
        ("delta", {"attempt": 1, "text": "ab"}),
        ("done", {"status": "succeeded"}),
    ]


def test_another_attempt_is_another_event(outbox: Outbox, sent: Sent):
    write(outbox, "a", attempt=1)
    write(outbox, "b", attempt=2)
    outbox.flush()
    assert [data["attempt"] for _, data in sent.events] == [1, 2]


def test_a_tool_calls_arguments_grow_by_its_index(outbox: Outbox, sent: Sent):
    def piece(index: int, text: str, call_id: str | None = None) -> None:
        data = {"attempt": 1, "index": index, "id": call_id, "name": None}
        outbox.grow(TASK, "tool_call", data, "arguments", text)

    piece(0, "{", "c1")
    piece(0, "}")
    piece(1, "{}", "c2")
    outbox.flush()
    assert [(data["id"], data["arguments"]) for _, data in sent.events] == [
        ("c1", "{}"),
        ("c2", "{}"),
    ]


def test_after_a_hole_the_pieces_end_with_a_reset(outbox: Outbox, sent: Sent):
    sent.is_away = True
    write(outbox, "lost")
    outbox.flush()
    sent.is_away, outbox.away_until = False, 0.0
    write(outbox, "dropped")
    write(outbox, "dropped too")
    outbox.flush()
    assert sent.events == [("reset", {"attempt": 1, "reason": "lost"})]
    outbox.put(TASK, "reset", {"attempt": 2, "reason": "retry"})
    write(outbox, "whole again", attempt=2)
    outbox.flush()
    assert sent.events[-1] == ("delta", {"attempt": 2, "text": "whole again"})


def test_nobody_waits_for_an_outage_twice(
    outbox: Outbox, sent: Sent, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events, "SKIP_S", 3600.0)
    sent.is_away = True
    write(outbox, "a")
    outbox.flush()
    sent.is_away = False
    write(outbox, "b")
    outbox.flush()
    assert sent.events == []


def test_the_outbox_is_bounded(outbox: Outbox, sent: Sent, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events, "MOST_UNSENT", 3)
    for number in range(5):
        outbox.put(TASK, "state", {"number": number})
    assert len(outbox.unsent) <= 3
