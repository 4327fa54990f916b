"""The dispatcher on a waiting room of a million rows: how many it releases a second, how long a
newcomer waits there, what it costs when nothing can be released, and how fast another takes over.

Its process is the real one. A lane's workers are rows with many slots and one consumer (see
`consumer.py`); tasks have no bodies, since the dispatcher reads none.
"""

import bisect
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis

from project.stack.processes import Child
from tests.benchmarks.application import cpu_of, find_servers, per_1000

LANE = "default"
PROVIDERS = ("one", "two")
ROUTES = ("smart", "fast", "cheap")
TENANTS = 5000
QUEUES = [f"{provider}.{LANE}" for provider in PROVIDERS]
# Windows of 1,500 a provider: some thirty worker processes.
SLOTS = 2000
FEW_SLOTS = 64
# So few that something is left to release when the leader dies.
FEWEST_SLOTS = 8
BATCH = 50_000
NEWCOMER_EVERY_S = 0.5
READY_S = 30.0
# Nothing comes any more once nothing came for so long: after a late answer of a store the
# dispatcher pauses for a second.
STILL_S = 3.0
# How often one hands over again whose leader had lost its lease.
MOST_AGAIN = 5

FILL = """
INSERT INTO llmtasks_task (
    id, tenant_id, kind, mode, lane, status, route, provider, "user", metadata, request_id,
    on_unknown, streams, created_at, not_before, deadline, seq, fence, attempts, input_tokens,
    cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_state,
    error_class, error_message, error_param)
SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint + n / 1000), 12, '0') || '7'
        || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid,
    CASE WHEN n %% 100 < %(heavy)s THEN md5('heavy')::uuid
        ELSE md5((n %% %(tenants)s)::text)::uuid END,
    'chat', 'queued', 'default', 'waiting', (%(routes)s::text[])[1 + n %% 3],
    (%(providers)s::text[])[1 + (n / 3) %% 2], %(tag)s, '{}', '', 'retry', false, now(),
    now() + make_interval(secs => %(due_in_s)s) - (n || ' us')::interval, now() + interval '2 days',
    0, 0, 0, 0, 0, 0, 0, 0, '', '', '', ''
FROM generate_series(%(first)s::int, %(last)s::int) n
"""
NEWCOMER = """
INSERT INTO llmtasks_task (
    id, tenant_id, kind, mode, lane, status, route, provider, "user", metadata, request_id,
    on_unknown, streams, created_at, not_before, deadline, seq, fence, attempts, input_tokens,
    cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_state,
    error_class, error_message, error_param)
VALUES (gen_random_uuid(), gen_random_uuid(),
    'chat', 'queued', 'default', 'waiting', 'smart', 'one',
    'newcomer', '{}', '', 'retry', false, clock_timestamp(), clock_timestamp(),
    now() + interval '2 days', 0, 0, 0, 0, 0, 0, 0, 0, '', '', '', '')
"""
NEWCOMERS = """
SELECT extract(epoch FROM created_at)::float8, extract(epoch FROM queued_at)::float8
FROM llmtasks_task WHERE "user" = 'newcomer' AND queued_at IS NOT NULL
"""
# Where the newcomers wait: who waits there too, and when turns were given.
OTHERS = """
SELECT count(DISTINCT tenant_id) FROM llmtasks_task WHERE provider = 'one' AND "user" = 'bench'
"""
TURNS = """
SELECT extract(epoch FROM queued_at)::float8 FROM llmtasks_task
WHERE provider = 'one' AND queued_at IS NOT NULL ORDER BY queued_at
"""
RELEASED = "SELECT count(*) FROM llmtasks_task WHERE status IN ('queued', 'succeeded')"
OFTEN = "SELECT count(*) FROM llmtasks_task WHERE seq > 1"

COLUMNS_OF_RELEASES = {
    "waiting": "waiting rows",
    "heavy_percent": "% of one tenant",
    "released_per_s": "released/s",
    "least_per_s": "least/s in 5 s",
    "newcomer_p50_ms": "newcomer p50 ms",
    "newcomer_max_ms": "max ms",
    "newcomer_p50_rounds": "p50 rounds",
    "newcomer_max_rounds": "max rounds",
    "dispatcher_cpu_s": "CPU s/1000: dispatcher",
    "postgres_cpu_s": "pg",
    "valkey_cpu_s": "valkey",
    "consumer_cpu_s": "consumer",
    "rss_first_mb": "RSS MB first",
    "rss_last_mb": "last",
}
COLUMNS_OF_IDLE = {
    "why": "nothing to release since",
    "waiting": "waiting rows",
    "dispatcher_cpu": "CPU % dispatcher",
    "postgres_cpu": "pg",
    "valkey_cpu": "valkey",
}


@dataclass(frozen=True)
class Plan:
    rows: int
    seconds: float
    idle_s: float
    handovers: int


FULL = Plan(rows=1_000_000, seconds=60.0, idle_s=20.0, handovers=5)
QUICK = Plan(rows=5_000, seconds=2.0, idle_s=1.0, handovers=1)


class Bench:
    """The database, the dispatchers and the consumer."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.database = psycopg.connect(environment["DATABASE_URL"], autocommit=True)
        self.broker = redis.Redis.from_url(environment["REDIS_URL"])
        self.servers = find_servers(environment)
        self.children: list[Child] = []

    def one(self, sql: str, *values: Any) -> Any:
        row = self.database.execute(sql.encode(), values or None).fetchone()
        return row[0] if row else None

    def empty(self) -> None:
        self.database.execute("TRUNCATE llmtasks_task, llmtasks_limit")
        self.database.execute("DELETE FROM llmtasks_worker WHERE role = 'worker'")
        self.broker.flushdb()

    def fill(self, count: int, heavy_percent: int, due_in_s: float = 0.0) -> None:
        values = {
            "heavy": heavy_percent, "tenants": TENANTS, "routes": list(ROUTES),
            "providers": list(PROVIDERS), "tag": "bench", "due_in_s": due_in_s,
        }  # fmt: skip
        for first in range(1, count + 1, BATCH):
            last = min(first + BATCH - 1, count)
            self.database.execute(FILL, {**values, "first": first, "last": last})
        self.database.execute("VACUUM ANALYZE llmtasks_task")
        self.database.execute("CHECKPOINT")

    def serve(self, slots: int) -> None:
        """A live worker, as its row says."""
        self.database.execute("DELETE FROM llmtasks_worker WHERE role = 'worker'")
        self.database.execute(
            "INSERT INTO llmtasks_worker (id, role, lane, host, pid, slots, queues, lease_until)"
            " VALUES (gen_random_uuid(), 'worker', %s, 'bench', 1, %s, %s,"
            " now() + interval '1 day')",
            [LANE, slots, psycopg.types.json.Jsonb(QUEUES)],
        )

    @contextmanager
    def running(self, name: str, *command: str) -> Iterator[psutil.Process]:
        child = self.start(name, *command)
        try:
            yield process_of(child)
        finally:
            child.stop()

    def start(self, name: str, *command: str) -> Child:
        log = self.folder / f"{name}-{len(self.children)}.log"
        child = Child(name, [sys.executable, *command], log, self.environment)
        child.start()
        self.children.append(child)
        return child

    def dispatcher(self) -> Any:
        return self.running("dispatcher", "manage.py", "dispatcher")

    def consumer(self) -> Any:
        return self.running("consumer", "-m", "tests.benchmarks.consumer", *QUEUES)

    def leader(self) -> int | None:
        """The pid of who leads."""
        return self.one(
            "SELECT w.pid FROM llmtasks_config c JOIN llmtasks_worker w ON w.id = c.leader"
            " WHERE c.leader_until > clock_timestamp()"
        )

    def wait_for_leader(self) -> None:
        wait_until(lambda: self.leader() is not None, "no dispatcher leads: see its log")

    def wait_until_alive(self, pid: int) -> None:
        """Until a dispatcher's row is there."""
        alive = "SELECT count(*) FROM llmtasks_worker WHERE role = 'dispatcher' AND pid = %s"
        wait_until(lambda: self.one(alive, pid), "the standby does not start: see its log")

    def wait_until_still(self) -> int:
        """Until nothing is released any more, as far as that comes; what was."""
        deadline = time.monotonic() + READY_S
        released, since = self.one(RELEASED), time.monotonic()
        while time.monotonic() < min(deadline, since + STILL_S):
            time.sleep(0.1)
            if (now := self.one(RELEASED)) != released:
                released, since = now, time.monotonic()
        return int(released)

    def cpu(self, **others: psutil.Process) -> dict[str, float]:
        return {name: cpu_of(root) for name, root in {**self.servers, **others}.items()}

    def stop(self) -> None:
        for child in self.children:
            child.stop()
        self.database.close()
        self.broker.close()


def wait_until(condition: Callable[[], Any], problem: str, step_s: float = 0.05) -> None:
    deadline = time.monotonic() + READY_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(problem)
        time.sleep(step_s)


def process_of(child: Child) -> psutil.Process:
    if child.process is None:
        raise SystemExit(f"{child.name} did not start")
    return psutil.Process(child.process.pid)


def percents(
    before: dict[str, float], after: dict[str, float], seconds: float
) -> dict[str, float | None]:
    """Of one core; None for a server that runs elsewhere."""
    names = ("dispatcher", "postgres", "valkey")
    return {
        f"{name}_cpu": round(100 * (after[name] - before[name]) / seconds, 2)
        if name in before
        else None
        for name in names
    }


# --- releases -------------------------------------------------------------------------------------


def releases(bench: Bench, plan: Plan, heavy_percent: int) -> dict[str, Any]:
    """With room for all that one dispatcher can release."""
    bench.empty()
    bench.fill(plan.rows, heavy_percent)
    with bench.consumer() as consumer, bench.dispatcher() as dispatcher:
        bench.wait_for_leader()
        bench.serve(SLOTS)
        few = min(plan.rows / 100, 5000)
        wait_until(lambda: bench.one(RELEASED) >= few, "hardly anything is released: see the log")
        began, first = time.monotonic(), bench.one(RELEASED)
        rss = [dispatcher.memory_info().rss]
        before = bench.cpu(dispatcher=dispatcher, consumer=consumer)
        counts = [(began, first)]
        while (now := time.monotonic()) < began + plan.seconds and counts[-1][1] < plan.rows:
            bench.database.execute(NEWCOMER)
            time.sleep(NEWCOMER_EVERY_S)
            if now - counts[-1][0] >= 5.0:
                counts.append((time.monotonic(), bench.one(RELEASED)))
        counts.append((time.monotonic(), bench.one(RELEASED)))
        seconds = counts[-1][0] - began
        after = bench.cpu(dispatcher=dispatcher, consumer=consumer)
        rss.append(dispatcher.memory_info().rss)
    if often := bench.one(OFTEN):
        raise SystemExit(f"{often} tasks were released more than once")
    came = bench.database.execute(NEWCOMERS).fetchall()
    late = sorted(1000 * (queued - created) for created, queued in came)
    rounds = rounds_of(bench, came)
    rates = [(m - n) / (t - s) for (s, n), (t, m) in itertools.pairwise(counts) if t > s]
    return {
        "waiting": plan.rows,
        "heavy_percent": heavy_percent,
        "released": counts[-1][1] - first,
        "seconds": round(seconds, 1),
        "released_per_s": round((counts[-1][1] - first) / seconds, 1),
        "least_per_s": round(min(rates), 1),
        "newcomers": len(late),
        "newcomer_p50_ms": round(statistics.median(late), 1) if late else None,
        "newcomer_max_ms": round(late[-1], 1) if late else None,
        "newcomer_p50_rounds": round(statistics.median(rounds), 2) if rounds else None,
        "newcomer_max_rounds": round(rounds[-1], 2) if rounds else None,
        **{
            f"{name}_cpu_s": per_1000(before, after, name, counts[-1][1] - first)
            for name in ("dispatcher", "postgres", "valkey", "consumer")
        },
        "rss_first_mb": round(rss[0] / 2**20, 1),
        "rss_last_mb": round(rss[-1] / 2**20, 1),
    }


def rounds_of(bench: Bench, came: list[tuple[float, float]]) -> list[float]:
    """How many rounds of turns each newcomer waited for, in order: a round is one turn of each
    tenant who waits for the same provider and lane."""
    turns = [at for (at,) in bench.database.execute(TURNS)]
    others = bench.one(OTHERS)
    return sorted(
        (bisect.bisect_left(turns, queued) - bisect.bisect_right(turns, created)) / others
        for created, queued in came
    )


# --- nothing to release ---------------------------------------------------------------------------


def idle(bench: Bench, plan: Plan) -> list[dict[str, Any]]:
    """CPU of a dispatcher that can release nothing, for four reasons."""
    bench.empty()
    bench.serve(FEW_SLOTS)
    found = [idle_cpu(bench, plan, "nothing waits", 0)]
    bench.fill(plan.rows, heavy_percent=50, due_in_s=86_400.0)
    found.append(idle_cpu(bench, plan, "nothing is due", plan.rows))
    bench.empty()
    bench.fill(plan.rows, heavy_percent=50)
    bench.serve(FEW_SLOTS)
    found.append(idle_cpu(bench, plan, "every slot is taken", plan.rows))
    bench.serve(SLOTS)
    bench.database.execute("UPDATE llmtasks_task SET status = 'waiting' WHERE status = 'queued'")
    bench.database.execute(
        'INSERT INTO llmtasks_limit (provider_id, model, each, unit, "window", amount)'
        " SELECT id, '', '', 'requests', 'day', 1 FROM llmtasks_provider"
    )
    found.append(idle_cpu(bench, plan, "the limits have no room", plan.rows))
    return found


def idle_cpu(bench: Bench, plan: Plan, why: str, waiting: int) -> dict[str, Any]:
    with bench.dispatcher() as dispatcher:
        bench.wait_for_leader()
        # What has room is released first.
        released = bench.wait_until_still()
        began, before = time.monotonic(), bench.cpu(dispatcher=dispatcher)
        time.sleep(plan.idle_s)
        used = percents(before, bench.cpu(dispatcher=dispatcher), time.monotonic() - began)
        if bench.one(RELEASED) != released:
            raise SystemExit(f"{why}, and yet tasks were released")
    return {"why": why, "waiting": waiting, **used}


# --- a leader's death -----------------------------------------------------------------------------


def handovers(bench: Bench, plan: Plan) -> dict[str, Any]:
    """Seconds from the leader's kill -9 to the first release by another."""
    bench.empty()
    bench.fill(plan.rows, heavy_percent=50)
    found: list[float] = []
    with bench.consumer():
        standby = bench.start("dispatcher", "manage.py", "dispatcher")
        for _ in range(plan.handovers + MOST_AGAIN):
            bench.wait_for_leader()
            leading, standby = standby, bench.start("dispatcher", "manage.py", "dispatcher")
            bench.wait_until_alive(process_of(standby).pid)
            bench.serve(FEWEST_SLOTS)
            # A while, so that it stands by in the middle of the leader's lease.
            time.sleep(random.uniform(0.5, 2.0))
            if bench.leader() == process_of(leading).pid:
                found.append(handover_s(bench, leading))
            else:
                # It did not come to renew its lease.
                leading.stop()
            if len(found) == plan.handovers:
                break
        else:
            raise SystemExit("the standby leads, again and again")
        standby.stop()
    return {"handovers_s": found, "longest_s": max(found)}


def handover_s(bench: Bench, leading: Child) -> float:
    process_of(leading).kill()
    killed = time.monotonic()
    # What the dead one released is there within this time.
    time.sleep(0.2)
    released = bench.one(RELEASED)
    wait_until(lambda: bench.one(RELEASED) != released, "nothing is released after a kill -9", 0.01)
    return round(time.monotonic() - killed, 2)


def configure() -> None:
    """Tables, and providers with routes that each of them answers."""
    import django

    django.setup()
    from django.core.management import call_command

    from llmtasks.models import Provider, ProviderModel, Route, RouteCandidate

    call_command("migrate", verbosity=0, interactive=False)
    for name in PROVIDERS:
        provider, _ = Provider.objects.get_or_create(
            name=name, defaults={"adapter": "compatible", "base_url": "http://127.0.0.1:9/v1"}
        )
        for route in ROUTES:
            model, _ = ProviderModel.objects.get_or_create(provider=provider, name=route)
            row, _ = Route.objects.get_or_create(name=route)
            RouteCandidate.objects.get_or_create(route=row, model=model)


def run(plan: Plan, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    configure()
    bench = Bench(folder, environment)
    try:
        return {
            "slots": SLOTS,
            "releases": [releases(bench, plan, percent) for percent in (0, 90)],
            "idle": idle(bench, plan),
            "handover": handovers(bench, plan),
        }
    finally:
        bench.stop()
