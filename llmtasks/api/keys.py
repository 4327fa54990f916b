"""API keys as requests use them: looked up once, then known until the configuration changes.

What was read under one `pulse.config_version()` holds until the pulse sees another: a revoked
key is refused within a second, and while Postgres is away known keys stay valid for as long as
the pulse says. `last_used_at` is written in batches, never by the request that uses the key.
"""

import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from uuid import UUID

from django.db import Error as DatabaseError

from llmtasks import pulse, stores
from llmtasks.models import ApiKey
from llmtasks.models.tenancy import split

logger = logging.getLogger(__name__)

MOST_KNOWN = 10_000
WRITE_AFTER_S = 5.0
WRITE_EVERY_S = 60.0

TOUCH = """
UPDATE llmtasks_apikey SET last_used_at = used.at
FROM (SELECT unnest(%(ids)s::uuid[]) AS id, unnest(%(times)s::timestamptz[]) AS at) used
WHERE llmtasks_apikey.id = used.id
"""


@dataclass(frozen=True, slots=True)
class Known:
    """A usable key."""

    key_id: UUID
    tenant_id: UUID
    scopes: frozenset[str]
    expires_at: float | None


class Keys:
    """What this process knows of keys: name (a text's SHA-256, or the id) → key, None for none."""

    def __init__(self) -> None:
        self.known: dict[bytes, Known | None] = {}
        self.version = -1
        self.lock = threading.Lock()

    def by_text(self, text: str) -> Known | None:
        """The usable key with this text."""
        try:
            prefix, hashed = split(text)
        except ValueError:
            return None
        name = hashlib.sha256(text.encode()).digest()
        return self._find(name, {"prefix": prefix}, hashed)

    def by_id(self, key_id: UUID) -> Known | None:
        """The usable key with this id."""
        return self._find(key_id.bytes, {"id": key_id}, None)

    def _find(self, name: bytes, wanted: dict[str, object], hashed: str | None) -> Known | None:
        version = pulse.config_version()
        if version != self.version:
            with self.lock:
                self.known, self.version = {}, version
        if name in self.known and pulse.config_is_fresh():
            found = self.known[name]
        else:
            found = read(wanted, hashed)
            with self.lock:
                # A version that changed meanwhile emptied the cache: this answer may be older.
                if self.version == version:
                    if len(self.known) >= MOST_KNOWN:
                        self.known = {}
                    self.known[name] = found
        if found is None or (found.expires_at is not None and found.expires_at <= time.time()):
            return None
        return found


def read(wanted: dict[str, object], hashed: str | None) -> Known | None:
    """The key from the database; None where it is unknown, revoked, expired or doesn't match."""
    key = ApiKey.objects.select_related("tenant").filter(**wanted).first()
    if key is None or not key.is_usable(datetime.now(UTC)):
        return None
    if hashed is not None and not key.matches(hashed):
        return None
    return Known(
        key.id,
        key.tenant_id,
        frozenset(key.scopes),
        key.expires_at.timestamp() if key.expires_at else None,
    )


class LastUsed:
    """When keys were used, on its way to the database."""

    def __init__(self) -> None:
        self.noted: dict[UUID, float] = {}
        self.unwritten: dict[UUID, datetime] = {}
        self.lock = threading.Lock()

    def note(self, key_id: UUID) -> None:
        """Remember the use of a key, at most once in WRITE_EVERY_S."""
        now = time.monotonic()
        if now - self.noted.get(key_id, float("-inf")) < WRITE_EVERY_S:
            return
        with self.lock:
            self.noted[key_id] = now
            is_first = not self.unwritten
            self.unwritten[key_id] = datetime.now(UTC)
        if is_first:
            timer = threading.Timer(WRITE_AFTER_S, self.write)
            timer.daemon = True
            timer.start()

    def write(self) -> None:
        """Write what was noted; what can't be written now is dropped, the next use brings it."""
        with self.lock:
            used, self.unwritten = self.unwritten, {}
        ids = sorted(used)
        try:
            stores.fetch(TOUCH, {"ids": ids, "times": [used[key_id] for key_id in ids]})
        except DatabaseError as error:
            logger.warning("the use of keys was not noted", extra={"error": str(error)})
        except Exception:
            logger.exception("the use of keys was not noted")
        finally:
            stores.release()


@cache
def keys() -> Keys:
    return Keys()


@cache
def last_used() -> LastUsed:
    return LastUsed()


def forget() -> None:
    """After a fork: locks and timers stayed behind."""
    keys.cache_clear()
    last_used.cache_clear()


os.register_at_fork(after_in_child=forget)
