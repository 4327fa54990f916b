"""Stages one after another."""

from typing import Any

from llmtasks.workflows.run import Job, Run
from llmtasks.workflows.spec import Pipeline
from llmtasks.workflows.templates import render


def run(run: Run, block: Pipeline) -> Any:
    """The last stage's output, or the one that is declared."""
    steps = dict(run.scope.get("steps") or {})
    output = None
    for stage in block.stages:
        output = run.one(Job(stage.name or "", stage, {**run.scope, "steps": dict(steps)}))
        steps[stage.name or ""] = {"output": output}
    if block.output is None:
        return output
    return render(block.output, {**run.scope, "steps": steps})
