"""The short form of every proof of `make chaos`: all of its conditions hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import traces
from tests.chaos.__main__ import PROOFS

ROOT = Path(__file__).parents[2]
# Limits hold over a second, people wait a part of one, and a hint counts from its release.
ALONE = {"crash", "limits", "traces"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.alone if name in ALONE else ()) for name in PROOFS],
)
def test_the_short_form_holds(name: str, tmp_path: Path):
    if name == "traces" and not traces.DATA.is_dir():
        # They are others' data, which no clone brings. `make chaos` fails without them.
        pytest.skip("no traces beside the checkout")
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    # Not the number of the cluster that this process's other tests share.
    number = 4 + worker % 4
    command = [sys.executable, "-m", "tests.chaos", name, "--short", "--number", str(number)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"chaos-{name}.json").read_text())
    assert found["short"] is True
    assert found["conditions"]
    assert all(found["conditions"].values())
