from django.contrib import admin
from django.urls import include, path

from llmtasks.admin import board

urlpatterns = [
    path("admin/queues/", admin.site.admin_view(board.queues), name="queues"),
    path("admin/", admin.site.urls),
    path("", include("llmtasks.api.urls")),
]

handler400 = "llmtasks.api.errors.bad_request"
handler404 = "llmtasks.api.errors.not_found"
handler500 = "llmtasks.api.errors.server_error"
