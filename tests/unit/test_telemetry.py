"""Log lines are JSON, whatever was logged; every answer has a request id."""

import json
import logging
import sys
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from django.http import HttpRequest, HttpResponse

from llmtasks import telemetry


def line(message: str = "hello", *args: Any, exc_info: Any = None, **extra: Any) -> dict[str, Any]:
    record = logging.getLogger("x").makeRecord(
        "x", logging.INFO, "file.py", 1, message, args, exc_info, extra=extra
    )
    text = telemetry.JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_says_when_what_and_who():
    told = line("hello %s", "you", task=UUID(int=1), cost=Decimal("1.5"))
    assert (told["message"], told["level"], told["logger"]) == ("hello you", "INFO", "x")
    assert told["time"].endswith("+00:00")
    assert (told["task"], told["cost"]) == ("00000000-0000-0000-0000-000000000001", "1.5")
    assert "request_id" not in told


def test_a_line_belongs_to_its_request_and_its_task():
    first = telemetry.request_id_var.set("r1")
    second = telemetry.task_id_var.set("t1")
    try:
        told = line()
    finally:
        telemetry.request_id_var.reset(first)
        telemetry.task_id_var.reset(second)
    assert (told["request_id"], told["task_id"]) == ("r1", "t1")


def test_an_exception_brings_its_trace():
    try:
        raise ValueError("broken\nin two lines")
    except ValueError:
        told = line(exc_info=sys.exc_info())
    assert "ValueError: broken" in told["trace"]


@pytest.mark.parametrize(
    "value", ["\ud800", 2**80, {1: "a"}, {"deep": ["\udfff"]}, float("nan"), object(), b"\xff"]
)
def test_what_json_does_not_take_is_logged_all_the_same(value):
    assert line(odd=value)["message"] == "hello"


# --- request ids ----------------------------------------------------------------------------------


def answered(given: str | None = None) -> tuple[str, str]:
    """The id that the view saw, and the one in the answer."""
    seen = []

    def view(_request: HttpRequest) -> HttpResponse:
        seen.append(telemetry.request_id_var.get())
        return HttpResponse()

    request = HttpRequest()
    if given is not None:
        request.META["HTTP_X_REQUEST_ID"] = given
    response = telemetry.request_id(view)(request)
    return seen[0], response["x-request-id"]


def test_a_callers_request_id_is_kept():
    assert answered("req_1.a:b-c") == ("req_1.a:b-c", "req_1.a:b-c")


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 101, "a\n", "ä", '"'])
def test_another_gets_one_of_ours(given):
    seen, told = answered(given)
    assert seen == told == str(UUID(told))


def test_the_id_is_forgotten_afterwards():
    def broken(_request: HttpRequest) -> HttpResponse:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        telemetry.request_id(broken)(HttpRequest())
    assert telemetry.request_id_var.get() == ""
