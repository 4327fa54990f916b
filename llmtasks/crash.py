"""Named points at which a process dies as by kill -9: for tests only, nothing where unset.

`LLMTASKS_CRASH=attempt.begun` kills the process when it first passes that point,
`LLMTASKS_CRASH=attempt.begun:3` at its third pass.
"""

import itertools
import os
import signal

from django.core.exceptions import ImproperlyConfigured

POINTS = (
    "submit.inserted",  # in the transaction, before COMMIT
    "submit.saved",
    "dispatch.queued",
    "dispatch.publishing",  # between two hints
    "dispatch.published",
    "execute.received",  # taken from the broker, not claimed
    "execute.claimed",
    "attempt.begun",
    "attempt.answered",
    "attempt.finished",
    "workflow.advanced",  # steps and their tasks are written, nobody waits for them yet
    "workflow.waiting",  # before the task is blocked
    "sweep.taking",  # in the transaction, before COMMIT
    "sweep.taken",
)


def armed(text: str) -> tuple[str, int]:
    """The point and the pass at which to die."""
    name, _, number = text.partition(":")
    if name and name not in POINTS:
        raise ImproperlyConfigured(f"LLMTASKS_CRASH: {name!r} is none of {', '.join(POINTS)}")
    if number and not (number.isdigit() and int(number)):
        raise ImproperlyConfigured(f"LLMTASKS_CRASH: {number!r} is no count of passes")
    return name, int(number or 1)


# The point, the pass at which to die, and a count of passes: threads pass at once, and taking the
# next of a count is one step.
_name, _number = "", 1
_passes = itertools.count(1)


def arm() -> None:
    """Die where the environment says."""
    global _name, _number
    _name, _number = armed(os.environ.get("LLMTASKS_CRASH", ""))


def point(name: str) -> None:
    if name == _name and next(_passes) == _number:
        os.kill(os.getpid(), signal.SIGKILL)


arm()
