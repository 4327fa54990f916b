"""The admin, through its pages."""

import csv
import io
from datetime import timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core import checks
from django.urls import reverse
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import pricing
from llmtasks.admin import attempts as attempts_admin
from llmtasks.admin import cells, lists, steering
from llmtasks.admin.bodies import MAX_TEXT
from llmtasks.models import (
    Adjustment,
    ApiKey,
    Attempt,
    CostState,
    Kind,
    Lane,
    Mode,
    Price,
    Provider,
    ProviderModel,
    Route,
    RouteCandidate,
    Scope,
    Status,
    Task,
    TaskPayload,
    Tenant,
    Worker,
)
from llmtasks.models.tenancy import split

pytestmark = pytest.mark.django_db

EVIL = "<script>alert(1)</script>"


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


# --- every page ---------------------------------------------------------------------------------

MODELS = (
    "task", "attempt", "worker", "provider", "route", "price", "adjustment", "tenant", "apikey",
    "providermodel",
)  # fmt: skip


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
    return locals()


AMOUNTS = ("input", "cached_input", "cache_write_5m", "cache_write_1h", "output", "reasoning")


@pytest.mark.parametrize("model", MODELS)
def test_every_list_and_page_opens(login, everything, model):
    client = login("*")
    assert text(client.get(changelist(model)))
    rows = {
        "adjustment": Adjustment, "providermodel": ProviderModel, "apikey": ApiKey,
        "task": Task, "attempt": Attempt, "worker": Worker, "provider": Provider, "route": Route,
        "price": Price, "tenant": Tenant,
    }  # fmt: skip
    assert text(client.get(page(model, rows[model].objects.get().pk)))


@pytest.mark.parametrize("model", ["provider", "route", "price", "adjustment", "tenant", "apikey"])
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
    for url in urls:
        content = text(client.get(url)).replace('base_url" value="https://', "")
        for start in ('src="http', 'href="http', "url(http"):
            assert start not in content


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


def uuid_of(age: timedelta) -> UUID:
    return UUID(int=lists.first_id(age).int + 7)


def shown_tasks(client, **query: str) -> set[UUID]:
    response = client.get(changelist("task", **query))
    assert response.status_code == 200
    return {task.pk for task in response.context["cl"].result_list}


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
    ],
)
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


# --- steering -----------------------------------------------------------------------------------


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


def act(client, action: str, ids=(), *, across: bool = False, **query: str):
    """Run a list's action, up to its confirmation."""
    values = {
        "action": f"{action}_tasks",
        "_selected_action": [str(pk) for pk in ids] or [str(Task.objects.first().pk)],
        "select_across": "1" if across else "0",
        "index": "0",
    }
    return client.post(changelist("task", **query), values)


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
    assert "Not cancelled: the task is cancelled already." in text(again)
    gone = client.post(url, {"task": str(task.pk), "verb": "retry"}, follow=True)
    assert "Not retried: the task&#x27;s request was deleted" in text(gone)


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


# --- attempts -----------------------------------------------------------------------------------


def text_of_stream(response) -> str:
    return b"".join(response.streaming_content).decode()


def exported(client, **query: str) -> list[dict[str, str]]:
    response = client.get(reverse("admin:llmtasks_attempt_export", query=query))
    assert response["Content-Type"].startswith("text/csv")
    assert "attachment" in response["Content-Disposition"]
    return list(csv.DictReader(io.StringIO(text_of_stream(response))))


def test_the_ledger_as_csv(login, tenant, monkeypatch):
    monkeypatch.setattr(attempts_admin, "EXPORT_BATCH", 3)
    client = login("view_attempt")
    other = Tenant.objects.create(name="other")
    made = [
        make_attempt(make_task(owner), cost=Decimal("0.0000000001"), cost_state=state)
        for owner in (tenant, other)
        for state in (CostState.FINAL, CostState.ESTIMATED, CostState.FINAL)
        for _ in range(2)
    ]
    rows = exported(client)
    assert [row["id"] for row in rows] == [str(each.pk) for each in reversed(made)]
    assert {row["cost"] for row in rows} == {"0.0000000001"}
    assert len(exported(client, tenant=str(tenant.pk))) == 6
    assert len(exported(client, cost_state="estimated")) == 4
    assert len(exported(client, tenant=str(other.pk), cost_state="estimated", age="1h")) == 2


def test_an_unpriced_call_has_no_amount_in_the_csv(login, tenant):
    make_attempt(make_task(tenant), cost_state=CostState.UNPRICED, vendor_request_id="=cmd()")
    [row] = exported(login("view_attempt"))
    assert (row["cost"], row["cost_state"]) == ("", "unpriced")
    assert row["vendor_request_id"] == "'=cmd()"


def test_an_attempt_shows_usage_and_price(login, everything):
    attempt = everything["attempt"]
    content = text(login("view_attempt", "view_price").get(page("attempt", attempt.pk)))
    assert "vendor/m-1 from" in content and "$0.50" in content


def test_an_attempt_whose_price_is_gone_still_opens(login, tenant):
    attempt = make_attempt(make_task(tenant), price_id=999, raw_usage={"in": 5}, error_message=EVIL)
    content = text(login("view_attempt").get(page("attempt", attempt.pk)))
    assert "&quot;in&quot;: 5" in content and EVIL not in content


# --- money --------------------------------------------------------------------------------------


def test_an_adjustment_is_added_under_its_authors_name(login, tenant):
    client = login("add_adjustment", "view_adjustment")
    attempt = make_attempt(make_task(tenant))
    values = {"tenant": tenant.pk, "attempt": attempt.pk, "amount": "-0.0000000001", "reason": "x"}
    response = client.post(reverse("admin:llmtasks_adjustment_add"), values)
    assert response.status_code == 302, response.context["errors"]
    row = Adjustment.objects.get()
    assert (row.amount, row.created_by) == (Decimal("-0.0000000001"), User.objects.get().username)
    assert "-$0.0000000001" in text(client.get(changelist("adjustment")))
    assert client.post(page("adjustment", row.pk), {**values, "amount": "5"}).status_code == 403


@pytest.mark.parametrize(
    "change, message",
    [
        ({"amount": "0"}, "An adjustment of nothing"),
        ({"attempt": "other"}, "another tenant"),
        ({"attempt": "018f0000-0000-7000-8000-000000000000"}, "valid choice"),
        ({"reason": ""}, "required"),
    ],
)
def test_a_wrong_adjustment_is_refused(login, tenant, change, message):
    other = make_attempt(make_task(Tenant.objects.create(name="other")))
    if change.get("attempt") == "other":
        change = {"attempt": other.pk}
    values = {"tenant": tenant.pk, "attempt": "", "amount": "1", "reason": "x", **change}
    response = login("*").post(reverse("admin:llmtasks_adjustment_add"), values)
    assert message in text(response)
    assert not Adjustment.objects.exists()


def price_values(**changes: str) -> dict[str, str]:
    return {
        "family": "v", "model": "m", "effective_from_0": "2026-01-01",
        "effective_from_1": "00:00:00", "from_input_tokens": "0", "per_request": "0",
        **dict.fromkeys(AMOUNTS, "1.5"), **changes,
    }  # fmt: skip


@pytest.mark.parametrize("source", Price.Source.values)
def test_a_price_is_added_and_never_changed(login, source):
    client = login("*")
    add = reverse("admin:llmtasks_price_add")
    assert "never changed or deleted" in text(client.get(add))
    Price.objects.create(
        family="v", model="m", source=source, effective_from="2026-01-01T00:00Z",
        **dict.fromkeys(AMOUNTS, 1),
    )  # fmt: skip
    row = Price.objects.get()
    assert 'name="_save"' not in text(client.get(page("price", row.pk)))
    assert client.post(page("price", row.pk), price_values(input="2")).status_code == 403
    delete = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
    client.post(changelist("price"), delete)
    assert list(Price.objects.all()) == [row] and Price.objects.get().input == 1
    later = price_values(input="2", effective_from_0="2026-01-02")
    response = client.post(add, later)
    assert response.status_code == 302, response.context["errors"]
    new = Price.objects.get(input=2)
    assert (new.source, new.cached_input) == (Price.Source.MANUAL, Decimal("1.5"))


def test_a_price_is_superseded_from_now_on(login):
    client = login("view_price", "add_price")
    amounts = dict.fromkeys(AMOUNTS, Decimal("0.15"))
    old = Price.objects.create(
        family="v", model="m", effective_from=timezone.now() - timedelta(days=9), **amounts
    )
    link = reverse("admin:llmtasks_price_supersede", args=(old.pk,))
    assert link in text(client.get(page("price", old.pk)))
    response = client.get(link, follow=True)
    form = response.context["adminform"].form
    values = {bound.name: bound.value() for bound in form}
    assert (values["model"], values["input"], values["per_request"]) == ("m", "0.15", "0")
    assert 'value="0.15"' in text(response)
    moment = values.pop("effective_from")
    assert timezone.now() - moment < timedelta(minutes=1)
    values |= {"effective_from_0": f"{moment:%Y-%m-%d}", "effective_from_1": f"{moment:%H:%M:%S}"}
    response = client.post(reverse("admin:llmtasks_price_add"), {**values, "input": "0.2"})
    assert response.status_code == 302, response.context["errors"]
    now_in_force = pricing.price_for("v", "m", 5)
    assert (now_in_force.input, now_in_force.output) == (Decimal("0.2"), Decimal("0.15"))


def test_only_who_may_add_a_price_may_supersede_one(login, everything):
    client = login("view_price")
    link = reverse("admin:llmtasks_price_supersede", args=(everything["price"].pk,))
    assert link not in text(client.get(page("price", everything["price"].pk)))
    assert client.get(link).status_code == 403


def test_a_prices_tiers_begin_together(login):
    client, add = login("*"), reverse("admin:llmtasks_price_add")
    tier = price_values(from_input_tokens="200000")
    assert "First add the price from 0 tokens" in text(client.post(add, tier))
    assert client.post(add, price_values()).status_code == 302
    assert "There is a price of that moment" in text(client.post(add, price_values(input="2")))
    assert client.post(add, tier).status_code == 302
    assert list(Price.objects.values_list("from_input_tokens", flat=True)) == [0, 200_000]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": "-1"}, "greater than or equal to 0"),
        ({"effective_from_0": "soon"}, "Enter a valid date"),
        ({"model": ""}, "required"),
    ],
)
def test_a_wrong_price_is_refused(login, change, message):
    response = login("*").post(reverse("admin:llmtasks_price_add"), price_values(**change))
    assert message in text(response)
    assert not Price.objects.exists()


# --- tenants and keys ---------------------------------------------------------------------------


def test_a_keys_secret_is_shown_once(login, tenant):
    client = login("*")
    values = {"tenant": tenant.pk, "name": "backend", "scopes": ["read"]}
    response = client.post(reverse("admin:llmtasks_apikey_add"), values)
    secret = response.context["secret"]
    assert secret in text(response) and "no-store" in response["Cache-Control"]
    key = ApiKey.objects.get()
    assert key.matches(split(secret)[1]) and key.scopes == [Scope.READ]
    end = secret.split("_", 2)[2]
    for url in (changelist("apikey"), page("apikey", key.pk)):
        content = text(client.get(url))
        assert end not in content and key.secret_hash not in content
    assert end not in str(client.session.items()) + str(client.cookies)
    assert end not in str(list(LogEntry.objects.values_list("change_message", "object_repr")))


def test_an_edit_keeps_the_secret(login, tenant):
    key, _ = ApiKey.issue(tenant, "backend")
    key.save()
    other = Tenant.objects.create(name="other")
    values = {"name": "renamed", "scopes": ["read"], "tenant": other.pk}
    assert login("*").post(page("apikey", key.pk), values).status_code == 302
    changed = ApiKey.objects.get()
    assert (changed.name, changed.secret_hash, changed.tenant) == (
        "renamed",
        key.secret_hash,
        tenant,
    )


def test_keys_are_revoked_and_it_is_logged(login, tenant):
    key, _ = ApiKey.issue(tenant, "backend")
    key.save()
    values = {"action": "revoke", "_selected_action": [str(key.pk)], "index": "0"}
    client = login("*")
    client.post(changelist("apikey"), values)
    first = ApiKey.objects.get().revoked_at
    client.post(changelist("apikey"), values)
    assert first is not None and ApiKey.objects.get().revoked_at == first
    assert LogEntry.objects.get().change_message == "Revoked."
    assert "revoked" in text(client.get(changelist("apikey")))


def test_tenants_and_keys_are_never_deleted(login, everything):
    client = login("*")
    for model in ("tenant", "apikey", "price", "adjustment", "attempt", "worker"):
        url = reverse(f"admin:llmtasks_{model}_delete", args=(everything_pk(everything, model),))
        assert client.post(url, {"post": "yes"}).status_code == 403


def everything_pk(everything, model: str):
    if model == "adjustment":
        return Adjustment.objects.get().pk
    return everything["key" if model == "apikey" else model].pk


# --- configuration ------------------------------------------------------------------------------


def provider_values(**changes: str) -> dict[str, str]:
    return {
        "name": "new", "adapter": "compatible", "base_url": "https://api.example.com/v1",
        "credential": "env:NEW_KEY", "options": "{}", "price_family": "",
        "connect_timeout_s": "5", "read_timeout_s": "120", "total_timeout_s": "600",
        "models-TOTAL_FORMS": "0", "models-INITIAL_FORMS": "0", **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"adapter": "nope"}, "Select a valid choice"),
        ({"options": '{"colour": 1}'}, "unknown option"),
        ({"options": "{"}, "valid JSON"),
        ({"credential": "sk-live-123"}, "Give a reference"),
        ({"base_url": "ftp://x.io"}, "must begin with http"),
        ({"base_url": "https://user:pass@x.io"}, "must not hold a credential"),
        ({"name": "Upper"}, "Lower-case"),
    ],
)
def test_a_wrong_provider_is_refused(login, change, message):
    response = login("*").post(reverse("admin:llmtasks_provider_add"), provider_values(**change))
    assert message in text(response)
    assert not Provider.objects.exists()


def test_whether_a_credential_leads_to_a_key_is_shown_and_the_key_is_not(login, monkeypatch):
    client = login("*")
    response = client.post(reverse("admin:llmtasks_provider_add"), provider_values())
    assert response.status_code == 302, response.context["errors"]
    row = Provider.objects.get()
    assert ">\nno\n<" in squeezed(client.get(changelist("provider")))
    monkeypatch.setenv("NEW_KEY", "sk-live-0123456789")
    for url in (changelist("provider"), page("provider", row.pk)):
        content = squeezed(client.get(url))
        assert ">\nyes\n<" in content and "sk-live" not in content


def squeezed(response) -> str:
    return "\n".join(line.strip() for line in text(response).splitlines() if line.strip())


def test_a_providers_name_never_changes(login, provider):
    values = provider_values(name="other", price_family="openai")
    assert login("*").post(page("provider", provider.pk), values).status_code == 302
    provider.refresh_from_db()
    assert (provider.name, provider.price_family) == ("vendor", "openai")


def test_pause_and_resume(login, provider):
    client = login("*")
    for verb, is_paused in (("pause", True), ("resume", False)):
        url = reverse("admin:llmtasks_provider_switch", args=(provider.pk, verb))
        assert client.get(url).status_code == 405
        assert client.post(url).url == reverse("admin:index")
        provider.refresh_from_db()
        assert provider.is_paused is is_paused
    values = {"action": "pause", "_selected_action": [provider.pk], "index": "0"}
    client.post(changelist("provider"), values)
    provider.refresh_from_db()
    assert provider.is_paused
    messages = LogEntry.objects.order_by("id").values_list("change_message", flat=True)
    assert list(messages) == ["Paused.", "Resumed.", "Paused."]
    unknown = reverse("admin:llmtasks_provider_switch", args=(provider.pk, "explode"))
    assert client.post(unknown).status_code == 403


def test_pausing_needs_a_csrf_token(login, provider):
    from django.test import Client

    login("*")
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(User.objects.get())
    url = reverse("admin:llmtasks_provider_switch", args=(provider.pk, "pause"))
    assert strict.post(url).status_code == 403


def test_a_route_is_made_with_its_candidates(login, provider):
    client = login("*")
    model = ProviderModel.objects.create(provider=provider, name="m-1")
    values = {
        "name": "smart", "kind": "chat", "is_active": "on",
        "candidates-TOTAL_FORMS": "1", "candidates-INITIAL_FORMS": "0",
        "candidates-0-position": "0", "candidates-0-model": model.pk,
    }  # fmt: skip
    response = client.post(reverse("admin:llmtasks_route_add"), values)
    assert response.status_code == 302, response.context["errors"]
    assert "vendor/m-1" in text(client.get(changelist("route")))


def test_the_list_of_routes_asks_a_fixed_number_of_questions(
    login, provider, django_assert_max_num_queries
):
    client = login("*")
    for number in range(30):
        model = ProviderModel.objects.create(provider=provider, name=f"m-{number}")
        route = Route.objects.create(name=f"r-{number}")
        RouteCandidate.objects.create(route=route, model=model)
    client.get(changelist("route"))
    with django_assert_max_num_queries(8):
        client.get(changelist("route"))
    with django_assert_max_num_queries(13):
        client.get(page("route", route.pk))


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
