"""An operation of an OpenAPI document (3.0, 3.1) as a tool: the schema of its arguments, and the
request that a call becomes. Pure functions.

A parameter is an argument of its name; the JSON body is the argument `body`. Schemas of the
document's components become `$defs`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import jsonschema  # type: ignore[import-untyped]
import orjson

from llmtasks.tools.registry import BadArguments

METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
# The styles that every tool writes alike; others are refused.
STYLES = {"path": "simple", "query": "form", "header": "simple"}
# The specification has these ignored: they are the request's own.
NOT_ARGUMENTS = {"accept", "content-type", "authorization"}
RESERVED = {"host", "connection", "content-length", "transfer-encoding", "cookie", "upgrade"}
BODY = "body"
COMPONENTS = "#/components/schemas/"
MAX_DOCUMENT_BYTES = 2_000_000

# Keywords whose value is a schema, a list of schemas, or schemas by name.
OF_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
OF_LIST = ("allOf", "anyOf", "oneOf", "prefixItems")
BY_NAME = ("properties", "patternProperties", "dependentSchemas")
# What tells a model nothing.
DROPPED = ("example", "examples", "xml", "externalDocs", "discriminator", "nullable")


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    place: str
    is_required: bool
    explodes: bool


@dataclass(frozen=True, slots=True)
class Operation:
    """`responses`: status (`200`, `2XX`, `default`) → the schema of its JSON, None where the
    document gives none."""

    method: str
    path: str
    description: str
    parameters: tuple[Parameter, ...]
    has_body: bool
    arguments: Mapping[str, Any]
    responses: Mapping[str, Mapping[str, Any] | None]

    def schema_of(self, status: int) -> Mapping[str, Any] | None:
        """The schema that an answer with that status has to fit; None for any."""
        for name in (str(status), f"{status // 100}XX", "default"):
            if name in self.responses:
                return self.responses[name]
        return None


@dataclass(frozen=True, slots=True)
class Call:
    """What is sent: the path with its query, headers and the body's JSON."""

    path: str
    headers: Mapping[str, str]
    payload: bytes | None


# --- Reading the document -------------------------------------------------------------------------


def read(document: Any, operation_id: str) -> Operation:
    """The operation of that `operationId`. Raises ValueError that says what can't be used."""
    try:
        return _read(document, operation_id)
    except RecursionError:
        raise ValueError("the document is nested too deeply") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the document is no valid OpenAPI: {error!r}") from None


def _read(document: Any, operation_id: str) -> Operation:
    if not isinstance(document, dict) or not str(document.get("openapi", "")).startswith("3."):
        raise ValueError("give an OpenAPI document, version 3, as a JSON object")
    if len(orjson.dumps(document)) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"the document is larger than {MAX_DOCUMENT_BYTES} bytes")
    path, method, item = found(document, operation_id)
    operation = item[method]
    schemas = Schemas(document)
    wanted = merged(document, item.get("parameters", ()), operation.get("parameters", ()))
    properties: dict[str, Any] = {}
    parameters = []
    for given in wanted:
        parameter = parameter_of(given)
        if parameter.name in properties or parameter.name == BODY:
            raise ValueError(f"there are two arguments {parameter.name!r}: the model can't tell")
        parameters.append(parameter)
        properties[parameter.name] = described(schemas.convert(given["schema"]), given)
    required = [parameter.name for parameter in parameters if parameter.is_required]
    body = resolved(document, operation.get("requestBody"))
    if body is not None:
        properties[BODY] = described(schemas.convert(json_of(body, "the body")), body)
        required += [BODY] if body.get("required") else []
    arguments = {
        "type": "object", "properties": properties, "required": required,
        "additionalProperties": False,
    }  # fmt: skip
    text = operation.get("description") or operation.get("summary") or ""
    return Operation(
        method=method.upper(), path=path, description=str(text).strip(),
        parameters=tuple(parameters), has_body=body is not None,
        arguments=checked(schemas.with_defs(arguments)),
        responses=dict(responses_of(document, operation, schemas)),
    )  # fmt: skip


def found(document: Mapping[str, Any], operation_id: str) -> tuple[str, str, Mapping[str, Any]]:
    """Path, method and path item of an operation. Raises ValueError naming those there are."""
    known = []
    for path, item in (document.get("paths") or {}).items():
        for method in METHODS:
            if method in item:
                name = item[method].get("operationId")
                if name == operation_id:
                    return path, method, item
                known.append(str(name))
    raise ValueError(f"there is no operation {operation_id!r}: there are {', '.join(known[:50])}")


def resolved(document: Mapping[str, Any], value: Any) -> Any:
    """The value, or what its `$ref` leads to within the document. Raises ValueError."""
    seen = set()
    while isinstance(value, dict) and "$ref" in value:
        reference = value["$ref"]
        if not reference.startswith("#/") or reference in seen:
            raise ValueError(f"$ref {reference!r} leads out of the document, or to itself")
        seen.add(reference)
        value = document
        for step in reference[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(value, dict) or step not in value:
                raise ValueError(f"$ref {reference!r} leads nowhere")
            value = value[step]
    return value


def merged(
    document: Mapping[str, Any], of_path: Iterable[Any], of_operation: Iterable[Any]
) -> list[dict[str, Any]]:
    """The parameters that are arguments: an operation's own go before its path's."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for given in (*of_path, *of_operation):
        parameter = resolved(document, given)
        rows[(parameter["in"], parameter["name"])] = parameter
    return [
        row
        for (place, name), row in rows.items()
        if not (place == "header" and name.lower() in NOT_ARGUMENTS)
        and not (place == "cookie" and not row.get("required"))
    ]


def parameter_of(given: Mapping[str, Any]) -> Parameter:
    place, name = given["in"], given["name"]
    if place not in STYLES:
        raise ValueError(f"parameter {name!r} is in {place!r}, which tools don't send")
    style = given.get("style", STYLES[place])
    if "schema" not in given or style != STYLES[place] or given["schema"].get("type") == "object":
        raise ValueError(f"parameter {name!r}: only plain values and lists of them can be sent")
    if place == "header" and name.lower() in RESERVED:
        raise ValueError(f"parameter {name!r}: this header is the connection's own")
    return Parameter(
        name, place, bool(given.get("required")), given.get("explode", place == "query")
    )


def described(schema: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with the parameter's description, where it has none of its own."""
    text = given.get("description")
    return {"description": text, **schema} if text and "$ref" not in schema else schema


def json_of(given: Mapping[str, Any], where: str) -> Any:
    """The schema of its JSON. Raises ValueError where there is another type only."""
    content = given.get("content") or {}
    for kind, media in content.items():
        if is_json(kind):
            return media.get("schema", {})
    raise ValueError(f"{where} is {', '.join(content) or 'nothing'}, not JSON")


def is_json(kind: str) -> bool:
    plain = kind.partition(";")[0].strip().lower()
    return plain == "application/json" or plain.endswith("+json")


def responses_of(
    document: Mapping[str, Any], operation: Mapping[str, Any], schemas: "Schemas"
) -> Iterable[tuple[str, Mapping[str, Any] | None]]:
    for status, given in (operation.get("responses") or {}).items():
        content = resolved(document, given).get("content") or {}
        found = next(
            (media.get("schema") for kind, media in content.items() if is_json(kind)), None
        )
        schema = None if found is None else checked(schemas.with_defs(schemas.convert(found)))
        yield str(status).upper() if str(status) != "default" else "default", schema


def checked(schema: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError where it is no valid JSON schema."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"a schema is not valid: {error.message[:300]}") from None
    return schema


class Schemas:
    """Schemas of the document as JSON Schema has them; components that they name are kept."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.components = (document.get("components") or {}).get("schemas") or {}
        self.defs: dict[str, Any] = {}

    def with_defs(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema with the components that it leads to."""
        wanted: dict[str, Any] = {}
        left = list(references(schema))
        while left:
            name = left.pop()
            if name not in wanted:
                wanted[name] = self.defs[name]
                left += references(self.defs[name])
        return {**schema, "$defs": wanted} if wanted else schema

    def convert(self, schema: Any) -> Any:
        """Raises ValueError for a reference that leads out of the components."""
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return {"$ref": self.name(schema["$ref"])}
        made = {name: self.part(name, value) for name, value in schema.items()}
        made = {name: v for name, v in made.items() if name not in DROPPED and name[:2] != "x-"}
        for name, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if isinstance(is_exclusive := made.get(name), bool):
                del made[name]
                if is_exclusive:
                    made[name] = made.pop(bound)
        return nullable(made) if schema.get("nullable") is True else made

    def part(self, name: str, value: Any) -> Any:
        if name in OF_ONE:
            return self.convert(value)
        if name in OF_LIST:
            return [self.convert(each) for each in value]
        if name in BY_NAME:
            return {key: self.convert(each) for key, each in value.items()}
        return value

    def name(self, reference: str) -> str:
        """The reference within `$defs`."""
        name = reference.removeprefix(COMPONENTS)
        if name == reference or "/" in name or name not in self.components:
            raise ValueError(f"$ref {reference!r}: only {COMPONENTS}… that are there can be used")
        if name not in self.defs:
            self.defs[name] = None
            self.defs[name] = self.convert(self.components[name])
        return f"#/$defs/{name}"


def references(value: Any) -> Iterable[str]:
    """The names in `$defs` that a converted schema refers to."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name == "$ref" and isinstance(each, str):
                yield each.removeprefix("#/$defs/")
            elif name != "$defs":
                yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    if not isinstance(kind, str):
        return {"anyOf": [schema, {"type": "null"}]}
    made = {**schema, "type": [kind, "null"]}
    return made if "enum" not in made else {**made, "enum": [*made["enum"], None]}


# --- Making the request ---------------------------------------------------------------------------


def call(operation: Operation, values: Mapping[str, Any]) -> Call:
    """The request of a call whose arguments fit. Raises `BadArguments`."""
    path = operation.path
    query: list[tuple[str, str]] = []
    headers: dict[str, str] = {}
    for parameter in operation.parameters:
        value = values.get(parameter.name)
        if value is None:
            continue
        texts = written(parameter.name, value)
        if parameter.place == "path":
            path = path.replace(f"{{{parameter.name}}}", segment(parameter.name, texts))
        elif parameter.place == "header":
            headers[parameter.name] = header(parameter.name, texts)
        elif parameter.explodes:
            query += [(parameter.name, text) for text in texts]
        else:
            query.append((parameter.name, ",".join(texts)))
    if "{" in path:
        raise BadArguments(f"the path {operation.path} lacks a value")
    payload = None
    if operation.has_body and BODY in values:
        payload = orjson.dumps(values[BODY])
    return Call(path + ("?" + urlencode(query) if query else ""), headers, payload)


def written(name: str, value: Any) -> list[str]:
    """A plain value or a list of them as texts. Raises `BadArguments`."""
    found = value if isinstance(value, list) else [value]
    if any(isinstance(each, dict | list) for each in found):
        raise BadArguments(f"{name}: give a plain value, or a list of them")
    return [each if isinstance(each, str) else orjson.dumps(each).decode() for each in found]


def segment(name: str, texts: list[str]) -> str:
    """A value in a path, where it can't lead anywhere else. Raises `BadArguments`."""
    text = ",".join(quote(each, safe="") for each in texts)
    if text in ("", ".", ".."):
        raise BadArguments(f"{name}: {','.join(texts)!r} can't be part of a path")
    # What is left of braces is a placeholder.
    return text


def header(name: str, texts: list[str]) -> str:
    text = ",".join(texts)
    if not (text.isascii() and text.isprintable()):
        raise BadArguments(f"{name}: give printable ASCII characters")
    return text
