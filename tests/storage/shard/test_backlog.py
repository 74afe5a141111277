"""Backlog: which entries are released when, and the bound."""

from collections.abc import Iterator
from random import Random

import pytest

from kvtcp.constants import MIB, RECENT_ENTRY_BYTES, VALUE_BYTES_MAX, WINDOW_BYTES_MAX
from kvtcp.storage.shard import backlog as backlog_module
from kvtcp.storage.shard.backlog import INDEX_IDLE_COMMITS, Backlog
from kvtcp.storage.shard.table import Logged


def entry(shard: int, seq: int, size: int = 5) -> Logged:
    """An entry of this size."""
    return (shard, 1, seq, 1000 * shard + seq, b"e" * size)


def numbers(backlog: Backlog, shard: int) -> list[int]:
    """The numbers of the entries of a shard that may be uncommitted."""
    return [each[2] for each in backlog.of_shard(shard)]


def test_commit_forgets_in_order(backlog: Backlog) -> None:
    """Up to an ordinal, and it says how far each shard is committed."""
    backlog.add(0, [entry(0, 1)])
    backlog.add(3, [entry(0, 2), entry(1, 1), entry(0, 3)])
    backlog.add(5, [entry(1, 2)])
    assert backlog.bytes == 25 and numbers(backlog, 0) == [1, 2, 3]
    assert backlog.commit(-1) == {} and backlog.commit(0) == {0: 1}
    assert backlog.commit(2) == {} and numbers(backlog, 0) == [2, 3]
    assert backlog.commit(4) == {0: 3, 1: 1} and numbers(backlog, 0) == [] and numbers(backlog, 1) == [2]
    assert backlog.commit(5) == {1: 2} and backlog.bytes == 0 and backlog.commit(99) == {}


def test_very_much_is_forgotten_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a shard commits at last that held all others back: some with each call, more than a batch adds."""
    monkeypatch.setattr(backlog_module, "KEPT_PASS_ENTRIES", 10)
    backlog = Backlog()
    for seq in range(1, 101):
        backlog.add(seq, [entry(0, seq)])
    hints = []
    while backlog.bytes:
        hints.append(backlog.commit(100)[0])
    assert hints == [20, 40, 60, 80, 100]


def test_what_is_from_before_the_link(backlog: Backlog) -> None:
    """It has ordinal 0: -1 keeps it, 0 forgets it."""
    backlog.add(7, [entry(0, 1)])
    backlog.add(9, [entry(0, 2)])
    backlog.new_link()
    backlog.add(1, [entry(0, 3)])
    assert backlog.commit(-1) == {} and numbers(backlog, 0) == [1, 2, 3]
    assert backlog.commit(0) == {0: 2} and numbers(backlog, 0) == [3] and backlog.bytes == 5


def test_a_copy_that_was_reset(backlog: Backlog) -> None:
    """The entries of one shard go; batches without any left too."""
    backlog.add(1, [entry(0, 1), entry(1, 1)])
    backlog.add(2, [entry(0, 2)])
    backlog.forget(0)
    assert numbers(backlog, 0) == [] and numbers(backlog, 1) == [1] and backlog.bytes == 5
    assert backlog.commit(2) == {1: 1}


def test_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over it, as much of each shard stays as a window holds, the newest; memory is bounded by that."""
    monkeypatch.setattr(backlog_module, "WINDOW_ITEMS_MAX", 4)
    monkeypatch.setattr(backlog_module, "KEPT_SHARD_BYTES_MAX", 100)
    backlog = Backlog(bytes_max=200)
    for seq in range(1, 41):
        backlog.add(seq, [entry(0, seq)])
    assert numbers(backlog, 0) == list(range(1, 41)) and backlog.bytes == 200, "not over it yet"
    backlog.add(41, [entry(1, 1), entry(0, 41)])
    assert numbers(backlog, 0) == [38, 39, 40, 41] and numbers(backlog, 1) == [1] and backlog.bytes == 25
    assert backlog.commit(40) == {0: 40} and numbers(backlog, 0) == [41]


def test_the_bound_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry that crosses a window's bytes is still backlog."""
    monkeypatch.setattr(backlog_module, "KEPT_SHARD_BYTES_MAX", 100)
    backlog = Backlog(bytes_max=200)
    for seq in range(1, 6):
        backlog.add(seq, [entry(0, seq, 60)])
    assert numbers(backlog, 0) == [3, 4, 5]


def test_a_takeover_looks_up_many_shards(backlog: Backlog) -> None:
    """All entries are walked through once, not for every shard; what is added meanwhile is found too."""
    walks = 0
    original = backlog._all

    def walk() -> Iterator[tuple[int, int, list[Logged]]]:
        nonlocal walks
        walks += 1
        return original()

    backlog._all = walk  # type: ignore[method-assign]
    for seq in range(1, 4):
        backlog.add(seq, [entry(shard, seq) for shard in range(100)])
    for shard in range(100):
        assert list(backlog.look_up(shard)) == [1, 2, 3]
        backlog.add_shipped(shard, [entry(shard, 4)])
        backlog.add(3, [entry(shard, 5)])
        assert list(backlog.look_up(shard)) == [1, 2, 3, 4, 5]
        backlog.commit(2)
    assert walks == 1


def test_committed_entries_are_recent() -> None:
    """They are looked up, and not among those that may be uncommitted; the oldest go when they are too much."""
    backlog = Backlog(recent_bytes_max=4 * (RECENT_ENTRY_BYTES + 5))
    for seq in range(1, 8):
        backlog.add(seq, [entry(0, seq)])
    assert backlog.commit(3) == {0: 3}
    assert numbers(backlog, 0) == [4, 5, 6, 7] and list(backlog.look_up(0)) == [1, 2, 3, 4, 5, 6, 7]
    backlog.commit(6)
    assert numbers(backlog, 0) == [7] and list(backlog.look_up(0)) == [3, 4, 5, 6, 7]
    assert backlog.recent_bytes == 4 * (RECENT_ENTRY_BYTES + 5) and backlog.bytes == 5
    assert backlog.look_up(0)[3] == entry(0, 3)
    backlog.add(8, [entry(0, 8, 2000)])
    backlog.commit(8)
    assert backlog.recent_bytes == 0 and not backlog.look_up(0), "one that is too large is not recent at all"


def test_recent_entries_of_a_copy_that_was_reset() -> None:
    """They are gone for whoever asks, with and without an index, and with one half made."""
    for indexed in (0, 1, 100):
        backlog = Backlog()
        for seq in range(1, 6):
            backlog.add(seq, [entry(0, seq), entry(1, seq)])
        backlog.commit(4)
        assert not indexed or backlog.index_some(indexed) == (indexed == 100)
        backlog.forget(0)
        backlog.add(6, [entry(0, 1, 9)])
        backlog.commit(6)
        assert backlog.look_up(0) == {1: entry(0, 1, 9)} and list(backlog.look_up(1)) == [1, 2, 3, 4, 5]


def test_an_index_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question may be prepared a little at a time, while entries are added, committed and dropped."""
    monkeypatch.setattr(backlog_module, "KEPT_PASS_ENTRIES", 4)
    backlog = Backlog(recent_bytes_max=30 * (RECENT_ENTRY_BYTES + 5))
    for seq in range(1, 41):
        backlog.add(seq, [entry(0, seq)])
    while backlog.commit(35):
        pass
    seq = 40
    while not backlog.index_some(4):
        seq += 1
        backlog.add(seq, [entry(0, seq)])
        backlog.commit(seq - 5)
    assert seq > 44
    assert sorted(backlog.look_up(0)) == list(range(seq - 34, seq + 1))


def test_an_index_that_nobody_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped after some batches, and made again when it is wanted."""
    monkeypatch.setattr(backlog_module, "INDEX_IDLE_COMMITS", 3)
    backlog = Backlog()
    backlog.add(1, [entry(0, 1)])
    assert list(backlog.look_up(0)) == [1]
    for ordinal in range(2, 6):
        assert backlog._index is not None
        backlog.add(ordinal, [entry(0, ordinal)])
        backlog.commit(ordinal)
    assert backlog._index is None
    assert list(backlog.look_up(0)) == [1, 2, 3, 4, 5]


def test_an_index_forgets_what_a_pass_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that a pass dropped are not found either."""
    monkeypatch.setattr(backlog_module, "WINDOW_ITEMS_MAX", 4)
    backlog = Backlog(bytes_max=200)
    for seq in range(1, 41):
        backlog.add(seq, [entry(0, seq)])
    assert len(backlog.look_up(0)) == 40
    backlog.add(41, [entry(0, 41)])
    assert list(backlog.look_up(0)) == numbers(backlog, 0) == [38, 39, 40, 41]


def test_what_was_shipped(backlog: Backlog) -> None:
    """No ordinal commits it, but that of a later entry of its shard; at a new link it is as all from before."""
    backlog.add(3, [entry(0, 1), entry(1, 1)])
    backlog.add_shipped(1, [entry(1, 2), entry(1, 3)])
    assert backlog.commit(9) == {0: 1, 1: 1}
    assert numbers(backlog, 1) == [2, 3] and list(backlog.look_up(1)) == [1, 2, 3]
    backlog.add_shipped(1, [entry(1, 4)])
    backlog.add(10, [entry(0, 2), entry(1, 5)])
    assert numbers(backlog, 1) == [2, 3, 4, 5] and backlog.bytes == 25
    assert backlog.commit(9) == {} and backlog.commit(10) == {0: 2, 1: 5} and backlog.bytes == 0
    backlog.add_shipped(0, [entry(0, 3)])
    backlog.new_link()
    assert backlog.bytes == 5 and backlog.commit(-1) == {} and backlog.commit(0) == {0: 3}
    backlog.add_shipped(0, [entry(0, 4)])
    backlog.forget(0)
    assert numbers(backlog, 0) == [] and not backlog.look_up(0)


def test_more_is_shipped_than_a_window_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is older than a window is committed, hence only recent."""
    monkeypatch.setattr(backlog_module, "WINDOW_ITEMS_MAX", 4)
    monkeypatch.setattr(backlog_module, "KEPT_SHARD_BYTES_MAX", 100)
    backlog = Backlog()
    backlog.add_shipped(0, [entry(0, seq) for seq in range(1, 8)])
    assert numbers(backlog, 0) == [4, 5, 6, 7]
    backlog.add_shipped(0, [entry(0, 8, 90)])
    assert numbers(backlog, 0) == [6, 7, 8] and list(backlog.look_up(0)) == list(range(1, 9))
    assert backlog.recent_bytes == 5 * (RECENT_ENTRY_BYTES + 5)


def test_a_window_that_ends_with_the_largest_value(backlog: Backlog) -> None:
    """It has more than its bytes: what was queued before that value may be uncommitted as well."""
    for seq in range(1, 8):
        backlog.add(seq, [entry(0, seq, MIB)])
    backlog.add(8, [entry(0, 8, VALUE_BYTES_MAX + 100)])
    assert sum(len(each[4]) for each in backlog.of_shard(0)[:-1]) < WINDOW_BYTES_MAX, "the window took the last one"
    for seq in range(1, 80):
        backlog.add(8 + seq, [entry(1, seq, MIB)])
    assert numbers(backlog, 0) == list(range(1, 9)) and len(numbers(backlog, 1)) < 79


def test_many_shards_over_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """If so much really may be uncommitted it is backlog, and not looked for at every batch."""
    monkeypatch.setattr(backlog_module, "WINDOW_ITEMS_MAX", 10)
    backlog = Backlog(bytes_max=100)
    looks = 0
    for seq in range(1, 9):
        for shard in range(20):
            before = backlog._look_bytes
            backlog.add(seq, [entry(shard, seq)])
            looks += backlog._look_bytes != before
    assert all(numbers(backlog, shard) == list(range(1, 9)) for shard in range(20)) and backlog.bytes == 800
    assert looks <= 4, "doubling"


def test_a_pass_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `add` looks at more than a slice, and what is committed or added meanwhile is gone, or there, at the end."""
    monkeypatch.setattr(backlog_module, "WINDOW_ITEMS_MAX", 8)
    monkeypatch.setattr(backlog_module, "KEPT_PASS_ENTRIES", 20)
    backlog = Backlog(bytes_max=1000)
    for seq in range(1, 202):
        backlog.add(seq, [entry(0, seq)])
    newest = list(range(194, 202))
    assert numbers(backlog, 0) == list(range(1, 182)) + newest, "the pass began"
    assert [backlog.commit(100)[0] for _ in range(3)] == [40, 80, 100]
    added = 0
    while backlog._older:
        added += 1
        newest.append(201 + added)
        backlog.add(201 + added, [entry(0, 201 + added)])
    assert added == 5, "81 entries, 20 at a time"
    assert numbers(backlog, 0) == newest and backlog.bytes == 5 * len(newest)
    assert backlog.commit(500) == {0: 201 + added} and backlog.bytes == 0


def test_a_pass_whose_rest_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends there, and the next one begins in order."""
    monkeypatch.setattr(backlog_module, "KEPT_PASS_ENTRIES", 4)
    backlog = Backlog(bytes_max=100)
    for seq in range(1, 24):
        backlog.add(seq, [entry(0, seq)])
    assert backlog._older
    for _ in range(3):
        backlog.commit(20)
    assert numbers(backlog, 0) == [21, 22, 23]
    for seq in range(24, 60):
        backlog.add(seq, [entry(0, seq)])
        assert numbers(backlog, 0) == list(range(21, seq + 1)), "in order, though the pass had nothing left to look at"
    while backlog.commit(99):
        pass
    assert numbers(backlog, 0) == [] and backlog.bytes == 0 and not backlog._older


def test_against_a_model() -> None:
    """Random batches, commits, links and resets against a plain list."""
    seed = 11
    rng = Random(seed)
    backlog = Backlog()
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
            backlog.add(ordinal, batch)
            model += [(ordinal, each) for each in batch]
        elif what < 0.95:
            upto = rng.randint(-1, ordinal + 1)
            expected = {each[0]: each[2] for number, each in model if number <= upto}
            assert backlog.commit(upto) == expected, (seed, step)
            recent += [(number, each) for number, each in model if number <= upto]
            model = [(number, each) for number, each in model if number > upto]
        elif what < 0.98:
            ordinal = 0
            backlog.new_link()
            model = [(0, each) for _, each in model]
        else:
            shard = rng.randrange(4)
            backlog.forget(shard)
            model = [(number, each) for number, each in model if each[0] != shard]
            recent = [(number, each) for number, each in recent if each[0] != shard]
        assert backlog.bytes == sum(len(each[4]) for _, each in model)
        for shard in range(4):
            expected_entries = [each for _, each in model if each[0] == shard]
            assert backlog.of_shard(shard) == expected_entries, (seed, step)
            if step % 3 == 0:  # so the index meets everything that may change it
                expected_numbers = {each[2]: each for _, each in recent if each[0] == shard}
                expected_numbers |= {each[2]: each for each in expected_entries}
                assert backlog.look_up(shard) == expected_numbers, (seed, step)
            elif step % 100 == 1:
                backlog._index = None


def test_questions_between_changes() -> None:
    """Whatever happens between two questions, the answer is what the batches hold, in order."""
    for seed in range(20):
        rng = Random(seed)
        backlog = Backlog()
        model: list[tuple[int, Logged]] = []  # ordinal, entry
        ordinal = 0
        for step in range(200):
            kind = rng.randrange(6)
            if kind < 2:
                ordinal += 1
                entries = [entry(rng.randrange(3), 10 * step + n) for n in range(rng.randrange(4))]
                backlog.add(ordinal, entries)
                model += [(ordinal, each) for each in entries]
            elif kind == 2:
                until = rng.randrange(ordinal + 1)
                backlog.commit(until)
                model = [each for each in model if each[0] > until]
            elif kind == 3 and rng.random() < 0.2:
                backlog.new_link()
                model = [(0, each) for _, each in model]
                ordinal = 0
            elif kind == 4 and rng.random() < 0.1:
                backlog.forget(1)
                model = [each for each in model if each[1][0] != 1]
            else:
                shard = rng.randrange(3)
                assert backlog.of_shard(shard) == [each for _, each in model if each[0] == shard], f"seed {seed}"


def test_entries_from_before_the_link_are_sorted_by_shard(backlog: Backlog) -> None:
    """One shard is set aside or forgotten without a look at the others; the rest is committed at 0, some at a time."""
    for seq in range(1, 5):
        backlog.add(seq, [entry(shard, seq) for shard in range(3)])
    backlog.new_link()
    backlog.add(1, [entry(0, 5), entry(2, 5)])
    backlog.set_aside(0)
    backlog.forget(1)
    assert backlog.bytes == 25 and numbers(backlog, 0) == [1, 2, 3, 4, 5] and numbers(backlog, 1) == []
    assert backlog.commit(-1) == {} and backlog.commit(0) == {2: 4}
    assert backlog.commit(1) == {2: 5} and backlog.bytes == 0
    assert numbers(backlog, 0) == [1, 2, 3, 4, 5], "what was set aside is committed by no ordinal of this link"


def test_much_from_before_the_link_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the bound, of each shard only what a window holds, the newest."""
    monkeypatch.setattr(backlog_module, "WINDOW_ITEMS_MAX", 4)
    backlog = Backlog(bytes_max=50)
    backlog.add(1, [entry(0, seq) for seq in range(1, 10)])
    backlog.add(2, [entry(1, 1), entry(1, 2)])
    backlog.new_link()
    assert numbers(backlog, 0) == [6, 7, 8, 9] and numbers(backlog, 1) == [1, 2] and backlog.bytes == 30
    assert set(backlog.look_up(0)) == {6, 7, 8, 9}


def test_recent_batches_of_a_running_index_are_the_entries_themselves() -> None:
    """What the index has goes with its batch, and a batch that was packed before the index began is found in it."""
    backlog = Backlog(recent_bytes_max=3 * (RECENT_ENTRY_BYTES + 5))
    for number in range(1, 4):
        backlog.add(number, [entry(0, number)])
        backlog.commit(number)
    assert list(backlog.look_up(0).values()) == [entry(0, number) for number in (1, 2, 3)]
    backlog.add(4, [entry(0, 4)])
    backlog.commit(4)  # number 1, which was packed, is too old now
    assert list(backlog.look_up(0).values()) == [entry(0, number) for number in (2, 3, 4)]
    for _ in range(INDEX_IDLE_COMMITS + 1):
        backlog.commit(4)
    backlog.add(5, [entry(0, 5)])
    backlog.commit(5)
    assert list(backlog.look_up(0).values()) == [entry(0, number) for number in (3, 4, 5)]
