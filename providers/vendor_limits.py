"""What a vendor's answer says of its rate limits: limit and remainder of each unit.

OpenAI's `x-ratelimit-{limit,remaining}-{requests,tokens}` (its guide "Rate limits", "Rate limits in
headers"; Azure, Groq, vLLM's proxies and others send the same) and Anthropic's
`anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining}` (its page
"Rate limits", "Response headers").
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

# Header of the limit, header of what is left → our unit.
_HEADERS: Final = (
    ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "requests"),
    ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "tokens"),
    *(
        (
            f"anthropic-ratelimit-{name}-limit",
            f"anthropic-ratelimit-{name}-remaining",
            name.replace("-", "_"),
        )
        for name in ("requests", "tokens", "input-tokens", "output-tokens")
    ),
)
_MOST: Final = 10**15


class Told(NamedTuple):
    """`limit` and `left` of a unit: `requests`, `tokens`, `input_tokens` or `output_tokens`."""

    unit: str
    limit: int
    left: int


def told(headers: Mapping[str, str]) -> list[Told]:
    """The limits that the headers (lower-case names) speak of. What is no number is passed over."""
    found = []
    for limit_name, left_name, unit in _HEADERS:
        limit, left = _count(headers.get(limit_name)), _count(headers.get(left_name))
        if limit and left is not None:
            found.append(Told(unit, limit, min(left, limit)))
    return found


def _count(text: str | None) -> int | None:
    if text is None or not text.strip().isascii() or not text.strip().isdecimal():
        return None
    value = int(text) if len(text) < 20 else _MOST
    return min(value, _MOST)
