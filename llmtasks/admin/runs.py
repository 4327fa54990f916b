"""A run, drawn: what an agent or a workflow did, as a graph of its steps with states and costs.

Steps that overlap stand under each other, what came after them stands to their right. Agents and
workflows that were steps are drawn inside their step. However large a run is, a page has about
`MOST_NODES` nodes: many steps of a kind become one node that counts them by state. What a node cost
is what its own calls and all tasks below it cost, so that nodes sum up to the run.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.utils.safestring import SafeString

from llmtasks.admin import cells
from llmtasks.models import CostState, Kind, Step, Task
from llmtasks.stores import fetch

# A run with more steps than that is grouped by Postgres; as many at the same time are one node.
MOST_STEPS = 200
MOST_BESIDE = 24
# Runs within the run that are drawn, and how deep.
MOST_INNER = 12
MOST_DEPTH = 3
LEAVES = (Kind.CHAT, Kind.EMBEDDING, Kind.TOOL)

# Deeper than anything is nested; a bound, should rows ever name each other in a circle.
TREE = """
WITH RECURSIVE tree AS (
    SELECT id AS top, id, 1 AS depth FROM llmtasks_task WHERE {seed}
    UNION ALL
    SELECT tree.top, c.id, depth + 1 FROM tree JOIN llmtasks_task c ON c.parent_id = tree.id
    WHERE depth < 30
), money AS (
    SELECT tree.top, sum(a.cost) AS cost, bool_or(a.cost_state = 'unpriced') AS unpriced,
        bool_or(a.cost_state = 'estimated') AS estimated
    FROM tree JOIN llmtasks_attempt a ON a.task_id = tree.id AND a.state <> 'sent'
    GROUP BY tree.top
)"""
TOTAL = (
    TREE.format(seed="id = %(task)s")
    + """
SELECT (SELECT count(*) FROM tree) - 1, cost, unpriced, estimated
FROM (SELECT 1) AS one LEFT JOIN money ON true
"""
)
# A step with a task shows the task's state, but for what the step says better.
STEPS = (
    TREE.format(seed="parent_id = %(task)s")
    + """, own AS (
    SELECT step, sum(cost) AS cost, bool_or(cost_state = 'unpriced') AS unpriced,
        bool_or(cost_state = 'estimated') AS estimated, min(started_at) AS started_at
    FROM llmtasks_attempt WHERE task_id = %(task)s AND state <> 'sent' GROUP BY step
), shown AS (
    SELECT s.number, s.kind, CASE WHEN %(each)s THEN s.name
            ELSE regexp_replace(s.name, '[^[:alpha:]]*[0-9]+[^[:alpha:]]*$', '') END AS name,
        CASE WHEN c.id IS NULL OR s.status IN ('failed', 'skipped') THEN s.status
             ELSE c.status END AS status,
        s.error_class, least(o.started_at, s.started_at) AS started_at,
        CASE WHEN c.id IS NULL OR c.status IN ('succeeded', 'failed', 'cancelled', 'expired')
             THEN coalesce(c.finished_at, s.finished_at) END AS finished_at,
        c.id AS child, c.kind AS child_kind,
        o.cost AS own_cost, m.cost AS cost,
        o.unpriced OR m.unpriced AS unpriced, o.estimated OR m.estimated AS estimated
    FROM llmtasks_step s
    LEFT JOIN llmtasks_task c ON c.id = s.child_id AND c.parent_id = s.task_id
    LEFT JOIN own o ON o.step = s.number
    LEFT JOIN money m ON m.top = c.id
    WHERE s.task_id = %(task)s
    UNION ALL
    -- A turn that has no answer (yet).
    SELECT o.step, 'model', '', %(status)s, '', o.started_at, NULL, NULL, NULL, o.cost, NULL,
        o.unpriced, o.estimated
    FROM own o WHERE NOT EXISTS (
        SELECT 1 FROM llmtasks_step s WHERE s.task_id = %(task)s AND s.number = o.step)
    UNION ALL
    -- Tasks of no step: earlier tries, mostly.
    SELECT 2147483647, 'task', 'other tasks', c.status, '', c.started_at, c.finished_at, c.id,
        c.kind, NULL, m.cost, m.unpriced, m.estimated
    FROM llmtasks_task c LEFT JOIN money m ON m.top = c.id
    WHERE c.parent_id = %(task)s AND NOT EXISTS (
        SELECT 1 FROM llmtasks_step s WHERE s.task_id = %(task)s AND s.child_id = c.id)
)
SELECT min(number), kind, name, status, max(error_class), min(started_at), max(finished_at),
    max(child::text), max(child_kind), count(*),
    sum(coalesce(own_cost, 0) + coalesce(cost, 0))
        FILTER (WHERE own_cost IS NOT NULL OR cost IS NOT NULL),
    bool_or(unpriced), bool_or(estimated)
FROM shown GROUP BY CASE WHEN %(each)s THEN number END, kind, name, status
ORDER BY 1, 4
"""
)

WORDS = {"open": "waits for tasks", "approval": "waits for a person", "unknown": "interrupted"}
# In the order of what a person looks for.
TROUBLE = ("failed", "unknown", "expired", "approval", "blocked", "running", "open")


def worded(status: str) -> str:
    return WORDS.get(status, status)


@dataclass(slots=True)
class Node:
    """A step, or several of a kind: `counts` are its states."""

    number: int
    kind: str
    name: str
    counts: dict[str, int]
    error: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    child: str | None = None
    child_kind: str | None = None
    cost: Decimal | None = None
    unpriced: bool = False
    estimated: bool = False
    inner: "Run | None" = None

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    @property
    def status(self) -> str:
        """The state whose colour it has: the one that most asks for a look."""
        return next((one for one in TROUBLE if one in self.counts), next(iter(self.counts)))

    @property
    def words(self) -> str:
        """What is said of its states: each with how many, where there are several."""
        if self.count == 1:
            return worded(self.status)
        return ", ".join(f"{number:,} {worded(name)}" for name, number in self.counts.items())

    @property
    def title(self) -> str:
        return self.name or ("turn" if self.kind == Step.Kind.MODEL else self.kind)

    @property
    def shown_cost(self) -> SafeString | str:
        return shown_money(self.cost, self.unpriced, self.estimated)

    @property
    def duration(self) -> str:
        if self.count > 1 or not self.started_at or not self.finished_at:
            return ""
        return cells.duration(self.finished_at - self.started_at)

    @property
    def is_leaf(self) -> bool:
        return self.child_kind is None or self.child_kind in LEAVES

    @property
    def label(self) -> str:
        """The whole of it, for who can't see the picture."""
        return f"{self.kind} {self.title}: {self.words}"


@dataclass(slots=True)
class Run:
    """Nodes by waves: what is in a wave overlapped, or is one turn's calls."""

    waves: list[list[Node]] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        return [node for wave in self.waves for node in wave]

    @property
    def cost(self) -> Decimal:
        return sum((node.cost or Decimal(0) for node in self.nodes), Decimal(0))


@dataclass(frozen=True, slots=True)
class Total:
    """What a run came to: the tasks below it, and the money of all calls of all of them."""

    tasks: int
    cost: Decimal | None
    unpriced: bool
    estimated: bool

    @property
    def shown_cost(self) -> SafeString | str:
        return shown_money(self.cost, self.unpriced, self.estimated)


def shown_money(cost: Decimal | None, unpriced: bool, estimated: bool) -> SafeString | str:
    if unpriced:
        # What is not priced is 0 in the sum: without anything else nothing is known.
        return cells.money(cost or None, CostState.UNPRICED)
    if cost is None:
        return ""
    return cells.money(cost, CostState.ESTIMATED if estimated else CostState.FINAL)


def total_of(task: Task) -> Total:
    [(tasks, cost, unpriced, estimated)] = fetch(TOTAL, {"task": task.id})
    return Total(tasks, cost, bool(unpriced), bool(estimated))


def drawn(task: Task, depth: int = 1, room: list[int] | None = None) -> Run:
    """The run with what is in it. `room` is how many inner runs may still be drawn."""
    room = [MOST_INNER] if room is None else room
    steps = Step.objects.filter(task_id=task.id).values("pk")[: MOST_STEPS + 1].count()
    each = steps <= MOST_STEPS
    rows = fetch(STEPS, {"task": task.id, "each": each, "status": task.status})
    nodes = [node_of(row) for row in rows]
    waves = waves_of(nodes, task.kind) if each else grouped_waves(nodes)
    run = Run([narrowed(wave) for wave in waves])
    if depth < MOST_DEPTH:
        draw_inner(run, depth, room)
    return run


def draw_inner(run: Run, depth: int, room: list[int]) -> None:
    wanted = [node for node in run.nodes if node.count == 1 and not node.is_leaf]
    found = Task.objects.in_bulk([UUID(node.child) for node in wanted[: room[0]] if node.child])
    for node in wanted:
        task = found.get(UUID(node.child)) if node.child else None
        if task is not None and room[0] > 0:
            room[0] -= 1
            node.inner = drawn(task, depth + 1, room)


def node_of(row: Sequence[Any]) -> Node:
    number, kind, name, status, error, started, finished, child, child_kind, count, *money = row
    cost, unpriced, estimated = money
    return Node(
        number=number, kind=kind, name=name, counts={status: count}, error=error or "",
        started_at=started, finished_at=finished, child=child if count == 1 else None,
        child_kind=child_kind, cost=cost, unpriced=bool(unpriced), estimated=bool(estimated),
    )  # fmt: skip


def waves_of(nodes: Iterable[Node], kind: str) -> list[list[Node]]:
    """An agent's turns and the calls of each; of a workflow, what began after all before it had
    ended comes next."""
    waves: list[list[Node]] = []
    for node in nodes:
        before = waves[-1] if waves else None
        if before is None or is_later(node, before, kind):
            waves.append([node])
        else:
            before.append(node)
    return waves


def is_later(node: Node, wave: Sequence[Node], kind: str) -> bool:
    if node.kind == "task" or wave[-1].kind == "task":
        return node.kind != wave[-1].kind
    if kind == Kind.AGENT:
        return Step.Kind.MODEL in (node.kind, wave[-1].kind)
    if node.started_at is None:
        return False
    return all(other.finished_at and other.finished_at <= node.started_at for other in wave)


def grouped_waves(nodes: Iterable[Node]) -> list[list[Node]]:
    """Each kind of step in a wave of its own, in the order in which they first came."""
    return [[node] for node in merged(nodes)]


def narrowed(wave: list[Node]) -> list[Node]:
    """Too many nodes beside each other become one of each name."""
    return wave if len(wave) <= MOST_BESIDE else merged(wave)


def merged(nodes: Iterable[Node]) -> list[Node]:
    """Nodes of one kind and name as one, with their states counted and their money summed."""
    groups: dict[tuple[str, str], list[Node]] = defaultdict(list)
    for node in nodes:
        groups[node.kind, node.name.rstrip("0123456789[]().-_# ")].append(node)
    return [as_one(name, group) for (_, name), group in groups.items()]


def as_one(name: str, group: Sequence[Node]) -> Node:
    if len(group) == 1:
        return group[0]
    counts: dict[str, int] = defaultdict(int)
    for node in group:
        for status, count in node.counts.items():
            counts[status] += count
    costs = [node.cost for node in group if node.cost is not None]
    return Node(
        number=min(node.number for node in group), kind=group[0].kind, name=name,
        counts=dict(counts), cost=sum(costs, Decimal(0)) if costs else None,
        unpriced=any(node.unpriced for node in group),
        estimated=any(node.estimated for node in group),
    )  # fmt: skip
