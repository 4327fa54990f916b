"""The settings that one stack gives to its programs, and the user's own from `.env`."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from project.stack.errors import StackError
from project.stack.layout import ROOT, Layout
from project.stack.processes import MARK, PART
from project.stack.programs import Places

LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*")
ADMIN_USER = "admin"
FLOWER_USER = "flower"


def read_env_file(path: Path) -> dict[str, str]:
    """NAME=value lines, as docker compose reads them: no expansion, # begins a comment line."""
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise StackError(f"{path}, line {number}: give NAME=value")
        name, value = match.groups()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[name] = value
    return found


def with_env_file(environment: Mapping[str, str], path: Path) -> dict[str, str]:
    """The environment, completed from the file: what is set already wins."""
    return {**read_env_file(path), **{name: value for name, value in environment.items() if value}}


def number(environment: Mapping[str, str], name: str, default: int, most: int = 65535) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not text.isdigit() or not 1 <= int(text) <= most:
        raise StackError(f"{name} is {text!r}: give a number from 1 to {most}")
    return int(text)


def places(environment: Mapping[str, str], layout: Layout) -> Places:
    """Flower and the sandbox are PORT's neighbours, so that one variable moves all three."""
    port = number(environment, "PORT", 8000)
    return Places(
        bind=environment.get("BIND", "").strip() or "127.0.0.1",
        port=port,
        flower_port=number(environment, "FLOWER_PORT", port + 1),
        sandbox_port=number(environment, "SANDBOX_PORT", port + 2),
        web_workers=number(environment, "WEB_WORKERS", 2, most=256),
        web_threads=number(environment, "WEB_THREADS", 128, most=4096),
        grace_s=number(environment, "GRACE_S", 20, most=3600),
        beat_schedule=str(layout.data / "beat-schedule"),
    )


def for_programs(
    environment: Mapping[str, str],
    credentials: Mapping[str, str],
    where: Places,
    database_url: str,
    redis_url: str,
) -> dict[str, str]:
    """What every program finds in its environment."""
    return {
        "SANDBOX_KEY": "sandbox-needs-no-key",
        "FLOWER_URL": f"http://127.0.0.1:{where.flower_port}/",
        **environment,
        "SECRET_KEY": credentials["secret_key"],
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "SANDBOX_URL": f"http://127.0.0.1:{where.sandbox_port}",
        "FLOWER_BASIC_AUTH": f"{FLOWER_USER}:{credentials['flower_password']}",
        "PYTHONUNBUFFERED": "1",
    }


# Secrets that the user may choose, instead of those made up.
CHOSEN = {
    "SECRET_KEY": "secret_key",
    "ADMIN_PASSWORD": "admin_password",
    "FLOWER_PASSWORD": "flower_password",
    "DEMO_API_KEY": "api_key",
}


def chosen(environment: Mapping[str, str]) -> dict[str, str]:
    found = {ours: environment.get(name, "").strip() for name, ours in CHOSEN.items()}
    return {name: value for name, value in found.items() if value}


def for_seed(credentials: Mapping[str, str]) -> dict[str, str]:
    return {
        "DEMO_API_KEY": credentials["api_key"],
        "ADMIN_USER": ADMIN_USER,
        "ADMIN_PASSWORD": credentials["admin_password"],
    }


KEPT = ("DATABASE_URL", "REDIS_URL", "SECRET_KEY", "SANDBOX_URL", "SANDBOX_KEY")


def to_keep(environment: Mapping[str, str]) -> str:
    """What `manage` needs later, as JSON."""
    return json.dumps({name: environment[name] for name in KEPT}, indent=2) + "\n"


def kept(layout: Layout) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(layout.environment.read_text()).items()}
    except (OSError, ValueError):
        raise StackError("nothing is up here: run `make up` first") from None


def own() -> dict[str, str]:
    """Our own environment with the user's `.env`, less what marks another stack's processes."""
    found = with_env_file(os.environ, ROOT / ".env")
    for name in (MARK, PART):
        found.pop(name, None)
    return found
