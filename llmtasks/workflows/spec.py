"""What a workflow is, as JSON or as these objects in Python: one block, which may hold others.

    Workflow
    └── do: a block
        ├── prompt        one call of a model
        ├── agent         a model that uses tools until it answers
        ├── tool          one run of a tool
        ├── transform     a value made of others, without a call
        ├── workflow      another workflow, by its stored name
        ├── pipeline      blocks one after another
        ├── parallel      blocks, one block for each item, or copies that vote, at the same time
        ├── route         one of several blocks, by rule, classifier or likeness
        ├── orchestrator  a planner splits, workers work, a joiner joins
        └── evaluate      generate and criticise until good

Each block becomes a step, and a child task of its own (a transform is done on the spot). A block
sees by `{{ … }}` what the blocks around it see: `own` are its templates, `parts` its inner blocks
with the names that they see beyond.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
)

from llmtasks.errors import InvalidInput
from llmtasks.workflows.transform import Operation

MAX_STAGES = 100
MAX_ITEMS = 100_000
MAX_AT_ONCE = 1000
MAX_COPIES = 100
MAX_TURNS = 50

Name = Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,39}$")]
ModelName = Annotated[str, Field(min_length=1, max_length=100)]
Text = Annotated[str, Field(min_length=1, max_length=1_000_000)]
ToolName = Annotated[str, Field(pattern="^[a-zA-Z][a-zA-Z0-9_-]*(@[1-9][0-9]{0,7})?$")]
PromptName = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}(@([1-9][0-9]{0,8}|[a-z][a-z0-9-]{0,31}))?$")
]
Stored = Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,63}(@[1-9][0-9]{0,7})?$")]
Dollars = Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,10})?$")]
Count = Annotated[int, Field(ge=1, le=MAX_AT_ONCE)]


class Part(NamedTuple):
    """An inner block: where it is, what it is called, and the names that it sees beyond."""

    path: str
    block: "AnyBlock"
    name: str
    sees: frozenset[str] = frozenset()
    steps: frozenset[str] = frozenset()
    # How often it may run, at the most.
    times: int = 1


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Block(Strict):
    """What every block has. `lane` is the one of its task, by default the workflow's. A step that
    failed is tried `retries` times more; then the workflow fails, or goes on without it, or with
    `default`."""

    name: Name | None = None
    lane: Literal["interactive", "default", "bulk"] | None = None
    retries: int = Field(0, ge=0, le=10)
    on_error: Literal["fail", "skip", "default"] = "fail"
    default: Any = None
    deadline_s: float | None = Field(None, gt=0, le=30 * 86_400)

    def model_post_init(self, context: Any) -> None:
        # Said by the class where it is made in Python: `as_json` must not leave it out.
        self.model_fields_set.add("kind")

    def own(self) -> Iterator[tuple[str, Any]]:
        """The templates of the block itself, each with its place."""
        yield from ()

    def parts(self) -> Iterator[Part]:
        yield from ()


# --- Blocks that are one task -------------------------------------------------------------------


class PromptMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text


class Prompt(Block):
    """One call of a model. Its output is the answer's text, with `answer: json` the value that the
    text is; with `answer_schema` that fits the schema. `prompt` names a stored one, which has its
    texts and may have its model."""

    kind: Literal["prompt"] = "prompt"
    model: ModelName | None = None
    prompt: PromptName | None = None
    variables: dict[str, Any] = Field(default_factory=dict)
    system: Text | None = None
    text: Text | None = None
    messages: list[PromptMessage] | None = Field(None, min_length=1, max_length=1000)
    answer: Literal["text", "json"] = "text"
    answer_schema: dict[str, Any] | None = None
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2)

    def own(self) -> Iterator[tuple[str, Any]]:
        yield "system", self.system
        yield "text", self.text
        for index, message in enumerate(self.messages or ()):
            yield f"messages[{index}].content", message.content
        yield "variables", self.variables


class Agent(Block):
    """A model with tools, until it answers. Its output is the last answer's text."""

    kind: Literal["agent"] = "agent"
    model: ModelName
    system: Text | None = None
    text: Text
    tools: list[ToolName] = Field(default_factory=list, max_length=128)
    max_turns: int = Field(10, ge=1, le=100)
    max_cost: Dollars | None = None

    def own(self) -> Iterator[tuple[str, Any]]:
        yield "system", self.system
        yield "text", self.text


class Tool(Block):
    """One run of a tool. Its output is the result, as a value where it is a JSON object or list."""

    kind: Literal["tool"] = "tool"
    tool: ToolName
    arguments: dict[str, Any] = Field(default_factory=dict)

    def own(self) -> Iterator[tuple[str, Any]]:
        yield "arguments", self.arguments


class Transform(Block):
    """`value` with its placeholders replaced, then each operation of `do` in turn."""

    kind: Literal["transform"] = "transform"
    value: Any
    do: list[Operation] = Field(default_factory=list, max_length=20)

    def own(self) -> Iterator[tuple[str, Any]]:
        yield "value", self.value


class Use(Block):
    """A stored workflow. It sees nothing but its `input`. `of` is its declaration, which is put in
    when work is submitted."""

    kind: Literal["workflow"] = "workflow"
    workflow: Stored
    input: dict[str, Any] = Field(default_factory=dict)
    of: "Workflow | None" = None

    def own(self) -> Iterator[tuple[str, Any]]:
        yield "input", self.input


# --- Blocks of blocks ---------------------------------------------------------------------------


class Pipeline(Block):
    """Stages one after another; each sees `steps.<name>.output` of those before it. The output is
    the last stage's, or `output`."""

    kind: Literal["pipeline"] = "pipeline"
    stages: list["AnyBlock"] = Field(min_length=1, max_length=MAX_STAGES)
    output: Any = None

    def own(self) -> Iterator[tuple[str, Any]]:
        # It sees all stages: looked at in `checks`.
        yield from ()

    def parts(self) -> Iterator[Part]:
        before: frozenset[str] = frozenset()
        for index, stage in enumerate(self.stages):
            yield Part(f"stages[{index}]", stage, stage.name or "", steps=before)
            before |= {stage.name or ""}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(stage.name or "" for stage in self.stages)


class Vote(Strict):
    """What most say, if so many do. A vote is the value at `path` of an output; with `choices` it
    is the one choice that the text names. What is no vote does not count."""

    quorum: int = Field(ge=1, le=MAX_COPIES)
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")] | None = None
    choices: list[Text] | None = Field(None, min_length=2, max_length=100)


class Parallel(Block):
    """Blocks at the same time, `max_concurrency` at the most: `branches`, or `do` for each of
    `items` (it sees `item` and `index`), or `copies` of `do` that vote. The output of branches is
    an object by their names, of items a list in their order, of a vote `{winner, votes, invalid}`.
    With `collect: none` it is the counts alone, however many there are."""

    kind: Literal["parallel"] = "parallel"
    branches: list["AnyBlock"] | None = Field(None, min_length=1, max_length=MAX_STAGES)
    do: "AnyBlock | None" = None
    items: Any = None
    max_items: int | None = Field(None, ge=1, le=MAX_ITEMS)
    copies: int | None = Field(None, ge=1, le=MAX_COPIES)
    max_concurrency: Count = 100
    vote: Vote | None = None
    collect: Literal["list", "none"] = "list"

    def own(self) -> Iterator[tuple[str, Any]]:
        yield "items", self.items

    def parts(self) -> Iterator[Part]:
        for index, branch in enumerate(self.branches or ()):
            yield Part(f"branches[{index}]", branch, branch.name or "")
        if self.do is not None:
            sees = frozenset({"index"} if self.items is None else {"item", "index"})
            times = self.copies or self.max_items or 1
            yield Part("do", self.do, self.do.name or "item", sees=sees, times=times)


class Rule(Strict):
    """Holds where all that is given does. Texts are compared without regard to case."""

    equals: Any = None
    contains: Text | None = None
    one_of: list[Any] | None = Field(None, min_length=1, max_length=1000)
    less: float | None = None
    greater: float | None = None


class Choice(Strict):
    """`when` decides by rule; `about` tells a classifier, `examples` are what is alike."""

    name: Name
    when: Rule | None = None
    about: Text | None = None
    examples: list[Text] | None = Field(None, min_length=1, max_length=100)
    do: "AnyBlock"


class Route(Block):
    """One of `choices`, decided on the value `on`: the first whose rule holds; the one that the
    model names; the one whose examples are the most alike, if that is `least` or more. Else
    `otherwise`. The output is the chosen block's."""

    kind: Literal["route"] = "route"
    by: Literal["rule", "classifier", "embedding"]
    on: Any
    model: ModelName | None = None
    choices: list[Choice] = Field(min_length=1, max_length=MAX_STAGES)
    otherwise: "AnyBlock | None" = None
    least: float = Field(0.0, ge=-1, le=1)

    def own(self) -> Iterator[tuple[str, Any]]:
        yield "on", self.on

    def parts(self) -> Iterator[Part]:
        for index, choice in enumerate(self.choices):
            yield Part(f"choices[{index}].do", choice.do, choice.do.name or choice.name)
        if self.otherwise is not None:
            yield Part("otherwise", self.otherwise, self.otherwise.name or "otherwise")


class Orchestrator(Block):
    """`planner` gives a list; `worker` runs for each of its items, `max_workers` of them at the
    most (it sees `item` and `index`); `join` sees `results`, their outputs in order. Without `join`
    the output is that list."""

    kind: Literal["orchestrator"] = "orchestrator"
    planner: "AnyBlock"
    worker: "AnyBlock"
    join: "AnyBlock | None" = None
    max_workers: int = Field(ge=1, le=MAX_ITEMS)
    max_concurrency: Count = 100

    def parts(self) -> Iterator[Part]:
        yield Part("planner", self.planner, self.planner.name or "planner")
        yield Part(
            "worker", self.worker, self.worker.name or "worker",
            sees=frozenset({"item", "index"}), times=self.max_workers,
        )  # fmt: skip
        if self.join is not None:
            yield Part("join", self.join, self.join.name or "join", sees=frozenset({"results"}))


class Evaluate(Block):
    """`generate` (it sees the last `draft` and `critique`, null at first), then `critique` (it sees
    the `draft`), until `good` holds for the critique's output, at `path` if given; at most
    `max_turns` times and, between two turns, `max_cost`. The output is
    `{draft, critique, good, turns}`; where it never was good the last one, or the step fails."""

    kind: Literal["evaluate"] = "evaluate"
    generate: "AnyBlock"
    critique: "AnyBlock"
    good: Rule
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")] | None = None
    max_turns: int = Field(3, ge=1, le=MAX_TURNS)
    max_cost: Dollars | None = None
    never_good: Literal["last", "fail"] = "last"

    def parts(self) -> Iterator[Part]:
        both = frozenset({"draft", "critique"})
        name = self.generate.name or "generate"
        yield Part("generate", self.generate, name, sees=both, times=self.max_turns)
        name = self.critique.name or "critique"
        yield Part("critique", self.critique, name, sees=both, times=self.max_turns)


LEAVES = (Prompt, Agent, Tool, Transform)


def tag_of(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"<{kind}>" if isinstance(kind, str) else None


AnyBlock = Annotated[
    Annotated[Prompt, Tag("<prompt>")]
    | Annotated[Agent, Tag("<agent>")]
    | Annotated[Tool, Tag("<tool>")]
    | Annotated[Transform, Tag("<transform>")]
    | Annotated[Use, Tag("<workflow>")]
    | Annotated[Pipeline, Tag("<pipeline>")]
    | Annotated[Parallel, Tag("<parallel>")]
    | Annotated[Route, Tag("<route>")]
    | Annotated[Orchestrator, Tag("<orchestrator>")]
    | Annotated[Evaluate, Tag("<evaluate>")],
    Discriminator(
        tag_of,
        custom_error_type="at.kind",
        custom_error_message="give a block whose kind is prompt, agent, tool, transform, workflow,"
        " pipeline, parallel, route, orchestrator or evaluate",
    ),
]


class Workflow(Strict):
    """A whole declaration. `variables` is the JSON schema of its `input`; `max_cost` is looked at
    between its steps."""

    variables: dict[str, Any] | None = None
    max_cost: Dollars | None = None
    do: AnyBlock


for _model in (Use, Pipeline, Parallel, Choice, Route, Orchestrator, Evaluate, Workflow):
    _model.model_rebuild()

WORKFLOW: TypeAdapter[Workflow] = TypeAdapter(Workflow)
BLOCK: TypeAdapter[AnyBlock] = TypeAdapter(AnyBlock)


def parse(value: Any) -> Workflow:
    """Raises `InvalidInput` that names the first wrong field."""
    try:
        return WORKFLOW.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        steps = [step for step in first["loc"] if not str(step).startswith("<")]
        if first["type"].startswith("at."):
            # A fault of a field that its whole object shows.
            steps.append(first["type"].removeprefix("at."))
        place = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps).lstrip(".")
        raise InvalidInput(f"{place}: {first['msg']}", param=place or None) from None


def as_json(model: BaseModel) -> dict[str, Any]:
    """The declaration as JSON, without what was not said."""
    shown: dict[str, Any] = model.model_dump(mode="json", exclude_unset=True)
    return shown
