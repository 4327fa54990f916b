"""A planner splits, workers work at the same time, a joiner joins."""

from typing import Any

from llmtasks.workflows import parallel
from llmtasks.workflows.run import Job, Run
from llmtasks.workflows.spec import Orchestrator
from llmtasks.workflows.transform import BadOutput, as_value, name_of


def run(run: Run, block: Orchestrator) -> Any:
    planner, worker, join = block.planner, block.worker, block.join
    plan = run.one(Job(planner.name or "planner", planner, run.scope, check=as_plan))
    items = parallel.bounded(plan or [], block.max_workers, "the plan's items", "max_workers")
    name = worker.name or "worker"
    steps = parallel.over(run, worker, name, items, block.max_concurrency)
    results = parallel.results(steps, worker)
    if join is None:
        return results
    return run.one(Job(join.name or "join", join, {**run.scope, "results": results}))


def as_plan(output: Any) -> list[Any]:
    """A list, or text that is one as JSON."""
    plan = as_value(output) if isinstance(output, str) else output
    if not isinstance(plan, list):
        raise BadOutput(f"the plan is {name_of(plan)}, not a list")
    return plan
