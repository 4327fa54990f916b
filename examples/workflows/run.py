"""Store a workflow, run it, and show its steps as they come and what they gave.

    BASE=http://127.0.0.1:8000 KEY=lt_… python examples/workflows/run.py document

`document`, `review` or `risks`: the declarations are the JSON files beside this one. They name the
sandbox's models; with routes of your own put their names in.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

BASE = os.environ.get("BASE", "http://127.0.0.1:8000")
KEY = os.environ["KEY"]
INPUTS: dict[str, Any] = {
    "document": {"text": "Rain fell all night.\n\nIn the morning the river rose.\n\nNobody left."},
    "review": {"text": "I accept: the bridge was closed on Monday."},
    "risks": {
        "documents": [{"title": f"Contract {n}", "text": f"Clause {n} is new."} for n in range(50)]
    },
}


def call(path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        BASE + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def watch(path: str) -> None:
    """Print each step's frame until the task is done."""
    request = urllib.request.Request(BASE + path, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=120) as stream:
        name = ""
        for line in stream:
            kind, _, value = line.decode().rstrip("\n").partition(": ")
            if kind == "event":
                name = value
            elif kind == "data" and name == "step":
                step = json.loads(value)
                print(f"{step['number']:>4} {step['name']} {step['status']}", file=sys.stderr)
            elif kind == "data" and name == "done":
                return


def main(name: str) -> None:
    declared = json.loads((Path(__file__).parent / f"{name}.json").read_text())
    version = call("/v1/workflows", {"name": name, "spec": declared})["reference"]
    work = {"workflow": version, "input": INPUTS[name]}
    task = call("/v1/tasks", {"kind": "workflow", "mode": "queued", "input": work})
    watch(task["events_url"])
    task = call(f"/v1/tasks/{task['id']}")
    shown = {
        key: task[key] for key in ("id", "model", "status", "cost", "usage", "error", "output")
    }
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main(sys.argv[1])
