"""Ask the support agent, show its steps as they come, its answer, and what became of the mail.

    BASE=http://127.0.0.1:8000 KEY=lt_… python examples/support/run.py 1001

The sandbox's model `script` makes the calls that it is told. A vendor's model decides by itself:
name its route in MODEL, and put the customer's question in.
"""

import json
import os
import sys
import time
import urllib.request
from typing import Any

BASE = os.environ.get("BASE", "http://127.0.0.1:8000")
KEY = os.environ["KEY"]
MODEL = os.environ.get("MODEL", "script")


def call(path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        BASE + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def finished(task_id: str) -> Any:
    until = time.monotonic() + 60
    while (task := call(f"/v1/tasks/{task_id}"))["finished_at"] is None:
        if time.monotonic() > until:
            raise SystemExit(f"task {task_id} is still {task['status']}")
        time.sleep(0.1)
    return task


def main(order: str) -> None:
    question = [
        [{"name": "find_order", "arguments": {"number": order}}],
        [
            {
                "name": "send_mail",
                "arguments": {"to": "ann@example.com", "text": "It is sent."},
            }
        ],
    ]
    agent = {
        "model": MODEL,
        "messages": [{"role": "user", "content": json.dumps(question)}],
        "tools": ["find_order", "send_mail"],
        "max_turns": 5,
    }
    # The answer does not wait for the mail.
    task = call("/v1/tasks", {"kind": "agent", "mode": "inline", "input": agent})
    steps = call(f"/v1/tasks/{task['id']}/steps")["data"]
    mails = [finished(step["task"]) for step in steps if step["kind"] == "tool" and step["task"]]
    print(json.dumps({"task": task, "steps": steps, "mails": mails}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "1001")
