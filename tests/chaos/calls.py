"""Inline calls whose client repeats them, with the same key, until they are answered."""

import time
import uuid
from collections.abc import Mapping
from typing import Any

import httpx

PATIENCE_S = 120.0


def insist(client: httpx.Client, body: Mapping[str, Any]) -> dict[str, Any]:
    """The task that it became at last. What broke, is still under way or was interrupted is sent
    again; the native door tells an inline call's interruption in the task."""
    key = {"Idempotency-Key": str(uuid.uuid4())}
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            answer = client.post("/v1/tasks", json=body, headers=key)
        except httpx.TransportError:
            time.sleep(0.1)
            continue
        if answer.status_code in (200, 202) and not was_interrupted(answer.json()):
            return dict(answer.json())
        assert answer.status_code in (200, 409, 503), answer.text
        time.sleep(0.2)
    raise AssertionError(f"no answer within {PATIENCE_S:.0f} s")


def was_interrupted(task: Mapping[str, Any]) -> bool:
    return bool(task["error"]) and task["error"]["class"] == "Interrupted"
