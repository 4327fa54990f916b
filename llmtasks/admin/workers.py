"""The processes: which are alive, and what they serve."""

from datetime import timedelta

from django.contrib import admin
from django.utils import timezone
from django.utils.safestring import SafeString

from llmtasks.admin import cells
from llmtasks.admin.facts import FactsAdmin
from llmtasks.admin.lists import BoundedAdmin, choice_filter
from llmtasks.models import Lane, Task, Worker


@admin.register(Worker)
class WorkerAdmin(FactsAdmin, BoundedAdmin):
    list_display = (
        "shown_name", "alive", "role", "lane", "slots", "shown_queues", "started", "lease",
    )  # fmt: skip
    list_filter = (
        choice_filter("role", Worker.Role.choices),
        choice_filter("lane", Lane.choices),
    )
    search_help_text = "A worker's whole id"
    facts = (
        (
            "",
            (
                "alive", "role", "lane", "lease", "host", "pid", "started_at", "slots", "running",
                "shown_queues",
            ),
        ),
    )  # fmt: skip
    wide_facts = frozenset({"shown_queues"})

    @admin.display(description="process")
    def shown_name(self, worker: Worker) -> SafeString | str:
        return cells.link("worker", worker.pk, f"{worker.host}:{worker.pid}")

    @admin.display(description="state")
    def alive(self, worker: Worker) -> SafeString:
        return cells.label("alive" if worker.lease_until > timezone.now() else "gone")

    @admin.display(description="started")
    def started(self, worker: Worker) -> SafeString:
        return cells.brief(worker.started_at)

    @admin.display(description="lease")
    def lease(self, worker: Worker) -> str:
        left = worker.lease_until - timezone.now()
        if left > timedelta(0):
            return f"{cells.duration(left)} left"
        return f"ended {cells.duration(-left)} ago"

    @admin.display(description="queues")
    def shown_queues(self, worker: Worker) -> str:
        return ", ".join(worker.queues) or cells.NOTHING

    @admin.display(description="tasks under way")
    def running(self, worker: Worker) -> int:
        return Task.objects.filter(owner_id=worker.pk, status="running").count()
