"""Stored workflows: found by name, kept by version, and made ready to run.

A tenant sees its own and the shared ones; its own of a name comes first.
"""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Q, QuerySet

from llmtasks import prompts
from llmtasks.errors import ApiError, NotFound
from llmtasks.models import Workflow as Row
from llmtasks.models import WorkflowVersion
from llmtasks.tools.registry import Tool, registry
from llmtasks.workflows import checks, spec
from llmtasks.workflows.checks import fault
from llmtasks.workflows.spec import Workflow

# Gives the tool of a reference, or raises NotFound: what a caller may use.
FindTool = Callable[[str], Tool]


def visible(tenant_id: UUID | None) -> QuerySet[Row]:
    """The tenant's own and the shared ones; for operators (None) the shared ones."""
    shared = Q(tenant=None)
    return Row.objects.filter(shared if tenant_id is None else shared | Q(tenant_id=tenant_id))


def find(tenant_id: UUID | None, reference: str) -> WorkflowVersion:
    """The version of `name@3`, or the latest of `name`. Raises `NotFound`."""
    name, _, number = reference.partition("@")
    # The tenant's own first: nulls are last.
    row = visible(tenant_id).filter(name=name).order_by("tenant_id").first()
    if row is None:
        raise NotFound(f"there is no workflow {name!r}: GET /v1/workflows lists those there are")
    versions = WorkflowVersion.objects.select_related("workflow").filter(workflow=row)
    if number:
        versions = versions.filter(number=int(number)) if is_number(number) else versions.none()
    found = versions.order_by("-number").first()
    if found is None:
        raise NotFound(f"there is no version {reference!r}")
    return found


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9


def save(
    tenant_id: UUID | None, name: str, workflow: Workflow, *, by: str, comment: str = ""
) -> tuple[WorkflowVersion, bool]:
    """The declaration as a version, and whether that is new. Raises `InvalidInput`, `NotFound`."""
    pin(workflow, tenant_id, name)
    kept = spec.as_json(workflow)
    with transaction.atomic():
        rows = Row.objects.filter(tenant=None if tenant_id is None else tenant_id, name=name)
        if not rows.exists():
            Row.objects.bulk_create([Row(tenant_id=tenant_id, name=name)], ignore_conflicts=True)
        row = rows.select_for_update().get()
        latest = row.versions.order_by("-number").first()
        if latest is not None and latest.spec == kept:
            return latest, False
        number = 1 if latest is None else latest.number + 1
        made = WorkflowVersion.objects.create(
            workflow=row, number=number, spec=kept, comment=comment, created_by=by
        )
    return made, True


def pin(workflow: Workflow, tenant_id: UUID | None, name: str) -> None:
    """Write down which version of other workflows it uses."""
    for path, block in checks.all_blocks(workflow.do, "do"):
        if isinstance(block, spec.Use):
            if block.workflow.partition("@")[0] == name:
                raise fault(f"{path}.workflow", f"a cycle: {name} uses itself")
            block.workflow = str(found_at(path, tenant_id, block.workflow))
            block.model_fields_set.discard("of")


def found_at(path: str, tenant_id: UUID | None, reference: str) -> WorkflowVersion:
    try:
        return find(tenant_id, reference)
    except NotFound as error:
        raise NotFound(f"{path}.workflow: {error.message}", param=f"{path}.workflow") from None


def ready(
    workflow: Workflow,
    tenant_id: UUID | None,
    find_tool: FindTool = registry.find,
    prefix: str = "",
    chain: Sequence[str] = (),
) -> Workflow:
    """The declaration checked, with all that it uses put in: exact versions of tools, and the
    workflows in it. Raises `InvalidInput`, `NotFound`, each naming its field."""
    checks.check(workflow, prefix)
    for path, block in checks.all_blocks(workflow.do, f"{prefix}do"):
        if isinstance(block, spec.Tool):
            block.tool = tool_at(f"{path}.tool", block.tool, find_tool)
        elif isinstance(block, spec.Agent):
            block.tools = [tool_at(f"{path}.tools", name, find_tool) for name in block.tools]
        elif isinstance(block, spec.Prompt):
            check_prompt(block, path, tenant_id)
        elif isinstance(block, spec.Use):
            put_in(block, path, tenant_id, find_tool, chain)
    checks.check_size(workflow, prefix)
    return workflow


def check_prompt(block: spec.Prompt, path: str, tenant_id: UUID | None) -> None:
    """A shared workflow's prompts are those of the tenant that uses it: looked at then."""
    if block.prompt is None or tenant_id is None:
        return
    try:
        version = prompts.chosen(tenant_id, block.prompt, "")
    except ApiError as error:
        param = f"{path}.prompt"
        raise type(error)(f"{param}: {error.message}", param=param) from None
    if block.model is None and not version.model:
        raise fault(f"{path}.model", f"{version} names no model: give one")


def tool_at(path: str, reference: str, find_tool: FindTool) -> str:
    try:
        return find_tool(reference).reference
    except NotFound as error:
        raise NotFound(f"{path}: {error.message}", param=path) from None


def put_in(
    block: spec.Use,
    path: str,
    tenant_id: UUID | None,
    find_tool: FindTool,
    chain: Sequence[str],
) -> None:
    version = found_at(path, tenant_id, block.workflow)
    name = version.workflow.name
    if name in chain or len(chain) >= checks.MAX_DEPTH:
        raise fault(f"{path}.workflow", f"a cycle: {' uses '.join([*chain, name])}")
    inner = spec.parse(version.spec)
    try:
        ready(inner, tenant_id, find_tool, chain=(*chain, name))
    except ApiError as error:
        param = f"{path}.workflow"
        raise type(error)(f"{param}: {version}: {error.message}", param=param) from None
    block.workflow, block.of = str(version), inner
    given: dict[str, Any] = checks.defaults_of(inner) | block.input
    if missing := checks.missing_variables(inner, given):
        raise fault(f"{path}.input", f"missing variable {missing[0]!r} of {version}")


def requested(
    tenant_id: UUID, reference: str, find_tool: FindTool = registry.find
) -> tuple[str, Workflow]:
    """A stored workflow's exact name and its declaration, ready. Raises `NotFound`,
    `InvalidInput`."""
    version = find(tenant_id, reference)
    try:
        workflow = ready(
            spec.parse(version.spec), tenant_id, find_tool, chain=(version.workflow.name,)
        )
    except ApiError as error:
        # Its fields are not the caller's.
        raise type(error)(f"{version}: {error.message}") from None
    return str(version), workflow
