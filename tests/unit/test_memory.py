"""What a process keeps from the garbage collector."""

import gc
import signal
import weakref
from types import SimpleNamespace

import pytest

from llmtasks import memory, sla
from project import gunicorn


class Ring:
    itself: object


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_what_is_there_is_not_looked_through_again() -> None:
    kept = [[]]
    memory.keep()
    assert gc.get_freeze_count() > 1000
    assert not any(one is kept for one in gc.get_objects())


def test_what_comes_later_is_collected_as_ever() -> None:
    memory.keep()
    before = gc.get_freeze_count()
    ring = Ring()
    ring.itself = ring
    seen = weakref.ref(ring)
    del ring
    gc.collect()
    assert seen() is None
    assert gc.get_freeze_count() == before


def test_a_web_process_keeps_its_code_before_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(signal, "siginterrupt", lambda *_: None)
    monkeypatch.setattr(sla, "threads", sla.threads)
    gunicorn.post_worker_init(SimpleNamespace(cfg=SimpleNamespace(threads=7)))
    assert sla.threads == 7
    assert gc.get_freeze_count() > 1000
