"""Signatures of webhooks, as Standard Webhooks has them."""

import base64
from datetime import UTC, datetime
from uuid import UUID

import orjson

from llmtasks import webhooks
from llmtasks.models import Delivery, Step, Task

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_signature_is_that_of_the_specification() -> None:
    """The example that the libraries of Standard Webhooks are tested with."""
    id_ = "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert webhooks.signed(SECRET, id_, 1614265330, b'{"test": 2432232314}') == {
        "webhook-id": id_,
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_secret_is_base64_or_any_text() -> None:
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    assert webhooks.key_of(SECRET) == key
    assert webhooks.key_of("some words") == b"some words"
    assert webhooks.key_of("whsec_no base64!") == b"whsec_no base64!"


def test_the_waits_fit_the_promise() -> None:
    """A receiver that is away for a day is told."""
    assert sum(webhooks.WAITS_S) > 24 * 3600
    assert webhooks.AT_ONCE * webhooks.TIMEOUT_S < webhooks.TAKEN_S


def test_what_is_told_of_agents_and_workflows() -> None:
    delivery = Delivery(event="step.waiting", created_at=datetime(2026, 1, 1, tzinfo=UTC))
    task_id = UUID(int=1)
    step = Step(task_id=task_id, number=3, name="refund@1", status="approval", input={"cents": 5})
    told = orjson.loads(webhooks.body_of(delivery, step, Task(id=task_id, kind="agent")))
    assert (told["type"], told["timestamp"]) == ("step.waiting", "2026-01-01T00:00:00Z")
    assert (told["data"]["kind"], told["data"]["arguments"]) == ("agent", {"cents": 5})
    step.input = {"arguments": {"cents": 5}}
    told = orjson.loads(webhooks.body_of(delivery, step, Task(id=task_id, kind="workflow")))
    assert (told["data"]["kind"], told["data"]["arguments"]) == ("workflow", {"cents": 5})
    step.input = {"arguments": {"text": "x" * 20_001}}
    told = orjson.loads(webhooks.body_of(delivery, step, Task(id=task_id, kind="workflow")))
    assert told["data"]["arguments"] is None
