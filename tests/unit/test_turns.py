"""Whose turn it is: stride with weights, no credit for idle times, bounded memory."""

from collections import Counter, deque
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from llmtasks import dispatch, turns
from llmtasks.room import Room
from llmtasks.turns import NOBODY, Ask, Head, Stride, Turns, choose, share

LINE = ("p", "default", "r")
START = datetime(2026, 1, 1, tzinfo=UTC)


def heads(tenant: UUID, count: int, weight: int = 1, age_s: float = 0, line=LINE) -> list[Head]:
    ask = Ask(line, tenant, weight, count)
    return [Head(uuid7(), ask, START - timedelta(seconds=age_s - n)) for n in range(count)]


def run(stride: Stride, waiting: list[Head], most: int) -> list[UUID]:
    """The tenants of one round, in order; what was chosen waits no more."""
    chosen = choose(waiting, stride, most, lambda head: True)
    for head in chosen:
        waiting.remove(head)
    return [head.ask.tenant_id for head in chosen]


def test_tenants_take_turns_and_the_oldest_begins():
    a, b, c = (uuid7() for _ in range(3))
    waiting = heads(a, 9) + heads(b, 9, age_s=50) + heads(c, 9, age_s=20)
    assert run(Stride(), waiting, 7) == [b, c, a, b, c, a, b]


def test_a_tenant_of_weight_two_has_twice_the_turns():
    a, b, c = (uuid7() for _ in range(3))
    waiting = heads(a, 500, weight=2) + heads(b, 500) + heads(c, 500, weight=5)
    stride = Stride()
    done = Counter(tenant for _ in range(100) for tenant in run(stride, waiting, 8))
    assert done == {a: 200, b: 100, c: 500}


def test_who_was_idle_has_no_credit():
    a, b = uuid7(), uuid7()
    stride, waiting = Stride(), heads(a, 1000)
    assert run(stride, waiting, 500) == [a] * 500
    waiting += heads(b, 100)
    done = Counter(run(stride, waiting, 20))
    assert max(done[a], done[b]) <= 11


def test_who_had_no_room_has_no_credit():
    a, b = uuid7(), uuid7()
    stride, waiting = Stride(), heads(a, 500) + heads(b, 500, line=("p", "default", "shut"))
    for _ in range(10):
        chosen = choose(waiting, stride, 10, lambda head: head.ask.line == LINE)
        assert {head.ask.tenant_id for head in chosen} == {a}
        waiting = [head for head in waiting if head not in chosen]
    done = Counter(run(stride, waiting, 20))
    assert max(done[a], done[b]) <= 11


def test_who_comes_back_at_once_does_not_pass_the_others_by():
    """One that always has a single task waiting gets no more than those with a backlog."""
    a, b, single = (uuid7() for _ in range(3))
    stride, waiting = Stride(), heads(a, 500) + heads(b, 500)
    done: Counter[UUID] = Counter()
    for _ in range(90):
        if not any(head.ask.tenant_id == single for head in waiting):
            waiting += heads(single, 1)
        done.update(run(stride, waiting, 1))
    assert done[single] <= 31


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(0, 300),
)
def test_a_newcomer_waits_for_two_rounds_at_the_most(weights, most, before):
    """A round: as many turns as the others' weights in the newcomer's."""
    tenants = {uuid7(): weight for weight in weights}
    stride = Stride()

    def all_heads() -> list[Head]:
        return [h for t, w in tenants.items() for h in heads(t, most, w, age_s=9999)]

    for _ in range(before // most + 1):
        run(stride, all_heads(), most)
    newcomer = uuid7()
    given_before = 0
    while True:
        order = run(stride, all_heads() + heads(newcomer, 1), most)
        if newcomer in order:
            given_before += order.index(newcomer)
            break
        given_before += len(order)
    assert given_before <= 2 * (sum(weights) + 1)


@pytest.mark.parametrize("most", [4, 19, 20, 21, 31])
def test_who_waits_in_many_lines_takes_no_newcomers_place(monkeypatch, most):
    """Twenty tenants of whom half wait in two lines, and one that comes to the last of the lines:
    21 turns are a round."""
    monkeypatch.setattr(dispatch, "SPARE", 1)
    lines = [("p", "default", name) for name in ("x", "y", "z")]
    tenants = [uuid7() for _ in range(20)]
    waiting = {line: {t: deque(range(500)) for t in tenants[:10]} for line in (lines[0], lines[2])}
    waiting[lines[1]] = {t: deque(range(500)) for t in tenants[10:]}
    known, room = Turns(), Room({"x": None, "y": None, "z": None})
    newcomers: dict[UUID, int] = {}
    given_by_now = 0
    for number in range(100):
        if number % 9 == 4 and number < 80:
            newcomer = uuid7()
            waiting[lines[2]][newcomer] = deque([10_000 + number])
            newcomers[newcomer] = given_by_now
        known.begin_round(float(number))
        for line in lines:
            known.found(line, {tenant: 1 for tenant, own in waiting[line].items() if own})
        asks, until = dispatch.asks_at(lines[0][:2], most, lines, known, room)
        ready = [
            Head(uuid7(), ask, START + timedelta(seconds=age))
            for ask in asks
            for age in list(waiting[ask.line][ask.tenant_id])[: ask.most]
        ]
        chosen = choose(ready, known.stride(lines[0][:2]), most, lambda head: True, until)
        known.end_round(asks, ready, chosen)
        for head in chosen:
            waiting[head.ask.line][head.ask.tenant_id].popleft()
            given_by_now += 1
            came = newcomers.pop(head.ask.tenant_id, None)
            assert came is None or given_by_now - came <= 2 * 21
    assert not newcomers
    left = [[len(own[tenant]) for own in waiting.values() if tenant in own] for tenant in tenants]
    given = [sum(500 - count for count in counts) for counts in left]
    assert max(given) - min(given) <= 2
    # None of a tenant's lines waits for its other one to end.
    assert all(500 - max(counts) >= min(given) // 4 for counts in left)


def test_a_line_with_little_room_is_shared_beside_one_with_much():
    """The place's time runs with the line that has room, and says nothing of turns in the other."""
    place, model = ("p", "default"), ("p", "m")
    fast, slow = (*place, "fast"), (*place, "slow")
    waiting = {fast: {uuid7(): 1 for _ in range(2)}, slow: {uuid7(): 1 for _ in range(5)}}
    known = Turns()
    for line, weights in waiting.items():
        known.found(line, weights)
    given: Counter[UUID] = Counter()
    for number in range(50):
        known.begin_round(float(number))
        room = Room({"fast": None, "slow": (model,)}, {model: 1.0})
        asks, until = dispatch.asks_at(place, 20, list(waiting), known, room)
        ready = [Head(uuid7(), ask, START) for ask in asks for _ in range(ask.most)]
        chosen = choose(ready, known.stride(place), 20, room.take, until)
        known.end_round(asks, ready, chosen)
        # The little room holds up no other line.
        assert len(chosen) > 10
        given.update(head.ask.tenant_id for head in chosen)
    assert [given[tenant] for tenant in waiting[slow]] == [10] * 5


def test_shares_fill_the_room():
    assert share(10, 1, 3) == 4
    assert share(1, 1, 1000) == 1
    assert share(48, 48, 48) == 48


# --- what is remembered ---------------------------------------------------------------------------


def test_passes_that_the_time_has_reached_are_forgotten(monkeypatch):
    monkeypatch.setattr(turns, "MOST_PASSES", 10)
    stride = Stride()
    for _ in range(1000):
        stride.give(uuid7(), 1000)
    assert len(stride.passes) <= 10


def test_a_full_memory_is_emptied(monkeypatch):
    monkeypatch.setattr(turns, "MOST_KNOWN", 10)
    known = Turns()
    for _ in range(4):
        known.found(LINE, {uuid7(): 1 for _ in range(4)})
        assert sum(len(each.weights) for each in known.lines.values()) <= 10
    assert len(known.lines[LINE].weights) in (4, 8)


def test_who_has_nothing_left_is_forgotten_and_found_again():
    known = Turns()
    a, b = uuid7(), uuid7()
    known.found(LINE, {a: 1, b: 1})
    asks = [Ask(LINE, a, 1, 2), Ask(LINE, b, 1, 2)]
    found = [Head(uuid7(), asks[0], START), *(Head(uuid7(), asks[1], START) for _ in range(2))]
    known.end_round(asks, found, found)
    assert set(known.lines[LINE].weights) == {b}


def test_who_had_no_room_is_not_asked_for_a_while():
    known = Turns()
    a, b = uuid7(), uuid7()
    known.found(LINE, {a: 1, b: 1})
    known.park([(LINE[1], a)], until=10.0)
    assert known.first_in(LINE, 5) == [b]
    assert known.has_parked
    known.begin_round(11.0)
    assert not known.has_parked
    # Those who were not looked at yet come before it.
    assert known.first_in(LINE, 5) == [b, a]


def test_once_a_search_went_round_few_are_searched_for():
    known = Turns()
    known.searched(LINE, {uuid7(): 1}, uuid7())
    assert known.wanted(LINE) == turns.SEARCHED
    known.searched(LINE, {}, None)
    assert known.wanted(LINE) == turns.SEARCHED_AGAIN
    known.search_anew()
    assert known.wanted(LINE) == turns.SEARCHED
    known.closed = {LINE}
    assert known.wanted(LINE) == 0
    # A line that was closed from its beginning on was not searched.
    known.searched(LINE, {}, NOBODY)
    known.closed = set()
    assert known.wanted(LINE) == turns.SEARCHED


def test_a_search_goes_on_where_it_was_after_the_memory_was_emptied(monkeypatch):
    monkeypatch.setattr(turns, "MOST_KNOWN", 2)
    known, cursor = Turns(), uuid7()
    known.searched(LINE, {uuid7(): 1}, cursor)
    known.found((*LINE[:2], "other"), {uuid7(): 1 for _ in range(2)})
    assert known.lines[LINE] == turns.Waiting(cursor=cursor)
