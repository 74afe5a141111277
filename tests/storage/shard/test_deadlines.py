"""Deadlines: what is expired at a stamp, in order of time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtcp.storage.shard import deadlines as deadlines_module
from kvtcp.storage.shard.deadlines import Deadlines

PAIRS = st.tuples(st.integers(0, 20), st.binary(max_size=1))


@settings(deadline=None, max_examples=100)
@given(start=st.sets(PAIRS, max_size=20), toggles=st.lists(PAIRS, max_size=40), stamp_ms=st.integers(0, 21))
def test_deadlines_are_a_sorted_set(
    start: set[tuple[int, bytes]], toggles: list[tuple[int, bytes]], stamp_ms: int
) -> None:
    """Pairs added and removed in any order: every question is answered as by a sorted list."""
    deadlines = Deadlines(start, 4)
    model = set(start)
    for pair in toggles:
        if pair in model:
            deadlines.remove(*pair)
        else:
            deadlines.add(*pair)
        model ^= {pair}
        deadlines.check()
        expired = [key for ms, key in sorted(model) if ms <= stamp_ms]
        assert deadlines.any_expired(stamp_ms) == bool(expired)
        assert deadlines.count_expired(stamp_ms) == len(expired)
        assert deadlines.expired(stamp_ms) == expired
        assert deadlines.expired(stamp_ms, 2) == expired[:2]
        assert deadlines.pairs() == sorted(model)
        assert len(deadlines) == len(model)
    gone = sorted(model)[::2]
    deadlines.remove_all(reversed(gone))
    deadlines.check()
    assert deadlines.pairs() == sorted(model.difference(gone))


def test_remove_of_an_absent_pair() -> None:
    """Removing what is not there is an error, never a silent success."""
    with pytest.raises(KeyError):
        Deadlines([(5, b"a")]).remove(6, b"a")
    with pytest.raises(KeyError):
        Deadlines([(5, b"a")]).remove_all([(5, b"a"), (6, b"a")])


def test_very_many_are_sorted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same order, however many pieces."""
    pairs = [(n * 7919 % 101, b"%d" % n) for n in range(300)]
    expected = Deadlines(pairs, 4).pairs()
    for at_once in (1, 7, 299, 300):
        monkeypatch.setattr(deadlines_module, "SORTED_AT_ONCE_MAX", at_once)
        found = Deadlines(pairs, 4)
        found.check()
        assert found.pairs() == expected == sorted(pairs)
