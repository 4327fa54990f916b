"""The secrets of one stack: made at random at its first start and kept."""

import json
import secrets
from collections.abc import Callable

from project.stack.errors import StackError
from project.stack.layout import Layout, write_private

MAKERS: dict[str, Callable[[], str]] = {
    "secret_key": lambda: secrets.token_urlsafe(48),
    "admin_password": lambda: secrets.token_urlsafe(12),
    "flower_password": lambda: secrets.token_urlsafe(12),
    "valkey_password": lambda: secrets.token_urlsafe(24),
    # The shape of an API key: lt_<public prefix>_<secret>.
    "api_key": lambda: f"lt_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}",
}


def load(layout: Layout) -> dict[str, str]:
    """The kept secrets, with those made that a newer version needs in addition."""
    kept: dict[str, str] = {}
    if layout.credentials.exists():
        try:
            kept = json.loads(layout.credentials.read_text())
        except (OSError, ValueError) as error:
            raise StackError(f"{layout.credentials} can't be read: {error}") from None
    found = {name: kept.get(name) or make() for name, make in MAKERS.items()}
    if found != kept:
        write_private(layout.credentials, json.dumps(found, indent=2) + "\n")
    return found
