"""How much may be released: the window of a provider in a lane, and what limits leave."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from llmtasks import room
from llmtasks.room import Model, Room
from llmtasks.turns import Ask, Head

A, B, C = ("a", "m"), ("b", "m"), ("c", "m")


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (2, 1), (4, 3), (64, 48), (100, 75)])
def test_a_provider_holds_its_share_and_at_least_one_slot(slots, most):
    assert room.window(slots) == most


@given(st.integers(1, 10_000), st.floats(0.01, 1.0))
def test_the_window_is_within_the_slots(slots, share):
    from django.test import override_settings

    with override_settings(LLMTASKS={"PROVIDER_SHARE": share}):
        assert 1 <= room.window(slots) <= slots


def test_without_slots_there_is_no_room():
    assert room.window(0) <= 1


# --- what limits leave ----------------------------------------------------------------------------


def head(route: str, tenant: object = None) -> Head:
    ask = Ask(("a", "default", route), tenant or uuid7(), 1, 1)
    return Head(uuid7(), ask, datetime.now(UTC))


def taken(found: Room, route: str, most: int = 100) -> int:
    return sum(found.take(head(route)) for _ in range(most))


def test_a_route_has_the_room_of_all_its_candidates():
    found = Room({"r": (A, B)}, {A: 3.0, B: 2.5})
    assert found.of_route("r") == 5.5
    assert taken(found, "r") == 5


def test_routes_share_the_room_of_a_model():
    found = Room({"r": (A,), "s": (B, A)}, {A: 3.0, B: 1.0})
    assert taken(found, "r", 2) == 2
    assert taken(found, "s") == 2
    assert taken(found, "r") == 0


def test_a_candidate_without_limit_is_enough():
    found = Room({"r": (A, B)}, {A: 0.0})
    assert taken(found, "r") == 100


def test_a_route_that_nobody_can_answer_has_no_room_and_one_that_is_gone_has():
    found = Room({"out": (), "gone": None})
    assert (taken(found, "out"), taken(found, "gone")) == (0, 100)


def test_a_tenants_own_limit_holds_over_all_routes():
    tenant = uuid7()
    found = Room({"r": (A,), "s": (B,)}, tenants={tenant: 2.0})
    takes = [found.take(head(route, tenant)) for route in ("r", "s", "r", "s")]
    assert takes == [True, True, False, False]
    assert found.take(head("r"))


def test_more_under_way_than_there_is_room_leaves_none():
    found = Room({"r": (A, B)}, {A: 3.0, B: 2.0})
    found.book("r", 50)
    assert found.of_route("r") == 0
    found = Room({"r": (A,)}, {A: -4.0})
    assert found.of_route("r") == 0


ROUTES: dict[str, tuple[Model, ...]] = {"r": (A, B), "s": (B, C), "t": (C,), "u": (A, C)}


@given(
    st.dictionaries(st.sampled_from([A, B, C]), st.floats(0, 20), min_size=3),
    st.lists(st.sampled_from(sorted(ROUTES)), max_size=80),
)
def test_never_more_is_taken_than_the_models_have(rooms, routes):
    found = Room(dict(ROUTES), dict(rooms))
    count = sum(found.take(head(route)) for route in routes)
    assert count <= sum(rooms.values()) + 1e-6
    assert all(left >= -1e-6 for left in found.models.values())
