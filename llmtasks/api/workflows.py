"""/v1/workflows: stored declarations and their versions; what a task of kind `workflow` runs."""

from functools import partial
from typing import Any

from django.http import HttpResponse
from rest_framework.request import Request

from llmtasks.api import answers, bodies, listing, schema
from llmtasks.api.auth import Principal
from llmtasks.api.bodies_tasks import NEW_VERSION, WorkflowInput
from llmtasks.api.doors import ApiView, idempotency_of, principal_of, read_body
from llmtasks.api.tools import usable
from llmtasks.bodies import WorkflowRequest
from llmtasks.errors import ApiError
from llmtasks.models import ApiKey, Scope, WorkflowVersion
from llmtasks.workflows import children, spec, store

# Of one workflow, the newest.
MOST_VERSIONS = 1000


class Workflows(ApiView):
    """POST and GET /v1/workflows"""

    @schema.create_version
    def post(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        raw = read_body(request)
        body = bodies.check(NEW_VERSION, bodies.decode(raw))
        # Repeating it is harmless: the same declaration is the same version.
        idempotency_of(request, raw, "/v1/workflows")
        # A copy: what is put in to check it is not stored.
        copy = spec.parse(spec.as_json(body.spec))
        find_tool = partial(usable, principal)
        store.ready(copy, principal.tenant_id, find_tool, "spec.", chain=(body.name,))
        version, is_new = store.save(
            principal.tenant_id,
            body.name,
            body.spec,
            by=ApiKey.objects.values_list("prefix", flat=True).get(id=principal.key_id),
            comment=body.comment,
        )
        response = answers.json_response(shown(version), status=201 if is_new else 200)
        response["Location"] = f"/v1/workflows/{version}"
        return response

    @schema.list_workflows
    def get(self, request: Request) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ)
        limit = listing.whole_number(request.GET, "limit", 20, least=1, most=100)
        after = request.GET.get("cursor", "")
        names = store.visible(principal.tenant_id).filter(name__gt=after)
        found = list(names.order_by("name").values_list("name", flat=True).distinct()[: limit + 1])
        data = [shown(store.find(principal.tenant_id, name)) for name in found[:limit]]
        has_more = len(found) > limit
        return answers.json_response(
            {
                "object": "list",
                "data": data,
                "has_more": has_more,
                "next_cursor": found[limit - 1] if has_more else None,
            }
        )


class OneWorkflow(ApiView):
    """GET /v1/workflows/{name}"""

    @schema.get_workflow
    def get(self, request: Request, name: str) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ)
        version = store.find(principal.tenant_id, name)
        versions = WorkflowVersion.objects.filter(workflow=version.workflow).order_by("-number")
        numbers = list(versions.values_list("number", flat=True)[:MOST_VERSIONS])
        return answers.json_response(shown(version) | {"versions": numbers})


def shown(version: WorkflowVersion) -> dict[str, Any]:
    return {
        "object": "workflow",
        "name": version.workflow.name,
        "version": version.number,
        "reference": str(version),
        "is_shared": version.workflow.tenant_id is None,
        "comment": version.comment or None,
        "created_at": answers.moment(version.created_at),
        "created_by": None if version.workflow.tenant_id is None else version.created_by or None,
        "spec": version.spec,
        "versions": None,
    }


def requested(principal: Principal, given: WorkflowInput) -> WorkflowRequest:
    """What the task is to do, with exact versions of all that it uses: they hold to its end.
    Raises InvalidInput, NotFound."""
    find_tool = partial(usable, principal)
    if given.workflow is not None:
        try:
            name, workflow = store.requested(principal.tenant_id, given.workflow, find_tool)
        except ApiError as error:
            error.param = "input.workflow"
            raise
    elif given.spec is not None:
        name = given.spec.do.kind
        workflow = store.ready(given.spec, principal.tenant_id, find_tool, "input.spec.")
    else:
        raise TypeError("a body without either was let through")
    values = children.with_defaults(workflow, given.input, "input.input")
    return children.request_of(workflow, name, values)
