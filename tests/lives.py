"""What the state machine over tasks' states stands on: the arrows, every move, who runs what."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from uuid import UUID

from llmtasks import admission, attempts, routing, stores
from llmtasks.attempts import Sending
from llmtasks.context import Context
from llmtasks.errors import Lost
from llmtasks.guards import estimates, rate_limit
from llmtasks.guards.rate_limit import Grant
from llmtasks.ledger import Outcome
from llmtasks.models import FINAL, Attempt, CostState, Limit, Task
from llmtasks.stores import fetch
from providers.types import Usage
from tests import factories
from tests import meters as counted

PAGE = Path(__file__).parent.parent / "docs" / "states.md"
ENDS = ("succeeded", "failed", "cancelled")
AT_ONCE = 2


def arrows() -> dict[str, set[tuple[str, str]]]:
    """Who may move a task from which state to which, as the table of `docs/states.md` says: the
    place in the code → (leaving, reaching). What is made anew leaves ''."""
    found: dict[str, set[tuple[str, str]]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and "→" in cells[0]:
            left, right = cells[0].split("→")
            moves = {(a, b) for a in states(left) or [""] for b in states(right)}
            for place in re.findall(r"`(\w+\.\w+)`", cells[2]):
                found.setdefault(place, set()).update(moves)
    return found


def states(text: str) -> list[str]:
    named = re.findall(r"`(\w+)`", text)
    return [*named, *ENDS] if "final" in text else named


ARROWS = arrows()


# --- every move -----------------------------------------------------------------------------------

LISTEN = """
CREATE TABLE test_moves (n bigserial, task_id uuid, leaving text, reaching text);
CREATE FUNCTION test_note_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' OR OLD.status <> NEW.status THEN
        INSERT INTO test_moves (task_id, leaving, reaching)
        VALUES (NEW.id, CASE WHEN TG_OP = 'UPDATE' THEN OLD.status ELSE '' END, NEW.status);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER test_moves AFTER INSERT OR UPDATE ON llmtasks_task
    FOR EACH ROW EXECUTE FUNCTION test_note_move();
"""
LEAVE = """
DROP TRIGGER test_moves ON llmtasks_task;
DROP FUNCTION test_note_move;
DROP TABLE test_moves;
"""


@contextmanager
def moves_are_noted() -> Iterator[None]:
    """While the block runs, the database itself notes every change of a task's state, also two of
    one statement or function."""
    fetch(LISTEN)
    try:
        yield
    finally:
        fetch(LEAVE)


def moves_since(number: int) -> tuple[int, list[tuple[UUID, str, str]]]:
    """The number of the last move, and all moves after `number`."""
    rows = fetch(
        "SELECT n, task_id, leaving, reaching FROM test_moves WHERE n > %s ORDER BY n", [number]
    )
    return (rows[-1][0] if rows else number), [tuple(row[1:]) for row in rows]


# --- who runs what --------------------------------------------------------------------------------


@dataclass
class Run:
    """What one process believes that it runs, and its calls under way."""

    task: Task
    owner: UUID
    context: Context
    calls: list[Sending] = field(default_factory=list)

    @property
    def is_stored(self) -> bool:
        """An inline task is written with its first attempt."""
        return not self.task._state.adding


@dataclass
class Spent:
    """What one attempt is known to use and to cost; at first what it reserved."""

    tokens: int
    is_settled: bool = False
    cost: Decimal | None = None
    # The limiter's lease ran out, since its process died.
    has_lapsed: bool = False


def outcome(cost: Decimal | None, tokens: int) -> Outcome:
    """An answer with `tokens` of input and one of output."""
    state = CostState.UNPRICED if cost is None else CostState.FINAL
    usage = Usage(input_tokens=tokens, output_tokens=1)
    return Outcome(usage=usage, cost=cost, cost_state=state, raw_usage={"tokens": tokens})


class World:
    """A few tasks of one tenant, the processes that run them, and what they hold."""

    def __init__(self) -> None:
        super().__init__()
        # What an earlier life that failed left behind.
        Task.objects.exclude(status__in=FINAL).update(status="failed", owner_id=None)
        Attempt.objects.filter(state="sent").update(state="unknown")
        self.redis = stores.redis_client()
        self.redis.flushdb()
        counted.remember(self.redis)
        estimates._stats.clear()
        rate_limit.leases.held.clear()
        self.keys = {row.unit: f"{{limits}}:meter:{row.pk}" for row in Limit.objects.all()}
        self.candidate = routing.find("echo", "chat").candidates[0]
        self.request = factories.request()
        self.tenant = factories.tenant()
        self.ids: list[UUID] = []
        self.runs: list[Run] = []
        self.spent: dict[UUID, Spent] = {}
        # Calls of processes that are gone: settled late, or never.
        self.left: list[Sending] = []
        self.adjusted = Decimal(0)
        self.last_move, _ = moves_since(0)
        self.look()

    def look(self) -> None:
        """Read what there is: until the next step nothing changes."""
        self.tasks = list(Task.objects.filter(id__in=self.ids).order_by("id"))
        self.attempts = list(Attempt.objects.filter(tenant=self.tenant))

    def rows(self, *statuses: str) -> list[Task]:
        """The tasks as the step before left them."""
        return [row for row in self.tasks if not statuses or row.status in statuses]

    def moved(self, *places: str) -> None:
        """No arrow but those of the diagram, by whom it says."""
        legal = set().union(*(ARROWS[place] for place in places))
        self.last_move, moves = moves_since(self.last_move)
        for task_id, leaving, reaching in moves:
            assert task_id in self.ids
            assert (leaving, reaching) in legal, f"{places}: {leaving} → {reaching}"

    def admitted(self, context: Context) -> Grant | None:
        """Take the limits, or find that there is no room, as there must be none."""
        held = self.leases()
        grant = admission.ask(self.candidate, self.request, context, is_again=False)
        refusal = rate_limit.acquire(grant)
        if refusal is not None:
            assert refusal.why == "limit"
            assert len(held) == AT_ONCE
            return None
        assert len(held) < AT_ONCE
        assert rate_limit.acquire(grant) is None, "asking twice takes once"
        return grant

    def begin(self, run: Run, context: Context, grant: Grant) -> None:
        row = Task.objects.filter(id=run.task.id).first()
        is_ours = row is None or (row.status, row.fence) == ("running", run.task.fence)
        try:
            call = attempts.begin(self.candidate, grant, self.request, context)
        except Lost:
            assert not is_ours
            self.let_go(run)
        else:
            assert is_ours
            [tokens] = [m.need for m in grant.meters if m.rule.unit == Limit.Unit.TOKENS]
            self.spent[call.id] = Spent(tokens)
            call.exchange.is_sent, call.exchange.status = True, 200
            run.calls.append(call)
        self.moved("ledger.begin")

    def settled(self, call: Sending, cost: Decimal | None, tokens: int) -> Outcome:
        spent = self.spent[call.id]
        spent.is_settled, spent.cost, spent.tokens = True, cost, tokens + 1
        return outcome(cost, tokens)

    def let_go(self, run: Run) -> None:
        """Nobody runs it any more: a call that is still open is settled late, or never."""
        self.runs.remove(run)
        self.left += run.calls
        run.calls = []

    def lapse(self, call: Sending) -> None:
        """The time of the limiter's lease passes."""
        rate_limit.leases.drop(call.id)
        self.redis.zadd(self.keys["concurrency"], {str(call.id): 1}, xx=True)
        self.spent[call.id].has_lapsed = True

    def leases(self) -> set[UUID]:
        found = self.redis.zrangebyscore(self.keys["concurrency"], time.time() * 1e6, "+inf")
        return {UUID(member.decode()) for member in found}

    def used(self, unit: str) -> int:
        return counted.used(self.redis, self.keys[unit])
