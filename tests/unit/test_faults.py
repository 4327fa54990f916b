"""Every status and every documented body becomes the right class."""

import email.utils
import json
import time
from pathlib import Path

import orjson
import pytest

from providers import errors
from providers.faults import (
    MAX_MESSAGE,
    MAX_RETRY_AFTER,
    error_from_event,
    error_from_response,
    request_id,
    retry_after,
)

FIXTURES = Path(__file__).parent / "fixtures"
CASES = [
    pytest.param(case, id=f"{vendor}-{case['status']}-{case['class']}-{case['code']}")
    for vendor in ("openai", "anthropic")
    for case in json.loads((FIXTURES / vendor / "errors.json").read_text())
]


@pytest.mark.parametrize("case", CASES)
def test_documented_errors(case):
    body = orjson.dumps(case["body"]) if "body" in case else case["text"].encode()
    error = error_from_response(case["status"], case.get("headers", {}), body, secret="sk-test")
    assert type(error) is getattr(errors, case["class"])
    assert error.status == case["status"]
    assert error.code == case["code"]
    assert error.param == case.get("param")
    assert error.retry_after == case.get("retry_after")
    assert error.message
    assert "sk-test" not in error.message


# What the tree in errors.py says, restated.
BY_STATUS = {
    401: errors.AuthenticationFailed,
    402: errors.QuotaExhausted,
    403: errors.PermissionDenied,
    408: errors.Timeout,
    429: errors.RateLimited,
    499: errors.Timeout,
    503: errors.Overloaded,
    504: errors.Timeout,
    529: errors.Overloaded,
}


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b"not JSON", b"\xff", b'{"error":1}'])
def test_every_status_is_mapped_whatever_the_body(body):
    for status in range(400, 600):
        error = error_from_response(status, {}, body)
        default = errors.InvalidRequest if status < 500 else errors.ServerError
        assert type(error) is BY_STATUS.get(status, default), status
        assert error.message


def test_a_status_that_is_no_error_is_a_bad_response():
    for status in (100, 204, 301, 302, 399, 600, 999):
        assert type(error_from_response(status, {}, b"")) is errors.BadResponse


def test_each_class_says_what_to_do_next():
    said = {
        kind.__name__: (kind.retryable, kind.try_next, kind.breaker)
        for kind in (
            errors.RateLimited,
            errors.Overloaded,
            errors.BadResponse,
            errors.QuotaExhausted,
            errors.InvalidRequest,
            errors.ContextTooLong,
            errors.ContentFiltered,
            errors.Unsupported,
        )
    }
    assert said == {
        "RateLimited": (True, True, False),
        "Overloaded": (True, True, True),
        "BadResponse": (True, True, True),
        "QuotaExhausted": (False, True, False),
        "InvalidRequest": (False, False, False),
        "ContextTooLong": (False, True, False),
        "ContentFiltered": (False, False, False),
        "Unsupported": (False, True, False),
    }


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        ({"error": {"type": "overloaded_error", "message": "Overloaded"}}, errors.Overloaded),
        ({"error": {"type": "api_error", "message": "x"}}, errors.ServerError),
        ({"error": {"type": "timeout_error", "message": "x"}}, errors.Timeout),
        ({"error": {"type": "rate_limit_error", "message": "x"}}, errors.RateLimited),
        ({"error": {"code": "rate_limit_exceeded", "message": "x"}}, errors.RateLimited),
        ({"error": {"code": "insufficient_quota", "message": "x"}}, errors.QuotaExhausted),
        ({"error": {"type": "billing_error", "message": "x"}}, errors.QuotaExhausted),
        ({"error": {"code": "context_length_exceeded", "message": "x"}}, errors.ContextTooLong),
        ({"error": {"code": "content_filter", "message": "x"}}, errors.ContentFiltered),
        ({"error": {"code": 400, "type": "BadRequestError", "message": "x"}},
         errors.InvalidRequest),
        ({"object": "error", "code": 503, "message": "x"}, errors.Overloaded),
        ({"error": {"code": 7, "message": "x"}}, errors.ServerError),
        ({"error": "something"}, errors.ServerError),
        ({"error": {}}, errors.ServerError),
        (None, errors.ServerError),
    ],
)  # fmt: skip
def test_errors_in_a_stream(payload, kind):
    error = error_from_event(payload, {"request-id": "req_1"})
    assert type(error) is kind
    assert (error.status, error.request_id) == (None, "req_1")
    assert error.message


def test_messages_are_cut_cleaned_and_hold_no_key():
    body = orjson.dumps({"error": {"message": "key sk-secret bad\x00 " + "x" * 1000}})
    message = error_from_response(400, {}, body, secret="sk-secret").message
    assert message.startswith("key [key] bad\ufffd x")
    assert len(message) == MAX_MESSAGE
    assert error_from_response(400, {}, b"a key x", secret="x").message == "a key x"
    assert error_from_response(400, {}, b"<html>x</html>").message == "HTTP 400 Bad Request"
    assert error_from_response(599, {}, b"").message == "HTTP 599"


def test_details_of_any_shape():
    for detail in ([], [1], {}, None, "text", [{"msg": "field required"}]):
        error = error_from_response(422, {}, orjson.dumps({"detail": detail}))
        assert type(error) is errors.InvalidRequest
    assert error.message == "field required"
    body = orjson.dumps({"error": {"message": True, "code": 10**12, "details": {"error_code": 1}}})
    assert error_from_response(400, {}, body).code == "1"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "1e400"}, MAX_RETRY_AFTER),
        ({"retry-after": "99999999"}, MAX_RETRY_AFTER),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Fri, 31 Dec 9999999 23:59:59 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}, 0.0),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, MAX_RETRY_AFTER),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9.0),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after(headers) == seconds


def test_retry_after_as_a_date(monkeypatch):
    now = 1_700_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    date = email.utils.formatdate(now + 30, usegmt=True)
    assert retry_after({"retry-after": date}) == 30


def test_the_vendors_id_of_a_call():
    assert request_id({}) is None
    assert request_id({"x-request-id": "a", "request-id": "b"}) == "a"
    assert request_id({"apim-request-id": "c" * 300}) == "c" * 200
