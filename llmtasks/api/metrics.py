"""GET /metrics: Prometheus's text, made of one look at how everything does.

No series names a tenant, a key or an end user. While a store is away its series are missing and
`llmtasks_store_up` says so: the answer is a 200 all the same.
"""

import hmac
from collections.abc import Iterator, Mapping
from ipaddress import ip_address

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from llmtasks import health
from llmtasks.api.errors import answer
from llmtasks.backlog import CLASSES, Depth, Place
from llmtasks.errors import NotAllowed, NotAuthenticated
from llmtasks.health import Health
from llmtasks.models import Lane

BREAKER = {"closed": 0, "half_open": 1, "open": 2}
# What proxies add: a request with one of them was not sent by a process of this machine.
FORWARDED = (
    *("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_HOST"),
    *("HTTP_X_FORWARDED_PROTO", "HTTP_X_REAL_IP"),
)


def metrics(request: HttpRequest) -> HttpResponse:
    if request.method not in ("GET", "HEAD"):
        return HttpResponseNotAllowed(["GET", "HEAD"])
    try:
        check_access(request)
    except (NotAuthenticated, NotAllowed) as error:
        return answer(error, request.path)
    registry = CollectorRegistry()
    registry.register(Families(health.now()))
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return HttpResponse(encode(registry), content_type=content_type)


def check_access(request: HttpRequest) -> None:
    """With METRICS_TOKEN set, who sends it; without, processes of this machine that ask the server
    itself. Raises `NotAuthenticated`, `NotAllowed`."""
    if settings.METRICS_TOKEN:
        scheme, _, text = request.META.get("HTTP_AUTHORIZATION", "").partition(" ")
        given, wanted = text.strip().encode(), settings.METRICS_TOKEN.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, wanted):
            raise NotAuthenticated("Send METRICS_TOKEN: Authorization: Bearer …")
    elif not is_of_this_machine(request):
        raise NotAllowed("Without METRICS_TOKEN only this machine may read metrics: set it.")


def is_of_this_machine(request: HttpRequest) -> bool:
    if any(name in request.META for name in FORWARDED):
        return False
    try:
        return ip_address(request.META.get("REMOTE_ADDR", "")).is_loopback
    except ValueError:
        return False


class Families:
    """What `prometheus_client` asks for metrics."""

    def __init__(self, found: Health) -> None:
        self.found = found

    def collect(self) -> Iterator[Metric]:
        found = self.found
        stores = gauge("store_up", "Whether the store answers.", "store")
        for store, is_up in found.has.items():
            stores.add_metric([store], is_up)
        yield stores
        if found.has["postgres"]:
            yield from of_processes(found)
            yield from of_accounts(found)
        if found.backlog is not None:
            yield from of_backlog(found)
        if found.has["redis"]:
            yield from of_limits(found)
            yield from of_models(found)
            yield counter("call_errors", "Calls that failed.", found.errors)
            yield counter("call_retries", "Of those, which are tried again.", found.retries)


def gauge(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"llmtasks_{name}", about, labels=labels)


def of_backlog(found: Health) -> Iterator[Metric]:
    depths = gauge(
        "queue_depth",
        "Tasks of queued work; due and later are counted to 10,000.",
        *("provider", "lane", "tenant_weight", "state"),
    )
    oldest = gauge(
        "oldest_waiting_seconds",
        "How long the oldest due task has been due.",
        *("provider", "lane", "tenant_weight"),
    )
    inline = gauge("inline_calls", "Tasks that run in a request.", "provider")
    running: dict[str, int] = {account.row.name: 0 for account in found.accounts}
    for place, depth in with_zeros(found).items():
        labels = [place.provider, place.lane, place.tenants]
        for state in ("due", "later", "queued", "running"):
            depths.add_metric([*labels, state], getattr(depth, state))
        oldest.add_metric(labels, depth.oldest_s)
        running[place.provider] = running.get(place.provider, 0) + depth.inline
    for provider, number in running.items():
        inline.add_metric([provider], number)
    yield from (depths, oldest, inline)


def with_zeros(found: Health) -> dict[Place, Depth]:
    """The backlog, and nothing where nothing is: a series that comes and goes is no alert."""
    places = {
        Place(account.row.name, lane, CLASSES[0]): Depth()
        for account in found.accounts
        for lane in Lane.values
    }
    return places | (found.backlog or {})


def of_processes(found: Health) -> Iterator[Metric]:
    workers = gauge("workers", "Live Celery workers.", "lane")
    slots = gauge("worker_slots", "Tasks that they run at a time.", "lane")
    others = gauge("processes", "Live processes.", "role")
    lanes = dict.fromkeys(Lane.values, (0, 0))
    roles: dict[str, int] = dict.fromkeys(("web", "worker", "dispatcher"), 0)
    for some in found.processes:
        roles[some.role] = roles.get(some.role, 0) + some.number
        if some.role == "worker":
            lanes[some.lane] = (some.number, some.slots)
    for lane, (number, most) in lanes.items():
        workers.add_metric([lane], number)
        slots.add_metric([lane], most)
    for role, number in roles.items():
        others.add_metric([role], number)
    leader = gauge("dispatcher_leads", "Whether a dispatcher leads.")
    leader.add_metric([], bool(found.has_leader))
    yield from (workers, slots, others, leader)


def of_accounts(found: Health) -> Iterator[Metric]:
    paused = gauge("provider_paused", "Whether somebody paused it.", "provider")
    refused = gauge("provider_refused", "Whether the vendor refused its credential.", "provider")
    models = gauge("model_refused", "Whether the vendor refused the model.", "provider", "model")
    for account in found.accounts:
        name = account.row.name
        paused.add_metric([name], account.row.is_paused)
        refused.add_metric([name], account.row.refused_at is not None)
        for model in account.models:
            models.add_metric([name, model.row.name], model.row.refused_at is not None)
    yield from (paused, refused, models)


def of_limits(found: Health) -> Iterator[Metric]:
    labels = ("limit", "provider", "model", "unit", "window", "counts")
    used = gauge("limit_used", "What is used of a limit.", *labels)
    amount = gauge("limit_amount", "What may be used, the vendor's own limit included.", *labels)
    ratio = gauge("limit_used_ratio", "What is used of a limit, as a share.", *labels)
    for use in found.uses:
        rule = use.rule
        whose = rule.each and f"each {rule.each}"
        whose = whose or (rule.key_id and "one key") or (rule.tenant_id and "one tenant") or "all"
        place = [rule.provider, rule.model, rule.unit, rule.window or "at once"]
        values = [str(rule.id), *place, str(whose)]
        used.add_metric(values, use.used)
        amount.add_metric(values, use.amount)
        ratio.add_metric(values, use.share)
    yield from (used, amount, ratio)


def of_models(found: Health) -> Iterator[Metric]:
    names = ("provider", "model")
    breaker = gauge("breaker_state", "0 closed, 1 half open, 2 open.", *names)
    gate = gauge("gate_seconds", "For how long the vendor wants no call.", *names)
    p95 = gauge("call_p95_seconds", "95 % of the calls took less, as learnt.", *names)
    output = gauge("call_output_tokens", "What a call answers with, as learnt.", *names)
    for account in found.accounts:
        for model in account.models:
            if (reading := model.reading) is None:
                continue
            labels = [account.row.name, model.row.name]
            breaker.add_metric(labels, BREAKER[reading.breaker])
            gate.add_metric(labels, reading.gate_s)
            if reading.p95_ms is not None:
                p95.add_metric(labels, reading.p95_ms / 1000)
            if reading.output_tokens is not None:
                output.add_metric(labels, reading.output_tokens)
    yield from (breaker, gate, p95, output)


def counter(name: str, about: str, counts: Mapping[tuple[str, str, str], int]) -> Metric:
    labels = ("provider", "model", "error")
    counted = CounterMetricFamily(f"llmtasks_{name}", about, labels=labels)
    for values, number in counts.items():
        counted.add_metric(list(values), number)
    return counted
