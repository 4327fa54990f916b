"""Event streams as the HTML standard parses them, in pieces of any size."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.errors import BadResponse
from providers.sse import Parser, ServerSentEvent


def parse(*chunks, **options):
    parser = Parser(**options)
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    return [*events, *parser.finish()]


def event(data, name=""):
    return ServerSentEvent(name, data)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [event("a"), event("b")]),
        (b"data: a\r\n\r\ndata: b\r\r", [event("a"), event("b")]),
        (b"event: x\ndata: a\n\ndata: b\n\n", [event("a", "x"), event("b")]),
        (b"data: a\ndata: b\ndata\n\n", [event("a\nb\n")]),
        (b"data:a\n\ndata:  b\n\n", [event("a"), event(" b")]),
        (b": comment\n\nid: 1\nretry: 5\nunknown: x\n\n", []),
        (b"event: x\n\ndata: a\n\n", [event("a")]),
        (b"\xef\xbb\xbfdata: a\n\n", [event("a")]),
        (b"data: a\n\xef\xbb\xbfdata: b\n\n", [event("a")]),
        (b"data: \xff\xc3\xa9\n\n", [event("\ufffdé")]),
        (b"data: a\x0bb\xe2\x80\xa8c\n\n", [event("a\x0bb\u2028c")]),
        (b"data: a\n", [event("a")]),
        (b"data: a", []),
        (b"data: a\n\ndata: b", [event("a")]),
        (b"", []),
    ],
)
def test_streams(stream, events):
    assert parse(stream) == events
    assert parse(*(bytes([byte]) for byte in stream)) == events


@given(
    stream=st.lists(
        st.sampled_from([b"data", b":", b" ", b"\r", b"\n", b"\r\n", b"\n\n", b"x", b"\xc3\xa9"])
    ).map(b"".join),
    cuts=st.lists(st.integers(0, 60)),
)
def test_how_a_stream_is_cut_does_not_matter(stream, cuts):
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(edges)]
    assert parse(*pieces) == parse(stream)


def test_an_event_that_is_too_large_is_refused():
    with pytest.raises(BadResponse, match="larger than 100 bytes"):
        parse(b"data: " + b"x" * 100, max_event_bytes=100)
    with pytest.raises(BadResponse, match="larger than 100 bytes"):
        parse(*[b"data: xxxx\n"] * 10, max_event_bytes=100)
    assert len(parse(*[b"data: xxxx\n\n"] * 50, max_event_bytes=100)) == 50
