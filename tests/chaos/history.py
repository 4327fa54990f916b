"""Every change of a task's state, written down by triggers: when, by which program, whose it was.

What a dead process leaves behind is told by Postgres's own times: its task leaves `running` after
its owner's lease ran out, and its hint goes from `queued` back to `waiting`. Programs are told
apart by the name under which they connect.
"""

from collections.abc import Sequence
from typing import Any

from tests.acceptance.cluster import Cluster

INSTALL = """
CREATE TABLE chaos_moves (
    id bigserial PRIMARY KEY, task_id uuid NOT NULL, left_status text, status text NOT NULL,
    left_owner uuid, owner uuid, left_fence int, fence int NOT NULL,
    entered_at timestamptz, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    program text NOT NULL DEFAULT current_setting('application_name')
);
CREATE INDEX ON chaos_moves (task_id, id);
CREATE FUNCTION chaos_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO chaos_moves (task_id, status, owner, fence)
            VALUES (NEW.id, NEW.status, NEW.owner_id, NEW.fence);
    ELSIF OLD.status <> NEW.status OR OLD.fence <> NEW.fence THEN
        INSERT INTO chaos_moves
            (task_id, left_status, status, left_owner, owner, left_fence, fence, entered_at)
            VALUES (NEW.id, OLD.status, NEW.status, OLD.owner_id, NEW.owner_id, OLD.fence,
                    NEW.fence, (SELECT max(at) FROM chaos_moves WHERE task_id = NEW.id));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_move AFTER INSERT OR UPDATE ON llmtasks_task
    FOR EACH ROW EXECUTE FUNCTION chaos_move();

CREATE TABLE chaos_answers (
    task_id uuid NOT NULL, program text NOT NULL DEFAULT current_setting('application_name')
);
CREATE FUNCTION chaos_answer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_answers (task_id) VALUES (NEW.task_id);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_answer AFTER UPDATE OF response ON llmtasks_taskpayload
    FOR EACH ROW EXECUTE FUNCTION chaos_answer();

CREATE TABLE chaos_late (
    attempt_id uuid NOT NULL, is_answer bool NOT NULL,
    program text NOT NULL DEFAULT current_setting('application_name')
);
CREATE FUNCTION chaos_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_late (attempt_id, is_answer)
        VALUES (NEW.id, NEW.error_class = '' AND NEW.cost_state = 'final');
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_late AFTER UPDATE ON llmtasks_attempt FOR EACH ROW
    WHEN (OLD.state = 'unknown' AND NEW.state = 'settled') EXECUTE FUNCTION chaos_late();
"""

# Taken from a dead owner: seconds since its last sign of life, when it renewed its lease.
TAKEN_UP = """
SELECT extract(epoch FROM m.at - w.lease_until)::float + %(lease_s)s
FROM chaos_moves m JOIN llmtasks_worker w ON w.id = m.left_owner
    JOIN llmtasks_task t ON t.id = m.task_id
WHERE m.left_status = 'running' AND w.lease_until < m.at AND t.metadata ->> 'point' = %(point)s
    AND %(program)s IN ('', (SELECT program FROM chaos_moves c
                             WHERE c.owner = m.left_owner AND c.status = 'running' LIMIT 1))
"""

# Hints that nobody took, or that a process gave back: seconds since they were released.
PUT_BACK = """
SELECT extract(epoch FROM m.at - m.entered_at)::float
FROM chaos_moves m JOIN llmtasks_task t ON t.id = m.task_id
WHERE m.left_status = 'queued' AND m.status = 'waiting' AND t.metadata ->> 'point' = %(point)s
"""


# A running task changed by a program that is not its owner's; the sweep of the dead's may.
STALE = """
WITH owners AS (
    SELECT owner, min(program) AS program FROM chaos_moves
    WHERE owner IS NOT NULL AND status = 'running' GROUP BY owner
)
SELECT m.task_id::text, m.program, m.left_fence, m.status
FROM chaos_moves m JOIN owners o ON o.owner = m.left_owner
WHERE m.left_status = 'running' AND m.program <> o.program AND m.program NOT LIKE 'dispatcher%%'
"""

# An answer that was stored by another program than the one that ended the task with it, or twice.
FOREIGN = """
SELECT a.task_id::text FROM chaos_answers a
WHERE NOT EXISTS (SELECT 1 FROM chaos_moves m WHERE m.task_id = a.task_id
                  AND m.status = 'succeeded' AND m.program = a.program)
UNION ALL SELECT task_id::text FROM chaos_answers GROUP BY task_id HAVING count(*) > 1
"""

# Attempts that were settled after the sweep had given them up: their task's change was refused.
LATE = "SELECT count(*), count(*) FILTER (WHERE is_answer) FROM chaos_late"


def install(cluster: Cluster) -> None:
    """Before the first task."""
    cluster.rows(INSTALL)


def taken_up(cluster: Cluster, point: str, lease_s: float, program: str = "") -> list[float]:
    """From `program`, where one is given."""
    values = {"point": point, "lease_s": lease_s, "program": program}
    return seconds(cluster.rows(TAKEN_UP, values))


def put_back(cluster: Cluster, point: str) -> list[float]:
    return seconds(cluster.rows(PUT_BACK, {"point": point}))


def seconds(rows: Sequence[Sequence[Any]]) -> list[float]:
    return sorted(round(row[0], 2) for row in rows)
