"""The load generator: wrk, or threads of ours where there is no wrk (then the figures are low)."""

import http.client
import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.benchmarks.tables import percentile

SCRIPT = Path(__file__).with_name("load.lua")
TIMEOUT_S = 30


@dataclass(frozen=True)
class Load:
    """What came of a load: `refused` are answers other than 2xx, `broken` what gave no answer."""

    answered: int
    seconds: float
    p50_ms: float
    p99_ms: float
    refused: int
    broken: int

    @property
    def per_s(self) -> float:
        return self.answered / self.seconds


def generator() -> str:
    return "wrk" if shutil.which("wrk") else "python"


def post(url: str, body: str, authorization: str, concurrency: int, seconds: int) -> Load:
    """POST `body` over `concurrency` connections, each as fast as it is answered."""
    if generator() == "wrk":
        return with_wrk(url, body, authorization, concurrency, seconds)
    return with_threads(url, body, authorization, concurrency, seconds)


def with_wrk(url: str, body: str, authorization: str, concurrency: int, seconds: int) -> Load:
    # One thread is far from being the bottleneck, and leaves the other core to what is measured.
    command = [
        *("wrk", "--threads=1", f"--connections={concurrency}", f"--duration={seconds}s"),
        *(f"--timeout={TIMEOUT_S}s", f"--script={SCRIPT}", url),
    ]
    environment = {**os.environ, "BENCH_BODY": body, "BENCH_AUTHORIZATION": authorization}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds + 2 * TIMEOUT_S
    )
    lines = done.stderr.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"wrk failed: {done.stderr.strip() or done.stdout.strip()}")
    return Load(**json.loads(lines[-1]))


def with_threads(url: str, body: str, authorization: str, concurrency: int, seconds: int) -> Load:
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json", "Authorization": authorization}
    milliseconds: list[float] = []
    refused: list[int] = []
    broken: list[Exception] = []
    end = time.monotonic() + seconds

    def run() -> None:
        connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                connection.request("POST", parts.path, body, headers)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                broken.append(error)
                connection.close()
                continue
            milliseconds.append((time.monotonic() - began) * 1000)
            if answer.status >= 300:
                refused.append(answer.status)
        connection.close()

    began = time.monotonic()
    threads = [threading.Thread(target=run) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(
        answered=len(milliseconds),
        seconds=time.monotonic() - began,
        p50_ms=percentile(milliseconds, 50),
        p99_ms=percentile(milliseconds, 99),
        refused=len(refused),
        broken=len(broken),
    )
