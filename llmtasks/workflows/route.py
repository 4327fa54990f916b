"""One of several blocks, by rule, by a model's word, or by likeness to examples."""

from collections.abc import Callable
from typing import Any

from llmtasks.errors import StepFailed
from llmtasks.models import Kind, Task
from llmtasks.workflows import children
from llmtasks.workflows.run import Job, Run
from llmtasks.workflows.spec import Prompt, Route, Transform
from llmtasks.workflows.templates import as_text, render
from llmtasks.workflows.transform import BadOutput
from llmtasks.workflows.words import holds, likeness, named
from providers.types import Message, Request, Text

TELL = """Decide which of these fits the user's message. Answer with its name alone.

"""
DECISION = "decision"


def run(run: Run, block: Route) -> Any:
    chosen = run.one(decision(run, block))
    for part in block.parts():
        if part.path == f"choices[{index_of(block, chosen)}].do" or (
            chosen is None and part.path == "otherwise"
        ):
            return run.one(Job(part.name, part.block, run.scope))
    raise StepFailed("no choice fits, and there is no otherwise")


def index_of(block: Route, chosen: Any) -> int:
    return next((i for i, choice in enumerate(block.choices) if choice.name == chosen), -1)


def decision(run: Run, block: Route) -> Job:
    """The step whose output is the chosen one's name, None for none."""
    value = render(block.on, run.scope)
    if block.by == "rule":
        fits = (c.name for c in block.choices if c.when is not None and holds(c.when, value))
        # The name has no placeholder.
        return Job(DECISION, Transform(value=next(fits, None)), {}, kind=DECISION)
    make, check = CALLS[block.by](block, as_text(value))
    plain = Prompt(model=block.model or "-", text="-")
    return Job(DECISION, plain, {}, kind=DECISION, make=make, check=check)


def by_classifier(block: Route, text: str) -> tuple[Callable[[Task], Task], Callable[[Any], Any]]:
    names = [choice.name for choice in block.choices]
    told = TELL + "\n".join(f"{choice.name}: {choice.about}" for choice in block.choices)
    request = Request(
        model=block.model or "",
        messages=(
            Message(role="system", parts=(Text(text=told),)),
            Message(role="user", parts=(Text(text=text),)),
        ),
    )

    def check(answer: Any) -> str | None:
        found = named(as_text(answer), names)
        if found is None and block.otherwise is None:
            raise BadOutput(f"the model named none of {', '.join(names)}")
        return found

    return lambda parent: children.task_for(parent, Kind.CHAT, request, lane=block.lane), check


def by_embedding(block: Route, text: str) -> tuple[Callable[[Task], Task], Callable[[Any], Any]]:
    examples = [(c.name, example) for c in block.choices for example in c.examples or ()]
    request = children.embedding(block.model or "", [text, *(example for _, example in examples)])

    def check(vectors: Any) -> str | None:
        if not isinstance(vectors, list) or len(vectors) != len(examples) + 1:
            raise BadOutput("there is not a vector for each text")
        wanted, *others = vectors
        alike = [
            (likeness(wanted, other), name)
            for other, (name, _) in zip(others, examples, strict=True)
        ]
        best, name = max(alike)
        return name if best >= block.least else None

    return lambda parent: children.task_for(parent, Kind.EMBEDDING, request, lane=block.lane), check


CALLS = {"classifier": by_classifier, "embedding": by_embedding}
