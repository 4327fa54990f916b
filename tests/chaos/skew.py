"""Processes whose clock is wrong: `skewed.c`, compiled for this machine, in their environment."""

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "skewed.c"


def library(folder: Path) -> Path:
    """Raises `SystemExit` where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("a C compiler is needed: processes with a wrong clock are part of this")
    target = folder / "skewed.so"
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", target, SOURCE, "-ldl", "-lm"], check=True
    )
    return target


def environment(shared: Path, seconds: float) -> dict[str, str]:
    return {"LD_PRELOAD": str(shared), "SKEW_S": str(seconds)}
