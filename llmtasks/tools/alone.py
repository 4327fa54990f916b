"""A task of kind `tool`: one run of one tool, inline or in the background."""

from collections.abc import Generator

from llmtasks import pulse
from llmtasks.bodies import ToolAnswer, ToolRequest
from llmtasks.context import Context, Event, drop_error
from llmtasks.errors import ToolFailed
from llmtasks.models import Lane, Mode
from llmtasks.tools import run as tool_run
from llmtasks.tools.registry import registry
from llmtasks.tools.run import Caller


def stream(request: ToolRequest, context: Context) -> Generator[Event, None, ToolAnswer]:
    """Yield nothing and return what the tool gave. Raises `ToolFailed`, `NotFound`."""
    task = context.task
    tool = registry.find(request.tool)
    is_urgent = task.mode == Mode.INLINE or task.lane == Lane.INTERACTIVE
    with pulse.watch(task.id, context.drop, context.client, task.owner_id):
        caller = Caller(task.tenant_id, task.key_id, is_urgent, context.left_s)
        result = tool_run.run(tool, request.arguments, caller)
    if context.dropped:
        raise drop_error(context)
    if result.is_error:
        raise ToolFailed(f"{result.error}: {result.content}")
    yield from ()
    return ToolAnswer(content=result.content)
