"""`make up` as a new user runs it: in a folder with nothing but the checkout, from outside."""

import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from project.stack import demo, processes
from project.stack.demo import Demo
from project.stack.layout import ROOT
from project.stack.ports import free_port, is_free

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# What the tests' own run is told must not reach the stack under test.
OURS = (
    *("DATABASE_URL", "REDIS_URL", "SECRET_KEY", "DJANGO_SETTINGS_MODULE", "LLMTASKS_TEST"),
    *("DEBUG", "PORT", "FLOWER_PORT", "SANDBOX_PORT", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"),
)
READY_S = 180


def checkout() -> Path:
    """A copy of what git knows of, as a clone has it. Below /tmp itself: as root, Postgres is
    another user, who can't pass pytest's folders."""
    folder = Path(tempfile.mkdtemp(prefix="llmtasks-up-"))
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def free_ports() -> int:
    """The first of three free ports in a row."""
    while True:
        port = free_port(21000, 2000)
        if is_free(port + 1) and is_free(port + 2):
            return port


class Checkout:
    """A folder in which make is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / ".data"
        self.output = folder / "up.out"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in OURS and not name.startswith(("COV_CORE", "PYTEST"))
        }
        # The tests' own environment instead of one more that pip fills for a minute.
        self.environment |= {"VENV": sys.prefix, "PORT": str(free_ports())}

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=READY_S,
        )

    @contextmanager
    def up(self):
        with self.output.open("w") as out:
            process = subprocess.Popen(
                ["make", "up"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + READY_S
            while "Up after" not in self.output.read_text():
                assert process.poll() is None, self.told()
                assert time.monotonic() < deadline, self.told()
                time.sleep(0.1)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)

    def told(self) -> str:
        logs = (f"== {log.name}\n{log.read_text()[-1500:]}" for log in self.data.glob("logs/*.log"))
        return self.output.read_text() + "\n".join(logs)

    def demo(self) -> Demo:
        return Demo(**json.loads((self.data / "demo.json").read_text()))

    def owner(self) -> int:
        return int((self.data / "owner.lock").read_text())

    def program(self, name: str) -> psutil.Process:
        """The process of that name which the process manager itself started."""
        for process in processes.find(self.data, processes.PROGRAM):
            try:
                is_it = process.environ().get("SUPERVISOR_PROCESS_NAME") == name
                if is_it and "supervisor" in " ".join(process.parent().cmdline()):
                    return process
            except (psutil.Error, AttributeError):
                continue
        raise LookupError(name)


@pytest.fixture
def checked_out():
    here = Checkout(checkout())
    yield here
    processes.end_all(here.data)
    shutil.rmtree(here.folder)


def eventually(check, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if result := check():
                return result
        except (OSError, LookupError):
            pass
        assert time.monotonic() < deadline, check
        time.sleep(0.1)


def test_up_from_an_empty_folder_to_the_last_process(checked_out):
    with checked_out.up():
        found = checked_out.demo()
        assert stat.S_IMODE((checked_out.data / "demo.json").stat().st_mode) == 0o600
        task = demo.run_inline(found.base_url, found.api_key)
        assert task["status"] == "succeeded"
        check_what_was_printed(checked_out.output.read_text())
        check_links(found)
        check_servers(found)
        second = checked_out.make("up")
        assert second.returncode != 0
        assert "it is already up here" in second.stderr
        check_web_is_started_again(checked_out, found)
        managed = checked_out.make("manage", "ARGS=check")
        assert "no issues" in managed.stdout, managed.stderr
        os.kill(checked_out.owner(), signal.SIGKILL)
    eventually(lambda: not processes.find(checked_out.data))

    with checked_out.up() as make:
        assert checked_out.demo() == found
        status, kept = demo.get(f"{found.base_url}/v1/tasks/{task['id']}", found.api_key)
        assert (status, kept["status"]) == (200, "succeeded")
        down = checked_out.make("down")
        assert (down.returncode, down.stdout) == (0, "everything has ended\n")
        assert make.wait(5) == 0
    assert processes.find(checked_out.data) == []
    assert checked_out.make("down").stdout == "nothing is running\n"


def check_what_was_printed(output: str) -> None:
    """Both answers, and lines that work as they stand."""
    assert "inline   'Hello, inline!'" in output
    assert "queued   'Hello, queued!'" in output
    lines = output.splitlines()
    if shutil.which("curl"):
        command = next(line for line in lines if line.startswith("curl "))
        answer = subprocess.run([*shlex.split(command), "-s"], capture_output=True, text=True)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Hello"
    begin = next(number for number, line in enumerate(lines) if line.startswith("from openai"))
    program = "\n".join(lines[begin : begin + 4])
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout == "Hello\n", answer.stderr


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def check_links(found: Demo) -> None:
    for address in (f"{found.base_url}/v1/docs", found.admin_url):
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert answer.status == 200
    assert eventually(lambda: status_of(found.flower_url)) == 401
    login = b64encode(f"{found.flower_user}:{found.flower_password}".encode()).decode()
    request = urllib.request.Request(
        f"{found.flower_url}broker", headers={"Authorization": f"Basic {login}"}
    )

    def shows_the_queues():
        with urllib.request.urlopen(request, timeout=10) as answer:
            return b"sandbox.default" in answer.read()

    eventually(shows_the_queues)


def check_servers(found: Demo) -> None:
    with psycopg.connect(found.database_url) as connection:
        settings = "SELECT current_setting('fsync'), current_setting('synchronous_commit')"
        assert connection.execute(settings).fetchone() == ("on", "on")
    with redis.Redis.from_url(found.redis_url) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}


def check_web_is_started_again(checked_out: Checkout, found: Demo) -> None:
    killed = checked_out.program("web")
    # Its workers go on for a moment without it, and could be taken for the new one's.
    old = [killed, *killed.children()]
    killed.kill()
    psutil.wait_procs(old, timeout=20)
    eventually(lambda: checked_out.program("web").pid != killed.pid)
    eventually(lambda: demo.get(f"{found.base_url}/readyz")[0] == 200)
    assert demo.run_queued(found.base_url, found.api_key)["status"] == "succeeded"


@pytest.mark.parametrize(
    "environment, told",
    [
        ({"PORT": "taken"}, "port taken is taken: give another one"),
        ({"PORT": "http"}, "PORT is 'http'"),
        ({"DATABASE_URL": "postgresql://u@127.0.0.1:1/x"}, "DATABASE_URL: PostgreSQL can't be"),
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "REDIS_URL: Redis can't be reached"),
    ],
    ids=["taken", "no-port", "postgres", "redis"],
)
def test_what_is_wrong_is_told_in_one_line(checked_out, environment, told):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        given = {name: port if value == "taken" else value for name, value in environment.items()}
        done = checked_out.make("up", **given)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert done.stdout == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("llmtasks: " + told.replace("taken is", f"{port} is"))
    assert processes.find(checked_out.data) == []
