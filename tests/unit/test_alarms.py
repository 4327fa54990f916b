"""Alarms: each at its time, in order, and none that was called off."""

import subprocess
import sys
import threading
import time
from pathlib import Path

from llmtasks.alarms import Alarms


def test_each_is_called_once_in_the_order_of_their_moments():
    mine, called, done = Alarms(), [], threading.Event()
    now = time.monotonic()
    mine.at(now + 0.2, done.set)
    for number in (3, 1, 2):
        mine.at(now + number * 0.02, lambda number=number: called.append(number))
    assert done.wait(5)
    assert time.monotonic() >= now + 0.2
    assert called == [1, 2, 3]


def test_what_was_called_off_is_not_called_and_holds_nothing():
    mine, called, done = Alarms(), [], threading.Event()
    now = time.monotonic()
    off = mine.at(now + 0.02, lambda: called.append("off"))
    off.call_off()
    assert off.function is None
    mine.at(now + 0.05, done.set)
    assert done.wait(5)
    assert not called
    assert not mine.heap


def test_one_that_fails_takes_no_other_with_it(caplog):
    mine, done = Alarms(), threading.Event()
    mine.at(0.0, lambda: 1 / 0)
    mine.at(0.0, done.set)
    assert done.wait(5)
    assert "an alarm failed" in caplog.text


def test_one_that_is_due_before_those_that_wait_is_called_first():
    mine, done = Alarms(), threading.Event()
    mine.at(time.monotonic() + 60, lambda: None)
    time.sleep(0.05)  # its thread waits by now
    mine.at(time.monotonic(), done.set)
    assert done.wait(5)


FORK = """
import os, threading
from llmtasks import alarms

def rings():
    rang = threading.Event()
    alarms.at(0.0, rang.set)
    return rang.wait(5)

assert rings()
if os.fork() == 0:
    os._exit(0 if rings() else 1)
assert os.wait()[1] == 0
"""


def test_a_forked_process_has_a_thread_of_its_own():
    """In a process of its own, since threads beside a fork are warned of."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", FORK], cwd=root, check=True)
