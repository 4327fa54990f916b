"""What llmtasks itself refuses or gives up, as one tree.

ApiError                    rendered by `api/errors.py`, in the shape of the door it came through
├── InvalidInput            400: `param` names the field, the message says what to do
│   └── UnknownModel        404, as OpenAI has it
├── NotAuthenticated        401
├── NotAllowed              403
├── NotFound                404: also for what belongs to another tenant
├── Conflict                409: the task's state, or a key still in use
├── BodyTooLarge            413
├── KeyReused               422: an Idempotency-Key with another body
├── Unavailable             503: something that we need is away; `retry_after` says when
│   └── NoProvider          no candidate of the route can be called now
└── TooManyWatchers         503: this process serves all the event streams that it may

TaskError                   how a task ended, beside the vendor's errors (`providers.errors`)
├── DeadlineExceeded        its one deadline passed
├── LimitReached            a rate limit leaves no room before the deadline: 429
├── AgentStopped            an agent gave no answer within its caps: 422
├── ToolFailed              a tool that was run by itself gave no result: 422
├── StepFailed              a step of a workflow failed, and its policy is to fail: 422
├── WorkflowStopped         a workflow reached one of its caps: 422
├── Interrupted             the process died or ended that ran it inline, or `on_unknown` is `fail`
├── Cancelled               somebody asked for it
├── ClientLeft              the caller hung up while it ran inline
└── InternalError           a fault of ours, logged with its trace

Lost                        the row is no longer ours: somebody else owns it, we leave
Snooze                      not now: the task goes back to waiting until `not_before`
"""

from typing import ClassVar


class ApiError(Exception):
    """A request was refused. `code` is a stable word for programs."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidInput(ApiError):
    """The request's content can't be used."""

    status = 400
    code = "invalid_request"


class UnknownModel(InvalidInput):
    """There is no route of that name; the status is the one of OpenAI's API."""

    status = 404
    code = "model_not_found"


class NotAuthenticated(ApiError):
    """No key, a wrong one, or one that is expired or revoked."""

    status = 401
    code = "invalid_api_key"


class NotAllowed(ApiError):
    """The key lacks the scope."""

    status = 403
    code = "not_allowed"


class NotFound(ApiError):
    """No such thing for this tenant."""

    status = 404
    code = "not_found"


class Conflict(ApiError):
    """What was asked for does not fit the state that the thing is in."""

    status = 409
    code = "conflict"


class BodyTooLarge(ApiError):
    """The body is larger than MAX_BODY_BYTES."""

    status = 413
    code = "body_too_large"


class KeyReused(ApiError):
    """An Idempotency-Key came again with another body."""

    status = 422
    code = "idempotency_key_reused"


class Unavailable(ApiError):
    """Something that this request needs is away."""

    status = 503
    code = "unavailable"


class NoProvider(Unavailable):
    """No candidate of the route can be called now (all paused)."""

    code = "no_provider"


class TooManyWatchers(ApiError):
    """This process serves all the event streams that it may."""

    status = 503
    code = "too_many_watchers"


class TaskError(Exception):
    """A task ended for a reason of ours."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class DeadlineExceeded(TaskError):
    """The deadline passed before the work was done."""


class LimitReached(TaskError):
    """A rate limit leaves no room before the deadline. `retry_after` is in seconds."""

    status = 429

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AgentStopped(TaskError):
    """An agent gave no answer within its caps: turns, tokens, money or time."""

    status = 422


class ToolFailed(TaskError):
    """A tool that was run by itself gave no result."""

    status = 422


class StepFailed(TaskError):
    """A step of a workflow failed for good, and the workflow can't go on without it."""

    status = 422


class WorkflowStopped(TaskError):
    """A workflow reached one of its caps: money, items, or turns without a good result."""

    status = 422


class Interrupted(TaskError):
    """The process that ran the work died during it, or was told to end. Another may run it."""

    retry_after: ClassVar[float] = 1.0


class Cancelled(TaskError):
    """Somebody asked for it."""


class ClientLeft(TaskError):
    """The caller hung up while the work ran in its request."""


class InternalError(TaskError):
    """A fault of ours."""


class Lost(Exception):
    """A conditional UPDATE changed no row: the task is no longer ours."""


class Snooze(Exception):
    """The task goes back to waiting for `seconds`; no worker is held meanwhile."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds
