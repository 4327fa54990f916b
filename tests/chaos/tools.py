"""Tools whose every run leaves a row, in a transaction of its own: what an agent did is told by
what it did, not by its steps. A `key` stands for one call."""

import time

from django.db import connection

from llmtasks.tools.registry import tool

WORK_S = 0.1


def work(name: str, key: str) -> str:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO chaos_runs (tool, key) VALUES (%s, %s)", [name, key])
    # No connection is kept meanwhile.
    connection.close()
    time.sleep(WORK_S)
    return f"{name} {key}"


@tool(idempotent=True)
def look_up(key: str) -> str:
    """May be run again where its process died."""
    return work("look_up", key)


@tool()
def charge(key: str) -> str:
    """Must not be run twice."""
    return work("charge", key)


@tool(needs_approval=True)
def refund(key: str) -> str:
    """Nor without a person's word."""
    return work("refund", key)


@tool(critical=False, idempotent=True)
def mail(key: str) -> str:
    """Queued; may be run again."""
    return work("mail", key)


@tool(critical=False)
def post(key: str) -> str:
    """Queued; must not be run twice."""
    return work("post", key)
