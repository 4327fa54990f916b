"""The way in: what is refused, what a key stands for, what is written."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from llmtasks import bodies, execute, pulse, queues, stores, submit
from llmtasks.errors import ApiError, Conflict, InvalidInput, KeyReused, NotFound, UnknownModel
from llmtasks.models import IdempotencyKey, OnUnknown, Status, Task, TaskPayload, Tenant
from llmtasks.submit import Idempotency
from providers.types import Image, Message, Request
from tests import factories

pytestmark = pytest.mark.usefixtures("account")


@pytest.fixture
def tenant(account) -> Tenant:
    factories.route("echo", (account, "echo"))
    factories.route("embed", (account, "embed"), kind="embedding")
    return factories.tenant()


def key(name: str = "k", body: str = "h") -> Idempotency:
    return Idempotency(endpoint="/v1/tasks", key=name, body_hash=body)


def queue_one(tenant: Tenant, **fields: Any) -> Task | ApiError:
    [result] = submit.queued([factories.work(tenant, **fields)])
    return result


def accepted(tenant: Tenant, **fields: Any) -> Task:
    result = queue_one(tenant, **fields)
    assert isinstance(result, Task), result
    return result


# --- what is written ------------------------------------------------------------------------------


def test_a_queued_task_is_a_row_with_its_body(tenant):
    task = accepted(tenant, text="hi", metadata={"feature": "x"}, user="u_1", request_id="r")
    row = Task.objects.get()
    assert (row.id, row.status, row.mode, row.lane) == (task.id, "waiting", "queued", "default")
    assert (row.route, row.provider, row.seq, row.fence) == ("echo", "sandbox", 0, 0)
    assert (row.metadata, row.user, row.request_id) == ({"feature": "x"}, "u_1", "r")
    assert row.deadline - row.not_before == timedelta(days=1)
    stored = bodies.load_request(row.kind, TaskPayload.objects.get().request)
    assert stored == factories.request("echo", "hi")


def test_an_inline_task_is_not_written_yet(tenant):
    task = submit.inline(factories.work(tenant))
    assert task._state.adding
    assert task.status == Status.RUNNING
    assert timedelta(seconds=590) < task.deadline - pulse.now() <= timedelta(seconds=600)
    assert not Task.objects.exists()


@pytest.mark.parametrize(
    ("fields", "streams"),
    [
        ({}, True),
        ({"lane": "bulk"}, False),
        ({"lane": "bulk", "stream": True}, True),
        ({"stream": False}, False),
    ],
)
def test_who_is_not_watched_publishes_no_deltas(tenant, fields, streams):
    assert accepted(tenant, **fields).streams is streams


def test_embeddings_have_no_deltas(tenant):
    [task] = submit.queued([factories.embedding(tenant, stream=True)])
    assert isinstance(task, Task)
    assert task.streams is False


def test_run_at_moves_the_release_and_the_deadline(tenant):
    at = timezone.now() + timedelta(hours=2)
    task = accepted(tenant, run_at=at, deadline_s=60)
    assert (task.not_before, task.deadline) == (at, at + timedelta(seconds=60))
    past = accepted(tenant, run_at=timezone.now() - timedelta(days=1), deadline_s=60)
    assert past.deadline > timezone.now()


def test_the_first_provider_that_is_not_paused_gets_it(tenant, account):
    other = factories.provider(name="second")
    factories.route("two", (account, "echo"), (other, "echo"))
    account.is_paused = True
    account.save()
    factories.in_force()
    assert accepted(tenant, model="two").provider == "second"
    # Where all are paused it waits for the first.
    assert accepted(tenant, model="echo").provider == "sandbox"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "nothing"}, "model"),
        ({"model": "embed"}, "model"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"deadline_s": 1e9}, "deadline_s"),
    ],
)
def test_bad_work_names_its_field(tenant, fields, param):
    for submitted in (lambda w: submit.inline(w), lambda w: raised(submit.queued([w])[0])):
        with pytest.raises(InvalidInput) as error:
            submitted(factories.work(tenant, **fields))
        assert error.value.param == param
        assert error.value.message
    assert not Task.objects.exists()


def raised(result: Any) -> Any:
    if isinstance(result, ApiError):
        raise result
    return result


def test_run_at_is_for_queued_work_and_within_a_year(tenant):
    soon = timezone.now() + timedelta(hours=1)
    with pytest.raises(InvalidInput, match="run_at"):
        submit.inline(factories.work(tenant, run_at=soon))
    far = queue_one(tenant, run_at=soon + timedelta(days=400))
    assert isinstance(far, InvalidInput)
    assert far.param == "run_at"


def test_what_no_provider_of_the_route_supports_is_refused(tenant, sandbox):
    other = factories.provider(sandbox.base_url, "claude", adapter="anthropic")
    factories.route("claude", (other, "claude-echo"))
    factories.route("vectors", (other, "claude-echo"), kind="embedding")
    factories.in_force()
    logprobs = factories.request("claude", logprobs=True)
    result = queue_one(tenant, request=logprobs)
    assert isinstance(result, InvalidInput)
    assert result.param == "logprobs"
    [embedding] = submit.queued([factories.embedding(tenant, "vectors")])
    assert isinstance(embedding, InvalidInput)


def test_a_route_that_has_no_candidates_is_refused(tenant):
    factories.route("empty")
    factories.in_force()
    assert isinstance(queue_one(tenant, model="empty"), InvalidInput)


def test_of_many_the_valid_are_saved(tenant):
    good, bad = factories.work(tenant), factories.work(tenant, "nothing")
    results = submit.queued([good, bad, good])
    assert [type(result) for result in results] == [Task, UnknownModel, Task]
    assert Task.objects.count() == TaskPayload.objects.count() == 2


def test_a_thousand_at_once(tenant):
    results = submit.queued([factories.work(tenant, text=str(n)) for n in range(1000)])
    assert len({task.id for task in results}) == Task.objects.count() == 1000


# --- idempotency ----------------------------------------------------------------------------------


def test_the_same_key_and_body_give_the_same_task(tenant):
    first = accepted(tenant, idempotency=key())
    again = accepted(tenant, idempotency=key())
    assert (again.id, Task.objects.count()) == (first.id, 1)
    assert accepted(tenant, idempotency=key("other")).id != first.id
    assert accepted(factories.tenant(), idempotency=key()).id != first.id


def test_another_body_is_refused(tenant):
    accepted(tenant, idempotency=key())
    assert isinstance(queue_one(tenant, idempotency=key(body="else")), KeyReused)
    assert Task.objects.count() == 1


def test_within_one_request_too_a_key_stands_for_one_task(tenant):
    works = [factories.work(tenant, idempotency=key()) for _ in range(3)]
    works.append(factories.work(tenant, idempotency=key(body="else")))
    *same, other = submit.queued(works)
    assert len({task.id for task in same}) == Task.objects.count() == 1
    assert isinstance(other, KeyReused)


def test_an_inline_task_that_runs_keeps_its_key(tenant):
    work = factories.work(tenant, idempotency=key())
    task = submit.inline(work)
    execute.run(task, work.request)
    found = submit.replay(tenant.id, key())
    assert found is not None
    assert (found.id, found.status) == (task.id, "succeeded")
    Task.objects.update(status="running")
    with pytest.raises(Conflict) as error:
        submit.replay(tenant.id, key())
    assert error.value.retry_after


def test_a_key_that_expired_stands_for_nothing(tenant):
    first = accepted(tenant, idempotency=key())
    IdempotencyKey.objects.update(expires_at=pulse.now() - timedelta(seconds=1))
    again = accepted(tenant, idempotency=key(body="else"))
    assert again.id != first.id
    assert IdempotencyKey.objects.get().task_id == again.id


def test_a_key_whose_task_was_deleted_stands_for_nothing(tenant):
    accepted(tenant, idempotency=key())
    TaskPayload.objects.all().delete()
    Task.objects.all().delete()
    assert accepted(tenant, idempotency=key()).id == Task.objects.get().id


def test_of_many_requests_at_once_one_makes_the_task(tenant):
    results: list[Any] = []
    gate = threading.Barrier(8)

    def run() -> None:
        gate.wait()
        results.append(queue_one(tenant, idempotency=key()))
        stores.release()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({task.id for task in results}) == 1
    assert Task.objects.count() == IdempotencyKey.objects.count() == 1


def test_a_key_that_is_taken_again_and_again_is_a_conflict(tenant, monkeypatch):
    accepted(tenant, idempotency=key())
    monkeypatch.setattr(submit, "replay", lambda *_: None)
    with pytest.raises(Conflict):
        submit.queued([factories.work(tenant, idempotency=key())])
    assert Task.objects.count() == 1


def test_of_many_inline_requests_at_once_one_runs(tenant, account, sandbox):
    factories.route("slow", (account, "slow-300"))
    factories.in_force()
    results: list[Any] = []
    gate = threading.Barrier(6)

    def run() -> None:
        work = factories.work(tenant, "slow", idempotency=key())
        try:
            gate.wait()
            submit.replay(tenant.id, key())
            results.append(execute.run(submit.inline(work), work.request).task)
        except Conflict as error:
            results.append(error)
        finally:
            stores.release()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [r for r in results if isinstance(r, Task)]
    assert (len(done), len(results)) == (1, 6)
    assert sandbox.calls(str(done[0].id))["calls"] == 1
    assert Task.objects.count() == 1


# --- again ----------------------------------------------------------------------------------------


def test_a_retry_is_a_new_task_with_the_same_body(tenant):
    task = accepted(
        tenant, text="x", metadata={"a": 1}, user="u", lane="bulk", on_unknown=OnUnknown.FAIL
    )
    with pytest.raises(Conflict, match="waiting"):
        submit.retry(task.id)
    Task.objects.update(status="failed")
    again = submit.retry(task.id, tenant.id)
    assert (again.retry_of, again.status, again.lane) == (task.id, "waiting", "bulk")
    assert (again.metadata, again.user, again.on_unknown) == ({"a": 1}, "u", "fail")
    stored = TaskPayload.objects.get(task=again).request
    assert stored == TaskPayload.objects.get(task=task).request


def test_a_retry_needs_a_task_and_its_body(tenant):
    task = accepted(tenant)
    Task.objects.update(status="failed")
    with pytest.raises(NotFound):
        submit.retry(task.id, factories.tenant().id)
    TaskPayload.objects.all().delete()
    with pytest.raises(Conflict, match="deleted"):
        submit.retry(task.id)


def test_a_retry_of_what_can_no_longer_run_says_so(tenant):
    task = accepted(tenant)
    Task.objects.update(status="failed", route="gone")
    request = bodies.dump_request("chat", factories.request("gone"))
    TaskPayload.objects.update(request=bodies.orjson.loads(request))
    with pytest.raises(InvalidInput, match="gone"):
        submit.retry(task.id)


# --- the dispatcher is woken ----------------------------------------------------------------------


def test_queued_work_wakes_the_dispatcher_and_inline_work_does_not(tenant, monkeypatch):
    # Channels are shared by all databases of a server, and so by all test processes.
    monkeypatch.setattr(queues, "WAKE_CHANNEL", f"wake-{tenant.id}")
    monkeypatch.setattr(queues, "WAKE_S", 5.0)
    with stores.redis_client().pubsub(ignore_subscribe_messages=True) as ears:
        ears.subscribe(queues.WAKE_CHANNEL)
        ears.get_message(timeout=1)
        submit.inline(factories.work(tenant))
        queue_one(tenant, model="nothing")
        assert ears.get_message(timeout=0.05) is None
        accepted(tenant)
        assert ears.get_message(timeout=5) is not None


def test_an_image_is_work_like_any_other(tenant):
    parts = (Image(url="data:image/png;base64,AAAA"),)
    body = Request(model="echo", messages=(Message(role="user", parts=parts),))
    task = accepted(tenant, request=body)
    assert bodies.load_request("chat", TaskPayload.objects.get(task=task).request) == body
