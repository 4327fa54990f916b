"""What pydantic can't see of a declaration: names, references, bounds, and that what it uses is
there. The first fault is an `InvalidInput` that names its field."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from llmtasks import routing
from llmtasks.errors import ApiError, InvalidInput
from llmtasks.models import Kind
from llmtasks.workflows import spec, templates
from llmtasks.workflows.spec import AnyBlock, Workflow
from llmtasks.workflows.templates import BadTemplate, Path

MAX_DEPTH = 10
MAX_BLOCKS = 1000
# Tasks that one run may make, retries aside.
MAX_TASKS = 100_000
# What stands for a value of its own, beside `input` and `steps`.
VALUES = frozenset({"item", "index", "draft", "critique", "results"})


def fault(path: str, message: str) -> InvalidInput:
    return InvalidInput(f"{path}: {message}", param=path)


@dataclass(frozen=True)
class Seen:
    """What the templates at a place may name. `later`: steps that come after it."""

    values: frozenset[str] = frozenset()
    steps: frozenset[str] = frozenset()
    later: frozenset[str] = frozenset()
    # The variables of the workflow's input; None where any may be given.
    variables: frozenset[str] | None = None


def check(workflow: Workflow, prefix: str = "") -> None:
    """Raises `InvalidInput`."""
    check_shape(workflow, prefix)
    for path, block in all_blocks(workflow.do, f"{prefix}do"):
        check_model(block, path)


def check_shape(workflow: Workflow, prefix: str = "") -> None:
    """All but whether models are there."""
    if workflow.variables is not None:
        check_schema(workflow.variables, f"{prefix}variables")
    if sum(1 for _ in all_blocks(workflow.do, "")) > MAX_BLOCKS:
        raise fault(f"{prefix}do", f"more than {MAX_BLOCKS} blocks")
    check_block(workflow.do, f"{prefix}do", Seen(variables=variables_of(workflow)), 1)
    check_size(workflow, prefix)


def check_size(workflow: Workflow, prefix: str = "") -> None:
    """How much it may become, with the workflows that were put in."""
    if (most := tasks_of(workflow.do)) > MAX_TASKS:
        raise fault(
            f"{prefix}do",
            f"it may make {most} tasks, {MAX_TASKS} at the most: lower max_items, max_workers,"
            " max_turns or copies",
        )


def all_blocks(block: AnyBlock, path: str) -> Iterator[tuple[str, AnyBlock]]:
    """The block and all within it."""
    yield path, block
    for part in block.parts():
        yield from all_blocks(part.block, f"{path}.{part.path}")


def variables_of(workflow: Workflow) -> frozenset[str] | None:
    known = (workflow.variables or {}).get("properties")
    return frozenset(known) if isinstance(known, dict) else None


def tasks_of(block: AnyBlock) -> int:
    """How many tasks it may come to, itself included. As deep as blocks are nested."""
    inner = workflow.do if (workflow := getattr(block, "of", None)) is not None else None
    own = 1 + (tasks_of(inner) if inner is not None else 0)
    return own + sum(part.times * tasks_of(part.block) for part in block.parts())


# --- One block ------------------------------------------------------------------------------------


def check_block(block: AnyBlock, path: str, seen: Seen, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise fault(path, f"blocks are nested more than {MAX_DEPTH} deep")
    if (block.on_error == "default") != ("default" in block.model_fields_set):
        raise fault(f"{path}.default", "it goes with on_error: default, and only with it")
    for place, value in block.own():
        check_references(value, f"{path}.{place}", seen)
    for kind, look in CHECKS:
        if isinstance(block, kind):
            look(block, path)
    names: set[str] = set()
    stages = block.names if isinstance(block, spec.Pipeline) else frozenset()
    for part in block.parts():
        place = f"{path}.{part.path}"
        if part.name in names and not isinstance(block, spec.Route):
            raise fault(f"{place}.name", f"there are two {part.name!r}")
        if part.name in seen.steps:
            raise fault(f"{place}.name", f"a step around it is called {part.name!r} already")
        names.add(part.name)
        inner = replace(
            seen,
            values=seen.values | part.sees,
            steps=seen.steps | part.steps,
            later=seen.later | (stages - part.steps),
        )
        check_block(part.block, place, inner, depth + 1)
    if isinstance(block, spec.Pipeline):
        check_references(block.output, f"{path}.output", replace(seen, steps=seen.steps | stages))


def check_references(value: Any, path: str, seen: Seen) -> None:
    try:
        found = list(templates.references(value))
    except BadTemplate as error:
        raise fault(path, str(error)) from None
    for reference in found:
        if why := why_unknown(reference, seen):
            raise fault(path, f"{{{{ {'.'.join(reference)} }}}}: {why}")


def why_unknown(reference: Path, seen: Seen) -> str:
    """Why nothing can be there; empty where something can."""
    root, *rest = reference
    if root == "input":
        if rest and seen.variables is not None and rest[0] not in seen.variables:
            known = ", ".join(sorted(seen.variables)) or "none"
            return f"there is no variable {rest[0]!r}: there is {known}"
        return ""
    if root != "steps":
        return "" if root in seen.values else unknown_value(root)
    if len(rest) < 2 or rest[1] != "output":
        return "write steps.<name>.output"
    if rest[0] in seen.steps:
        return ""
    if rest[0] in seen.later:
        return "a cycle: the step does not come before this one"
    known = ", ".join(sorted(seen.steps)) or "none"
    return f"there is no step {rest[0]!r} before this one: there is {known}"


def unknown_value(root: str) -> str:
    if root in VALUES:
        return f"there is no {root} here"
    return "write input.<name>, steps.<name>.output, or a value that the block around gives"


def check_schema(schema: dict[str, Any], path: str) -> None:
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except (jsonschema.SchemaError, RecursionError) as error:
        raise fault(path, f"this is no JSON schema: {str(error)[:200]}") from None


def check_prompt(block: spec.Prompt, path: str) -> None:
    given = [n for n in ("text", "messages", "prompt") if getattr(block, n) is not None]
    if len(given) != 1:
        raise fault(f"{path}.text", "give either text, messages or prompt")
    if block.system is not None and block.text is None:
        raise fault(f"{path}.system", f"it goes with text: {given[0]} has its own")
    if block.variables and block.prompt is None:
        raise fault(f"{path}.variables", "they go with a prompt")
    if block.model is None and block.prompt is None:
        raise fault(f"{path}.model", "this field is required")
    if block.answer_schema is not None:
        check_schema(block.answer_schema, f"{path}.answer_schema")


def check_names(block: spec.Pipeline, path: str) -> None:
    for index, stage in enumerate(block.stages):
        if stage.name is None:
            raise fault(f"{path}.stages[{index}].name", "a stage needs a name")


def check_parallel(block: spec.Parallel, path: str) -> None:
    ways = [n for n in ("branches", "items", "copies") if getattr(block, n) is not None]
    if len(ways) != 1:
        raise fault(path, "give one of branches, items (with do) and copies (with do)")
    if (block.do is None) != (ways == ["branches"]):
        raise fault(f"{path}.do", "items and copies need it, branches have none")
    for index, branch in enumerate(block.branches or ()):
        if branch.name is None:
            raise fault(f"{path}.branches[{index}].name", "a branch needs a name")
    if (block.items is not None) != (block.max_items is not None):
        raise fault(f"{path}.max_items", "an unbounded fan-out: items need max_items")
    if block.vote is not None:
        check_vote(block, block.vote, path)


def check_vote(block: spec.Parallel, vote: spec.Vote, path: str) -> None:
    if block.items is not None:
        raise fault(f"{path}.vote", "branches or copies vote, items do not")
    if vote.quorum > (voters := block.copies or len(block.branches or ())):
        raise fault(f"{path}.vote.quorum", f"there are {voters} voters")


def check_route(block: spec.Route, path: str) -> None:
    field = {"rule": "when", "classifier": "about", "embedding": "examples"}[block.by]
    if (block.by == "rule") != (block.model is None):
        raise fault(f"{path}.model", "a classifier and an embedding need it, a rule has none")
    names = set()
    for index, choice in enumerate(block.choices):
        place = f"{path}.choices[{index}]"
        for other in ("when", "about", "examples"):
            if (getattr(choice, other) is not None) != (other == field):
                wanted = "needs" if other == field else "has no"
                raise fault(f"{place}.{other}", f"a choice by {block.by} {wanted} {other}")
        if choice.name in names:
            raise fault(f"{place}.name", f"there are two {choice.name!r}")
        names.add(choice.name)
        if choice.when is not None:
            check_rule(choice.when, f"{place}.when")


def check_rule(rule: spec.Rule, path: str) -> None:
    if not rule.model_fields_set:
        raise fault(path, "give equals, contains, one_of, less or greater")


CHECKS: tuple[tuple[type, Any], ...] = (
    (spec.Prompt, check_prompt),
    (spec.Pipeline, check_names),
    (spec.Parallel, check_parallel),
    (spec.Route, check_route),
    (spec.Evaluate, lambda block, path: check_rule(block.good, f"{path}.good")),
)


# --- What it uses ---------------------------------------------------------------------------------


def check_model(block: AnyBlock, path: str) -> None:
    """Raises where there is no such model."""
    kind = Kind.CHAT
    if isinstance(block, spec.Route) and block.by == "embedding":
        kind = Kind.EMBEDDING
    model = getattr(block, "model", None)
    if model is not None:
        try:
            routing.find(model, kind)
        except ApiError as error:
            raise type(error)(f"{path}.model: {error.message}", param=f"{path}.model") from None


def defaults_of(workflow: Workflow) -> dict[str, Any]:
    """What its variables are where they are not given."""
    known = (workflow.variables or {}).get("properties") or {}
    return {n: s["default"] for n, s in known.items() if isinstance(s, dict) and "default" in s}


def missing_variables(workflow: Workflow, given: dict[str, Any]) -> tuple[str, str] | None:
    """The first variable that a template names and that is not given, and where."""
    for path, block in all_blocks(workflow.do, "do"):
        own = list(block.own())
        if isinstance(block, spec.Pipeline):
            own.append(("output", block.output))
        for place, value in own:
            for root, *rest in templates.references(value):
                if root == "input" and rest and rest[0] not in given:
                    return rest[0], f"{path}.{place}"
    return None


def needs(block: AnyBlock) -> frozenset[Path]:
    """What a block takes from around it: `("input", name)`, `("steps", name)`, `("item",)` …"""
    found: set[Path] = set()
    own = [value for _, value in block.own()]
    inside: frozenset[str] = frozenset()
    if isinstance(block, spec.Pipeline):
        own.append(block.output)
        inside = block.names
    for value in own:
        for path in templates.references(value):
            found.add(path[:2] if path[0] in ("input", "steps") else path[:1])
    for part in block.parts():
        found |= {path for path in needs(part.block) if path[0] not in part.sees}
    return frozenset(p for p in found if not (p[0] == "steps" and p[1:] and p[1] in inside))
