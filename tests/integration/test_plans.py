"""With 200,000 waiting rows no statement of the loops reads the whole table."""

from datetime import UTC, datetime, timedelta

import pytest
from uuid_utils.compat import uuid7

from llmtasks import backlog, dispatch, ledger, pulse, room, stores, sweep, tasks
from llmtasks.turns import NOBODY, SEARCHED

ROWS = 200_000
# A slow machine has a statement's time for so many.
PART = 20_000

FILL = """
INSERT INTO llmtasks_task (
    id, tenant_id, kind, mode, lane, status, route, provider, "user", metadata, request_id,
    on_unknown, streams, created_at, not_before, deadline, seq, fence, attempts, input_tokens,
    cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_state,
    error_class, error_message, error_param)
SELECT md5(n::text)::uuid,
    CASE n %% 4 WHEN 0 THEN md5((n %% 8000)::text)::uuid ELSE %(heavy)s END, 'chat', 'queued',
    (ARRAY['interactive', 'default', 'bulk'])[1 + n %% 3],
    CASE WHEN n <= %(rows)s THEN 'waiting' WHEN n %% 50 = 0 THEN 'running' ELSE 'succeeded' END,
    (ARRAY['echo', 'closed'])[1 + n / 3 %% 2], 'sandbox', '', '{}', '', 'retry', false, now(),
    %(base)s - (n || ' ms')::interval, now() + interval '1 day',
    0, 0, 0, 0, 0, 0, 0, 0, '', '', '', ''
FROM generate_series(%(first)s::int, %(last)s::int) n
"""


# The tenant of three quarters of the rows.
HEAVY = uuid7()
LOOK = {
    "seen": backlog.SEEN,
    "counted": backlog.COUNTED,
    "classes": backlog.CLASSES_FROM,
}
IDS = [uuid7() for _ in range(3)]
# Each part of the rows is counted from here: else what is due at a time would lie in two of them.
BASE = datetime.now(UTC)
STATEMENTS = {
    "FIND": (
        dispatch.FIND,
        {
            "providers": ["sandbox", "other"],
            "lanes": ["default", "bulk"],
            "line_providers": ["sandbox", "sandbox"],
            "line_lanes": ["default", "default"],
            "line_routes": ["echo", "closed"],
            "cursors": [uuid7(), NOBODY],
            "wanted": [500, 0],
            "searched": SEARCHED,
        },
    ),
    "DUE": (
        dispatch.DUE,
        {"since": BASE - timedelta(seconds=100), "most": dispatch.MOST_DUE},
    ),
    "HEADS": (
        dispatch.HEADS,
        {
            "providers": ["sandbox"] * 64,
            "lanes": ["default"] * 64,
            "routes": ["echo"] * 64,
            "tenants": [uuid7() for _ in range(63)] + [HEAVY],
            "most": [48] * 64,
        },
    ),
    "MARK": (dispatch.MARK, {"ids": IDS}),
    "OUTSTANDING": (room.OUTSTANDING, {}),
    "UNBEGUN": (room.UNBEGUN, {"tenants": IDS, "lanes": ["interactive"]}),
    "PUT_BACK of hints": (dispatch.PUT_BACK, {"ids": IDS}),
    "BEAT": (
        pulse.BEAT,
        {"id": uuid7(), "due": True, "lease": 30, "queues": pulse.Jsonb([])},
    ),
    "OWNED": (pulse.OWNED, {"id": uuid7()}),
    "DISOWN": (pulse.DISOWN, {"id": uuid7(), "orphans": IDS}),
    "TAKE_FROM_DEAD": (sweep.TAKE_FROM_DEAD, {"batch": 1000}),
    "LEFT_OPEN": (sweep.LEFT_OPEN, {"batch": 1000, "age": 30}),
    "OLD_HINTS": (sweep.OLD_HINTS, {"age": 30}),
    "PUT_BACK": (sweep.PUT_BACK, {"age": 30, "lost": IDS}),
    "EXPIRE": (sweep.EXPIRE, {"batch": 1000}),
    "CLAIM": (ledger.CLAIM, {"task": IDS[0], "seq": 1, "owner": IDS[1]}),
    "RECOUNT": (ledger.RECOUNT, {"ids": IDS}),
    "WAITING": (backlog.WAITING, LOOK),
    "UNDER_WAY": (backlog.UNDER_WAY, LOOK),
    "first_id_of": (
        "SELECT task_id FROM llmtasks_taskpayload WHERE task_id < %(id)s"
        " ORDER BY task_id LIMIT 5000",
        {"id": tasks.first_id_of(datetime.now(UTC))},
    ),
}


@pytest.mark.django_db(transaction=True)
def test_no_statement_of_the_loops_depends_on_how_many_rows_there_are():
    """One test: the rows take seconds to make."""
    # First as the planner sees a burst: when it looked at the table last, nobody waited.
    stores.fetch("ALTER TABLE llmtasks_task SET (autovacuum_enabled = false)")
    fill(ROWS + 1, waiting=0)
    stores.fetch("VACUUM ANALYZE llmtasks_task")
    for first in range(1, ROWS, PART):
        fill(first, waiting=ROWS)
    few_pages_are_read()
    stores.fetch("ALTER TABLE llmtasks_task RESET (autovacuum_enabled)")
    stores.fetch("ANALYZE llmtasks_task")
    few_pages_are_read()
    # A look at the whole waiting room counts no further than it says.
    [(found,)] = stores.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {backlog.WAITING}", LOOK)
    read = rows_read(stores.loads(found)[0]["Plan"])
    assert read <= len(LANES) * 2 * backlog.COUNTED + 2 * backlog.SEEN, read
    depths = backlog.look()
    assert {depth.due for depth in depths.values()} == {backlog.COUNTED}
    assert {place.lane for place in depths} == set(LANES)


def fill(first: int, waiting: int) -> None:
    """A part of the rows; those up to number `waiting` wait."""
    part = {"first": first, "last": first + PART - 1}
    stores.fetch(FILL, {"rows": waiting, "base": BASE, "heavy": HEAVY, **part})


LANES = ("interactive", "default", "bulk")


# They read all that they are to find: a look at the waiting room, and 400 tasks of the dead.
LONG = {"WAITING", "TAKE_FROM_DEAD"}


def few_pages_are_read() -> None:
    for name, (sql, values) in STATEMENTS.items():
        rows = stores.fetch(f"EXPLAIN {'' if name in LONG else '(ANALYZE, BUFFERS)'} {sql}", values)
        plan = [line for (line,) in rows]
        assert not any("Seq Scan on llmtasks_task " in line for line in plan), (name, *plan)
        if name not in LONG:
            buffers = next(line for line in plan if "Buffers:" in line)
            pages = sum(int(part.partition("=")[2]) for part in buffers.split() if "=" in part)
            assert pages < 3000, "\n".join([name, *plan])


def rows_read(plan: dict) -> float:
    """The tasks that a plan's nodes found, those among them that were thrown away."""
    mine = 0.0
    if plan.get("Relation Name") == "llmtasks_task":
        found = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        mine = found * plan["Actual Loops"]
    return mine + sum(rows_read(child) for child in plan.get("Plans", ()))
