"""Numbers of many rounds into one, and tables for people."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed; 0 for none."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Field by field the rounds' median; None where a round has none."""
    merged: dict[str, Any] = {}
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        merged[name] = None if None in values else round(statistics.median(values), 3)
    return merged


def table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Text with a column for each (field → heading)."""
    cells = [list(columns.values())]
    cells += [[shown(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]
    return "\n".join([title, *lines, ""])


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return str(value)
