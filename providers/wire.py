"""Reading what a vendor sent: JSON that may be anything, as values that we can trust.

Every reader takes the value and the place where it stood, and raises `BadResponse` that names the
place where the type is wrong. Text is made storable: Postgres holds neither NUL nor a lone
surrogate, so each becomes U+FFFD.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import orjson

from providers.errors import BadResponse, InvalidRequest

# More tokens than any window holds; a larger count is nonsense, and would not fit a column.
MAX_TOKENS = 2**31 - 1
MAX_VECTOR = 65_536

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` with NUL and lone surrogates replaced by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text) if _UNSTORABLE.search(text) else text


def _clean_tree(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_clean_tree(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): _clean_tree(item) for key, item in value.items()}
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _whole(digits: str) -> int | float:
    # As orjson reads it: what 64 bits can't hold is a float, else nobody could write it again.
    return int(digits) if len(digits) < 19 else _finite(digits)


def parse(data: bytes | str) -> Any:
    """The JSON value in `data`, its text storable. Raises ValueError."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return _parse_odd(data)
    nul = b"\\u0000" in data if isinstance(data, bytes) else "\\u0000" in data
    return _clean_tree(value) if nul else value


def _parse_odd(data: bytes | str) -> Any:
    # orjson refuses escaped lone surrogates, which models do write; the standard library takes
    # them.
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return _clean_tree(
            json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole)
        )
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def parse_object(data: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises `BadResponse`."""
    try:
        value = parse(data)
    except ValueError:
        raise BadResponse(f"{where} is not JSON") from None
    return obj(value, where)


def dump(body: Mapping[str, Any]) -> bytes:
    """`body` as JSON. Raises `InvalidRequest` for what JSON can't hold."""
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as exc:
        raise InvalidRequest(f"the request can't be written as JSON: {exc}") from None


def _wrong(value: Any, where: str, wanted: str) -> BadResponse:
    return BadResponse(f"{where} is {type(value).__name__}, not {wanted}")


def obj(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, where, "an object")
    return value


def optional_obj(value: Any, where: str) -> dict[str, Any]:
    """`value`, or an empty object in place of null."""
    return {} if value is None else obj(value, where)


def array(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(value, where, "an array")
    return value


def optional_array(value: Any, where: str) -> list[Any]:
    """`value`, or an empty array in place of null."""
    return [] if value is None else array(value, where)


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, where, "a string")
    return value


def optional_text(value: Any, where: str) -> str | None:
    return None if value is None else text(value, where)


def integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(value, where, "an integer")
    return value


def count(value: Any, where: str) -> int:
    """A number of tokens; null counts as 0."""
    if value is None:
        return 0
    number = integer(value, where)
    if not 0 <= number <= MAX_TOKENS:
        raise BadResponse(f"{where} is {number}, no number of tokens")
    return number


def vector(value: Any, where: str) -> tuple[float, ...]:
    items = array(value, where)
    if not 0 < len(items) <= MAX_VECTOR:
        raise BadResponse(f"{where} has {len(items)} numbers")
    for item in items:
        if not isinstance(item, (float, int)) or isinstance(item, bool):
            raise _wrong(item, where, "an array of numbers")
    try:
        numbers = tuple(map(float, items))
    except OverflowError:
        raise BadResponse(f"{where} holds a number that is too large") from None
    if not all(map(math.isfinite, numbers)):
        raise BadResponse(f"{where} holds a number that is not finite")
    return numbers
