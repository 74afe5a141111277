"""Results of writes: kept until they are committed, at most a window of each shard."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.node import write_results
from kvtcp.node.write_results import WriteResults


def of(results: WriteResults, shard: int, seqs: list[int]) -> list[Any]:
    """What is told of these numbers."""
    found, _ = results.of(shard, seqs)
    return found


def test_results_until_they_are_committed() -> None:
    """What is asked for is told, an error too; None for what was never here or is committed."""
    results = WriteResults()
    assert not results and of(results, 0, [1, 2]) == [None, None]
    results.add([(0, 1, True), (1, 1, 7), (0, 3, [20, "exists", {}])])
    results.add([(0, 4, False)])
    assert results and of(results, 0, [4, 1, 2, 3]) == [[False], [True], None, [[20, "exists", {}]]]
    results.commit({0: 3, 5: 9})
    assert of(results, 0, [1, 3, 4]) == [None, None, [False]] and of(results, 1, [1]) == [[7]]
    results.commit({0: 9, 1: 1})
    assert not results


def test_a_copy_that_was_reset() -> None:
    """Its results go, those of others stay."""
    results = WriteResults()
    results.add([(0, 1, True), (1, 1, 7)])
    results.forget(0)
    results.forget(9)
    assert of(results, 0, [1]) == [None] and of(results, 1, [1]) == [[7]]


def test_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard that cannot commit no more than a window is kept, the newest."""
    monkeypatch.setattr(write_results, "WINDOW_ITEMS_MAX", 3)
    results = WriteResults()
    results.add([(0, seq, seq) for seq in range(1, 6)])
    assert of(results, 0, [1, 2, 3, 4, 5]) == [None, None, [3], [4], [5]]


def test_large_results_are_told_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the one that makes a frame full, at least one; what is asked for and not known is None in its place."""
    monkeypatch.setattr(write_results, "RESULTS_BYTES_MAX", 9)
    results = WriteResults()
    results.add([(0, 1, b"12345"), (0, 2, 7), (0, 3, b"12345"), (0, 4, [[b"1234567890"]]), (0, 5, b"1")])
    assert results.of(0, [1, 2, 3, 4]) == ([[b"12345"], [7], [b"12345"]], 10)
    assert results.of(0, [9, 4, 5]) == ([None, [[[b"1234567890"]]]], 26)
    assert results.of(0, [5]) == ([[b"1"]], 1)


def test_the_bound_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large results push out the oldest ones, but not the last one; what is committed makes room."""
    monkeypatch.setattr(write_results, "WRITE_RESULTS_BYTES_MAX", 20)
    results = WriteResults()
    for seq in range(1, 5):
        results.add([(0, seq, b"12345"), (1, seq, b"1")])
    assert of(results, 0, [1, 2, 3, 4]) == [[b"12345"]] * 4
    results.commit({0: 2})
    results.add([(0, 5, b"12345"), (0, 6, b"12345")])
    assert of(results, 0, [3, 4, 5, 6]) == [[b"12345"]] * 4
    results.add([(0, 7, b"12345")])
    assert of(results, 0, [3, 4, 5, 6, 7]) == [None] * 3 + [[b"12345"]] * 2
    results.add([(0, 8, bytes(50)), (0, 9, 1)])
    assert of(results, 0, [7, 8, 9]) == [None, [bytes(50)], [1]]
    results.add([(0, 10, b"1")])
    assert of(results, 0, [8, 9, 10]) == [None, [1], [b"1"]]
    assert of(results, 1, [1, 4]) == [[b"1"]] * 2
    results.commit({0: 10, 1: 4})
    assert not results and not results._bytes
