"""What Postgres knows of a limit's use, for a meter that Redis lost."""

import logging
from typing import Any
from uuid import UUID

import psycopg
from django.db import OperationalError

from llmtasks import pulse
from llmtasks.guards.rules import SLOTS, Rule
from llmtasks.models import Limit
from llmtasks.stores import fetch

log = logging.getLogger(__name__)

# An id is as old as the caller's wait for the limiter, and as wrong as its process's clock.
ID_AGE_S = 3600.0

# Of each slot of the window: when it began (us) and what was used. Ids are ordered by time. What a
# call uses that is under way, or that nobody knows of, is what one used on the average.
USED = """
WITH sent AS (
    SELECT started_at, CASE WHEN state = 'settled' THEN
        CASE %(unit)s
            WHEN 'input_tokens' THEN given WHEN 'output_tokens' THEN made ELSE given + made
        END END AS tokens
    FROM (
        SELECT started_at, state, input_tokens + cached_input_tokens + cache_write_5m_tokens
                + cache_write_1h_tokens AS given, output_tokens + reasoning_tokens AS made
        FROM llmtasks_attempt a
        WHERE id >= %(since)s
            AND (%(provider)s = '' OR provider = %(provider)s)
            AND (%(model)s = '' OR model = %(model)s)
            AND (%(tenant)s::uuid IS NULL OR tenant_id = %(tenant)s)
            AND (%(key)s::uuid IS NULL
                 OR (SELECT key_id FROM llmtasks_task t WHERE t.id = a.task_id) = %(key)s)
    ) called
)
SELECT (floor(extract(epoch FROM started_at) * 1000000 / %(width)s) * %(width)s)::float,
    sum(CASE %(unit)s WHEN 'requests' THEN 1
        ELSE coalesce(tokens, (SELECT ceil(avg(tokens)) FROM sent), 0) END)::float
FROM sent GROUP BY 1
"""


def used(rule: Rule, meter: str) -> dict[str, Any]:
    """`used`: [time (us), used] of the rule's window, as attempts that were sent say, and `now` by
    the same clock. `meter` tells whose it is where each tenant or key has its own. Raises
    `django.db.Error`s."""
    who = UUID(meter.rpartition(":")[2]) if rule.each else None
    now_us = int(pulse.now().timestamp() * 1e6)
    since_ms = (now_us - rule.per_us * (1 + 2 / SLOTS)) / 1000 - ID_AGE_S * 1000
    values = {
        "width": rule.per_us / SLOTS,
        "unit": rule.unit,
        "since": UUID(int=int(since_ms) << 80),
        "provider": rule.provider,
        "model": rule.model,
        "tenant": who if rule.each == Limit.Each.TENANT else rule.tenant_id,
        "key": who if rule.each == Limit.Each.KEY else rule.key_id,
    }
    try:
        found = [[float(at), float(count)] for at, count in fetch(USED, values)]
    except OperationalError as error:
        if not isinstance(error.__cause__, psycopg.errors.QueryCanceled):
            raise
        log.warning("Postgres can't count in time what was used", extra={"limit": rule.name})
        found = evenly(rule, now_us)
    return {"used": found, "now": now_us}


def evenly(rule: Rule, now_us: int) -> list[list[float]]:
    """As if all of the limit had been used, the same in each slot."""
    width = rule.per_us / SLOTS
    return [[now_us - slot * width, -(-rule.amount // SLOTS)] for slot in range(SLOTS, 0, -1)]
