"""Each process's own share of the limits while Redis is away: limit ÷ live processes, no burst."""

import threading
import time
from collections.abc import Sequence
from uuid import UUID

from llmtasks import pulse
from llmtasks.guards.rules import Rule

# Meters that are remembered. Beyond that all are forgotten: each then starts anew, without a burst.
MAX_METERS = 10_000
FULL_WAIT_S = 0.1

_lock = threading.Lock()
# Meter → when it may be used again (monotonic), or how many calls are under way.
_free_at: dict[str, float] = {}
_under_way: dict[str, int] = {}
_held: dict[UUID, list[str]] = {}


def take(attempt_id: UUID, wanted: Sequence[tuple[str, Rule, int]]) -> float:
    """Take all of `(meter, rule, need)` and return 0, or none and return the seconds to wait."""
    processes = max(1, pulse.live_processes())
    now = time.monotonic()
    with _lock:
        if len(_free_at) > MAX_METERS:
            _free_at.clear()
        wait = max((wait_for(key, rule, processes, now) for key, rule, _ in wanted), default=0.0)
        if wait > 0:
            return wait
        for key, rule, need in wanted:
            if rule.per_us:
                _free_at[key] = now + need * interval_s(rule, processes)
            else:
                _under_way[key] = _under_way.get(key, 0) + 1
                _held.setdefault(attempt_id, []).append(key)
    return 0.0


def wait_for(key: str, rule: Rule, processes: int, now: float) -> float:
    if rule.per_us:
        # The first call waits its turn too: nobody knows what was used before.
        free_at = _free_at.setdefault(key, now + interval_s(rule, processes))
        return max(0.0, free_at - now)
    most = max(1, rule.amount // processes)
    return FULL_WAIT_S if _under_way.get(key, 0) >= most else 0.0


def interval_s(rule: Rule, processes: int) -> float:
    """Seconds for one unit of this process's share."""
    return rule.per_us / 1e6 / rule.amount * processes


def give_back(attempt_id: UUID) -> None:
    """A call ended: its place among the calls at once is free."""
    with _lock:
        for key in _held.pop(attempt_id, ()):
            _under_way[key] -= 1
            if _under_way[key] <= 0:
                del _under_way[key]
