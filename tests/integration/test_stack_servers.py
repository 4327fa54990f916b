"""The embedded servers, for real: started, killed, started again, left behind and found."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
import redis

from project.stack import postgres, processes, valkey
from project.stack.errors import StackError
from project.stack.layout import ROOT, Layout
from project.stack.owner import Servers, check_external
from tests.corridor import until


@pytest.fixture
def layout():
    """Below /tmp itself: as root, Postgres is another user, who can't pass pytest's folders."""
    layout = Layout.at(tempfile.mkdtemp(prefix="llmtasks-test-"))
    yield layout
    processes.end_all(layout.data)
    shutil.rmtree(layout.data)


@pytest.fixture
def servers(layout):
    servers = Servers(layout, "secret", test=True)
    servers.start()
    yield servers
    servers.stop()


def query(servers, sql):
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchone() if cursor.description else None


def client(servers):
    return redis.Redis.from_url(servers.redis_url)


def eventually(check, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return check()
        except (psycopg.OperationalError, redis.RedisError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_both_answer_and_end_without_a_trace(layout, servers):
    check_external(servers.database_url, servers.redis_url)
    locale = query(servers, "SELECT datlocale FROM pg_database WHERE datname = 'llmtasks'")
    assert locale == ("C.UTF-8",)
    with client(servers) as valkey_client:
        assert valkey_client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(servers.redis_url.replace("secret", "wrong")).ping()
    assert processes.find(layout.data)
    servers.stop()
    assert processes.find(layout.data) == []


def test_what_dies_is_started_again_and_keeps_its_data(layout):
    servers = Servers(layout, "secret")
    try:
        servers.start()
        query(servers, "CREATE TABLE kept (n int)")
        with client(servers) as valkey_client:
            valkey_client.set("kept", "1")
            valkey_client.execute_command("BGREWRITEAOF")
            time.sleep(1.1)
        for server in (servers.postgres, servers.valkey):
            server.process.kill()
            server.process.wait()
            # The old server's children take a moment to notice; a watch that comes too early
            # is repeated.
            deadline = time.monotonic() + 20
            while not server.is_alive() and time.monotonic() < deadline:
                servers.watch()
                time.sleep(0.2)
        eventually(lambda: (servers.watch(), query(servers, "SELECT n FROM kept")))
        with client(servers) as valkey_client:
            assert eventually(lambda: (servers.watch(), valkey_client.get("kept")))[1] == b"1"
    finally:
        servers.stop()


def test_the_next_owner_finds_the_same_addresses_and_data(layout):
    first = Servers(layout, "secret")
    first.start()
    query(first, "CREATE TABLE kept (n int)")
    first.stop()
    second = Servers(layout, "secret")
    try:
        second.start()
        assert (second.database_url, second.redis_url) == (first.database_url, first.redis_url)
        query(second, "SELECT n FROM kept")
    finally:
        second.stop()


def test_a_pid_file_that_names_a_process_of_someone_else_hurts_nobody(layout):
    first = Servers(layout, "secret", test=True)
    first.start()
    first.postgres.process.kill()
    first.postgres.process.wait()
    first.stop()
    # Its children hold its memory until they noticed.
    until(lambda: processes.find(layout.data) == [], 20)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        pid_file = layout.postgres / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        owner = pid_file.stat()
        pid_file.write_text("\n".join([str(bystander.pid), *lines[1:]]) + "\n")
        os.chown(pid_file, owner.st_uid, owner.st_gid)
        second = Servers(layout, "secret", test=True)
        try:
            second.start()
            query(second, "SELECT 1")
        finally:
            second.stop()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_data_of_another_version_is_refused(layout):
    layout.postgres.mkdir()
    (layout.postgres / "PG_VERSION").write_text("15\n")
    with pytest.raises(StackError, match="made by PostgreSQL 15 and this is 18"):
        postgres.child(layout)


def test_a_server_that_cannot_start_is_told_with_its_reason(layout):
    port = valkey.choose_port(layout)
    server = valkey.child(layout, port, "secret", test=True)
    (layout.valkey / "valkey.conf").write_text("no-such-setting yes\n")
    server.start()
    with pytest.raises(StackError, match=r"Valkey did not start: .*no-such-setting"):
        valkey.wait_until_ready(server, valkey.url(port, "secret"))
    server.stop()


def run(layout, *command, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "project.stack", "--data", str(layout.data), "run", "--", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_run_gives_servers_to_a_command_and_returns_its_status(layout):
    process = run(layout, "sh", "-c", "echo $DATABASE_URL $REDIS_URL $LLMTASKS_TEST; exit 7")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "/1/run/pg" in out and out.endswith("/0 1\n")
    assert not (layout.data / "1" / "postgres").exists()


def test_two_runs_at_a_time_have_servers_of_their_own(layout):
    first = run(layout, "sh", "-c", "echo $DATABASE_URL; sleep 60")
    address = first.stdout.readline()
    second = run(layout, "sh", "-c", "echo $DATABASE_URL")
    assert second.communicate(timeout=60)[0] != address
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM
    assert processes.find(Path(layout.data / "1")) == []


def test_a_run_that_was_killed_leaves_nothing_to_the_next(layout):
    first = run(layout, "sh", "-c", "echo up; exec sleep 60")
    first.stdout.readline()
    first.kill()
    first.communicate(timeout=60)
    second = run(layout, "true")
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert processes.find(Path(layout.data / "1")) == []


def test_run_of_no_such_command_is_told(layout):
    process = run(layout, "no-such-command", stderr=subprocess.PIPE)
    assert process.communicate(timeout=60)[1] == (
        "llmtasks: no-such-command can't be run: No such file or directory\n"
    )
    assert process.returncode == 1
