"""The agent: model → tool calls → results → model, until it answers.

    resume → each turn: check caps → ask the model → run its calls (or wait for them)

What was done is in the steps, and is never done again: an agent that was interrupted, blocked or
handed to another worker goes on after them. A model's turn is step n, its calls are the steps
after it. A failing call is a result that the model sees, never the end of the task.
"""

import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson
from uuid_utils.compat import uuid7

from llmtasks import bodies, call, events, pulse, steps, stores
from llmtasks.bodies import AgentRequest, ToolRequest
from llmtasks.context import Context, Event, Reset, drop_error
from llmtasks.errors import AgentStopped, NotFound
from llmtasks.models import Kind, Mode, Status, Step, Task
from llmtasks.routing import TOOLS
from llmtasks.tools import run as tool_run
from llmtasks.tools.registry import Tool, registry
from llmtasks.tools.run import Caller, Result
from providers.types import Message, Request, Response, ToolCall, ToolResult, ToolSpec

AWAIT = "await_results"
AWAIT_SPEC = ToolSpec(
    name=AWAIT,
    description="Wait for calls that were queued, and get their results. Use it only where you"
    " can't answer without them.",
    parameters={
        "type": "object",
        "properties": {"ids": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
        "required": ["ids"],
        "additionalProperties": False,
    },
)
# The same call so often, and the model is told so in place of a result.
MOST_REPEATS = 3
MAX_CALLS_A_TURN = 64


@dataclass
class Talk:
    """Where an agent is: what was said, and the last turn's calls with their steps."""

    request: AgentRequest
    names: Mapping[str, Tool]
    turns: list[tuple[Response, list[Step]]] = field(default_factory=list)
    next_number: int = 0

    def add(self, number: int, answer: Response) -> None:
        self.turns.append((answer, []))
        self.next_number = number + 1 + len(answer.tool_calls)

    @property
    def open_calls(self) -> bool:
        if not self.turns:
            return False
        answer, done = self.turns[-1]
        ended = [s for s in done if s.status in (Step.Status.DONE, Step.Status.FAILED)]
        return len(ended) < len(answer.tool_calls)

    def messages(self) -> tuple[Message, ...]:
        """What the model is sent: the caller's messages, then each turn and its results."""
        said = list(self.request.chat.messages)
        for answer, done in self.turns:
            said.append(Message(role="assistant", parts=answer.parts))
            said.extend(
                Message(
                    role="tool",
                    parts=(
                        ToolResult(
                            call_id=step.call_id,
                            content=(step.output or {}).get("content", ""),
                            is_error=step.status == Step.Status.FAILED,
                        ),
                    ),
                )
                for step in sorted(done, key=lambda step: step.number)
            )
        return tuple(said)

    def repeats(self, call_: ToolCall) -> int:
        """How often this very call was made in earlier turns."""
        return sum(
            (other.name, other.arguments) == (call_.name, call_.arguments)
            for answer, _ in self.turns[:-1]
            for other in answer.tool_calls
        )


def stream(request: AgentRequest, context: Context) -> Generator[Event, None, Response]:
    """Yield the deltas of every turn and return the last answer. Raises as `call.stream` does,
    and `AgentStopped` at one of the request's caps."""
    task = context.task
    with pulse.watch(task.id, context.drop, context.client, task.owner_id):
        talk = resume(request, [] if task._state.adding else steps.of(task.id))
        resumed_at = talk.next_number
        while True:
            if talk.open_calls:
                run_calls(talk, context)
                continue
            check_caps(talk, context)
            number = talk.next_number
            answer = yield from ask(talk, context, number, is_new=number > resumed_at)
            tell_turn(task, number, Step.Status.DONE)
            if not answer.tool_calls:
                return answer
            talk.add(number, answer)


def resume(request: AgentRequest, done: Sequence[Step]) -> Talk:
    """The talk as the steps tell it."""
    talk = Talk(request, model_names(request.tools))
    for step in done:
        if step.kind == Step.Kind.MODEL:
            talk.add(step.number, bodies.load_response(Kind.AGENT, step.output))
        else:
            talk.turns[-1][1].append(step)
    return talk


def model_names(references: Sequence[str]) -> dict[str, Tool]:
    """Each tool by the name that the model calls it by. One that is gone is left out: calls of it
    are told so."""
    found = [tool for name in references if (tool := known(name)) is not None]
    names: dict[str, Tool] = {}
    for tool in found:
        is_one = sum(other.name == tool.name for other in found) == 1
        names[tool.name if is_one else f"{tool.name}_v{tool.version}"] = tool
    return names


def known(reference: str) -> Tool | None:
    try:
        return registry.find(reference)
    except NotFound:
        return None


def check_caps(talk: Talk, context: Context) -> None:
    """Raises what ends an agent that went on for too long."""
    task, request = context.task, talk.request
    if context.dropped:
        raise drop_error(context)
    if len(talk.turns) >= request.max_turns:
        raise AgentStopped(f"no answer within max_turns={request.max_turns} calls of the model")
    used = (
        task.input_tokens + task.cached_input_tokens + task.cache_write_tokens
        + task.output_tokens + task.reasoning_tokens
    )  # fmt: skip
    if request.max_tokens is not None and used >= request.max_tokens:
        raise AgentStopped(f"no answer within max_tokens={request.max_tokens}: {used} were used")
    if request.max_cost is not None and (task.cost or 0) >= request.max_cost:
        raise AgentStopped(f"no answer within max_cost={request.max_cost}: {task.cost} was spent")


def ask(
    talk: Talk, context: Context, number: int, *, is_new: bool
) -> Generator[Event, None, Response]:
    """One turn of the model. Its answer is step `number`, or the task's where no tool is called."""
    turn = replace(
        context, step=number, ends_task=True, is_turn=True, exchange=None, grant=None, second=None,
        number=0, answering=0, is_new_step=is_new,
    )  # fmt: skip
    if number and turn.may_restart:
        # Watchers follow the new turn's text by itself.
        yield Reset(context.task.attempts + 1, "turn")
    tell_turn(context.task, number, Step.Status.RUNNING)
    chat: Request = replace(
        talk.request.chat,
        messages=talk.messages(),
        tools=(*specs(talk.names), *talk.request.chat.tools),
    )
    answer = call.stream(chat, turn)
    while True:
        try:
            event = next(answer)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        # Watchers know attempts by their number in the whole task.
        context.answering = context.task.attempts
        yield event


def specs(names: Mapping[str, Tool]) -> tuple[ToolSpec, ...]:
    given = tuple(
        ToolSpec(name=name, description=tool.description, parameters=tool.parameters)
        for name, tool in names.items()
    )
    return given if all(tool.critical for tool in names.values()) else (*given, AWAIT_SPEC)


# --- A turn's calls -------------------------------------------------------------------------------


def run_calls(talk: Talk, context: Context) -> None:
    """Bring every call of the last turn to its end. Raises `Snooze` where the task is blocked by
    one that waits for a child or a person."""
    task = context.task
    answer, done = talk.turns[-1]
    base = talk.next_number - len(answer.tool_calls)
    new = begin_calls(talk, context, base, {step.number for step in done})
    done.extend(new.values())
    for step in done:
        if step.status == Step.Status.RUNNING and step.number not in new:
            take_up(talk, task, step)
        if step.status == Step.Status.OPEN:
            look_for_results(task, step)
    if ready := [step for step in done if is_to_run(step)]:
        run_together(talk, context, ready)
    if context.dropped:
        raise drop_error(context)
    if talk.open_calls:
        waits = [one for step in done if step.status == Step.Status.OPEN for one in awaited(step)]
        if task.mode == Mode.INLINE:
            # Whoever waits holds the line: children are looked for again and again.
            stores.release()
            context.pause(0.1)
            if context.left_s <= 0:
                raise AgentStopped("the deadline passed while the agent waited for results")
            return
        steps.block(task, waits)


def begin_calls(talk: Talk, context: Context, base: int, known: Collection[int]) -> dict[int, Step]:
    """Write down the last turn's calls that have no step yet; those steps by their numbers."""
    answer, _ = talk.turns[-1]
    rows, children = [], []
    for number, wanted in enumerate(answer.tool_calls, base):
        if number not in known:
            step, child = begun(talk, wanted, number, context)
            rows.append(step)
            children.extend([child] if child is not None else [])
    steps.begin(context.task, rows, children)
    for step in rows:
        steps.tell(step)
    return {step.number: step for step in rows}


def is_to_run(step: Step) -> bool:
    return step.kind == Step.Kind.TOOL and step.status in (
        Step.Status.RUNNING, Step.Status.APPROVED,
    )  # fmt: skip


def begun(talk: Talk, wanted: ToolCall, number: int, context: Context) -> tuple[Step, Task | None]:
    """The step that a call becomes, and its child task where it goes to the background."""
    task = context.task
    step = Step(
        id=uuid7(), task_id=task.id, tenant_id=task.tenant_id, number=number,
        kind=Step.Kind.TOOL, name=bodies.storable(wanted.name)[:100],
        call_id=bodies.storable(wanted.id)[:200],
        status=Step.Status.RUNNING, started_at=pulse.now(),
    )  # fmt: skip
    if wanted.name == AWAIT and any(not tool.critical for tool in talk.names.values()):
        return awaiting(step, wanted, task), None
    tool = talk.names.get(wanted.name)
    values = tool_run.values_of(wanted.arguments)
    if (fault := refused(talk, wanted, tool, values, context)) is not None:
        return ended(step, fault), None
    if tool is None or isinstance(values, Result):
        raise TypeError("a call that was refused goes no further")
    step.name, step.input = tool.reference, bodies.replaced(dict(values))
    if tool.needs_approval:
        step.status = Step.Status.APPROVAL
        return step, None
    if tool.critical:
        return step, None
    child = child_of(task, tool, values)
    step.child_id = child.id
    return ended(step, Result(orjson.dumps({"queued": str(child.id)}).decode())), child


def refused(
    talk: Talk, wanted: ToolCall, tool: Tool | None, values: Any, context: Context
) -> Result | None:
    """What the model is told in place of a result, where the call can't be made."""
    if tool is None:
        known = ", ".join(talk.names) or "none"
        return Result(f"there is no tool {wanted.name!r}: there is {known}", "UnknownTool")
    if isinstance(values, Result):
        return values
    if refusal := tool_run.refused(tool, caller_of(context)):
        return refusal
    if fault := tool_run.fault_of(tool.parameters, values):
        return Result(f"the arguments fit no call of {tool.name}: {fault}", "BadArguments")
    if talk.repeats(wanted) >= MOST_REPEATS:
        return Result(
            "this very call was made several times: use its results, or answer", "Repeated"
        )
    if tool.needs_approval and context.task.mode == Mode.INLINE:
        return Result(f"{tool.name} needs a person's approval: queue the agent", "NeedsApproval")
    return None


def ended(step: Step, result: Result) -> Step:
    step.status = Step.Status.FAILED if result.is_error else Step.Status.DONE
    step.error_class = result.error
    step.output = {"content": bodies.storable(result.content)}
    step.finished_at = pulse.now()
    return step


def child_of(task: Task, tool: Tool, values: Mapping[str, Any]) -> Task:
    """A queued task for a call that nobody waits for."""
    now = pulse.now()
    child = Task(
        id=uuid7(), tenant_id=task.tenant_id, key_id=task.key_id, kind=Kind.TOOL,
        mode=Mode.QUEUED, lane=task.lane, status=Status.WAITING, route=tool.reference,
        provider=TOOLS, user=task.user, metadata=task.metadata, request_id=task.request_id,
        on_unknown="retry" if tool.idempotent else "fail", created_at=now, not_before=now,
        deadline=max(task.deadline, now + timedelta(days=1)), parent_id=task.id,
    )  # fmt: skip
    request = ToolRequest(tool=tool.reference, arguments=values)
    child.body = bodies.dump_request(Kind.TOOL, request)
    return child


def take_up(talk: Talk, task: Task, step: Step) -> None:
    """A call that was under way when its process died."""
    tool = next((t for t in talk.names.values() if t.reference == step.name), None)
    if tool is None or not tool.idempotent:
        # It may have happened: a person decides.
        steps.change(task, step, Step.Status.UNKNOWN)
        steps.tell(step)


def run_together(talk: Talk, context: Context, wanted: Sequence[Step]) -> None:
    """Run critical calls at the same time, and write their results."""
    by_reference = {tool.reference: tool for tool in talk.names.values()}
    task = context.task
    caller = caller_of(context)
    results: dict[UUID, Result] = {}

    def run(step: Step) -> None:
        tool = by_reference.get(step.name)
        results[step.id] = (
            Result(f"there is no tool {step.name} any more", "UnknownTool")
            if tool is None
            else tool_run.run(tool, step.input or {}, caller)
        )

    for step in wanted:
        if step.status == Step.Status.APPROVED:
            steps.change(task, step, Step.Status.RUNNING)
            steps.tell(step)
    # Whoever waits for tools keeps no connection that they may want.
    stores.release()
    if len(wanted) == 1:
        run(wanted[0])
    threads = [threading.Thread(target=run, args=(step,), daemon=True) for step in wanted[1:]]
    for thread in threads:
        thread.start()
    if len(wanted) > 1:
        run(wanted[0])
    for thread in threads:
        thread.join()
    for step in wanted:
        ended(step, results[step.id])
    steps.finish(task, wanted)
    for step in wanted:
        steps.tell(step)


def caller_of(context: Context) -> Caller:
    return Caller(context.task.tenant_id, context.task.key_id, True, context.left_s)


def tell_turn(task: Task, number: int, status: str) -> None:
    """A turn of the model, to whoever watches."""
    events.publish_step(
        task.id, number=number, kind=Step.Kind.MODEL, name=task.route, status=status
    )


# --- Waiting for results --------------------------------------------------------------------------


def awaiting(step: Step, wanted: ToolCall, task: Task) -> Step:
    """The step of an `await_results`."""
    step.kind = Step.Kind.WAIT
    values = tool_run.values_of(wanted.arguments)
    if isinstance(values, Result):
        return ended(step, values)
    if fault := tool_run.fault_of(AWAIT_SPEC.parameters, values):
        return ended(step, Result(f"the arguments fit no call of {AWAIT}: {fault}", "BadArguments"))
    ids = []
    for name in values["ids"]:
        try:
            ids.append(UUID(name))
        except ValueError:
            return ended(step, Result(f"{name!r} is no id of a queued call", "BadArguments"))
    unknown = set(ids) - steps.children_of(task, ids).keys()
    if unknown:
        names = ", ".join(sorted(str(one) for one in unknown))
        return ended(step, Result(f"there is no queued call {names}", "BadArguments"))
    step.status = Step.Status.OPEN
    step.input = {"ids": [str(one) for one in ids]}
    return step


def look_for_results(task: Task, step: Step) -> None:
    """End a wait whose children have all ended."""
    found = steps.children_of(task, awaited(step))
    if not all(steps.is_final(child) for child in found.values()):
        return
    shown = {str(one): result_of(child) for one, child in found.items()}
    content = orjson.dumps({"results": shown}).decode()
    steps.change(task, step, Step.Status.DONE, output={"content": content})
    steps.tell(step)


def awaited(step: Step) -> list[UUID]:
    return [UUID(name) for name in (step.input or {}).get("ids", ())]


def result_of(child: Task) -> dict[str, Any]:
    if child.status != Status.SUCCEEDED:
        return {"status": child.status, "error": child.error_message}
    response = child.payload.response or {}
    return {"status": child.status, "result": response.get("content", "")}
