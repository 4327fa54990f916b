"""What stands in for the vendor: an nginx with a static answer, or the sandbox.

A stock nginx can't sleep, but it can be told to send 8,000 bytes a second in pieces of so many
bytes: of two pieces the second leaves after the first's share of a second. So a delayed answer
has its head and the first part of its body at once, and its end after the delay.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from project.stack.ports import free_port
from project.stack.processes import Child

MODEL = "bench"
RATE = 8000  # bytes a second
PORTS_EACH = 200
TEXT = (
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt "
    "ut labore et dolore magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation."
)
ANSWER = json.dumps(
    {
        "id": "chatcmpl-benchmark",
        "object": "chat.completion",
        "created": 1700000000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 57, "completion_tokens": 31, "total_tokens": 88},
    }
)


class Upstream:
    """A vendor that answers a chat after so many milliseconds."""

    def __init__(self, kind: str, port: int, child: Child) -> None:
        self.kind = kind
        self.port = port
        self.child = child

    def base_url(self, delay_ms: int) -> str:
        """For `add_provider`: `/chat/completions` follows."""
        path = f"delay-{delay_ms}" if self.kind == "nginx" else "v1"
        return f"http://127.0.0.1:{self.port}/{path}"

    def model(self, delay_ms: int) -> str:
        return MODEL if self.kind == "nginx" else f"slow-{delay_ms}"


def start(
    folder: Path, delays_ms: Iterable[int], environment: dict[str, str], wanted: str | None
) -> Upstream:
    """nginx where there is one, unless something else is wanted."""
    kind = wanted or ("nginx" if shutil.which("nginx") else "sandbox")
    port = own_port(14000)
    command = (
        nginx(folder / "nginx", port, delays_ms)
        if kind == "nginx"
        else [sys.executable, "manage.py", "sandbox", "--port", str(port)]
    )
    child = Child(kind, command, folder / f"{kind}.log", environment)
    child.start()
    return Upstream(kind, port, child)


def own_port(first: int) -> int:
    """A free port of those from `first` on that are this test process's alone: it is taken seconds
    later."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return free_port(first + PORTS_EACH * (worker % 10), PORTS_EACH)


def nginx(folder: Path, port: int, delays_ms: Iterable[int]) -> list[str]:
    """Its command, with its configuration written."""
    folder.mkdir(parents=True, exist_ok=True)
    locations = "\n".join(location(delay) for delay in delays_ms)
    temporary = "\n".join(
        f"    {name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    conf = folder / "nginx.conf"
    conf.write_text(f"""daemon off;
worker_processes 1;
pid {folder}/pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_timeout 600;
    keepalive_requests 1000000000;
    default_type application/json;
{temporary}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
{locations}
    }}
}}
""")
    return [shutil.which("nginx") or "nginx", "-p", str(folder), "-c", str(conf)]


def location(delay_ms: int) -> str:
    piece = RATE * delay_ms // 1000
    slow = f"limit_rate {RATE}; sendfile_max_chunk {piece}; " if delay_ms else ""
    return f"        location /delay-{delay_ms}/chat/completions {{ {slow}return 200 '{ANSWER}'; }}"
