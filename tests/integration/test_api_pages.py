"""What machines and people open without a key: health, schema, docs."""

import re
from typing import Any

import pytest
from django.contrib.staticfiles import finders
from django.db import OperationalError
from django.test import Client
from redis import ConnectionError as RedisAway

from llmtasks import stores
from llmtasks.models import Config
from tests import factories


def test_alive_asks_no_store(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "fetch", None)
    monkeypatch.setattr(stores, "redis_client", None)
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.usefixtures("account")
def test_ready_names_what_is_missing(client: Client):
    answer = client.get("/readyz")
    body = answer.json()
    assert (answer.status_code, body["status"]) == (200, "degraded")
    assert body["postgres"]["ok"] and body["redis"]["ok"]
    assert not body["dispatcher"]["ok"] and not body["workers"]["ok"]


@pytest.mark.usefixtures("account")
def test_ready_when_everything_runs(client: Client):
    leader = factories.worker(lane="", role="dispatcher")
    for lane in ("interactive", "default", "bulk"):
        factories.worker(lane=lane)
    factories.worker(lane="bulk", alive=False)
    Config.objects.update_or_create(
        id=1, defaults={"leader": leader.id, "leader_until": leader.lease_until}
    )
    body = client.get("/readyz").json()
    assert body["status"] == "ready"
    assert body["workers"]["lanes"] == {"interactive": 1, "default": 1, "bulk": 1}


def raises(error: Exception) -> Any:
    def away(*_: object) -> None:
        raise error

    return away


@pytest.mark.usefixtures("account")
def test_not_ready_without_postgres(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "fetch", raises(OperationalError("at 10.0.0.1 as admin")))
    answer = client.get("/readyz")
    assert (answer.status_code, answer["Retry-After"]) == (503, "2")
    assert answer.json()["postgres"] == {"ok": False, "error": "OperationalError"}
    assert answer.json()["redis"]["ok"]


@pytest.mark.usefixtures("account")
def test_degraded_without_redis(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "redis_client", raises(RedisAway("away")))
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["redis"]["ok"]) == (200, False)


def test_the_schema_describes_every_path(client: Client):
    schema = client.get("/v1/schema").json()
    assert schema["openapi"].startswith("3.1")
    assert set(schema["paths"]) == {
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/feedback/export",
        "/v1/prompts",
        "/v1/prompts/{name}",
        "/v1/prompts/{name}/labels",
        "/v1/prompts/{name}/versions/{number}",
        "/v1/providers",
        "/v1/tasks",
        "/v1/tasks/bulk",
        "/v1/tasks/{task_id}",
        "/v1/tasks/{task_id}/cancel",
        "/v1/tasks/{task_id}/retry",
        "/v1/tasks/{task_id}/steps",
        "/v1/tasks/{task_id}/decide",
        "/v1/tasks/{task_id}/token",
        "/v1/tasks/{task_id}/events",
        "/v1/tasks/{task_id}/feedback",
        "/v1/tools",
        "/v1/tools/{name}/invoke",
        "/v1/workflows",
        "/v1/workflows/{name}",
    }
    chat = schema["components"]["schemas"]["ChatBody"]
    assert {"model", "messages", "stream", "background"} <= set(chat["properties"])
    assert schema["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"


def test_the_docs_need_no_remote_asset(client: Client):
    page = client.get("/v1/docs").content.decode()
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert links and all(link.startswith("/static/") for link in links)
    assert all(finders.find(link.removeprefix("/static/")) for link in links)
    assert "https://" not in page


def test_the_root_leads_to_the_docs(client: Client):
    answer = client.get("/")
    assert (answer.status_code, answer["Location"]) == (302, "/v1/docs")
