"""A tenant's client of the API, in the test's own process: Django's test client with a key."""

from typing import Any
from uuid import UUID

import orjson
from django.http.response import HttpResponseBase
from django.test import Client

from llmtasks import execute, pulse
from llmtasks.api import keys
from llmtasks.models import ApiKey, Status, Task, Tenant
from tests import factories

# A timer that fires after its test would find the database gone.
keys.WRITE_AFTER_S = 3600.0

MESSAGES = [{"role": "user", "content": "hello there"}]


class Caller:
    """`headers` go with every request; `text` is the key's."""

    def __init__(self, tenant: Tenant, **key: Any) -> None:
        self.tenant = tenant
        self.key, self.text = ApiKey.issue(tenant, "test", **key)
        self.key.save()
        self.client = Client(headers={"Authorization": f"Bearer {self.text}"})
        self.client.raise_request_exception = False
        factories.in_force()

    def get(self, path: str, **headers: str) -> Any:
        return self.client.get(path, headers=named(headers))

    def post(self, path: str, body: Any = None, **headers: str) -> Any:
        raw = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        return self.client.post(path, raw, content_type="application/json", headers=named(headers))

    def chat(
        self, model: str = "echo", *, headers: dict[str, str] | None = None, **body: Any
    ) -> Any:
        given = {"model": model, "messages": MESSAGES, **body}
        return self.post("/v1/chat/completions", given, **(headers or {}))

    def task(
        self, model: str = "echo", *, headers: dict[str, str] | None = None, **body: Any
    ) -> Any:
        return self.post("/v1/tasks", new_task(model, **body), **(headers or {}))


def named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def new_task(model: str = "echo", **fields: Any) -> dict[str, Any]:
    chat = {"model": model, "messages": MESSAGES, **fields.pop("input", {})}
    return {"kind": "chat", "input": chat, **fields}


def body_of(response: HttpResponseBase) -> bytes:
    """The whole body, of a stream too."""
    if response.streaming:
        try:
            return b"".join(response)  # type: ignore[attr-defined]
        finally:
            response.close()
    return bytes(response.content)  # type: ignore[attr-defined]


def frames_of(response: HttpResponseBase) -> list[tuple[str, str, Any]]:
    """The (id, event, data) of each server-sent event that has data."""
    found = []
    for block in body_of(response).decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in lines:
            text = lines["data"]
            data = text if text == "[DONE]" else orjson.loads(text)
            found.append((lines.get("id", ""), lines.get("event", ""), data))
    return found


def work_off(task_id: str | UUID) -> None:
    """Run a queued task here, as a worker would."""
    pulse.start()
    Task.objects.filter(id=task_id).update(status=Status.QUEUED, seq=1)
    execute.run_queued(UUID(str(task_id)), 1)
