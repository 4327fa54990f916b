"""The child task that a block becomes, and the output that its answer is."""

import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson

from llmtasks import bodies, prompts, pulse, submit
from llmtasks.bodies import AgentRequest, ToolRequest, WorkflowRequest
from llmtasks.errors import InvalidInput
from llmtasks.models import Kind, Mode, Task, TaskPayload
from llmtasks.tools.registry import registry
from llmtasks.tools.run import fault_of
from llmtasks.workflows import checks, spec, templates
from llmtasks.workflows.spec import AnyBlock
from llmtasks.workflows.templates import Scope
from llmtasks.workflows.transform import BadOutput, as_value
from providers.types import EmbeddingRequest, Message, Request, ResponseFormat, Text

# Between two tries of a step: full jitter up to so much, doubled with each try.
RETRY_S = 1.0
LONGEST_RETRY_S = 60.0


def child_of(parent: Task, block: AnyBlock, scope: Scope, *, of_many: bool = False) -> Task:
    """The unsaved task of a block. Raises `ApiError`s, `MissingValue`, `BadOutput`."""
    prompt = ""
    if isinstance(block, spec.Prompt) and block.prompt is not None:
        kind, (request, prompt) = str(Kind.CHAT), of_prompt(parent, block, block.prompt, scope)
    else:
        kind, request = asked(block, scope)
    return task_for(parent, kind, request, lane=block.lane, deadline_s=block.deadline_s,
                    stream=False if of_many else None, prompt=prompt)  # fmt: skip


def task_for(
    parent: Task,
    kind: str,
    request: Any,
    *,
    lane: str | None = None,
    deadline_s: float | None = None,
    stream: bool | None = None,
    prompt: str = "",
) -> Task:
    """An unsaved task that is part of another: its tenant's, key's and deadline's."""
    on_unknown = parent.on_unknown
    if kind == Kind.TOOL:
        on_unknown = "retry" if registry.find(request.tool).idempotent else "fail"
    work = submit.Work(
        tenant_id=parent.tenant_id, key_id=parent.key_id, kind=kind, request=request,
        lane=lane or parent.lane, metadata=parent.metadata, user=parent.user,
        request_id=parent.request_id, on_unknown=on_unknown, stream=stream,
        prompt=prompt,
    )  # fmt: skip
    child = submit.make(work, Mode.QUEUED)
    child.parent_id = parent.id
    child.deadline = parent.deadline
    if deadline_s is not None:
        child.deadline = min(parent.deadline, pulse.now() + timedelta(seconds=deadline_s))
    return child


def again(child: Task, earlier: Any, tries: int) -> Task:
    """The same child for another try, after a pause."""
    most = min(LONGEST_RETRY_S, RETRY_S * 2 ** (tries - 1))
    pause_s = random.uniform(0, most)  # noqa: S311 - no secret
    child.not_before += timedelta(seconds=pause_s)
    child.retry_of = earlier
    return child


def asked(block: AnyBlock, scope: Scope) -> tuple[str, Any]:
    """The kind of the block's task, and its request."""
    if isinstance(block, spec.Prompt):
        return Kind.CHAT, chat(block, scope)
    if isinstance(block, spec.Agent):
        request = Request(model=block.model, messages=messages(block.system, block.text, scope))
        cost = None if block.max_cost is None else Decimal(block.max_cost)
        tools = tuple(dict.fromkeys(block.tools))
        return Kind.AGENT, AgentRequest(
            chat=request, tools=tools, max_turns=block.max_turns, max_cost=cost
        )
    if isinstance(block, spec.Tool):
        return Kind.TOOL, tool_request(block.tool, templates.render(block.arguments, scope))
    if isinstance(block, spec.Use):
        return Kind.WORKFLOW, used(block, scope)
    needed = picked(scope, block)
    kind = block.kind
    return Kind.WORKFLOW, WorkflowRequest(name=kind, block=spec.as_json(block), scope=needed)


def tool_request(reference: str, arguments: Mapping[str, Any]) -> ToolRequest:
    """Raises `NotFound`, and `InvalidInput` for arguments that fit no call."""
    tool = registry.find(reference)
    if fault := fault_of(tool.parameters, arguments):
        raise InvalidInput(f"the arguments fit no call of {tool.name}: {fault}")
    return ToolRequest(tool=tool.reference, arguments=arguments)


def used(block: spec.Use, scope: Scope) -> WorkflowRequest:
    if block.of is None:
        raise InvalidInput(f"the workflow {block.workflow!r} was not put in when it was submitted")
    given = with_defaults(block.of, templates.render(block.input, scope))
    return request_of(block.of, block.workflow, given)


def request_of(workflow: spec.Workflow, name: str, given: dict[str, Any]) -> WorkflowRequest:
    cost = None if workflow.max_cost is None else Decimal(workflow.max_cost)
    return WorkflowRequest(
        name=name, block=spec.as_json(workflow.do), scope={"input": given}, max_cost=cost
    )


def with_defaults(
    workflow: spec.Workflow, given: dict[str, Any], param: str = "input"
) -> dict[str, Any]:
    """The input with its variables' defaults, checked. Raises `InvalidInput`."""
    given = checks.defaults_of(workflow) | given
    if missing := checks.missing_variables(workflow, given):
        name, place = missing
        raise InvalidInput(
            f"{param}.{name}: missing variable: {place} uses it", param=f"{param}.{name}"
        )
    if workflow.variables is not None and (fault := fault_of(workflow.variables, given)):
        raise InvalidInput(f"{param}: {fault}", param=param)
    return given


def picked(scope: Scope, block: AnyBlock) -> dict[str, Any]:
    """What of the scope the block needs, and nothing else: it is stored with its task."""
    found: dict[str, Any] = {}
    for root, *rest in checks.needs(block):
        if root in ("input", "steps") and rest:
            values = scope.get(root) or {}
            if rest[0] in values:
                found.setdefault(root, {})[rest[0]] = values[rest[0]]
        elif root in scope:
            found[root] = scope[root]
    return found


# --- Calls of models ------------------------------------------------------------------------------


def of_prompt(
    parent: Task, block: spec.Prompt, reference: str, scope: Scope
) -> tuple[Request, str]:
    """The call that a stored prompt makes, and its exact version. Production or canary is decided
    by the run's user, or for the run."""
    variables = templates.render(block.variables, scope)
    whose = parent.user or str(parent.id)
    found = prompts.rendered(parent.tenant_id, reference, variables, whose)
    request = prompts.request_of(found, block.model or "")
    own = {
        "response_format": answer_format(block),
        "max_output_tokens": block.max_tokens,
        "temperature": block.temperature,
    }
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    return replace(request, **given), found.reference


def answer_format(block: spec.Prompt) -> ResponseFormat | None:
    if block.answer_schema is None:
        return None
    return ResponseFormat(type="json_schema", name="answer", schema=block.answer_schema)


def chat(block: spec.Prompt, scope: Scope) -> Request:
    said = messages(block.system, block.text, scope)
    if block.messages is not None:
        said = tuple(
            Message(role=m.role, parts=(Text(text=text_of(m.content, scope)),))
            for m in block.messages
        )
    return Request(
        model=block.model or "", messages=said, response_format=answer_format(block),
        max_output_tokens=block.max_tokens, temperature=block.temperature,
    )  # fmt: skip


def messages(system: str | None, text: str | None, scope: Scope) -> tuple[Message, ...]:
    found = [("system", system), ("user", text)]
    return tuple(
        Message(role=role, parts=(Text(text=text_of(said, scope)),))  # type: ignore[arg-type]
        for role, said in found
        if said is not None
    )


def text_of(template: str, scope: Scope) -> str:
    return templates.as_text(templates.render_text(template, scope))


def embedding(model: str, inputs: list[str]) -> EmbeddingRequest:
    return EmbeddingRequest(model=model, inputs=tuple(inputs))


# --- What they gave -------------------------------------------------------------------------------


def output_of(child_id: UUID, block: AnyBlock | None) -> Any:
    """The output of a child that succeeded. Raises `BadOutput`, also where it is gone."""
    found = TaskPayload.objects.filter(task_id=child_id).values_list("task__kind", "response")
    kind, stored = found.first() or ("", None)
    return value_of(kind, stored, block)


def value_of(kind: str, stored: Any, block: AnyBlock | None) -> Any:
    if stored is None:
        raise BadOutput("its answer was deleted: see PAYLOAD_DAYS")
    answer = bodies.load_response(kind, stored)
    if kind == Kind.WORKFLOW:
        return answer.value
    if kind == Kind.TOOL:
        return tool_value(answer.content)
    if kind == Kind.EMBEDDING:
        return [list(vector) for vector in answer.vectors]
    if not isinstance(block, spec.Prompt) or not wants_json(block):
        return answer.text
    value = as_value(answer.text)
    if block.answer_schema is not None and (fault := fault_of(block.answer_schema, value)):
        raise BadOutput(f"the answer does not fit answer_schema: {fault}")
    return value


def wants_json(block: AnyBlock | None) -> bool:
    """Whether an answer may be no output."""
    return isinstance(block, spec.Prompt) and (
        block.answer == "json" or block.answer_schema is not None
    )


def tool_value(content: str) -> Any:
    if content[:1] not in ("{", "["):
        return content
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return content
