"""What waits and what is under way: how much, and for how long, by provider, lane and tenant class.

Found by index probes alone, whatever the table holds: the first `SEEN` lines (a tenant's tasks for
one route), and of each figure no more than `COUNTED` tasks are counted.
"""

from collections import defaultdict
from dataclasses import dataclass

from llmtasks.stores import fetch

COUNTED = 10_000
SEEN = 5_000
# Tenants by weight, so that a figure has few rows however many tenants there are.
CLASSES = ("1", "2-9", "10-99", "100-1000")
CLASSES_FROM = [2, 10, 100]

# Arrays and lateral probes rather than joins: the planner can't tell how few lines there are. One
# tenant further in every line at each step, so that no provider hides behind another's tenants.
WAITING = """
WITH RECURSIVE places AS (
    SELECT ''::text AS provider, ''::text AS lane
    UNION ALL
    SELECT n.provider, n.lane FROM places p CROSS JOIN LATERAL (
        SELECT provider::text, lane::text FROM llmtasks_task
        WHERE status = 'waiting' AND (provider, lane) > (p.provider, p.lane)
        ORDER BY provider, lane LIMIT 1
    ) n
), routes AS (
    SELECT provider, lane, '' AS route FROM places WHERE lane <> ''
    UNION ALL
    SELECT r.provider, r.lane, n.route FROM routes r CROSS JOIN LATERAL (
        SELECT route::text FROM llmtasks_task
        WHERE status = 'waiting' AND provider = r.provider AND lane = r.lane AND route > r.route
        ORDER BY route LIMIT 1
    ) n
), tenants AS (
    SELECT provider, lane, route, '00000000-0000-0000-0000-000000000000'::uuid AS tenant_id,
        NULL::timestamptz AS since
    FROM routes WHERE route <> ''
    UNION ALL
    SELECT t.provider, t.lane, t.route, n.tenant_id, n.not_before
    FROM tenants t CROSS JOIN LATERAL (
        SELECT tenant_id, not_before FROM llmtasks_task
        WHERE status = 'waiting' AND provider = t.provider AND lane = t.lane
            AND route = t.route AND tenant_id > t.tenant_id
        ORDER BY tenant_id, not_before LIMIT 1
    ) n
), seen AS MATERIALIZED (
    SELECT t.provider, t.lane, t.route, t.tenant_id, t.since,
        width_bucket(coalesce(w.weight, 1), %(classes)s::int[]) AS class
    FROM (SELECT * FROM tenants WHERE since IS NOT NULL LIMIT %(seen)s) t
        LEFT JOIN llmtasks_tenant w ON w.id = t.tenant_id
), classes AS (
    SELECT provider, lane, class, min(since) AS since FROM seen GROUP BY provider, lane, class
)
SELECT c.provider, c.lane, c.class, s.state, counted.number,
    extract(epoch FROM statement_timestamp() - c.since)::float
FROM classes c
    CROSS JOIN (VALUES
        ('due', '-infinity'::timestamptz, statement_timestamp()),
        ('later', statement_timestamp(), 'infinity'::timestamptz)
    ) AS s(state, after, until)
    CROSS JOIN LATERAL (
        SELECT count(*) AS number FROM (
            SELECT FROM seen CROSS JOIN LATERAL (
                SELECT FROM llmtasks_task
                WHERE status = 'waiting' AND provider = seen.provider AND lane = seen.lane
                    AND route = seen.route AND tenant_id = seen.tenant_id
                    AND not_before > s.after AND not_before <= s.until
                ORDER BY not_before LIMIT %(counted)s
            ) task
            WHERE seen.provider = c.provider AND seen.lane = c.lane AND seen.class = c.class
            LIMIT %(counted)s
        ) capped
    ) counted
"""

# Few by construction: the dispatcher bounds what is released, threads what runs inline.
UNDER_WAY = """
SELECT t.provider, t.lane, width_bucket(coalesce(w.weight, 1), %(classes)s::int[]),
    CASE WHEN mode = 'inline' THEN 'inline' ELSE status END, count(*)
FROM llmtasks_task t LEFT JOIN llmtasks_tenant w ON w.id = t.tenant_id
WHERE t.status IN ('queued', 'running') GROUP BY 1, 2, 3, 4
"""


@dataclass(slots=True)
class Depth:
    """How many tasks of a provider, a lane and a class of tenants are in which state.

    `due` may be released, `later` waits for its time; both end at `COUNTED`, which then means that
    many or more. `queued` has a hint in the broker, `running` and `inline` run, in a worker and in
    a request. `oldest_s` is how long the oldest one of those due has been so.
    """

    due: int = 0
    later: int = 0
    queued: int = 0
    running: int = 0
    inline: int = 0
    oldest_s: float = 0.0
    is_capped: bool = False

    @property
    def waiting(self) -> int:
        return self.due + self.later

    def add(self, other: "Depth") -> None:
        self.due += other.due
        self.later += other.later
        self.queued += other.queued
        self.running += other.running
        self.inline += other.inline
        self.oldest_s = max(self.oldest_s, other.oldest_s)
        self.is_capped |= other.is_capped


@dataclass(frozen=True, slots=True)
class Place:
    provider: str
    lane: str
    tenants: str


Backlog = dict[Place, Depth]


def look() -> Backlog:
    """Raises `django.db.Error`s."""
    found: Backlog = defaultdict(Depth)
    values = {"seen": SEEN, "counted": COUNTED, "classes": CLASSES_FROM}
    for provider, lane, tenants, state, number, age_s in fetch(WAITING, values):
        depth = found[Place(provider, lane, CLASSES[tenants])]
        setattr(depth, state, number)
        depth.oldest_s = max(0.0, age_s)
        depth.is_capped |= number == COUNTED
    for provider, lane, tenants, state, number in fetch(UNDER_WAY, values):
        setattr(found[Place(provider, lane, CLASSES[tenants])], state, number)
    return dict(found)


def by_lane(backlog: Backlog) -> dict[tuple[str, str], Depth]:
    """(provider, lane) → all its tenants together."""
    found: dict[tuple[str, str], Depth] = defaultdict(Depth)
    for place, depth in backlog.items():
        found[place.provider, place.lane].add(depth)
    return dict(found)
