"""examples/mcp_server as its README has it used: by an agent, with a person's leave."""

import sys
from pathlib import Path

import orjson
import pytest

from llmtasks import steps, submit
from llmtasks.bodies import AgentRequest
from llmtasks.models import Kind, McpServer, McpTool, Provider, Status, Task
from llmtasks.tools import pins
from tests import factories
from tests.integration.working import work_off

SERVER = Path(__file__).parents[2] / "examples" / "mcp_server" / "server.py"


@pytest.fixture
def warehouse(account: Provider) -> McpServer:
    command = [sys.executable, str(SERVER)]
    return McpServer.objects.create(
        name="warehouse", transport="stdio", command=command, timeout_s=60.0
    )


def test_an_agent_uses_it(account: Provider, warehouse: McpServer) -> None:
    assert str(pins.discover(warehouse)) == "on: find_stock, reserve"
    McpTool.objects.filter(name="reserve").update(needs_approval=True)
    factories.in_force()
    factories.route("script", (account, "script"))
    tenant = factories.tenant()
    names = ("warehouse_find_stock", "warehouse_reserve")
    turns = [
        [{"name": names[0], "arguments": {"item": "chair"}}],
        [{"name": names[0], "arguments": {"item": "sofa"}}],
        [{"name": names[1], "arguments": {"item": "chair", "pieces": 2}}],
    ]
    request = AgentRequest(
        chat=factories.request("script", orjson.dumps(turns).decode()), tools=names
    )
    work = submit.Work(tenant_id=tenant.id, key_id=None, kind=Kind.AGENT, request=request)
    [task] = submit.queued([work])
    assert isinstance(task, Task)
    work_off(180)
    task.refresh_from_db()
    assert task.status == Status.BLOCKED
    found, missing, asked = (row for row in steps.of(task.id) if row.kind == "tool")
    assert orjson.loads(found.output["content"]) == {"item": "chair", "pieces": 12}
    assert missing.error_class == "ToolError" and "there is no sofa" in str(missing.output)
    assert asked.status == "approval"
    steps.decide(asked.id, tenant.id, run=True, by="ann", comment="")
    work_off(180)
    task.refresh_from_db()
    assert task.status == Status.SUCCEEDED
    asked.refresh_from_db()
    assert "put aside" in asked.output["content"]
