"""A caller's own limits as headers say them."""

import re
from typing import Any
from uuid import UUID

import pytest

from llmtasks.api import limits
from llmtasks.guards.rate_limit import Meter
from llmtasks.guards.rules import Rule

TENANT = UUID(int=1)
# RFC 9651: a list of strings with integer parameters and one string.
ITEM = r'"[ -~]+"(;(q|w|r|t)=\d{1,15}|;qu="[a-z-]+")+'
LIST = re.compile(rf"{ITEM}(, {ITEM})*")


def meter(
    unit: str, amount: int, window: str = "", left: int = 0, reset_s: float = 0.0, **who: Any
) -> Meter:
    given: dict[str, Any] = {
        "id": 1, "name": "a limit", "provider": "", "model": "", "tenant_id": TENANT,
        "key_id": None, "each": "", "unit": unit, "window": window, "amount": amount,
        "burst": amount,
    }  # fmt: skip
    return Meter(Rule(**given | who), "key", need=1, pace=1, left=left, reset_s=reset_s)


def test_nothing_is_told_of_no_limit() -> None:
    assert limits.headers([]) == {}


def test_a_limit_of_requests() -> None:
    found = limits.headers([meter("requests", 60, "minute", left=59, reset_s=0.4)])
    assert found == {
        "RateLimit-Policy": '"tenant-requests-per-minute";q=60;qu="requests";w=60',
        "RateLimit": '"tenant-requests-per-minute";r=59;t=1',
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "400ms",
    }


def test_calls_at_once_have_no_window() -> None:
    found = limits.headers([meter("concurrency", 8, left=7, each="key", tenant_id=None)])
    assert found == {
        "RateLimit-Policy": '"key-concurrency";q=8;qu="concurrent-requests"',
        "RateLimit": '"key-concurrency";r=7',
    }


def test_openais_headers_tell_the_tightest_window_of_each_unit() -> None:
    found = limits.headers(
        [
            meter("requests", 1000, "day", left=400, reset_s=51_840),
            meter("requests", 10, "second", left=9, reset_s=0.1),
            meter("tokens", 100_000, "minute", left=10, reset_s=59.99),
            meter("input_tokens", 100_000, "minute", left=5, reset_s=1),
        ]
    )
    assert found["x-ratelimit-remaining-requests"] == "9"
    assert found["x-ratelimit-limit-requests"] == "10"
    assert found["x-ratelimit-remaining-tokens"] == "10"
    assert found["x-ratelimit-reset-tokens"] == "59.99s"
    assert found["RateLimit"].startswith('"tenant-input-tokens-per-minute";r=5;t=1, ')
    assert found["RateLimit"].count(";r=") == 4 == found["RateLimit-Policy"].count(";q=")


def test_of_two_limits_of_one_name_the_tighter_is_told() -> None:
    found = limits.headers(
        [
            meter("requests", 60, "minute", left=30),
            meter("requests", 20, "minute", left=3, each="tenant", tenant_id=None),
        ]
    )
    assert found["RateLimit"] == '"tenant-requests-per-minute";r=3;t=0'
    assert found["RateLimit-Policy"] == '"tenant-requests-per-minute";q=20;qu="requests";w=60'


def test_what_is_told_is_a_structured_field_whatever_the_limit() -> None:
    for unit in ("requests", "tokens", "input_tokens", "output_tokens"):
        for window in ("second", "minute", "hour", "day"):
            found = limits.headers([meter(unit, 2**62, window, left=2**62, reset_s=1e5)])
            assert LIST.fullmatch(found["RateLimit"])
            assert LIST.fullmatch(found["RateLimit-Policy"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"), (0.0121, "13ms"), (1, "1s"), (1.5, "1.5s"), (59.9995, "1m0s"), (60, "1m0s"),
        (360, "6m0s"), (3600, "1h0m0s"), (86_399, "23h59m59s"),
    ],
)  # fmt: skip
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert limits.duration(seconds) == text
