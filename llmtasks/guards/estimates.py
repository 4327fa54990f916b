"""How many tokens a call may use, before anybody knows: from its bytes, and what was learnt.

What is reserved should be an upper bound, since the limits hold only as far as it is one. What is
expected spreads the calls over time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmtasks.models import Limit
from providers.types import EmbeddingRequest, Image, Request

# Before a model's calls told better: tokens a byte, and the length of an answer.
TOKENS_PER_BYTE = 0.3
ASSUMED_OUTPUT = 1024
# Reserved at the least: English is 4 to 5 bytes a token, whatever the short calls that were learnt
# from had of JSON around them.
LEAST_TOKENS_PER_BYTE = 0.25
JSON_BYTES = 200
# About 1,000 tokens, whatever its size.
IMAGE_BYTES = 4000
# To the script, what nobody knows.
NONE = -1
# How much more than expected is reserved where the caller set no limit of its own.
INPUT_MARGIN = 1.1
OUTPUT_MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Stats:
    """What was learnt of a model from its calls; None before the first. `high` is the tokens a
    byte that 95 % of the calls stay below."""

    tokens_per_byte: float | None = None
    output_tokens: float | None = None
    p95_ms: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What a call reserves, and what it is expected to use."""

    input_tokens: int
    output_tokens: int
    expected_input: int
    expected_output: int
    # What the estimate was made from.
    counted_bytes: int = 0

    def of(self, unit: str) -> tuple[int, int]:
        """(reserved, expected) of a limit's unit."""
        if unit == Limit.Unit.TOKENS:
            return (
                self.input_tokens + self.output_tokens,
                self.expected_input + self.expected_output,
            )
        if unit == Limit.Unit.INPUT_TOKENS:
            return self.input_tokens, self.expected_input
        if unit == Limit.Unit.OUTPUT_TOKENS:
            return self.output_tokens, self.expected_output
        return 1, 1


@dataclass(frozen=True, slots=True)
class Used:
    """What a call did use. `is_sent`: whether anything reached the vendor; where nothing did,
    all is given back. Tokens are None where nobody knows: what was reserved of them stands."""

    is_sent: bool = True
    input_tokens: int | None = None
    output_tokens: int | None = None

    def of(self, unit: str, reserved: int, need: Need) -> int:
        """`reserved` is what the limiter holds for the call, at most what it needs."""
        if not self.is_sent:
            return 0
        given = need.input_tokens if self.input_tokens is None else self.input_tokens
        made = need.output_tokens if self.output_tokens is None else self.output_tokens
        if unit == Limit.Unit.INPUT_TOKENS:
            return reserved if self.input_tokens is None else given
        if unit == Limit.Unit.OUTPUT_TOKENS:
            return reserved if self.output_tokens is None else made
        if unit == Limit.Unit.TOKENS:
            is_unknown = self.input_tokens is None and self.output_tokens is None
            return reserved if is_unknown else given + made
        return 1


_stats: dict[str, Stats] = {}


def stats_of(provider: str, model: str) -> Stats:
    """What was learnt of the model, as Redis told this process last."""
    return _stats.get(f"{provider}/{model}", Stats())


def has_stats(place: str) -> bool:
    return place in _stats


def put_stats(place: str, found: Sequence[float]) -> None:
    """Remember what Redis told, `NONE` for what nobody knows."""
    _stats[place] = Stats(*known(found))


def known(found: Sequence[float]) -> list[float | None]:
    return [None if one == NONE else one for one in found]


def need_of(provider: str, model: str, input_bytes: int, max_output: int | None) -> Need:
    """What a call of so many bytes reserves; `max_output` is the caller's own limit."""
    stats = stats_of(provider, model)
    expected_input = int(input_bytes * (stats.tokens_per_byte or TOKENS_PER_BYTE)) + 1
    usual = stats.output_tokens or ASSUMED_OUTPUT
    expected_output = int(usual if max_output is None else min(usual, max_output))
    return Need(
        input_tokens=max(
            int(expected_input * INPUT_MARGIN),
            int(input_bytes * (stats.high or 0.0)) + 1,
            int((input_bytes - JSON_BYTES) * LEAST_TOKENS_PER_BYTE),
        ),
        output_tokens=int(usual * OUTPUT_MARGIN) if max_output is None else max_output,
        expected_input=expected_input,
        expected_output=expected_output,
        counted_bytes=input_bytes,
    )


def counted_bytes(request: Request | EmbeddingRequest, body_bytes: int) -> int:
    """The bytes of a request that are text; an image counts as text of as many tokens."""
    if not isinstance(request, Request):
        return body_bytes
    images = [
        len(part.url)
        for message in request.messages
        for part in message.parts
        if isinstance(part, Image)
    ]
    return body_bytes - sum(images) + IMAGE_BYTES * len(images)


def usual(unit: str) -> float:
    """What a call uses of a limit's unit before anybody knows."""
    return 1.0 if unit in (Limit.Unit.REQUESTS, Limit.Unit.CONCURRENCY) else ASSUMED_OUTPUT
