"""Tools that are operations of an HTTP API, against a server on loopback."""

from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from llmtasks.models import ApiKey, HttpTool, Provider, Tenant
from llmtasks.tools import run as tool_run
from llmtasks.tools.registry import registry
from llmtasks.tools.run import Caller, Result
from providers import http
from tests import factories
from tests.apiserver import Api
from tests.corridor import until

SECRET = "top-secret-token"
ORDER = {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}}


def document(path: str, method: str = "get", **operation: Any) -> dict[str, Any]:
    answers = {"200": {"content": {"application/json": {"schema": ORDER}}}}
    given = {"operationId": "op", "description": "What it does.", "responses": answers}
    return {"openapi": "3.1.0", "paths": {path: {method: given | operation}}}


@pytest.fixture
def api(settings: Any, account: Provider) -> Iterator[Api]:
    settings.PRIVATE_NETWORKS = [ip_network("127.0.0.0/8")]
    with Api() as server:
        yield server
    http.close_idle()


@pytest.fixture
def tenant(account: Provider) -> Tenant:
    return factories.tenant()


def made(api: Api, path: str, method: str = "get", operation: Any = None, **fields: Any) -> str:
    given = {"name": "shop", "operation_id": "op", "base_url": api.base_url, **fields}
    HttpTool.objects.create(document=document(path, method, **(operation or {})), **given)
    factories.in_force()
    return str(given["name"])


def run(name: str, tenant: Tenant, **values: Any) -> Result:
    caller = Caller(tenant.id, None, True, 10.0)
    return tool_run.run(registry.find(name), values, caller)


ID = {"parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]}


def test_a_call_is_a_request_with_the_secret(
    api: Api, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_KEY", SECRET)
    made(api, "/orders/{id}", operation=ID, credential="env:SHOP_KEY")
    assert run("shop", tenant, id="a/b") == Result('{"id":"a%2Fb"}')
    [(method, path, headers, _)] = api.seen
    assert (method, path, headers["authorization"]) == ("GET", "/orders/a%2Fb", f"Bearer {SECRET}")
    HttpTool.objects.update(auth_header="X-Key", auth_scheme="")
    factories.in_force()
    run("shop", tenant, id="1")
    assert api.seen[1][2]["x-key"] == SECRET and "authorization" not in api.seen[1][2]


def test_a_body_is_sent_as_json(api: Api, tenant: Tenant) -> None:
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": ORDER}}}}
    made(api, "/orders/{id}", "post", ID | body)
    assert run("shop", tenant, id="1", body={"id": "1"}).error == ""
    assert api.seen[0][0::3] == ("POST", b'{"id":"1"}')
    assert run("shop", tenant, id="1", body={}).error == "BadArguments"
    assert run("shop", tenant, id="1").error == "BadArguments"
    assert len(api.seen) == 1


def test_a_server_that_repeats_the_secret(
    api: Api, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_KEY", SECRET)
    made(api, "/echo", credential="env:SHOP_KEY")
    result = run("shop", tenant)
    assert result.error == "" and SECRET not in result.content and "Bearer ***" in result.content


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/text", "BadResult", "no JSON"),
        ("/broken", "BadResult", "no JSON"),
        ("/binary", "BadResult", "no JSON"),
        ("/lies", "BadResult", "id: 7 is not of type 'string'"),
        ("/large", "BadResult", "larger than 100000 bytes"),
        ("/missing", "ToolError", "status 404: there is no such order"),
        ("/moved", "ToolError", "status 302"),
        ("/slow", "ToolTimeout", ""),
        ("/cut", "ToolFailed", "broke off"),
    ],
)
def test_what_a_server_does_wrong(
    api: Api, tenant: Tenant, path: str, error: str, words: str
) -> None:
    made(api, path, timeout_s=0.5 if path == "/slow" else 20)
    result = run("shop", tenant)
    assert (result.error, words in result.content, "\0" in result.content) == (error, True, False)
    assert len(api.seen) == 1


def test_text_and_nothing_are_answers_where_no_schema_says_otherwise(
    api: Api, tenant: Tenant
) -> None:
    made(api, "/text", operation={"responses": {}})
    assert run("shop", tenant) == Result("plain t\u00ebxt\ufffd")
    made(api, "/nothing", "post", name="empty")
    assert run("empty", tenant) == Result('{"status":204}')
    assert api.seen[1][2]["content-length"] == "0" and "content-type" not in api.seen[1][2]
    made(api, "/binary", operation={"responses": {}}, name="binary")
    assert run("binary", tenant).error == "BadResult"


def test_faults_of_the_server_are_tried_again_where_that_is_safe(api: Api, tenant: Tenant) -> None:
    made(api, "/orders/{id}", operation=ID, retries=2, idempotent=True)
    api.first = [500, 429]
    assert run("shop", tenant, id="1") == Result('{"id":"1"}')
    assert len(api.seen) == 3
    made(api, "/orders/{id}", "post", ID, name="once")
    api.first = [503]
    result = run("once", tenant, id="1")
    assert (result.error, len(api.seen)) == ("ToolFailed", 4)
    assert 'status 503: {"why": "not now"}' in result.content


def test_a_server_that_fails_again_and_again_is_left_alone(api: Api, tenant: Tenant) -> None:
    made(api, "/orders/{id}", operation=ID)
    api.first = [500] * 40
    results = [run("shop", tenant, id="1") for _ in range(40)]
    assert results[0].error == "ToolFailed"
    assert results[-1].error == "ToolUnavailable"
    assert 20 <= len(api.seen) < 40


def test_the_credentials_header_is_no_argument(
    api: Api, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_KEY", SECRET)
    own = {"name": "x-key", "in": "header", "schema": {"type": "string"}}
    made(
        api, "/echo", operation={"parameters": [own]}, credential="env:SHOP_KEY",
        auth_header="X-Key", auth_scheme="",
    )  # fmt: skip
    run("shop", tenant, **{"x-key": "mine"})
    assert api.seen[0][2]["x-key"] == SECRET


def test_a_call_ends_by_itself_when_whoever_waits_gives_up(api: Api, tenant: Tenant) -> None:
    made(api, "/slow", operation={"responses": {}})
    caller = Caller(tenant.id, None, True, 0.5)
    result = tool_run.run(registry.find("shop"), {}, caller)
    assert result.error == "ToolTimeout"
    # No thread is left behind, though the server answers later still.
    until(lambda: tool_run._abandoned == 0, 1.0)


def test_private_networks_are_refused(api: Api, tenant: Tenant, settings: Any) -> None:
    settings.PRIVATE_NETWORKS = []
    made(api, "/echo")
    made(api, "/echo", name="named", base_url=api.base_url.replace("127.0.0.1", "localhost"))
    for name in ("shop", "named"):
        result = run(name, tenant)
        assert result.error == "ToolFailed"
        assert "in a network that may not be reached" in result.content
    assert api.seen == []


def test_a_secret_that_is_not_there(api: Api, tenant: Tenant) -> None:
    made(api, "/echo", credential="env:NO_SUCH_SECRET")
    result = run("shop", tenant)
    assert result.error == "ToolError" and "env:NO_SUCH_SECRET leads to no secret" in result.content
    assert api.seen == []


def test_a_row_is_a_plain_tool(api: Api, tenant: Tenant) -> None:
    made(api, "/orders/{id}", operation=ID)
    made(api, "/orders/{id}", operation=ID, version=2)
    key, text = ApiKey.issue(tenant, "k", tools=["shop"])
    key.save()
    client = Client(headers={"authorization": f"Bearer {text}"})
    listed = client.get("/v1/tools").json()["data"]
    assert [one["reference"] for one in listed] == ["shop@1", "shop@2"]
    assert listed[0]["description"] == "What it does."
    assert listed[0]["parameters"]["required"] == ["id"]
    answer = client.post(
        "/v1/tools/shop@1/invoke", {"arguments": {"id": "7"}}, content_type="application/json"
    )
    assert answer.json()["output"] == {"tool": "shop@1", "content": '{"id":"7"}'}
    HttpTool.objects.filter(version=2).update(is_active=False)
    factories.in_force()
    assert [one["reference"] for one in client.get("/v1/tools").json()["data"]] == ["shop@1"]


def test_rows_are_read_again_where_one_changed(api: Api, tenant: Tenant) -> None:
    made(api, "/orders/{id}", operation=ID)
    before = registry.find("shop")
    tenant.save()
    factories.in_force()
    assert registry.find("shop") is before
    HttpTool.objects.update(description="Other.")
    factories.in_force()
    assert registry.find("shop").description == "Other."


def test_one_that_is_set_up_wrongly_takes_no_other_down(api: Api, tenant: Tenant) -> None:
    made(api, "/orders/{id}", operation=ID)
    HttpTool.objects.create(name="bad", operation_id="x", base_url=api.base_url, document={})
    factories.in_force()
    assert [tool.name for tool in registry.all()] == ["shop"]


def test_the_admin_refuses_what_cant_be_used(login: Any, api: Api) -> None:
    client = login("*")
    url = reverse("admin:llmtasks_httptool_add")
    values = {
        "name": "shop", "version": "1", "is_active": "on", "operation_id": "op",
        "base_url": "https://api.example.com", "document": '{"openapi": "3.1.0"}',
        "auth_header": "Authorization", "auth_scheme": "Bearer", "timeout_s": "30", "retries": "0",
        "max_result_bytes": "1000", "critical": "on", "scopes": "", "credential": SECRET,
    }  # fmt: skip
    form = client.post(url, values).context["adminform"].form
    assert "no operation" in str(form.errors["document"])
    assert "never the key itself" in str(form.errors["credential"])
    assert SECRET not in str(list(HttpTool.objects.values()))
    assert (
        "auth_header"
        in client.post(url, values | {"auth_header": "host"}).context["adminform"].form.errors
    )
    good = values | {"document": tool_json("/echo"), "credential": "env:SHOP_KEY"}
    wrong = client.post(url, good | {"retries": "2", "base_url": "https://u:p@x.test"})
    form = wrong.context["adminform"].form
    assert "retries" in form.errors and "base_url" in form.errors
    assert client.post(url, good).status_code == 302
    page = client.get(reverse("admin:llmtasks_httptool_change", args=(HttpTool.objects.get().pk,)))
    assert "What it does." in page.content.decode()


def tool_json(path: str) -> str:
    return tool_run.orjson.dumps(document(path)).decode()
