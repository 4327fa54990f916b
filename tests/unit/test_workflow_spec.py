"""What a declaration may be, and what is told where it is wrong. No stores."""

from typing import Any

import pytest

from llmtasks.errors import InvalidInput
from llmtasks.workflows import checks, spec
from llmtasks.workflows.templates import BadTemplate, MissingValue, references, render
from llmtasks.workflows.transform import BadOutput, apply
from llmtasks.workflows.words import holds, likeness, named


def prompt(name: str | None = None, text: str = "x", **fields: Any) -> dict[str, Any]:
    named_ = {} if name is None else {"name": name}
    return {"kind": "prompt", "model": "echo", "text": text, **named_, **fields}


def pipeline(*stages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"kind": "pipeline", "stages": list(stages), **fields}


def parallel(**fields: Any) -> dict[str, Any]:
    return {"kind": "parallel", **fields}


def fault_of(do: dict[str, Any], **fields: Any) -> tuple[str | None, str]:
    with pytest.raises(InvalidInput) as caught:
        checks.check_shape(spec.parse({"do": do, **fields}))
    return caught.value.param, caught.value.message


CHOICES = [{"name": "a", "do": prompt(), "when": {"equals": 1}}]
SPLIT = {"planner": prompt(), "worker": prompt(), "max_workers": 10}


@pytest.mark.parametrize(
    ("do", "param", "about"),
    [
        ({"kind": "nothing"}, "do.kind", "give a block"),
        (prompt(temperature="hot"), "do.temperature", "number"),
        (prompt(speed=1), "do.speed", "not permitted"),
        (prompt(text="{{ input.a"), "do.text", "no placeholder"),
        (prompt(text="{{ 1 + 1 }}"), "do.text", "no placeholder"),
        (prompt(text="{{ inputs.a }}"), "do.text", "write input.<name>"),
        (prompt(text="{{ item }}"), "do.text", "there is no item here"),
        (prompt(text="{{ steps.a }}"), "do.text", "write steps.<name>.output"),
        (prompt(messages=[{"role": "user", "content": "x"}]), "do.text", "either"),
        (prompt(prompt="greet"), "do.text", "either"),
        ({"kind": "prompt", "text": "x"}, "do.model", "required"),
        ({"kind": "prompt", "prompt": "greet", "system": "x"}, "do.system", "prompt has its own"),
        ({"kind": "prompt", "prompt": "Greet!"}, "do.prompt", "pattern"),
        (prompt(variables={"a": 1}), "do.variables", "go with a prompt"),
        (
            {"kind": "prompt", "prompt": "greet", "variables": {"a": "{{ steps.x.output }}"}},
            "do.variables", "there is no step",
        ),
        (prompt(answer_schema={"type": "nothing"}), "do.answer_schema", "no JSON schema"),
        (prompt(on_error="default"), "do.default", "on_error: default"),
        (prompt(default=1), "do.default", "on_error: default"),
        (prompt(retries=11), "do.retries", "10"),
        (pipeline(prompt()), "do.stages[0].name", "needs a name"),
        (pipeline(prompt("a"), prompt("a")), "do.stages[1].name", "there are two"),
        (pipeline(prompt("a", "{{ steps.b.output }}"), prompt("b")), "do.stages[0].text", "cycle"),
        (pipeline(prompt("a", "{{ steps.a.output }}")), "do.stages[0].text", "cycle"),
        (pipeline(prompt("a"), output="{{ steps.c.output }}"), "do.output", "there is a"),
        (
            pipeline(prompt("a"), pipeline(prompt("a"), name="b")),
            "do.stages[1].stages[0].name", "around it",
        ),
        (
            pipeline(prompt("a"), pipeline(prompt("c", "{{ steps.d.output }}"), name="b"),
                     prompt("d")),
            "do.stages[1].stages[0].text", "cycle",
        ),
        (parallel(), "do", "give one of"),
        (parallel(branches=[prompt()]), "do.branches[0].name", "needs a name"),
        (parallel(items=[1], do=prompt()), "do.max_items", "unbounded fan-out"),
        (parallel(items=[1], max_items=10**6, do=prompt()), "do.max_items", "100000"),
        (parallel(copies=3), "do.do", "need it"),
        (parallel(copies=3, do=prompt(), vote={"quorum": 4}), "do.vote.quorum", "3 voters"),
        (parallel(items=[1], max_items=2, do=prompt(), vote={"quorum": 1}), "do.vote", "vote"),
        (parallel(copies=3, do=prompt(), max_concurrency=0), "do.max_concurrency", "1"),
        (
            parallel(items=[1], max_items=1000, do=parallel(items=[1], max_items=1000,
                                                            do=prompt())),
            "do", "it may make",
        ),
        ({"kind": "route", "by": "rule", "on": "x", "model": "m", "choices": CHOICES}, "do.model",
         "a rule has none"),
        ({"kind": "route", "by": "classifier", "on": "x", "choices": CHOICES}, "do.model", "need"),
        ({"kind": "route", "by": "embedding", "on": "x", "model": "m", "choices": CHOICES},
         "do.choices[0].when", "has no when"),
        ({"kind": "route", "by": "rule", "on": "x", "choices": [*CHOICES, *CHOICES]},
         "do.choices[1].name", "two"),
        ({"kind": "route", "by": "rule", "on": "x",
          "choices": [{"name": "a", "do": prompt(), "when": {}}]}, "do.choices[0].when", "give"),
        ({"kind": "orchestrator", "planner": prompt(), "worker": prompt()}, "do.max_workers",
         "required"),
        ({"kind": "orchestrator", **SPLIT, "join": prompt(text="{{ item }}")}, "do.join.text",
         "no item here"),
        ({"kind": "evaluate", "generate": prompt(), "critique": prompt(), "good": {}}, "do.good",
         "give equals"),
        ({"kind": "transform", "value": 1, "do": [{"op": "eval"}]}, "do.do[0].op", "lines"),
        ({"kind": "transform", "value": 1, "do": [{"op": "split"}]}, "do.do[0].by", "required"),
        ({"kind": "workflow", "workflow": "Big"}, "do.workflow", "match"),
    ],
)  # fmt: skip
def test_wrong_declarations_name_the_field(do: dict[str, Any], param: str, about: str) -> None:
    found, message = fault_of(do)
    assert found == param, message
    assert about in message


def test_variables_are_known() -> None:
    variables = {"properties": {"a": {"type": "string"}}}
    param, message = fault_of(prompt(text="{{ input.b }}"), variables=variables)
    assert param == "do.text"
    assert "there is no variable 'b': there is a" in message
    assert fault_of(prompt(), variables={"type": 7})[0] == "variables"


def test_nesting_is_bounded() -> None:
    do = prompt("s0")
    for depth in range(12):
        do = pipeline(do, name=f"s{depth + 1}")
    assert "nested more than 10" in fault_of(do)[1]


def test_blocks_are_bounded() -> None:
    stages = [pipeline(*[prompt(f"b{n}_{m}") for m in range(40)], name=f"a{n}") for n in range(40)]
    assert "more than 1000 blocks" in fault_of(pipeline(*stages))[1]


def test_in_python_it_is_the_same_as_in_json() -> None:
    built = spec.Workflow(
        do=spec.Pipeline(
            stages=[
                spec.Prompt(name="a", model="echo", text="{{ input.x }}"),
                spec.Parallel(
                    name="b",
                    items="{{ steps.a.output }}",
                    max_items=5,
                    do=spec.Tool(tool="look_up", arguments={"order": None}),
                ),
            ]
        )
    )
    as_json = {
        "do": {
            "kind": "pipeline",
            "stages": [
                {"kind": "prompt", "name": "a", "model": "echo", "text": "{{ input.x }}"},
                {
                    "kind": "parallel", "name": "b", "items": "{{ steps.a.output }}",
                    "max_items": 5,
                    "do": {"kind": "tool", "tool": "look_up", "arguments": {"order": None}},
                },
            ],
        }
    }  # fmt: skip
    assert spec.as_json(built) == as_json
    assert spec.as_json(spec.parse(as_json)) == as_json


def test_a_block_takes_along_what_it_needs_and_nothing_else() -> None:
    inner = spec.parse(
        {
            "do": pipeline(
                prompt("a", "{{ input.x }} {{ item.title }}"),
                prompt("b", "{{ steps.a.output }} {{ steps.before.output }}"),
                parallel(name="c", items="{{ input.y }}", max_items=2,
                         do=prompt(text="{{ item }} {{ index }}")),
                output="{{ steps.b.output }} {{ draft }}",
            )
        }
    ).do  # fmt: skip
    assert checks.needs(inner) == {
        ("input", "x"), ("input", "y"), ("steps", "before"), ("item",), ("draft",),
    }  # fmt: skip


# --- Templates ------------------------------------------------------------------------------------

SCOPE = {
    "input": {"text": "a {{ input.secret }}", "list": [{"n": 1}, "b"], "none": None, "n": 5},
    "steps": {"one": {"output": {"a-b": True}}},
}


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("plain", "plain"),
        ("{{ input.n }}", 5),
        (" {{input.n}} ", 5),
        ("{{ input.n }}{{ input.n }}", "55"),
        ("n={{ input.n }}", "n=5"),
        ("{{ input.list }}", [{"n": 1}, "b"]),
        ("{{ input.list.0.n }}", 1),
        ("is {{ input.list }}", 'is [{"n":1},"b"]'),
        ("<{{ input.none }}>", "<>"),
        ("{{ steps.one.output.a-b }}", True),
        ("{{ input.text }}!", "a {{ input.secret }}!"),
        ("\\{{ input.n }}", "{{ input.n }}"),
        ({"a": ["{{ input.n }}", 1, None]}, {"a": [5, 1, None]}),
    ],
)
def test_what_templates_become(template: Any, value: Any) -> None:
    assert render(template, SCOPE) == value


@pytest.mark.parametrize(
    ("template", "about"),
    [
        ("{{ input.nothing }}", "input has no 'nothing'"),
        ("{{ input.list.7 }}", "input.list has no '7'"),
        ("{{ input.n.real }}", "input.n has no 'real'"),
        ("{{ other }}", "what is known here has no 'other'"),
        ("{{ input.text.__class__ }}", "input.text has no '__class__'"),
    ],
)
def test_what_is_missing(template: str, about: str) -> None:
    with pytest.raises(MissingValue, match=about):
        render(template, SCOPE)


@pytest.mark.parametrize("text", ["{{ }}", "{{ a b }}", "{{ a", "{{ a[0] }}", "{{ a() }}"])
def test_what_is_no_placeholder(text: str) -> None:
    with pytest.raises(BadTemplate):
        list(references(text))


def test_a_text_that_grows_too_long() -> None:
    scope = {"input": {"x": "x" * 1_000_000}}
    with pytest.raises(MissingValue, match="longer than"):
        render("{{ input.x }} " * 20, scope)


# --- Transforms and words -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "operations", "result"),
    [
        ('{"a": 1}', [{"op": "json"}], {"a": 1}),
        ("```json\n[1]\n```", [{"op": "json"}, {"op": "count"}], 1),
        ({"a": 1}, [{"op": "text"}], '{"a":1}'),
        (" A ", [{"op": "strip"}, {"op": "lower"}], "a"),
        ("a\nb", [{"op": "lines"}], ["a", "b"]),
        ("a, b", [{"op": "split", "by": ", "}, {"op": "join", "by": "-"}], "a-b"),
        ("abcde", [{"op": "chunk", "size": 2}], ["ab", "cd", "e"]),
        ([1, 2, 3], [{"op": "first", "size": 2}], [1, 2]),
        ([{"a": {"b": 1}}], [{"op": "pick", "path": "a.b", "each": True}], [1]),
        ({"a": [5]}, [{"op": "pick", "path": "a.0"}], 5),
        ([[1], 2, [3, 1]], [{"op": "flatten"}, {"op": "unique"}], [1, 2, 3]),
        ([None, "", 0, "a"], [{"op": "compact"}], [0, "a"]),
    ],
)
def test_operations(value: Any, operations: list[Any], result: Any) -> None:
    block = spec.Transform.model_validate({"value": value, "do": operations})
    assert apply(block.value, block.do) == result


@pytest.mark.parametrize(
    ("value", "operation", "about"),
    [
        ("{", {"op": "json"}, "no JSON"),
        (1, {"op": "lines"}, "needs a text, not a number"),
        ("a", {"op": "join", "by": ","}, "needs a list, not a text"),
        ({}, {"op": "chunk", "size": 1}, "a text or a list, not an object"),
        ("a" * 200_000, {"op": "chunk", "size": 1}, "more than 100000 pieces"),
        ("a" * 5_000_000, {"op": "lower"}, "larger than"),
    ],
)
def test_operations_that_can_not_be(value: Any, operation: Any, about: str) -> None:
    block = spec.Transform.model_validate({"value": "", "do": [operation]})
    with pytest.raises(BadOutput, match=about):
        apply(value, block.do)


@pytest.mark.parametrize(
    ("rule", "value", "is_so"),
    [
        ({"equals": "Yes"}, " yes ", True),
        ({"equals": None}, None, True),
        ({"equals": 1}, "1", False),
        ({"contains": "REFUND"}, "a refund, please", True),
        ({"contains": "a"}, ["b", "A"], True),
        ({"one_of": ["x", 2]}, 2, True),
        ({"less": 5, "greater": 3}, 4, True),
        ({"less": 5}, 5, False),
        ({"greater": 0}, True, False),
        ({"less": 5}, "4", False),
    ],
)
def test_rules(rule: dict[str, Any], value: Any, is_so: bool) -> None:
    assert holds(spec.Rule.model_validate(rule), value) is is_so


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("refund", "refund"),
        (" **Refund.** ", "refund"),
        ("It is a refund, I think", "refund"),
        ("refund or order", None),
        ("refunds", None),
        ("", None),
    ],
)
def test_the_choice_that_a_text_names(text: str, found: str | None) -> None:
    assert named(text, ["refund", "order"]) == found


def test_likeness() -> None:
    assert likeness([1, 0], [2, 0]) == pytest.approx(1)
    assert likeness([1, 0], [0, 3]) == 0
    assert likeness([0, 0], [0, 3]) == 0
