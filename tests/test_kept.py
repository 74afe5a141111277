"""Kept entries: what is forgotten when, and the bound."""

from __future__ import annotations

from random import Random

import pytest

from kvtcp.storage import kept as kept_module
from kvtcp.storage.copy import Logged
from kvtcp.storage.kept import KeptEntries


def entry(shard: int, seq: int, size: int = 5) -> Logged:
    """An entry of this size."""
    return (shard, 1, seq, 1000 * shard + seq, b"e" * size)


def numbers(kept: KeptEntries, shard: int) -> list[int]:
    """What is kept of a shard."""
    return [each[2] for each in kept.of_shard(shard)]


def test_commit_forgets_in_order() -> None:
    """Up to an ordinal, and it says how far each shard is committed."""
    kept = KeptEntries()
    kept.add(0, [entry(0, 1)])
    kept.add(3, [entry(0, 2), entry(1, 1), entry(0, 3)])
    kept.add(5, [entry(1, 2)])
    assert kept.bytes == 25 and numbers(kept, 0) == [1, 2, 3]
    assert kept.commit(-1) == {} and kept.commit(0) == {0: 1}
    assert kept.commit(2) == {} and numbers(kept, 0) == [2, 3]
    assert kept.commit(4) == {0: 3, 1: 1} and numbers(kept, 0) == [] and numbers(kept, 1) == [2]
    assert kept.commit(5) == {1: 2} and kept.bytes == 0 and kept.commit(99) == {}


def test_what_is_from_before_the_link() -> None:
    """It has ordinal 0: -1 keeps it, 0 forgets it."""
    kept = KeptEntries()
    kept.add(7, [entry(0, 1)])
    kept.add(9, [entry(0, 2)])
    kept.new_link()
    kept.add(1, [entry(0, 3)])
    assert kept.commit(-1) == {} and numbers(kept, 0) == [1, 2, 3]
    assert kept.commit(0) == {0: 2} and numbers(kept, 0) == [3] and kept.bytes == 5


def test_a_copy_that_was_reset() -> None:
    """The entries of one shard go; batches without any left too."""
    kept = KeptEntries()
    kept.add(1, [entry(0, 1), entry(1, 1)])
    kept.add(2, [entry(0, 2)])
    kept.forget(0)
    assert numbers(kept, 0) == [] and numbers(kept, 1) == [1] and kept.bytes == 5
    assert kept.commit(2) == {1: 1}


def test_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over it, as much of each shard stays as a window holds, the newest; memory is bounded by that."""
    monkeypatch.setattr(kept_module, "WINDOW_ITEMS_MAX", 4)
    monkeypatch.setattr(kept_module, "WINDOW_BYTES_MAX", 100)
    kept = KeptEntries(bytes_max=200)
    for seq in range(1, 41):
        kept.add(seq, [entry(0, seq)])
    assert numbers(kept, 0) == list(range(1, 41)) and kept.bytes == 200, "not over it yet"
    kept.add(41, [entry(1, 1), entry(0, 41)])
    assert numbers(kept, 0) == [38, 39, 40, 41] and numbers(kept, 1) == [1] and kept.bytes == 25
    assert kept.commit(40) == {0: 40} and numbers(kept, 0) == [41]


def test_the_bound_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry that crosses a window's bytes is still kept."""
    monkeypatch.setattr(kept_module, "WINDOW_BYTES_MAX", 100)
    kept = KeptEntries(bytes_max=200)
    for seq in range(1, 6):
        kept.add(seq, [entry(0, seq, 60)])
    assert numbers(kept, 0) == [3, 4, 5]


def test_many_shards_over_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """If so much really may be uncommitted it is kept, and not looked for at every batch."""
    monkeypatch.setattr(kept_module, "WINDOW_ITEMS_MAX", 10)
    kept = KeptEntries(bytes_max=100)
    looks = [0]
    original = kept._drop_old

    def drop_old() -> None:
        looks[0] += 1
        original()

    kept._drop_old = drop_old  # type: ignore[method-assign]
    for seq in range(1, 9):
        for shard in range(20):
            kept.add(seq, [entry(shard, seq)])
    assert all(numbers(kept, shard) == list(range(1, 9)) for shard in range(20)) and kept.bytes == 800
    assert looks[0] <= 4, "doubling"


def test_against_a_model() -> None:
    """Random batches, commits, links and resets against a plain list."""
    seed = 11
    rng = Random(seed)
    kept = KeptEntries()
    model: list[tuple[int, Logged]] = []
    seqs, ordinal = [0] * 4, 0
    for step in range(2000):
        what = rng.random()
        if what < 0.7:
            ordinal += rng.randint(0, 2)
            batch = []
            for _ in range(rng.randint(1, 4)):
                shard = rng.randrange(4)
                seqs[shard] += 1
                batch.append(entry(shard, seqs[shard], rng.randint(0, 9)))
            kept.add(ordinal, batch)
            model += [(ordinal, each) for each in batch]
        elif what < 0.95:
            upto = rng.randint(-1, ordinal + 1)
            expected = {each[0]: each[2] for number, each in model if number <= upto}
            assert kept.commit(upto) == expected, (seed, step)
            model = [(number, each) for number, each in model if number > upto]
        elif what < 0.98:
            ordinal = 0
            kept.new_link()
            model = [(0, each) for _, each in model]
        else:
            shard = rng.randrange(4)
            kept.forget(shard)
            model = [(number, each) for number, each in model if each[0] != shard]
        assert kept.bytes == sum(len(each[4]) for _, each in model)
        for shard in range(4):
            assert kept.of_shard(shard) == [each for _, each in model if each[0] == shard], (seed, step)


def test_questions_between_changes() -> None:
    """Whatever happens between two questions, the answer is what the batches hold, in order."""
    for seed in range(20):
        rng = Random(seed)
        kept = KeptEntries()
        model: list[tuple[int, Logged]] = []  # ordinal, entry
        ordinal = 0
        for step in range(200):
            kind = rng.randrange(6)
            if kind < 2:
                ordinal += 1
                entries = [entry(rng.randrange(3), 10 * step + n) for n in range(rng.randrange(4))]
                kept.add(ordinal, entries)
                model += [(ordinal, each) for each in entries]
            elif kind == 2:
                until = rng.randrange(ordinal + 1)
                kept.commit(until)
                model = [each for each in model if each[0] > until]
            elif kind == 3 and rng.random() < 0.2:
                kept.new_link()
                model = [(0, each) for _, each in model]
                ordinal = 0
            elif kind == 4 and rng.random() < 0.1:
                kept.forget(1)
                model = [each for each in model if each[1][0] != 1]
            else:
                shard = rng.randrange(3)
                assert kept.of_shard(shard) == [each for _, each in model if each[0] == shard], f"seed {seed}"
