"""Generate and criticise until it is good, or out of turns or money."""

from decimal import Decimal
from typing import Any

from llmtasks.errors import WorkflowStopped
from llmtasks.workflows.run import Job, Run
from llmtasks.workflows.spec import Evaluate
from llmtasks.workflows.templates import MissingValue, look_up
from llmtasks.workflows.words import holds


def run(run: Run, block: Evaluate) -> dict[str, Any]:
    draft, critique, turns = None, None, 0
    for turn in range(block.max_turns):
        if turn and is_spent(run, block):
            break
        seen = {**run.scope, "draft": draft, "critique": critique}
        name = block.generate.name or "generate"
        draft = run.one(Job(f"{name}[{turn}]", block.generate, seen))
        seen = {**run.scope, "draft": draft, "critique": critique}
        name = block.critique.name or "critique"
        critique = run.one(Job(f"{name}[{turn}]", block.critique, seen))
        turns = turn + 1
        if is_good(block, critique):
            return {"draft": draft, "critique": critique, "good": True, "turns": turns}
    if block.never_good == "fail":
        raise WorkflowStopped(f"not good after {turns} turns: max_turns or max_cost")
    return {"draft": draft, "critique": critique, "good": False, "turns": turns}


def is_spent(run: Run, block: Evaluate) -> bool:
    """Asked before a turn that is new, never again after: what was decided then stands."""
    if block.max_cost is None or not run.is_ahead:
        return False
    return run.spent() >= Decimal(block.max_cost)


def is_good(block: Evaluate, critique: Any) -> bool:
    if block.path is not None:
        try:
            critique = look_up(tuple(block.path.split(".")), critique)
        except MissingValue:
            return False
    return holds(block.good, critique)
