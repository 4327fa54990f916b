"""Where everything of one stack lies: `.data/`, and a short folder for its sockets."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from project.stack.errors import StackError

ROOT = Path(__file__).resolve().parent.parent.parent

# A socket's path may have 107 bytes; the longest name below it is `supervisor.sock.<pid>`.
LONGEST_SOCKET_DIR = 80
# What needs quoting nowhere: neither in a URL nor in a libpq list nor in an ini file.
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")


@dataclass(frozen=True)
class Layout:
    """The paths of one stack. Two stacks with different `data` share nothing."""

    data: Path

    @classmethod
    def at(cls, data: Path | str) -> "Layout":
        """The stack in `data`, whose folders are made where they are missing."""
        layout = cls(Path(data).expanduser().resolve())
        try:
            if not layout.data.exists():
                layout.data.mkdir(parents=True)
                # As root, Postgres runs as another user, who has to pass through.
                layout.data.chmod(0o711 if os.geteuid() == 0 else 0o700)
            for folder in (layout.data, layout.logs):
                folder.mkdir(exist_ok=True)
                probe = folder / ".write-test"
                probe.touch()
                probe.unlink()
        except OSError as error:
            raise StackError(
                f"can't write to {layout.data} ({error.strerror}): make it writable for this user"
            ) from None
        return layout

    @property
    def lock(self) -> Path:
        return self.data / "owner.lock"

    @property
    def logs(self) -> Path:
        return self.data / "logs"

    @property
    def postgres(self) -> Path:
        return self.data / "postgres"

    @property
    def valkey(self) -> Path:
        return self.data / "valkey"

    @property
    def supervisor_conf(self) -> Path:
        return self.data / "supervisord.conf"

    @property
    def credentials(self) -> Path:
        return self.data / "secrets.json"

    @property
    def environment(self) -> Path:
        """Settings of the stack that is up, for `python -m project.stack manage`."""
        return self.data / "environment.json"

    @property
    def demo(self) -> Path:
        return self.data / "demo.json"

    def sockets(self) -> Path:
        """The folder for sockets, made if missing: below `data` where the path allows it."""
        below = self.data / "run"
        if len(os.fsencode(below)) <= LONGEST_SOCKET_DIR and PLAIN_PATH.fullmatch(str(below)):
            folder = below
        else:
            name = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:12]
            folder = Path("/tmp") / f"llmtasks-{os.geteuid()}-{name}"  # noqa: S108 - checked below
        make_private(folder)
        return folder


def remove_sockets(layout: Layout) -> None:
    """Leave nothing in /tmp: the folder is made anew at the next start."""
    shutil.rmtree(layout.sockets(), ignore_errors=True)


def make_private(folder: Path) -> None:
    """Make `folder` ours alone. In /tmp someone else may have made it first: refused."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StackError(f"{folder} belongs to someone else: remove it")
    # See `Layout.at`.
    folder.chmod(0o711 if os.geteuid() == 0 else 0o700)


def write_private(path: Path, content: str) -> None:
    """Replace a file at once, readable for its owner only from its first byte on."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    part.replace(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file and leave our pid in it; False if another process holds it.

    The kernel frees it whatever way its holder ends, so that it is never stale.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield True


def holder(path: Path) -> int | None:
    """The pid of the process that holds the lock; None if nobody does."""
    if not path.exists():
        return None
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text.isdigit() else 0
    return None
