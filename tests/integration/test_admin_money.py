"""The admin's pages of attempts, prices and adjustments."""

import csv
import io
from datetime import timedelta
from decimal import Decimal

import pytest
from django.contrib.auth.models import User
from django.urls import reverse
from django.utils import timezone

from llmtasks import pricing
from llmtasks.admin import attempts as attempts_admin
from llmtasks.models import (
    Adjustment,
    CostState,
    Price,
    Tenant,
)
from tests.admin_pages import (
    AMOUNTS,
    EVIL,
    changelist,
    make_attempt,
    make_task,
    page,
    text,
    text_of_stream,
)

pytestmark = pytest.mark.django_db


# --- attempts -----------------------------------------------------------------------------------


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
