"""The product's real processes around a test: sandbox, web, dispatcher, a worker per lane.

    with Cluster.fresh(folder, number=0) as cluster:
        cluster.api.post("/v1/tasks", json=…)
        cluster.kill9("worker-default")
        cluster.restart("worker-default")

They run the commands of `project.stack.programs` on free ports, on a database and a Redis
database of their own, with short leases. Each is a process group of its own, so that it is killed
with what it started, and nothing else is.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
import redis

from project.stack.ports import free_port
from project.stack.processes import before_exec, tail
from project.stack.programs import LANES, Places, programs
from tests.acceptance.forks import Fork, Forks

# A line for each request says nothing in a test's report.
logging.getLogger("httpx").setLevel(logging.WARNING)

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "lt_acceptance00_only-for-tests-0123456789"
NAMES = ("sandbox", "web", "dispatcher", *(f"worker-{lane}" for lane in LANES))
# Each of what runs at the same time has a thousand of its own: a port is looked for seconds before
# it is taken.
FIRST_PORT = 24000
READY_S = 60.0
# The sandbox's address in a database that is copied for each cluster.
NOWHERE = "http://sandbox.invalid"
# Leases are short, so that what a dead process owned is taken up soon.
SETTINGS = {
    "LEASE_S": "6",
    "RENEW_S": "1",
    "DROP_AFTER_S": "4",
    "HINT_LOST_S": "5",
    "WORKER_CONCURRENCY": "24",
    "DB_POOL_SIZE": "6",
    "SECRET_KEY": "acceptance-" + 40 * "x",
    "SANDBOX_KEY": "sandbox",
    "DEMO_API_KEY": KEY,
    "ADMIN_USER": "admin",
    "ADMIN_PASSWORD": "admin-password",
    "DJANGO_SETTINGS_MODULE": "project.settings",
    "PYTHONUNBUFFERED": "1",
}


class Cluster:
    def __init__(
        self,
        folder: Path,
        database_url: str,
        redis_url: str,
        *,
        first_port: int = FIRST_PORT,
        settings: Mapping[str, str] | None = None,
        names: Sequence[str] = NAMES,
        copies: Mapping[str, int] | None = None,
    ) -> None:
        """`copies`: how many there are of a program, `{"worker-default": 2}`; the second is named
        `worker-default-2`."""
        self.folder = folder
        self.database_url = database_url
        port = free_port(first_port, 400)
        sandbox_port = free_port(first_port + 400, 400)
        self.base_url = f"http://127.0.0.1:{port}"
        self.sandbox_url = f"http://127.0.0.1:{sandbox_port}"
        self.key = KEY
        self.environment = {
            **os.environ,
            **SETTINGS,
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "SANDBOX_URL": self.sandbox_url,
            **(settings or {}),
        }
        places = Places(
            port=port,
            sandbox_port=sandbox_port,
            web_workers=1,
            web_threads=64,
            beat_schedule=str(folder / "beat-schedule"),
        )
        table = {p.name: p.command for p in programs(sys.executable, places)}
        self.commands = {
            name if number == 1 else f"{name}-{number}": table[name]
            for name in names
            for number in range(1, (copies or {}).get(name, 1) + 1)
        }
        self.running: dict[str, subprocess.Popen[bytes] | Fork] = {}
        self.api = httpx.Client(
            base_url=self.base_url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30.0
        )

    @classmethod
    @contextlib.contextmanager
    def fresh(cls, folder: Path, number: int, **options: Any) -> Iterator["Cluster"]:
        """A cluster on a new database of the tests' own servers. `number` tells apart what runs
        at the same time (0 to 7)."""
        name = f"cluster_{os.getpid()}_{number}"
        first_port = FIRST_PORT + 1000 * number
        server_url = os.environ["DATABASE_URL"]
        with new_database(server_url, name, template(server_url)) as database_url:
            redis_url = re.sub(r"(?:/\d*)?$", f"/{8 + number}", os.environ["REDIS_URL"], count=1)
            with redis.Redis.from_url(redis_url) as client:
                client.flushdb()
            cluster = cls(folder, database_url, redis_url, first_port=first_port, **options)
            cluster.rows(
                "UPDATE llmtasks_provider SET base_url = replace(base_url, %s, %s)",
                [NOWHERE, cluster.sandbox_url],
            )
            with cluster:
                yield cluster

    # --- from start to end ----------------------------------------------------------------------

    def prepare(self) -> None:
        """Migrate and seed an empty database."""
        prepare(self.environment)

    def __enter__(self) -> "Cluster":
        self.forks = Forks(self.environment, self.log("forks"))
        try:
            for name in self.commands:
                self.start(name)
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str, **more: str) -> None:
        """Start one program, with `more` in its environment; nothing where it runs already."""
        if self.is_alive(name):
            return
        # Postgres shows who is connected.
        more["PGAPPNAME"] = name
        if "LD_PRELOAD" not in more:
            self.running[name] = self.forks.start(self.commands[name], more, self.log(name))
            return
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                self.commands[name],
                cwd=ROOT,
                env={**self.environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before_exec,
            )

    def is_alive(self, name: str) -> bool:
        return name in self.running and self.running[name].poll() is None

    def kill9(self, name: str) -> None:
        """SIGKILL to the program and to everything that it started."""
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def terminate(self, name: str, patience_s: float = 30.0) -> None:
        """End it as an operator would; SIGKILL where that takes too long."""
        process = self.running[name]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        self.kill9(name)

    def restart(self, name: str) -> None:
        """Start it again, after an orderly end where it still runs."""
        if self.is_alive(name):
            self.terminate(name)
        self.start(name)

    def start_all(self) -> None:
        """Bring back what a test killed, and wait until it works."""
        for name in self.commands:
            self.start(name)
        self.wait_until_ready()

    def stop(self) -> None:
        self.api.close()
        for process in self.running.values():
            process.terminate()
        deadline = time.monotonic() + 15
        for name, process in list(self.running.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            self.kill9(name)
        self.forks.close()

    # --- what a test asks -----------------------------------------------------------------------

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def tails(self, lines: int = 30) -> str:
        """The ends of all logs, for a test's report."""
        return "\n".join(f"--- {name}\n{tail(self.log(name), lines)}" for name in self.commands)

    def manage(self, *arguments: str) -> str:
        """Run a management command; its output. Fails the test with its errors."""
        return manage(self.environment, *arguments)

    def rows(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """The rows of a query on the cluster's database."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    def bill(self) -> dict[str, Any]:
        """What the sandbox saw: `GET /_calls`."""
        return httpx.get(f"{self.sandbox_url}/_calls", timeout=10.0).json()

    def task(self, task_id: str) -> dict[str, Any]:
        answer = self.api.get(f"/v1/tasks/{task_id}")
        answer.raise_for_status()
        return answer.json()

    def queue(self, model: str, text: str = "hello", **fields: Any) -> str:
        """Queue a chat; the task's id."""
        answer = self.api.post("/v1/tasks", json=chat(model, text, **fields))
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def queue_many(self, bodies: Sequence[Mapping[str, Any]]) -> list[str]:
        """Queue up to 1,000 tasks at once; their ids in order."""
        answer = self.api.post("/v1/tasks/bulk", json={"tasks": list(bodies)})
        assert answer.status_code < 300, answer.text
        return [item["task"]["id"] if "task" in item else item["id"] for item in results(answer)]

    def finished(self, task_id: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """The task once it is final."""
        final = ("succeeded", "failed", "cancelled", "expired")
        wait_for(lambda: self.task(task_id)["status"] in final, timeout_s)
        return self.task(task_id)

    def send(self, path: str, body: Mapping[str, Any], **headers: str) -> socket.socket:
        """A caller whose request is on its way, and who may hang up at any moment."""
        place, raw = urlsplit(self.base_url), json.dumps(body).encode()
        lines = {
            "Host": place.netloc,
            "Authorization": f"Bearer {self.key}",
            "Content-Type": "application/json",
            "Content-Length": str(len(raw)),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        caller = socket.create_connection((place.hostname or "", place.port or 0), timeout=30)
        caller.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + raw)
        return caller

    def wait_until_ready(self) -> None:
        """Until every program does its work: the web server answers, somebody leads, each lane
        has a worker that serves the sandbox."""
        wait_for(self.is_ready, READY_S, step_s=0.1)

    def is_ready(self) -> bool:
        for name in self.commands:
            if not self.is_alive(name):
                code = self.running[name].returncode if name in self.running else "not started"
                raise AssertionError(f"{name} ended ({code}): {tail(self.log(name), 20)}")
        with contextlib.suppress(httpx.HTTPError):
            if "web" in self.commands and self.api.get("/readyz").status_code != 200:
                return False
            if "sandbox" in self.commands:
                httpx.get(f"{self.sandbox_url}/healthz").raise_for_status()
            workers = {name for name in self.commands if name.startswith("worker-")}
            return workers <= self.serving() and (not self.of("dispatcher") or self.is_led())
        return False

    def of(self, program: str) -> list[str]:
        """The names of a program's copies."""
        return [name for name in self.commands if re.fullmatch(rf"{program}(-\d+)?", name)]

    def serving(self) -> set[str]:
        """The workers that are alive and list the sandbox's queue of their lane."""
        rows = self.rows(
            "SELECT pid FROM llmtasks_worker WHERE role = 'worker'"
            " AND lease_until > clock_timestamp() AND queues ? ('sandbox.' || lane)"
        )
        serve = {pid for (pid,) in rows}
        return {name for name, process in self.running.items() if process.pid in serve}

    def is_led(self) -> bool:
        rows = self.rows(
            "SELECT w.pid FROM llmtasks_config c JOIN llmtasks_worker w ON w.id = c.leader"
            " WHERE c.leader_until > clock_timestamp()"
        )
        return bool(rows) and rows[0][0] in {self.running[n].pid for n in self.of("dispatcher")}


def chat(model: str, text: str = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a queued chat for `POST /v1/tasks`."""
    messages = [{"role": "user", "content": text}]
    given = {"model": model, "messages": messages, **fields.pop("input", {})}
    return {"kind": "chat", "mode": "queued", "input": given, **fields}


def results(answer: httpx.Response) -> list[dict[str, Any]]:
    body = json.loads(answer.content)
    return body["data"] if "data" in body else body["results"]


def wait_for(condition: Callable[[], Any], timeout_s: float, step_s: float = 0.05) -> Any:
    """Ask until the answer is true, and return it; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s"
        time.sleep(step_s)
    return answer


def manage(environment: Mapping[str, str], *arguments: str) -> str:
    done = subprocess.run(
        (sys.executable, "manage.py", *arguments),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"manage.py {arguments}: {done.stderr[-3000:]}"
    return done.stdout


def prepare(environment: Mapping[str, str]) -> None:
    manage(environment, "migrate", "--verbosity=0")
    manage(environment, "seed_demo", "--route", "slow-20000", "--route", "script")


# --- databases ------------------------------------------------------------------------------------


def template(server_url: str) -> str:
    """The name of a database on that server that is migrated and seeded, made on first use."""
    name = f"cluster_{code()}"
    with connected(server_url) as connection:
        # Test processes ask for it at once.
        connection.execute("SELECT pg_advisory_lock(hashtext(%s))", [name])
        known = "SELECT 1 FROM pg_database WHERE datname = %s"
        if not connection.execute(known, [name]).fetchone():
            with new_database(server_url, f"{name}_new") as database_url:
                prepare(
                    {**os.environ, **SETTINGS, "DATABASE_URL": database_url, "SANDBOX_URL": NOWHERE}
                )
                connection.execute(f'ALTER DATABASE "{name}_new" RENAME TO "{name}"')
    return name


def code() -> str:
    """A digest of the product's code, which decides what a new database holds."""
    digest = hashlib.sha256()
    for package in ("llmtasks", "project", "providers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def new_database(server_url: str, name: str, copied: str = "template1") -> Iterator[str]:
    """The URL of a new database on the server of `server_url`: empty, or a copy of one."""
    with connected(server_url) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{copied}"')
    try:
        yield urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))
    finally:
        with connected(server_url) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


def connected(server_url: str) -> psycopg.Connection[Any]:
    """A connection for what concerns the whole server."""
    admin = urlunsplit(urlsplit(server_url)._replace(path="/postgres"))
    return psycopg.connect(admin, autocommit=True)
