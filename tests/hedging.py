"""Routes that hedge: two accounts at the sandbox, the first of them slow."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from llmtasks import attempts
from llmtasks.attempts import Sending
from llmtasks.models import Attempt, Provider, Route, Task
from tests import corridor, factories
from tests.corridor import until
from tests.meters import put_p95

P95_MS = 60
SLOW = "slow-20000"


@pytest.fixture
def second(account: Provider, sandbox: Any) -> Provider:
    """Another account at the sandbox."""
    return factories.provider(sandbox.base_url, "second")


@pytest.fixture
def hedged(redis: Any):
    """Makes a route that hedges, to (account, model) in that order, whose first model's p95 is
    `p95_ms`."""

    def make(*candidates: tuple[Provider, str], p95_ms: float | None = P95_MS, **fields: Any):
        row = factories.route("smart", *candidates, **fields)
        Route.objects.filter(pk=row.pk).update(hedges=True)
        if p95_ms is not None:
            account, model = candidates[0]
            put_p95(redis, f"{account.name}/{model}", p95_ms)
        return row

    return make


def first_waits(monkeypatch: pytest.MonkeyPatch, condition: Callable[[Task], Any]) -> None:
    """A task's first call goes out once this holds, however long its second takes until then."""
    real = attempts.send

    def send(attempt: Sending, request: Any) -> Any:
        # Its context may count the second as well by now.
        if attempt.exchange.headers["X-Client-Request-Id"].endswith(".1"):
            until(lambda: condition(attempt.context.task))
        return (yield from real(attempt, request))

    monkeypatch.setattr(attempts, "send", send)


def has_begun(task: Task) -> bool:
    """The second call is written down."""
    return Attempt.objects.filter(task_id=task.id, number=2).exists()


def is_called(sandbox: Any) -> Callable[[Task], bool]:
    """The second call is under way, while the first one waits."""
    return lambda task: sandbox.calls(str(task.id))["under_way"] == 1


def errors_of(task: Task) -> list[str]:
    """How both calls ended, once they did: an answer hardly waits for the other's settlement."""
    until(lambda: not any(row.state == "sent" for row in corridor.attempts(task)))
    return corridor.errors_of(task)


def nobody_calls(sandbox: Any, task: Task) -> None:
    """The vendor's connections of both calls are closed, and no thread is left."""
    until(lambda: sandbox.calls(str(task.id))["under_way"] == 0)
    until(lambda: not any(t.name in ("hedge", "settle") for t in threading.enumerate()))
