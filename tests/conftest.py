"""What every test stands on: the environment that the settings are read from, and services.

Unit tests need no service. The others get a Postgres and a Valkey of their own through
`make test`; under xdist each process has its own database and its own Redis database number.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import django
import hypothesis
import pytest
from django.conf import settings

HAS_SERVICES = bool(os.environ.get("DATABASE_URL") and os.environ.get("REDIS_URL"))
# The folder of the locks of one run under xdist.
LOCKS = "LLMTASKS_TESTS_LOCKS"
NEED_SERVICES = {"integration", "acceptance", "chaos", "benchmarks"}


def redis_url_of_worker(url: str, worker: str) -> str:
    """The URL with a database number of its own for each xdist process (gw0 → 1, gw1 → 2)."""
    number = int(worker.removeprefix("gw")) + 1 if worker else 0
    return re.sub(r"(?:/\d*)?$", f"/{number}", url, count=1)


# Before Django's settings are loaded, below.
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
os.environ.setdefault("SECRET_KEY", "tests-only-" + 40 * "x")
if HAS_SERVICES:
    os.environ["REDIS_URL"] = redis_url_of_worker(
        os.environ["REDIS_URL"], os.environ.get("PYTEST_XDIST_WORKER", "")
    )
django.setup()
# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
# What `collectstatic` fills; tests find static files where they are written.
Path(settings.STATIC_ROOT).mkdir(exist_ok=True)


def folder_of(item: pytest.Item) -> str:
    """The folder below tests/ that a test stands in."""
    parts = Path(item.path).relative_to(Path(__file__).parent).parts
    return parts[0] if len(parts) > 1 else ""


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in {
        "acceptance": "drives real processes from outside",
        "chaos": "kills processes and servers",
        "slow": "takes more than a few seconds",
        "alone": "judges what a busy machine would change: no other test runs beside it",
    }.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Before xdist starts its processes: with this in their environment they would load the
    settings before they come to the lines above."""
    if session.config.getoption("numprocesses", None):
        os.environ.pop("DJANGO_SETTINGS_MODULE", None)
        os.environ[LOCKS] = tempfile.mkdtemp(prefix="llmtasks-tests-")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("numprocesses", None):
        shutil.rmtree(os.environ.pop(LOCKS), ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` waits for those under way in other processes, and they for it."""
    if LOCKS not in os.environ:
        return (yield)
    kind = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    folder = Path(os.environ[LOCKS])
    with (folder / "door").open("a") as door, (folder / "room").open("a") as room:
        # Who waits to be alone holds the door: nobody else goes in.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, kind)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = folder_of(item)
        if folder in {"acceptance", "chaos"}:
            item.add_marker(folder)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if folder_of(item) in NEED_SERVICES and not HAS_SERVICES:
        pytest.fail(
            "needs Postgres and Redis: run `make test`, which starts its own"
            ' (make test ARGS="tests/integration -k name"),'
            " or set DATABASE_URL and REDIS_URL",
            pytrace=False,
        )
