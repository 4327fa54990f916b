"""The sandbox's own rate limits: an exact judge of what came in, independent of any client's.

A limit counts the calls of one model, or of all (`*`), over a sliding window: at a time t it holds
what arrived in (t - window_s, t]. Input tokens count from a call's arrival; output tokens, known
once the answer is made, count from the same moment, and raise every window that held it. So the
peaks are the highest sums that any window ever had, however late an answer came.

Memory: 0.5 KB for each call of one window, and for each that arrived since the oldest one under
way; beyond MAX_ENTRIES of either the oldest are forgotten and `is_exact` turns false.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from providers.sandbox_http import Refused

KINDS: Final = ("requests", "tokens", "input_tokens", "output_tokens")
MAX_ENTRIES: Final = 200_000
MAX_LIMITS: Final = 100
DAY_S: Final = 86_400.0
FIELDS: Final = frozenset({"model", "window_s", "enforce", "headers", *KINDS})


class Entry:
    """One call: what it used, and what the window that ends with its arrival holds."""

    __slots__ = ("at", "is_open", "number", "sums", "used")

    def __init__(self, at: float, number: int, given: int) -> None:
        self.at = at
        self.number = number
        self.used = [1, given, given, 0]
        self.sums = [0, 0, 0, 0]
        self.is_open = True


class Limit:
    def __init__(self, model: str, window_s: float, most: Mapping[str, int]) -> None:
        self.model = model
        self.window_s = window_s
        self.most = most
        self.enforce = False
        self.headers = False
        self.totals = [0, 0, 0, 0]
        self.peaks = [0, 0, 0, 0]
        self.refused = 0
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.is_exact = True
        self._window: deque[Entry] = deque()
        self._sums = [0, 0, 0, 0]
        # From the oldest call under way on: what a late answer may still raise.
        self._open: deque[Entry] = deque()

    def wait(self, now: float, given: int) -> float:
        """Seconds until a call with so many input tokens fits; 0 where it does now."""
        self._slide(now)
        return max((self._wait(kind, now, given) for kind in self.most), default=0.0)

    def _wait(self, kind: str, now: float, given: int) -> float:
        index = KINDS.index(kind)
        # What a call writes is not known yet: a single token must fit.
        over = self._sums[index] + (1, given, given, 1)[index] - self.most[kind]
        if over <= 0:
            return 0.0
        for entry in self._window:
            over -= entry.used[index]
            if over <= 0:
                return entry.at + self.window_s - now
        return self.window_s

    def arrive(self, now: float, given: int) -> Entry:
        self._slide(now)
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        entry = Entry(now, self.totals[0], given)
        self._window.append(entry)
        self._open.append(entry)
        self._sums = added(self._sums, entry.used)
        entry.sums = self._sums
        self.totals = added(self.totals, entry.used)
        self.peaks = [max(pair) for pair in zip(self.peaks, entry.sums, strict=True)]
        for kept in (self._window, self._open):
            if len(kept) > MAX_ENTRIES:
                self.is_exact = False
                self._forget(kept)
        return entry

    def settle(self, entry: Entry, made: int) -> None:
        """The call has ended: its output tokens, in every window that held its arrival."""
        more = [0, made, 0, made]
        entry.is_open = False
        if made:
            entry.used = added(entry.used, more)
            self.totals = added(self.totals, more)
            if self._window and entry.number >= self._window[0].number:
                self._sums = added(self._sums, more)
            self._raise(entry, more)
        while self._open and not self._open[0].is_open:
            self._open.popleft()

    def _raise(self, entry: Entry, more: list[int]) -> None:
        for later in reversed(self._open):
            if later.number < entry.number:
                return
            if later.at - entry.at < self.window_s:
                later.sums = added(later.sums, more)
                self.peaks = [max(pair) for pair in zip(self.peaks, later.sums, strict=True)]

    def _slide(self, now: float) -> None:
        while self._window and now - self._window[0].at >= self.window_s:
            self._forget(self._window)

    def _forget(self, kept: deque[Entry]) -> None:
        entry = kept.popleft()
        if kept is self._window:
            self._sums = [a - b for a, b in zip(self._sums, entry.used, strict=True)]

    def left(self, kind: str) -> int:
        return max(0, self.most[kind] - self._sums[KINDS.index(kind)])

    def reset_s(self, now: float) -> float:
        """Seconds until the window is empty, if nothing more comes."""
        return 0.0 if self.last_at is None else max(0.0, self.last_at + self.window_s - now)

    def shown(self, now: float, wall: float) -> dict[str, Any]:
        self._slide(now)
        times = {
            f"{name}_at": None if at is None else at + wall
            for name, at in (("first", self.first_at), ("last", self.last_at))
        }
        return {
            "model": self.model,
            "window_s": self.window_s,
            "limits": dict(self.most),
            "enforce": self.enforce,
            "headers": self.headers,
            "calls": self.totals[0],
            **dict(zip(KINDS[1:], self.totals[1:], strict=True)),
            **{f"peak_{kind}": peak for kind, peak in zip(KINDS, self.peaks, strict=True)},
            **{f"window_{kind}": held for kind, held in zip(KINDS, self._sums, strict=True)},
            "refused": self.refused,
            **times,
            "now": now + wall,
            "is_exact": self.is_exact,
        }


def added(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


Places = list[tuple[Limit, Entry]]


class Limits:
    """All limits. Touched by the server's loop alone."""

    def __init__(self) -> None:
        self.limits: dict[tuple[str, float], Limit] = {}
        # Unix time = monotonic time + this: a clock that is set does not move the windows.
        self.wall = time.time() - time.monotonic()

    def reset(self) -> None:
        self.limits = {}

    def set(self, body: Any) -> dict[str, Any]:
        """Begin a limit, anew where there is one for its model and window. Raises `ValueError`."""
        limit = read_limit(body)
        self.limits[limit.model, limit.window_s] = limit
        if len(self.limits) > MAX_LIMITS:
            del self.limits[limit.model, limit.window_s]
            raise ValueError(f"there are {MAX_LIMITS} limits already")
        return limit.shown(self.now(), self.wall)

    def shown(self) -> dict[str, Any]:
        now = self.now()
        return {"limits": [limit.shown(now, self.wall) for limit in self.limits.values()]}

    def now(self) -> float:
        return time.monotonic()

    def of(self, model: str) -> list[Limit]:
        """The model's own, then those over all."""
        own = [limit for limit in self.limits.values() if limit.model == model]
        return own + [limit for limit in self.limits.values() if limit.model == "*"]

    def arrive(self, limits: Iterable[Limit], given: int, anthropic: bool) -> Places:
        """Count a call in all of its limits, or in none and raise `Refused`."""
        now = self.now()
        enforced = [limit for limit in limits if limit.enforce]
        for limit in enforced:
            if limit.wait(now, given) > 0:
                limit.refused += 1
                wait_s = max(limit.wait(now, given) for limit in enforced)
                raise refusal(limit, now, given, wait_s, anthropic)
        return [(limit, limit.arrive(now, given)) for limit in limits]

    def headers(self, limits: Iterable[Limit], anthropic: bool) -> dict[str, str]:
        """The vendor's headers; of limits that name the same thing the one with the least left."""
        now = self.now()
        least: dict[str, Limit] = {}
        for limit in limits:
            for kind in limit.most if limit.headers else ():
                if kind not in least or limit.left(kind) < least[kind].left(kind):
                    least[kind] = limit
        named = anthropic_headers if anthropic else openai_headers
        found: dict[str, str] = {}
        for kind, limit in least.items():
            found |= named(kind, limit, now, self.wall)
        return found


def refusal(limit: Limit, now: float, given: int, wait_s: float, anthropic: bool) -> Refused:
    full = next(kind for kind in limit.most if limit._wait(kind, now, given) > 0)
    headers = {"Retry-After": str(math.ceil(wait_s))}
    if not anthropic:
        headers["Retry-After-Ms"] = str(math.ceil(wait_s * 1000))
    message = (
        f"Rate limit reached for {limit.model} on {full}: limit {limit.most[full]} in "
        f"{limit.window_s:g} s. Please try again in {duration(wait_s)}."
    )
    return Refused(429, message, headers, kind="requests" if full == "requests" else "tokens")


def openai_headers(kind: str, limit: Limit, now: float, wall: float) -> dict[str, str]:
    if kind not in ("requests", "tokens"):
        return {}
    return {
        f"x-ratelimit-limit-{kind}": str(limit.most[kind]),
        f"x-ratelimit-remaining-{kind}": str(limit.left(kind)),
        f"x-ratelimit-reset-{kind}": duration(limit.reset_s(now)),
    }


def anthropic_headers(kind: str, limit: Limit, now: float, wall: float) -> dict[str, str]:
    name = f"anthropic-ratelimit-{kind.replace('_', '-')}"
    reset = datetime.fromtimestamp(math.ceil(now + wall + limit.reset_s(now)), UTC)
    return {
        f"{name}-limit": str(limit.most[kind]),
        f"{name}-remaining": str(limit.left(kind)),
        f"{name}-reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def duration(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`, `1h2m3s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:g}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def read_limit(body: Any) -> Limit:
    """Raises `ValueError` that says what is wrong."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not body["model"]:
        raise ValueError("a limit is an object with a model")
    if unknown := set(body) - FIELDS:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    most = {}
    for kind in KINDS:
        if (number := body.get(kind)) is None:
            continue
        if type(number) is not int or number < 1:
            raise ValueError(f"{kind} must be a whole number above 0")
        most[kind] = number
    limit = Limit(body["model"], window(body.get("window_s", 60)), most)
    limit.enforce = flag(body, "enforce")
    limit.headers = flag(body, "headers")
    return limit


def window(given: Any) -> float:
    if type(given) not in (int, float) or not 0 < given <= DAY_S:
        raise ValueError(f"window_s must be above 0 and at most {DAY_S:.0f}")
    return float(given)


def flag(body: Mapping[str, Any], name: str) -> bool:
    given = body.get(name, False)
    if type(given) is not bool:
        raise ValueError(f"{name} must be true or false")
    return given
