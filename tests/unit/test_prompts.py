"""What a prompt may say, and what it says with its variables."""

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtasks import prompts
from llmtasks.api.prompts import merged
from llmtasks.errors import InvalidInput
from llmtasks.models import Prompt, PromptVersion
from llmtasks.prompts import Rendered

USER = [{"role": "user", "content": "Hello {{ name }}"}]


def version(messages: Any = USER, variables: Any = None, **fields: Any) -> PromptVersion:
    texts, schema, _ = prompts.check_content(messages, variables, None)
    return PromptVersion(
        prompt=Prompt(name="greet"), number=3, messages=texts, variables=schema, **fields
    )


# --- substitution ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("Hello {{ name }}", {"name": "Ann"}, "Hello Ann"),
        ("{{name}}{{name}}", {"name": "x"}, "xx"),
        ("{{ n }} {{ b }} {{ o }}", {"n": 1.5, "b": True, "o": {"a": [1]}}, '1.5 true {"a":[1]}'),
        (r"\{{ name }} {single} }}", {}, "{{ name }} {single} }}"),
        # What is put in is not read again.
        ("{{ a }}", {"a": "{{ b }}", "b": "no"}, "{{ b }}"),
        ("{{ a }}", {"a": r"\{{ x {0} %s ${y}"}, r"\{{ x {0} %s ${y}"),
    ],
)
def test_a_variable_is_put_in_as_it_is(text: str, values: Any, expected: str) -> None:
    assert prompts.filled(text, values) == expected


@given(st.text(), st.text())
def test_whatever_is_put_in_stays_as_it_is(before: str, value: str) -> None:
    plain = before.replace("{", "").replace("\\", "")
    assert prompts.filled(plain + "{{ v }}", {"v": value}) == plain + value


@pytest.mark.parametrize(
    "text", ["{{ }}", "{{ a.b }}", "{{ a|upper }}", "{{ __import__('os') }}", "{{ a", "{{ 1a }}"]
)
def test_anything_but_a_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"messages\[0\].content: .* names no variable"):
        prompts.check_content([{"role": "user", "content": text}], None, None)


# --- variables ------------------------------------------------------------------------------------

SCHEMA = {
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "tone": {"enum": ["kind", "short"], "default": "kind"},
    }
}


def test_defaults_are_taken_where_nothing_is_given() -> None:
    values = prompts.checked_values(version(variables=SCHEMA), {"name": "Ann"})
    assert values == {"name": "Ann", "tone": "kind"}


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({}, "variables.name", "variables.name: greet@3 needs this variable"),
        (
            {"name": "Ann", "nmae": 1},
            "variables.nmae",
            "variables.nmae: greet@3 has no such variable: it has name, tone",
        ),
        ({"name": 7}, "variables.name", "variables.name: 7 is not of type 'string'"),
        ({"name": "longer"}, "variables.name", "variables.name: 'longer' is too long"),
        ({"name": "Ann", "tone": "loud"}, "variables.tone", "variables.tone: 'loud' is not one"),
    ],
)
def test_a_variable_that_is_wrong_is_named(values: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        prompts.checked_values(version(variables=SCHEMA), values)
    assert caught.value.param == param
    assert caught.value.message.startswith(message)


def test_without_a_schema_every_variable_takes_any_value() -> None:
    made = version([{"role": "user", "content": "{{ a }} and {{ b }}"}])
    assert made.variables == {"type": "object", "properties": {"a": {}, "b": {}}}
    assert prompts.checked_values(made, {"a": 1, "b": [2]}) == {"a": 1, "b": [2]}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "variables: give a JSON schema"),
        ({"type": "array"}, "variables.type: variables are an object"),
        ({"properties": {"name": {"type": "nonsense"}}}, "variables.properties.name.type"),
        ({"properties": {"name": {"$ref": "http://10.0.0.1/"}}}, "variables: the keyword $ref"),
        ({"properties": {"name": {"pattern": "(a+)+$"}}}, "variables: the keyword pattern"),
        ({"properties": {"na me": {}}}, "variables.properties: 'na me' is no name"),
        ({"properties": {"name": True}}, "variables.properties.name: give a schema"),
        ({"properties": {"other": {}}}, "messages[0].content: name is not among the variables"),
    ],
)
def test_a_schema_that_is_wrong_is_told(schema: Any, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        prompts.check_content(USER, schema, None)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages[0]"),
        ([*USER, {"role": "tool", "content": "x"}], "messages[1].role"),
        ([{"role": "user", "content": ""}], "messages[0].content"),
        ([{"role": "user", "content": "x" * 200_001}], "messages"),
    ],
)
def test_messages_that_are_wrong_are_told(messages: Any, param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        prompts.check_content(messages, None, None)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"temperature": "hot"}, "parameters.temperature"),
        ({"max_tokens": [1]}, "parameters.max_output_tokens"),
        ({"stop": 5}, "parameters.stop"),
        ({"response_format": {"type": "nonsense"}}, "parameters.response_format.type"),
    ],
)
def test_a_parameter_that_is_wrong_is_told_at_once(parameters: Any, param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        prompts.check_content(USER, None, parameters)
    assert caught.value.param == param


def test_a_call_of_its_own_has_what_the_prompt_says() -> None:
    schema = {"type": "object"}
    given = {
        "temperature": 0.1, "max_tokens": 5, "stop": "END", "reasoning_effort": "low",
        "thinking": {"type": "enabled", "budget_tokens": 99}, "verbosity": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    }  # fmt: skip
    found = Rendered("greet@3", [{"role": "system", "content": "s"}], "smart", given)
    made = prompts.request_of(found)
    assert (made.model, made.messages[0].role, made.temperature) == ("smart", "system", 0.1)
    assert (made.max_output_tokens, made.stop, made.thinking_budget) == (5, ("END",), 99)
    assert (made.extra, made.reasoning_effort) == ({"verbosity": "low"}, "low")
    assert made.response_format is not None and made.response_format.schema == schema
    assert prompts.request_of(found, "other").model == "other"
    with pytest.raises(InvalidInput, match="greet@3 has none"):
        prompts.request_of(Rendered("greet@3", [], "", {}))


@pytest.mark.parametrize("parameters", [{"tools": []}, {"user": "x"}, {"stream": True}, []])
def test_what_is_the_callers_is_no_parameter(parameters: Any) -> None:
    with pytest.raises(InvalidInput, match="parameters"):
        prompts.check_content(USER, None, parameters)


# --- production and canary ------------------------------------------------------------------------


def test_the_same_user_gets_the_same_bucket_and_all_are_spread() -> None:
    prompt = UUID(int=7)
    found = [prompts.bucket(prompt, f"user-{number}") for number in range(10_000)]
    assert found == [prompts.bucket(prompt, f"user-{number}") for number in range(10_000)]
    assert set(found) == set(range(100))
    assert 900 < sum(bucket < 10 for bucket in found) < 1100
    other = [prompts.bucket(UUID(int=8), f"user-{number}") for number in range(10_000)]
    assert other != found


# --- a chat that names a prompt -------------------------------------------------------------------


def test_what_the_caller_gives_goes_before_the_prompts() -> None:
    found = Rendered("greet@3", [{"role": "system", "content": "s"}], "smart",
                     {"temperature": 0.1, "max_tokens": 5})  # fmt: skip
    asked = {"role": "user", "content": "hi"}
    given = {"prompt": "greet", "variables": {}, "model": "", "messages": [asked],
             "temperature": 0.9, "top_p": None}  # fmt: skip
    assert merged(given, found) == {
        "messages": [{"role": "system", "content": "s"}, asked],
        "model": "smart", "temperature": 0.9, "max_tokens": 5,
    }  # fmt: skip
    assert merged({"model": "other", "max_completion_tokens": 9}, found) == {
        "messages": [{"role": "system", "content": "s"}],
        "model": "other", "temperature": 0.1, "max_completion_tokens": 9,
    }  # fmt: skip
    assert merged({"messages": "no list"}, found)["messages"] == "no list"
