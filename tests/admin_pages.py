"""What the tests of the admin share: who logs in, rows to look at, pages as text."""

from datetime import timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from django.contrib.auth.models import Permission, User
from django.urls import reverse
from django.utils import timezone

from llmtasks import prompts
from llmtasks.admin import lists, steering
from llmtasks.models import (
    Adjustment,
    ApiKey,
    Attempt,
    CostState,
    Delivery,
    Feedback,
    HttpTool,
    Kind,
    Limit,
    McpServer,
    McpTool,
    Mode,
    Price,
    Provider,
    ProviderEvent,
    ProviderModel,
    Route,
    RouteCandidate,
    Status,
    Task,
    Tenant,
    Worker,
    Workflow,
    WorkflowVersion,
)

EVIL = "<script>alert(1)</script>"

AMOUNTS = ("input", "cached_input", "cache_write_5m", "cache_write_1h", "output", "reasoning")

MODELS = (
    "task", "attempt", "worker", "provider", "route", "price", "adjustment", "tenant", "apikey",
    "providermodel", "limit", "providerevent", "prompt", "promptversion", "feedback",
    "httptool", "mcpserver", "mcptool", "delivery", "workflow", "workflowversion",
)  # fmt: skip


@pytest.fixture
def tenant() -> Tenant:
    return Tenant.objects.create(name="acme")


@pytest.fixture
def provider() -> Provider:
    return Provider.objects.create(
        name="vendor", adapter="compatible", base_url="https://api.example.com/v1"
    )


@pytest.fixture
def login(client):
    """A client that may do what the named permissions say; `*` is everything."""

    def as_user(*permissions: str):
        user = User.objects.create_user(f"user-{User.objects.count()}", is_staff=True)
        if permissions == ("*",):
            user.is_superuser = True
            user.save()
        else:
            user.user_permissions.set(Permission.objects.get(codename=name) for name in permissions)
        client.force_login(user)
        return client

    return as_user


@pytest.fixture
def everything(tenant, provider):
    """A row in every table."""
    key, _ = ApiKey.issue(tenant, "backend")
    key.save()
    model = ProviderModel.objects.create(provider=provider, name="m-1")
    route = Route.objects.create(name="smart")
    RouteCandidate.objects.create(route=route, model=model)
    price = Price.objects.create(family="vendor", model="m-1", **dict.fromkeys(AMOUNTS, 1))
    worker = Worker.objects.create(
        role="worker", lane="bulk", host="h", pid=1, queues=["vendor.bulk"],
        lease_until=timezone.now() + timedelta(seconds=9),
    )  # fmt: skip
    task = make_task(tenant, key=key, owner_id=worker.pk, status=Status.RUNNING)
    attempt = make_attempt(task, price=price, cost=Decimal("0.5"), cost_state=CostState.FINAL)
    Adjustment.objects.create(tenant=tenant, attempt=attempt, amount=-1, reason="r")
    Limit.objects.create(provider=provider, unit="requests", window="minute", amount=60)
    ProviderEvent.objects.create(provider="vendor", event="refused")
    said = [{"role": "user", "content": "Hello"}]
    version, _ = prompts.add_version(tenant.pk, "greet", messages=said, labels=["production"])
    promptversion, prompt = version, version.prompt
    feedback = Feedback.objects.create(tenant=tenant, task_id=task.pk, source="user", score=1)
    Delivery.objects.create(tenant=tenant, event="e", task_id=task.pk, step_id=task.pk)
    workflow = Workflow.objects.create(name="review")
    workflowversion = WorkflowVersion.objects.create(workflow=workflow, number=1, spec={})
    server = McpServer.objects.create(name="mcp", url="https://mcp.example.com")
    McpTool.objects.create(server=server, name="find", state="on", offered_hash="0")
    HttpTool.objects.create(
        name="find", operation_id="find", base_url="https://api.example.com", document={}
    )
    return locals()


@pytest.fixture
def steered(monkeypatch):
    """The tasks that were cancelled and retried, by a corridor that does nothing else."""
    seen = {"cancel": [], "retry": []}

    def cancel(task_id: UUID) -> Task:
        seen["cancel"].append(task_id)
        Task.objects.filter(pk=task_id).update(status=Status.CANCELLED)
        return Task.objects.get(pk=task_id)

    def retry(task_id: UUID) -> Task:
        if Task.objects.get(pk=task_id).route == "gone":
            raise steering.ApiError("its request was deleted")
        seen["retry"].append(task_id)
        old = Task.objects.get(pk=task_id)
        return make_task(old.tenant, retry_of=task_id, status=Status.FAILED)

    monkeypatch.setattr(steering.execute, "cancel", cancel)
    monkeypatch.setattr(steering.submit, "retry", retry)
    return seen


def make_task(tenant: Tenant, **values) -> Task:
    given = {
        "kind": Kind.CHAT,
        "mode": Mode.QUEUED,
        "route": "smart",
        "provider": "vendor",
        "deadline": timezone.now() + timedelta(hours=1),
        **values,
    }
    return Task.objects.create(tenant=tenant, **given)


def make_attempt(task: Task, **values) -> Attempt:
    given = {
        "number": Attempt.objects.filter(task=task).count() + 1,
        "provider": "vendor",
        "model": "m-1",
        "state": Attempt.State.SETTLED,
        **values,
    }
    return Attempt.objects.create(task=task, tenant_id=task.tenant_id, **given)


def changelist(model: str, **query: str) -> str:
    return reverse(f"admin:llmtasks_{model}_changelist", query=query)


def page(model: str, pk: object) -> str:
    return reverse(f"admin:llmtasks_{model}_change", args=(pk,))


def text(response) -> str:
    assert response.status_code == 200, response
    return response.content.decode()


def uuid_of(age: timedelta) -> UUID:
    return UUID(int=lists.first_id(age).int + 7)


def shown_tasks(client, **query: str) -> set[UUID]:
    response = client.get(changelist("task", **query))
    assert response.status_code == 200
    return {task.pk for task in response.context["cl"].result_list}


def act(client, action: str, ids=(), *, across: bool = False, **query: str):
    """Run a list's action, up to its confirmation."""
    values = {
        "action": f"{action}_tasks",
        "_selected_action": [str(pk) for pk in ids] or [str(Task.objects.first().pk)],
        "select_across": "1" if across else "0",
        "index": "0",
    }
    return client.post(changelist("task", **query), values)


def text_of_stream(response) -> str:
    return b"".join(response.streaming_content).decode()


def squeezed(response) -> str:
    return "\n".join(line.strip() for line in text(response).splitlines() if line.strip())
