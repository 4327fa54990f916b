"""What is called and what is not: limits, breakers, refused credentials, a vendor's errors."""

import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis as redis_py
from django.db import OperationalError
from django.db.models import F
from django.test import Client
from django.utils import timezone
from uuid_utils.compat import uuid7

from llmtasks import admission, execute, ledger, pulse, submit
from llmtasks.errors import NoProvider, Unavailable
from llmtasks.guards import accounts, meters, rate_limit
from llmtasks.models import Attempt, Limit, Provider, ProviderEvent, ProviderModel, Task, Tenant
from providers.sandbox import Sandbox
from tests import factories
from tests.callers import Caller
from tests.corridor import (
    attempts,
    check_ledger,
    errors_of,
    in_thread,
    inline,
    queue,
    until,
)
from tests.meters import remember, used
from tests.unit.scripted import Peer, Scripted, answer

pytestmark = pytest.mark.usefixtures("short_waits")
A_SECOND = timedelta(seconds=1)


@pytest.fixture
def tenant(account: Provider, redis: Any) -> Tenant:
    remember(redis)
    return factories.tenant()


@pytest.fixture
def second(sandbox: Sandbox) -> Provider:
    return factories.provider(sandbox.base_url, "second")


def limit(unit: str, amount: int, window: str = "", **fields: Any) -> str:
    """A limit that is in force; the key of its meter."""
    row = Limit.objects.create(unit=unit, amount=amount, window=window, **fields)
    factories.in_force()
    return f"{{limits}}:meter:{row.pk}"


def one_a_minute(account: Provider) -> None:
    """The account's only call of this minute is made."""
    limit("requests", 1, "minute", burst=1, provider=account)
    take(account)


def take(account: Provider, model: str = "echo", *, is_again: bool = False) -> None:
    """Somebody else's call, which stays under way."""
    grant = rate_limit.grant_for(
        uuid7(), account.name, model, uuid7(), None, rate_limit.need_of(account.name, model, 9, 9),
        is_urgent=True, is_again=is_again, left_s=30.0,
    )  # fmt: skip
    assert rate_limit.acquire(grant) is None


def run_once(tenant: Tenant, model: str, **fields: Any) -> Task:
    """A queued task after it was in a worker's hands once."""
    return run_released(queue(tenant, model, **fields))


def run_released(task: Task) -> Task:
    """A worker gets it, as if the dispatcher had seen room."""
    Task.objects.filter(id=task.id, status="waiting").update(status="queued", seq=F("seq") + 1)
    task.refresh_from_db()
    execute.run_queued(task.id, task.seq)
    task.refresh_from_db()
    return task


def is_parked(task: Task) -> bool:
    """Back in `waiting`, for later, and nothing was tried."""
    assert (task.attempts, task.owner_id, task.error_class) == (0, None, "")
    assert not Attempt.objects.filter(task_id=task.id).exists()
    return bool(task.status == "waiting" and task.not_before - task.created_at >= A_SECOND)


# --- limits ---------------------------------------------------------------------------------------


def test_queued_work_without_room_goes_back_to_waiting(account, tenant, sandbox):
    factories.route("echo", (account, "echo"))
    one_a_minute(account)
    task = run_once(tenant, "echo")
    assert is_parked(task)
    wait_s = (task.not_before - timezone.now()).total_seconds()
    assert 30 < wait_s <= 62
    assert sandbox.calls(str(task.id))["calls"] == 0


@pytest.mark.parametrize("mode", ["queued", "inline"])
def test_a_short_wait_is_waited_for(account, tenant, mode):
    factories.route("echo", (account, "echo"))
    limit("requests", 60, "minute", burst=1, provider=account)
    began = time.monotonic()
    take(account)
    task = run_once(tenant, "echo") if mode == "queued" else inline(tenant, "echo").task
    assert time.monotonic() - began > 1.0
    assert (task.status, errors_of(task)) == ("succeeded", [""])
    check_ledger(task)


def test_an_inline_call_that_can_not_wait_ends_at_once(account, tenant):
    factories.route("echo", (account, "echo"))
    one_a_minute(account)
    began = time.monotonic()
    task = inline(tenant, "echo", deadline_s=30).task
    assert time.monotonic() - began < 15
    assert (task.status, task.error_class, task.error_status) == ("failed", "LimitReached", 429)
    assert 30 < task.retry_after <= 62
    row = Task.objects.get()
    assert (row.status, row.attempts, row.cost) == ("failed", 0, None)


def test_where_the_first_has_no_room_the_second_answers_at_once(account, tenant, second, sandbox):
    factories.route("smart", (account, "echo"), (second, "echo"))
    one_a_minute(account)
    for task in (inline(tenant, "smart").task, run_once(tenant, "smart")):
        assert (task.status, task.provider, errors_of(task)) == ("succeeded", "second", [""])
        assert [row.number for row in attempts(task)] == [1]


def test_the_soonest_of_all_is_waited_for(account, tenant, second):
    factories.route("smart", (account, "echo"), (second, "echo"))
    one_a_minute(account)
    limit("requests", 60, "minute", burst=1, provider=second)
    take(second)
    task = inline(tenant, "smart", deadline_s=20).task
    assert (task.status, task.provider) == ("succeeded", "second")


def test_who_waits_goes_on_when_the_limit_is_raised(account, tenant, monkeypatch):
    monkeypatch.setattr(admission, "LOOK_INLINE_S", 0.05)
    factories.route("echo", (account, "echo"))
    one_a_minute(account)
    with in_thread(lambda: inline(tenant, "echo", deadline_s=300)):
        until(lambda: pulse.start().calls)
        Limit.objects.update(amount=1000)
        factories.in_force()
    task = Task.objects.get()
    assert (task.status, errors_of(task)) == ("succeeded", [""])
    assert (task.finished_at - task.created_at).total_seconds() < 30


def test_a_task_that_a_days_limit_refused_looks_again_before_the_day_ends(account, tenant):
    factories.route("echo", (account, "echo"))
    limit("requests", 1, "day", provider=account)
    take(account)
    task = run_once(tenant, "echo")
    assert is_parked(task)
    wait_s = (task.not_before - timezone.now()).total_seconds()
    assert 250 < wait_s <= admission.LOOK_QUEUED_S


def test_who_hangs_up_while_he_waits_for_room_is_not_called_for(account, tenant):
    factories.route("echo", (account, "echo"))
    one_a_minute(account)
    server, caller = socket.socketpair()
    work = factories.work(tenant, "echo", deadline_s=300)
    with (
        server,
        in_thread(lambda: execute.run(submit.inline(work), work.request, client_socket=server)),
    ):
        until(lambda: pulse.start().calls)
        caller.close()
    task = Task.objects.get()
    assert (task.status, task.error_class, task.attempts) == ("cancelled", "ClientLeft", 0)


def test_a_grant_whose_attempt_can_not_be_written_is_given_back(
    account, tenant, redis, monkeypatch
):
    factories.route("echo", (account, "echo"))
    requests = limit("requests", 100, "minute", provider=account)
    at_once = limit("concurrency", 5, provider=account)

    def away(*_: Any, **__: Any) -> None:
        raise OperationalError("Postgres is away")

    monkeypatch.setattr(ledger, "begin", away)
    with pytest.raises(Unavailable):
        inline(tenant, "echo")
    until(lambda: not redis.keys("{limits}:taken:*"))
    assert (used(redis, requests), redis.zcard(at_once)) == (0, 0)


def test_an_answer_of_redis_that_was_lost_takes_once(account, tenant, redis, monkeypatch):
    factories.route("echo", (account, "echo"))
    requests = limit("requests", 100, "minute", provider=account)
    run, lost = meters.run, []

    def losing(operation: str, *given: Any) -> Any:
        found = run(operation, *given)
        if operation == "take" and not lost:
            lost.append(found)
            raise meters.Away
        return found

    monkeypatch.setattr(meters, "run", losing)
    assert inline(tenant, "echo").task.status == "succeeded"
    assert lost
    assert used(redis, requests) == 1


def test_a_stream_that_was_left_gives_its_place_back(account, tenant, redis):
    factories.route("long", (account, "long-5000-200"))
    at_once = limit("concurrency", 5, provider=account)
    made = limit("output_tokens", 100_000, "minute", provider=account)
    work = factories.work(tenant, "long")
    deltas = execute.stream(submit.inline(work), work.request)
    next(deltas)
    assert redis.zcard(at_once) == 1
    deltas.close()
    assert redis.zcard(at_once) == 0
    # Nobody knows how much it wrote: what was reserved stands.
    assert used(redis, made) > 0


# --- the breaker ----------------------------------------------------------------------------------


def break_down(tenant: Tenant, account: Provider) -> None:
    """Open the breaker of the account's `error-500`, by calls that fail."""
    factories.route("broken", (account, "error-500"))
    for _ in range(40):
        try:
            inline(tenant, "broken")
        except NoProvider:
            break
    event = ProviderEvent.objects.get()
    assert (event.provider, event.model, event.event) == ("sandbox", "error-500", "opened")
    assert Attempt.objects.count() == 20


def test_an_open_breaker_is_passed_by_at_once(account, tenant, second):
    factories.route("smart", (account, "error-500"), (second, "echo"))
    break_down(tenant, account)
    for task in (inline(tenant, "smart").task, run_once(tenant, "smart")):
        assert (task.status, task.provider, errors_of(task)) == ("succeeded", "second", [""])


def test_the_accounts_other_models_go_on(account, tenant):
    factories.route("echo", (account, "echo"))
    break_down(tenant, account)
    assert inline(tenant, "echo").task.status == "succeeded"


def test_with_all_breakers_open_queued_work_parks(account, tenant):
    break_down(tenant, account)
    assert is_parked(run_once(tenant, "broken"))


@pytest.mark.parametrize("stream", [False, True])
def test_with_all_breakers_open_inline_work_is_a_503(account, tenant, stream):
    break_down(tenant, account)
    answered = Caller(tenant).chat("broken", stream=stream)
    assert answered.status_code == 503
    assert answered.json()["error"]["code"] == "no_provider"
    assert 1 <= int(answered["Retry-After"]) <= 11
    assert Attempt.objects.count() == 20


def test_calls_again_have_a_budget(account, tenant):
    factories.route("bad", (account, "error-503"))
    for _ in range(4):
        task = inline(tenant, "bad").task
        assert (task.status, task.error_class) == ("failed", "Overloaded")
        check_ledger(task)
    # Four first calls, and ten more: no more are allowed of so few.
    assert Attempt.objects.count() == 14


def test_queued_work_waits_for_the_budget(account, tenant):
    factories.route("flaky", (account, "flaky-1"))
    for _ in range(10):
        take(account, is_again=True)
    task = run_once(tenant, "flaky")
    assert (task.status, errors_of(task)) == ("waiting", ["Overloaded"])
    began = timezone.now()
    run_released(task)
    assert (task.status, task.attempts) == ("waiting", 1)
    assert task.not_before - began > 2 * A_SECOND


# --- what the vendor says of the account ----------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "error"), [("error-401", "AuthenticationFailed"), ("error-402", "QuotaExhausted")]
)
def test_a_refused_credential_is_used_no_more_until_somebody_says_so(
    account, tenant, second, sandbox, model, error
):
    factories.route("dead", (account, model))
    factories.route("smart", (account, "echo"), (second, "echo"))
    factories.route("only", (account, "echo"))
    version = pulse.config_version()
    assert errors_of(inline(tenant, "dead").task) == [error]
    account.refresh_from_db()
    assert account.refused_at is not None
    assert error in account.refused_reason
    event = ProviderEvent.objects.get()
    assert (event.provider, event.model, event.event) == ("sandbox", "", "refused")
    # All processes see it with the next version of the configuration.
    factories.in_force()
    assert pulse.config_version() > version
    for task in (inline(tenant, "smart").task, run_once(tenant, "smart")):
        assert (task.status, task.provider, errors_of(task)) == ("succeeded", "second", [""])
    with pytest.raises(NoProvider, match="refused"):
        inline(tenant, "only")
    assert is_parked(run_once(tenant, "only"))

    assert accounts.recover("sandbox", "ann")
    assert not accounts.recover("sandbox", "ann")
    factories.in_force()
    assert inline(tenant, "smart").task.provider == "sandbox"
    assert list(ProviderEvent.objects.values_list("event", flat=True)) == ["recovered", "refused"]


def test_a_model_that_is_denied_is_left_out_alone(account, tenant, sandbox):
    factories.route("smart", (account, "error-403"), (account, "echo"))
    assert errors_of(inline(tenant, "smart").task) == ["PermissionDenied", ""]
    factories.in_force()
    account.refresh_from_db()
    assert account.refused_at is None
    denied = ProviderModel.objects.exclude(refused_at=None).get()
    assert denied.name == "error-403"
    assert errors_of(inline(tenant, "smart").task) == [""]
    assert accounts.recover("sandbox", "ann")
    factories.in_force()
    assert errors_of(inline(tenant, "smart").task) == ["PermissionDenied", ""]


@pytest.fixture
def vendor() -> Iterator[Any]:
    """A vendor that gives the same answer to each call; `vendor(head, body)` makes an account."""
    servers = []

    def made(head: bytes, body: bytes) -> Provider:
        def script(peer: Peer, number: int) -> None:
            while peer.read():
                peer.send(answer(body, head))

        server = Scripted(script)
        servers.append(server.__enter__())
        return Provider.objects.create(
            name="odd", adapter="compatible", base_url=server.base_url, credential="env:SANDBOX_KEY"
        )

    yield made
    for server in servers:
        server.__exit__(None, None, None)


def test_a_firewalls_denial_says_nothing_of_the_account(account, tenant, vendor):
    odd = vendor(b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\n", b"<h1>Blocked</h1>")
    factories.route("smart", (odd, "m"), (account, "echo"))
    assert errors_of(inline(tenant, "smart").task) == ["PermissionDenied", ""]
    assert not Provider.objects.exclude(refused_at=None).exists()
    assert not ProviderModel.objects.exclude(refused_at=None).exists()


def test_a_prompt_that_is_too_long_goes_to_the_larger_window(account, tenant, second, vendor):
    odd = vendor(
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n",
        b'{"error": {"message": "too long", "code": "context_length_exceeded"}}',
    )
    factories.route("smart", (odd, "m"), (second, "echo"), (account, "echo"))
    factories.route("none", (odd, "m"), (second, "echo"))
    windows = {"odd": 8000, "second": 4000, "sandbox": 100_000}
    for name, size in windows.items():
        ProviderModel.objects.filter(provider__name=name).update(context_window=size)
    factories.in_force()
    task = inline(tenant, "smart").task
    assert (task.status, task.provider, errors_of(task)) == (
        "succeeded", "sandbox", ["ContextTooLong", ""],
    )  # fmt: skip
    task = inline(tenant, "none").task
    assert (task.status, task.error_class, task.attempts) == ("failed", "ContextTooLong", 1)
    # The caller's fault is no fault of the vendor.
    assert not Provider.objects.exclude(refused_at=None).exists()


# --- while Redis is away --------------------------------------------------------------------------


@pytest.fixture
def no_redis(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The limiter's server is away until the value is called."""

    def refuse(*_: Any) -> Any:
        raise redis_py.ConnectionError("nobody listens there")

    with monkeypatch.context() as patched:
        patched.setattr(meters, "connect", refuse)
        meters.forget_connections()
        yield patched.undo


def test_while_redis_is_away_who_waits_is_served_and_the_rest_pauses(
    account, tenant, no_redis, client: Client
):
    factories.route("echo", (account, "echo"))
    limit("requests", 60_000, "minute", provider=account)
    assert client.get("/readyz").json()["limits"] == {"ok": True}
    for _ in range(3):
        task = inline(tenant, "echo", deadline_s=20).task
        assert (task.status, errors_of(task)) == ("succeeded", [""])
    assert client.get("/readyz").json()["limits"] == {"ok": False}
    assert is_parked(run_once(tenant, "echo"))
    Task.objects.filter(status="waiting").delete()
    assert run_once(tenant, "echo", lane="interactive").status == "succeeded"
    no_redis()
    until(
        lambda: inline(tenant, "echo").task.status == "succeeded" and not rate_limit.is_degraded()
    )
    assert client.get("/readyz").json()["limits"] == {"ok": True}
    assert run_once(tenant, "echo").status == "succeeded"


def test_a_local_share_is_a_share(account, tenant, no_redis):
    factories.route("echo", (account, "echo"))
    limit("requests", 1, "minute", provider=account)
    task = inline(tenant, "echo", deadline_s=10).task
    assert (task.status, task.error_class, task.attempts) == ("failed", "LimitReached", 0)
