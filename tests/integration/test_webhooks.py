"""A step that waits for a person is told to its tenant's URL, signed, until it is taken."""

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import orjson
import pytest
from django.db import transaction
from django.utils import timezone

from llmtasks import steps, submit, webhooks
from llmtasks.bodies import AgentRequest
from llmtasks.models import Delivery, Kind, Provider, Status, Step, Task, Tenant
from llmtasks.tools import registry as tools
from llmtasks.tools.registry import of_function
from providers import http
from tests import factories
from tests.admin_pages import changelist, page
from tests.apiserver import SECRET, Api, verified
from tests.integration.working import work_off

State = Delivery.State


@pytest.fixture(autouse=True)
def toolbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    box = tools.Registry()
    monkeypatch.setattr(tools.registry, "tools", box.tools)
    box.add(of_function(lambda: "gone", name="delete", needs_approval=True))
    monkeypatch.setenv("HOOK", SECRET)
    yield
    http.close_idle()


@pytest.fixture
def api(settings: Any) -> Iterator[Api]:
    settings.PRIVATE_NETWORKS = [ip_network("127.0.0.0/8")]
    with Api() as server:
        yield server


@pytest.fixture
def tenant(account: Provider, api: Api) -> Tenant:
    factories.route("script", (account, "script"))
    url = f"{api.base_url}/orders/1"
    return factories.tenant(webhook_url=url, webhook_secret="env:HOOK")


def waiting(tenant: Tenant) -> Task:
    """An agent that asks for leave to delete."""
    script = orjson.dumps([[{"name": "delete", "arguments": {}}]]).decode()
    request = AgentRequest(chat=factories.request("script", script), tools=("delete",))
    work = submit.Work(
        tenant_id=tenant.id, key_id=None, kind=Kind.AGENT, request=request, user="u_1"
    )
    [task] = submit.queued([work])
    assert isinstance(task, Task)
    work_off()
    task.refresh_from_db()
    assert task.status == Status.BLOCKED
    return task


def send_due() -> list[Delivery]:
    Delivery.objects.filter(state=State.PENDING).update(due_at=timezone.now())
    for ids in webhooks.take().values():
        for id_ in ids:
            webhooks.deliver(id_)
    return list(Delivery.objects.order_by("id"))


def test_a_person_is_asked(tenant: Tenant, api: Api) -> None:
    task = waiting(tenant)
    [row] = send_due()
    assert (row.state, row.tries, row.http_status, row.error) == (State.DELIVERED, 1, 200, "")
    [(method, path, headers, body)] = api.seen
    assert (method, path, headers["webhook-id"]) == ("POST", "/orders/1", str(row.id))
    assert verified(headers, body) and not verified(headers, body + b" ")
    event = orjson.loads(body)
    assert event["type"] == "step.waiting"
    assert event["data"] == {
        "task": str(task.id), "kind": "agent", "step": 1, "name": "delete@1",
        "status": "approval", "arguments": {}, "user": "u_1", "metadata": {},
        "decide": f"/v1/tasks/{task.id}/decide",
    }  # fmt: skip
    assert send_due()[0].tries == 1 and len(api.seen) == 1


def test_a_receiver_that_fails_gets_the_same_again(
    tenant: Tenant, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting(tenant)
    monkeypatch.setattr(webhooks, "WAITS_S", (60, 60))
    api.first = [500, 302]
    began = timezone.now()
    [row] = send_due()
    assert (row.state, row.http_status) == (State.PENDING, 500)
    assert row.due_at > began + timedelta(seconds=webhooks.WAITS_S[0] * 0.9)
    assert webhooks.take() == {}
    send_due()
    [row] = send_due()
    assert (row.state, row.tries) == (State.DELIVERED, 3)
    assert len({(headers["webhook-id"], body) for _, _, headers, body in api.seen}) == 1
    assert all(verified(headers, body) for _, _, headers, body in api.seen)


def test_it_is_given_up_and_can_be_sent_again(tenant: Tenant, api: Api, login: Any) -> None:
    waiting(tenant)
    Delivery.objects.update(tries=len(webhooks.WAITS_S))
    api.first = [404]
    [row] = send_due()
    assert (row.state, row.error) == (State.FAILED, "the receiver answered with status 404")
    values = {"action": "send_again", "_selected_action": [str(row.pk)], "index": "0"}
    login("view_delivery").post(changelist("delivery"), values)
    assert send_due()[0].state == State.FAILED
    login("view_delivery", "change_delivery").post(changelist("delivery"), values)
    assert send_due()[0].state == State.DELIVERED


def test_what_was_decided_meanwhile_is_told_no_more(tenant: Tenant, api: Api) -> None:
    task = waiting(tenant)
    assert steps.decide(steps.of(task.id)[1].id, tenant.id, run=True, by="ann", comment="")
    assert send_due()[0].state == State.DROPPED
    assert api.seen == []


def test_an_interrupted_call_is_told_too(tenant: Tenant) -> None:
    task = waiting(tenant)
    Delivery.objects.all().delete()
    Step.objects.filter(task_id=task.id, number=1).update(status="running")
    Task.objects.filter(id=task.id).update(status="waiting")
    work_off()
    assert steps.of(task.id)[1].status == "unknown"
    assert Delivery.objects.get().state == State.PENDING


def test_a_tenant_without_a_url_is_told_nothing(tenant: Tenant) -> None:
    Tenant.objects.update(webhook_url="")
    waiting(tenant)
    assert not Delivery.objects.exists()


def test_the_outbox_is_of_the_same_transaction(tenant: Tenant) -> None:
    row = Step(task_id=tenant.id, tenant=tenant, number=1, kind="tool", status="approval")
    with pytest.raises(RuntimeError), transaction.atomic():
        webhooks.announce([row])
        raise RuntimeError
    assert not Delivery.objects.exists()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"webhook_secret": "env:NO_SUCH_SECRET"}, "env:NO_SUCH_SECRET leads to no secret"),
        ({"webhook_url": "http://127.0.0.1:9/"}, "no connection to 127.0.0.1:9"),
    ],
)
def test_what_keeps_it_from_being_sent(tenant: Tenant, change: Any, error: str) -> None:
    waiting(tenant)
    Tenant.objects.update(**change)
    [row] = send_due()
    assert row.state == State.PENDING and error in row.error
    assert SECRET not in str(Delivery.objects.values().get())


def test_private_networks_are_refused(tenant: Tenant, api: Api, settings: Any) -> None:
    waiting(tenant)
    settings.PRIVATE_NETWORKS = []
    [row] = send_due()
    assert "in a network that may not be reached" in row.error
    assert api.seen == []


def test_two_senders_take_a_delivery_once(tenant: Tenant) -> None:
    waiting(tenant)
    assert len(webhooks.take([tenant.id])) == 0
    assert len(webhooks.take()) == 1
    assert webhooks.take() == {}
    # Whoever took it died: it is due again.
    Delivery.objects.update(due_at=timezone.now() - timedelta(seconds=1))
    assert len(webhooks.take()) == 1
    assert Delivery.objects.get().tries == 2


def test_the_dispatchers_thread_sends(
    tenant: Tenant, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "POLL_S", 0.02)
    waiting(tenant)
    stopped = threading.Event()
    sender = webhooks.Sender(stopped)
    sender.start()
    end = time.monotonic() + 20
    while Delivery.objects.get().state != State.DELIVERED:
        assert time.monotonic() < end
        time.sleep(0.02)
    stopped.set()
    sender.join(10)
    sender.pool.shutdown()
    assert len(api.seen) == 1


def test_the_admin_wants_a_secret_by_reference(tenant: Tenant, login: Any) -> None:
    client = login("*")
    values = {"name": "acme", "is_active": "on", "weight": "1", "tools": "*"}
    for wrong in (
        {"webhook_url": "https://x.test/hook"},
        {"webhook_url": "https://x.test/hook", "webhook_secret": SECRET},
        {"webhook_url": "https://u:p@x.test/hook", "webhook_secret": "env:HOOK"},
    ):
        assert client.post(page("tenant", tenant.pk), values | wrong).status_code == 200
    right = {"webhook_url": "https://x.test/hook", "webhook_secret": "env:HOOK"}
    assert client.post(page("tenant", tenant.pk), values | right).status_code == 302
