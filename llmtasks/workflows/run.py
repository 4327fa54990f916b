"""One run of a block of blocks: its steps are rows, and what is done is never done again.

A pattern (`pipeline.py`, `parallel.py` …) is a plain function that asks for steps in order, always
the same ones. `one` and `many` give what is there; where something is still open they write it
down, let go of the task (`Snooze`) and the function is run anew once it is woken. So all state is
in rows, and a run costs no worker while its steps do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.db.models import Q
from uuid_utils.compat import uuid7

from llmtasks import crash, events, ledger, pulse, stores
from llmtasks import steps as rows_of
from llmtasks.context import Context, drop_error
from llmtasks.errors import ApiError, DeadlineExceeded, StepFailed, WorkflowStopped
from llmtasks.models import FINAL, Status, Step, Task, TaskPayload
from llmtasks.tools.registry import registry
from llmtasks.workflows import children, spec, transform
from llmtasks.workflows.spec import AnyBlock
from llmtasks.workflows.templates import MissingValue, Scope, render
from llmtasks.workflows.transform import BadOutput

# Children that are written in one transaction.
BATCH = 500
MAX_MESSAGE = 500
OPEN = (Step.Status.OPEN, Step.Status.APPROVAL, Step.Status.APPROVED)
# A person's refusal is written as a failure; the step's policy says what it is.
TO_LOOK_AT = Q(status__in=OPEN) | Q(status=Step.Status.FAILED, error_class="Refused")
ENDED = (Step.Status.DONE, Step.Status.FAILED, Step.Status.SKIPPED)
# Another try would end as this one.
HOPELESS = frozenset(
    {"InvalidRequest", "ContextTooLong", "ContentFiltered", "Unsupported", "InvalidInput",
     "UnknownModel", "NotFound", "MissingValue", "AuthenticationFailed", "PermissionDenied",
     "QuotaExhausted", "Cancelled", "Refused"}
)  # fmt: skip
CHILD = ("id", "kind", "status", "error_class", "error_message")
NOT_NEEDED = "it was not needed any more"
# Steps that a run reads at once when it goes on.
KNOWN = 200


@dataclass(frozen=True, slots=True)
class Job:
    """A step to be done. `make` gives its task where that is not the block's own; `check` raises
    `BadOutput` for an output that is none."""

    name: str
    block: AnyBlock
    scope: Scope
    kind: str = ""
    make: Callable[[Task], Task] | None = None
    check: Callable[[Any], Any] | None = None


@dataclass
class Run:
    task: Task
    context: Context
    scope: Scope
    max_cost: Decimal | None = None
    # The number of the next step that is asked for.
    number: int = 0
    known: dict[int, Step] = field(default_factory=dict)

    # --- What patterns ask for ----------------------------------------------------------------

    def one(self, job: Job) -> Any:
        """The step's output. Raises `StepFailed`, `Snooze`."""
        step = self.known.get(self.number)
        if step is None:
            [step] = self.many(1, lambda _: job, at_once=1)
        else:
            self.number += 1
            if step.status == Step.Status.FAILED:
                raise failure_of(step)
        return self.output(step, job)

    @property
    def is_ahead(self) -> bool:
        """Whether the step that is asked for next was not begun before."""
        rows = Step.objects.filter(task_id=self.task.id, number__gte=self.number)
        return not rows.exists()

    def many(
        self,
        count: int,
        job_at: Callable[[int], Job],
        *,
        at_once: int,
        is_enough: Callable[[], bool] | None = None,
    ) -> "Steps":
        """Do so many steps, `at_once` at a time. Ends early where `is_enough`; what is open then is
        cancelled. Raises `StepFailed` once all that was open has ended, `Snooze`."""
        fan = Fan(self, self.number, count, job_at, at_once, is_enough)
        self.number += count
        fan.go_on()
        return fan.steps

    def output(self, step: Step, job: Job) -> Any:
        """What an ended step gave; None where it was skipped."""
        if step.status != Step.Status.DONE:
            return None
        if step.child_id is None or step.error_class:
            return (step.output or {}).get("content")
        value = children.output_of(step.child_id, job.block)
        return value if job.check is None else job.check(value)

    def check_caps(self) -> None:
        """Before anything is begun. Raises what ends the run."""
        if self.context.dropped:
            raise drop_error(self.context)
        if self.context.left_s <= 0:
            raise DeadlineExceeded("the deadline passed before all steps were done")
        if self.max_cost is not None and self.spent() >= self.max_cost:
            raise WorkflowStopped(f"no result within max_cost={self.max_cost}")

    def spent(self) -> Decimal:
        """What the steps cost until now."""
        ledger.sum_up([self.task.id])
        found = Task.objects.values_list("cost", flat=True).get(id=self.task.id)
        return found or Decimal(0)


def failure_of(step: Step) -> StepFailed:
    why = (step.output or {}).get("content", "")
    return StepFailed(f"step {step.name!r} failed: {step.error_class}: {why}")


@dataclass
class Steps:
    """The steps of a range, read in batches."""

    task_id: UUID
    first: int
    count: int

    def __iter__(self) -> Iterator[Step]:
        for at in range(self.first, self.first + self.count, BATCH):
            until = min(at + BATCH, self.first + self.count)
            yield from self.rows().filter(number__gte=at, number__lt=until).order_by("number")

    def rows(self) -> Any:
        return Step.objects.filter(
            task_id=self.task_id, number__gte=self.first, number__lt=self.first + self.count
        )

    def with_answers(self) -> Iterator[tuple[Step, str, Any]]:
        """Each step with its task's kind and stored answer, a batch in memory at a time."""
        batch: list[Step] = []
        for step in self:
            batch.append(step)
            if len(batch) == BATCH:
                yield from answered(batch)
                batch = []
        yield from answered(batch)


def answered(batch: Sequence[Step]) -> Iterator[tuple[Step, str, Any]]:
    ids = [step.child_id for step in batch if step.child_id is not None]
    kinds = dict(Task.objects.filter(id__in=ids).values_list("id", "kind"))
    stored = dict(TaskPayload.objects.filter(task_id__in=ids).values_list("task_id", "response"))
    for step in batch:
        if step.child_id is None:
            yield step, "", None
        else:
            yield step, kinds.get(step.child_id, ""), stored.get(step.child_id)


# --- Steps at the same time -----------------------------------------------------------------------


@dataclass
class Fan:
    """Steps `first` to `first + count - 1` of a run, some of them at a time."""

    run: Run
    first: int
    count: int
    job_at: Callable[[int], Job]
    at_once: int
    is_enough: Callable[[], bool] | None = None

    @property
    def steps(self) -> Steps:
        return Steps(self.run.task.id, self.first, self.count)

    def go_on(self) -> None:
        """Bring all steps to their end; raises `Snooze` for as long as one is open."""
        open_ = self.look_at(list(self.steps.rows().filter(TO_LOOK_AT).order_by("number")))
        while not self.is_over():
            at = self.next_number()
            room = min(self.at_once - len(open_), self.first + self.count - at, BATCH)
            if room <= 0:
                break
            self.run.check_caps()
            open_ += self.begin(range(at, at + room))
        else:
            self.call_off(open_)
            self.raise_failed()
            return
        if open_:
            self.wait(open_)

    def next_number(self) -> int:
        last = self.steps.rows().order_by("-number").values_list("number", flat=True).first()
        return self.first if last is None else last + 1

    def is_over(self) -> bool:
        """Whether no more is to be begun or waited for: a step failed, or there is enough."""
        if self.steps.rows().filter(status=Step.Status.FAILED).exists():
            return True
        return self.is_enough is not None and self.is_enough()

    def raise_failed(self) -> None:
        failed = self.steps.rows().filter(status=Step.Status.FAILED).order_by("number").first()
        if failed is not None:
            raise failure_of(failed)

    def call_off(self, open_: Sequence[Step]) -> None:
        """Cancel what is open, and wait until it has ended, so that what it cost is known."""
        asked = [step for step in open_ if step.child_id is None]
        for step in asked:
            settle(step, self.job(step), "Cancelled", NOT_NEEDED, skip=True)
        if asked:
            self.record(asked, (), ())
        ids = [step.child_id for step in open_ if step.child_id is not None]
        if ids:
            ended = ledger.cancel_many(ids, NOT_NEEDED) + ledger.cancel_below(ids, NOT_NEEDED)
            events.publish_many((i, "done", {"status": Status.CANCELLED}) for i in ended)
            self.wait(open_, may_be_open=0)

    def wait(self, open_: Sequence[Step], may_be_open: int | None = None) -> None:
        """Raises `Snooze`. Woken for each quarter that has ended, so that many steps wake it a few
        times, and few at once."""
        task = self.run.task
        ledger.sum_up([task.id])
        ids = [step.child_id for step in open_ if step.child_id is not None]
        if may_be_open is None:
            may_be_open = len(ids) - max(1, len(ids) // 4) if ids else 0
        crash.point("workflow.waiting")
        stores.release()
        rows_of.block(task, ids, may_be_open)

    # --- Looking at what was begun ------------------------------------------------------------

    def look_at(self, open_: Sequence[Step]) -> list[Step]:
        """Write down which steps ended, and try again those that may; those that are open still."""
        if not open_:
            return []
        ids = [step.child_id for step in open_ if step.child_id is not None]
        found = {row["id"]: row for row in Task.objects.filter(id__in=ids).values(*CHILD)}
        changed, new = [], []
        is_over = self.is_over()
        for step in open_:
            child = None if step.child_id is None else found.get(step.child_id)
            if is_open(step, child):
                continue
            made = self.go_on_with(step, child, is_over=is_over)
            changed.append(step)
            new += [made] if made is not None else []
        if changed:
            self.record(changed, (), new)
        return [step for step in open_ if step.status in OPEN]

    def go_on_with(self, step: Step, child: Any, *, is_over: bool) -> Task | None:
        """What becomes of a step whose task ended, or on which a person decided. A task that is to
        be made for it."""
        job = self.job(step)
        if step.status == Step.Status.FAILED:
            settle(step, job, step.error_class, (step.output or {}).get("content", ""))
            return None
        if child is None:
            step.status = Step.Status.OPEN
            return self.task_of(step, job, (step.input or {}).get("arguments"))
        error, message = error_of(child, job)
        if not error:
            step.status, step.finished_at = Step.Status.DONE, pulse.now()
            return None
        if not is_over and step.tries <= job.block.retries and error not in HOPELESS:
            made = self.task_of(step, job)
            if made is not None:
                children.again(made, child["id"], step.tries)
                step.tries += 1
            return made
        # Where there is enough, or another one failed, what was called off is no failure.
        settle(step, job, error, message, skip=is_over)
        return None

    def record(self, changed: Sequence[Step], new: Sequence[Step], made: Sequence[Task]) -> None:
        rows_of.record(self.run.task, changed, new, made)
        crash.point("workflow.advanced")
        for step in (*changed, *new):
            rows_of.tell(step)

    def job(self, step: Step) -> Job:
        return self.job_at(step.number - self.first)

    # --- Beginning ----------------------------------------------------------------------------

    def begin(self, numbers: range) -> list[Step]:
        """Write the steps and their tasks down; those that are open then."""
        new, made = [], []
        for number in numbers:
            step, child = self.begun(number)
            new.append(step)
            made += [child] if child is not None else []
        self.record((), new, made)
        return [step for step in new if step.status in OPEN]

    def begun(self, number: int) -> tuple[Step, Task | None]:
        task, job = self.run.task, self.job_at(number - self.first)
        step = Step(
            id=uuid7(), task_id=task.id, tenant_id=task.tenant_id, number=number,
            kind=job.kind or job.block.kind, name=job.name[:100], status=Step.Status.OPEN,
            started_at=pulse.now(),
        )  # fmt: skip
        if isinstance(job.block, spec.Transform) and job.make is None:
            do_transform(step, job)
            return step, None
        if isinstance(job.block, spec.Tool) and needs_approval(job.block.tool):
            ask_a_person(step, job)
            return step, None
        return step, self.task_of(step, job)

    def task_of(self, step: Step, job: Job, arguments: Any = None) -> Task | None:
        """The step's task; None where there can't be one, and the step has failed."""
        parent = self.run.task
        try:
            if job.make is not None:
                child = job.make(parent)
            elif arguments is not None and isinstance(job.block, spec.Tool):
                approved = children.tool_request(job.block.tool, arguments)
                child = children.task_for(parent, "tool", approved, lane=job.block.lane)
            else:
                child = children.child_of(parent, job.block, job.scope, of_many=self.count > 1)
        except (ApiError, MissingValue, BadOutput) as error:
            settle(step, job, type(error).__name__, str(error))
            return None
        step.child_id = child.id
        return child


def is_open(step: Step, child: Any) -> bool:
    """Whether nothing is to be done about a step yet."""
    if child is None:
        return step.status not in (Step.Status.APPROVED, Step.Status.FAILED)
    return child["status"] not in FINAL


def error_of(child: Any, job: Job) -> tuple[str, str]:
    """Class and message of what went wrong with a step's task; empty where nothing did."""
    if child["status"] != Status.SUCCEEDED:
        return child["error_class"] or child["status"], child["error_message"]
    if job.check is None and not children.wants_json(job.block):
        return "", ""
    try:
        value = children.output_of(child["id"], job.block)
        if job.check is not None:
            job.check(value)
    except (BadOutput, MissingValue) as error:
        return type(error).__name__, str(error)
    return "", ""


def settle(step: Step, job: Job, error: str, message: str, *, skip: bool = False) -> None:
    """End a step that failed, as its policy says."""
    step.error_class = error[:40]
    step.finished_at = pulse.now()
    step.output = {"content": message[:MAX_MESSAGE]}
    if skip or job.block.on_error == "skip":
        step.status = Step.Status.SKIPPED
    elif job.block.on_error == "default":
        step.status = Step.Status.DONE
        step.output = {"content": job.block.default, "error": message[:MAX_MESSAGE]}
    else:
        step.status = Step.Status.FAILED


def do_transform(step: Step, job: Job) -> None:
    block = job.block
    if not isinstance(block, spec.Transform):
        raise TypeError("only a transform is done on the spot")
    try:
        value = transform.apply(render(block.value, job.scope), block.do)
    except (MissingValue, BadOutput) as error:
        settle(step, job, type(error).__name__, str(error))
        return
    step.status, step.finished_at = Step.Status.DONE, pulse.now()
    step.output = {"content": value}


def needs_approval(reference: str) -> bool:
    try:
        return registry.find(reference).needs_approval
    except ApiError:
        return False


def ask_a_person(step: Step, job: Job) -> None:
    """What is approved is what will run: the arguments are kept."""
    block = job.block
    if not isinstance(block, spec.Tool):
        raise TypeError("only a tool's run is approved")
    try:
        arguments = render(block.arguments, job.scope)
        children.tool_request(block.tool, arguments)
    except (ApiError, MissingValue) as error:
        settle(step, job, type(error).__name__, str(error))
        return
    step.status = Step.Status.APPROVAL
    step.input = {"arguments": arguments}
