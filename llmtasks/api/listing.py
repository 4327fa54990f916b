"""GET /v1/tasks: filters and pages, bounded by the index on (tenant, id).

Ids are UUIDv7 and so begin with their time: pages and time filters are ranges of ids, and no
page costs more than the one before it.
"""

import base64
import binascii
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
from django.db.models import Q, QuerySet
from django.http import QueryDict

from llmtasks.errors import InvalidInput
from llmtasks.models import Kind, Lane, Status, Task

DEFAULT_LIMIT = 20
MAX_LIMIT = 100
METADATA = "metadata."
CHOICES: dict[str, list[str]] = {
    "status": [str(value) for value in Status.values],
    "lane": [str(value) for value in Lane.values],
    "kind": [str(value) for value in Kind.values],
}
TEXTS = {"model": "route", "user": "user", "prompt": "prompt"}
KNOWN = (*CHOICES, *TEXTS, "created_after", "created_before", "limit", "cursor")


def tasks_of(tenant_id: UUID, query: QueryDict) -> tuple[list[Task], str | None]:
    """One page, newest first, and the next page's cursor. Raises InvalidInput."""
    rows = Task.objects.filter(tenant_id=tenant_id).order_by("-id")
    limit = DEFAULT_LIMIT
    for name in query:
        values = query.getlist(name)
        if len(values) > 1:
            raise InvalidInput(f"{name}: give it once", param=name)
        value = values[0]
        if "\0" in value or "\0" in name:
            raise InvalidInput("a filter must not hold the character U+0000", param=name)
        if name == "limit":
            limit = limit_of(value)
        else:
            rows = filtered(rows, name, value)
    found = list(rows[: limit + 1])
    more = found[limit:]
    return found[:limit], cursor_of(found[limit - 1]) if more else None


def filtered(rows: QuerySet[Task], name: str, value: str) -> QuerySet[Task]:
    """The rows with one more filter."""
    if name in CHOICES:
        return rows.filter(**{f"{name}__in": chosen(name, value)})
    if name in TEXTS:
        return rows.filter(**{TEXTS[name]: value})
    if name == "cursor":
        return rows.filter(id__lt=id_of(value))
    if name == "created_after":
        return rows.filter(id__gte=first_id(name, value))
    if name == "created_before":
        return rows.filter(id__lt=first_id(name, value))
    if name.startswith(METADATA) and len(name) > len(METADATA):
        return rows.filter(tagged(name.removeprefix(METADATA), value))
    raise InvalidInput(
        f"{name}: there is no such filter; there are {', '.join(KNOWN)} and metadata.<name>",
        param=name,
    )


def chosen(name: str, value: str) -> list[str]:
    """One or more of the filter's words, parted by commas."""
    wanted = value.split(",")
    for word in wanted:
        if word not in CHOICES[name]:
            raise InvalidInput(f"{name}: give one of {', '.join(CHOICES[name])}", param=name)
    return wanted


def tagged(name: str, value: str) -> Q:
    """Metadata with this value: a text, or the number or truth that it may stand for."""
    found = Q(metadata__contains={name: value})
    try:
        other: Any = orjson.loads(value)
    except orjson.JSONDecodeError:
        return found
    if isinstance(other, int | float | bool):
        found |= Q(metadata__contains={name: other})
    return found


def limit_of(value: str) -> int:
    if value.isascii() and value.isdigit() and len(value) < 5 and 1 <= int(value) <= MAX_LIMIT:
        return int(value)
    raise InvalidInput(f"limit: give a number from 1 to {MAX_LIMIT}", param="limit")


def whole_number(query: QueryDict, name: str, default: int, *, least: int, most: int) -> int:
    """A parameter's number. Raises InvalidInput."""
    text = query.get(name)
    if text is None:
        return default
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) < 11 and least <= int(text) <= most:
        return int(text)
    raise InvalidInput(f"{name}: give a number from {least} to {most}", param=name)


def first_id(name: str, value: str) -> UUID:
    """The smallest id of the moment."""
    try:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError
        milliseconds = int(moment.astimezone(UTC).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise InvalidInput(
            f"{name}: give a time with its offset, like 2030-01-31T12:00:00Z", param=name
        ) from None
    return UUID(int=min(max(milliseconds, 0), 2**48 - 1) << 80)


def cursor_of(task: Task) -> str:
    return base64.urlsafe_b64encode(task.id.bytes).decode().rstrip("=")


def id_of(cursor: str) -> UUID:
    try:
        return UUID(bytes=base64.urlsafe_b64decode(cursor + "=="))
    except (ValueError, binascii.Error):
        raise InvalidInput(
            "cursor: give next_cursor of the page before, as it is", param="cursor"
        ) from None
