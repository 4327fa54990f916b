"""Celery's Redis transport with one client per channel, and messages in batches by orjson.

kombu makes a new client object for each command, which costs more than the command. A client is
safe to share: it takes a connection from the pool for each.
"""

from typing import Any

import orjson
from kombu.transport import TRANSPORT_ALIASES, redis


class Channel(redis.Channel):
    shared: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous=True)  # type: ignore[misc]
        # A lost connection may have brought a new pool.
        if self.shared is None or self.shared.connection_pool is not self.pool:
            self.shared = super()._create_client()  # type: ignore[misc]
        return self.shared

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        batch = kwargs.get("_publish_batch")
        if batch is None or message["properties"].get("priority"):
            super()._put(queue, message, **kwargs)
        else:
            batch.add("lpush", queue, orjson.dumps(message))


class Transport(redis.Transport):
    Channel = Channel


def install() -> None:
    """Have `redis://` mean this transport, in Flower too."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{Transport.__qualname__}"
