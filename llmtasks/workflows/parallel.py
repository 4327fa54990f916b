"""Blocks at the same time: branches, one for each item, or copies; what they gave, or a vote."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from llmtasks.errors import StepFailed, WorkflowStopped
from llmtasks.models import Step
from llmtasks.workflows import children
from llmtasks.workflows.run import Job, Run, Steps
from llmtasks.workflows.spec import AnyBlock, Parallel, Vote
from llmtasks.workflows.templates import MissingValue, look_up, render
from llmtasks.workflows.transform import MAX_OUTPUT_BYTES, BadOutput, name_of
from llmtasks.workflows.words import named


def run(run: Run, block: Parallel) -> Any:
    if block.vote is not None:
        return vote(run, block, block.vote)
    if block.branches is not None:
        branches = block.branches
        steps = run.many(len(branches), of_branches(run, branches), at_once=block.max_concurrency)
        if block.collect == "none":
            return counts(steps)
        values = collected(steps, lambda number: branches[number])
        found = {step.name: value for step, value in values}
        return {branch.name: found.get(branch.name or "") for branch in branches}
    items = list(range(block.copies)) if block.copies else items_of(run, block)
    do = only(block)
    steps = over(run, do, do.name or "item", items, block.max_concurrency,
                 shows=block.copies is None)  # fmt: skip
    return counts(steps) if block.collect == "none" else results(steps, do)


def only(block: Parallel) -> AnyBlock:
    if block.do is None:
        raise TypeError("only branches have no do")
    return block.do


def of_branches(run: Run, branches: list[AnyBlock]) -> Callable[[int], Job]:
    return lambda index: Job(branches[index].name or "", branches[index], run.scope)


def over(
    run: Run, do: AnyBlock, name: str, items: list[Any], at_once: int, *, shows: bool = True
) -> Steps:
    """Do the block for each item, which it sees, and wait for all."""
    return run.many(len(items), of_items(run, do, name, items, shows), at_once=at_once)


def of_items(
    run: Run, do: AnyBlock, name: str, items: list[Any], shows: bool
) -> Callable[[int], Job]:
    def job_at(index: int) -> Job:
        seen = {"item": items[index], "index": index} if shows else {"index": index}
        return Job(f"{name}[{index}]", do, {**run.scope, **seen})

    return job_at


def items_of(run: Run, block: Parallel) -> list[Any]:
    return bounded(render(block.items, run.scope), block.max_items or 0, "items", "max_items")


def bounded(items: Any, most: int, name: str, cap: str) -> list[Any]:
    """Raises `StepFailed` for what is no list, `WorkflowStopped` for one that is too long."""
    if not isinstance(items, list):
        raise StepFailed(f"{name} is {name_of(items)}, not a list")
    if len(items) > most:
        raise WorkflowStopped(f"{name} are {len(items)}: {cap}={most} at the most")
    return items


# --- What they gave -------------------------------------------------------------------------------


def collected(steps: Steps, block_at: Callable[[int], AnyBlock]) -> Iterator[tuple[Step, Any]]:
    """Each step that was not skipped, and its output; a batch in memory at a time."""
    for step, kind, stored in steps.with_answers():
        if step.status != Step.Status.DONE:
            continue
        if step.child_id is None or step.error_class:
            yield step, (step.output or {}).get("content")
        else:
            yield step, children.value_of(kind, stored, block_at(step.number - steps.first))


def results(steps: Steps, do: AnyBlock) -> list[Any]:
    """All outputs in order, if that is not too much."""
    found, size = [], 0
    for _, value in collected(steps, lambda _: do):
        size += len(orjson.dumps(value))
        if size > MAX_OUTPUT_BYTES:
            raise StepFailed(
                f"the outputs are larger than {MAX_OUTPUT_BYTES} bytes: with collect: none they"
                " stay with their steps"
            )
        found.append(value)
    return found


def counts(steps: Steps) -> dict[str, int]:
    rows = steps.rows()
    skipped = rows.filter(status=Step.Status.SKIPPED).count()
    return {"count": steps.count, "done": steps.count - skipped, "skipped": skipped}


# --- Votes ----------------------------------------------------------------------------------------


def vote(run: Run, block: Parallel, wanted: Vote) -> dict[str, Any]:
    """Ends as soon as so many agree, or can't any more. Raises `StepFailed` without a quorum."""
    branches = block.branches
    count = len(branches) if branches is not None else block.copies or 0
    if branches is not None:
        job_at = of_branches(run, branches)
    else:
        do = only(block)
        job_at = of_items(run, do, do.name or "voter", list(range(count)), shows=False)

    def tally() -> tuple[Counter[str], dict[str, Any], int]:
        return counted(Steps(run.task.id, first, count), job_at, wanted)

    def is_decided() -> bool:
        votes, _, invalid = tally()
        most = max(votes.values(), default=0)
        left = count - votes.total() - invalid
        return most >= wanted.quorum or most + left < wanted.quorum

    first = run.number
    run.many(count, job_at, at_once=block.max_concurrency, is_enough=is_decided)
    votes, values, invalid = tally()
    said = {as_key(values[key]): number for key, number in votes.most_common()}
    if not votes or votes.most_common(1)[0][1] < wanted.quorum:
        raise StepFailed(f"no quorum of {wanted.quorum}: {orjson.dumps(said).decode()[:300]}")
    return {"winner": values[votes.most_common(1)[0][0]], "votes": said, "invalid": invalid}


def as_key(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def counted(
    steps: Steps, job_at: Callable[[int], Job], wanted: Vote
) -> tuple[Counter[str], dict[str, Any], int]:
    """Votes by what they are compared by, what each stands for, and how many are none."""
    votes: Counter[str] = Counter()
    values: dict[str, Any] = {}
    ended = steps.rows().filter(status__in=(Step.Status.DONE, Step.Status.SKIPPED)).count()
    for _, value in collected(steps, lambda number: job_at(number).block):
        try:
            said = vote_of(value, wanted)
        except (MissingValue, BadOutput):
            continue
        key = said.strip().casefold() if isinstance(said, str) else as_key(said)
        votes[key] += 1
        values.setdefault(key, said.strip() if isinstance(said, str) else said)
    return votes, values, ended - votes.total()


def vote_of(value: Any, wanted: Vote) -> Any:
    """Raises `MissingValue`, `BadOutput` for what is no vote."""
    if wanted.path is not None:
        value = look_up(tuple(wanted.path.split(".")), value)
    if value is None or value == "":
        raise BadOutput("an empty vote")
    if wanted.choices is None:
        return value
    found = named(as_key(value), wanted.choices)
    if found is None:
        raise BadOutput("no choice is named")
    return found
