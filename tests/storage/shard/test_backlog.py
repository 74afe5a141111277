"""Kept entries: what is forgotten when, and the bound."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from kvtcp.constants import MIB, RECENT_ENTRY_BYTES, VALUE_BYTES_MAX, WINDOW_BYTES_MAX
from kvtcp.storage.shard import backlog as kept_module
from kvtcp.storage.shard.backlog import INDEX_IDLE_COMMITS, KeptEntries
from kvtcp.storage.shard.copy import Logged


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


def test_very_much_is_forgotten_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a shard commits at last that held all others back: some with each call, more than a batch adds."""
    monkeypatch.setattr(kept_module, "KEPT_PASS_ENTRIES", 10)
    kept = KeptEntries()
    for seq in range(1, 101):
        kept.add(seq, [entry(0, seq)])
    hints = []
    while kept.bytes:
        hints.append(kept.commit(100)[0])
    assert hints == [20, 40, 60, 80, 100]


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
    monkeypatch.setattr(kept_module, "KEPT_SHARD_BYTES_MAX", 100)
    kept = KeptEntries(bytes_max=200)
    for seq in range(1, 41):
        kept.add(seq, [entry(0, seq)])
    assert numbers(kept, 0) == list(range(1, 41)) and kept.bytes == 200, "not over it yet"
    kept.add(41, [entry(1, 1), entry(0, 41)])
    assert numbers(kept, 0) == [38, 39, 40, 41] and numbers(kept, 1) == [1] and kept.bytes == 25
    assert kept.commit(40) == {0: 40} and numbers(kept, 0) == [41]


def test_the_bound_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry that crosses a window's bytes is still kept."""
    monkeypatch.setattr(kept_module, "KEPT_SHARD_BYTES_MAX", 100)
    kept = KeptEntries(bytes_max=200)
    for seq in range(1, 6):
        kept.add(seq, [entry(0, seq, 60)])
    assert numbers(kept, 0) == [3, 4, 5]


def test_a_takeover_looks_up_many_shards() -> None:
    """All entries are walked through once, not for every shard; what is added meanwhile is found too."""
    kept = KeptEntries()
    walks = 0
    original = kept._all

    def walk() -> Iterator[tuple[int, int, list[Logged]]]:
        nonlocal walks
        walks += 1
        return original()

    kept._all = walk  # type: ignore[method-assign]
    for seq in range(1, 4):
        kept.add(seq, [entry(shard, seq) for shard in range(100)])
    for shard in range(100):
        assert list(kept.look_up(shard)) == [1, 2, 3]
        kept.add_shipped(shard, [entry(shard, 4)])
        kept.add(3, [entry(shard, 5)])
        assert list(kept.look_up(shard)) == [1, 2, 3, 4, 5]
        kept.commit(2)
    assert walks == 1


def test_committed_entries_are_recent() -> None:
    """They are looked up, and not among those that may be uncommitted; the oldest go when they are too much."""
    kept = KeptEntries(recent_bytes_max=4 * (RECENT_ENTRY_BYTES + 5))
    for seq in range(1, 8):
        kept.add(seq, [entry(0, seq)])
    assert kept.commit(3) == {0: 3}
    assert numbers(kept, 0) == [4, 5, 6, 7] and list(kept.look_up(0)) == [1, 2, 3, 4, 5, 6, 7]
    kept.commit(6)
    assert numbers(kept, 0) == [7] and list(kept.look_up(0)) == [3, 4, 5, 6, 7]
    assert kept.recent_bytes == 4 * (RECENT_ENTRY_BYTES + 5) and kept.bytes == 5
    assert kept.look_up(0)[3] == entry(0, 3)
    kept.add(8, [entry(0, 8, 2000)])
    kept.commit(8)
    assert kept.recent_bytes == 0 and not kept.look_up(0), "one that is too large is not recent at all"


def test_recent_entries_of_a_copy_that_was_reset() -> None:
    """They are gone for whoever asks, with and without an index, and with one half made."""
    for indexed in (0, 1, 100):
        kept = KeptEntries()
        for seq in range(1, 6):
            kept.add(seq, [entry(0, seq), entry(1, seq)])
        kept.commit(4)
        assert not indexed or kept.index_some(indexed) == (indexed == 100)
        kept.forget(0)
        kept.add(6, [entry(0, 1, 9)])
        kept.commit(6)
        assert kept.look_up(0) == {1: entry(0, 1, 9)} and list(kept.look_up(1)) == [1, 2, 3, 4, 5]


def test_an_index_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question may be prepared a little at a time, while entries are added, committed and dropped."""
    monkeypatch.setattr(kept_module, "KEPT_PASS_ENTRIES", 4)
    kept = KeptEntries(recent_bytes_max=30 * (RECENT_ENTRY_BYTES + 5))
    for seq in range(1, 41):
        kept.add(seq, [entry(0, seq)])
    while kept.commit(35):
        pass
    seq = 40
    while not kept.index_some(4):
        seq += 1
        kept.add(seq, [entry(0, seq)])
        kept.commit(seq - 5)
    assert seq > 44
    assert sorted(kept.look_up(0)) == list(range(seq - 34, seq + 1))


def test_an_index_that_nobody_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped after some batches, and made again when it is wanted."""
    monkeypatch.setattr(kept_module, "INDEX_IDLE_COMMITS", 3)
    kept = KeptEntries()
    kept.add(1, [entry(0, 1)])
    assert list(kept.look_up(0)) == [1]
    for ordinal in range(2, 6):
        assert kept._index is not None
        kept.add(ordinal, [entry(0, ordinal)])
        kept.commit(ordinal)
    assert kept._index is None
    assert list(kept.look_up(0)) == [1, 2, 3, 4, 5]


def test_an_index_forgets_what_a_pass_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that are kept no more are not found either."""
    monkeypatch.setattr(kept_module, "WINDOW_ITEMS_MAX", 4)
    kept = KeptEntries(bytes_max=200)
    for seq in range(1, 41):
        kept.add(seq, [entry(0, seq)])
    assert len(kept.look_up(0)) == 40
    kept.add(41, [entry(0, 41)])
    assert list(kept.look_up(0)) == numbers(kept, 0) == [38, 39, 40, 41]


def test_what_was_shipped() -> None:
    """No ordinal commits it, but that of a later entry of its shard; at a new link it is as all from before."""
    kept = KeptEntries()
    kept.add(3, [entry(0, 1), entry(1, 1)])
    kept.add_shipped(1, [entry(1, 2), entry(1, 3)])
    assert kept.commit(9) == {0: 1, 1: 1}
    assert numbers(kept, 1) == [2, 3] and list(kept.look_up(1)) == [1, 2, 3]
    kept.add_shipped(1, [entry(1, 4)])
    kept.add(10, [entry(0, 2), entry(1, 5)])
    assert numbers(kept, 1) == [2, 3, 4, 5] and kept.bytes == 25
    assert kept.commit(9) == {} and kept.commit(10) == {0: 2, 1: 5} and kept.bytes == 0
    kept.add_shipped(0, [entry(0, 3)])
    kept.new_link()
    assert kept.bytes == 5 and kept.commit(-1) == {} and kept.commit(0) == {0: 3}
    kept.add_shipped(0, [entry(0, 4)])
    kept.forget(0)
    assert numbers(kept, 0) == [] and not kept.look_up(0)


def test_more_is_shipped_than_a_window_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is older than a window is committed, hence only recent."""
    monkeypatch.setattr(kept_module, "WINDOW_ITEMS_MAX", 4)
    monkeypatch.setattr(kept_module, "KEPT_SHARD_BYTES_MAX", 100)
    kept = KeptEntries()
    kept.add_shipped(0, [entry(0, seq) for seq in range(1, 8)])
    assert numbers(kept, 0) == [4, 5, 6, 7]
    kept.add_shipped(0, [entry(0, 8, 90)])
    assert numbers(kept, 0) == [6, 7, 8] and list(kept.look_up(0)) == list(range(1, 9))
    assert kept.recent_bytes == 5 * (RECENT_ENTRY_BYTES + 5)


def test_a_window_that_ends_with_the_largest_value() -> None:
    """It has more than its bytes: what was queued before that value may be uncommitted as well."""
    kept = KeptEntries()
    for seq in range(1, 8):
        kept.add(seq, [entry(0, seq, MIB)])
    kept.add(8, [entry(0, 8, VALUE_BYTES_MAX + 100)])
    assert sum(len(each[4]) for each in kept.of_shard(0)[:-1]) < WINDOW_BYTES_MAX, "the window took the last one"
    for seq in range(1, 80):
        kept.add(8 + seq, [entry(1, seq, MIB)])
    assert numbers(kept, 0) == list(range(1, 9)) and len(numbers(kept, 1)) < 79


def test_many_shards_over_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """If so much really may be uncommitted it is kept, and not looked for at every batch."""
    monkeypatch.setattr(kept_module, "WINDOW_ITEMS_MAX", 10)
    kept = KeptEntries(bytes_max=100)
    looks = 0
    for seq in range(1, 9):
        for shard in range(20):
            before = kept._look_bytes
            kept.add(seq, [entry(shard, seq)])
            looks += kept._look_bytes != before
    assert all(numbers(kept, shard) == list(range(1, 9)) for shard in range(20)) and kept.bytes == 800
    assert looks <= 4, "doubling"


def test_a_pass_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `add` looks at more than a slice, and what is committed or added meanwhile is gone, or there, at the end."""
    monkeypatch.setattr(kept_module, "WINDOW_ITEMS_MAX", 8)
    monkeypatch.setattr(kept_module, "KEPT_PASS_ENTRIES", 20)
    kept = KeptEntries(bytes_max=1000)
    for seq in range(1, 202):
        kept.add(seq, [entry(0, seq)])
    newest = list(range(194, 202))
    assert numbers(kept, 0) == list(range(1, 182)) + newest, "the pass began"
    assert [kept.commit(100)[0] for _ in range(3)] == [40, 80, 100]
    added = 0
    while kept._older:
        added += 1
        newest.append(201 + added)
        kept.add(201 + added, [entry(0, 201 + added)])
    assert added == 5, "81 entries, 20 at a time"
    assert numbers(kept, 0) == newest and kept.bytes == 5 * len(newest)
    assert kept.commit(500) == {0: 201 + added} and kept.bytes == 0


def test_a_pass_whose_rest_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends there, and the next one begins in order."""
    monkeypatch.setattr(kept_module, "KEPT_PASS_ENTRIES", 4)
    kept = KeptEntries(bytes_max=100)
    for seq in range(1, 24):
        kept.add(seq, [entry(0, seq)])
    assert kept._older
    for _ in range(3):
        kept.commit(20)
    assert numbers(kept, 0) == [21, 22, 23]
    for seq in range(24, 60):
        kept.add(seq, [entry(0, seq)])
        assert numbers(kept, 0) == list(range(21, seq + 1)), "in order, though the pass had nothing left to look at"
    while kept.commit(99):
        pass
    assert numbers(kept, 0) == [] and kept.bytes == 0 and not kept._older


def test_against_a_model() -> None:
    """Random batches, commits, links and resets against a plain list."""
    seed = 11
    rng = Random(seed)
    kept = KeptEntries()
    model: list[tuple[int, Logged]] = []
    recent: list[tuple[int, Logged]] = []
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
            recent += [(number, each) for number, each in model if number <= upto]
            model = [(number, each) for number, each in model if number > upto]
        elif what < 0.98:
            ordinal = 0
            kept.new_link()
            model = [(0, each) for _, each in model]
        else:
            shard = rng.randrange(4)
            kept.forget(shard)
            model = [(number, each) for number, each in model if each[0] != shard]
            recent = [(number, each) for number, each in recent if each[0] != shard]
        assert kept.bytes == sum(len(each[4]) for _, each in model)
        for shard in range(4):
            expected_entries = [each for _, each in model if each[0] == shard]
            assert kept.of_shard(shard) == expected_entries, (seed, step)
            if step % 3 == 0:  # so the index meets everything that may change it
                expected_numbers = {each[2]: each for _, each in recent if each[0] == shard}
                expected_numbers |= {each[2]: each for each in expected_entries}
                assert kept.look_up(shard) == expected_numbers, (seed, step)
            elif step % 100 == 1:
                kept._index = None


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


def test_entries_from_before_the_link_are_kept_by_shard() -> None:
    """One shard is set aside or forgotten without a look at the others; the rest is committed at 0, some at a time."""
    kept = KeptEntries()
    for seq in range(1, 5):
        kept.add(seq, [entry(shard, seq) for shard in range(3)])
    kept.new_link()
    kept.add(1, [entry(0, 5), entry(2, 5)])
    kept.set_aside(0)
    kept.forget(1)
    assert kept.bytes == 25 and numbers(kept, 0) == [1, 2, 3, 4, 5] and numbers(kept, 1) == []
    assert kept.commit(-1) == {} and kept.commit(0) == {2: 4} and kept.commit(1) == {2: 5} and kept.bytes == 0
    assert numbers(kept, 0) == [1, 2, 3, 4, 5], "what was set aside is committed by no ordinal of this link"


def test_much_from_before_the_link_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the bound, of each shard only what a window holds, the newest."""
    monkeypatch.setattr(kept_module, "WINDOW_ITEMS_MAX", 4)
    kept = KeptEntries(bytes_max=50)
    kept.add(1, [entry(0, seq) for seq in range(1, 10)])
    kept.add(2, [entry(1, 1), entry(1, 2)])
    kept.new_link()
    assert numbers(kept, 0) == [6, 7, 8, 9] and numbers(kept, 1) == [1, 2] and kept.bytes == 30
    assert set(kept.look_up(0)) == {6, 7, 8, 9}


def test_recent_batches_of_a_running_index_are_the_entries_themselves() -> None:
    """What the index has goes with its batch, and a batch that was packed before the index began is found in it."""
    kept = KeptEntries(recent_bytes_max=3 * (RECENT_ENTRY_BYTES + 5))
    for number in range(1, 4):
        kept.add(number, [entry(0, number)])
        kept.commit(number)
    assert list(kept.look_up(0).values()) == [entry(0, number) for number in (1, 2, 3)]
    kept.add(4, [entry(0, 4)])
    kept.commit(4)  # number 1, which was packed, is too old now
    assert list(kept.look_up(0).values()) == [entry(0, number) for number in (2, 3, 4)]
    for _ in range(INDEX_IDLE_COMMITS + 1):
        kept.commit(4)
    kept.add(5, [entry(0, 5)])
    kept.commit(5)
    assert list(kept.look_up(0).values()) == [entry(0, number) for number in (3, 4, 5)]
