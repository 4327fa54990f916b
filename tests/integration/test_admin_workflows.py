"""Workflows in the admin: shared ones are added, a wrong declaration is told at its place."""

import json
from typing import Any

import pytest
from django.db import IntegrityError
from django.urls import reverse

from llmtasks.models import Provider, Tenant, Workflow, WorkflowVersion
from tests import factories
from tests.admin_pages import text

ADD = "/admin/llmtasks/workflowversion/add/"


def declared(said: str) -> dict[str, Any]:
    return {"do": {"kind": "prompt", "model": "echo", "text": said}}


@pytest.fixture
def shared(account: Provider) -> Workflow:
    factories.route("echo", (account, "echo"))
    factories.in_force()
    return Workflow.objects.create(name="greet")


def values(workflow: Workflow, spec: Any) -> dict[str, str]:
    return {"workflow": str(workflow.pk), "spec": json.dumps(spec), "comment": "new"}


def test_a_version_is_added_and_stays(login: Any, shared: Workflow) -> None:
    client = login("*")
    assert client.post(ADD, values(shared, declared("Hello"))).status_code == 302
    version = WorkflowVersion.objects.get()
    assert (version.number, version.spec, version.comment) == (1, declared("Hello"), "new")
    assert version.created_by.startswith("user-")
    assert "Hello" in text(client.get(f"{ADD}?workflow={shared.pk}"))
    assert client.post(ADD, values(shared, declared("Bye"))).status_code == 302
    page = reverse("admin:llmtasks_workflowversion_change", args=(version.pk,))
    shown = text(client.get(page))
    assert "Hello" in shown and "shared by all" in shown
    assert client.post(page, values(shared, declared("x"))).status_code == 403
    remove = reverse("admin:llmtasks_workflowversion_delete", args=(version.pk,))
    assert client.post(remove).status_code == 403
    assert login("view_workflowversion").get(ADD).status_code == 403
    assert "greet@2" in text(client.get("/admin/llmtasks/workflowversion/"))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"do": {"kind": "nothing"}}, "do.kind: give a block"),
        (declared("{{ steps.a.output }}"), "there is no step"),
        ({"do": {"kind": "workflow", "workflow": "greet"}}, "do.workflow"),
    ],
)
def test_a_wrong_declaration(login: Any, shared: Workflow, spec: Any, told: str) -> None:
    answer = login("*").post(ADD, values(shared, spec))
    assert answer.status_code == 200
    assert told in text(answer)
    assert not WorkflowVersion.objects.exists()


def test_one_name_once(shared: Workflow, tenant: Tenant) -> None:
    Workflow.objects.create(name="greet", tenant=tenant)
    with pytest.raises(IntegrityError):
        Workflow.objects.create(name="greet")
