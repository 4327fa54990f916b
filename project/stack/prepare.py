"""Brings the database to the present: tables, static files, the demo. One process for all."""

import hashlib
import io
import sys
from pathlib import Path

import django

from project.stack.layout import ROOT


def prepare(stamp: Path) -> None:
    from django.conf import settings
    from django.core.management import call_command

    call_command("migrate", verbosity=0, interactive=False)
    call_command("seed_demo", stdout=io.StringIO())
    state = static_state()
    if not (settings.STATIC_ROOT.exists() and stamp.exists() and stamp.read_text() == state):
        call_command("collectstatic", verbosity=0, interactive=False)
        stamp.write_text(state)


def static_state() -> str:
    """What the static files depend on: the packages that bring some, and our own. Collecting
    and compressing them anew would be a good part of a second start."""
    digest = hashlib.sha256((ROOT / "requirements.lock").read_bytes())
    for path in sorted((ROOT / "llmtasks").glob("static/**/*")):
        found = path.stat()
        digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    django.setup()
    prepare(Path(sys.argv[1]))
