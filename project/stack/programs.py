"""What runs on the servers: the one table of programs, for `make up` and docker compose."""

from dataclasses import dataclass

LANES = ("interactive", "default", "bulk")
# What a program needs beyond the grace time: calls that were dropped then are still written
# down, and callers told. What is cut off is put back by the sweep, as after any other death.
AFTER_GRACE_S = 10


@dataclass(frozen=True)
class Program:
    name: str
    command: tuple[str, ...]
    # When it starts: 0 while the database is prepared, 1 once it is, 2 when the web answers.
    stage: int = 1


@dataclass(frozen=True)
class Places:
    """Where the programs listen, and how many there are of what can be many."""

    bind: str = "127.0.0.1"
    port: int = 8000
    # Flower and the sandbox are for this machine only.
    inner_bind: str = "127.0.0.1"
    flower_port: int = 8001
    sandbox_port: int = 8002
    web_workers: int = 2
    web_threads: int = 128
    # Seconds that calls under way get when everything is stopped.
    grace_s: int = 20
    beat_schedule: str = "/tmp/beat-schedule"  # noqa: S108 - of the container alone


def programs(python: str, places: Places) -> list[Program]:
    """Every program with its command. Secrets are in the environment, never in a command."""
    manage = (python, "manage.py")
    celery = (python, "-m", "celery", "-A", "project")
    return [
        Program("web", (python, "-m", "gunicorn", "project.wsgi:application", *gunicorn(places))),
        Program("dispatcher", (*manage, "dispatcher")),
        *(Program(f"worker-{lane}", (*manage, "worker", "--lane", lane)) for lane in LANES),
        Program(
            "beat",
            (*celery, "beat", f"--schedule={places.beat_schedule}", "--pidfile="),
            stage=2,
        ),
        Program(
            "flower",
            (*celery, "flower", f"--address={places.inner_bind}", f"--port={places.flower_port}"),
            stage=2,
        ),
        Program(
            "sandbox",
            (
                *(*manage, "sandbox", "--host", places.inner_bind),
                *("--port", str(places.sandbox_port)),
            ),
            stage=0,
        ),
    ]


def gunicorn(places: Places) -> tuple[str, ...]:
    """A thread for each call under way: they wait for vendors."""
    return (
        # How it ends.
        "--config=python:project.gunicorn",
        f"--bind={places.bind}:{places.port}",
        "--worker-class=gthread",
        f"--workers={places.web_workers}",
        f"--threads={places.web_threads}",
        "--worker-connections=1000",
        "--keep-alive=30",
        # A worker that shows no life is replaced; long calls are no sign of death here, since
        # its main thread answers for it.
        "--timeout=60",
        # Its place would be shared by every gunicorn of this user.
        "--no-control-socket",
    )
