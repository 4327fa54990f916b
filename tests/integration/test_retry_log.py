"""Each retry is one line that programs can read, and one more of its class in the metrics."""

import json
import logging
from uuid import UUID

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmtasks.models import Provider, Tenant
from llmtasks.telemetry import JsonFormatter
from tests import factories
from tests.corridor import attempts

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def tenant(account: Provider) -> Tenant:
    return factories.tenant()


@pytest.fixture
def retries(caplog):
    """The lines of retries so far, as they are written."""
    caplog.set_level(logging.INFO, logger="llmtasks.call")

    def found() -> list[dict]:
        records = [record for record in caplog.records if record.getMessage() == "retry"]
        return [json.loads(JsonFormatter().format(record)) for record in records]

    return found


def test_each_retry_is_a_line(account, tenant, door, retries, sandbox):
    other = factories.provider(sandbox.base_url, "second")
    factories.route("smart", (account, "error-503"), (other, "echo"))
    task = door(tenant, "smart").task
    assert task.status == "succeeded"
    failed = attempts(task)[:-1]
    lines = retries()
    assert [UUID(line["attempt"]) for line in lines] == [attempt.id for attempt in failed]
    for line in lines:
        assert UUID(line["task"]) == task.id
        assert line["error"] == "Overloaded"
        assert (line["provider"], line["model"]) == ("sandbox", "error-503")
        assert line["level"] == "INFO" and line["wait_s"] >= 0
    assert [line["next"] for line in lines] == ["sandbox/error-503", "second/echo"]


def test_what_is_not_tried_again_is_no_line(account, tenant, door, retries):
    factories.route("wrong", (account, "error-400"))
    assert door(tenant, "wrong").task.status == "failed"
    assert retries() == []


def test_failed_calls_are_counted_by_class(account, tenant, door, client):
    factories.route("flaky", (account, "flaky-2"))
    assert door(tenant, "flaky").task.status == "succeeded"
    text = client.get("/metrics").content.decode()
    [counted] = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "llmtasks_call_errors_total"
    ]
    assert counted.labels == {"provider": "sandbox", "model": "flaky-2", "error": "Overloaded"}
    assert counted.value == 2
