import os
import subprocess
import sys
import time

import pytest

from project.stack import processes
from project.stack.processes import MARK, PROGRAM, SERVER, Child, marked

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True);"
    "time.sleep(60)",
]


@pytest.fixture
def spawn():
    """Starts processes, waits for their first line, and ends them whatever happens."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command, environment):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        started.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_only_what_carries_the_mark_is_found_and_ended(tmp_path, spawn):
    ours = spawn(SLEEP, marked(tmp_path, PROGRAM, os.environ))
    other = spawn(SLEEP, marked(tmp_path / "other", PROGRAM, os.environ))
    unmarked = spawn(SLEEP, dict(os.environ))
    assert [process.pid for process in processes.find(tmp_path)] == [ours.pid]
    assert processes.end_all(tmp_path) == 1
    assert ours.wait(5) is not None
    assert other.poll() is None
    assert unmarked.poll() is None
    assert processes.end_all(tmp_path) == 0


def test_parts_are_told_apart(tmp_path, spawn):
    server = spawn(SLEEP, marked(tmp_path, SERVER, os.environ))
    program = spawn(SLEEP, marked(tmp_path, PROGRAM, os.environ))
    assert processes.end(tmp_path, PROGRAM, 5) == 1
    assert program.wait(5) is not None
    assert server.poll() is None


def test_what_does_not_end_by_itself_is_killed(tmp_path, spawn):
    stubborn = spawn(STUBBORN, marked(tmp_path, PROGRAM, os.environ))
    assert processes.end(tmp_path, PROGRAM, 0.2) == 1
    assert stubborn.wait(5) is not None


def test_a_grandchild_whose_parent_was_killed_is_found(tmp_path):
    script = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']);"
        "print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env=marked(tmp_path, PROGRAM, os.environ),
        stdout=subprocess.PIPE,
    )
    grandchild = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert [process.pid for process in processes.find(tmp_path)] == [grandchild]
    assert processes.end_all(tmp_path) == 1


def child(tmp_path, command):
    return Child("test", command, tmp_path / "log", marked(tmp_path, SERVER, os.environ))


def test_a_child_lives_in_a_session_of_its_own_until_it_is_stopped(tmp_path):
    sleeper = child(tmp_path, SLEEP)
    assert not sleeper.is_alive()
    sleeper.start()
    assert sleeper.is_alive()
    assert os.getsid(sleeper.process.pid) == sleeper.process.pid
    while not sleeper.log.read_text():
        time.sleep(0.01)
    sleeper.stop()
    assert not sleeper.is_alive()
    assert "up" in processes.tail(sleeper.log)
    sleeper.stop()


def test_a_child_that_does_not_stop_is_killed(tmp_path):
    stubborn = child(tmp_path, STUBBORN)
    stubborn.patience_s = 0.2
    stubborn.start()
    while not stubborn.log.read_text():
        time.sleep(0.01)
    started = time.monotonic()
    stubborn.stop()
    assert time.monotonic() - started < 4
    assert processes.find(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children")
def test_children_end_when_the_owner_is_killed(tmp_path):
    script = f"""
import os, sys, time
from pathlib import Path
from project.stack.processes import Child, SERVER, marked
data = Path({str(tmp_path)!r})
Child("test", ["sleep", "60"], data / "log", marked(data, SERVER, os.environ)).start()
print("up", flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    owner.stdout.readline()
    assert len(processes.find(tmp_path)) == 1
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 5
    while processes.find(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes.find(tmp_path) == []


def test_signals_end_the_owner_once(tmp_path):
    script = """
import os, signal
from project.stack import processes
from project.stack.errors import Stopped
processes.raise_on_signals()
try:
    os.kill(os.getpid(), signal.SIGHUP)
except Stopped as stopped:
    assert stopped.args == (signal.SIGHUP,)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "still here\n", done.stderr


def test_a_log_that_grew_too_long_moves_aside(tmp_path):
    log = tmp_path / "some.log"
    processes.rotate(log, 10, kept=2)
    with log.open("ab") as writer:
        for text in (b"first first\n", b"second second\n", b"third third\n"):
            writer.write(text)
            writer.flush()
            processes.rotate(log, 10, kept=2)
        writer.write(b"small\n")
    processes.rotate(log, 10, kept=2)
    assert log.read_text() == "small\n"
    assert (tmp_path / "some.log.1").read_text() == "third third\n"
    assert (tmp_path / "some.log.2").read_text() == "second second\n"
    assert len(list(tmp_path.iterdir())) == 3


def test_the_end_of_a_log_is_one_line(tmp_path):
    assert processes.tail(tmp_path / "none") == ""
    (tmp_path / "log").write_text("a\nb\nc\nd\n")
    assert processes.tail(tmp_path / "log") == "b / c / d"


def test_the_mark_is_the_data_folder(tmp_path):
    assert marked(tmp_path, SERVER, {"A": "1"})[MARK] == str(tmp_path)
