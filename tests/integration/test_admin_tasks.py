"""The admin's pages of tasks."""

from datetime import timedelta
from decimal import Decimal

import pytest
from django.urls import reverse
from uuid_utils.compat import uuid7

from llmtasks.admin import lists
from llmtasks.admin.bodies import MAX_TEXT
from llmtasks.models import (
    CostState,
    Kind,
    Lane,
    Mode,
    Status,
    Task,
    TaskPayload,
    Tenant,
)
from tests.admin_pages import (
    EVIL,
    changelist,
    make_attempt,
    make_task,
    page,
    shown_tasks,
    text,
    uuid_of,
)

pytestmark = pytest.mark.django_db


# --- tasks: the list ----------------------------------------------------------------------------


def test_what_is_unpriced_or_estimated_is_said(login, tenant):
    make_task(tenant, cost=Decimal("0.0001230000"), cost_state=CostState.FINAL)
    make_task(tenant, cost=Decimal("1.5"), cost_state=CostState.ESTIMATED)
    make_task(tenant, cost_state=CostState.UNPRICED)
    make_task(tenant, cost=Decimal(2), cost_state=CostState.UNPRICED)
    content = text(login("view_task").get(changelist("task")))
    assert "$0.000123<" in content
    assert "≈ $1.50 <small>estimated" in content
    assert ">unpriced<" in content and ">$2.00 + unpriced<" in content
    assert "$0.00<" not in content


@pytest.mark.parametrize(
    "name, value, other",
    [
        ("status", Status.FAILED, Status.WAITING),
        ("lane", Lane.BULK, Lane.DEFAULT),
        ("provider", "vendor", "elsewhere"),
        ("mode", Mode.INLINE, Mode.QUEUED),
        ("kind", Kind.EMBEDDING, Kind.CHAT),
    ],
)
def test_filters(login, tenant, name, value, other):
    wanted, unwanted = make_task(tenant, **{name: value}), make_task(tenant, **{name: other})
    content = text(login("view_task").get(changelist("task", **{name: value})))
    assert page("task", wanted.pk) in content
    assert page("task", unwanted.pk) not in content


def test_filter_by_tenant_and_age(login, tenant):
    client = login("view_task")
    other = make_task(Tenant.objects.create(name="other"))
    old = make_task(tenant, id=uuid_of(timedelta(days=2)))
    new = make_task(tenant)
    shown = shown_tasks(client, tenant=str(tenant.pk))
    assert shown == {new.pk, old.pk}
    assert shown_tasks(client, age="1d") == {new.pk, other.pk}
    assert shown_tasks(client, age="over-1d") == {old.pk}
    assert shown_tasks(client, tenant="nonsense") == set()


def test_search_is_by_exact_id(login, tenant):
    client = login("view_task")
    wanted, _ = make_task(tenant), make_task(tenant)
    assert shown_tasks(client, q=f" {wanted.pk} ") == {wanted.pk}
    assert shown_tasks(client, q=str(wanted.pk)[:8]) == set()
    assert shown_tasks(client, q=str(uuid7())) == set()


@pytest.mark.parametrize("lookup", ["error_message__contains", "user", "metadata__a", "id__lt"])
def test_no_other_lookup_is_allowed(login, tenant, lookup):
    assert login("view_task").get(changelist("task", **{lookup: "x"})).status_code == 400


def test_the_order_is_always_that_of_ids(login, tenant):
    made = [make_task(tenant, route=name).pk for name in ("b", "a", "c")]
    response = login("view_task").get(changelist("task", o="6"))
    assert [task.pk for task in response.context["cl"].result_list] == made[::-1]


def test_the_list_costs_the_same_for_any_number_of_rows(
    login, tenant, provider, django_assert_max_num_queries
):
    client = login("*")
    for _ in range(60):
        make_attempt(make_task(tenant))
    client.get(changelist("task"))
    with django_assert_max_num_queries(8):
        client.get(changelist("task"))
    with django_assert_max_num_queries(9):
        client.get(changelist("task", lane="bulk"))
    with django_assert_max_num_queries(8):
        client.get(changelist("attempt"))
    with django_assert_max_num_queries(13):
        client.get(page("task", Task.objects.first().pk))
    with django_assert_max_num_queries(8):
        client.get(reverse("admin:index"))


def test_nothing_is_counted_further_than_the_cap(login, tenant, monkeypatch):
    monkeypatch.setattr(lists, "COUNTED", 60)
    client = login("view_task")
    for _ in range(61):
        make_task(tenant)
    content = text(client.get(changelist("task")))
    assert "60+" in content
    assert len(shown_tasks(client, p="2")) == 10
    assert client.get(changelist("task", p="3")).status_code == 302


def test_a_filter_without_an_index_looks_at_the_newest_and_says_so(login, tenant, monkeypatch):
    monkeypatch.setattr(lists, "LOOKED_THROUGH", 2)
    client = login("view_task")
    bulk = [make_task(tenant, lane=Lane.BULK).pk for _ in range(3)]
    assert shown_tasks(client, lane="bulk") == set(bulk[1:])
    assert "looks through the newest" in text(client.get(changelist("task", lane="bulk")))
    make_task(Tenant.objects.create(name="other"))
    assert shown_tasks(client, lane="bulk", tenant=str(tenant.pk)) == set(bulk[1:])
    assert shown_tasks(client, status="waiting", age="1h") >= set(bulk)


# --- tasks: the page ----------------------------------------------------------------------------


def with_bodies(tenant: Tenant) -> Task:
    task = make_task(
        tenant, status=Status.FAILED, error_class="ServerError", error_message=f"oh {EVIL}",
        user=EVIL, metadata={"k": EVIL},
    )  # fmt: skip
    request = {
        "model": "smart",
        "temperature": 0.5,
        "messages": [
            {"role": "system", "parts": [{"type": "text", "text": "be brief"}]},
            {
                "role": "user",
                "parts": [
                    {"type": "text", "text": f"secret prompt {EVIL}"},
                    {"type": "image", "url": "https://tracker.example/pixel.png"},
                    {"type": "image", "url": "data:image/png;base64," + "A" * 50},
                    {"type": "text", "text": "x" * (MAX_TEXT + 5)},
                ],
            },
            {
                "role": "tool",
                "parts": [{"type": "tool_result", "call_id": "c1", "content": "sunny"}],
            },
        ],
    }
    response = {
        "finish_reason": "tool_calls",
        "parts": [
            {"type": "thinking", "text": "hm"},
            {"type": "tool_call", "id": "c2", "name": "weather", "arguments": '{"q": 1}'},
            {"type": "refusal", "text": "no"},
            {"type": "later", "what": "unknown to us"},
        ],
    }
    TaskPayload.objects.create(task=task, request=request, response=response)
    return task


def test_bodies_need_a_permission_of_their_own(login, tenant):
    task = with_bodies(tenant)
    content = text(login("view_task", "view_attempt").get(page("task", task.pk)))
    assert "secret prompt" not in content and "Prompt and answer" not in content
    assert "ServerError" in content


def test_bodies_are_readable_and_escaped(login, tenant):
    task = with_bodies(tenant)
    content = text(login("view_task", "view_bodies").get(page("task", task.pk)))
    assert EVIL not in content
    assert "secret prompt &lt;script&gt;" in content
    assert "calls weather (c2)" in content and "result of c1" in content and "sunny" in content
    assert "ended by tool_calls" in content and "unknown to us" in content
    assert "… 5 more characters" in content
    assert "data:image/png;base64, 72 characters" in content
    assert 'src="https://tracker' not in content


@pytest.mark.parametrize(
    "request_, response, shown",
    [
        ({"inputs": ["one", [1, 2]]}, {"vectors": [[0.1, 0.2]]}, "1 vectors of 2 numbers"),
        ([], None, "None."),
        ({"messages": "?"}, {"parts": [5]}, "answer"),
        ({"messages": [{"role": "user"}, 3]}, {}, "user"),
        ({"input": {}}, {"value": {"sum": "EUR 5"}}, "EUR 5"),
        ({"chat": {"messages": [{"role": "user", "parts": [{"type": "text", "text": "Where?"}]}]}},
         None, "Where?"),
    ],
)  # fmt: skip
def test_any_stored_body_can_be_shown(login, tenant, request_, response, shown):
    task = make_task(tenant)
    TaskPayload.objects.create(task=task, request=request_, response=response)
    assert shown in text(login("view_task", "view_bodies").get(page("task", task.pk)))


def test_a_body_that_was_deleted_is_said_to_be(login, tenant):
    task = make_task(tenant)
    content = text(login("view_task", "view_bodies").get(page("task", task.pk)))
    assert "Not stored any more" in content


def test_the_list_never_reads_bodies(login, tenant, django_assert_max_num_queries):
    with_bodies(tenant)
    client = login("*")
    with django_assert_max_num_queries(8) as queries:
        client.get(changelist("task"))
    assert not [each for each in queries if "taskpayload" in each["sql"]]


def test_attempts_are_inside(login, tenant):
    task = make_task(tenant)
    make_attempt(task, http_status=503, error_class="Overloaded", latency_ms=1200)
    make_attempt(task, cost=Decimal("0.25"), cost_state=CostState.FINAL, first_token_ms=90)
    content = text(login("view_task", "view_attempt").get(page("task", task.pk)))
    assert "1 · vendor/m-1" in content and "503 Overloaded" in content and "1.2 s" in content
    assert "2 · vendor/m-1" in content and "$0.25" in content and "90 ms" in content


def test_tasks_can_not_be_edited(login, tenant):
    client = login("*")
    task = make_task(tenant)
    assert client.post(page("task", task.pk), {"route": "other"}).status_code == 403
    assert client.get(reverse("admin:llmtasks_task_add")).status_code == 403
    assert client.get(reverse("admin:llmtasks_task_delete", args=(task.pk,))).status_code == 403
