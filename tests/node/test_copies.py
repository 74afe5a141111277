"""Copies of a node: learned by shipped entries or whole, donated, dropped; results and positions that are asked for."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from kvtcp.constants import LEARN_ITEM_BYTES
from kvtcp.errors import Code
from kvtcp.node import copies as copy_set
from kvtcp.node import replica as replica_module
from kvtcp.node.learning import Donation
from kvtcp.node.replica import Replicas
from kvtcp.protocol import operations as op
from kvtcp.storage.disk.snapshot import SnapshotHeader, decode_snapshot, encode_snapshot
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Table
from tests.support.replica_tools import batch, hello, make, put


def pull(donor: Replicas, learner: Replicas, token: bytes, shard: int = 0) -> Copy | None:
    """Move a donated copy as the servers do, by the bytes of a snapshot; what `loaded` says."""
    donation = donor.donations.pop(token)
    learning = learner.learning.get(shard)
    header = SnapshotHeader(b"12345678", shard, learning.generation if learning else 9, *donation.position)
    kept = [entry for entry in donor.backlog.of_shard(shard) if entry[2] <= donation.position[1]]
    data = b"".join(encode_snapshot(header, donation.frozen, kept))
    return learner.loaded(shard, *decode_snapshot(data, header.name, b"12345678"))


@pytest.fixture
def donor() -> Replicas:
    """A member with five writes of shard 0, of epoch 2."""
    node = make()
    node.hello(hello(epoch=2))
    batch(node, 100, put(0, 1), put(0, 2), (op.PUT, 0, 3, 0, b"t", b"v", 50), (op.INCR, 0, 4, 0, b"n", 5), put(0, 5))
    return node


@pytest.fixture
def learner() -> Replicas:
    """A node with the copies d1 of shard 0, which has two writes, and d2 of shard 1."""
    node = make()
    node.hello(hello(epoch=2))
    batch(node, 100, put(0, 1), put(0, 2))
    node.take_logged()
    return node


def same(one: Replicas, other: Replicas, shard: int = 0) -> None:
    """Two copies are the same."""
    assert one.tables[shard].position == other.tables[shard].position
    assert one.tables[shard].digest() == other.tables[shard].digest()


# --- by entries -----------------------------------------------------------------------------------------


def test_a_copy_is_completed_by_shipped_entries(donor: Replicas, learner: Replicas) -> None:
    """What comes by the link waits; when all before is there it is applied, as of its stamp, and the copy is live."""
    chain = learner.tables[0].chain
    answer, live = batch(learner, 101, (op.LEARN, 0, 0, 5, 2), (op.AUDIT, [0, 1]))
    assert answer == ["d1", 1, True, 2, 2, chain] and live == [None, (0, 0)]
    assert 0 not in learner.tables and learner.learning[0].last_seq == 5 and not learner.learning[0].fresh
    items = ((op.INCR, 0, 6, 0, b"n", 2), (op.PUT, 0, 7, 0, b"u", b"v", 10))
    assert batch(learner, 105, *items, put(1, 1), (op.GET, 1, b"k1")) == [(b"v", 1, None)]
    batch(donor, 105, *items)
    assert learner.applied == 8 and [entry[0] for entry in learner.take_logged()] == [1]
    _, entries = donor.entries_after(0, 2)
    assert entries is not None
    assert learner.ship(0, entries[:1]) is None and learner.take_learned() == [] and learner.copies[0].table.seq == 3
    assert learner.ship(0, entries[1:3]) is None and learner.news and learner.take_learned() == [0]
    same(donor, learner)
    assert not learner.learning and [entry[2] for entry in learner.take_logged()] == [3, 4, 5, 6, 7]
    batch(learner, 110, put(0, 8))
    assert [entry[2] for entry in learner.backlog.of_shard(0)] == list(range(1, 9))


def test_a_copy_that_has_everything_is_live_at_once(donor: Replicas, learner: Replicas) -> None:
    """Without a single entry shipped, in the very batch that asks for it."""
    items = ((op.LEARN, 0, 0, 2, 2), put(0, 3), (op.GET, 0, b"k3"), (op.AUDIT, [0]))
    answer, cell, (position,) = batch(learner, 101, *items)
    assert answer[:2] == ["d1", 1] and cell == (b"v", 3, None) and position[0] == 3
    assert learner.take_learned() == [0] and learner.take_learned() == [] and not learner.learning


@pytest.mark.parametrize("is_told", ["before", "after"])
def test_what_a_copy_had_before_it_is_learned_may_be_uncommitted(is_told: str, learner: Replicas) -> None:
    """Ordinals say what members have: a node that is none is told nothing by them of the copy that it has, neither
    before it is learned nor after."""
    learner.hello(hello(epoch=2))
    if is_told == "before":
        batch(learner, 101, (op.AUDIT, []), commit=0)
        assert learner.copies[0].commit == 2, "which is a mistake as long as it is no member's"
    batch(learner, 101, (op.LEARN, 0, 0, 2, 2), commit=0 if is_told == "before" else -1)
    assert learner.take_learned() == [0]
    batch(learner, 102, (op.AUDIT, []), commit=0)
    assert learner.copies[0].commit == 0
    batch(learner, 103, put(0, 3), commit=2)
    assert learner.copies[0].commit == 0 and len(learner.backlog.of_shard(0)) == (1 if is_told == "before" else 3)
    batch(learner, 104, (op.AUDIT, []), commit=4)
    assert learner.copies[0].commit == 3 and learner.backlog.of_shard(0) == []


@pytest.mark.parametrize("state", ["absent", "incomplete", "ahead"])
def test_a_copy_that_cannot_be_completed(learner: Replicas, state: str) -> None:
    """There is none, it is not complete, or ends above the others: refused, and its items are passed over."""
    shard = 0 if state == "ahead" else 7
    if state == "incomplete":
        learner._add(Copy(7, "lost", complete=False))
    assert batch(learner, 101, (op.LEARN, shard, 0, 1, 2), put(shard, 2), (op.GET, 1, b"x")) == [None, None]
    batch(learner, 102, put(shard, 3))
    assert shard not in learner.learning and learner.backlog.of_shard(7) == []
    assert learner.copies[0].table.seq == 2 and (0 in learner.tables)
    assert learner.take_failed() == []
    batch(learner, 103, (op.UNLEARN, shard), (op.LEARN, 0, 0, 2, 2), put(0, 3))
    assert learner.tables[0].seq == 3


def test_shipped_entries_of_another_history(donor: Replicas, learner: Replicas) -> None:
    """It cannot be learned so: the copy stays where it was, and what comes by the link is passed over."""
    batch(learner, 101, (op.LEARN, 0, 0, 5, 2), put(0, 6))
    error = learner.ship(0, [[1, donor.backlog.of_shard(0)[2][4]]])
    assert error is not None and "chain" in error
    assert learner.take_failed() == [(0, error)] and learner.take_failed() == [] and not learner.learning
    batch(learner, 102, put(0, 7))
    assert learner.tables[0].seq == 2 and learner._buffered_bytes == 0


def test_more_is_shipped_than_the_link_brought(donor: Replicas, learner: Replicas) -> None:
    """Entries of items that are still on their way: these are not applied again, and the copy is live after them."""
    batch(learner, 101, (op.LEARN, 0, 0, 3, 2))
    _, entries = donor.entries_after(0, 2)
    assert entries is not None and learner.ship(0, entries) is None
    assert learner.take_learned() == []
    batch(learner, 102, (op.INCR, 0, 4, 0, b"n", 5))
    assert not learner.catch_up() and learner.take_learned() == []
    batch(learner, 103, put(0, 5), put(1, 1))
    assert not learner.catch_up() and learner.take_learned() == [0]
    same(donor, learner)
    batch(learner, 104, put(0, 6))


# --- whole ----------------------------------------------------------------------------------------------


def test_a_copy_is_replaced(donor: Replicas, learner: Replicas) -> None:
    """A new disk and generation; the old copy is there until the new one is published, and retired then."""
    retired: list[Copy] = []
    learner._retire = retired.append
    old = learner.copies[0]
    for node in (donor, learner):
        node.hello(hello(epoch=3))
    assert batch(learner, 101, (op.LEARN, 0, 1, 5, 3), put(0, 6)) == [["d3", 2, False, 0, 0, 0]]
    batch(donor, 101, (op.DONATE, 0, b"t", 0), put(0, 6))
    assert learner.learning[0].fresh and 0 not in learner.tables and learner.copies[0] is old
    assert learner.entries_after(0, 0) == (None, None)
    assert learner.ship(0, []) == "this node has no complete copy of shard 0"
    copy = pull(donor, learner, b"t")
    assert copy is not None and (copy.disk, copy.generation, copy.table.seq) == ("d3", 2, 5)
    assert learner.report()["shards"][0][:4] == [0, "d1", 1, True] and learner.take_learned() == []
    assert learner.published(0) and learner.take_learned() == [0] and retired == [old]
    assert learner.copies[0] is copy and learner.take_logged()[0][:3] == (0, 2, 6)
    same(donor, learner)
    assert [entry[:3] for entry in learner.backlog.of_shard(0)] == [(0, 2, seq) for seq in range(1, 7)]
    batch(learner, 102, put(0, 7))
    assert learner.tables[0].position[:2] == (3, 7) and not learner.published(0)


def test_a_copy_of_a_shard_that_was_not_there(donor: Replicas, learner: Replicas) -> None:
    """A node that is added has none: it is of generation 1."""
    assert batch(learner, 101, (op.LEARN, 9, 1, 0, 2)) == [["d3", 1, False, 0, 0, 0]]
    assert learner.loaded(9, Table(9)) is not None and 9 not in learner.copies
    assert learner.published(9) and learner.tables[9].seq == 0 and learner.take_learned() == [9]


def test_a_pulled_copy_is_ahead_of_the_link(donor: Replicas, learner: Replicas) -> None:
    """It is live when the link has brought what the copy has already, none of which is applied again."""
    batch(learner, 101, (op.LEARN, 0, 1, 2, 2), put(0, 3))
    batch(donor, 101, (op.DONATE, 0, b"t", 0))
    pull(donor, learner, b"t")
    assert learner.published(0) and learner.take_learned() == []
    batch(learner, 102, put(0, 4))
    batch(learner, 103, put(0, 5), (op.GET, 1, b"x"))
    assert learner.take_learned() == []
    batch(learner, 104)
    assert learner.take_learned() == [0]
    same(donor, learner)


def test_a_pulled_copy_that_is_too_old(donor: Replicas, learner: Replicas) -> None:
    """It ends before the first item of the link: of no use."""
    batch(donor, 101, (op.DONATE, 0, b"t", 0))
    batch(learner, 101, (op.LEARN, 0, 1, 6, 2))
    assert pull(donor, learner, b"t") is None
    ((shard, reason),) = learner.take_failed()
    assert shard == 0 and "ends at 5, before 6" in reason
    assert learner.tables[0].seq == 2 and learner.copies[0].disk == "d1"


def test_a_copy_that_nobody_wants_any_more(donor: Replicas, learner: Replicas) -> None:
    """The coordinator gave up, or began anew, or the link is gone, while it was pulled or published."""
    for end in ((op.UNLEARN, 0), (op.LEARN, 0, 0, 2, 2), (op.LEARN, 0, 1, 2, 2), None):
        batch(learner, 101, (op.LEARN, 0, 1, 2, 2))
        assert learner.loaded(0, donor.tables[0]) is not None
        disk = learner.learning[0].disk
        if end is None:
            learner.link_lost()
        else:
            batch(learner, 101, end)
        assert not learner.published(0) and learner.copies[0].disk == "d1"
        assert 0 not in learner.learning or learner.learning[0].disk != disk
    assert learner.loaded(0, donor.tables[0]) is None and learner.tables[0].seq == 2


def test_a_failed_transfer(learner: Replicas) -> None:
    """The server says why; then the shard is as before, and its items are passed over."""
    batch(learner, 101, (op.LEARN, 0, 1, 2, 2), put(0, 3))
    learner.learn_failed(0, "the donor is gone")
    learner.learn_failed(0, "twice")
    learner.learn_failed(1, "is not learned")
    batch(learner, 102, put(0, 4))
    assert learner.take_failed() == [(0, "the donor is gone")] and learner.tables[0].seq == 2


def test_the_donated_copy_after_an_accepted_loss(donor: Replicas, learner: Replicas) -> None:
    """Its position is above every number ever shown, in the epoch of the promise; numbering goes on there."""
    assert batch(donor, 101, (op.DONATE, 0, b"t", 70))[0] == [2, 70, 0, 5]
    batch(learner, 101, (op.LEARN, 0, 1, 70, 2), put(0, 71))
    pull(donor, learner, b"t")
    assert learner.published(0) and learner.take_learned() == [0]
    assert learner.tables[0].position[:2] == (2, 71)
    learner.check()
    assert batch(donor, 102, (op.DONATE, 0, b"u", 3), (op.DONATE, 5, b"v", 8), (op.DONATE, 5, b"w", 0)) == [
        [2, 5, 0, 5], [2, 8, 0, 0], None,
    ]  # fmt: skip
    donor._add(Copy(6, "lost", complete=False))
    assert batch(donor, 102, (op.DONATE, 6, b"x", 0), (op.DONATE, 6, b"y", 4)) == [None, [2, 4, 0, 0]]


def test_a_copy_is_replaced_by_its_own_rows(donor: Replicas) -> None:
    """After an accepted loss the donor takes the new position too: it learns what it donates."""
    before = donor.tables[0].digest()
    batch(donor, 101, (op.DONATE, 0, b"t", 70), (op.LEARN, 0, 1, 70, 2), put(0, 71))
    pull(donor, donor, b"t")
    assert donor.published(0) and donor.take_learned() == [0]
    assert donor.tables[0].position[:2] == (2, 71) and donor.tables[0].digest() != before
    donor.check()


# --- the buffer -----------------------------------------------------------------------------------------


def test_the_buffer_is_bounded(learner: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over it the shard with most is given up; the others go on, and all of its bytes are free."""
    monkeypatch.setattr(copy_set, "LEARN_BUFFER_BYTES_MAX", 4 * LEARN_ITEM_BYTES)
    batch(learner, 101, (op.LEARN, 0, 0, 9, 2), (op.LEARN, 1, 1, 0, 2), put(0, 10), put(0, 11), put(1, 1), put(0, 12))
    ((shard, reason),) = learner.take_failed()
    assert shard == 0 and "bytes were written while it was learned" in reason
    assert list(learner.learning) == [1] and learner._buffered_bytes == learner.learning[1].bytes > 0
    batch(learner, 102, put(0, 13), put(1, 2))
    assert learner.tables[0].seq == 2 and len(learner.learning[1].buffer) == 2


def test_a_long_buffer_is_applied_in_slices(donor: Replicas, learner: Replicas) -> None:
    """Never many items at once; batches meanwhile are no faster, and the copy comes to be live."""
    batch(learner, 101, (op.LEARN, 0, 0, 3, 2))
    seq = 3
    for _ in range(40):
        items = [put(0, seq + n, b"%d" % seq) for n in range(1, 51)]
        seq += 50
        batch(learner, 102, *items)
    _, entries = donor.entries_after(0, 2)
    assert entries is not None and learner.ship(0, entries[:1]) is None
    assert 0 < learner.copies[0].table.seq - 3 <= copy_set.LEARN_APPLY_ITEMS
    assert learner.catch_up(10) and learner.take_learned() == []
    rounds = 0
    while not learner.take_learned():
        rounds += 1
        batch(learner, 103, *(put(0, seq + n) for n in range(1, 101)))
        seq += 100
    assert rounds < 10 and learner.tables[0].seq == seq and learner._buffered_bytes == 0
    logged = learner.take_logged()
    assert [entry[2] for entry in logged] == list(range(3, seq + 1))


def test_a_gap_between_copy_and_link(donor: Replicas, learner: Replicas) -> None:
    """The numbers do not join: that is told, and ends the learning, not the node."""
    batch(learner, 101, (op.LEARN, 0, 0, 2, 2), put(0, 3))
    batch(learner, 101, (op.LEARN, 0, 0, 4, 2), put(0, 7))
    batch(donor, 101)
    learner.learning[0].is_ready = True
    learner.catch_up()
    ((shard, reason),) = learner.take_failed()
    assert shard == 0 and "go on at 7, the copy ends at 3" in reason
    assert learner.tables[0].seq == 3 and learner._buffered_bytes == 0


def test_a_learner_answers_nothing(learner: Replicas) -> None:
    """A write of a shard that is being learned, to be answered here: the coordinator is out of its mind."""
    learner.begin(101, -1, [(op.LEARN, 0, 1, 2, 2), (op.ADD, 0, 3, 1, b"a", b"v")])
    with pytest.raises(ValueError, match="answered by a node that learns it"):
        learner.run([])


def test_learning_again_begins_anew(learner: Replicas) -> None:
    """What was buffered is dropped, and a second disk and generation are chosen."""
    first, second = batch(learner, 101, (op.LEARN, 0, 1, 2, 2), put(0, 3), (op.LEARN, 0, 1, 3, 2), put(0, 4))
    assert first[:2] == ["d3", 2] and second[:2] == ["d4", 3]
    assert [item[2] for _, item, _ in learner.learning[0].buffer] == [4]
    assert learner._buffered_bytes == learner.learning[0].bytes


def test_given_up(donor: Replicas, learner: Replicas) -> None:
    """UNLEARN leaves a copy where it is: as before, or as far as it was completed."""
    batch(learner, 101, (op.LEARN, 0, 0, 5, 2), put(0, 6))
    _, entries = donor.entries_after(0, 2)
    assert entries is not None and learner.ship(0, entries[:1]) is None
    batch(learner, 102, (op.UNLEARN, 0), (op.UNLEARN, 1), (op.UNLEARN, 9))
    assert learner.tables[0].seq == 3 and not learner.learning and learner._buffered_bytes == 0
    assert learner.ship(0, entries[1:]) is None and learner.tables[0].seq == 5


def test_a_new_link_ends_it(donor: Replicas, learner: Replicas) -> None:
    """What was learned is dropped with the link, what was donated is let go; the copies are there, of the new epoch."""
    batch(learner, 101, (op.LEARN, 0, 0, 5, 2), put(0, 6), (op.LEARN, 1, 1, 0, 2), (op.DONATE, 0, b"t", 0))
    assert batch(learner, 101, (op.LEARN, 7, 0, 0, 2)) == [None]
    batch(donor, 101, (op.DONATE, 0, b"t", 0))
    donor.link_lost()
    assert not donor.donations and not donor.tables[0]._frozen
    report = learner.hello(hello(epoch=3))
    assert [row[:4] for row in report["shards"]] == [[0, "d1", 1, True], [1, "d2", 1, True]]
    assert sorted(learner.tables) == [0, 1] and not learner.learning and learner._buffered_bytes == 0
    assert learner.take_failed() == [] and learner.take_learned() == []
    batch(learner, 102, put(0, 3), put(1, 1))
    assert learner.tables[0].position[:2] == (3, 3)


def test_one_look_at_each_batch(learner: Replicas) -> None:
    """A node that learns nothing does not even look at the items."""
    learner.begin(101, -1, [put(0, 3)])
    assert type(learner._items) is type(iter([]))
    learner.run([])
    batch(learner, 102, (op.LEARN, 1, 1, 0, 2))
    learner.begin(103, -1, [])
    assert type(learner._items) is not type(iter([]))
    learner.run([])


# --- dropping, donating, asking -------------------------------------------------------------------------


def test_drop(learner: Replicas) -> None:
    """The copy is gone, with its kept entries and results; the next one of the shard has another generation."""
    retired: list[Copy] = []
    learner._retire = retired.append
    old = learner.copies[0]
    batch(learner, 101, (op.INCR, 0, 3, 0, b"n", 1), (op.DONATE, 0, b"t", 0), put(1, 1))
    results = batch(learner, 102, put(0, 4), (op.DROP, 0), (op.DROP, 9), (op.RESULTS_OF, 0, [3]), (op.AUDIT, [0, 1]))
    assert results[:3] == [None, None, [None]] and results[3][0] is None
    assert learner.take_dropped() == [0] and learner.take_dropped() == [] and retired == [old]
    assert not learner.donations and 0 not in learner.copies and learner.backlog.of_shard(0) == []
    batch(learner, 103, put(1, 2), commit=99)
    assert [row[0] for row in learner.report()["shards"]] == [1]
    learner.hello(hello(epoch=3))
    assert learner.copies[0].generation == 2 and learner.entries_after(0, 0) == (0, [])
    batch(learner, 104, (op.DROP, 0), (op.LEARN, 0, 1, 0, 3))
    assert learner.learning[0].generation == 3


def test_drop_of_a_shard_that_is_learned(donor: Replicas, learner: Replicas) -> None:
    """Both are gone: what was learned, and the copy that was there."""
    batch(learner, 101, (op.LEARN, 0, 1, 2, 2), put(0, 3), (op.DROP, 0))
    assert not learner.learning and learner.take_dropped() == [0] and learner._buffered_bytes == 0
    batch(learner, 101, (op.LEARN, 1, 0, 0, 2), (op.DROP, 1))
    assert learner.take_learned() == [] and not learner.tables


def test_generations_of_before_a_restart() -> None:
    """A copy that was dropped before is not confused with the next one of its shard."""
    node = make(copies=[Copy(1, "x", generation=4)], generations={0: 6, 1: 3})
    node.hello(hello())
    assert node.copies[0].generation == 7 and node.copies[1].generation == 4
    batch(node, 101, (op.LEARN, 1, 1, 0, 1), (op.LEARN, 1, 1, 0, 1), (op.LEARN, 5, 1, 0, 1))
    assert node.generations == {0: 7, 1: 6, 5: 1}


def test_donate(donor: Replicas) -> None:
    """The shard as it is at this place in the order; a second donation under a token takes the place of the first."""
    chain = donor.tables[0].chain
    answers = batch(donor, 101, (op.DONATE, 0, b"t", 0), put(0, 6), (op.DONATE, 0, b"u", 0), (op.DONATE, 9, b"v", 0))
    assert answers[0] == [2, 5, chain, 5] and answers[1][1] == 6 and answers[2] is None
    donation = donor.donations[b"t"]
    assert isinstance(donation, Donation) and donation.position == (2, 5, chain) and donor.news
    assert len(donation.frozen.next_rows(10)) == 5
    first = donor.donations[b"u"]
    batch(donor, 102, (op.DONATE, 0, b"u", 0))
    assert donor.donations[b"u"] is not first and first.frozen._index is None


def test_results_of_writes(donor: Replicas) -> None:
    """Those of writes other than puts, in the same batch too, until they are committed."""
    found = batch(
        donor, 101, (op.DELETE, 0, 6, 0, b"k1"), (op.ADD, 0, 7, 0, b"k2", b"x"), (op.RESULTS_OF, 0, [4, 5, 6, 7, 8]),
        (op.INCR, 1, 1, 0, b"n", 3),
    )[0]  # fmt: skip
    assert found[:3] == [[5], None, [True]] and found[3][0][0] == Code.EXISTS and found[4] is None
    assert batch(donor, 102, (op.RESULTS_OF, 1, [1]), (op.RESULTS_OF, 5, [1]), commit=5) == [[[3]], [None]]
    assert batch(donor, 103, (op.RESULTS_OF, 0, [4, 6])) == [[None, [True]]]
    batch(donor, 104, commit=donor.applied)
    assert not donor._results


def test_results_of_buffered_writes(donor: Replicas, learner: Replicas) -> None:
    """A node that learned them knows them like the others."""
    batch(learner, 101, (op.LEARN, 0, 1, 5, 2), (op.INCR, 0, 6, 0, b"n", 2), (op.PUT, 0, 7, 0, b"a", b"v"))
    batch(donor, 101, (op.DONATE, 0, b"t", 0))
    pull(donor, learner, b"t")
    assert learner.published(0)
    assert batch(learner, 102, (op.RESULTS_OF, 0, [5, 6, 7])) == [[None, [7], None]]


def test_unknown_control_items(learner: Replicas) -> None:
    """An item that this version does not know stops the node."""
    learner.begin(101, -1, [(99, 0)])
    with pytest.raises(ValueError, match="unknown operation"):
        learner.run([])


# --- at random ------------------------------------------------------------------------------------------


class Pair:
    """A member and a learner whose links bring the same writes, at different times."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.member, self.learner = make(), make()
        for node in (self.member, self.learner):
            node.hello(hello(shards=[0]))
        self.seq = 0
        self.stamp_ms = 100
        self.due: dict[Replicas, list[tuple[int, list[Any]]]] = {self.member: [], self.learner: []}
        self.attached = False
        self.token = b""
        self.number = 0
        self.learned = 0
        self.logged: list[Any] = []

    def write(self) -> None:
        """A batch for both, or for the member alone."""
        rng = self.rng
        self.stamp_ms += rng.randrange(3)
        items: list[Any] = []
        for _ in range(rng.randrange(1, 6)):
            self.seq += 1
            key = b"k%d" % rng.randrange(8)
            head = (0, self.seq, 0)
            items.append(rng.choice([
                (op.PUT, *head, key, b"v" * rng.randrange(9)), (op.PUT, *head, key, b"w", rng.randrange(1, 20)),
                (op.INCR, *head, b"n", 1), (op.DELETE, *head, key), (op.PURGE, *head, b"", 3),
            ]))  # fmt: skip
        self.due[self.member].append((self.stamp_ms, items))
        if self.attached:
            self.due[self.learner].append((self.stamp_ms, items))

    def deliver(self, node: Replicas) -> None:
        """The next batch of a link."""
        if self.due[node]:
            stamp_ms, items = self.due[node].pop(0)
            node.begin(stamp_ms, -1, items)
            while not node.run([], 20):
                pass

    def attach(self) -> None:
        """LEARN, behind what the learner's link has; DONATE at the member, some time later."""
        self.attached = True
        copy = self.learner.copies[0].table
        self.fresh = self.rng.random() < 0.6 or not 0 <= copy.seq <= self.seq
        self.due[self.learner].append((self.stamp_ms, [(op.LEARN, 0, int(self.fresh), self.seq, 1)]))
        if self.fresh:
            self.number += 1
            self.token = b"%d" % self.number
            self.due[self.member].append((self.stamp_ms, [(op.DONATE, 0, self.token, 0)]))

    def go_on(self) -> None:
        """Something of the transfer."""
        learning = self.learner.learning.get(0)
        if learning is None:
            return
        if not learning.fresh:
            _, entries = self.member.entries_after(0, self.learner.copies[0].table.seq)
            if entries:
                assert self.learner.ship(0, entries[: self.rng.randrange(1, 9)]) is None
        elif learning.copy is not None:
            self.learner.published(0)
        elif self.token in self.member.donations:
            assert pull(self.member, self.learner, self.token) is not None

    def step(self) -> None:
        """Anything."""
        choice = self.rng.random()
        if choice < 0.3:
            self.write()
        elif choice < 0.5:
            self.deliver(self.member)
        elif choice < 0.75:
            self.deliver(self.learner)
        elif choice < 0.95:
            self.go_on()
        elif choice < 0.96 and self.attached and self.rng.random() < 0.3:
            self.attached = False
            self.due[self.learner] = []
            self.learner.hello(hello(shards=[0]))
        elif not self.attached:
            self.attach()
        if self.learner.take_learned():
            self.learned += 1
        assert self.learner.take_failed() == []
        self.logged += self.learner.take_logged()

    def finish(self) -> None:
        """Everything arrives."""
        if not self.attached:
            self.attach()
        while self.due[self.member] or self.due[self.learner] or self.learner.learning:
            self.deliver(self.member)
            self.deliver(self.learner)
            self.go_on()
            self.learner.catch_up()
        self.logged += self.learner.take_logged()


@pytest.mark.parametrize("seed", range(40))
def test_copies_are_the_same_in_the_end(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes first, a copy that was learned equals that of the member, and its log leads to it."""
    monkeypatch.setattr(copy_set, "LEARN_APPLY_ITEMS", 3)
    monkeypatch.setattr(replica_module, "LEARN_APPLY_ITEMS", 3)
    monkeypatch.setattr(copy_set, "SHIP_BYTES_MAX", 100)
    pair = Pair(seed)
    for _ in range(300):
        pair.step()
    pair.finish()
    same(pair.member, pair.learner)
    pair.learner.check()
    copy = pair.learner.copies[0]
    logged = [entry for entry in pair.logged if entry[1] == copy.generation]
    assert [entry[2] for entry in logged] == list(range(copy.table.seq - len(logged) + 1, copy.table.seq + 1)), seed
    assert pair.learner._buffered_bytes == 0
    known = pair.learner.backlog.look_up(0)
    assert all(entry[1] == copy.generation for entry in known.values())
