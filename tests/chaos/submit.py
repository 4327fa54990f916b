"""Sends tasks over the REST API, each with an Idempotency-Key, until each was taken.

A client of a server that is killed repeats its request; so does this one, and it keeps what it
was told: the same key must give the same task.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.acceptance.cluster import KEY

THREADS = 8
TIMEOUT_S = 10.0
PAUSE_S = 0.2
# A share of the requests is repeated although it was answered.
REPEATED = 0.02


class Submitter:
    """`with Submitter(url, bodies, may_send) as submitter:` sends in threads of its own.

    Task n is sent once `may_send(n)` is true. `ids[n]` is the task that it became.
    """

    def __init__(
        self,
        base_url: str,
        bodies: Sequence[Mapping[str, Any]],
        may_send: Callable[[int], bool] = lambda _: True,
        name: str = "chaos",
    ) -> None:
        self.base_url = base_url
        self.bodies = bodies
        self.may_send = may_send
        self.name = name
        self.ids: dict[int, str] = {}
        # Answers by status, and `broken` for none.
        self.answers: Counter[str] = Counter()
        # Keys that gave another task when they were sent again.
        self.changed: list[int] = []
        self._numbers = iter(range(len(bodies)))
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> "Submitter":
        self._threads = [self._pool.submit(self._run, number) for number in range(THREADS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown()
        for thread in self._threads:
            thread.result()

    @property
    def is_done(self) -> bool:
        return len(self.ids) == len(self.bodies)

    def _run(self, seed: int) -> None:
        dice = random.Random(seed)
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=self.base_url, headers=headers, timeout=TIMEOUT_S) as client:
            while not self._stopped.is_set():
                with self._lock:
                    number = next(self._numbers, None)
                if number is None:
                    return
                while not self.may_send(number) and not self._stopped.wait(0.02):
                    pass
                self._send(client, number, again=dice.random() < REPEATED)

    def _send(self, client: httpx.Client, number: int, again: bool) -> None:
        while not self._stopped.is_set():
            task_id = self._post(client, number)
            if task_id is None:
                self._stopped.wait(PAUSE_S)
                continue
            if self.ids.setdefault(number, task_id) != task_id:
                self.changed.append(number)
            if not again:
                return
            again = False

    def _post(self, client: httpx.Client, number: int) -> str | None:
        """The task's id; None where it must be sent again."""
        headers = {"Idempotency-Key": f"{self.name}-{number}"}
        try:
            answer = client.post("/v1/tasks", json=self.bodies[number], headers=headers)
        except httpx.HTTPError:
            self._count("broken")
            return None
        self._count(str(answer.status_code))
        if answer.status_code in (200, 202):
            return str(answer.json()["id"])
        assert answer.status_code in (409, 429) or answer.status_code >= 500, answer.text
        return None

    def _count(self, what: str) -> None:
        with self._lock:
            self.answers[what] += 1


def until(condition: Callable[[], Any], timeout_s: float, step_s: float = 0.2) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step_s)
    return True


def while_moving(
    condition: Callable[[], Any], measure: Callable[[], Any], quiet_s: float, step_s: float = 0.2
) -> bool:
    """Whether the condition came true, before `measure` stood still for so long: a slow machine
    is no failure."""
    last, since = measure(), time.monotonic()
    while not condition():
        if (now := measure()) != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > quiet_s:
            return False
        time.sleep(step_s)
    return True
