"""With 200,000 waiting rows no statement of the loops reads the whole table."""

from datetime import UTC, datetime

import pytest
from uuid_utils.compat import uuid7

from llmtasks import dispatch, ledger, pulse, stores, sweep, tasks

ROWS = 200_000

FILL = """
INSERT INTO llmtasks_task (
    id, tenant_id, kind, mode, lane, status, route, provider, "user", metadata, request_id,
    on_unknown, streams, created_at, not_before, deadline, seq, fence, attempts, input_tokens,
    cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_state,
    error_class, error_message, error_param)
SELECT md5(n::text)::uuid, md5((n %% 20)::text || 't')::uuid, 'chat', 'queued',
    (ARRAY['interactive', 'default', 'bulk'])[1 + n %% 3],
    CASE WHEN n <= %(rows)s THEN 'waiting' WHEN n %% 50 = 0 THEN 'running' ELSE 'succeeded' END,
    'echo', 'sandbox', '', '{}', '', 'retry', false, now(), now() - (n || ' ms')::interval,
    now() + interval '1 day', 0, 0, 0, 0, 0, 0, 0, 0, '', '', '', ''
FROM generate_series(1, %(rows)s + 20000) n
"""


IDS = [uuid7() for _ in range(3)]
STATEMENTS = {
    "PICK": (
        dispatch.PICK,
        {
            "providers": ["sandbox", "other"],
            "lanes": ["default", "bulk"],
            "rooms": [48, 48],
            "last": [dispatch.NOBODY, uuid7()],
        },
    ),
    "OUTSTANDING": (dispatch.OUTSTANDING, {}),
    "PUT_BACK of hints": (dispatch.PUT_BACK, {"ids": IDS}),
    "BEAT": (
        pulse.BEAT,
        {"id": uuid7(), "due": True, "lease": 30, "queues": pulse.Jsonb([])},
    ),
    "OWNED": (pulse.OWNED, {"id": uuid7()}),
    "DISOWN": (pulse.DISOWN, {"id": uuid7(), "orphans": IDS}),
    "TAKE_FROM_DEAD": (sweep.TAKE_FROM_DEAD, {"batch": 1000}),
    "OLD_HINTS": (sweep.OLD_HINTS, {"age": 30}),
    "PUT_BACK": (sweep.PUT_BACK, {"age": 30, "sure": 600, "empty": ["a.bulk"], "batch": 1000}),
    "EXPIRE": (sweep.EXPIRE, {"batch": 1000}),
    "CLAIM": (ledger.CLAIM, {"task": IDS[0], "seq": 1, "owner": IDS[1]}),
    "RECOUNT": (ledger.RECOUNT, {"ids": IDS}),
    "first_id_of": (
        "SELECT task_id FROM llmtasks_taskpayload WHERE task_id < %(id)s"
        " ORDER BY task_id LIMIT 5000",
        {"id": tasks.first_id_of(datetime.now(UTC))},
    ),
}


@pytest.mark.django_db(transaction=True)
def test_no_statement_of_the_loops_depends_on_how_many_rows_there_are():
    """One test: the rows take seconds to make."""
    stores.fetch(FILL, {"rows": ROWS})
    stores.fetch("ANALYZE llmtasks_task")
    for name, (sql, values) in STATEMENTS.items():
        plan = [line for (line,) in stores.fetch(f"EXPLAIN {sql}", values)]
        scans = [line for line in plan if "Seq Scan on llmtasks_task " in line]
        assert not scans, "\n".join([name, *plan])
    # A round of the dispatcher over this waiting room reads few pages of it.
    sql, values = STATEMENTS["PICK"]
    plan = [line for (line,) in stores.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {sql}", values)]
    buffers = next(line for line in plan if "Buffers:" in line)
    pages = sum(int(part.partition("=")[2]) for part in buffers.split() if "=" in part)
    assert pages < 5000, "\n".join(plan)
