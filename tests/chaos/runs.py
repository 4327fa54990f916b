"""Agents and workflows with known steps: what each run has in the end, whoever died meanwhile."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SLOW, CLAUDE = "slow-200", "claude-slow-200"


@dataclass(frozen=True)
class Run:
    """`steps` and `tasks` of a whole run: of the task itself and of all below it. `output` holds
    whatever was interrupted."""

    kind: str
    make: Callable[[str], dict[str, Any]]
    steps: int
    tasks: int
    output: Callable[[str], Any]


def call(tool: str, key: str) -> dict[str, Any]:
    return {"name": tool, "arguments": {"key": key}}


def agent(*turns: list[dict[str, Any]], tools: list[str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": json.dumps(turns)}]
    return {"model": "script", "messages": messages, "tools": tools}


def workflow(block: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {"spec": {"do": block}, "input": given}


def prompt(name: str, text: str, model: str = SLOW, **fields: Any) -> dict[str, Any]:
    return {"kind": "prompt", "name": name, "model": model, "text": text, **fields}


# --- Agents ---------------------------------------------------------------------------------------


def critical(n: str) -> dict[str, Any]:
    together = [call("look_up", f"{n} a{i}") for i in range(4)]
    turns = [together, [call("charge", f"{n} b")], [call("look_up", f"{n} c")]]
    return agent(*turns, tools=["look_up", "charge"])


def background(n: str) -> dict[str, Any]:
    first = [call("mail", f"{n} a"), call("post", f"{n} b"), call("look_up", f"{n} c")]
    wait = [{"name": "await_results", "arguments": {"ids": "$queued"}}]
    last = [call("look_up", f"{n} d")]
    return agent(first, wait, last, tools=["mail", "post", "look_up"])


def asked(n: str) -> dict[str, Any]:
    first = [call("refund", f"{n} a"), call("look_up", f"{n} b")]
    return agent(first, [call("look_up", f"{n} c")], tools=["refund", "look_up"])


# --- Workflows ------------------------------------------------------------------------------------


def chain(n: str) -> dict[str, Any]:
    stages = [
        prompt("draft", "{{ input.n }}"),
        {"kind": "tool", "name": "refund", "tool": "refund", "on_error": "default", "default": "-",
         "arguments": {"key": "{{ input.n }} a"}},
        {"kind": "transform", "name": "list", "value": "{{ steps.draft.output }} {{ input.n }}",
         "do": [{"op": "split", "by": " "}, {"op": "unique"}]},
        prompt("last", "{{ steps.list.output }}", CLAUDE, lane="bulk"),
    ]  # fmt: skip
    return workflow({"kind": "pipeline", "stages": stages}, n=n)


def fan_out(n: str) -> dict[str, Any]:
    do = {"kind": "agent", "model": "script", "text": "{{ item }}", "tools": ["charge", "look_up"],
          "lane": "bulk"}  # fmt: skip
    items = [
        json.dumps([[call("charge", f"{n} a{i}")], [call("look_up", f"{n} b{i}")]])
        for i in range(4)
    ]
    block = {"kind": "parallel", "items": "{{ input.items }}", "max_items": 10,
             "max_concurrency": 2, "do": do}  # fmt: skip
    return workflow(block, items=items)


def routed(n: str) -> dict[str, Any]:
    choices = [
        {"name": "billing", "about": "money", "do": prompt("answer", "{{ input.n }}")},
        {"name": "other", "about": "all else", "do": prompt("other", "-")},
    ]
    block = {"kind": "route", "by": "classifier", "model": SLOW, "on": "billing",
             "choices": choices}  # fmt: skip
    return workflow(block, n=n)


def orchestrated(n: str) -> dict[str, Any]:
    worker = {"kind": "pipeline", "name": "worker", "stages": [
        prompt("one", "{{ item }}", lane="bulk"),
        prompt("two", "{{ steps.one.output }}!", CLAUDE),
    ]}  # fmt: skip
    block = {"kind": "orchestrator", "max_workers": 10, "max_concurrency": 3, "worker": worker,
             "planner": prompt("plan", "{{ input.parts }}", answer="json"),
             "join": prompt("join", "{{ results }}", CLAUDE)}  # fmt: skip
    return workflow(block, parts=[f"{n}.{i}" for i in range(4)])


RUNS = {
    "critical": Run("agent", critical, 10, 1, lambda n: f"look_up {n} c"),
    "background": Run("agent", background, 9, 3, lambda n: f"look_up {n} d"),
    "asked": Run("agent", asked, 6, 1, lambda n: f"look_up {n} c"),
    "chain": Run("workflow", chain, 4, 4, lambda n: json.dumps([n])),
    "parallel": Run(
        "workflow", fan_out, 24, 5, lambda n: [f"look_up {n} b{i}" for i in range(4)]
    ),
    "routing": Run("workflow", routed, 2, 3, lambda n: n),
    "orchestrator": Run(
        "workflow", orchestrated, 14, 15,
        lambda n: json.dumps([f"{n}.{i}!" for i in range(4)], separators=(",", ":")),
    ),
}  # fmt: skip


def body(number: int) -> dict[str, Any]:
    """The request of run `number`: each kind in turn."""
    name = list(RUNS)[number % len(RUNS)]
    run = RUNS[name]
    return {
        "kind": run.kind,
        "mode": "queued",
        "input": run.make(f"r{number}"),
        "metadata": {"n": number, "run": name},
    }
