"""Prompts: which version a reference stands for, and what it says with its variables put in.

    greet            what is labelled production, or canary for its share
    greet@3          version 3
    greet@staging    what is labelled so

`{{ name }}` is looked up and put in, nothing else: text as it is, any other value as JSON. What was
put in is never read as a template again. `\\{{` is a plain `{{`.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import jsonschema  # type: ignore[import-untyped]
import orjson
from django.core.exceptions import ValidationError
from django.core.validators import RegexValidator
from django.db import transaction
from django.db.models import Max
from pydantic import ValidationError as PydanticError
from referencing import Registry
from referencing.exceptions import Unresolvable

from llmtasks import bodies
from llmtasks.errors import InvalidInput, NotFound
from llmtasks.models import Kind, Prompt, PromptLabel, PromptVersion
from llmtasks.models.prompts import LABEL, NAME
from providers.types import Request

REFERENCE = re.compile(r"([a-z][a-z0-9-]{0,62})(?:@([1-9][0-9]{0,8}|[a-z][a-z0-9-]{0,31}))?\Z")
PLACEHOLDER = re.compile(r"\\\{\{|\{\{(.*?)(?:\}\}|\Z)", re.DOTALL)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
ROLES = ("system", "developer", "user", "assistant")
# What a prompt decides where the caller does not. What is asked, by whom and when is the caller's.
PARAMETERS = frozenset(
    {
        "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens",
        "parallel_tool_calls", "presence_penalty", "reasoning_effort", "response_format", "seed",
        "service_tier", "stop", "temperature", "thinking", "top_p", "verbosity",
    }
)  # fmt: skip
# Those that are called the same in our vocabulary.
SAME = PARAMETERS - {
    "max_completion_tokens", "max_tokens", "response_format", "stop", "thinking", "verbosity",
}  # fmt: skip
# Keywords by which a schema could reach elsewhere, or take for ever.
REFUSED_KEYWORDS = frozenset({"$ref", "$dynamicRef", "$id", "pattern", "patternProperties"})
MAX_MESSAGES = 100
MAX_TEMPLATE = 200_000
MAX_VARIABLES = 100
MAX_RENDERED = 2_000_000


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat's part that a prompt gives: `reference` is the exact version, `name@number`."""

    reference: str
    messages: list[dict[str, str]]
    model: str
    parameters: Mapping[str, Any]


# --- Which version ------------------------------------------------------------------------------


def rendered(tenant_id: UUID, reference: str, variables: Mapping[str, Any], whose: str) -> Rendered:
    """The prompt with its variables. `whose` decides between production and canary: the same text
    gets the same. Raises NotFound, InvalidInput."""
    version = chosen(tenant_id, reference, whose)
    values = checked_values(version, variables)
    messages = [
        {"role": message["role"], "content": filled(message["content"], values)}
        for message in version.messages
    ]
    if sum(len(message["content"]) for message in messages) > MAX_RENDERED:
        raise InvalidInput(
            f"variables: the prompt with its variables is longer than {MAX_RENDERED} characters",
            param="variables",
        )
    return Rendered(str(version), messages, version.model, version.parameters)


def chosen(tenant_id: UUID, reference: str, whose: str) -> PromptVersion:
    """The version that a reference stands for. Raises NotFound, InvalidInput."""
    found = REFERENCE.match(reference)
    if found is None:
        raise InvalidInput(
            f"prompt: {reference[:100]!r} is none: write name, name@3 or name@label", param="prompt"
        )
    name, wanted = found[1], found[2] or PromptLabel.PRODUCTION
    if wanted[0].isdigit():
        versions = PromptVersion.objects.select_related("prompt")
        rows = versions.filter(prompt__tenant_id=tenant_id, prompt__name=name, number=int(wanted))
        return rows.first() or missing(tenant_id, name, wanted)
    labels = PromptLabel.objects.select_related("version__prompt")
    of = {row.name: row for row in labels.filter(prompt__tenant_id=tenant_id, prompt__name=name)}
    if wanted not in of:
        missing(tenant_id, name, wanted)
    canary = of.get(PromptLabel.CANARY)
    if wanted == PromptLabel.PRODUCTION and canary is not None:
        if bucket(canary.prompt_id, whose) < canary.share:
            return canary.version
    return of[wanted].version


def bucket(prompt_id: UUID, whose: str) -> int:
    """0 to 99, evenly, and the same whenever it is asked for. Raising a share moves nobody out."""
    digest = hashlib.sha256(prompt_id.bytes + whose.encode()).digest()
    return int.from_bytes(digest[:8]) % 100


def missing(tenant_id: UUID, name: str, wanted: str) -> PromptVersion:
    """Raises NotFound, saying what there is."""
    prompt = Prompt.objects.filter(tenant_id=tenant_id, name=name).first()
    if prompt is None:
        raise NotFound(f"there is no prompt {name!r}: GET /v1/prompts lists yours", param="prompt")
    names = [row.name for row in prompt.labels.all()]
    newest = prompt.versions.aggregate(most=Max("number"))["most"]
    known = ", ".join([*names, f"versions up to {newest}"])
    raise NotFound(f"there is no {name}@{wanted}: there is {known}", param="prompt")


# --- What it says -------------------------------------------------------------------------------


def filled(text: str, values: Mapping[str, Any]) -> str:
    """The text with its placeholders replaced, in one pass."""

    def value_of(found: "re.Match[str]") -> str:
        if found[1] is None:
            return "{{"
        value = values[found[1].strip()]
        return value if isinstance(value, str) else orjson.dumps(value).decode()

    return PLACEHOLDER.sub(value_of, text)


def names_in(text: str) -> Iterator[str]:
    """The variables of a text. Raises ValueError for a placeholder that names none."""
    for found in PLACEHOLDER.finditer(text):
        if found[1] is None:
            continue
        name = found[1].strip()
        if not found[0].endswith("}}") or not VARIABLE.match(name):
            raise ValueError(
                f"{found[0][:80]!r} names no variable: write {{{{ name }}}}, or \\{{{{ for the"
                " plain characters"
            )
        yield name


def checked_values(version: PromptVersion, given: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with their defaults. Raises InvalidInput naming the one that is missing, not
    known or no good."""
    known = properties_of(version.variables)
    for name in given:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise InvalidInput(
                f"variables.{name}: {version} has no such variable: it has {listed}",
                param=f"variables.{name}"[:100],
            )
    values = {name: schema["default"] for name, schema in known.items() if "default" in schema}
    values |= given
    for name in known:
        if name not in values:
            raise InvalidInput(
                f"variables.{name}: {version} needs this variable", param=f"variables.{name}"
            )
    check_against(version.variables, values)
    return values


def check_against(schema: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    try:
        fault = next(validator(schema).iter_errors(values), None)
    except (RecursionError, Unresolvable):
        raise InvalidInput("variables: they can't be checked", param="variables") from None
    if fault is not None:
        place = ".".join(("variables", *map(str, fault.absolute_path)))
        raise InvalidInput(f"{place}: {fault.message[:300]}", param=place[:100])


def validator(schema: Mapping[str, Any]) -> Any:
    """One that fetches nothing, whatever a schema refers to."""
    return jsonschema.Draft202012Validator(schema, registry=Registry())


def properties_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    return dict(schema.get("properties", {}))


# --- A call of its own ----------------------------------------------------------------------------


def request_of(found: Rendered, model: str = "") -> Request:
    """The call that a prompt makes where nobody says more. Raises InvalidInput."""
    if not (model := model or found.model):
        raise fault("model", f"{found.reference} has none: give one")
    said = [
        {"role": message["role"], "parts": [{"type": "text", "text": message["content"]}]}
        for message in found.messages
    ]
    values = {"model": model, "messages": said, **as_stored(found.parameters)}
    try:
        request: Request = bodies.load_request(Kind.CHAT, values)
    except PydanticError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(("parameters", *map(str, first["loc"])))
        raise fault(place[:100], first["msg"]) from None
    return request


def as_stored(given: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's parameters, as OpenAI's bodies have them, in our vocabulary."""
    found = {name: value for name, value in given.items() if name in SAME}
    length = given.get("max_completion_tokens", given.get("max_tokens"))
    if length is not None:
        found["max_output_tokens"] = length
    if (stop := given.get("stop")) is not None:
        found["stop"] = [stop] if isinstance(stop, str) else stop
    if isinstance(form := given.get("response_format"), dict):
        of = form.get("json_schema")
        found["response_format"] = {"type": form.get("type")} | (of if isinstance(of, dict) else {})
    if isinstance(thinking := given.get("thinking"), dict) and "budget_tokens" in thinking:
        found["thinking_budget"] = thinking["budget_tokens"]
    if (verbosity := given.get("verbosity")) is not None:
        found["extra"] = {"verbosity": verbosity}
    return found


# --- A new version --------------------------------------------------------------------------------


def check_content(
    messages: Any, variables: Any, parameters: Any
) -> tuple[list[dict[str, str]], dict[str, Any], dict[str, Any]]:
    """What a version may hold, made whole: variables that have no schema take any value. Raises
    InvalidInput."""
    # From a form there may be what no column takes.
    messages, variables, parameters = bodies.replaced([messages, variables, parameters])
    texts = check_messages(messages)
    schema = check_schema({} if variables is None else variables)
    known = schema.setdefault("properties", {})
    for index, message in enumerate(texts):
        try:
            found = list(names_in(message["content"]))
        except ValueError as error:
            raise fault(f"messages[{index}].content", str(error)) from None
        for name in found:
            if variables and name not in known:
                raise fault(f"messages[{index}].content", f"{name} is not among the variables")
            known.setdefault(name, {})
    if len(known) > MAX_VARIABLES:
        raise fault("variables", f"more than {MAX_VARIABLES}")
    return texts, schema, check_parameters({} if parameters is None else parameters)


def fault(place: str, message: str) -> InvalidInput:
    return InvalidInput(f"{place}: {message}", param=place)


def check_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise fault("messages", f"give a list of 1 to {MAX_MESSAGES} messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise fault(f"messages[{index}]", 'give {"role": …, "content": …}')
        if message["role"] not in ROLES:
            raise fault(f"messages[{index}].role", f"give one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str) or not message["content"]:
            raise fault(f"messages[{index}].content", "give a text")
    if sum(len(message["content"]) for message in messages) > MAX_TEMPLATE:
        raise fault("messages", f"they are longer than {MAX_TEMPLATE} characters")
    return messages


def check_schema(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise fault("variables", "give a JSON schema of an object, with `properties`")
    if schema.get("type", "object") != "object":
        raise fault("variables.type", "variables are an object")
    for keyword in keywords_of(schema):
        if keyword in REFUSED_KEYWORDS:
            raise fault("variables", f"the keyword {keyword} can't be used here")
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        place = ".".join(("variables", *map(str, error.absolute_path)))
        raise fault(place[:100], error.message[:300]) from None
    for name, of in schema.get("properties", {}).items():
        if not VARIABLE.match(name):
            raise fault("variables.properties", f"{name[:80]!r} is no name of a variable")
        if not isinstance(of, dict):
            raise fault(f"variables.properties.{name}", "give a schema as an object")
    return dict(schema, type="object")


def keywords_of(value: Any) -> Iterator[str]:
    """Every name in a schema, those of properties too: a variable can't be called `$ref`."""
    if isinstance(value, dict):
        for name, of in value.items():
            yield name
            yield from keywords_of(of)
    elif isinstance(value, list):
        for of in value:
            yield from keywords_of(of)


def check_parameters(parameters: Any) -> dict[str, Any]:
    if not isinstance(parameters, dict):
        raise fault("parameters", "give an object")
    for name in parameters:
        if name not in PARAMETERS:
            listed = ", ".join(sorted(PARAMETERS))
            raise fault(f"parameters.{name}"[:100], f"a prompt can't set this; it can set {listed}")
    request_of(Rendered("", [], "any", parameters))
    return parameters


def add_version(
    tenant_id: UUID,
    name: str,
    *,
    messages: Any,
    variables: Any = None,
    model: str = "",
    parameters: Any = None,
    description: str | None = None,
    note: str = "",
    labels: Sequence[str] = (),
    by: str = "",
) -> tuple[PromptVersion, bool]:
    """The prompt's next version, or its last where that says the same; whether it is new. Raises
    InvalidInput."""
    check_name("name", NAME, name)
    texts, schema, given = check_content(messages, variables, parameters)
    says = {"messages": texts, "variables": schema, "model": model, "parameters": given}
    with transaction.atomic():
        prompt, _ = Prompt.objects.get_or_create(tenant_id=tenant_id, name=name)
        # Whoever adds another at the same time waits here.
        prompt = Prompt.objects.select_for_update().get(id=prompt.id)
        if description is not None and description != prompt.description:
            Prompt.objects.filter(id=prompt.id).update(description=description)
        last = prompt.versions.order_by("-number").first()
        if last is not None and {key: getattr(last, key) for key in says} == says:
            version, is_new = last, False
        else:
            number = last.number + 1 if last else 1
            version = PromptVersion(prompt=prompt, number=number, note=note, created_by=by, **says)
            version.save(force_insert=True)
            is_new = True
        for label in labels:
            put_label(version, label, by=by)
    return version, is_new


def check_name(place: str, rule: RegexValidator, name: str) -> None:
    try:
        rule(name)
    except ValidationError as error:
        raise fault(place, error.messages[0]) from None


def put_label(version: PromptVersion, name: str, *, share: int | None = None, by: str = "") -> None:
    """Have the label stand for the version. A canary's share stays where none is given. Raises
    InvalidInput."""
    check_name("label", LABEL, name)
    if share is not None and name != PromptLabel.CANARY:
        raise fault("share", f"only {PromptLabel.CANARY} has a share")
    fields: dict[str, Any] = {"version": version, "changed_by": by}
    if share is not None:
        fields["share"] = share
    PromptLabel.objects.update_or_create(prompt_id=version.prompt_id, name=name, defaults=fields)


def drop_label(tenant_id: UUID, prompt: str, name: str) -> bool:
    """Whether there was one."""
    rows = PromptLabel.objects.filter(prompt__tenant_id=tenant_id, prompt__name=prompt, name=name)
    return rows.delete()[0] > 0
