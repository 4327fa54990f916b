"""/v1/prompts: a tenant's prompts, their versions and labels; and a chat's body that names one."""

from typing import Any
from uuid import uuid4

from django.db.models import Max
from django.http import HttpResponse
from rest_framework.request import Request

from llmtasks import prompts
from llmtasks.api import answers, bodies, schema
from llmtasks.api.auth import Principal
from llmtasks.api.bodies_prompts import LABEL, VERSION
from llmtasks.api.doors import ApiView, principal_of, read_body
from llmtasks.errors import ApiError, InvalidInput, NotFound
from llmtasks.models import Prompt, PromptVersion, Scope

PAGE = 100
# Of a chat's body; nothing behind this knows them.
OURS = frozenset({"prompt", "variables"})
# Two names of one thing: who gives one means neither of the prompt's.
LENGTHS = ("max_tokens", "max_completion_tokens")


class Prompts(ApiView):
    """GET and POST /v1/prompts"""

    @schema.list_prompts
    def get(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ)
        rows = Prompt.objects.filter(tenant_id=principal.tenant_id).order_by("name")
        if after := request.GET.get("cursor", "").replace("\0", ""):
            rows = rows.filter(name__gt=after)
        found = list(
            rows.annotate(latest=Max("versions__number")).prefetch_related("labels__version")[
                : PAGE + 1
            ]
        )
        more = len(found) > PAGE
        return answers.json_response(
            {
                "object": "list",
                "data": [shown(row) for row in found[:PAGE]],
                "has_more": more,
                "next_cursor": found[PAGE - 1].name if more else None,
            }
        )

    @schema.create_prompt
    def post(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.PROMPTS)
        body = bodies.check(VERSION, bodies.decode(read_body(request)))
        version, is_new = prompts.add_version(
            principal.tenant_id,
            body.name,
            messages=[message.model_dump() for message in body.messages],
            variables=body.variables,
            model=body.model or "",
            parameters=body.parameters,
            description=body.description,
            note=body.note or "",
            labels=body.labels or (),
            by=f"key {principal.key_id}",
        )
        return answers.json_response(shown_version(version), status=201 if is_new else 200)


class OnePrompt(ApiView):
    """GET /v1/prompts/{name}"""

    @schema.get_prompt
    def get(self, request: Request, name: str) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ)
        row = of_tenant(principal, name)
        newest = row.versions.order_by("-number")[:PAGE]
        body = shown(row) | {"versions": [shown_version(version) for version in newest]}
        return answers.json_response(body)


class OneVersion(ApiView):
    """GET /v1/prompts/{name}/versions/{number}"""

    @schema.get_prompt_version
    def get(self, request: Request, name: str, number: int) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ)
        return answers.json_response(shown_version(version_of(principal, name, number)))


class Labels(ApiView):
    """POST /v1/prompts/{name}/labels"""

    @schema.set_label
    def post(self, request: Request, name: str) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.PROMPTS)
        body = bodies.check(LABEL, bodies.decode(read_body(request)))
        if body.version is None:
            prompts.drop_label(principal.tenant_id, of_tenant(principal, name).name, body.label)
        else:
            version = version_of(principal, name, body.version)
            by = f"key {principal.key_id}"
            prompts.put_label(version, body.label, share=body.share, by=by)
        return answers.json_response(shown(of_tenant(principal, name)))


def of_tenant(principal: Principal, name: str) -> Prompt:
    """Raises NotFound, also for another tenant's."""
    rows = Prompt.objects.filter(tenant_id=principal.tenant_id, name=name)
    row = rows.annotate(latest=Max("versions__number")).first()
    if row is None:
        raise NotFound(f"There is no prompt {name!r}: GET /v1/prompts lists yours.")
    return row


def version_of(principal: Principal, name: str, number: int) -> PromptVersion:
    rows = PromptVersion.objects.select_related("prompt").filter(
        prompt__tenant_id=principal.tenant_id, prompt__name=name, number=number
    )
    if number >= 2**31 or (row := rows.first()) is None:
        raise NotFound(f"There is no {name}@{number}.")
    return row


def shown(row: Any) -> dict[str, Any]:
    labels = {
        label.name: {"version": label.version.number, "share": label.share}
        if label.name == label.CANARY
        else {"version": label.version.number}
        for label in row.labels.all()
    }
    return {
        "object": "prompt",
        "name": row.name,
        "description": row.description,
        "latest": row.latest,
        "labels": labels,
        "created_at": answers.moment(row.created_at),
    }


def shown_version(row: PromptVersion) -> dict[str, Any]:
    return {
        "object": "prompt_version",
        "prompt": str(row),
        "name": row.prompt.name,
        "version": row.number,
        "messages": row.messages,
        "variables": row.variables,
        "model": row.model or None,
        "parameters": row.parameters,
        "note": row.note,
        "created_by": row.created_by or None,
        "created_at": answers.moment(row.created_at),
    }


# --- A chat that names one ------------------------------------------------------------------------


def of_chat(principal: Principal, given: Any, user: Any = None) -> tuple[Any, str]:
    """A chat's body with what its prompt says, and the exact version; as it was, where it names
    none. What the caller gives himself goes before the prompt's. Raises InvalidInput, NotFound."""
    if not isinstance(given, dict) or not given.keys() & OURS:
        return given, ""
    reference, variables = given.get("prompt"), given.get("variables")
    if reference is None:
        if variables is not None:
            raise InvalidInput("variables: these go with a prompt", param="variables")
        return {name: value for name, value in given.items() if name not in OURS}, ""
    if not isinstance(reference, str):
        raise InvalidInput("prompt: give a name, like greet or greet@3", param="prompt")
    variables = {} if variables is None else variables
    if not isinstance(variables, dict):
        raise InvalidInput("variables: give an object", param="variables")
    whose = user or given.get("user")
    found = prompts.rendered(
        principal.tenant_id,
        reference,
        variables,
        whose if isinstance(whose, str) and whose else uuid4().hex,
    )
    return merged(given, found), found.reference


def of_task(principal: Principal, given: Any, place: str = "") -> tuple[Any, str]:
    """The same for the body of a task, whose input is the chat."""
    if not isinstance(given, dict) or given.get("kind") not in ("chat", "agent"):
        return given, ""
    try:
        chat, reference = of_chat(principal, given.get("input"), given.get("user"))
    except ApiError as error:
        error.param = f"{place}input.{error.param}" if error.param else None
        raise
    return given | {"input": chat}, reference


def merged(given: dict[str, Any], found: prompts.Rendered) -> dict[str, Any]:
    own = {name: value for name, value in given.items() if value is not None and name not in OURS}
    preset = dict(found.parameters)
    if any(name in own for name in LENGTHS):
        preset = {name: value for name, value in preset.items() if name not in LENGTHS}
    said = own.get("messages", [])
    messages = [*found.messages, *said] if isinstance(said, list) else said
    model = own.pop("model", None) or found.model
    return preset | own | {"messages": messages} | ({"model": model} if model else {})
