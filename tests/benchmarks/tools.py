"""Tools that do nothing, or wait: what an agent costs beside them."""

import time

from llmtasks.tools.registry import tool


@tool(idempotent=True)
def nothing(number: int) -> str:
    """Comes back at once."""
    return "done"


@tool(idempotent=True)
def wait(number: int) -> str:
    """Takes 100 ms."""
    time.sleep(0.1)
    return "done"


@tool(critical=False, idempotent=True)
def later(number: int) -> str:
    """Queued."""
    return "done"
