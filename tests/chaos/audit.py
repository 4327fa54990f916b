"""The judge: what became of tasks, by triggers in the database and by the sandbox's own counts.

Nothing here is the product's code. A trigger writes down every task that comes to a final state,
and every final one that leaves it, in the transaction that does so.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tests.acceptance.cluster import Cluster

INSTALL = """
CREATE TABLE chaos_ends (task_id uuid NOT NULL, left_status text, status text NOT NULL);
CREATE FUNCTION chaos_end() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE final text[] := ARRAY['succeeded', 'failed', 'cancelled', 'expired'];
BEGIN
    IF TG_OP = 'INSERT' AND NEW.status = ANY(final) THEN
        INSERT INTO chaos_ends VALUES (NEW.id, NULL, NEW.status);
    ELSIF TG_OP = 'UPDATE' AND OLD.status <> NEW.status
            AND (NEW.status = ANY(final) OR OLD.status = ANY(final)) THEN
        INSERT INTO chaos_ends VALUES (NEW.id, OLD.status, NEW.status);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_end AFTER INSERT OR UPDATE ON llmtasks_task
    FOR EACH ROW EXECUTE FUNCTION chaos_end();
"""

FINISHED = "SELECT count(*) FROM chaos_ends"

TASKS = """
SELECT id::text, status, attempts, cost, cost_state, owner_id, error_class, route, kind
FROM llmtasks_task WHERE metadata ? %(mark)s
"""

ATTEMPTS = """
SELECT a.task_id::text, a.number, a.state, a.error_class, a.http_status, a.cost, a.cost_state,
    a.step
FROM llmtasks_attempt a JOIN llmtasks_task t ON t.id = a.task_id WHERE t.metadata ? %(mark)s
ORDER BY a.task_id, a.step, a.number
"""
# How often a task is tried.
TRIES = 5
# What calls models itself; the others have no attempts.
CALLING = ("chat", "embedding", "agent")


def install(cluster: Cluster) -> None:
    """Before the first task."""
    cluster.rows(INSTALL)


def finished(cluster: Cluster) -> int:
    """How often a task came to its end so far."""
    return int(cluster.rows(FINISHED)[0][0])


def figures(cluster: Cluster, ids: Mapping[int, str], mark: str = "n") -> dict[str, Any]:
    """What became of the tasks that were sent with `mark` in their metadata.

    `ids`: the task that the API said each became. Read when nothing is under way any more.
    """
    tasks = {row[0]: row for row in cluster.rows(TASKS, {"mark": mark})}
    attempts: dict[str, list[Any]] = defaultdict(list)
    for task_id, *row in cluster.rows(ATTEMPTS, {"mark": mark}):
        attempts[task_id].append(row)
    ended = Counter(task_id for (task_id,) in cluster.rows("SELECT task_id::text FROM chaos_ends"))
    vendor = cluster.bill()["tasks"]
    return {
        **ends(tasks, set(ids.values()), ended),
        **bills(tasks, attempts),
        **calls(tasks, attempts, vendor),
    }


def ends(
    tasks: Mapping[str, Sequence[Any]], told: set[str], entries: Mapping[str, int]
) -> dict[str, Any]:
    """Lost: taken by the API, and not there or not at an end. Finished once: one entry, ever."""
    statuses = Counter(row[1] for row in tasks.values())
    final = ("succeeded", "failed", "cancelled", "expired")
    ended = {task_id for task_id, row in tasks.items() if row[1] in final}
    return {
        "tasks": len(told),
        "lost": len(told - ended),
        "not_asked_for": len(set(tasks) - told),
        "finished_once": sum(entries.get(task_id) == 1 for task_id in told & ended),
        "finished_again": sum(entries.get(task_id, 0) > 1 for task_id in tasks),
        "still_owned": sum(row[5] is not None for row in tasks.values()),
        "statuses": dict(statuses),
        "not_ended": dict(Counter(f"{r[1]} {r[7]}" for r in tasks.values() if r[1] not in final)),
        "errors": dict(Counter(row[6] for row in tasks.values() if row[1] != "succeeded")),
    }


def bills(
    tasks: Mapping[str, Sequence[Any]], attempts: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Billed: settled, with status 200 and a cost that is final; each step of a task at most
    once. Failed early: although its tries were not used up."""
    billed = {task_id: sum(map(is_billed, attempts.get(task_id, ()))) for task_id in tasks}
    answered = {
        task_id for task_id, row in tasks.items() if row[1] == "succeeded" and row[8] in CALLING
    }
    states = Counter(row[1] for rows in attempts.values() for row in rows)
    steps = [rows for task_id in tasks for rows in by_step(attempts.get(task_id, ())).values()]
    return {
        "attempts": sum(states.values()),
        "attempt_states": dict(states),
        "billed_twice": sum(sum(map(is_billed, rows)) > 1 for rows in steps),
        "called_after_bill": sum(any(map(is_billed, rows[:-1])) for rows in steps),
        "answered_unbilled": sum(billed[task_id] == 0 for task_id in answered),
        "failed_early": sum(
            row[1] != "succeeded" and not is_used_up(attempts.get(task_id, ()))
            for task_id, row in tasks.items()
            if row[8] in CALLING
        ),
        "left_open": states["sent"],
        "sums_wrong": sum(
            not sums_up(row, attempts.get(task_id, ()))
            for task_id, row in tasks.items()
            if row[8] in CALLING
        ),
    }


def is_billed(attempt: Sequence[Any]) -> bool:
    _, state, error_class, http_status, cost, *_ = attempt
    return bool(state == "settled" and http_status == 200 and not error_class and cost > 0)


def is_used_up(attempts: Sequence[Any]) -> bool:
    """Whether every try there is died, or failed."""
    return len(attempts) == TRIES and all(row[1] == "unknown" or row[2] for row in attempts)


def by_step(attempts: Sequence[Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = defaultdict(list)
    for row in attempts:
        found[row[6]].append(row)
    return found


def sums_up(task: Sequence[Any], attempts: Sequence[Any]) -> bool:
    """A task's count and cost are those of its attempts, which are numbered within each step."""
    cost = sum(row[4] for row in attempts)
    steps = by_step(attempts).values()
    is_numbered = all([row[0] for row in rows] == list(range(1, len(rows) + 1)) for rows in steps)
    return is_numbered and len(attempts) == task[2] and (task[3] or 0) == cost


def calls(
    tasks: Mapping[str, Sequence[Any]],
    attempts: Mapping[str, Sequence[Any]],
    vendor: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """What the vendor saw. Its every call has an attempt; its every answer is billed or shows as
    `unknown`, or as a call that we ended with a cost estimated."""
    found: Counter[str] = Counter()
    for task_id in tasks:
        rows, seen = attempts.get(task_id, ()), vendor.get(task_id, {})
        called, answered = seen.get("calls", 0), seen.get("answered", 0)
        open_ended = sum(row[1] == "unknown" or row[5] == "estimated" for row in rows)
        found["vendor_calls"] += called
        found["vendor_answers"] += answered
        found["answered_again"] += max(0, answered - 1)
        found["overlaps"] += seen.get("overlaps", 0)
        found["calls_without_attempt"] += max(0, called - len(rows))
        found["attempts_without_call"] += max(0, len(rows) - open_ended - called)
        found["answers_unaccounted"] += max(0, answered - sum(map(is_billed, rows)) - open_ended)
    # A call of a task that the database does not have.
    found["vendor_only"] = len(set(vendor) - set(tasks))
    return dict(found)
