"""The dispatcher and a worker in one, without a broker."""

import time

from llmtasks import dispatch, execute, steps
from llmtasks.models import Lane, Provider, Task
from llmtasks.routing import TOOLS, WORKFLOWS
from llmtasks.turns import Turns


def work_off(within_s: float = 20.0, *, once: bool = False) -> None:
    """Release and run what waits until nothing does; `once`: one round only."""
    end = time.monotonic() + within_s
    while Task.objects.filter(status__in=("waiting", "queued")).exists():
        names = [*Provider.objects.values_list("name", flat=True), TOOLS, WORKFLOWS]
        rooms = {(name, lane): 50 for name in names for lane in Lane.values}
        for hint in dispatch.pick(rooms, Turns()):
            execute.run_queued(hint.task_id, hint.seq)
        if once:
            return
        steps.wake()
        assert time.monotonic() < end, list(Task.objects.values("status", "error_class"))
        time.sleep(0.005)
