"""make's first step: a Python, an environment, the locks. And the command line's manners."""

import re
import subprocess
import sys

import pytest

from project.stack import __main__ as command_line
from project.stack import bootstrap
from project.stack.bootstrap import BootstrapError
from project.stack.layout import ROOT

SCRIPT = ROOT / "project" / "stack" / "bootstrap.sh"


def pins(name: str) -> set[str]:
    return set(re.findall(r"^([\w.-]+==[^\s;]+)", (ROOT / name).read_text(), re.M))


def test_the_lock_for_developers_holds_the_plain_one():
    assert pins("requirements.lock") <= pins("requirements-dev.lock")


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_locks_name_no_host(name):
    assert "://" not in (ROOT / name).read_text()


def find_python(tmp_path, **tools):
    """Run bootstrap.sh where the given commands are all that there is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cmp", "sh"):
        (folder / tool).symlink_to(f"/usr/bin/{tool}")
    for name, body in tools.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), str(tmp_path / "venv"), "requirements.lock"],
        cwd=ROOT,
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
    )


FITS = 'case "$1" in -c) exit 0;; esac; echo "$0 makes it"'
NO_ENSUREPIP = 'case "$2" in *ensurepip*) exit 1;; esac; ' + FITS


def test_no_python_is_told_in_one_line(tmp_path):
    done = find_python(tmp_path, python3="exit 1")
    assert done.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_python_that_can_make_environments_is_preferred(tmp_path):
    done = find_python(tmp_path, **{"python3.13": NO_ENSUREPIP, "python3.11": FITS})
    assert "python3.11 makes it" in done.stdout


def test_without_such_a_one_another_tells_what_it_lacks(tmp_path):
    done = find_python(tmp_path, **{"python3.12": NO_ENSUREPIP})
    assert "python3.12 makes it" in done.stdout


def test_a_python_without_venv_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(BootstrapError, match=r"apt-get install python3\.1\d-venv"):
        bootstrap.check_venv_module()


@pytest.mark.parametrize("system, machine", [("Windows", "AMD64"), ("Linux", "riscv64")])
def test_a_platform_without_wheels_is_told(monkeypatch, system, machine):
    monkeypatch.setattr(bootstrap.platform, "system", lambda: system)
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: machine)
    with pytest.raises(BootstrapError, match=f"{system} on {machine}"):
        bootstrap.check_platform()


def test_a_linux_without_glibc_is_told(monkeypatch):
    monkeypatch.setattr(bootstrap.platform, "system", lambda: "Linux")
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(bootstrap.platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(BootstrapError, match="without glibc"):
        bootstrap.check_platform()


def test_a_python_that_does_not_fit_is_told(monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 14, 0))
    with pytest.raises(BootstrapError, match=r"3\.11, 3\.12 or 3\.13 is needed"):
        bootstrap.check_python()


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """Where no environment is really made; `done` tells what was asked for."""
    done: list[str] = []

    def create(venv):
        done.append("create")
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(bootstrap, "create", create)
    monkeypatch.setattr(
        bootstrap.subprocess,
        "run",
        lambda command, **_: done.append("install") or subprocess.CompletedProcess(command, 0),
    )
    return tmp_path / "venv", done


def test_a_lock_is_installed_once_until_it_changes(tmp_path, venv):
    folder, done = venv
    lock = tmp_path / "requirements.lock"
    lock.write_text("a==1\n")
    bootstrap.bootstrap(folder, lock)
    bootstrap.bootstrap(folder, lock)
    assert done == ["create", "install"]
    lock.write_text("a==2\n")
    (folder / "bin" / "python").unlink()
    bootstrap.bootstrap(folder, lock)
    assert done == ["create", "install"] * 2


def test_the_lock_for_developers_stands_for_both(tmp_path, venv):
    folder, done = venv
    for name in ("requirements.lock", "requirements-dev.lock"):
        (tmp_path / name).write_text(name)
    bootstrap.bootstrap(folder, tmp_path / "requirements-dev.lock")
    bootstrap.bootstrap(folder, tmp_path / "requirements.lock")
    assert done == ["create", "install"]


def test_a_failed_install_is_tried_again(tmp_path, venv, monkeypatch):
    folder, _ = venv
    monkeypatch.setattr(
        bootstrap.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1)
    )
    (tmp_path / "requirements.lock").write_text("a==1\n")
    assert bootstrap.main([str(folder), str(tmp_path / "requirements.lock")]) == 1
    assert not bootstrap.is_installed(folder, tmp_path / "requirements.lock")


def test_a_place_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "requirements.lock").write_text("")
    arguments = [str(tmp_path / "file" / "venv"), str(tmp_path / "requirements.lock")]
    assert bootstrap.main(arguments) == 1
    assert "can't write" in capsys.readouterr().err


# --- the command line ---------------------------------------------------------------------------


def test_down_where_nothing_runs(tmp_path, capsys):
    assert command_line.main(["--data", str(tmp_path / "none"), "down"]) == 0
    assert command_line.main(["--data", str(tmp_path), "down"]) == 0
    assert capsys.readouterr().out == "nothing is running\n" * 2


def test_a_fault_is_one_line_and_exit_status_1(tmp_path, capsys):
    assert command_line.main(["--data", str(tmp_path), "manage", "check"]) == 1
    assert capsys.readouterr().err == "llmtasks: nothing is up here: run `make up` first\n"


def test_run_needs_a_command(capsys):
    assert command_line.main(["run"]) == 2
