"""Cancelling and retrying from the admin."""

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.urls import reverse
from uuid_utils.compat import uuid7

from llmtasks.admin import lists, steering
from llmtasks.models import (
    Lane,
    Status,
    Tenant,
)
from tests.admin_pages import act, changelist, make_task, page, text

pytestmark = pytest.mark.django_db


# --- steering -----------------------------------------------------------------------------------


def confirm(client, response) -> list:
    """Send each page's form until the job is over; the pages."""
    pages = []
    while response.status_code == 200:
        token = response.context["job"].token
        response = client.post(reverse("admin:llmtasks_task_steer"), {"job": token})
        pages.append(response)
    return pages


def test_ticked_tasks_are_cancelled_once_confirmed(login, tenant, steered):
    client = login("view_task", "change_task")
    wanted, other = make_task(tenant), make_task(tenant)
    done = make_task(tenant, status=Status.SUCCEEDED)
    response = act(client, "cancel", [wanted.pk, done.pk])
    assert "Cancel 1 tasks?" in text(response)
    assert not steered["cancel"]
    confirm(client, response)
    assert steered["cancel"] == [wanted.pk]
    entry = LogEntry.objects.get()
    assert (entry.object_id, entry.change_message) == (str(wanted.pk), "Cancelled.")
    assert entry.user == User.objects.get()
    assert other.pk not in steered["cancel"]


def test_a_whole_filter_is_retried_in_batches(login, tenant, steered, monkeypatch):
    monkeypatch.setattr(steering, "BATCH", 4)
    client = login("view_task", "change_task")
    failed = {make_task(tenant, status=Status.FAILED).pk for _ in range(9)}
    failed |= {make_task(tenant, status=Status.EXPIRED).pk}
    make_task(tenant, status=Status.SUCCEEDED)
    elsewhere = make_task(Tenant.objects.create(name="other"), status=Status.FAILED)
    response = act(client, "retry", across=True, tenant=str(tenant.pk))
    assert "Retry 10 tasks?" in text(response)
    pages = confirm(client, response)
    assert sorted(steered["retry"]) == sorted(failed), "each once, and none of the new ones"
    assert elsewhere.pk not in steered["retry"]
    assert len(pages) == 5
    assert "4 of 10 tasks retried" in pages[0].content.decode()
    assert pages[-1].url == changelist("task", tenant=str(tenant.pk))
    assert LogEntry.objects.count() == 10


def test_a_batch_ends_when_its_time_is_up(login, tenant, steered, monkeypatch):
    client = login("*")
    ids = [make_task(tenant).pk for _ in range(3)]
    response = act(client, "cancel", across=True)
    monkeypatch.setattr(steering, "BATCH_S", -1.0)
    token = response.context["job"].token
    page_ = client.post(reverse("admin:llmtasks_task_steer"), {"job": token})
    assert not steered["cancel"] and page_.status_code == 200
    monkeypatch.setattr(steering, "BATCH_S", 5.0)
    confirm(client, page_)
    assert sorted(steered["cancel"]) == ids


def test_a_page_that_is_sent_twice_retries_nothing_again(login, tenant, steered):
    client = login("*")
    make_task(tenant, status=Status.FAILED)
    token = act(client, "retry", across=True).context["job"].token
    for _ in range(3):
        client.post(reverse("admin:llmtasks_task_steer"), {"job": token})
    assert len(steered["retry"]) == 1


def test_what_was_refused_is_told(login, tenant, steered):
    client = login("*")
    task = make_task(tenant, status=Status.FAILED, route="gone")
    pages = confirm(client, act(client, "retry", [task.pk]))
    told = text(client.get(pages[-1].url))
    assert "0 tasks retried" in told and "1 not retried: its request was deleted" in told


def test_only_newest_are_steered_where_only_they_are_shown(login, tenant, steered, monkeypatch):
    monkeypatch.setattr(lists, "LOOKED_THROUGH", 2)
    client = login("*")
    ids = [make_task(tenant, lane=Lane.BULK).pk for _ in range(4)]
    response = act(client, "cancel", across=True, lane="bulk")
    assert "among the newest" in text(response)
    make_task(tenant, lane=Lane.BULK)
    confirm(client, response)
    assert sorted(steered["cancel"]) == ids[2:]


def test_a_job_that_nobody_confirmed_is_refused(login, tenant, steered):
    client = login("*")
    url = reverse("admin:llmtasks_task_steer")
    for values in ({"job": "forged"}, {}, {"task": "x", "verb": "cancel"}, {"task": str(uuid7())}):
        assert client.post(url, values).status_code == 400
    assert client.get(url).status_code == 405


def test_buttons_on_the_page(login, tenant, steered):
    client = login("view_task", "change_task")
    waiting, failed = make_task(tenant), make_task(tenant, status=Status.FAILED)
    url = reverse("admin:llmtasks_task_steer")
    assert "Cancel\n" in text(client.get(page("task", waiting.pk)))
    response = client.post(url, {"task": str(waiting.pk), "verb": "cancel"}, follow=True)
    assert "The task is cancelled" in text(response)
    response = client.post(url, {"task": str(failed.pk), "verb": "retry"}, follow=True)
    assert response.context["original"].retry_of == failed.pk
    assert LogEntry.objects.count() == 2


def test_the_corridor_itself_cancels_and_retries(login, tenant):
    """Nothing is faked here: the very functions, against the database."""
    client = login("*")
    task = make_task(tenant, route="nowhere")
    url = reverse("admin:llmtasks_task_steer")
    client.post(url, {"task": str(task.pk), "verb": "cancel"})
    task.refresh_from_db()
    assert task.status == Status.CANCELLED
    again = client.post(url, {"task": str(task.pk), "verb": "cancel"}, follow=True)
    assert "the task is cancelled already: there is nothing left to cancel." in text(again)
    gone = client.post(url, {"task": str(task.pk), "verb": "retry"}, follow=True)
    assert "Not retried: the task&#x27;s request was deleted" in text(gone)
