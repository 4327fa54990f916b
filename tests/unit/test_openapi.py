"""Operations of OpenAPI documents as schemas of arguments, and calls as requests."""

import copy
from typing import Any

import orjson
import pytest

from llmtasks.tools import openapi
from llmtasks.tools.registry import BadArguments
from llmtasks.tools.run import fault_of

SHOP: dict[str, Any] = {
    "openapi": "3.0.3",
    "paths": {
        "/orders/{id}": {
            "parameters": [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            ],
            "get": {
                "operationId": "getOrder",
                "summary": "Look an order up.",
                "parameters": [
                    {
                        "name": "fields", "in": "query", "description": "Which fields.",
                        "schema": {"type": "array", "items": {"type": "string"}},
                    },
                    {
                        "name": "lines", "in": "query", "explode": False,
                        "schema": {"type": "array", "items": {"type": "integer"}},
                    },
                    {"name": "X-Trace", "in": "header", "schema": {"type": "string"}},
                    {"name": "Authorization", "in": "header", "schema": {"type": "string"}},
                    {"name": "crumb", "in": "cookie", "schema": {"type": "string"}},
                ],
                "responses": {
                    "200": {"$ref": "#/components/responses/Order"},
                    "4XX": {"description": "wrong"},
                },
            },
            "put": {
                "operationId": "putOrder",
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Order"}}
                    },
                },
            },
        },
    },
    "components": {
        "responses": {
            "Order": {
                "description": "an order",
                "content": {
                    "application/json; charset=utf-8": {
                        "schema": {"$ref": "#/components/schemas/Order"}
                    }
                },
            }
        },
        "schemas": {
            "Order": {
                "type": "object",
                "required": ["id"],
                "properties": {
                    "id": {"type": "string", "example": "42"},
                    "note": {"type": "string", "nullable": True},
                    "cents": {"type": "integer", "minimum": 0, "exclusiveMinimum": True},
                    "replaces": {"$ref": "#/components/schemas/Order"},
                },
            },
            "Unused": {"type": "object"},
        },
    },
}  # fmt: skip


def read(operation: str = "getOrder", **changes: Any) -> openapi.Operation:
    return openapi.read(SHOP, operation)


def call(operation: str = "getOrder", **values: Any) -> openapi.Call:
    return openapi.call(read(operation), values)


def test_the_schema_comes_from_parameters_and_body() -> None:
    found = read()
    assert (found.method, found.path) == ("GET", "/orders/{id}")
    assert found.description == "Look an order up."
    assert found.arguments == {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "fields": {
                "description": "Which fields.", "type": "array", "items": {"type": "string"},
            },
            "lines": {"type": "array", "items": {"type": "integer"}},
            "X-Trace": {"type": "string"},
        },
        "required": ["id"],
        "additionalProperties": False,
    }  # fmt: skip


def test_components_become_defs_as_json_schema_has_them() -> None:
    schema = read("putOrder").arguments
    assert schema["properties"]["body"] == {"$ref": "#/$defs/Order"}
    assert schema["required"] == ["id", "body"]
    assert list(schema["$defs"]) == ["Order"]
    good = {"id": "1", "body": {"id": "1", "note": None, "cents": 1, "replaces": {"id": "0"}}}
    assert fault_of(schema, good) == ""
    for wrong in ({"note": "x"}, {"id": "1", "cents": 0}, {"id": "1", "replaces": {}}):
        assert fault_of(schema, {"id": "1", "body": wrong})


def test_the_answers_schema_is_the_statuses() -> None:
    found = read()
    schema = found.schema_of(200)
    assert schema is not None and fault_of(schema, {}) and not fault_of(schema, {"id": "1"})
    assert found.schema_of(404) is None and found.schema_of(500) is None


def test_a_call_is_a_request() -> None:
    found = call(id="a/b c", fields=["id", "x&y"], lines=[1, 2], **{"X-Trace": "t"})
    assert found.path == "/orders/a%2Fb%20c?fields=id&fields=x%26y&lines=1%2C2"
    assert (found.headers, found.payload) == ({"X-Trace": "t"}, None)
    found = call("putOrder", id="{id}", body={"id": "1"})
    assert (found.path, found.payload) == ("/orders/%7Bid%7D", b'{"id":"1"}')


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id": ".."}, "can't be part of a path"),
        ({"id": "."}, "can't be part of a path"),
        ({"id": ""}, "can't be part of a path"),
        ({}, "lacks a value"),
        ({"id": {"a": 1}}, "give a plain value"),
        ({"id": "1", "X-Trace": "a\r\nb: c"}, "printable ASCII"),
    ],
)
def test_values_that_would_lead_elsewhere(values: Any, message: str) -> None:
    with pytest.raises(BadArguments, match=message):
        call(**values)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The document with one value another."""
    document = copy.deepcopy(SHOP)
    *steps, last = path.split("|")
    place: Any = document
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value
    return document


GET = "paths|/orders/{id}|get"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("openapi", "2.0", "version 3"),
        (f"{GET}|operationId", "other", "no operation 'getOrder': there are other, putOrder"),
        (f"{GET}|parameters|0", {"$ref": "https://x.test/p"}, "leads out of the document"),
        (f"{GET}|parameters|0", {"$ref": "#/components/none"}, "leads nowhere"),
        (f"{GET}|parameters|0|name", "id", "two arguments 'id'"),
        (f"{GET}|parameters|0|name", "body", "two arguments 'body'"),
        (f"{GET}|parameters|0|style", "deepObject", "only plain values"),
        (f"{GET}|parameters|0|schema", {"type": "object"}, "only plain values"),
        (f"{GET}|parameters|0|schema", {"type": 5}, "a schema is not valid"),
        (f"{GET}|parameters|0|schema", {"$ref": "file:///etc/passwd"}, "only #/components"),
        (f"{GET}|parameters|0|schema", {"$ref": "#/components/schemas/None"}, "only #/components"),
        (f"{GET}|parameters|2|name", "Host", "connection's own"),
        (f"{GET}|parameters|4|required", True, "in 'cookie'"),
        (f"{GET}|parameters|0", "text", "no valid OpenAPI"),
        (f"{GET}|requestBody", {"content": {"text/xml": {}}}, "text/xml, not JSON"),
        ("paths", ["x"], "no valid OpenAPI"),
    ],
)
def test_documents_that_cant_be_used(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        openapi.read(changed(path, value), "getOrder")


def test_a_document_that_is_too_deep_or_large() -> None:
    deep: Any = {"type": "string"}
    for _ in range(2000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ValueError, match=r"too deeply|no valid OpenAPI"):
        openapi.read(changed(f"{GET}|parameters|0|schema", deep), "getOrder")
    with pytest.raises(ValueError, match="larger than"):
        openapi.read(changed("info", "x" * 2_000_001), "getOrder")
    for nothing in (None, [], "openapi", {}):
        with pytest.raises(ValueError, match="give an OpenAPI document"):
            openapi.read(nothing, "getOrder")


def test_a_schema_that_refers_to_another_document_fetches_nothing() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}}
    assert "refers to what is not there" in fault_of(schema, {"a": 1})
    assert orjson.dumps(schema)
