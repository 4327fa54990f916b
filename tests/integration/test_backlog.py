"""What waits, for how long, and by whom: against rows in every state."""

from datetime import timedelta

import pytest
from django.utils import timezone

from llmtasks import backlog
from llmtasks.backlog import Depth, Place
from llmtasks.models import Lane, Mode, Status
from tests import factories

pytestmark = pytest.mark.django_db


def ago(seconds: float):
    return timezone.now() - timedelta(seconds=seconds)


def test_nothing_is_nothing():
    assert backlog.look() == {}


def test_every_state_is_counted_where_it_belongs():
    small, large = factories.tenant(weight=1), factories.tenant(weight=50)
    for seconds in (5, 90, 30):
        factories.task(small, not_before=ago(seconds))
    factories.task(small, not_before=ago(-600), route="other")
    factories.task(large, not_before=ago(10), lane=Lane.BULK)
    factories.task(large, status=Status.QUEUED, lane=Lane.BULK)
    factories.task(small, status=Status.RUNNING)
    factories.task(small, status=Status.RUNNING, mode=Mode.INLINE)
    factories.task(small, status=Status.SUCCEEDED)
    factories.task(small, status=Status.BLOCKED)
    found = backlog.look()
    mine = found.pop(Place("sandbox", "default", "1"))
    assert (mine.due, mine.later, mine.queued, mine.running, mine.inline) == (3, 1, 0, 1, 1)
    assert 90 <= mine.oldest_s < 95
    theirs = found.pop(Place("sandbox", "bulk", "10-99"))
    assert (theirs.due, theirs.later, theirs.queued, theirs.running) == (1, 0, 1, 0)
    assert 10 <= theirs.oldest_s < 15
    assert not found


def test_what_waits_for_its_time_is_not_old():
    factories.task(factories.tenant(), not_before=ago(-60))
    [(_, depth)] = backlog.look().items()
    assert (depth.due, depth.later, depth.oldest_s) == (0, 1, 0.0)


@pytest.mark.parametrize(
    "weight, name", [(1, "1"), (2, "2-9"), (9, "2-9"), (10, "10-99"), (100, "100-1000")]
)
def test_classes_of_tenants(weight, name):
    factories.task(factories.tenant(weight=weight))
    assert [place.tenants for place in backlog.look()] == [name]


def test_a_tenant_that_is_gone_counts_as_the_lightest():
    factories.task()
    assert list(backlog.look()) == [Place("sandbox", "default", "1")]


def test_providers_that_nobody_configured_and_none_at_all_are_seen():
    one = factories.tenant()
    for name in ("", "gone", "sandbox"):
        factories.task(one, provider=name)
    assert {place.provider for place in backlog.look()} == {"", "gone", "sandbox"}


def test_the_oldest_is_found_behind_other_tenants_and_routes():
    for seconds in (1, 2, 300, 3):
        for route in ("a", "b"):
            factories.task(factories.tenant(), not_before=ago(seconds), route=route)
    [depth] = backlog.look().values()
    assert depth.due == 8 and depth.oldest_s >= 300


def test_counting_stops_and_says_so(monkeypatch):
    monkeypatch.setattr(backlog, "COUNTED", 3)
    one, other = factories.tenant(), factories.tenant()
    for _ in range(2):
        factories.task(one)
        factories.task(other, route="b")
    [depth] = backlog.look().values()
    assert depth.due == 3 and depth.is_capped
    [depth] = backlog.by_lane(backlog.look()).values()
    assert depth.is_capped


def test_so_many_lines_are_looked_at_and_no_provider_hides_behind_another(monkeypatch):
    monkeypatch.setattr(backlog, "SEEN", 4)
    for _ in range(10):
        factories.task(factories.tenant(), provider="busy")
    factories.task(factories.tenant(), provider="idle")
    found = backlog.look()
    assert found[Place("busy", "default", "1")].due == 3
    assert found[Place("idle", "default", "1")].due == 1


def test_lanes_together():
    backlog_of = {
        Place("p", "bulk", "1"): Depth(due=1, later=2, queued=3, running=4, inline=5, oldest_s=6),
        Place("p", "bulk", "2-9"): Depth(due=10, oldest_s=1, is_capped=True),
        Place("p", "default", "1"): Depth(due=7),
    }
    found = backlog.by_lane(backlog_of)
    assert found["p", "bulk"] == Depth(11, 2, 3, 4, 5, 6, True)
    assert found["p", "bulk"].waiting == 13
    assert found["p", "default"] == Depth(due=7)
