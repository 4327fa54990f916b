"""What Postgres knows of a limit's use, for a meter that Redis lost."""

from uuid import UUID

from llmtasks import pulse
from llmtasks.guards.rules import SLOTS, Rule
from llmtasks.models import Limit
from llmtasks.stores import fetch

# Of each slot of the window: when it began (us) and what was used. Ids are ordered by time.
USED = """
WITH sent AS (
    SELECT started_at, input_tokens + cached_input_tokens + cache_write_5m_tokens
               + cache_write_1h_tokens AS given,
        output_tokens + reasoning_tokens AS made
    FROM llmtasks_attempt a
    WHERE id >= %(since)s
        AND (%(provider)s = '' OR provider = %(provider)s)
        AND (%(model)s = '' OR model = %(model)s)
        AND (%(tenant)s::uuid IS NULL OR tenant_id = %(tenant)s)
        AND (%(key)s::uuid IS NULL
             OR (SELECT key_id FROM llmtasks_task t WHERE t.id = a.task_id) = %(key)s)
)
SELECT (floor(extract(epoch FROM started_at) * 1000000 / %(width)s) * %(width)s)::float,
    sum(CASE %(unit)s WHEN 'requests' THEN 1 WHEN 'input_tokens' THEN given
        WHEN 'output_tokens' THEN made ELSE given + made END)::float
FROM sent GROUP BY 1
"""


def used(rule: Rule, meter: str) -> list[list[float]]:
    """[time (us), used] of the rule's window, as attempts that were sent say. `meter` tells whose
    it is where each tenant or key has its own. Raises `django.db.Error`s."""
    who = UUID(meter.rpartition(":")[2]) if rule.each else None
    since_ms = int(pulse.now().timestamp() * 1000 - rule.per_us / 1000 * (1 + 2 / SLOTS))
    values = {
        "width": rule.per_us / SLOTS,
        "unit": rule.unit,
        "since": UUID(int=since_ms << 80),
        "provider": rule.provider,
        "model": rule.model,
        "tenant": who if rule.each == Limit.Each.TENANT else rule.tenant_id,
        "key": who if rule.each == Limit.Each.KEY else rule.key_id,
    }
    return [[float(at), float(count)] for at, count in fetch(USED, values)]
