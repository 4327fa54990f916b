"""/metrics and /v1/providers, as their readers get them."""

import json
import time
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from llmtasks import health, pulse
from llmtasks.api import shapes
from llmtasks.guards import meters, readings
from llmtasks.models import ApiKey, Limit, Provider, ProviderModel, Scope
from tests import factories
from tests.callers import Caller
from tests.integration.test_health import call, fail, no_redis, vendor

__all__ = ["no_redis", "vendor"]

SECRETS = ("acme", "env:SANDBOX_KEY", "sk-live")


@pytest.fixture
def busy(vendor: Provider) -> Provider:
    """Limits of all kinds, a refused model, a backlog, errors."""
    acme = factories.tenant("acme", weight=20)
    key, _ = ApiKey.issue(acme, "acme-key", last_used_at=timezone.now())
    key.save()
    Limit.objects.create(provider=vendor, unit="requests", window="minute", amount=100)
    Limit.objects.create(provider=vendor, tenant=acme, unit="requests", window="minute", amount=8)
    Limit.objects.create(tenant=acme, unit="tokens", window="day", amount=1000)
    Limit.objects.create(each="key", unit="requests", window="hour", amount=50)
    ProviderModel.objects.filter(name="other").update(
        refused_at=timezone.now(), refused_reason="PermissionDenied: key sk-live-1 of acme"
    )
    call(3, tenant=acme.pk, key=key.pk, error="Timeout", is_retried=True)
    call(1, tenant=acme.pk, key=key.pk, error="Timeout")
    factories.task(acme, provider="vendor", not_before=timezone.now() - timedelta(seconds=40))
    factories.worker("vendor.default", slots=6)
    return vendor


def scraped(client: Any) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Series → labels → value."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response["Content-Type"].startswith("text/plain; version=")
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(response.content.decode()):
        for sample in family.samples:
            labels = frozenset(sample.labels.items())
            assert labels not in found.setdefault(sample.name, {}), sample
            found[sample.name][labels] = sample.value
    return found


def one(found: Any, name: str, **labels: str) -> float:
    [value] = [
        value
        for have, value in found[f"llmtasks_{name}"].items()
        if have >= frozenset(labels.items())
    ]
    return float(value)


def test_the_series(busy: Provider, client: Any) -> None:
    found = scraped(client)
    assert one(found, "store_up", store="postgres") == one(found, "store_up", store="redis") == 1
    place = {"provider": "vendor", "lane": "default", "tenant_weight": "10-99"}
    assert one(found, "queue_depth", **place, state="due") == 1
    assert one(found, "queue_depth", **place, state="running") == 0
    assert 40 <= one(found, "oldest_waiting_seconds", **place) < 50
    assert one(found, "workers", lane="default") == 1
    assert one(found, "workers", lane="bulk") == 0
    assert one(found, "worker_slots", lane="default") == 6
    assert one(found, "processes", role="worker") == 1
    assert one(found, "dispatcher_leads") == 0
    assert one(found, "provider_refused", provider="vendor") == 0
    assert one(found, "model_refused", model="other") == 1
    assert one(found, "breaker_state", model="m") == 0
    assert one(found, "call_errors_total", model="m", error="Timeout") == 4
    assert one(found, "call_retries_total", model="m", error="Timeout") == 3
    assert one(found, "limit_used_ratio", provider="vendor", counts="all") == pytest.approx(0.04)
    assert one(found, "limit_used_ratio", provider="vendor", counts="one tenant") == 0.5
    assert one(found, "limit_used", counts="each key", window="hour") == 4
    assert one(found, "limit_amount", counts="one tenant", window="day") == 1000


def test_a_call_that_is_tried_again_is_a_retry(account: Provider, client: Any) -> None:
    for model in ("flaky-1", "error-400"):
        factories.route(model, (account, model))
    caller = Caller(factories.tenant())
    caller.chat("flaky-1")
    caller.chat("error-400")
    found = scraped(client)
    labels = {"provider": "sandbox", "model": "flaky-1", "error": "Overloaded"}
    assert one(found, "call_errors_total", **labels) == 1
    assert one(found, "call_retries_total", **labels) == 1
    assert one(found, "call_errors_total", model="error-400", error="InvalidRequest") == 1
    assert len(found["llmtasks_call_retries_total"]) == 1


def test_lanes_where_nothing_waits_are_zero(busy: Provider, client: Any) -> None:
    place = {"provider": "vendor", "lane": "bulk", "tenant_weight": "1"}
    found = scraped(client)
    assert one(found, "queue_depth", **place, state="due") == 0
    assert one(found, "oldest_waiting_seconds", **place) == 0


def test_a_breaker_that_opened(vendor: Provider, client: Any) -> None:
    fail()
    assert one(scraped(client), "breaker_state", model="m") == 2


def test_no_series_names_a_tenant_or_a_credential(busy: Provider, client: Any) -> None:
    text = client.get("/metrics").content.decode()
    ids = [str(pk) for pk in ApiKey.objects.values_list("pk", flat=True)]
    ids += [str(pk) for pk in ApiKey.objects.values_list("tenant_id", flat=True)]
    assert not [secret for secret in (*SECRETS, *ids) if secret in text]


def test_openmetrics_for_who_asks_for_it(busy: Provider, client: Any) -> None:
    response = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert response["Content-Type"].startswith("application/openmetrics-text")
    assert list(open_metrics(response.content.decode()))


def test_without_redis_fewer_series_and_no_fault(
    busy: Provider, client: Any, no_redis: None
) -> None:
    found = scraped(client)
    assert one(found, "store_up", store="redis") == 0
    assert one(found, "store_up", store="postgres") == 1
    assert "llmtasks_queue_depth" in found and "llmtasks_limit_used" not in found


def test_without_postgres_fewer_series_and_no_fault(
    busy: Provider, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pulse.start().lock:
        monkeypatch.setattr(pulse.start(), "is_away", True)
        found = scraped(client)
    assert one(found, "store_up", store="postgres") == 0
    assert "llmtasks_queue_depth" not in found and "llmtasks_call_errors_total" in found


def test_without_both_it_says_so(
    vendor: Provider, client: Any, no_redis: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pulse.start().lock:
        monkeypatch.setattr(pulse.start(), "is_away", True)
        found = scraped(client)
    assert set(found) == {"llmtasks_store_up"}
    assert set(found["llmtasks_store_up"].values()) == {0}


def test_who_may_not_gets_no_series(vendor: Provider, client: Any, settings: Any) -> None:
    assert client.get("/metrics", REMOTE_ADDR="10.0.0.1").status_code == 403
    settings.METRICS_TOKEN = "0123456789abcdef"
    refused = client.get("/metrics")
    assert refused.status_code == 401 and refused["WWW-Authenticate"] == "Bearer"
    assert b"llmtasks_" not in refused.content
    given = {"Authorization": "Bearer 0123456789abcdef"}
    assert client.get("/metrics", headers=given, REMOTE_ADDR="10.0.0.1").status_code == 200
    assert client.post("/metrics").status_code == 405


# --- /v1/providers --------------------------------------------------------------------------------


@pytest.fixture
def ask(vendor: Provider, client: Any) -> Any:
    key, text = ApiKey.issue(factories.tenant("asking"), "k")
    key.save()

    def get(wanted: int = 200, text: str = text) -> Any:
        health._last = None
        response = client.get("/v1/providers", headers={"Authorization": f"Bearer {text}"})
        assert response.status_code == wanted, response.content
        return json.loads(response.content)

    return get


def test_providers_as_the_schema_has_them(ask: Any, busy: Provider) -> None:
    page = shapes.ProviderPage.model_validate(ask())
    [told] = page.data
    assert (told.id, told.status) == ("vendor", "degraded")
    assert [(m.id, m.status, m.breaker) for m in told.models] == [
        ("m", "ok", "closed"),
        ("other", "refused", "closed"),
    ]
    assert told.queue is not None
    assert told.queue.default.waiting == 1 and told.queue.default.oldest_waiting_s >= 40
    assert told.queue.bulk.waiting == 0 and not told.queue.bulk.is_at_least


def test_nothing_of_other_tenants_and_no_credential_is_told(ask: Any, busy: Provider) -> None:
    told = ask()
    text = json.dumps(told)
    assert not [secret for secret in SECRETS if secret in text]
    # The limit of one tenant at this provider is nobody else's business.
    [limit] = told["data"][0]["limits"]
    assert limit == {"model": None, "unit": "requests", "window": "minute", "used_share": 0.04}


def test_an_open_breaker_is_told(ask: Any, vendor: Provider) -> None:
    began = time.monotonic()
    fail()
    [told] = ask()["data"]
    assert told["status"] == "degraded" and told["models"][0]["breaker"] == "open"
    assert 10 - (time.monotonic() - began) < told["models"][0]["closed_for_s"] <= 10


@pytest.mark.parametrize(
    "fields, status",
    [({"is_paused": True}, "paused"), ({"refused_at": timezone.now()}, "refused")],
)
def test_a_provider_that_is_not_used(ask: Any, fields: dict[str, Any], status: str) -> None:
    Provider.objects.update(**fields)
    [told] = ask()["data"]
    assert told["status"] == status
    assert (told["refused_at"] is not None) == (status == "refused")


def test_what_could_not_be_looked_at_is_null(
    ask: Any, vendor: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: Any, **kwargs: Any) -> Any:
        raise meters.Away

    monkeypatch.setattr(readings, "errors", away)
    monkeypatch.setattr("llmtasks.backlog.look", lambda: (_ for _ in ()).throw(meters.Away()))
    monkeypatch.setattr(health, "POSTGRES_AWAY", meters.Away)
    told = ask()
    assert told["sees"] == {"limits": False, "queue": False}
    [provider] = told["data"]
    assert provider["queue"] is None and provider["models"][0]["breaker"] is None


def test_without_postgres_it_is_a_503(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ask()
    with pulse.start().lock:
        monkeypatch.setattr(pulse.start(), "is_away", True)
        problem = ask(503)
    assert problem["code"] == "unavailable"


def test_a_key_that_may_not_read_is_refused(ask: Any) -> None:
    key, text = ApiKey.issue(factories.tenant(), "w", scopes=[Scope.WRITE.value])
    key.save()
    assert ask(403, text)["code"] == "not_allowed"
    assert ask(401, "lt_000000000000_" + 30 * "x")["code"] == "invalid_api_key"
