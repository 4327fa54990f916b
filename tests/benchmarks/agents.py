"""What agents and workflows cost beside the calls that they make.

turn          CPU of this process for a turn of an inline agent with one tool that does nothing,
              and for a chat, which makes the same call; their difference is the loop's
four tools    from a turn's answer to the end of the last of its four calls of 100 ms, by the rows
background    an inline agent whose turn queues a call as well, less one whose turn does not
blocked       a thousand agents wait for queued calls: what the worker has more than before
fan-out       a workflow over a thousand items, less as many plain tasks

The last two on the real web server, dispatcher and worker; the sandbox is the vendor.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import psycopg

from tests.benchmarks import application, queued, tables, upstream
from tests.benchmarks.application import LANE, Application, cpu_of, find_servers

APP = "tests.benchmarks"
TURNS = 10
TOOLS = ("nothing@1", "wait@1", "later@1")
WITHIN_S = 300.0
QUIET_S = 2.0

# What the issue asks for, in ms.
AIMS = {"turn_ms": 5.0, "four_tools_p50_ms": 130.0, "background_ms": 10.0, "child_ms": 3.0}

COLUMNS = {
    "turn_ms": "CPU ms a turn: loop",
    "chat_ms": "its call",
    "postgres_ms": "pg, both",
    "four_tools_p50_ms": "4 x 100 ms: p50 ms",
    "four_tools_p99_ms": "p99",
    "background_ms": "background call +ms",
}
COLUMNS_OF_BLOCKED = {
    "agents": "blocked agents",
    "running": "running",
    "slots_taken": "slots taken",
    "connections_more": "connections more",
    "rss_more_mb": "worker RSS MB more",
    "chat_ms": "a chat meanwhile ms",
    "woken_s": "all woken and done s",
}
COLUMNS_OF_FAN = {
    "children": "children",
    "whole_ms": "ms a child",
    "plain_ms": "ms a plain task",
    "child_ms": "added",
    "child_cpu_ms": "CPU ms added",
    "postgres_cpu_ms": "pg",
}

# Queued calls stay where they are until they are let go.
HOLD = """
CREATE OR REPLACE FUNCTION bench_hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.not_before := clock_timestamp() + interval '1 day'; RETURN NEW; END $$;
CREATE OR REPLACE TRIGGER bench_hold BEFORE INSERT ON llmtasks_task
    FOR EACH ROW WHEN (NEW.kind = 'tool') EXECUTE FUNCTION bench_hold();
"""
LET_GO = """
DROP TRIGGER bench_hold ON llmtasks_task;
UPDATE llmtasks_task SET not_before = clock_timestamp()
WHERE kind = 'tool' AND status = 'waiting';
"""
STATES = """SELECT status, count(*) FROM llmtasks_task WHERE "user" = %s AND kind = 'agent'
GROUP BY status"""
RUNNING = "SELECT count(*) FROM llmtasks_task WHERE status IN ('queued', 'running')"
CONNECTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
FOUR_TOOLS = """
SELECT extract(epoch FROM max(t.finished_at) - m.finished_at)::float * 1000
FROM llmtasks_step t JOIN llmtasks_step m ON m.task_id = t.task_id AND m.number = 0
WHERE t.task_id = %s AND t.kind = 'tool' GROUP BY m.finished_at
"""


@dataclass(frozen=True)
class Plan:
    agents: int
    times: int
    blocked: int
    children: int


FULL = Plan(agents=20, times=40, blocked=1000, children=1000)
QUICK = Plan(agents=2, times=3, blocked=20, children=20)


def environment() -> dict[str, str]:
    return {**application.environment(), "APPS": APP}


def run(plan: Plan, rounds: int, folder: Path, given: dict[str, str]) -> dict[str, Any]:
    vendor = upstream.start(folder, (0,), given, "sandbox")
    app = Application(folder, given, configure(vendor))
    try:
        app.start()
        with psycopg.connect(given["DATABASE_URL"], autocommit=True) as database:
            whole = Whole(app, database)
            inline = Inline(database, given)
            inline.warm_up()
            whole.fan_out(min(100, plan.children), "warm")
            loops = [inline.measure(plan) for _ in range(rounds)]
            fans = [whole.fan_out(plan.children, f"fan-{n}") for n in range(rounds)]
            blocked = whole.blocked(plan.blocked)
    finally:
        app.stop()
        vendor.child.stop()
    found = {"loop": tables.medians(loops), "fan_out": tables.medians(fans), "blocked": blocked}
    measured = {**found["loop"], **found["fan_out"]}
    return {**found, "rounds": rounds, "aims": {n: measured[n] <= AIMS[n] for n in AIMS}}


def configure(vendor: upstream.Upstream) -> str:
    """A key; routes to the sandbox's `script` and to one that answers at once."""
    key = application.configure(vendor, (0,))
    from django.core.management import call_command

    with open(os.devnull, "w") as nowhere:
        call_command(
            "add_provider", "scripted", adapter="compatible", base_url=vendor.base_url(0),
            key="env:BENCH_KEY", price_family=application.FAMILY, route=["script=script"],
            stdout=nowhere,
        )  # fmt: skip
    return key


def calls(*names: str, number: int = 0) -> list[dict[str, Any]]:
    return [
        {"name": name, "arguments": {"number": 100 * number + n}} for n, name in enumerate(names)
    ]


def script(*turns: list[dict[str, Any]]) -> str:
    return orjson.dumps(turns).decode()


# --- In this process ------------------------------------------------------------------------------


class Inline:
    """Inline work without the web server's part: what `execute.run` costs."""

    def __init__(self, database: "psycopg.Connection[Any]", given: Mapping[str, str]) -> None:
        from llmtasks.models import Tenant

        self.database = database
        self.tenant = Tenant.objects.get(name="bench").id
        self.servers = find_servers(dict(given))

    def warm_up(self) -> None:
        self.agent(script(calls("nothing"), calls("wait", "wait"), calls("later")))
        self.chat()

    def measure(self, plan: Plan) -> dict[str, Any]:
        return self.turns(plan.agents) | self.four_tools(plan.times) | self.background(plan.times)

    def turns(self, agents: int) -> dict[str, Any]:
        long = script(*(calls("nothing", number=turn) for turn in range(TURNS)))
        none = script()
        began = self.cpu()
        for _ in range(agents):
            self.agent(long)
        turned = self.cpu()
        # The last turn, which answers, is in both.
        for _ in range(agents):
            self.agent(none)
        ended = self.cpu()
        for _ in range(agents * TURNS):
            self.chat()
        chatted = self.cpu()
        count = agents * TURNS
        turn, postgres = (((turned[i] - began[i]) - (ended[i] - turned[i])) for i in (0, 1))
        chat = chatted[0] - ended[0]
        return {
            "turn_ms": round((turn - chat) * 1000 / count, 3),
            "chat_ms": round(chat * 1000 / count, 3),
            "postgres_ms": round(postgres * 1000 / count, 3),
        }

    def four_tools(self, times: int) -> dict[str, Any]:
        found = []
        for _ in range(times):
            task_id = self.agent(script(calls("wait", "wait", "wait", "wait")))
            row = self.database.execute(FOUR_TOOLS, [task_id]).fetchone()
            found.append(float(row[0]) if row else 0.0)
        return {
            f"four_tools_p{percent}_ms": round(tables.percentile(found, percent), 1)
            for percent in (50, 99)
        }

    def background(self, times: int) -> dict[str, Any]:
        """By turns, so that both see the same machine."""
        without, queues = script(calls("nothing")), script(calls("nothing", "later"))
        plain, more = [], []
        for _ in range(times):
            plain.append(timed(lambda: self.agent(without)))
            more.append(timed(lambda: self.agent(queues)))
        added = statistics.median(more) - statistics.median(plain)
        return {"background_ms": round(added * 1000, 2)}

    def cpu(self) -> tuple[float, float]:
        """Seconds so far: of this process, of Postgres."""
        postgres = self.servers.get("postgres")
        return time.process_time(), cpu_of(postgres) if postgres else 0.0

    def agent(self, text: str) -> UUID:
        from llmtasks.bodies import AgentRequest

        return self.run(
            "agent", AgentRequest(chat=asked("script", text), tools=TOOLS, max_turns=50)
        )

    def chat(self) -> UUID:
        return self.run("chat", asked(application.route(0), "hello"))

    def run(self, kind: str, request: Any) -> UUID:
        from llmtasks import execute, submit

        work = submit.Work(tenant_id=self.tenant, key_id=None, kind=kind, request=request)
        outcome = execute.run(submit.inline(work), request)
        if outcome.task.status != "succeeded":
            raise SystemExit(f"{kind}: {outcome.task.error_class} {outcome.task.error_message}")
        return outcome.task.id


def asked(model: str, text: str) -> Any:
    from providers.types import Message, Request, Text

    return Request(model=model, messages=(Message(role="user", parts=(Text(text=text),)),))


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


# --- On the whole application ---------------------------------------------------------------------


class Whole:
    def __init__(self, app: Application, database: "psycopg.Connection[Any]") -> None:
        self.app = app
        self.database = database

    def fan_out(self, children: int, tag: str) -> dict[str, Any]:
        """As many plain tasks before it, by the rows' times."""
        plain = self.costs()
        queued.post_bulk(self.app, queued.task(f"{tag}-plain", "queued"), children)
        plain_s = queued.wait_for(self.database, f"{tag}-plain", children)[0]
        before = self.costs()
        whole_s = self.workflow(children, tag)
        after = self.costs()
        added = [(a - b) - (b - p) for a, b, p in zip(after, before, plain, strict=True)]
        return {
            "children": children,
            "whole_ms": round(whole_s * 1000 / children, 3),
            "plain_ms": round(plain_s * 1000 / children, 3),
            "child_ms": round((whole_s - plain_s) * 1000 / children, 3),
            "child_cpu_ms": round(added[0] * 1000 / children, 3),
            "postgres_cpu_ms": round(added[1] * 1000 / children, 3),
        }

    def costs(self) -> tuple[float, float]:
        """Seconds of CPU so far: of our own processes, of Postgres."""
        found = self.app.cpu_s()
        own = sum(found[name] for name in ("web", "dispatcher", "worker"))
        return own, found.get("postgres", 0.0)

    def workflow(self, children: int, tag: str) -> float:
        do = {"kind": "prompt", "model": application.route(0), "text": "{{ item }}"}
        block = {"kind": "parallel", "items": "{{ input.items }}", "max_items": children,
                 "max_concurrency": min(1000, children), "collect": "none", "do": do}  # fmt: skip
        given = {"spec": {"do": block}, "input": {"items": ["hello"] * children}}
        self.post({"kind": "workflow", "lane": LANE, "mode": "queued", "user": tag, "input": given})
        # Children have their run's user.
        return queued.wait_for(self.database, tag, children + 1)[0]

    def blocked(self, agents: int) -> dict[str, Any]:
        self.database.execute(HOLD.encode())
        before = self.connections(), self.app.rss_mb("worker")
        text = script(calls("later"), [{"name": "await_results", "arguments": {"ids": "$queued"}}])
        given = {"model": "script", "messages": [{"role": "user", "content": text}],
                 "tools": list(TOOLS)}  # fmt: skip
        item = {"kind": "agent", "lane": LANE, "mode": "queued", "user": "blocked", "input": given}
        queued.post_bulk(self.app, item, agents)
        self.wait_until({"blocked": agents})
        time.sleep(QUIET_S)
        found = {
            "agents": agents,
            "running": self.one(RUNNING),
            "slots_taken": self.slots_taken(),
            "connections_more": max(0, self.connections() - before[0]),
            "rss_more_mb": round(self.app.rss_mb("worker") - before[1], 1),
            "chat_ms": round(queued.timed(self.app, queued.task("meanwhile", None), 200,
                                          Prefer="wait=30"), 1),
        }  # fmt: skip
        self.database.execute(LET_GO.encode())
        woken = time.monotonic()
        self.wait_until({"succeeded": agents})
        return found | {"woken_s": round(time.monotonic() - woken, 1)}

    def slots_taken(self) -> int:
        """What live workers have in hand, by their own rows."""
        sql = """SELECT count(*) FROM llmtasks_task t JOIN llmtasks_worker w ON w.id = t.owner_id
                 WHERE w.role = 'worker'"""
        return self.one(sql)

    def connections(self) -> int:
        return self.one(CONNECTIONS)

    def one(self, sql: str) -> int:
        row = self.database.execute(sql.encode()).fetchone()
        return int(row[0]) if row else 0

    def wait_until(self, wanted: dict[str, int]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while (found := dict(self.database.execute(STATES, ["blocked"]).fetchall())) != wanted:
            if time.monotonic() > deadline:
                raise SystemExit(f"agents are {found}, not {wanted}, after {WITHIN_S:.0f} s")
            time.sleep(0.1)

    def post(self, body: dict[str, Any]) -> None:
        status, answer = self.app.ask("POST", "/v1/tasks", body)
        if status != 202:
            raise SystemExit(f"POST /v1/tasks answered {status}: {answer}")
