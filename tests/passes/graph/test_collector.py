"""The collector pauses, and garbage does not pile up while it does."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from llmc.passes.graph import collector_paused


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_inside() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled(), "the outer block goes on"
    assert gc.isenabled()


def test_it_runs_again_where_a_block_fails() -> None:
    with pytest.raises(ZeroDivisionError), collector_paused():
        raise ZeroDivisionError
    assert gc.isenabled()


@pytest.mark.parametrize("due", [False, True])
def test_the_end_of_an_inner_block_collects_once_enough_was_made(due: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr("llmc.passes.graph.collector.FEW", 1000)
    monkeypatch.setattr("llmc.passes.graph.collector._alive", 0)
    with collector_paused():
        gc.collect()
        with collector_paused():
            garbage = weakref.ref(Cycle())
            kept = [Cycle() for _ in range(2000 if due else 10)]
        assert (garbage() is None) is due
    assert kept


def test_what_was_there_before_is_looked_at_again_afterwards() -> None:
    before = weakref.ref(Cycle())
    with collector_paused():
        gc.collect()
        assert before() is not None
    assert not gc.get_freeze_count()
    gc.collect()
    assert before() is None


def test_what_others_have_frozen_stays_so() -> None:
    gc.freeze()
    try:
        with collector_paused():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
