"""Logs as JSON lines, each with the id of the request or the task that it belongs to."""

import json
import logging
import re
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson
from django.http import HttpRequest, HttpResponse
from uuid_utils.compat import uuid7

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
task_id_var: ContextVar[str] = ContextVar("task_id", default="")

ACCEPTED_ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}\Z")
RECORD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def request_id(
    get_response: Callable[[HttpRequest], HttpResponse],
) -> Callable[[HttpRequest], HttpResponse]:
    """Middleware: the caller's `x-request-id`, or one of ours, in every answer and log line."""

    def middleware(request: HttpRequest) -> HttpResponse:
        given = request.headers.get("x-request-id", "")
        name = given if ACCEPTED_ID.match(given) else str(uuid7())
        token = request_id_var.set(name)
        try:
            response = get_response(request)
        finally:
            request_id_var.reset(token)
        response["x-request-id"] = name
        return response

    return middleware


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what `extra=` brings becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := request_id_var.get():
            line["request_id"] = request
        if task := task_id_var.get():
            line["task_id"] = task
        extra = record.__dict__.items()
        line.update({name: value for name, value in extra if name not in RECORD_FIELDS})
        if record.exc_info:
            line["trace"] = "".join(traceback.format_exception(*record.exc_info))
        try:
            return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:
            # Text with lone surrogates, integers of more than 64 bits.
            return json.dumps(line, default=str)
