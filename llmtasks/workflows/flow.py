"""A task of kind `workflow`: one block of blocks, gone on with after the steps that are done."""

from collections.abc import Callable, Generator
from typing import Any

from llmtasks import ledger, pulse
from llmtasks.bodies import WorkflowAnswer, WorkflowRequest
from llmtasks.context import Context, Event
from llmtasks.errors import Snooze, StepFailed
from llmtasks.models import Step
from llmtasks.workflows import evaluate, orchestrator, parallel, pipeline, route, spec
from llmtasks.workflows.run import ENDED, KNOWN, Job, Run
from llmtasks.workflows.templates import MissingValue
from llmtasks.workflows.transform import BadOutput

PATTERNS: dict[str, Callable[[Run, Any], Any]] = {
    "pipeline": pipeline.run,
    "parallel": parallel.run,
    "route": route.run,
    "orchestrator": orchestrator.run,
    "evaluate": evaluate.run,
}


def stream(request: WorkflowRequest, context: Context) -> Generator[Event, None, WorkflowAnswer]:
    """Yield nothing and return what the block gave. Raises `StepFailed`, `WorkflowStopped`, and
    `Snooze` where steps are open: the task is `blocked` then."""
    task = context.task
    with pulse.watch(task.id, context.drop, context.client, task.owner_id):
        run = Run(task, context, request.scope, request.max_cost, known=known(task.id))
        try:
            value = result(run, spec.BLOCK.validate_python(request.block))
        except (MissingValue, BadOutput) as error:
            raise StepFailed(f"the output can't be made: {error}") from None
        except Snooze:
            raise
        finally:
            ledger.sum_up([task.id])
    yield from ()
    return WorkflowAnswer(value=value)


def known(task_id: Any) -> dict[int, Step]:
    """The first steps, as far as they have ended."""
    rows = Step.objects.filter(task_id=task_id, number__lt=KNOWN, status__in=ENDED)
    return {row.number: row for row in rows if row.error_class != "Refused"}


def result(run: Run, block: spec.AnyBlock) -> Any:
    """A block that holds none is a run of one step."""
    pattern = PATTERNS.get(block.kind)
    if pattern is None:
        return run.one(Job(block.name or block.kind, block, run.scope))
    return pattern(run, block)
