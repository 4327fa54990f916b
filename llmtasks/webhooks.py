"""Webhooks as Standard Webhooks has them (version 1, HMAC-SHA256): a step that waits for a person
is told to its tenant's URL.

    outbox row, in the step's transaction → taken for a while → sent → delivered, or due again later

A process that dies while it sends leaves the row due again; the receiver knows a repetition by its
id. The dispatcher's process sends, in threads of its own: receivers may be slow.
"""

import base64
import binascii
import hashlib
import hmac
import logging
import random
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import orjson
from django.db import Error as DatabaseError

from llmtasks import routing, stores
from llmtasks.ledger import ClockTimestamp
from llmtasks.models import Delivery, Kind, Step, Task, Tenant
from llmtasks.network import may_reach
from llmtasks.stores import fetch
from providers import http
from providers.base import Account
from providers.errors import ProviderError

log = logging.getLogger(__name__)

STEP_WAITING = "step.waiting"
UNDECIDED = (Step.Status.APPROVAL, Step.Status.UNKNOWN)
TIMEOUT_S = 10.0
# Seconds from each failed try to the next; after the last it is given up.
WAITS_S = (5, 30, 120, 600, 1800, 3600, 7200, 18_000, 36_000, 36_000)
# What is taken and not written back for so long is due again.
TAKEN_S = 60
# A tenant's deliveries in one take, sent one after the other: they fit into TAKEN_S.
AT_ONCE = 5
THREADS = 16
POLL_S = 1.0
# Receivers should get no more; what is left out can be asked for.
MAX_ARGUMENTS_BYTES = 20_000
SECRET_PREFIX = "whsec_"  # noqa: S105 - no secret: how they begin

TAKE = """
WITH due AS (
    SELECT id, row_number() OVER (PARTITION BY tenant_id ORDER BY due_at) AS place FROM (
        SELECT id, tenant_id, due_at FROM llmtasks_delivery
        WHERE state = 'pending' AND due_at <= clock_timestamp() AND tenant_id <> ALL(%(busy)s)
        ORDER BY due_at LIMIT 1000
    ) oldest
), picked AS (
    SELECT id FROM llmtasks_delivery
    WHERE id IN (SELECT id FROM due WHERE place <= %(each)s) AND state = 'pending'
        AND due_at <= clock_timestamp()
    ORDER BY id FOR UPDATE SKIP LOCKED
)
UPDATE llmtasks_delivery d
SET due_at = clock_timestamp() + make_interval(secs => %(taken)s), tries = tries + 1
FROM picked WHERE d.id = picked.id RETURNING d.tenant_id, d.id
"""


# --- The outbox -----------------------------------------------------------------------------------


def announce(rows: Iterable[Step]) -> None:
    """Within the transaction that has steps wait for a person: their tenant is to be told."""
    waiting = [row for row in rows if row.status in UNDECIDED]
    if not waiting:
        return
    tenants = {row.tenant_id for row in waiting}
    told = set(Tenant.objects.filter(id__in=tenants).exclude(webhook_url="").values_list("id"))
    Delivery.objects.bulk_create(
        Delivery(tenant_id=row.tenant_id, event=STEP_WAITING, task_id=row.task_id, step_id=row.id)
        for row in waiting
        if (row.tenant_id,) in told
    )


def take(busy: Iterable[UUID] = ()) -> dict[UUID, list[UUID]]:
    """Deliveries that are due, by tenant, none of them of a `busy` one: ours for TAKEN_S."""
    found: dict[UUID, list[UUID]] = {}
    values = {"busy": list(busy), "each": AT_ONCE, "taken": TAKEN_S}
    for tenant, delivery in fetch(TAKE, values):
        found.setdefault(tenant, []).append(delivery)
    return found


def deliver(delivery_id: UUID) -> None:
    """One try of a delivery that was taken, and what became of it. Raises `django.db.Error`s."""
    row = Delivery.objects.select_related("tenant").get(id=delivery_id)
    step = Step.objects.filter(id=row.step_id).first()
    if step is None or step.status not in UNDECIDED or not row.tenant.webhook_url:
        write(row, Delivery.State.DROPPED)
        return
    body = body_of(row, step, Task.objects.filter(id=row.task_id).first())
    stores.release()
    status, error = send(row, body)
    if not error:
        write(row, Delivery.State.DELIVERED, http_status=status)
        return
    log.warning("a webhook was not taken", extra={"webhook": row.id, "error": error})
    values = {"http_status": status, "error": error}
    if row.tries > len(WAITS_S):
        write(row, Delivery.State.FAILED, **values)
        return
    wait_s = WAITS_S[row.tries - 1] * random.uniform(0.9, 1.1)  # noqa: S311 - no secret
    mine(row).update(due_at=ClockTimestamp() + timedelta(seconds=wait_s), **values)


def mine(row: Delivery) -> Any:
    """The row, while nobody else took it."""
    return Delivery.objects.filter(id=row.id, state=Delivery.State.PENDING, tries=row.tries)


def write(row: Delivery, state: str, **values: Any) -> None:
    mine(row).update(state=state, finished_at=ClockTimestamp(), **({"error": ""} | values))


def again(rows: Any) -> int:
    """Send once more what was given up; how many."""
    given_up = rows.filter(state=Delivery.State.FAILED)
    return int(
        given_up.update(
            state=Delivery.State.PENDING, tries=0, due_at=ClockTimestamp(), finished_at=None
        )
    )


# --- One request ----------------------------------------------------------------------------------


def body_of(row: Delivery, step: Step, task: Task | None) -> bytes:
    """The same for every try."""
    arguments = step.input
    if task is not None and task.kind == Kind.WORKFLOW:
        arguments = (step.input or {}).get("arguments")
    if len(orjson.dumps(arguments)) > MAX_ARGUMENTS_BYTES:
        arguments = None
    data = {
        "task": str(step.task_id),
        "kind": task.kind if task is not None else None,
        "step": step.number,
        "name": step.name,
        "status": step.status,
        "arguments": arguments,
        "user": task.user if task is not None and task.user else None,
        "metadata": task.metadata if task is not None else {},
        "decide": f"/v1/tasks/{step.task_id}/decide",
    }
    at = row.created_at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return orjson.dumps({"type": row.event, "timestamp": at, "data": data})


def send(row: Delivery, body: bytes) -> tuple[int | None, str]:
    """The answer's status, and what was wrong; empty where the receiver took it."""
    secret = routing.resolve(row.tenant.webhook_secret)
    if secret is None:
        return None, f"{row.tenant.webhook_secret or 'webhook_secret'} leads to no secret"
    parts = urlsplit(row.tenant.webhook_url)
    account = Account(
        name="webhook", base_url=f"{parts.scheme}://{parts.netloc}", connect_timeout=5.0,
        read_timeout=TIMEOUT_S, total_timeout=TIMEOUT_S, may_reach=may_reach,
    )  # fmt: skip
    headers = signed(secret, str(row.id), int(time.time()), body)
    exchange = http.Exchange(deadline=time.monotonic() + TIMEOUT_S)
    try:
        with http.ask(account, "POST", parts.path or "/", body, headers, exchange) as answer:
            answer.read_error()
    except ProviderError as error:
        return None, str(error)
    if 200 <= answer.status <= 299:
        return answer.status, ""
    return answer.status, f"the receiver answered with status {answer.status}"


def signed(secret: str, id_: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a message, by which its receiver knows that it is ours."""
    content = b".".join((id_.encode(), str(timestamp).encode(), body))
    digest = hmac.new(key_of(secret), content, hashlib.sha256).digest()
    return {
        "webhook-id": id_,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def key_of(secret: str) -> bytes:
    """The key that `whsec_<base64>` stands for; any other text is the key itself."""
    if secret.startswith(SECRET_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            log.error("a webhook's secret begins with whsec_, but is no base64")
    return secret.encode()


# --- The sender -----------------------------------------------------------------------------------


class Sender(threading.Thread):
    """Sends what is due until `stopped`. Several processes may do so at a time."""

    def __init__(self, stopped: threading.Event) -> None:
        super().__init__(name="webhooks", daemon=True)
        self.stopped = stopped
        self.busy: set[UUID] = set()
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="webhook")

    def run(self) -> None:
        while not self.stopped.wait(POLL_S):
            try:
                if len(self.busy) < THREADS:
                    self.begin(take(self.busy))
            except DatabaseError as error:
                log.warning("webhooks wait for Postgres", extra={"error": str(error)})
            except Exception:
                log.exception("webhooks failed")
            finally:
                stores.release()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, due: dict[UUID, list[UUID]]) -> None:
        for tenant, deliveries in due.items():
            self.busy.add(tenant)
            self.pool.submit(self.send_all, tenant, deliveries)

    def send_all(self, tenant: UUID, deliveries: Sequence[UUID]) -> None:
        """A tenant's, one after the other: a receiver that hangs keeps no other waiting."""
        try:
            for delivery in deliveries:
                if self.stopped.is_set():
                    return
                deliver(delivery)
        except DatabaseError as error:
            log.warning("a webhook waits for Postgres", extra={"error": str(error)})
        except Exception:
            log.exception("a webhook failed")
        finally:
            stores.release()
            self.busy.discard(tenant)
