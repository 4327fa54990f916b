"""Makes the virtual environment and installs a lock file into it, where that is still to do.

    python3 project/stack/bootstrap.py .venv requirements.lock

Run by make with a Python of the machine, before anything is installed: standard library only,
and nothing of this project is imported.
"""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PLATFORMS = {
    ("Linux", "x86_64"),
    ("Linux", "aarch64"),
    ("Darwin", "x86_64"),
    ("Darwin", "arm64"),
}
# The lock for developers holds everything that the plain one does.
INCLUDES = {"requirements-dev.lock": ("requirements-dev.lock", "requirements.lock")}


class BootstrapError(Exception):
    """The message is one line that says what is missing and how to get it."""


def check_python() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found = platform.python_version()
        raise BootstrapError(
            f"Python 3.11, 3.12 or 3.13 is needed and {sys.executable} is {found}:"
            " name a fitting one with `make PYTHON=/path/to/python3.13 …`"
        )


def check_platform() -> None:
    system, machine = platform.system(), platform.machine()
    if (system, machine) not in PLATFORMS:
        raise BootstrapError(
            f"there are no PostgreSQL and Valkey wheels for {system} on {machine}:"
            " use Linux or macOS on x86_64 or arm64, or docker compose up"
        )
    if system == "Linux" and platform.libc_ver()[0] != "glibc":
        raise BootstrapError(
            "there are no PostgreSQL wheels for a Linux without glibc (Alpine, say):"
            " use another distribution, or docker compose up"
        )


def check_venv_module() -> None:
    try:
        import ensurepip  # noqa: F401 - Debian packs it apart
        import venv  # noqa: F401
    except ImportError:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise BootstrapError(
            f"Python {version} has no venv module: install the package python{version}-venv"
            f" (Debian, Ubuntu: apt-get install python{version}-venv) and run make again"
        ) from None


def is_installed(venv: Path, lock: Path) -> bool:
    """Whether this very lock file was installed, to its end, into an environment that works."""
    stamp = venv / lock.name
    python = venv / "bin" / "python"
    return python.exists() and stamp.exists() and stamp.read_bytes() == lock.read_bytes()


def create(venv: Path) -> None:
    """Make the environment, anew where it is broken (its Python was removed, say)."""
    python = venv / "bin" / "python"
    if python.exists():
        works = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True)
        if works.returncode == 0:
            return
    check_venv_module()
    if venv.exists():
        shutil.rmtree(venv)
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[-300:]
        raise BootstrapError(f"the virtual environment {venv} can't be made: {reason}")


def install(venv: Path, lock: Path) -> None:
    packages = sum(1 for line in lock.read_text().splitlines() if "==" in line)
    sys.stdout.write(f"installing {packages} packages into {venv} (once, about a minute)…\n")
    sys.stdout.flush()
    done = subprocess.run(
        [
            *(str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"),
            *("--disable-pip-version-check", "--no-input"),
            *("--require-hashes", "--only-binary", ":all:", "-r", str(lock)),
        ]
    )
    if done.returncode:
        raise BootstrapError(
            f"pip could not install {lock.name} (its reason stands above): check the network"
            " and the package index, and run make again"
        )
    for name in INCLUDES.get(lock.name, (lock.name,)):
        shutil.copyfile(lock.with_name(name), venv / name)


def bootstrap(venv: Path, lock: Path) -> None:
    check_python()
    check_platform()
    if is_installed(venv, lock):
        return
    try:
        venv.parent.mkdir(parents=True, exist_ok=True)
        # Two makes at once on a fresh checkout: the second waits and finds all done.
        with venv.with_name(venv.name + ".lock").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not is_installed(venv, lock):
                create(venv)
                install(venv, lock)
    except OSError as error:
        raise BootstrapError(f"can't write {error.filename or venv}: {error.strerror}") from None


def main(arguments: list[str]) -> int:
    venv, lock = arguments
    try:
        bootstrap(Path(os.path.abspath(venv)), Path(lock).resolve())
    except BootstrapError as error:
        sys.stderr.write(f"llmtasks: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
