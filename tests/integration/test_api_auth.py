"""Keys, scopes and task tokens."""

import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.core import signing
from django.db import OperationalError
from django.test import Client
from django.utils import timezone

from llmtasks import pulse
from llmtasks.api import auth
from llmtasks.api import keys as keys_module
from llmtasks.api.keys import keys, last_used
from llmtasks.models import ApiKey, Provider
from tests import factories
from tests.callers import Caller, body_of
from tests.corridor import until


@pytest.fixture
def caller(account: Provider) -> Caller:
    factories.route("echo", (account, "echo"))
    return Caller(factories.tenant())


def status(authorization: str, path: str = "/v1/models", **headers: str) -> int:
    given = {"Authorization": authorization} if authorization else {}
    return Client(headers={**given, **headers}).get(path).status_code


def test_a_key_is_taken_from_either_header(caller: Caller):
    assert status(f"Bearer {caller.text}") == 200
    assert status(f"bearer  {caller.text} ") == 200
    assert status("", **{"x-api-key": caller.text}) == 200


@pytest.mark.parametrize(
    "text",
    ["", "Bearer", "Bearer x", "Basic abc", "Bearer lt_aaaaaaaaaaaa_" + "x" * 43, "Bearer tt_x"],
)
def test_a_wrong_key_is_refused(caller: Caller, text: str):
    answer = Client(headers={"Authorization": text}).get("/v1/models")
    assert (answer.status_code, answer["WWW-Authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_another_secret_behind_a_known_prefix_is_refused(caller: Caller):
    assert status(f"Bearer {caller.text[:-1]}{'a' if caller.text[-1] != 'a' else 'b'}") == 401


def test_a_key_is_looked_up_once(caller: Caller, django_assert_num_queries: Any):
    caller.get("/v1/models")
    with django_assert_num_queries(0):
        assert caller.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"revoked_at": timezone.now()},
        {"expires_at": timezone.now() - timedelta(seconds=1)},
    ],
)
def test_a_change_of_a_key_holds_within_a_second(caller: Caller, change: dict[str, Any]):
    assert caller.get("/v1/models").status_code == 200
    ApiKey.objects.filter(id=caller.key.id).update(**change)
    changed = time.monotonic()
    until(lambda: pulse.start().read_at > changed)
    assert caller.get("/v1/models").status_code == 401
    assert pulse.PERIOD_S < 1


def test_a_tenant_that_is_switched_off_is_refused(caller: Caller):
    assert caller.get("/v1/models").status_code == 200
    caller.tenant.is_active = False
    caller.tenant.save()
    factories.in_force()
    assert caller.get("/v1/models").status_code == 401


def test_a_key_expires_by_itself(caller: Caller, monkeypatch: pytest.MonkeyPatch):
    ApiKey.objects.filter(id=caller.key.id).update(
        expires_at=timezone.now() + timedelta(seconds=60)
    )
    factories.in_force()
    assert caller.get("/v1/models").status_code == 200
    later = SimpleNamespace(time=lambda: time.time() + 61, monotonic=time.monotonic)
    monkeypatch.setattr(keys_module, "time", later)
    assert caller.get("/v1/models").status_code == 401


def test_a_key_that_was_unknown_is_known_once_it_is_made(caller: Caller):
    key, text = ApiKey.issue(caller.tenant, "later")
    assert status(f"Bearer {text}") == 401
    key.save()
    factories.in_force()
    assert status(f"Bearer {text}") == 200


def test_known_keys_hold_while_postgres_is_away(caller: Caller, monkeypatch: pytest.MonkeyPatch):
    assert keys().by_text(caller.text) is not None

    def away(*_: object) -> None:
        raise OperationalError("away")

    monkeypatch.setattr(keys_module, "read", away)
    assert keys().by_text(caller.text) is not None
    monkeypatch.setattr(pulse, "config_is_fresh", lambda: False)
    answer = caller.get("/v1/models")
    assert (answer.status_code, answer["Retry-After"]) == (503, "2")


def test_scopes(account: Provider):
    tenant = factories.tenant()
    factories.route("echo", (account, "echo"))
    reader, writer = Caller(tenant, scopes=["read"]), Caller(tenant, scopes=["write"])
    made = writer.task(mode="queued").json()["id"]
    assert reader.get(f"/v1/tasks/{made}").status_code == 200
    assert writer.get(f"/v1/tasks/{made}").status_code == 403
    assert reader.task().status_code == 403
    assert reader.chat().json()["error"]["code"] == "not_allowed"
    assert reader.post(f"/v1/tasks/{made}/cancel").status_code == 403
    assert writer.post(f"/v1/tasks/{made}/cancel").status_code == 200


def test_use_is_noted_without_a_change_of_configuration(caller: Caller):
    before = pulse.config_version()
    caller.get("/v1/models")
    last_used().write()
    factories.in_force()
    assert ApiKey.objects.get(id=caller.key.id).last_used_at is not None
    assert pulse.config_version() == before


# --- Task tokens ---------------------------------------------------------------------------------


@pytest.fixture
def task_id(caller: Caller) -> str:
    return str(caller.task(mode="queued").json()["id"])


def test_a_token_reads_and_cancels_its_one_task(caller: Caller, task_id: str):
    answer = caller.post(f"/v1/tasks/{task_id}/token")
    assert answer.status_code == 201
    token = answer.json()["token"]
    browser = Client(headers={"Authorization": f"Bearer {token}"})
    assert browser.get(f"/v1/tasks/{task_id}").status_code == 200
    other = caller.task(mode="queued").json()["id"]
    assert browser.get(f"/v1/tasks/{other}").status_code == 404
    assert browser.get("/v1/tasks").status_code == 403
    assert browser.get("/v1/models").status_code == 403
    assert browser.post(f"/v1/tasks/{task_id}/token").status_code == 403
    assert browser.post(f"/v1/tasks/{task_id}/retry").status_code == 403
    assert browser.post(f"/v1/tasks/{task_id}/cancel").status_code == 200
    events = Client().get(answer.json()["events_url"])
    assert b"event: done" in body_of(events)


def test_a_token_in_a_url_opens_events_alone(caller: Caller, task_id: str):
    token = caller.post(f"/v1/tasks/{task_id}/token").json()["token"]
    assert Client().get(f"/v1/tasks/{task_id}?token={token}").status_code == 401
    assert Client().get(f"/v1/tasks/{task_id}/events?token={caller.text}").status_code == 401


def test_a_token_expires(caller: Caller, task_id: str, settings: Any):
    token = caller.post(f"/v1/tasks/{task_id}/token").json()["token"]
    settings.LLMTASKS = {**settings.LLMTASKS, "TASK_TOKEN_S": -1}
    assert status(f"Bearer {token}", f"/v1/tasks/{task_id}") == 401


def test_a_token_dies_with_its_key(caller: Caller, task_id: str):
    token = caller.post(f"/v1/tasks/{task_id}/token").json()["token"]
    ApiKey.objects.filter(id=caller.key.id).update(revoked_at=timezone.now())
    factories.in_force()
    assert status(f"Bearer {token}", f"/v1/tasks/{task_id}") == 401


@pytest.mark.parametrize("claims", [[], ["a", "b", "c"], "text", 5, None, [1, 2, 3]])
def test_a_token_of_other_claims_is_wrong(caller: Caller, claims: Any):
    token = auth.TOKEN_PREFIX + signing.dumps(claims, salt=auth.SALT)
    assert status(f"Bearer {token}") == 401


# --- Browsers ------------------------------------------------------------------------------------


def test_an_origin_that_is_set_may_call(caller: Caller, settings: Any):
    settings.CORS_ALLOWED_ORIGINS = ["https://app.example"]
    preflight = Client().options(
        "/v1/tasks",
        headers={
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,idempotency-key",
        },
    )
    assert preflight["Access-Control-Allow-Origin"] == "https://app.example"
    assert "idempotency-key" in preflight["Access-Control-Allow-Headers"]
    answer = caller.get("/v1/tasks", Origin="https://app.example")
    assert "location" in answer["Access-Control-Expose-Headers"]
    other = caller.get("/v1/tasks", Origin="https://evil.example")
    assert "Access-Control-Allow-Origin" not in other
