"""Every path of the API. What is not here is a 404 in the shape of its door."""

from django.http import HttpRequest, HttpResponse
from django.urls import path, re_path
from django.views.decorators.csrf import csrf_exempt
from django.views.generic import RedirectView

from llmtasks.api import (
    feedback,
    health,
    metrics,
    openai,
    prompts,
    providers,
    schema,
    tasks,
    tools,
    workflows,
)
from llmtasks.api.errors import NOTHING_HERE, answer
from llmtasks.errors import NotFound


@csrf_exempt
def nowhere(request: HttpRequest) -> HttpResponse:
    return answer(NotFound(NOTHING_HERE), request.path)


urlpatterns = [
    path("", RedirectView.as_view(pattern_name="docs")),
    path("healthz", health.healthz),
    path("readyz", health.readyz),
    path("metrics", metrics.metrics),
    path("v1/chat/completions", openai.ChatCompletions.as_view()),
    path("v1/embeddings", openai.Embeddings.as_view()),
    path("v1/models", openai.Models.as_view()),
    path("v1/models/<path:name>", openai.Model.as_view()),
    path("v1/feedback/export", feedback.Export.as_view()),
    path("v1/prompts", prompts.Prompts.as_view()),
    path("v1/prompts/<str:name>", prompts.OnePrompt.as_view()),
    path("v1/prompts/<str:name>/labels", prompts.Labels.as_view()),
    path("v1/prompts/<str:name>/versions/<int:number>", prompts.OneVersion.as_view()),
    path("v1/providers", providers.Providers.as_view()),
    path("v1/tasks", tasks.Tasks.as_view()),
    path("v1/tasks/bulk", tasks.Bulk.as_view()),
    path("v1/tasks/<uuid:task_id>", tasks.OneTask.as_view()),
    path("v1/tasks/<uuid:task_id>/cancel", tasks.Cancel.as_view()),
    path("v1/tasks/<uuid:task_id>/retry", tasks.Retry.as_view()),
    path("v1/tasks/<uuid:task_id>/token", tasks.Token.as_view()),
    path("v1/tasks/<uuid:task_id>/steps", tools.Steps.as_view()),
    path("v1/tasks/<uuid:task_id>/decide", tools.Decide.as_view()),
    path("v1/tasks/<uuid:task_id>/feedback", feedback.Feedback.as_view()),
    path("v1/tasks/<uuid:task_id>/events", tasks.Events.as_view()),
    path("v1/tools", tools.Tools.as_view()),
    path("v1/tools/<str:name>/invoke", tools.Invoke.as_view()),
    path("v1/workflows", workflows.Workflows.as_view()),
    path("v1/workflows/<str:name>", workflows.OneWorkflow.as_view()),
    path("v1/schema", schema.Schema.as_view(), name="schema"),
    path("v1/docs", schema.Docs.as_view(), name="docs"),
    re_path(r"^v1(?:/|\Z)", nowhere),
]
