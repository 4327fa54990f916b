"""Queues and limits: how much waits where and for how long, how close each limit is, which vendors
fail. Charts of one look at the stores (`health.py`), drawn as bars: nothing is asked of another
host."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from llmtasks import backlog, health
from llmtasks.admin import limits
from llmtasks.admin.navigation import BOARD, may_see, may_see_any
from llmtasks.backlog import COUNTED, Backlog, Depth
from llmtasks.health import Health
from llmtasks.models import Lane

MOST_BARS = 40
STATES = ("due", "later", "queued", "running")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a bar: its kind, and how long it is of the whole in per cent."""

    kind: str
    width: str
    title: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a chart. `is_first`: of its group."""

    group: str
    name: str
    parts: tuple[Part, ...]
    text: str
    is_first: bool = False


def queues(request: HttpRequest) -> HttpResponse:
    if not may_see_any(BOARD)(request):
        raise PermissionDenied
    found = health.now()
    context = {**admin.site.each_context(request), "title": "Queues and limits", "has": found.has}
    if may_see("llmtasks.task")(request):
        context |= of_tasks(found)
    if may_see("llmtasks.limit")(request):
        context |= of_limits(found)
    if may_see("llmtasks.provider")(request):
        models, left = limits.notable_models(found)
        context |= {"models": models, "models_left": left, "errors": errors(found)}
    if may_see("llmtasks.providerevent")(request):
        context |= {"events": limits.events()}
    return TemplateResponse(request, "admin/llmtasks/queues.html", context)


def of_tasks(found: Health) -> dict[str, Any]:
    if found.backlog is None:
        return {"has_backlog": False, "depths": []}
    names = [account.row.name for account in found.accounts]
    lanes = by_place(found.backlog, names)
    return {
        "has_backlog": True,
        "counted": f"{COUNTED:,}",
        "depths": grouped(depth_bars(lanes)),
        "ages": grouped(age_bars(lanes)),
        "classes": classes(found.backlog),
        "processes": found.processes,
        "has_leader": found.has_leader,
    }


def by_place(found: Backlog, providers: Iterable[str]) -> list[tuple[str, str, Depth]]:
    """(provider, lane, depth), every provider with all its lanes."""
    known = backlog.by_lane(found)
    names = sorted({*providers, *(provider for provider, _ in known)})
    return [
        (name, str(lane), known.get((name, lane), Depth()))
        for name in names
        for lane in Lane.values
    ]


def depth_bars(places: Sequence[tuple[str, str, Depth]]) -> list[Bar]:
    most = max((sum(getattr(d, state) for state in STATES) for *_, d in places), default=0)
    return [Bar(name, lane, parts(depth, most), summary(depth)) for name, lane, depth in places]


def parts(depth: Depth, most: int) -> tuple[Part, ...]:
    numbers = {state: getattr(depth, state) for state in STATES}
    return tuple(
        Part(state, percent(number, most), f"{number:,} {state}")
        for state, number in numbers.items()
        if number
    )


def summary(depth: Depth) -> str:
    more = "+" if depth.is_capped else ""
    told = f"{depth.waiting:,}{more} waiting" if depth.waiting else ""
    way = depth.queued + depth.running
    return " · ".join(part for part in (told, f"{way:,} under way" if way else "") if part) or "0"


def age_bars(places: Sequence[tuple[str, str, Depth]]) -> list[Bar]:
    most = max((depth.oldest_s for *_, depth in places), default=0.0)
    return [
        Bar(name, lane, age_parts(depth.oldest_s, most), limits.seconds(depth.oldest_s))
        for name, lane, depth in places
    ]


def age_parts(seconds: float, most: float) -> tuple[Part, ...]:
    return (Part("age", percent(seconds, most), limits.seconds(seconds)),) if seconds else ()


def percent(number: float, most: float) -> str:
    return f"{100 * number / most:.2f}" if most else "0"


def grouped(bars: Sequence[Bar]) -> list[Bar]:
    """Each group's name once, at its first bar."""
    seen: set[str] = set()
    marked = []
    for bar in bars:
        marked.append(Bar(bar.group, bar.name, bar.parts, bar.text, bar.group not in seen))
        seen.add(bar.group)
    return marked


def classes(found: Backlog) -> list[dict[str, Any]]:
    """What waits, by the tenants' weights."""
    whole: dict[str, Depth] = {}
    for place, depth in found.items():
        whole.setdefault(place.tenants, Depth()).add(depth)
    return [
        {"name": name, "text": summary(whole[name]), "age": limits.seconds(whole[name].oldest_s)}
        for name in backlog.CLASSES
        if name in whole
    ]


def of_limits(found: Health) -> dict[str, Any]:
    """The limits, the closest first."""
    uses = sorted(found.uses, key=lambda use: -use.share)
    shown = [{"name": use.rule.name, "bar": limits.shown_use(use)} for use in uses[:MOST_BARS]]
    return {"uses": shown, "uses_left": max(0, len(uses) - MOST_BARS)}


def errors(found: Health) -> list[Bar]:
    """Failed calls by provider and class, the most frequent first."""
    counted: Counter[tuple[str, str]] = Counter()
    for (provider, _, error), number in found.errors.items():
        counted[provider, error] += number
    most = max(counted.values(), default=0)
    return [
        Bar(
            provider,
            error,
            (Part("error", percent(number, most), f"{number:,} {error}"),),
            f"{number:,}",
            is_first=True,
        )
        for (provider, error), number in counted.most_common(MOST_BARS)
    ]
