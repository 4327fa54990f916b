"""Prompts and answers, made readable. Everything in them is a stranger's text: it is escaped, cut
at a length that a browser stands, and no image that it names is fetched."""

import json
from collections.abc import Mapping
from typing import Any

from django.template.loader import render_to_string
from django.utils.html import format_html
from django.utils.safestring import SafeString

from llmtasks.models import Task, TaskPayload

MAX_TEXT = 20_000
MAX_ITEMS = 100

NAMES = {"messages", "parts", "inputs", "vectors", "chat"}


def shown(task: Task) -> SafeString:
    """The task's request and answer, read from the database here and nowhere before."""
    payload = TaskPayload.objects.filter(pk=task.pk).first()
    if payload is None:
        return format_html("<p>{}</p>", "Not stored any more: prompts are deleted before bills.")
    request, response = as_mapping(payload.request), as_mapping(payload.response)
    # An agent's has the chat that it begins with.
    request = {**request, **as_mapping(request.get("chat"))}
    context = {
        "messages": [message(each) for each in first(request.get("messages"))],
        "inputs": [clipped(text_of(each)) for each in first(request.get("inputs"))],
        "settings": as_json({k: v for k, v in request.items() if k not in NAMES}),
        "answer": [part(each) for each in first(response.get("parts"))],
        "has_answer": bool(response),
        "finish_reason": response.get("finish_reason", ""),
        "vectors": vectors(response.get("vectors")),
        # A workflow's, a tool's: neither text nor vectors.
        "value": "" if {"parts", "vectors"} & set(response) or not response else as_json(response),
    }
    return SafeString(render_to_string("admin/llmtasks/bodies.html", context))


def as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def first(values: Any) -> list[Any]:
    return list(values[:MAX_ITEMS]) if isinstance(values, list) else []


def message(value: Any) -> dict[str, Any]:
    of = as_mapping(value)
    return {
        "role": of.get("role", "?"),
        "name": of.get("name", ""),
        "parts": [part(each) for each in first(of.get("parts"))],
    }


def part(value: Any) -> dict[str, str]:
    """One part as a kind, a caption and text."""
    of = as_mapping(value)
    kind = str(of.get("type", "?"))
    if kind == "image":
        return {"kind": kind, "caption": "image, not loaded", "text": clipped(image(of))}
    if kind == "tool_call":
        caption = f"calls {of.get('name', '?')} ({of.get('id', '?')})"
        return {"kind": kind, "caption": caption, "text": clipped(text_of(of.get("arguments")))}
    if kind == "tool_result":
        caption = f"result of {of.get('call_id', '?')}"
        return {"kind": kind, "caption": caption, "text": clipped(text_of(of.get("content")))}
    caption = {"thinking": "thinking", "refusal": "refusal", "text": ""}.get(kind, kind)
    text = of.get("text", of if caption == kind and kind not in {"thinking", "refusal"} else "")
    return {"kind": kind, "caption": caption, "text": clipped(text_of(text))}


def image(of: Mapping[str, Any]) -> str:
    url = text_of(of.get("url"))
    if url.startswith("data:"):
        return f"{url.partition(',')[0]}, {len(url):,} characters"
    return url


def vectors(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return ""
    length = len(value[0]) if isinstance(value[0], list) else 0
    return f"{len(value):,} vectors of {length:,} numbers"


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def clipped(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}\n… {len(text) - MAX_TEXT:,} more characters"


def as_json(value: Any) -> SafeString:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return format_html('<pre class="lt-text">{}</pre>', clipped(text))
