"""`{{ steps.summary.output }}` in texts: looked up and put in, nothing else.

A path is names and list positions parted by dots. A text that is one placeholder becomes the value
itself; among other text a value is put in as it is (text) or as JSON. What is put in is never read
as a template again: models' and tools' output stays text. `\\{{` is a plain `{{`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

PLACEHOLDER = re.compile(r"\\\{\{|\{\{(.*?)(?:\}\}|\Z)", re.DOTALL)
PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_-]+)*\Z")
# Characters that one template may become.
MAX_RENDERED = 10_000_000
MAX_SHOWN = 80

Path = tuple[str, ...]
Scope = Mapping[str, Any]


class BadTemplate(ValueError):
    """A placeholder that is no path."""


class MissingValue(Exception):
    """A path leads to nothing."""


def references(value: Any) -> Iterator[Path]:
    """The paths of every placeholder in a JSON value. Raises `BadTemplate`."""
    if isinstance(value, str):
        for found in PLACEHOLDER.finditer(value):
            if found[1] is not None:
                yield path_of(found)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def path_of(found: "re.Match[str]") -> Path:
    path = found[1].strip()
    if not found[0].endswith("}}") or not PATH.match(path):
        raise BadTemplate(
            f"{found[0][:MAX_SHOWN]!r} is no placeholder: write a path of names and dots, like"
            " {{ input.text }}, or \\{{ for the plain characters"
        )
    return tuple(path.split("."))


def render(value: Any, scope: Scope) -> Any:
    """The value with its placeholders replaced. Raises `MissingValue`."""
    if isinstance(value, str):
        return render_text(value, scope)
    if isinstance(value, Mapping):
        return {name: render(item, scope) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [render(item, scope) for item in value]
    return value


def render_text(text: str, scope: Scope) -> Any:
    if "{{" not in text:
        return text
    alone = text.strip()
    whole = PLACEHOLDER.match(alone)
    if whole is not None and whole[1] is not None and whole.end() == len(alone):
        return look_up(path_of(whole), scope)
    pieces, at, size = [], 0, 0
    for found in PLACEHOLDER.finditer(text):
        put_in = "{{" if found[1] is None else as_text(look_up(path_of(found), scope))
        pieces += [text[at : found.start()], put_in]
        at = found.end()
        size += len(put_in)
        if size > MAX_RENDERED:
            raise MissingValue(f"the text becomes longer than {MAX_RENDERED} characters")
    return "".join([*pieces, text[at:]])


def look_up(path: Path, scope: Scope) -> Any:
    """Raises `MissingValue`, naming the path as far as it leads."""
    value: Any = scope
    for place, name in enumerate(path):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            reached = ".".join(path[:place]) or "what is known here"
            raise MissingValue(f"{{{{ {'.'.join(path)} }}}}: {reached} has no {name!r}")
    return value


def as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else orjson.dumps(value, default=dict).decode()
