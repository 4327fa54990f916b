"""What surrounds a call: its task, its deadline, its caller, and who dropped it."""

import copy
import threading
import time
from dataclasses import dataclass, field, replace
from socket import socket

from llmtasks import pulse, stores
from llmtasks.errors import Cancelled, ClientLeft, Interrupted, TaskError
from llmtasks.guards.rate_limit import Grant, Meter, Refusal
from llmtasks.models import Task
from providers.http import Exchange
from providers.types import StreamEvent


@dataclass(frozen=True, slots=True)
class Reset:
    """What was streamed so far is void: a new attempt starts from the beginning (`retry`), or the
    model's next turn begins (`turn`)."""

    attempt: int
    reason: str = "retry"


Event = StreamEvent | Reset


@dataclass
class Context:
    """What surrounds a call: its task, its deadline, and whether somebody dropped it.

    `ends_task`: the task succeeds or fails with this call (a chat), and is written so together
    with the attempt. `is_turn`: unless the model calls tools; its answer is kept as step number
    `step`. `streams`: deltas are wanted; `may_restart`: whoever gets them understands a `Reset`.
    `client`: the caller's socket, watched for a hang-up.
    """

    task: Task
    step: int = 0
    # Whether nobody can have tried the step before this run.
    is_new_step: bool = False
    ends_task: bool = True
    is_turn: bool = False
    streams: bool = False
    may_restart: bool = False
    client: socket | None = None
    warning: str = ""
    exchange: Exchange | None = None
    # The number of the step's last attempt, and of the one that answers.
    number: int = 0
    answering: int = 0
    # What surrounds a second call for the same answer, dropped together with this one.
    second: "Context | None" = None
    # The caller's own limits as the last grant found them, and what refused the call for good.
    grant: Grant | None = None
    refusal: Refusal | None = None
    dropped: str = ""
    wakes: threading.Event = field(default_factory=threading.Event)
    deadline: float = 0.0

    def __post_init__(self) -> None:
        left = (self.task.deadline - pulse.now()).total_seconds()
        self.deadline = time.monotonic() + left

    def drop(self, reason: str) -> None:
        """End the call from another thread: `cancel`, `client`, `lease` or `drain`."""
        self.dropped = self.dropped or reason
        self.wakes.set()
        if (exchange := self.exchange) is not None:
            exchange.drop(reason)
        if (second := self.second) is not None:
            second.drop(reason)

    def beside(self) -> "Context":
        """What surrounds a second call for the same answer, in another thread."""
        self.second = replace(
            self, task=copy.copy(self.task), exchange=None, second=None, wakes=threading.Event()
        )
        if self.dropped:
            self.second.drop(self.dropped)
        return self.second

    def pause(self, seconds: float) -> None:
        """Wait without holding a connection; a drop ends it early."""
        stores.release()
        self.wakes.wait(seconds)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def own_limits(self) -> tuple[Meter, ...]:
        """The caller's own limits as the last grant found them, or the one that refused the call.
        None where Redis did not tell."""
        if self.refusal is not None:
            rule = self.refusal.rule
            if rule is None or not rule.is_own:
                return ()
            return (Meter(rule, "", need=0, pace=0, left=0, reset_s=self.refusal.wait_s),)
        if self.grant is None or not self.grant.at:
            return ()
        return tuple(m for m in self.grant.meters if m.rule.is_own and m.left >= 0)


def drop_error(context: Context) -> TaskError:
    """The error that says why the call was dropped."""
    if context.dropped == "cancel":
        return Cancelled("cancelled on request")
    if context.dropped == "client":
        return ClientLeft("the caller hung up")
    if context.dropped == "drain":
        return Interrupted("the process that ran it was told to end")
    return Interrupted("the process that ran it lost its lease")
