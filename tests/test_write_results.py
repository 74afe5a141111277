"""Results of writes: kept until they are committed, at most a window of each shard."""

from __future__ import annotations

import pytest

from kvtcp.replication import write_results
from kvtcp.replication.write_results import WriteResults


def test_results_until_they_are_committed() -> None:
    """What is asked for is told, an error too; None for what was never here or is committed."""
    results = WriteResults()
    assert not results and results.of(0, [1, 2]) == [None, None]
    results.add([(0, 1, True), (1, 1, 7), (0, 3, [20, "exists", {}])])
    results.add([(0, 4, False)])
    assert results and results.of(0, [4, 1, 2, 3]) == [[False], [True], None, [[20, "exists", {}]]]
    results.commit({0: 3, 5: 9})
    assert results.of(0, [1, 3, 4]) == [None, None, [False]] and results.of(1, [1]) == [[7]]
    results.commit({0: 9, 1: 1})
    assert not results


def test_a_copy_that_was_reset() -> None:
    """Its results go, those of others stay."""
    results = WriteResults()
    results.add([(0, 1, True), (1, 1, 7)])
    results.forget(0)
    results.forget(9)
    assert results.of(0, [1]) == [None] and results.of(1, [1]) == [[7]]


def test_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard that cannot commit no more than a window is kept, the newest."""
    monkeypatch.setattr(write_results, "WINDOW_ITEMS_MAX", 3)
    results = WriteResults()
    results.add([(0, seq, seq) for seq in range(1, 6)])
    assert results.of(0, [1, 2, 3, 4, 5]) == [None, None, [3], [4], [5]]
