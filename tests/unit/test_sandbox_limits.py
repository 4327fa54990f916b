"""The sandbox's own limits, the vendors' headers, and faults that are steered at run time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from types import SimpleNamespace

import anthropic
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import sandbox_faults, sandbox_limits
from providers.sandbox import Sandbox
from providers.sandbox_limits import Limit, Limits, duration

KEY = {"Authorization": "Bearer k"}


@pytest.fixture
def vendor():
    with Sandbox() as sandbox, httpx.Client(base_url=sandbox.base_url, headers=KEY) as client:
        yield client


@pytest.fixture
def clock(monkeypatch):
    """The limits' clock, which stands still."""
    stopped = SimpleNamespace(now=round(time.monotonic()))
    monkeypatch.setattr(Limits, "now", lambda _: stopped.now)
    return stopped


def chat(vendor, model="echo", text="x" * 40, **fields):
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    return vendor.post("/v1/chat/completions", json=body)


def messages(vendor, model="claude-echo", text="x" * 40, **fields):
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 100}
    return vendor.post("/v1/messages", json={**body, **fields})


def limit(vendor, **fields):
    answer = vendor.post("/_limits", json={"model": "echo", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def shown(vendor, number=0):
    return vendor.get("/_limits").json()["limits"][number]


# The windows, by the clock of the test


def test_the_peak_is_that_of_a_sliding_window():
    found = Limit("echo", 10.0, {})
    for at in (0.0, 9.0, 9.5, 10.0, 18.9, 30.0):
        found.settle(found.arrive(at, 1), 0)
    # (0, 10]: the call at 0 is outside once that at 10 is in; (8.9, 18.9]: four of them.
    assert found.peaks[0] == 4
    assert found.totals[0] == 6
    assert (found.first_at, found.last_at) == (0.0, 30.0)


def test_late_output_raises_every_window_that_held_its_call():
    found = Limit("echo", 10.0, {})
    first = found.arrive(0.0, 5)
    found.settle(found.arrive(9.0, 5), 0)
    found.settle(found.arrive(20.0, 7), 0)
    assert found.peaks[1] == 10
    # Answered long after its window: at 9 the window held it, at 20 no more.
    found.settle(first, 100)
    assert found.peaks[1:] == [110, 10, 100]
    assert found._sums[1] == 7


@st.composite
def histories(draw):
    """Calls as (arrival, input, answered at, output)."""
    at, calls = 0.0, []
    for _ in range(draw(st.integers(1, 25))):
        at += draw(st.integers(0, 12)) / 2
        took = draw(st.integers(0, 60)) / 2
        calls.append((at, draw(st.integers(0, 9)), at + took, draw(st.integers(0, 9))))
    return calls


@given(histories())
def test_peaks_are_those_of_brute_force(calls):
    window_s = 10.0
    found = Limit("echo", window_s, {})
    events = [(at, 0, n) for n, (at, *_) in enumerate(calls)]
    events += [(ended, 1, n) for n, (_, _, ended, _) in enumerate(calls)]
    places = {}
    for at, kind, n in sorted(events):
        if kind == 0:
            places[n] = found.arrive(at, calls[n][1])
        else:
            found.settle(places[n], calls[n][3])
    windows = [[c for c in calls if end - window_s < c[0] <= end] for end, *_ in calls]
    sums = [
        (len(held), sum(c[1] + c[3] for c in held), sum(c[1] for c in held),
         sum(c[3] for c in held))
        for held in windows
    ]  # fmt: skip
    assert tuple(found.peaks) == tuple(max(column) for column in zip(*sums, strict=True))
    assert not found._open
    found._slide(calls[-1][0] + window_s)
    assert found._sums == [0, 0, 0, 0]


def test_how_long_a_call_waits():
    found = Limit("echo", 10.0, {"requests": 2, "tokens": 100, "output_tokens": 50})
    assert found.wait(0.0, 100) == 0.0
    found.settle(found.arrive(0.0, 30), 0)
    assert found.wait(1.0, 71) == 9.0
    assert found.wait(1.0, 70) == 0.0
    found.settle(found.arrive(4.0, 10), 49)
    assert found.wait(5.0, 1) == 5.0  # two requests
    assert found.wait(10.0, 1) == 0.0
    assert found.wait(10.0, 42) == 4.0  # 59 tokens of the second call
    assert found.wait(10.0, 101) == 10.0  # never fits
    found.settle(found.arrive(12.0, 1), 1)
    assert found.wait(14.0, 1) == 0.0
    found.settle(found.arrive(14.0, 1), 50)
    assert found.wait(22.5, 1) == 1.5  # 50 tokens of output leave no room for one


def test_memory_is_bounded_and_said_to_be(monkeypatch):
    monkeypatch.setattr(sandbox_limits, "MAX_ENTRIES", 3)
    found = Limit("echo", 10.0, {})
    for at in range(5):
        found.arrive(float(at), 1)
    assert (len(found._window), len(found._open)) == (3, 3)
    assert found.shown(5.0, 0.0)["is_exact"] is False
    assert found.shown(5.0, 0.0)["calls"] == 5


# Over HTTP


def test_an_enforced_limit(vendor, clock):
    limit(vendor, requests=3, window_s=1.5, enforce=True)
    answers = [chat(vendor) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    refused = answers[3]
    assert refused.headers["retry-after"] == "2"
    assert refused.headers["retry-after-ms"] == "1500"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert "limit 3 in 1.5 s" in error["message"]
    assert chat(vendor, "slow-1").status_code == 200
    clock.now += 1.25
    assert chat(vendor).status_code == 429
    clock.now += 0.25
    assert chat(vendor).status_code == 200
    found = shown(vendor)
    assert (found["calls"], found["refused"], found["peak_requests"]) == (4, 3, 3)
    assert found["tokens"] == 4 * 20
    assert found["first_at"] < found["last_at"] <= found["now"]
    assert abs(found["now"] - time.time()) < 5


def test_a_limit_that_only_counts(vendor):
    limit(vendor, requests=1, tokens=1)
    assert {chat(vendor).status_code for _ in range(4)} == {200}
    found = shown(vendor)
    assert (found["peak_requests"], found["peak_tokens"], found["refused"]) == (4, 80, 0)
    assert (found["input_tokens"], found["output_tokens"]) == (40, 40)


def test_tokens_are_enforced_at_arrival_and_output_counts_when_it_is_made(vendor):
    limit(vendor, tokens=30, enforce=True)
    assert chat(vendor).status_code == 200
    refused = chat(vendor, text="x" * 44)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "tokens"
    assert chat(vendor).status_code == 200
    found = shown(vendor)
    # The second's output went over: only known afterwards.
    assert (found["peak_tokens"], found["refused"]) == (40, 1)


def test_streams_and_embeddings_and_failures_are_counted(vendor):
    limit(vendor, model="*", requests=100)
    assert "data: [DONE]" in chat(vendor, stream=True).text
    vendor.post("/v1/embeddings", json={"model": "embed", "input": "x" * 40})
    assert chat(vendor, "error-500").status_code == 500
    assert chat(vendor, text=None).status_code == 200
    assert chat(vendor, messages=[]).status_code == 400
    found = shown(vendor)
    assert found["calls"] == 5
    assert (found["input_tokens"], found["output_tokens"]) == (10 + 10 + 10 + 1, 10 + 1)


def test_a_client_that_leaves_is_counted_with_what_was_made(vendor):
    limit(vendor, model="long-1000-100", requests=100)
    with vendor.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": "long-1000-100", "stream": True, "messages": [{"content": "x"}]},
    ) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 3
    while not shown(vendor)["output_tokens"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 1 <= shown(vendor)["output_tokens"] < 500


def test_several_limits_of_one_call_are_taken_at_once_or_none(vendor):
    limit(vendor, requests=100, window_s=60, enforce=True)
    limit(vendor, requests=2, window_s=3600, enforce=True)
    limit(vendor, model="*", requests=3, enforce=True)
    assert [chat(vendor).status_code for _ in range(3)] == [200, 200, 429]
    assert [chat(vendor, "slow-1").status_code for _ in range(2)] == [200, 429]
    found = vendor.get("/_limits").json()["limits"]
    assert [(one["calls"], one["refused"]) for one in found] == [(2, 0), (2, 1), (3, 1)]
    limit(vendor, requests=5, window_s=3600)
    assert shown(vendor, 1)["calls"] == 0
    vendor.post("/_reset")
    assert vendor.get("/_limits").json() == {"limits": []}


def test_never_more_than_the_limit_however_many_ask(vendor):
    limit(vendor, requests=20, window_s=600, enforce=True)

    def ask(_):
        with httpx.Client(base_url=vendor.base_url, headers=KEY) as client:
            for _ in range(10):
                chat(client)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    found = shown(vendor)
    assert (found["peak_requests"], found["refused"]) == (20, 20)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "model"),
        ([], "model"),
        ({"model": ""}, "model"),
        ({"model": "echo", "request": 1}, "unknown: request"),
        ({"model": "echo", "requests": 0}, "requests"),
        ({"model": "echo", "tokens": -1}, "tokens"),
        ({"model": "echo", "tokens": True}, "tokens"),
        ({"model": "echo", "requests": 1.5}, "requests"),
        ({"model": "echo", "window_s": 0}, "window_s"),
        ({"model": "echo", "window_s": 90000}, "window_s"),
        ({"model": "echo", "window_s": "60"}, "window_s"),
        ({"model": "echo", "enforce": 1}, "enforce"),
    ],
)
def test_limits_that_are_wrong(vendor, body, named):
    answer = vendor.post("/_limits", json=body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    assert vendor.get("/_limits").json() == {"limits": []}


def test_what_is_no_json_and_what_is_nowhere(vendor):
    assert vendor.post("/_limits", content=b"{").status_code == 400
    assert vendor.post("/_faults", content=b"{").status_code == 400
    assert vendor.post("/_other", json={}).status_code == 404


def test_limits_and_faults_are_bounded(vendor, monkeypatch):
    monkeypatch.setattr(sandbox_limits, "MAX_LIMITS", 1)
    monkeypatch.setattr(sandbox_faults, "MAX_FAULTS", 1)
    limit(vendor, requests=1)
    limit(vendor, requests=2)
    assert vendor.post("/_limits", json={"model": "other"}).status_code == 400
    assert len(vendor.get("/_limits").json()["limits"]) == 1
    assert vendor.post("/_faults", json={"model": "a", "kind": "timeout"}).status_code == 200
    assert vendor.post("/_faults", json={"model": "b", "kind": "timeout"}).status_code == 400
    assert vendor.post("/_faults", json={"model": "b", "kind": "off"}).status_code == 200


# Headers


def test_openais_headers(vendor, clock):
    limit(vendor, requests=600, tokens=1000, input_tokens=500, headers=True)
    headers = chat(vendor).headers
    assert headers["x-ratelimit-limit-requests"] == "600"
    assert headers["x-ratelimit-remaining-requests"] == "599"
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert headers["x-ratelimit-remaining-tokens"] == "990"
    assert headers["x-ratelimit-reset-requests"] == "1m0s"
    assert not [name for name in headers if "input" in name]
    streamed = chat(vendor, stream=True).headers
    assert streamed["x-ratelimit-remaining-requests"] == "598"
    assert streamed["x-ratelimit-remaining-tokens"] == "970"
    assert not [name for name in chat(vendor, "slow-1").headers if "ratelimit" in name]


def test_headers_of_refusals_and_of_the_tightest_limit(vendor, clock):
    limit(vendor, requests=10, window_s=60, headers=True)
    limit(vendor, requests=1, window_s=30, headers=True, enforce=True)
    first = chat(vendor).headers
    assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == (
        "1",
        "0",
    )
    refused = chat(vendor)
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"] == "30s"


def test_anthropics_headers(vendor):
    limit(
        vendor,
        model="claude-echo",
        requests=2,
        tokens=1000,
        input_tokens=800,
        output_tokens=200,
        window_s=60,
        headers=True,
        enforce=True,
    )
    found = [messages(vendor) for _ in range(3)]
    headers = found[1].headers
    for kind, most, left in (
        ("requests", "2", "0"),
        ("tokens", "1000", "970"),
        ("input-tokens", "800", "780"),
        ("output-tokens", "200", "190"),
    ):
        assert headers[f"anthropic-ratelimit-{kind}-limit"] == most
        assert headers[f"anthropic-ratelimit-{kind}-remaining"] == left
        reset = datetime.strptime(
            headers[f"anthropic-ratelimit-{kind}-reset"], "%Y-%m-%dT%H:%M:%SZ"
        ).replace(tzinfo=UTC)
        assert 55 < (reset - datetime.now(UTC)).total_seconds() < 65
    assert found[2].status_code == 429
    assert found[2].json()["error"]["type"] == "rate_limit_error"
    assert int(found[2].headers["retry-after"]) in (59, 60)
    assert "retry-after-ms" not in found[2].headers
    assert not [name for name in headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (59.9995, "1m0s"), (360, "6m0s"),
     (3723, "1h2m3s"), (7200, "2h0m0s")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_vendors_clients_wait_and_try_again(vendor):
    """Their own retry reads what a limit answers."""
    url = str(vendor.base_url)
    limit(vendor, model="*", requests=1, window_s=2, enforce=True)
    asked = [{"role": "user", "content": "x"}]
    # Both before the first call: making one takes a part of the window.
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=2) as compatible,
        anthropic.Anthropic(base_url=url, api_key="k", max_retries=2) as claude,
    ):
        for _ in range(2):
            assert compatible.chat.completions.create(model="echo", messages=asked).choices
        assert claude.messages.create(model="claude-echo", max_tokens=9, messages=asked).content
    assert shown(vendor)["refused"] >= 2
    assert shown(vendor)["peak_requests"] == 1


# Faults


def fault(vendor, **fields):
    answer = vendor.post("/_faults", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["faults"]


def test_an_outage_and_its_end(vendor):
    fault(vendor, model="*", kind="error-503")
    assert chat(vendor).status_code == 503
    assert messages(vendor).status_code == 503
    [outage] = vendor.get("/_faults").json()["faults"]
    assert (outage["seen"], outage["struck"]) == (2, 2)
    assert fault(vendor, model="*", kind="off") == []
    assert chat(vendor).status_code == 200


def test_a_share_of_the_calls(vendor):
    fault(vendor, model="echo", kind="rate-limit", share=0.25, retry_after=7)
    answers = [chat(vendor) for _ in range(200)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 30 <= len(refused) <= 70
    assert {answer.headers["retry-after"] for answer in refused} == {"7"}
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    [found] = vendor.get("/_faults").json()["faults"]
    assert (found["seen"], found["struck"]) == (200, len(refused))
    assert chat(vendor, "slow-1").status_code == 200


def test_faults_of_one_model_and_of_several_kinds(vendor):
    fault(vendor, model="echo", kind="unauthorized")
    fault(vendor, model="echo", kind="error-529", share=0)
    assert chat(vendor).status_code == 401
    fault(vendor, model="slow-1", kind="error-502")
    assert chat(vendor, "slow-1").status_code == 502
    assert [one["model"] for one in fault(vendor, model="echo", kind="off")] == ["slow-1"]
    assert chat(vendor).status_code == 200
    vendor.post("/_reset")
    assert vendor.get("/_faults").json() == {"faults": []}


def test_a_timeout_lasts_until_the_client_leaves(vendor):
    fault(vendor, model="echo", kind="timeout")
    with pytest.raises(httpx.ReadTimeout):
        chat(vendor.__class__(base_url=vendor.base_url, headers=KEY, timeout=0.2))
    deadline = time.monotonic() + 3
    while (tally := vendor.get("/_calls").json())["under_way"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tally["hung_up"], tally["answered"], tally["under_way"]) == (1, 0, 0)


def test_what_a_fault_struck_counts_as_arrived(vendor):
    limit(vendor, requests=2, enforce=True)
    fault(vendor, model="echo", kind="error-500")
    assert [chat(vendor).status_code for _ in range(3)] == [500, 500, 429]
    assert shown(vendor)["calls"] == 2


def test_a_sandbox_that_ends_does_not_wait_for_timeouts():
    with Sandbox() as sandbox:
        with httpx.Client(base_url=sandbox.base_url, headers=KEY, timeout=5) as client:
            fault(client, model="*", kind="timeout")
            failed = []

            def ask():
                with httpx.Client(base_url=sandbox.base_url, headers=KEY) as other:
                    try:
                        chat(other)
                    except httpx.HTTPError as error:
                        failed.append(error)

            asking = threading.Thread(target=ask)
            asking.start()
            while not client.get("/_calls").json()["under_way"]:
                time.sleep(0.01)
        sandbox.stop()
        asking.join()
    assert failed


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "model"),
        ([], "model"),
        ({"model": "echo"}, "kind"),
        ({"model": "echo", "kind": "error-200"}, "kind"),
        ({"model": "echo", "kind": "error-x"}, "kind"),
        ({"model": "echo", "kind": "none"}, "kind"),
        ({"model": "echo", "kind": 5}, "kind"),
        ({"model": "echo", "kind": "timeout", "shares": 1}, "unknown: shares"),
        ({"model": "echo", "kind": "timeout", "share": 1.1}, "share"),
        ({"model": "echo", "kind": "timeout", "share": True}, "share"),
        ({"model": "echo", "kind": "rate-limit", "retry_after": -1}, "retry_after"),
        ({"model": "echo", "kind": "rate-limit", "retry_after": "soon"}, "retry_after"),
    ],
)
def test_faults_that_are_wrong(vendor, body, named):
    answer = vendor.post("/_faults", json=body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    assert vendor.get("/_faults").json() == {"faults": []}


def test_limits_are_kept_apart_from_the_wall_clock(monkeypatch):
    limits = Limits()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    shown_now = limits.set({"model": "echo", "requests": 1})["now"]
    assert shown_now > 1_600_000_000
