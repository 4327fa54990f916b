"""What is left of the caller's own rate limits, in headers: `RateLimit` and `RateLimit-Policy`
(draft-ietf-httpapi-ratelimit-headers-11), and the six of OpenAI's that its clients know.
"""

import math
from collections.abc import Iterable

from llmtasks.guards.rate_limit import Meter
from llmtasks.guards.rules import Rule
from llmtasks.models import WINDOWS, Limit

# The units as the draft names them; tokens have no name there.
QUOTA_UNITS = {Limit.Unit.CONCURRENCY: "concurrent-requests"}
OPENAI_UNITS = (Limit.Unit.REQUESTS, Limit.Unit.TOKENS)
# The largest integer of a structured field.
MOST = 999_999_999_999_999


def headers(found: Iterable[Meter]) -> dict[str, str]:
    """Of two limits of one name the tighter one is told."""
    meters: dict[str, Meter] = {}
    for meter in sorted(found, key=lambda meter: meter.left):
        meters.setdefault(name_of(meter.rule), meter)
    if not meters:
        return {}
    told = {
        "RateLimit-Policy": ", ".join(policy(name, m.rule) for name, m in meters.items()),
        "RateLimit": ", ".join(state(name, m) for name, m in meters.items()),
    }
    for unit in OPENAI_UNITS:
        tightest = next((m for m in meters.values() if m.rule.unit == unit), None)
        if tightest is not None:
            told |= openai(unit, tightest)
    return told


def name_of(rule: Rule) -> str:
    """`key-requests-per-minute`, `tenant-concurrency`."""
    whose = Limit.Each.KEY if rule.key_id or rule.each == Limit.Each.KEY else Limit.Each.TENANT
    unit = rule.unit.replace("_", "-")
    return f"{whose}-{unit}-per-{rule.window}" if rule.window else f"{whose}-{unit}"


def policy(name: str, rule: Rule) -> str:
    unit = QUOTA_UNITS.get(Limit.Unit(rule.unit), rule.unit.replace("_", "-"))
    window = f";w={WINDOWS[rule.window]}" if rule.window else ""
    return f'"{name}";q={min(rule.amount, MOST)};qu="{unit}"{window}'


def state(name: str, meter: Meter) -> str:
    reset = f";t={math.ceil(meter.reset_s)}" if meter.rule.window else ""
    return f'"{name}";r={min(meter.left, MOST)}{reset}'


def openai(unit: str, meter: Meter) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{unit}": str(meter.rule.amount),
        f"x-ratelimit-remaining-{unit}": str(meter.left),
        f"x-ratelimit-reset-{unit}": duration(meter.reset_s),
    }


def duration(seconds: float) -> str:
    """As OpenAI writes it: 12ms, 1.5s, 6m0s, 1h0m0s."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    text = f"{ms / 1000:g}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
    return text
