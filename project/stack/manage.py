"""`manage`: manage.py with the settings of the stack that is up."""

import os
import sys
from pathlib import Path

from project.stack import environment
from project.stack.errors import StackError
from project.stack.layout import ROOT, Layout, holder


def manage(data: Path | str, command: list[str]) -> int:
    layout = Layout(Path(data).resolve())
    if holder(layout.lock) is None:
        raise StackError("nothing is up here: run `make up` first")
    settings = {**environment.own(), **environment.kept(layout)}
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, "manage.py", *command], settings)  # noqa: S606
