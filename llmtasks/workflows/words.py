"""What a model's words mean where something is decided by them: rules, choices, likeness."""

import math
import re
from collections.abc import Sequence
from typing import Any

from llmtasks.workflows.spec import Rule
from llmtasks.workflows.templates import as_text


def holds(rule: Rule, value: Any) -> bool:
    """Whether all that the rule gives is so."""
    given = rule.model_fields_set
    return all(
        so
        for name, so in (
            ("equals", folded(value) == folded(rule.equals)),
            ("contains", has(value, rule.contains or "")),
            ("one_of", folded(value) in [folded(one) for one in rule.one_of or ()]),
            ("less", is_number(value) and value < (rule.less or 0)),
            ("greater", is_number(value) and value > (rule.greater or 0)),
        )
        if name in given
    )


def folded(value: Any) -> Any:
    return value.strip().casefold() if isinstance(value, str) else value


def has(value: Any, wanted: str) -> bool:
    if isinstance(value, list):
        return folded(wanted) in [folded(one) for one in value]
    return wanted.casefold() in as_text(value).casefold()


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def named(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text is, or else the only one that it names; None where it is unclear."""
    said = text.strip().strip("\"'`.*:!").strip().casefold()
    for choice in choices:
        if said == choice.strip().casefold():
            return choice
    found = [c for c in choices if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None


def likeness(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of the angle between two vectors."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    length = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return product / length if length else 0.0
