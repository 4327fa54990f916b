"""Errors in the shape of each door, and the table from a task's error to a status."""

import inspect

import orjson
import psycopg
import pytest
from django.db import OperationalError
from django.test import RequestFactory
from rest_framework import exceptions

from llmtasks import errors as ours
from llmtasks.api import errors
from llmtasks.api.bodies import InvalidBody
from llmtasks.models import Task
from providers import errors as vendors


def leaves(module: object, root: type) -> set[str]:
    """The classes of a tree that are raised: those that stand for a cause, not for a family."""
    families = {"ProviderError", "TransientError", "CredentialError", "TaskError"}
    found = {name for name, value in inspect.getmembers(module, inspect.isclass)
             if issubclass(value, root)}  # fmt: skip
    return found - families


def test_every_end_of_a_task_has_a_status():
    causes = leaves(vendors, vendors.ProviderError) | leaves(ours, ours.TaskError)
    assert causes == set(errors.ENDINGS)


def test_a_vendors_refusal_of_our_credential_is_not_the_callers_fault():
    for name in ("AuthenticationFailed", "PermissionDenied", "QuotaExhausted"):
        assert errors.ENDINGS[name].status == 502


def test_an_end_after_our_own_tries_is_not_tried_again():
    task = Task(error_class="RateLimited", error_message="slow down", retry_after=1.2)
    response = errors.answer(errors.Ended(task), "/v1/chat/completions")
    assert response.status_code == 429
    assert (response["Retry-After"], response["x-should-retry"]) == ("2", "false")


def test_the_same_error_at_both_doors():
    error = ours.InvalidInput("temperature: give a number", param="temperature")
    native = errors.answer(error, "/v1/tasks")
    assert native["Content-Type"] == "application/problem+json"
    body = orjson.loads(native.content)
    assert (body["status"], body["code"], body["param"]) == (400, "invalid_request", "temperature")
    openai = errors.answer(error, "/v1/chat/completions")
    assert orjson.loads(openai.content) == {
        "error": {
            "message": "temperature: give a number",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_request",
        }
    }


def test_a_problem_lists_every_wrong_field():
    body = errors.problem(InvalidBody([("a", "give a"), ("b", "give b")]))
    assert body["errors"] == [
        {"param": "a", "detail": "give a"},
        {"param": "b", "detail": "give b"},
    ]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OperationalError("gone"), 503),
        (psycopg.OperationalError("gone"), 503),
        (exceptions.MethodNotAllowed("PUT"), 405),
        (exceptions.NotFound(), 404),
        (exceptions.PermissionDenied(), 403),
        (exceptions.NotAuthenticated(), 401),
        (exceptions.ParseError(), 400),
        (ours.TooManyWatchers("x", retry_after=2), 503),
    ],
)
def test_any_exception_gets_its_status(error: Exception, status: int):
    request = RequestFactory().get("/v1/tasks")
    assert errors.handle(error, {"request": request}).status_code == status


def test_a_fault_of_ours_shows_nothing_and_is_logged(caplog: pytest.LogCaptureFixture):
    request = RequestFactory().get("/v1/chat/completions")
    response = errors.handle(RuntimeError("secret detail"), {"request": request})
    assert response.status_code == 500
    assert b"secret" not in response.content
    assert "secret detail" in caplog.text


def test_every_status_of_our_errors_has_a_title():
    classes = [value for value in vars(ours).values() if inspect.isclass(value)]
    statuses = {value.status for value in classes if issubclass(value, ours.ApiError)}
    assert statuses | {told.status for told in errors.ENDINGS.values()} <= set(errors.TITLES)
