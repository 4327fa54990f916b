"""The application under load: its own web server, dispatcher and worker, as `make up` runs them."""

import http.client
import json
import os
import secrets
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis

from project.stack.processes import Child, tail
from project.stack.programs import Places, programs
from tests.benchmarks.upstream import Upstream, own_port

LANE = "default"
RUN = ("web", "dispatcher", f"worker-{LANE}")
READY_S = 60.0
FAMILY = "bench"


def environment() -> dict[str, str]:
    """What every process finds, this one too, before Django's settings are loaded."""
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "SECRET_KEY": secrets.token_urlsafe(48),
        "BENCH_KEY": "bench",
        "PYTHONUNBUFFERED": "1",
    }


def route(delay_ms: int) -> str:
    return f"after-{delay_ms}-ms"


def configure(upstream: Upstream, delays_ms: tuple[int, ...]) -> str:
    """Tables, a key, and for each delay a provider with a route and a price; the key's text."""
    import django

    django.setup()
    from django.core.management import call_command

    from llmtasks.models import ApiKey, Price, Tenant

    call_command("migrate", verbosity=0, interactive=False)
    rates = dict.fromkeys(
        ("input", "cached_input", "cache_write_5m", "cache_write_1h", "output", "reasoning"),
        Decimal(1),
    )
    with open(os.devnull, "w") as nowhere:
        for delay in delays_ms:
            call_command(
                "add_provider",
                f"after-{delay}",
                adapter="compatible",
                base_url=upstream.base_url(delay),
                key="env:BENCH_KEY",
                price_family=FAMILY,
                route=[f"{route(delay)}={upstream.model(delay)}"],
                stdout=nowhere,
            )
            Price.objects.get_or_create(family=FAMILY, model=upstream.model(delay), defaults=rates)
    tenant, _ = Tenant.objects.get_or_create(name="bench")
    key, text = ApiKey.issue(tenant, "bench")
    key.save()
    return text


@dataclass
class Application:
    """The processes, and what they cost so far."""

    folder: Path
    environment: dict[str, str]
    key: str
    places: Places = field(default_factory=lambda: Places(port=own_port(12000)))
    children: dict[str, Child] = field(default_factory=dict)
    servers: dict[str, psutil.Process] = field(default_factory=dict)

    def start(self) -> None:
        for program in programs(sys.executable, self.places):
            if program.name in RUN:
                log = self.folder / f"{program.name}.log"
                log.unlink(missing_ok=True)
                child = Child(program.name, list(program.command), log, self.environment)
                self.children[program.name] = child
                child.start()
        self.servers = find_servers(self.environment)
        self.wait_until_ready()

    def stop(self) -> None:
        for child in self.children.values():
            if child.process:
                child.process.terminate()
        for child in self.children.values():
            child.stop()

    def wait_until_ready(self) -> None:
        """Until the web server, a leading dispatcher and a worker of the lane are there."""
        answer: Any = "no answer"
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                _, answer = self.ask("GET", "/readyz")
                if answer["dispatcher"]["ok"] and answer["workers"]["lanes"][LANE]:
                    return
            time.sleep(0.1)
        logs = " / ".join(tail(child.log) for child in self.children.values())
        raise SystemExit(f"the application is not ready: {answer} ({logs})")

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.places.port, timeout=60)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {**self.headers, **headers})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", "Authorization": self.authorization}

    @property
    def authorization(self) -> str:
        return f"Bearer {self.key}"

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.places.port}{path}"

    def roots(self) -> dict[str, psutil.Process]:
        found = dict(self.servers)
        for name, child in self.children.items():
            if child.process:
                found[name.partition("-")[0]] = psutil.Process(child.process.pid)
        return found

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU so far, by web, dispatcher, worker, postgres, valkey."""
        return {name: cpu_of(root) for name, root in self.roots().items()}

    def rss_mb(self, name: str) -> float:
        """Resident memory of the program's largest process."""
        root = self.roots()[name]
        sizes = []
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss)
        return round(max(sizes) / 2**20, 1)


def cpu_of(root: psutil.Process) -> float:
    """Of a process, its descendants, and those of them that ended."""
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


def find_servers(environment: dict[str, str]) -> dict[str, psutil.Process]:
    """The processes of Postgres and Valkey, where they run on this machine."""
    found = {}
    with psycopg.connect(environment["DATABASE_URL"]) as connection:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
        with suppress(psutil.Error):
            backend = psutil.Process(row[0] if row else 0)
            parent = backend.parent()
            if parent is not None and "postgres" in parent.name():
                found["postgres"] = parent
    with redis.Redis.from_url(environment["REDIS_URL"]) as client, suppress(psutil.Error):
        info: Any = client.info("server")
        server = psutil.Process(info["process_id"])
        if "valkey" in server.name() or "redis" in server.name():
            found["valkey"] = server
    return found


def per_1000(
    before: dict[str, float], after: dict[str, float], name: str, count: int
) -> float | None:
    """Seconds of CPU per 1,000 pieces of work; None for a server that runs elsewhere."""
    if name not in before or not count:
        return None
    return round((after[name] - before[name]) * 1000 / count, 4)
