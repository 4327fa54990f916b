"""The control: what a team writes first. Plain Celery on Redis with late acks, and its own retries.

`acks_late`, `task_reject_on_worker_lost`, prefetch 1, a visibility timeout of a few seconds, looked
at each second: the settings that lose the least. The worker's side is
`python -m celery -A tests.chaos.control worker`.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis
from celery import Celery, signals

from project.stack.processes import Child
from tests.benchmarks import upstream
from tests.chaos.bursts import AT_WORK, WORK_S, Bursts, Size
from tests.chaos.submit import until, while_moving

BROKER, VENDOR = "CONTROL_BROKER", "CONTROL_VENDOR"
RESULTS, FAILURES, RUNNING = "control:results", "control:failures", "control:running"
SEED = 21
SLOTS = 24
# Nothing is redelivered sooner: as long as our leases.
VISIBILITY_S = 6
# Nothing in the broker, and nothing moved for so long: no more results come.
QUIET_S = 2 * VISIBILITY_S
# So often more is waited for what is in the broker still.
ROUNDS = 5

# Not the current app: a process that only looks at this module has one of its own.
app = Celery(
    "control", broker=os.environ.get(BROKER, "redis://127.0.0.1:1/0"), set_as_current=False
)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_transport_options={
        "visibility_timeout": VISIBILITY_S,
        # Look for what to redeliver each second. By default it is each 100.
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    },
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
    worker_hijack_root_logger=False,
)
# Of a worker process, for all its threads.
_clients: dict[str, Any] = {}


@signals.worker_init.connect
def connect(**_: Any) -> None:
    _clients["results"] = redis.Redis.from_url(os.environ[BROKER])
    _clients["vendor"] = httpx.Client(base_url=os.environ[VENDOR], timeout=30.0)


@signals.task_prerun.connect
def count_begun(task: Any, **_: Any) -> None:
    _clients["results"].hincrby(RUNNING, task.request.hostname, 1)


@signals.task_postrun.connect
def count_ended(task: Any, **_: Any) -> None:
    _clients["results"].hincrby(RUNNING, task.request.hostname, -1)


@signals.task_failure.connect
def count_failure(**_: Any) -> None:
    """A task that gave up, or a fault of this module: neither is a message lost."""
    _clients["results"].incr(FAILURES)


@app.task(
    bind=True,
    name="control.call",
    autoretry_for=(httpx.HTTPError,),
    retry_backoff=1,
    retry_jitter=True,
    max_retries=5,
)
def call(self: Any, number: int, body: dict[str, Any]) -> None:
    """Call the vendor, write down the answer."""
    is_anthropic = body["model"].startswith("claude-")
    answer = _clients["vendor"].post(
        "/v1/messages" if is_anthropic else "/v1/chat/completions",
        json={**body, "max_tokens": 100},
        headers={
            "Authorization": "Bearer k",
            "X-Client-Request-Id": f"{number}.{self.request.retries}",
        },
    )
    answer.raise_for_status()
    _clients["results"].rpush(RESULTS, number)


@dataclass(frozen=True)
class Place:
    """Where the control runs: on the Redis database of a cluster that ended."""

    folder: Path
    redis_url: str
    environment: Mapping[str, str]


def run(
    place: Place,
    bodies: list[dict[str, Any]],
    size: Size,
    order: Sequence[str],
    fault: Mapping[str, Any],
) -> dict[str, Any]:
    """The same bursts, and a kill wherever one of our workers was killed."""
    vendor = upstream.start(place.folder, (), dict(place.environment), "sandbox")
    url = f"http://127.0.0.1:{vendor.port}"
    environment = {**place.environment, BROKER: place.redis_url, VENDOR: url}
    names = sorted({name for name in order if name.startswith("worker")})
    children = {name: worker(place.folder, name, environment) for name in names}
    bursts = Bursts(size, SEED)
    began = time.monotonic()
    stopped = threading.Event()
    sent: list[int] = []
    try:
        with redis.Redis.from_url(place.redis_url) as results:
            results.flushdb()
            until(lambda: answers(f"{url}/healthz"), 30)
            httpx.post(f"{url}/_faults", json=fault).raise_for_status()
            for child in children.values():
                child.start()
            sending = threading.Thread(
                target=send, args=(place.redis_url, bodies, bursts, sent, stopped), daemon=True
            )
            sending.start()

            def wait_for_work(name: str) -> None:
                until(lambda: name not in children or is_at_work(results, name), WORK_S, 0.02)

            def start_anew(name: str) -> None:
                results.hdel(RUNNING, f"{name}@control")
                start(children.get(name))

            def kill_it(name: str) -> None:
                kill(children.get(name))

            def wait_until_sent() -> None:
                while_moving(lambda: bursts.is_sent(sent), lambda: len(sent), size.quiet_s, 0.05)

            bursts.run(order, kill_it, start_anew, wait_for_work, wait_until_sent)
            sending.join()
            drain(results, len(bodies))
            seconds = round(time.monotonic() - began, 1)
            kills = sum(name in children for name in order)
            return {**judge(results, url, len(bodies)), "kills": kills, "seconds": seconds}
    finally:
        stopped.set()
        for child in children.values():
            kill(child)
        vendor.child.stop()


def worker(folder: Path, name: str, environment: Mapping[str, str]) -> Child:
    command = [
        *(sys.executable, "-m", "celery", "-A", "tests.chaos.control", "worker"),
        *("--pool=threads", f"--concurrency={SLOTS}", f"--hostname={name}@control"),
        *("--without-gossip", "--without-mingle", "--loglevel=WARNING"),
    ]
    return Child(name, command, folder / f"control-{name}.log", dict(environment))


def is_at_work(results: "redis.Redis", name: str) -> bool:
    running: Any = results.hget(RUNNING, f"{name}@control")
    return int(running or 0) >= AT_WORK


def start(child: Child | None) -> None:
    if child is not None:
        child.start()


def kill(child: Child | None) -> None:
    if child is not None and child.process is not None:
        child.process.kill()
        child.process.wait()


def send(
    redis_url: str,
    bodies: list[dict[str, Any]],
    bursts: Bursts,
    sent: list[int],
    stopped: threading.Event,
) -> None:
    """Publish every task, in the same bursts as ours."""
    app.conf.broker_url = redis_url
    with app.producer_pool.acquire(block=True) as producer:
        for number, body in enumerate(bodies):
            while not bursts.may_send(number) and not stopped.wait(0.02):
                pass
            if stopped.is_set():
                return
            call.apply_async((number, body["input"]), producer=producer)
            sent.append(number)


def drain(results: "redis.Redis", count: int) -> None:
    """Until every task has a result, or nothing is in the broker any more, nor moved."""

    def is_over() -> bool:
        return len(set(numbers(results))) >= count

    def progress() -> tuple[int, int]:
        return len(numbers(results)), left(results)

    for _ in range(ROUNDS):
        if while_moving(is_over, progress, QUIET_S, 0.5) or not left(results):
            return


def left(results: "redis.Redis") -> int:
    """Messages in the queue, or delivered and not acknowledged: waiting for their retry too."""
    queued: Any = results.llen("celery")
    delivered: Any = results.hlen("unacked")
    return int(queued + delivered)


def numbers(results: "redis.Redis") -> list[int]:
    found: Any = results.lrange(RESULTS, 0, -1)
    return [int(number) for number in found]


def judge(results: "redis.Redis", url: str, count: int) -> dict[str, Any]:
    done = Counter(numbers(results))
    failures: Any = results.get(FAILURES)
    bill = httpx.get(f"{url}/_calls", timeout=10.0).json()
    tallies = bill["tasks"].values()
    return {
        "tasks": count,
        "failed": int(failures or 0),
        "lost": count - len(done),
        "left_in_broker": left(results),
        "finished_again": sum(times > 1 for times in done.values()),
        "answered_again": sum(max(0, tally["answered"] - 1) for tally in tallies),
        "overlaps": bill["overlaps"],
        "vendor_calls": bill["calls"],
    }


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).is_success
    except httpx.HTTPError:
        return False
