"""Faults that the sandbox is told at run time to answer with, whatever the model's name says."""

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any, Final

from providers.sandbox_http import Refused

KINDS: Final = "error-<400 to 599>, timeout, rate-limit, unauthorized, off"
FIELDS: Final = frozenset({"model", "kind", "share", "retry_after"})
MAX_FAULTS: Final = 100


@dataclass(slots=True)
class Fault:
    model: str
    kind: str
    status: int
    share: float
    retry_after: float | None
    seen: int = 0
    struck: int = 0
    # Of its own, so that the same order of calls meets the same faults again.
    dice: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311

    def strikes(self) -> bool:
        self.seen += 1
        hit = self.dice.random() < self.share
        self.struck += hit
        return hit

    def shown(self) -> dict[str, Any]:
        names = ("model", "kind", "share", "retry_after", "seen", "struck")
        return {name: getattr(self, name) for name in names}


class Faults:
    """One fault for each model and kind. Touched by the server's loop alone."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.faults: dict[tuple[str, str], Fault] = {}

    def set(self, body: Any) -> dict[str, Any]:
        """Begin a fault, anew where there is one, or end all of a model. Raises `ValueError`."""
        fault = read_fault(body)
        if fault.kind == "off":
            self.faults = {
                key: kept
                for key, kept in self.faults.items()
                if fault.model not in ("*", kept.model)
            }
        elif (fault.model, fault.kind) not in self.faults and len(self.faults) >= MAX_FAULTS:
            raise ValueError(f"there are {MAX_FAULTS} faults already")
        else:
            self.faults[fault.model, fault.kind] = fault
        return self.shown()

    def shown(self) -> dict[str, Any]:
        return {"faults": [fault.shown() for fault in self.faults.values()]}

    async def strike(self, model: str) -> None:
        """Raises `Refused` for a call that a fault strikes; a timeout lasts until it hangs up."""
        for fault in list(self.faults.values()):
            if fault.model in ("*", model) and fault.strikes():
                if fault.kind == "timeout":
                    await asyncio.Event().wait()
                raise refusal(fault)


def refusal(fault: Fault) -> Refused:
    headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
    if fault.status == 401:
        return Refused(401, "Incorrect API key provided", headers)
    if fault.status == 429:
        return Refused(429, f"Rate limit reached for {fault.model}", headers, kind="requests")
    return Refused(fault.status, f"The sandbox was told to fail with {fault.status}", headers)


def read_fault(body: Any) -> Fault:
    """Raises `ValueError` that says what is wrong."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not body["model"]:
        raise ValueError("a fault is an object with a model")
    if unknown := set(body) - FIELDS:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    kind, share, retry_after = body.get("kind"), body.get("share", 1.0), body.get("retry_after")
    if not isinstance(kind, str) or (status := status_of(kind)) is None:
        raise ValueError(f"kind must be one of {KINDS}")
    if not is_number(share) or not 0 <= share <= 1:
        raise ValueError("share must be between 0 and 1")
    if retry_after is not None and not (is_number(retry_after) and 0 <= retry_after <= 86_400):
        raise ValueError("retry_after must be between 0 and 86400")
    return Fault(body["model"], kind, status, share, retry_after)


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def status_of(kind: str) -> int | None:
    """The status that a kind answers with, 0 for none; None for what is no kind."""
    named = {"timeout": 0, "off": 0, "rate-limit": 429, "unauthorized": 401}
    number = kind.removeprefix("error-")
    if number != kind and number.isdecimal() and 400 <= int(number) <= 599:
        return int(number)
    return named.get(kind)
