"""Crash points: named, counted, and nothing where none is asked for."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from llmtasks import crash

ROOT = Path(__file__).parents[2]
PASSED = re.compile(r'crash\.point\("([^"]+)"\)')


def run(code: str, wanted: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from llmtasks import crash\n{code}"],
        cwd=ROOT,
        env={**os.environ, "LLMTASKS_CRASH": wanted},
        capture_output=True,
        text=True,
    )


def test_every_name_is_one_place_in_the_code():
    found = [
        name
        for path in (ROOT / "llmtasks").rglob("*.py")
        for name in PASSED.findall(path.read_text())
    ]
    assert sorted(found) == sorted(crash.POINTS)


def test_a_process_dies_at_the_pass_that_was_asked_for():
    code = "for n in range(3): print(n, flush=True); crash.point('attempt.begun')"
    died = run(code, "attempt.begun:2")
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, "0\n1\n")
    assert run(code, "attempt.begun").stdout == "0\n"
    for other in ("", "submit.saved"):
        lived = run(code, other)
        assert (lived.returncode, lived.stdout) == (0, "0\n1\n2\n")


@pytest.mark.parametrize("wanted", ["attempt.began", "submit.saved:0", "submit.saved:x", ":2x"])
def test_what_is_no_point_is_refused_at_the_start(wanted: str):
    with pytest.raises(ImproperlyConfigured, match="LLMTASKS_CRASH"):
        crash.armed(wanted)
    refused = run("", wanted)
    assert refused.returncode == 1
    assert "LLMTASKS_CRASH" in refused.stderr
