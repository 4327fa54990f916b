"""The admin, through its pages: that they open, the start page, who may, how values look."""

from datetime import timedelta
from decimal import Decimal

import pytest
from django.apps import apps
from django.contrib.auth.models import User
from django.core import checks
from django.urls import reverse
from django.utils import timezone

from llmtasks.admin import cells
from llmtasks.models import Lane, Status, Worker
from tests.admin_pages import (
    MODELS,
    act,
    changelist,
    make_task,
    page,
    squeezed,
    text,
    text_of_stream,
    uuid_of,
)

pytestmark = pytest.mark.django_db


# --- every page ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_list_and_page_opens(login, everything, model):
    client = login("*")
    assert text(client.get(changelist(model)))
    # This process, too, is a worker, once it has a pulse.
    rows = apps.get_model("llmtasks", model).objects
    row = everything["worker"] if model == "worker" else rows.get()
    assert text(client.get(page(model, row.pk)))


@pytest.mark.parametrize(
    "model",
    [
        "provider",
        "route",
        "price",
        "adjustment",
        "tenant",
        "apikey",
        "limit",
        "prompt",
        "promptversion",
        "workflow",
        "workflowversion",
        "httptool",
        "mcpserver",
    ],
)
def test_every_form_opens(login, model):
    assert text(login("*").get(reverse(f"admin:llmtasks_{model}_add")))


def test_checks_ask_the_database_nothing(django_assert_num_queries):
    """They run before the first migration, too."""
    with django_assert_num_queries(0):
        checks.run_checks()


def test_users_and_groups_open(login):
    client = login("*")
    for name in ("user_changelist", "user_add", "group_changelist"):
        assert text(client.get(reverse(f"admin:auth_{name}")))


def test_no_page_asks_another_host(login, everything):
    client = login("*")
    urls = [reverse("admin:index"), changelist("task"), page("task", everything["task"].pk)]
    urls += [reverse("queues"), changelist("limit"), page("provider", everything["provider"].pk)]
    for url in urls:
        content = text(client.get(url)).replace('base_url" value="https://', "")
        for start in ('src="http', 'href="http', "url(http"):
            assert start not in content


# --- workers and the start page -----------------------------------------------------------------


def test_workers_are_alive_or_gone(login, everything):
    Worker.objects.create(role="web", host="old", pid=2, lease_until=timezone.now())
    content = squeezed(login("view_worker").get(changelist("worker")))
    assert ">\nalive\n<" in content and ">\ngone\n<" in content


def test_the_start_page_shows_what_waits_and_runs(login, everything, tenant, monkeypatch):
    from llmtasks.admin import start

    monkeypatch.setattr(start, "COUNTED", 2)
    for _ in range(3):
        make_task(tenant, lane=Lane.INTERACTIVE)
    make_task(tenant, provider="forgotten", status=Status.QUEUED, lane=Lane.BULK)
    make_task(tenant, status=Status.FAILED, error_class="Overloaded")
    make_task(tenant, status=Status.EXPIRED, error_class="DeadlineExceeded")
    make_task(
        tenant, id=uuid_of(timedelta(hours=2)), status=Status.FAILED, error_class="TooOldToTell"
    )
    response = login("*").get(reverse("admin:index"))
    content = text(response)
    rows = {row.name: row for row in response.context["backlog"]}
    assert rows["vendor"].cells["interactive"].shown_waiting == "2+"
    assert rows["vendor"].cells["default"].running == 1
    assert rows["forgotten"].cells["bulk"].queued == 1
    assert "Overloaded" in content and "DeadlineExceeded" in content
    assert "TooOldToTell" not in content
    assert "worker bulk" in content and "Pause" in content


def test_the_start_page_links_to_flower_where_there_is_one(login, settings):
    client = login()
    assert "Flower" not in text(client.get(reverse("admin:index")))
    settings.FLOWER_URL = "http://127.0.0.1:5555/"
    assert 'href="http://127.0.0.1:5555/"' in text(client.get(reverse("admin:index")))
    assert "API docs" in text(client.get(reverse("admin:index")))


def test_the_sidebar_shows_what_one_may_see(login):
    content = text(login("view_task").get(reverse("admin:index")))
    assert changelist("task") in content and changelist("apikey") not in content


# --- who may ------------------------------------------------------------------------------------

LOOK = tuple(f"view_{model}" for model in MODELS)


def test_finance_can_look_and_not_act(login, everything, steered):
    client = login(*LOOK)
    task, provider = everything["task"], everything["provider"]
    for model in MODELS:
        text(client.get(changelist(model)))
    content = text(client.get(page("task", task.pk)))
    assert 'name="verb"' not in content
    assert "Pause" not in text(client.get(reverse("admin:index")))
    assert 'value="cancel_tasks"' not in text(client.get(changelist("task")))
    steer = reverse("admin:llmtasks_task_steer")
    assert client.post(steer, {"task": str(task.pk), "verb": "cancel"}).status_code == 403
    assert not steered["cancel"]
    act(client, "cancel", [task.pk])
    assert not steered["cancel"]
    switch = reverse("admin:llmtasks_provider_switch", args=(provider.pk, "pause"))
    assert client.post(switch).status_code == 403
    for model in ("price", "adjustment", "tenant", "apikey", "provider", "route"):
        assert client.get(reverse(f"admin:llmtasks_{model}_add")).status_code == 403
    assert client.post(page("provider", provider.pk), {"is_paused": "on"}).status_code == 403
    assert text_of_stream(client.get(reverse("admin:llmtasks_attempt_export")))


def test_staff_without_permissions_see_nothing(login, everything):
    client = login()
    content = text(client.get(reverse("admin:index")))
    assert "Backlog" not in content and "vendor" not in content and "Alive" not in content
    assert client.get(changelist("task")).status_code == 403
    assert client.get(reverse("admin:llmtasks_attempt_export")).status_code == 403


def test_others_are_sent_to_the_login(client, tenant):
    for url in (reverse("admin:index"), changelist("task"), reverse("admin:llmtasks_task_steer")):
        assert client.get(url).url.startswith("/admin/login/")


def test_the_login_page_leads_to_the_start_page(client, transactional_db):
    User.objects.create_superuser("operator", password="correct horse")
    given = {"username": "operator", "password": "correct horse"}
    answer = client.post(reverse("admin:login"), given)
    assert (answer.status_code, answer["Location"]) == (302, reverse("admin:index"))


# --- how values look ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "amount, shown",
    [("0", "$0.00"), ("1234.5", "$1,234.50"), ("0.0000000001", "$0.0000000001"), ("-2", "-$2.00")],
)
def test_dollars_are_exact(amount, shown):
    assert cells.dollars(Decimal(amount)) == shown


@pytest.mark.parametrize(
    "seconds, shown",
    [(0.0123, "12 ms"), (1.26, "1.3 s"), (125, "2 min 05 s"), (7260, "2 h 01 min"), (-5, "0 ms")],
)
def test_durations(seconds, shown):
    assert cells.duration(timedelta(seconds=seconds)) == shown
