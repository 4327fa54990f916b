"""The sandbox makes up values that fit a schema."""

import jsonschema
import pytest

from providers.sandbox_answers import minimal


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "string"},
        {"type": "string", "maxLength": 2},
        {"type": "string", "format": "date-time"},
        {"type": "string", "minLength": 30},
        {"type": "integer"},
        {"type": "integer", "exclusiveMinimum": 4},
        {"type": "integer", "maximum": -3},
        {"type": "number", "minimum": 0.5},
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["integer", "null"]},
        {"enum": ["a", "b"]},
        {"const": 7},
        {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        {"type": "array", "items": {"type": "integer"}, "minItems": 2},
        {"type": "array"},
        {"properties": {"a": {"type": "integer"}}, "required": ["a", "b"]},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"],
         "$defs": {"x": {"type": "integer"}}},
    ],
)  # fmt: skip
def test_minimal_values_fit_their_schema(schema):
    jsonschema.validate(minimal(schema, schema), schema)


def test_a_schema_that_refers_to_itself_ends():
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    assert minimal(schema, schema)["a"]
    assert minimal({"$ref": "#/nowhere/x"}, {}) is None
    assert minimal(True, {}) is None
