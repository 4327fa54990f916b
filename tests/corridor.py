"""Work through the whole corridor in the test's own process: inline, streamed, queued."""

import contextlib
import threading
import time
from typing import Any

import pytest
from django.db import OperationalError, connection

from llmtasks import bodies, dispatch, events, execute, ledger, pulse, stores, submit
from llmtasks.execute import Outcome
from llmtasks.models import Attempt, Provider, Task, TaskPayload, Tenant
from llmtasks.turns import Turns
from providers.sandbox import Sandbox
from providers.types import TextDelta
from tests import factories

FORMATS = {"compatible": "", "anthropic": "claude-"}
LANES = ("interactive", "default", "bulk")


@pytest.fixture
def short_waits(monkeypatch):
    """Backoff in hundredths of a second: its length is `test_retry`'s business."""
    monkeypatch.setattr("llmtasks.retry.BACKOFF_S", 0.02)


@pytest.fixture(params=FORMATS)
def vendor(request, account: Provider, sandbox: Sandbox) -> tuple[Provider, str]:
    """An account in each wire format, and what a model's name begins with there."""
    if request.param == "compatible":
        return account, ""
    other = factories.provider(sandbox.base_url, "sandbox-anthropic", adapter="anthropic")
    return other, FORMATS[request.param]


# --- three doors, one corridor --------------------------------------------------------------------


def inline(tenant: Tenant, model: str, text: str = "hello", **fields: Any) -> Outcome:
    work = factories.work(tenant, model, text, **fields)
    return execute.run(submit.inline(work), work.request)


def streamed(tenant: Tenant, model: str, text: str = "hello", **fields: Any) -> Outcome:
    """The outcome of a streamed call; its deltas are checked against the answer."""
    work = factories.work(tenant, model, text, **fields)
    *deltas, outcome = execute.stream(submit.inline(work), work.request)
    if outcome.response is not None:
        told = "".join(d.text for d in deltas if isinstance(d, TextDelta))
        assert told == outcome.response.text
    return outcome


def queue(tenant: Tenant, model: str, text: str = "hello", **fields: Any) -> Task:
    [task] = submit.queued([factories.work(tenant, model, text, **fields)])
    assert isinstance(task, Task), task
    return task


def release() -> list[dispatch.Hint]:
    """One round of the dispatcher with room for all providers, without a broker."""
    rooms = {(p.name, lane): 50 for p in Provider.objects.all() for lane in LANES}
    return dispatch.pick(rooms, Turns())


def work_off(within_s: float = 20.0) -> None:
    """Release and run what waits until nothing does: the dispatcher and a worker in one."""
    end = time.monotonic() + within_s
    while Task.objects.filter(status__in=("waiting", "queued")).exists():
        for hint in release():
            execute.run_queued(hint.task_id, hint.seq)
        assert time.monotonic() < end, list(Task.objects.values("status", "error_class"))
        time.sleep(0.005)


def queued(tenant: Tenant, model: str, text: str = "hello", **fields: Any) -> Outcome:
    task = queue(tenant, model, text, **fields)
    work_off()
    task.refresh_from_db()
    stored = TaskPayload.objects.get(task=task).response
    return Outcome(task, None if stored is None else bodies.load_response(task.kind, stored))


DOORS = {"inline": inline, "streamed": streamed, "queued": queued}


@pytest.fixture(params=DOORS)
def door(request):
    return DOORS[request.param]


def attempts(task: Task) -> list[Attempt]:
    return list(Attempt.objects.filter(task_id=task.id).order_by("number"))


def errors_of(task: Task) -> list[str]:
    return [row.error_class for row in attempts(task)]


def check_ledger(task: Task) -> None:
    """What holds for every task that ended: its money is the sum over its attempts."""
    row, rows = Task.objects.get(id=task.id), attempts(task)
    assert row.attempts == len(rows)
    assert all(a.state == "settled" and a.finished_at for a in rows)
    if row.cost_state not in ("", "unpriced"):
        assert row.cost == sum(a.cost for a in rows)
    assert row.output_tokens == sum(a.output_tokens for a in rows)
    assert row.input_tokens == sum(a.input_tokens for a in rows)
    assert (row.finished_at is not None, row.owner_id) == (True, None)


@contextlib.contextmanager
def in_thread(function, *args: Any):
    """Run it beside the block; its end is waited for."""

    def run() -> None:
        try:
            function(*args)
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(30)
    assert not thread.is_alive()


def until(condition, within_s: float = 10.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def sent(**where: Any) -> Attempt | None:
    """An attempt of this process whose request went out; its row is there before that."""
    row = Attempt.objects.filter(state="sent", **where).first()
    contexts = [call.drop.__self__ for call in pulse.start().under_way()]
    went_out = any(context.exchange and context.exchange.is_sent for context in contexts)
    return row if went_out else None


def told(task: Task) -> list[tuple[str, dict[str, Any]]]:
    """What whoever watches an ended task is told, once all of it was sent."""

    def until_done() -> list[tuple[str, dict[str, Any]]] | None:
        entries = stores.redis_client().xrange(events.stream_of(task.id))
        found = [(e[b"n"].decode(), bodies.orjson.loads(e[b"d"])) for _, e in entries]
        return found if any(name == "done" for name, _ in found) else None

    return until(until_done)


@pytest.fixture
def lose_statement(monkeypatch):
    """Makes the next statements that contain a text fail as if the connection broke, before they
    are sent or (`after`) once they were committed."""
    real = stores.fetch
    losing: list[tuple[str, bool]] = []

    def fetch(sql: str, params: Any = (), **options: Any) -> Any:
        hit = next((item for item in losing if item[0] in sql), None)
        if hit is None:
            return real(sql, params, **options)
        losing.remove(hit)
        if hit[1]:
            real(sql, params, **options)
        raise OperationalError("the connection broke")

    monkeypatch.setattr(ledger, "fetch", fetch)
    monkeypatch.setattr("llmtasks.attempts.SETTLE_AGAIN_S", 0.05)
    return lambda text, times=1, after=False: losing.extend([(text, after)] * times)
