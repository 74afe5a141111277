"""Tests of the cluster state: stamps and their bound, and what waits."""

from __future__ import annotations

from dataclasses import replace

from kvtcp.replication.sequencing.cluster_state import ClusterState
from tests.support.replication_fakes import make_map


def test_stamps_only_grow_up_to_the_bound() -> None:
    """R12: a clock that goes back, or beyond the bound, gives the stamp of before."""
    state = ClusterState(replace(make_map(), stamp_bound_ms=100))
    stamps = []
    for now_ms, wall_ms in enumerate((50, 40, 90, 200)):
        state.begin(wall_ms, now_ms)
        stamps.append(state.stamp_ms)
        assert state.now_ms == now_ms
    assert stamps == [50, 50, 90, 100]
    state.map_changed(replace(make_map(), stamp_bound_ms=150, min_insync=2))
    state.begin(200, 5)
    assert state.stamp_ms == 150 and state.min_insync == 2


def test_time_that_ended_does_not_go_on() -> None:
    """Whatever bound is stored then."""
    state = ClusterState(replace(make_map(), stamp_bound_ms=100))
    state.begin(50, 1)
    assert state.end_time() == 50
    state.map_changed(replace(make_map(), stamp_bound_ms=150))
    state.begin(120, 2)
    assert state.stamp_ms == 50


def test_what_waits_is_counted() -> None:
    """Requests and bytes, more and fewer."""
    state = ClusterState(make_map())
    state.count_waiting(1, 10)
    state.count_waiting(1, 5)
    state.count_waiting(-1, -10)
    assert (state.waiting_items, state.waiting_bytes) == (1, 5)
