"""Reading JSON that may be anything."""

import pytest

from providers import wire
from providers.errors import BadResponse, InvalidRequest


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": "x"}', {"a": "x"}),
        (b'{"a": "\\u0000x", "b": [{"c\\u0000": "\\u0000"}], "d": 1}',
         {"a": "\ufffdx", "b": [{"c\ufffd": "\ufffd"}], "d": 1}),
        ('{"a": "\\u0000"}', {"a": "\ufffd"}),
        (b'["\\ud83d", "\\ude00x", "\\ud83d\\ude00"]', ["\ufffd", "\ufffdx", "😀"]),
        ('"\\ud83d"', "\ufffd"),
        (b'["\\ud83d", 1, 1.5, 99999999999999999999]', ["\ufffd", 1, 1.5, 1e20]),
    ],
)  # fmt: skip
def test_text_is_made_storable(data, value):
    assert wire.parse(data) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"NaN",
        b'{"a": Infinity}',
        b"[" * 100_000,
        b'"\x00"',
        b"1" * 5000,
        b"1e999",
    ],
)
def test_what_is_no_json(data):
    with pytest.raises(ValueError):
        wire.parse(data)
    with pytest.raises(BadResponse, match="the answer is not JSON"):
        wire.parse_object(data, "the answer")


def test_an_object_is_wanted():
    with pytest.raises(BadResponse, match="the answer is list, not an object"):
        wire.parse_object(b"[]", "the answer")


def test_what_json_can_not_hold_is_the_callers_fault():
    with pytest.raises(InvalidRequest):
        wire.dump({"a": 2**70})


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (wire.obj, [{}], [None, [], "x", 1]),
        (wire.optional_obj, [None, {}], [[], "x", 0, False]),
        (wire.array, [[]], [None, {}, "x"]),
        (wire.optional_array, [None, []], [{}, "x", 0]),
        (wire.text, ["", "x"], [None, 1, [], {}]),
        (wire.optional_text, [None, "x"], [1, False, []]),
        (wire.integer, [0, -1], [None, True, 1.0, "1"]),
        (wire.count, [None, 0, 7], [-1, True, 1.5, "1", 2**31]),
        (wire.vector, [[1, 0.5]], [None, [], ["1"], [True], [None], [1] * 65_537, [10**400],
                                   [float("inf")]]),
    ],
)  # fmt: skip
def test_readers(read, good, bad):
    for value in good:
        read(value, "place")
    for value in bad:
        with pytest.raises(BadResponse, match="place"):
            read(value, "place")
