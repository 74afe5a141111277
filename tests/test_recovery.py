"""Tests of the takeover: who is bad, what is best, what is shipped, when a shard is down. The frames are moved by hand;
tests/cluster_simulation.py moves them at random between real replicas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from replication_fakes import make_map

from kvtcp.protocol.link import FETCH, SHIP, CopyReport, Report
from kvtcp.replication import recovery
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.progress import LinkError
from kvtcp.replication.recovery import StaleStore, Takeover, Verdict

ENTRY = b"packed"


def copy(seq: int = 0, epoch: int = 1, chain: int | None = None, **fields: Any) -> CopyReport:
    """A copy of the map's disk; the chain of number n is 100 + n unless it is said."""
    chain = (100 + seq if seq else 0) if chain is None else chain
    return CopyReport(**{"disk": "disk", "epoch": epoch if seq else 0, "seq": seq, "chain": chain, **fields})


def report(node: str, *copies: CopyReport | None, **fields: Any) -> Report:
    """What a node says of its shards 0, 1, ...; None = it has no copy."""
    found = {number: each for number, each in enumerate(copies) if each is not None}
    made = Report(node, 1, "sync", stamp_ms=0, promised=2, map_version=0, space=0, copies=found)
    return replace(made, **fields)


def begin(*rows: CopyReport | None, cluster_map: ClusterMap | None = None) -> tuple[Takeover, list[Any]]:
    """One shard with a member for each row; the takeover with all reports, and what it asks for."""
    takeover = Takeover(cluster_map or make_map(len(rows), len(rows), shards=1))
    actions: list[Any] = []
    for number, row in enumerate(rows, 1):
        assert not takeover.is_done and not actions
        actions = takeover.on_report(report(f"n{number}", row), 5)
    return takeover, actions


def only(takeover: Takeover) -> Verdict:
    """The verdict on the only shard."""
    [verdict] = takeover.verdicts
    return verdict


def entries(first: int, last: int) -> list[list[Any]]:
    """Entries as they are shipped."""
    return [[100 + seq, ENTRY] for seq in range(first, last + 1)]


# --- members that agree -----------------------------------------------------------------------------


def test_equal_members() -> None:
    """Where all members end at the same entry there is nothing to do; that is committed."""
    takeover, actions = begin(copy(7), copy(7), copy(7))
    assert actions == [] and only(takeover) == Verdict(7, 107)
    assert takeover.new_disks == {} and not takeover.is_empty


def test_nothing_was_ever_written() -> None:
    """A cluster without an entry is empty."""
    takeover, actions = begin(copy(), copy())
    assert actions == [] and only(takeover) == Verdict() and takeover.is_empty


def test_all_nodes_are_waited_for() -> None:
    """No verdict before the last node of the map has reported."""
    takeover = Takeover(make_map(3, 1, shards=3))
    for node in ("n1", "n2"):
        assert takeover.on_report(report(node, copy(), copy(), copy()), 5) == []
        assert not takeover.is_done
    with pytest.raises(AssertionError, match="all members have reported"):
        _ = takeover.verdicts
    takeover.on_report(report("n3", copy(), copy(), copy()), 5)
    assert takeover.is_done


# --- shipping ---------------------------------------------------------------------------------------


def test_what_a_member_lacks_is_shipped_to_it() -> None:
    """From the best, in pieces, until it is there; then it is as good as the others."""
    takeover, actions = begin(copy(4), copy(7))
    assert actions == [("n2", (FETCH, 0, 4))]
    actions = takeover.on_entries("n2", 0, 4, 104, entries(5, 6))
    assert actions == [("n1", (SHIP, 0, entries(5, 6)))]
    assert takeover.on_shipped("n1", 0, 1, 6, 106, None) == [("n2", (FETCH, 0, 6))]
    assert takeover.on_entries("n2", 0, 6, 106, entries(7, 7)) == [("n1", (SHIP, 0, entries(7, 7)))]
    assert not takeover.is_done
    assert takeover.on_shipped("n1", 0, 1, 7, 107, None) == []
    assert only(takeover) == Verdict(7, 107)
    assert takeover.copies("n1") == {0: copy(7)}


def test_members_one_after_the_other() -> None:
    """Two members lack something: both get it."""
    takeover, actions = begin(copy(4), copy(6), copy(7))
    assert actions == [("n3", (FETCH, 0, 4))]
    takeover.on_entries("n3", 0, 4, None, entries(5, 7))
    assert takeover.on_shipped("n1", 0, 1, 7, 107, None) == [("n3", (FETCH, 0, 6))]
    assert takeover.on_entries("n3", 0, 6, 106, entries(7, 7)) == [("n2", (SHIP, 0, entries(7, 7)))]
    takeover.on_shipped("n2", 0, 1, 7, 107, None)
    assert only(takeover) == Verdict(7, 107)


def test_the_epoch_counts_before_the_number() -> None:
    """The longest log may be of an older epoch: then it is no member's history, and nothing of it is shipped."""
    takeover, actions = begin(copy(9, epoch=1, chain=99), copy(8, epoch=2), copy(8, epoch=2))
    assert actions == []
    assert only(takeover) == Verdict(8, 108, {"n1": "has another history than n2: it ends in an older epoch"})
    takeover, _ = begin(copy(8, epoch=1, chain=99), copy(8, epoch=2))
    assert set(only(takeover).bad) == {"n1"}


@pytest.mark.parametrize("chain", [1, None])
def test_a_member_with_another_history(chain: int | None) -> None:
    """The best says so by its chain; if it does not know it any more the member does, by the first entry."""
    takeover, _ = begin(copy(4), copy(7))
    actions = takeover.on_entries("n2", 0, 4, chain, entries(5, 7))
    if chain is None:
        assert actions == [("n1", (SHIP, 0, entries(5, 7)))]
        actions = takeover.on_shipped("n1", 0, 1, 4, 104, b"the chain of entry 5 is another one")
    assert actions == []
    verdict = only(takeover)
    assert (verdict.seq, verdict.down) == (7, "")
    assert verdict.bad == {
        "n1": "cannot take what it lacks: the chain of entry 5 is another one"
        if chain is None
        else "has another history than n2: they differ at number 4 or before"
    }
    assert takeover.copies("n1") == {0: copy(4)}


def test_another_donor_when_the_first_cannot_ship() -> None:
    """Any member at the best position may ship; if none can, the one that lacks it is bad, and the others serve."""
    takeover, actions = begin(copy(7), copy(4), copy(7), copy(3))
    assert actions == [("n1", (FETCH, 0, 4))]
    assert takeover.on_entries("n1", 0, 4, None, None) == [("n3", (FETCH, 0, 4))]
    actions = takeover.on_entries("n3", 0, 4, 104, None)
    assert actions == [("n1", (FETCH, 0, 3))], "the next member, all donors again"
    takeover.on_entries("n1", 0, 3, 103, entries(4, 7))
    takeover.on_shipped("n4", 0, 1, 7, 107, None)
    assert only(takeover).bad == {
        "n2": "lacks what follows number 4, and no member can ship it any more: it needs a full synchronization, which "
        "this version does not do"
    }


def test_shipped_entries_that_come_to_another_chain() -> None:
    """A member that says it is there with another chain than the best has is bad."""
    takeover, _ = begin(copy(6), copy(7))
    takeover.on_entries("n2", 0, 6, 106, entries(7, 7))
    takeover.on_shipped("n1", 0, 1, 7, 5, None)
    assert only(takeover).bad == {"n1": "has another history than n2: they differ at number 7 or before"}


def test_few_shards_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many shards are brought up to date at once, and the next when one of them is."""
    monkeypatch.setattr(recovery, "RECOVERY_SHARDS_MAX", 2)
    takeover = Takeover(make_map(2, 2, shards=4))
    takeover.on_report(report("n1", *[copy(7)] * 4), 5)
    actions = takeover.on_report(report("n2", *[copy(6)] * 3, copy(7)), 5)
    assert actions == [("n1", (FETCH, 0, 6)), ("n1", (FETCH, 1, 6))]
    for number in (1, 0, 2):
        takeover.on_entries("n1", number, 6, 106, entries(7, 7))
        actions = takeover.on_shipped("n2", number, 1, 7, 107, None)
        assert actions == ([("n1", (FETCH, 2, 6))] if number == 1 else [])
    assert takeover.verdicts == [Verdict(7, 107)] * 4


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (("on_entries", "n1", 0, 4, 104, []), "what it was not asked for"),
        (("on_entries", "n2", 1, 4, 104, []), "answers for a shard 1"),
        (("on_entries", "n2", -1, 4, 104, []), "answers for a shard -1"),
        (("on_entries", "n2", b"0", 4, 104, []), "answers for a shard b'0'"),
        (("on_entries", "n2", 0, 5, 104, []), "after 5, not after 4"),
        (("on_entries", "n2", 0, 4, 104, [[1]]), "that are none"),
        (("on_entries", "n2", 0, 4, 104, 7), "that are none"),
        (("on_shipped", "n1", 0, 1, 7, 107, None), "what it was not asked for"),
    ],
)
def test_answers_that_cannot_be_true(frame: tuple[Any, ...], text: str) -> None:
    """What nobody asked for, or what is no list of entries, costs the link."""
    takeover, _ = begin(copy(4), copy(7))
    with pytest.raises(LinkError, match=text):
        getattr(takeover, frame[0])(*frame[1:])


@pytest.mark.parametrize("seq", [4, 3, 8])
def test_a_position_that_cannot_be(seq: int) -> None:
    """A member cannot end before or beyond what was shipped to it."""
    takeover, _ = begin(copy(4), copy(7))
    takeover.on_entries("n2", 0, 4, 104, entries(5, 7))
    with pytest.raises(LinkError, match=f"has shard 0 up to {seq}, which it was not sent"):
        takeover.on_shipped("n1", 0, 1, seq, 107, None)


# --- bad members ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (copy(disk="new"), "came back without its data"),
        (copy(9, disk="new"), "came back without its data: what it has is not what was written to this cluster"),
        (copy(3, disk="new", damage="the log is torn"), "has a damaged copy: the log is torn"),
        (copy(9, complete=False), "has an incomplete copy: it was never finished"),
        (None, "has no copy of it"),
    ],
)
def test_bad_members(row: CopyReport | None, why: str) -> None:
    """Another disk, an incomplete copy or none: whatever it holds, it does not count, and the others go on."""
    takeover, actions = begin(copy(7), row, copy(7))
    assert actions == []
    assert only(takeover) == Verdict(7, 107, {"n2": why})
    assert takeover.new_disks == {}, "it is no member by that disk"


def test_a_position_below_what_was_committed_is_an_alarm() -> None:
    """A member that lacks what any member was told to be committed has lost it."""
    takeover, actions = begin(copy(7), copy(8), copy(9, commit=8))
    assert takeover.alarms == ["n1 ends at number 7, but number 8 was committed in shard 0"]
    assert actions == [("n3", (FETCH, 0, 8))]
    takeover.on_entries("n3", 0, 8, 108, entries(9, 9))
    takeover.on_shipped("n2", 0, 1, 9, 109, None)
    assert only(takeover).bad == {"n1": "ends at number 7, but number 8 was committed"}
    assert begin(copy(7), copy(2, commit=8, disk="foreign"))[0].alarms == [], "another disk was told of something else"


def test_no_good_member() -> None:
    """The shard is down, and says why of each."""
    takeover, _ = begin(copy(disk="new"), copy(5, complete=False))
    assert only(takeover).down == (
        "none of its members has its data: n1 came back without its data; n2 has an incomplete copy: it was never "
        "finished"
    )
    assert not takeover.is_empty, "nobody knows"


def test_members_that_differ() -> None:
    """Two good members that end at the same number with different chains: nobody can say which of them is right."""
    takeover, actions = begin(copy(7), copy(7, chain=1), copy(6))
    assert actions == []
    assert only(takeover).down == "its members differ: n1, n2 end at number 7 with different histories"


# --- new disks --------------------------------------------------------------------------------------


def founded(factor: int = 2) -> ClusterMap:
    """The map of a cluster whose copies are not known yet."""
    return make_map(factor, factor, shards=1, disk="")


def test_the_first_start() -> None:
    """All copies are new, empty and complete: their disks go into the map."""
    takeover, _ = begin(copy(disk="a"), copy(disk="b"), cluster_map=founded())
    assert only(takeover) == Verdict(disks={"n1": "a", "n2": "b"})
    assert takeover.new_disks == {0: {"n1": "a", "n2": "b"}}
    assert takeover.is_empty and takeover.began_empty == []


@pytest.mark.parametrize("row", [copy(3, disk="a"), copy(disk="a", complete=False)])
def test_data_at_the_first_start(row: CopyReport) -> None:
    """A node that has something of a cluster which the map has just founded: the map is not that cluster's."""
    with pytest.raises(StaleStore, match="node n2 has data of shard 0, the cluster map knows of none"):
        begin(copy(disk="b"), row, cluster_map=founded())


def test_an_end_of_a_run_in_memory() -> None:
    """All members are new and empty: after a run in memory that is how it ends, and the shard begins anew; after any
    other it is a loss."""
    durable = make_map(2, 2, shards=1)
    in_memory = replace(durable, durability="memory")
    takeover, _ = begin(copy(disk="a"), copy(disk="b"), cluster_map=in_memory)
    assert only(takeover) == Verdict(disks={"n1": "a", "n2": "b"}) and takeover.began_empty == [0]
    assert only(begin(copy(disk="a"), copy(disk="b"), cluster_map=durable)[0]).down
    assert only(begin(copy(disk="a"), copy(3, disk="b"), cluster_map=in_memory)[0]).down
    assert only(begin(copy(disk="a"), copy(disk="b", complete=False), cluster_map=in_memory)[0]).down


def test_a_new_copy_of_an_empty_shard() -> None:
    """If a member tells that nothing was ever written, an empty copy has all there is."""
    takeover, _ = begin(copy(), copy(disk="new"), copy(3, disk="foreign"))
    verdict = only(takeover)
    assert verdict.disks == {"n2": "new"} and set(verdict.bad) == {"n3"}
    assert takeover.copies("n2") == {0: copy(disk="new")}


# --- the store --------------------------------------------------------------------------------------


def test_a_node_that_knows_a_newer_map() -> None:
    """The store is an older copy, or lost: nothing goes on."""
    takeover = Takeover(make_map(1, 1, shards=1))
    with pytest.raises(StaleStore, match="n1 has seen version 6 of the cluster map, the config store has version 5"):
        takeover.on_report(report("n1", copy(), map_version=6), 5)
    assert takeover.on_report(report("n1", copy(), map_version=5), 5) == []
