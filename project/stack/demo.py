"""The first look: two requests through the REST API, and where everything is."""

import json
import time
import urllib.error
import urllib.request
from base64 import b64encode
from dataclasses import asdict, dataclass
from typing import Any

from project.stack.errors import StackError

FINAL = {"succeeded", "failed", "cancelled", "expired"}
MODEL = "echo"
WAIT_S = 90.0


@dataclass(frozen=True)
class Demo:
    """What `.data/demo.json` holds."""

    base_url: str
    api_key: str
    admin_url: str
    admin_user: str
    admin_password: str
    flower_url: str
    flower_user: str
    flower_password: str
    database_url: str
    redis_url: str
    sandbox_url: str

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def get(url: str, api_key: str = "", timeout_s: float = 10.0) -> tuple[int, Any]:
    return send(urllib.request.Request(url), api_key, timeout_s)  # noqa: S310 - our own address


def post(url: str, body: dict[str, Any], api_key: str) -> tuple[int, Any]:
    request = urllib.request.Request(  # noqa: S310
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return send(request, api_key, WAIT_S)


def send(request: urllib.request.Request, api_key: str, timeout_s: float) -> tuple[int, Any]:
    """The status and the JSON body, whatever the status; OSError if nobody answers."""
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    # Past any proxy of the environment: this is our own machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return answer.status, parsed(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, parsed(error.read())


def parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def refresh_flower(demo: Demo) -> bool:
    """Have Flower ask the workers for their queues and tasks, which by itself it does only as
    it starts; whether it answered."""
    login = b64encode(f"{demo.flower_user}:{demo.flower_password}".encode()).decode()
    request = urllib.request.Request(  # noqa: S310
        f"{demo.flower_url}workers?refresh=1", headers={"Authorization": f"Basic {login}"}
    )
    try:
        return send(request, "", 5.0)[0] == 200
    except OSError:
        return False


def chat(text: str, mode: str) -> dict[str, Any]:
    return {
        "kind": "chat",
        "mode": mode,
        "input": {"model": MODEL, "messages": [{"role": "user", "content": text}]},
        "metadata": {"feature": "make-up"},
    }


def run_inline(base_url: str, api_key: str) -> dict[str, Any]:
    return expect(post(f"{base_url}/v1/tasks", chat("Hello, inline!", "inline"), api_key))


def run_queued(base_url: str, api_key: str) -> dict[str, Any]:
    """Queue it, and ask until it has ended."""
    task = expect(post(f"{base_url}/v1/tasks", chat("Hello, queued!", "queued"), api_key))
    deadline = time.monotonic() + WAIT_S
    while task["status"] not in FINAL:
        if time.monotonic() > deadline:
            raise StackError(f"the queued request is still {task['status']} after {WAIT_S:.0f} s")
        time.sleep(0.05)
        task = expect(get(f"{base_url}/v1/tasks/{task['id']}", api_key))
    return task


def expect(answer: tuple[int, Any]) -> dict[str, Any]:
    status, body = answer
    if status >= 300 or not isinstance(body, dict):
        raise StackError(f"the API answered {status}: {str(body)[:300]}")
    return body


def describe(mode: str, task: dict[str, Any]) -> str:
    """One line: what was answered, for how many tokens and how much."""
    if task["status"] != "succeeded":
        return f"  {mode:<8} {task['status']}: {task.get('error')}"
    usage = task["usage"]
    said = task["output"]["choices"][0]["message"]["content"]
    tokens = f"{usage['input_tokens']} tokens in, {usage['output_tokens']} out"
    return f"  {mode:<8} {said!r}, {tokens}, {task['cost']} {task['currency']}"


def links(demo: Demo) -> list[str]:
    """What can be opened and pasted."""
    curl_body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]})
    return [
        f"  API      {demo.base_url}/v1/docs",
        f"  API key  {demo.api_key}",
        f"  Admin    {demo.admin_url}   {demo.admin_user} / {demo.admin_password}",
        f"  Flower   {demo.flower_url}   {demo.flower_user} / {demo.flower_password}",
        "",
        f"curl {demo.base_url}/v1/chat/completions -H 'Authorization: Bearer {demo.api_key}'"
        f" -H 'Content-Type: application/json' -d '{curl_body}'",
        "",
        "from openai import OpenAI  # pip install openai",
        f'client = OpenAI(base_url="{demo.base_url}/v1", api_key="{demo.api_key}")',
        f'answer = client.chat.completions.create(model="{MODEL}",'
        ' messages=[{"role": "user", "content": "Hello"}])',
        "print(answer.choices[0].message.content)",
    ]
