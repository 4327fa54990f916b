"""What a product's users, reviewers and judges thought of answers, and all of it as JSONL."""

from typing import Any
from uuid import UUID

from django.http import HttpResponse, StreamingHttpResponse
from rest_framework.request import Request
from uuid_utils.compat import uuid7

from llmtasks import feedback
from llmtasks.api import answers, bodies, schema
from llmtasks.api.bodies_prompts import FEEDBACK
from llmtasks.api.doors import ApiView, principal_of, read_body
from llmtasks.api.listing import first_id
from llmtasks.api.waiting import load
from llmtasks.errors import InvalidInput
from llmtasks.models import Feedback as Row
from llmtasks.models import Scope


class Feedback(ApiView):
    """GET and POST /v1/tasks/{id}/feedback"""

    @schema.get_feedback
    def get(self, request: Request, task_id: UUID) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ, task_id)
        load(task_id, principal.tenant_id)
        return answers.json_response(listed(task_id, principal.tenant_id))

    @schema.give_feedback
    def post(self, request: Request, task_id: UUID) -> HttpResponse:
        principal = principal_of(request)
        principal.require(Scope.WRITE)
        body = bodies.check(FEEDBACK, bodies.decode(read_body(request)))
        load(task_id, principal.tenant_id)
        is_new = feedback.put(
            Row(
                id=uuid7(),
                tenant_id=principal.tenant_id,
                task_id=task_id,
                source=body.source,
                score=body.score,
                label=body.label or "",
                comment=body.comment or "",
            )
        )
        status = 201 if is_new else 200
        return answers.json_response(listed(task_id, principal.tenant_id), status=status)


class Export(ApiView):
    """GET /v1/feedback/export"""

    @schema.export_feedback
    def get(self, request: Request) -> StreamingHttpResponse:
        principal = principal_of(request)
        principal.require(Scope.READ)
        bounds = {"created_after": feedback.FIRST, "created_before": feedback.LAST}
        for name, value in request.GET.items():
            if name not in bounds:
                raise InvalidInput(
                    f"{name}: there is no such filter; there are {', '.join(bounds)}", param=name
                )
            bounds[name] = first_id(name, str(value))
        lines = feedback.exported(
            principal.tenant_id, bounds["created_after"], bounds["created_before"]
        )
        return StreamingHttpResponse(
            lines,
            content_type="application/jsonl",
            headers={"Content-Disposition": 'attachment; filename="feedback.jsonl"'},
        )


def listed(task_id: UUID, tenant_id: UUID) -> dict[str, Any]:
    data = [feedback.shown(row) for row in feedback.of(task_id, tenant_id)]
    return {"object": "list", "data": data}
