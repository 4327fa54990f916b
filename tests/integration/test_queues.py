"""Hints in the broker, and wake-ups."""

import socket
import time

import pytest
import redis as redis_py
from uuid_utils.compat import uuid7

from llmtasks import queues, stores


def test_a_hint_names_the_task_of_its_provider(redis):
    hints = [(uuid7(), 3, "openai", "bulk"), (uuid7(), 1, "azure", "bulk")]
    queues.publish(hints)
    ids = [f"{task_id}.{seq}" for task_id, seq, *_ in hints]
    assert queues.hints_in(["openai.bulk", "azure.bulk", "other.bulk"]) == set(ids)
    assert queues.hints_in(["azure.bulk"]) == {ids[1]}
    message = queues_message("openai.bulk")
    assert message["headers"]["task"] == "tasks.openai"
    assert message["headers"]["argsrepr"] == f"('{hints[0][0]}', 3)"


def queues_message(name: str) -> dict:
    from llmtasks.bodies import orjson

    [raw] = stores.redis_client().lrange(name, 0, -1)
    return orjson.loads(raw)


def test_names_say_provider_and_lane():
    assert queues.all_queues(["b", "a"], "bulk") == ["a.bulk", "b.bulk"]
    assert queues.lanes() == ["interactive", "default", "bulk"]


def test_nobody_waits_for_a_redis_that_froze(monkeypatch, settings):
    stores.hasty_client.cache_clear()
    monkeypatch.setattr(queues, "_away_until", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        settings.REDIS_URL = f"redis://127.0.0.1:{frozen.getsockname()[1]}"
        began = time.monotonic()
        try:
            queues.wake()
            assert time.monotonic() - began < stores.REDIS_TIMEOUT_S
        finally:
            stores.hasty_client.cache_clear()
    assert queues._away_until > began


def test_while_redis_is_away_nobody_tries_to_wake_again_and_again(monkeypatch):
    tried = []

    def away(_: float) -> redis_py.Redis:
        tried.append(1)
        return redis_py.Redis(host="127.0.0.1", port=1, retry=None)

    monkeypatch.setattr(queues, "hasty_client", away)
    monkeypatch.setattr(queues, "AWAY_S", 60.0)
    for _ in range(100):
        queues.wake()
    assert len(tried) == 1
    monkeypatch.setattr(queues, "_away_until", time.monotonic())
    queues.wake()
    assert len(tried) == 2


def test_it_is_told_that_redis_is_away(monkeypatch):
    monkeypatch.setattr(
        queues, "redis_client", lambda: redis_py.Redis(host="127.0.0.1", port=1, retry=None)
    )
    with pytest.raises(redis_py.RedisError):
        queues.hints_in(["a.bulk"])
