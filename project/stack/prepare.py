"""Brings the database to the present: tables, static files, the demo. One process for all.

A second `make up` on the same code and database finds it done, and what somebody changed since
(a password, a revoked key) as it was left.
"""

import hashlib
import io
from collections.abc import Mapping

import django
import psycopg

from project.stack.layout import ROOT, Layout

# What the result depends on beside the files: to whom it was done, and with which names.
NAMES = ("DATABASE_URL", "SANDBOX_URL", "DEMO_API_KEY", "ADMIN_USER", "ADMIN_PASSWORD")
STATIC = ROOT / "staticfiles"


def prepare() -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0, interactive=False)
    call_command("seed_demo", stdout=io.StringIO())
    call_command("collectstatic", verbosity=0, interactive=False)


def state(settings: Mapping[str, str]) -> str:
    """A digest of all that preparing depends on: code, packages, names and secrets."""
    digest = hashlib.sha256("\0".join(settings[name] for name in NAMES).encode())
    digest.update((ROOT / "requirements.lock").read_bytes())
    for package in ("project", "llmtasks", "providers"):
        for path in sorted((ROOT / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def is_done(layout: Layout, settings: Mapping[str, str]) -> bool:
    """Whether it was done for this very state, and the database still has it."""
    stamp = layout.data / "prepared"
    if not (STATIC.exists() and stamp.exists() and stamp.read_text() == state(settings)):
        return False
    try:
        with psycopg.connect(settings["DATABASE_URL"], connect_timeout=5) as connection:
            found = connection.execute("SELECT name FROM django_migrations WHERE app = 'llmtasks'")
            applied = {name for (name,) in found}
    except psycopg.Error:
        return False
    return applied >= {path.stem for path in (ROOT / "llmtasks/migrations").glob("0*.py")}


def remember(layout: Layout, settings: Mapping[str, str]) -> None:
    (layout.data / "prepared").write_text(state(settings))


if __name__ == "__main__":
    django.setup()
    prepare()
