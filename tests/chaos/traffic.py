"""Open-loop traffic: what comes when, whatever became of what came before.

Queued tasks are sent in batches, one batch of a feed at a time: what became due meanwhile is in the
next. Inline calls have a thread each. What the web server refuses or does not answer is counted,
and not sent again.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.acceptance.cluster import KEY

BATCH_S = 0.1
MOST_A_BATCH = 500
TIMEOUT_S = 60.0

# (seconds after the begin, the body of POST /v1/tasks)
Due = tuple[float, Mapping[str, Any]]


class Traffic:
    """`with Traffic(url) as traffic:`, then `queue` and `call` in threads of their own."""

    def __init__(self, base_url: str, callers: int = 64) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=callers + 8, max_keepalive_connections=callers + 8)
        self.client = httpx.Client(
            base_url=base_url, headers=headers, timeout=TIMEOUT_S, limits=limits
        )
        # Answers by status, and `broken` for none.
        self.answers: Counter[str] = Counter()
        # How late the latest batch or call went out: the load generator's own fault.
        self.latest_s = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self._feeds: list[threading.Thread] = []
        self._began = time.monotonic()

    def __enter__(self) -> "Traffic":
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()
        self._pool.shutdown(cancel_futures=True)
        self.client.close()

    def join(self) -> None:
        """Until all of it was sent."""
        for feed in self._feeds:
            feed.join()

    def queue(self, due: Iterable[Due]) -> None:
        """Send queued tasks, ordered by time, in batches."""
        self._feed(self._queue, iter(due))

    def call(self, due: Iterable[Due]) -> None:
        """Send inline calls, each in a thread of its own."""
        self._feed(self._call, iter(due))

    def _feed(self, run: Callable[[Iterator[Due]], None], due: Iterator[Due]) -> None:
        feed = threading.Thread(target=run, args=(due,), daemon=True)
        self._feeds.append(feed)
        feed.start()

    def _queue(self, due: Iterator[Due]) -> None:
        following = next(due, None)
        while following is not None and self._wait_until(following[0]):
            tasks = []
            now = self.now_s
            while following is not None and following[0] <= now and len(tasks) < MOST_A_BATCH:
                tasks.append(following[1])
                following = next(due, None)
            self._post("/v1/tasks/bulk", {"tasks": tasks})
            self._stopped.wait(BATCH_S)

    def _call(self, due: Iterator[Due]) -> None:
        for at, body in due:
            if not self._wait_until(at):
                return
            self._pool.submit(self._post, "/v1/tasks", body)

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began

    def _wait_until(self, at: float) -> bool:
        """Whether the time came before all was stopped."""
        left = at - self.now_s
        self.latest_s = max(self.latest_s, -left)
        return not self._stopped.wait(max(0.0, left))

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        try:
            status = str(self.client.post(path, json=body).status_code)
        except httpx.HTTPError:
            status = "broken"
        with self._lock:
            self.answers[f"{path.rpartition('/')[2]} {status}"] += 1


def text(tokens: int) -> str:
    """So many tokens as the sandbox counts them: four bytes each."""
    return "word" * tokens


def chat(model: str, messages: Sequence[Mapping[str, str]], **fields: Any) -> dict[str, Any]:
    given = {"model": model, "messages": list(messages), **fields.pop("input", {})}
    return {"kind": "chat", "input": given, **fields}
