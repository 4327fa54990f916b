"""The broker's side of a hint: one client per channel, no index of unacknowledged messages."""

from typing import Any

from celery import current_app
from uuid_utils.compat import uuid7

from llmtasks import queues, stores
from project.transport import Transport


def test_redis_means_our_transport_and_keeps_its_name() -> None:
    with current_app.connection_for_read() as connection:
        assert isinstance(connection.transport, Transport)
        # Flower chooses by it how it reads the queues.
        assert connection.as_uri().startswith("redis://")


def test_a_channel_makes_one_client_and_another_for_a_new_pool() -> None:
    with current_app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        client = channel._create_client()
        assert channel._create_client() is client
        channel._pool = None
        again = channel._create_client()
        assert again is not client
        assert again.connection_pool is channel.pool


def test_a_hint_is_taken_and_acknowledged_without_a_trace() -> None:
    provider, task_id = "transport-test", uuid7()
    queues.publish([(task_id, 1, provider, "default")])
    name = queues.queue_name(provider, "default")
    seen: list[Any] = []

    def take(body: Any, message: Any) -> None:
        seen.append(body)
        message.ack()

    with current_app.connection_for_read() as connection:
        queue = current_app.amqp.queues[name]
        with connection.Consumer(queue, callbacks=[take]):
            connection.drain_events(timeout=5)
    assert seen[0][0] == [str(task_id), 1]
    assert queues.hints_in([name]) == set()
    assert not stores.redis_client().keys("unacked*")


def test_a_hint_of_another_priority_goes_kombus_way() -> None:
    name = queues.queue_name("transport-test", "bulk")
    with queues.producers().acquire(block=True) as producer, producer.batch(10):
        producer.publish("[]", exchange="", routing_key=name, priority=3)
    # The queue of priority 3 is another list.
    client: Any = stores.redis_client()
    assert client.llen(name) == 0
    assert client.llen(f"{name}\x06\x163") == 1
