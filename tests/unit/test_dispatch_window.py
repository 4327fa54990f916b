"""How many tasks of one provider may be outstanding in a lane."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtasks import dispatch


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (2, 1), (4, 3), (64, 48), (100, 75)])
def test_a_provider_holds_its_share_and_at_least_one_slot(slots, most):
    assert dispatch.window(slots) == most


@given(st.integers(1, 10_000), st.floats(0.01, 1.0))
def test_the_window_is_within_the_slots(slots, share):
    from django.test import override_settings

    with override_settings(LLMTASKS={"PROVIDER_SHARE": share}):
        assert 1 <= dispatch.window(slots) <= slots


def test_without_slots_there_is_no_room():
    assert dispatch.window(0) <= 1
