"""Cancel and retry: one task, those that were ticked, or a whole filter.

A filter may match a million tasks, a request must not last for minutes. So a job goes on in
batches: each POST does one, in about `BATCH_S` at the most, and its page sends for the next by
itself. The job's bounds are fixed when it begins, so that the tasks that a retry makes are never
part of it. What is left to do is in the page, signed; closing the page ends the job.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import UUID, uuid4

from django.contrib import admin, messages
from django.contrib.admin import helpers
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.core.signing import BadSignature, Signer
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    HttpResponseNotAllowed,
    HttpResponseRedirect,
    QueryDict,
)
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse

from llmtasks import execute, submit
from llmtasks.admin.lists import COUNTED, BoundedAdmin, BoundedList, Rows
from llmtasks.errors import ApiError, Unavailable
from llmtasks.models import FINAL, Status, Task

BATCH = 200
BATCH_S = 5.0
SIGNER = "llmtasks.steer"


@dataclass(frozen=True)
class Verb:
    """`of_one` are the states in which a task that was picked can be steered so; `of_many` those
    that a whole filter is narrowed to."""

    name: str
    done: str
    of_one: tuple[Status, ...]
    of_many: tuple[Status, ...]

    def do(self, task_id: UUID) -> Task:
        return execute.cancel(task_id) if self.name == "cancel" else submit.retry(task_id)


OPEN = (Status.WAITING, Status.QUEUED, Status.BLOCKED, Status.RUNNING)
# A success is repeated when somebody picks it, not because a filter was wide: it costs again.
WITHOUT_SUCCESS = (Status.FAILED, Status.EXPIRED, Status.CANCELLED)

VERBS = {
    "cancel": Verb("cancel", "cancelled", OPEN, OPEN),
    "retry": Verb("retry", "retried", FINAL, WITHOUT_SUCCESS),
}


@dataclass(frozen=True)
class Job:
    """What is to be done, and how far it is. `ids` are those that were ticked; without them it is
    the list's filter, from `newest` down to `oldest`, one state after the other."""

    name: str
    query: str
    nonce: str
    ids: tuple[str, ...] = ()
    newest: str = ""
    oldest: str = ""
    batch: int = 0
    stage: int = 0
    before: str = ""
    done: int = 0
    refused: int = 0
    why: str = ""
    total: int = 0

    @property
    def verb(self) -> Verb:
        return VERBS[self.name]

    @property
    def statuses(self) -> tuple[Status, ...]:
        return self.verb.of_one if self.ids else self.verb.of_many

    @property
    def is_over(self) -> bool:
        return self.stage >= len(self.statuses)

    @property
    def shown_total(self) -> str:
        return f"{COUNTED:,}+" if self.total > COUNTED else f"{self.total:,}"

    @property
    def percent(self) -> int:
        return min(100, 100 * (self.done + self.refused) // max(1, self.total))

    @property
    def states(self) -> str:
        return ", ".join(self.statuses)

    @property
    def token(self) -> str:
        """Signed: what is steered is what was confirmed, not what a page was changed to."""
        return Signer(salt=SIGNER).sign_object(asdict(self))

    @classmethod
    def read(cls, token: str) -> "Job":
        try:
            values = Signer(salt=SIGNER).unsign_object(token)
        except BadSignature:
            raise SuspiciousOperation("a job that nobody confirmed") from None
        return cls(**{**values, "ids": tuple(values["ids"])})


def begin(request: HttpRequest, name: str, changes: BoundedList) -> Job:
    """The job of an action on the list, to be confirmed."""
    job = Job(name=name, query=request.GET.urlencode(), nonce=uuid4().hex)
    if request.POST.get("select_across") == "1":
        newest = list(changes.whole.values_list("pk", flat=True)[:1])
        oldest = str(changes.oldest or "")
        job = replace(job, newest=str(newest[0]) if newest else "", oldest=oldest)
    else:
        job = replace(job, ids=tuple(request.POST.getlist(helpers.ACTION_CHECKBOX_NAME)))
    return replace(job, total=count(job, changes.whole))


def count(job: Job, whole: Rows) -> int:
    """How many there are to do, counted as far as is shown."""
    rows = bounded(job, whole)
    each = (rows.filter(status=status).values("pk")[: COUNTED + 1] for status in job.statuses)
    return sum(found.count() for found in each)


def bounded(job: Job, whole: Rows) -> Rows:
    """The job's rows, the newest first."""
    if job.ids:
        return Task.objects.filter(pk__in=job.ids).order_by("-pk")
    rows = whole
    if job.newest:
        rows = rows.filter(pk__lte=job.newest)
    if job.oldest:
        rows = rows.filter(pk__gte=job.oldest)
    return rows


def run(job: Job, whole: Rows) -> tuple[Job, list[UUID]]:
    """The job after one batch, and the tasks that were steered in it."""
    until = time.monotonic() + BATCH_S
    rows = bounded(job, whole).filter(status=job.statuses[job.stage])
    if job.before:
        rows = rows.filter(pk__lt=job.before)
    found = list(rows.values_list("pk", flat=True)[:BATCH])
    steered: list[UUID] = []
    for task_id in found:
        if time.monotonic() > until:
            return replace(job, batch=job.batch + 1), steered
        job = steer_next(job, task_id, steered)
    if len(found) < BATCH:
        job = replace(job, stage=job.stage + 1, before="")
    return replace(job, batch=job.batch + 1), steered


def steer_next(job: Job, task_id: UUID, steered: list[UUID]) -> Job:
    job = replace(job, before=str(task_id))
    try:
        job.verb.do(task_id)
    except Unavailable:
        raise
    except ApiError as error:
        return replace(job, refused=job.refused + 1, why=error.message)
    steered.append(task_id)
    return replace(job, done=job.done + 1)


class SteeringAdmin(BoundedAdmin):
    """The actions and the views of an admin whose rows are tasks."""

    actions = ("cancel_tasks", "retry_tasks")

    def has_steer_permission(self, request: HttpRequest) -> bool:
        """Who may cancel and retry. The rows themselves are nobody's to change."""
        return request.user.has_perm("llmtasks.change_task")

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.steer)
        return [path("steer/", view, name="llmtasks_task_steer"), *super().get_urls()]

    @admin.action(description="Cancel", permissions=["steer"])
    def cancel_tasks(self, request: HttpRequest, queryset: Rows) -> HttpResponse:
        return self.confirm(request, "cancel")

    @admin.action(description="Retry as new tasks", permissions=["steer"])
    def retry_tasks(self, request: HttpRequest, queryset: Rows) -> HttpResponse:
        return self.confirm(request, "retry")

    def confirm(self, request: HttpRequest, verb: str) -> HttpResponse:
        """Ask before many are steered."""
        return self.job_page(request, begin(request, verb, self.get_changelist_instance(request)))

    def steer(self, request: HttpRequest) -> HttpResponseBase:
        """Steer one task, or the next batch of a job."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        if not self.has_steer_permission(request):
            raise PermissionDenied
        if task := request.POST.get("task"):
            return self.steer_one(request, task, request.POST.get("verb", ""))
        return self.steer_batch(request, Job.read(request.POST.get("job", "")))

    def steer_one(self, request: HttpRequest, text: str, name: str) -> HttpResponse:
        """Steer the task whose page the button is on; a retry leads to the new task."""
        try:
            verb, task_id = VERBS[name], UUID(text)
        except (KeyError, ValueError):
            raise SuspiciousOperation("no verb or no task's id") from None
        try:
            task = verb.do(task_id)
        except ApiError as error:
            messages.error(request, f"Not {verb.done}: {error.message}.")
            return HttpResponseRedirect(page_of(task_id))
        self.log_steered(request, verb, [task_id])
        if verb.name == "retry":
            messages.success(request, "This is the new task, a retry of the one before.")
        elif task.status == Status.RUNNING:
            messages.success(request, "Asked to stop: its call is dropped within a second.")
        else:
            messages.success(request, "The task is cancelled.")
        return HttpResponseRedirect(page_of(task.pk))

    def steer_batch(self, request: HttpRequest, job: Job) -> HttpResponse:
        """Each batch once: a page that is sent again must not retry tasks again."""
        back = f"{reverse('admin:llmtasks_task_changelist')}?{job.query}"
        mark = f"steer-{job.nonce}"
        if request.session.get(mark, 0) != job.batch:
            messages.error(request, "That was done already.")
            return HttpResponseRedirect(back)
        request.session[mark] = job.batch + 1
        request.session.save()
        request.GET = QueryDict(job.query)
        job, steered = run(job, self.get_changelist_instance(request).whole)
        self.log_steered(request, job.verb, steered)
        if not job.is_over:
            return self.job_page(request, job)
        messages.success(request, f"{job.done:,} tasks {job.verb.done}.")
        if job.refused:
            messages.warning(request, f"{job.refused:,} not {job.verb.done}: {job.why}.")
        return HttpResponseRedirect(back)

    def job_page(self, request: HttpRequest, job: Job) -> TemplateResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": f"{job.verb.name.capitalize()} tasks",
            "opts": self.opts,
            "job": job,
            "back": f"{reverse('admin:llmtasks_task_changelist')}?{job.query}",
        }
        return TemplateResponse(request, "admin/llmtasks/steer.html", context)

    def log_steered(self, request: HttpRequest, verb: Verb, ids: list[UUID]) -> None:
        """A line in each task's history."""
        rows: Any = [Task(pk=pk) for pk in ids]
        if rows:
            who: Any = request.user.pk
            LogEntry.objects.log_actions(who, rows, CHANGE, f"{verb.done.capitalize()}.")


def page_of(task_id: UUID) -> str:
    return reverse("admin:llmtasks_task_change", args=(task_id,))
