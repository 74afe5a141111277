"""Tests of the recovery: who is bad, what is best, what is removed, shipped or repaired, when a shard is down. Frames,
reports and changes of the map are moved by hand; tests/replication/test_controller.py has it over real replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvtcp.cluster.map import LOST_REPLICA, ClusterMap
from kvtcp.constants import RECOVER_WAIT_MS
from kvtcp.protocol.link import FETCH, SHIP, CopyReport, Report
from kvtcp.replication.copy_reports import LOST_DATA, UNKNOWN_COPY
from kvtcp.replication.membership import recovery
from kvtcp.replication.membership.recovery import CHANGING, DOWN, REPAIRING, SHIPPING, WAITING, Recovery, StaleStore
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.sequencing.link import Link, LinkError
from kvtcp.replication.sequencing.sequencer import Sequencer
from kvtcp.replication.sequencing.shard import Shard
from tests.support.replication_fakes import make_map

ENTRY = b"packed"


def copy(seq: int = 0, epoch: int = 1, chain: int | None = None, **fields: Any) -> CopyReport:
    """A copy of the map's disk; the chain of number n is 100 + n unless it is said."""
    chain = (100 + seq if seq else 0) if chain is None else chain
    return CopyReport(**{"replica_id": "disk", "epoch": epoch if seq else 0, "seq": seq, "chain": chain, **fields})


def entries(first: int, last: int) -> list[list[Any]]:
    """Entries as they are shipped."""
    return [[100 + seq, ENTRY] for seq in range(first, last + 1)]


class WatchedShard(Shard):
    """A shard of it."""

    def serve(self, seq: int, chain: int) -> None:
        super().serve(seq, chain)
        assert isinstance(self.cluster, Watched) and self.number not in self.cluster.served
        self.cluster.served[self.number] = (seq, chain)


class Watched(Sequencer):
    """A sequencer that remembers what the recovery told it."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self.served: dict[int, tuple[int, int]] = {}
        self.repairs: dict[int, tuple[int, dict[str, str]]] = {}
        self.rows: list[tuple[int, list[str]]] = []

    def make_shard(self, number: int, members: list[Link]) -> Shard:
        return WatchedShard(number, members, self)

    def equalized(self, number: int, seq: int, bad: Mapping[str, str]) -> None:
        super().equalized(number, seq, bad)
        self.repairs[number] = (seq, dict(bad))

    def set_members(self, number: int, nodes: Sequence[str]) -> None:
        super().set_members(number, nodes)
        self.rows.append((number, list(nodes)))


class Around:
    """What a recovery needs, by hand: its changes of the map, which `store` stores, and Membership, which replaces
    nothing."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        self.map = cluster_map
        self.reports: dict[str, Report] = {}
        self.sequencer = Watched(cluster_map)
        self.served, self.repairs, self.rows = self.sequencer.served, self.sequencer.repairs, self.sequencer.rows
        self.outbox = Outbox(self.reports)
        self.in_flight: set[int] = set()
        self.repairing: set[int] = set()
        self.unsettled: set[int] = set()
        self.changes: list[tuple[Callable[[ClusterMap], ClusterMap], Callable[[ClusterMap], None]]] = []
        self.recovery = Recovery(self.sequencer, self, self.outbox, self.reports, self)  # type: ignore[arg-type]
        self.emptied = self.recovery.emptied
        self.sequencer.now_ms = 1_000

    def propose(self, edit: Callable[[ClusterMap], ClusterMap], done: Callable[[ClusterMap], None]) -> None:
        self.changes.append((edit, done))

    def repair(self, number: int) -> None:
        assert self.repairs[number] and self.recovery.shards[number].state == REPAIRING
        self.repairing.add(number)

    def repair_in_flight(self, number: int) -> bool:
        return number in self.in_flight

    def stop_repair(self, number: int) -> None:
        assert number not in self.in_flight
        self.repairing.discard(number)

    # --- what it said -----------------------------------------------------------------------------------

    @property
    def downs(self) -> list[tuple[int, str]]:
        """Shards that are down, and why."""
        return [(fields["shard"], fields["reason"]) for _, word, fields in self.outbox.events if word == "shard-down"]

    @property
    def alarms(self) -> list[str]:
        """What should never be seen."""
        return [fields["reason"] for _, word, fields in self.outbox.events if word == "alarm"]

    @property
    def sent(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The frames since the last `take_sent`."""
        return [action[1:] for action in self.outbox.actions]

    # --- by hand ----------------------------------------------------------------------------------------

    def report(self, node: str, *copies: CopyReport | None) -> None:
        """A node says what it has of its shards 0, 1, ...; None = it has no copy."""
        found = {number: each for number, each in enumerate(copies) if each is not None}
        self.reports[node] = Report(node, 1, "sync", stamp_ms=0, promised=2, map_version=0, space=0, copies=found)
        self.recovery.on_report(node)

    def lose(self, node: str) -> None:
        """The link of a node is gone."""
        del self.reports[node]
        self.recovery.on_lost(node)

    def wait(self, ms: int = RECOVER_WAIT_MS) -> None:
        """So much time passes."""
        self.sequencer.now_ms += ms
        self.recovery.tick()

    def store(self) -> None:
        """The changes that were proposed are stored, in their order."""
        changes, self.changes = self.changes, []
        for edit, done in changes:
            self.map = edit(self.map)
            self.map.check()
            done(self.map)

    def take_sent(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The frames since the last call."""
        sent = self.sent
        self.outbox.actions.clear()
        return sent

    def state(self, number: int = 0) -> str:
        """Of a shard that is not served."""
        return self.recovery.shards[number].state


def begin(*rows: CopyReport | None, min_insync: int = 1, cluster_map: ClusterMap | None = None) -> Around:
    """One shard with a member for each row; all of them reported."""
    around = Around(cluster_map or make_map(len(rows), len(rows), shards=1, min_insync=min_insync))
    for number, row in enumerate(rows, 1):
        assert not around.sent and not around.changes and not around.served
        around.report(f"n{number}", row)
    return around


# --- members that agree -----------------------------------------------------------------------------


def test_equal_members() -> None:
    """Where all members end at the same entry there is nothing to do; that is committed."""
    around = begin(copy(7), copy(7), copy(7))
    assert around.served == {0: (7, 107)} and not around.sent and not around.changes
    assert not around.recovery.shards and around.recovery.is_settled


def test_nothing_was_ever_written() -> None:
    """A shard without an entry is served from its beginning."""
    assert begin(copy(), copy()).served == {0: (0, 0)}


def test_each_shard_waits_for_its_own_members() -> None:
    """It is served as soon as they all reported, whatever is with others."""
    around = Around(make_map(3, 1, shards=3))
    around.report("n2", copy(), copy(), copy())
    assert around.served == {1: (0, 0)} and not around.recovery.is_settled
    around.report("n1", copy(), copy(), copy())
    around.report("n3", copy(), copy(), copy())
    assert around.served.keys() == {0, 1, 2}


def test_silent_members_are_waited_for() -> None:
    """RECOVER_WAIT_MS from the first look on, however long the process needed before; then they are removed."""
    around = Around(make_map(3, 3, shards=1))
    around.sequencer.now_ms = 500_000
    around.report("n1", copy(7))
    around.report("n2", copy(7))
    around.wait(RECOVER_WAIT_MS - 1)
    assert around.state() == WAITING and not around.changes
    around.wait(1)
    assert around.state() == CHANGING and not around.served
    around.store()
    assert around.map.nodes_of(0) == ["n1", "n2"] and around.served == {0: (7, 107)}
    assert around.rows == [(0, ["n1", "n2"])]


def test_what_changes_in_one_step_is_one_change_of_the_map() -> None:
    """A node that is missing is so in all its shards, and each may have more to be removed."""
    around = Around(make_map(4, 3, shards=4))
    assert [around.map.nodes_of(number) for number in range(4)] == [
        ["n1", "n2", "n3"], ["n4", "n1", "n2"], ["n3", "n4", "n1"], ["n2", "n3", "n4"],
    ]  # fmt: skip
    around.report("n1", *[copy(7)] * 3)
    around.report("n2", copy(7), copy(7, replica_id="new"), None, copy(7))
    around.report("n3", copy(7), None, copy(7), copy(7))
    assert around.served.keys() == {0} and not around.changes
    around.wait()
    [(edit, _)] = around.changes
    new = edit(around.map)
    assert [number for number in range(4) if new.members[number] != around.map.members[number]] == [1, 2, 3]
    around.store()
    assert [around.map.nodes_of(number) for number in range(4)] == [
        ["n1", "n2", "n3"], ["n1"], ["n3", "n1"], ["n2", "n3"],
    ]  # fmt: skip
    assert around.served.keys() == {0, 1, 2, 3} and around.recovery.take_removed() == {
        "n4": [(number, "it did not report in time") for number in (1, 2, 3)],
        "n2": [(1, "it came back without its data: what it has is not what was written to this cluster")],
    }


def test_nobody_is_removed_before_a_good_member_answered() -> None:
    """R6: with no good member the shard is down, and the map stays as it is; it is judged again when one comes."""
    around = Around(make_map(3, 3, shards=1))
    around.report("n1", copy(replica_id="new"))
    around.wait()
    assert around.state() == DOWN and not around.changes and around.recovery.is_settled
    assert around.downs == [
        (0, "none of its members has its data: n1 came back without its data; n2 is missing; n3 is missing")
    ]
    around.wait(60_000)
    assert around.state() == DOWN and len(around.downs) == 1
    around.report("n2", copy(7))
    assert around.state() == WAITING, "n3 is given its time too"
    around.report("n3", copy(7))
    around.store()
    assert around.map.nodes_of(0) == ["n2", "n3"] and around.served == {0: (7, 107)}


@pytest.mark.parametrize(
    ("min_insync", "rows", "left", "then"),
    [
        (1, (7, None, None), ["n1"], "served"), (2, (7, None, None), ["n1", "n3"], "down"),
        (3, (7, 7, None), ["n1", "n2", "n3"], "down"), (2, (7, "bad", None), ["n1", "n2"], "repairing"),
        (1, (7, "bad", None), ["n1"], "served"), (2, (7, "bad", "bad"), ["n1", "n3"], "repairing"),
        (3, (7, "bad", "bad"), ["n1", "n2", "n3"], "repairing"), (2, (7, 7, "bad"), ["n1", "n2"], "served"),
    ],
)  # fmt: skip
def test_removals_never_go_below_min_insync(min_insync: int, rows: Any, left: list[str], then: str) -> None:
    """R4, R6: silent ones go first, as a bad one that answered can be repaired in its place; one silent member that has
    to stay keeps the shard down."""
    around = Around(make_map(3, 3, shards=1, min_insync=min_insync))
    for number, row in enumerate(rows, 1):
        if row is not None:
            around.report(f"n{number}", copy(replica_id="new") if row == "bad" else copy(row))
    around.wait()
    around.store()
    assert around.map.nodes_of(0) == left and len(left) >= min_insync
    assert {
        "served": around.served == {0: (7, 107)},
        "down": bool(around.downs) and "down" in then and around.recovery.shards.keys() == {0},
        "repairing": 0 in around.repairs and around.repairs[0][0] == 7 and not around.served,
    }[then]
    if then == "down":
        assert around.state() == DOWN
        assert around.downs[-1][1] == (
            f"n3 may have writes that the others lack, or not: it is waited for, as {min_insync} of its members are "
            "the fewest allowed"
        )
    if then == "repairing":
        assert around.state() == REPAIRING and around.recovery.is_settled
        assert set(around.repairs[0][1]) == set(left) - {"n1"}


# --- shipping ---------------------------------------------------------------------------------------


def test_what_a_member_lacks_is_shipped_to_it() -> None:
    """From the best, in pieces, until it is there; then it is as good as the others."""
    around = begin(copy(4), copy(7))
    recovery_ = around.recovery
    assert around.take_sent() == [("n2", (FETCH, 0, 4))] and around.state() == SHIPPING
    recovery_.on_entries("n2", 0, 4, 104, entries(5, 6))
    assert around.take_sent() == [("n1", (SHIP, 0, entries(5, 6)))]
    recovery_.on_shipped("n1", 0, 1, 6, 106, None)
    assert around.take_sent() == [("n2", (FETCH, 0, 6))]
    recovery_.on_entries("n2", 0, 6, 106, entries(7, 7))
    assert around.take_sent() == [("n1", (SHIP, 0, entries(7, 7)))] and not around.served
    recovery_.on_shipped("n1", 0, 1, 7, 107, None)
    assert around.served == {0: (7, 107)} and not around.sent
    assert around.reports["n1"].copies == {0: copy(7)}


def test_members_one_after_the_other() -> None:
    """Two members lack something: both get it."""
    around = begin(copy(4), copy(6), copy(7))
    assert around.take_sent() == [("n3", (FETCH, 0, 4))]
    around.recovery.on_entries("n3", 0, 4, None, entries(5, 7))
    around.take_sent()
    around.recovery.on_shipped("n1", 0, 1, 7, 107, None)
    assert around.take_sent() == [("n3", (FETCH, 0, 6))]
    around.recovery.on_entries("n3", 0, 6, 106, entries(7, 7))
    assert around.take_sent() == [("n2", (SHIP, 0, entries(7, 7)))]
    around.recovery.on_shipped("n2", 0, 1, 7, 107, None)
    assert around.served == {0: (7, 107)}


@pytest.mark.parametrize(
    "rows", [(copy(9, epoch=1, chain=99), copy(8, epoch=2), copy(8, epoch=2)), (copy(8, chain=99), copy(8, epoch=2))]
)
def test_the_epoch_counts_before_the_number(rows: Any) -> None:
    """R7: the longest log may be of an older epoch: then it is no member's history, and nothing of it is shipped."""
    around = begin(*rows)
    assert not around.sent and around.recovery.shards[0].bad == {
        "n1": "has another history than n2: it ends in an older epoch"
    }
    around.store()
    assert "n1" not in around.map.nodes_of(0) and around.served == {0: (8, 108)}


@pytest.mark.parametrize("chain", [1, None])
def test_a_member_with_another_history(chain: int | None) -> None:
    """The best says so by its chain; if it does not know it any more the member does, by the first entry."""
    around = begin(copy(4), copy(7), min_insync=2)
    around.recovery.on_entries("n2", 0, 4, chain, entries(5, 7))
    if chain is None:
        assert around.take_sent()[-1] == ("n1", (SHIP, 0, entries(5, 7)))
        around.recovery.on_shipped("n1", 0, 1, 4, 104, b"the chain of entry 5 is another one")
    why = (
        "cannot take what it lacks: the chain of entry 5 is another one"
        if chain is None
        else "has another history than n2: they differ at number 4 or before"
    )
    assert around.repairs == {0: (7, {"n1": why})}, "it cannot be removed, so it is replaced whole"
    assert around.reports["n1"].copies == {0: copy(4)}


def test_another_donor_when_the_first_cannot_ship() -> None:
    """Any member at the best position may ship; if none can, the one that lacks it is bad, and the others go on."""
    around = begin(copy(7), copy(4), copy(7), copy(3))
    on_entries = around.recovery.on_entries
    assert around.take_sent() == [("n1", (FETCH, 0, 4))]
    on_entries("n1", 0, 4, None, None)
    assert around.take_sent() == [("n3", (FETCH, 0, 4))]
    on_entries("n3", 0, 4, 104, None)
    assert around.recovery.shards[0].bad == {"n2": "lacks what follows number 4, and no member can ship it any more"}
    around.store()
    assert around.map.nodes_of(0) == ["n1", "n3", "n4"]
    assert around.take_sent() == [("n1", (FETCH, 0, 3))], "the next member, all donors again"
    on_entries("n1", 0, 3, 103, entries(4, 7))
    around.recovery.on_shipped("n4", 0, 1, 7, 107, None)
    assert around.served == {0: (7, 107)}


def test_shipped_entries_that_come_to_another_chain() -> None:
    """A member that says it is there with another chain than the best has is bad."""
    around = begin(copy(6), copy(7))
    around.recovery.on_entries("n2", 0, 6, 106, entries(7, 7))
    around.recovery.on_shipped("n1", 0, 1, 7, 5, None)
    assert around.recovery.shards[0].bad == {"n1": "has another history than n2: they differ at number 7 or before"}


def test_few_shards_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many shards are brought up to date at once, and the next when one of them is."""
    monkeypatch.setattr(recovery, "RECOVERY_SHARDS_MAX", 2)
    around = Around(make_map(2, 2, shards=4))
    around.report("n1", *[copy(7)] * 4)
    around.report("n2", *[copy(6)] * 3, copy(7))
    assert around.take_sent() == [("n1", (FETCH, 0, 6)), ("n1", (FETCH, 1, 6))]
    for number in (1, 0, 2):
        around.recovery.on_entries("n1", number, 6, 106, entries(7, 7))
        assert around.take_sent() == [("n2", (SHIP, number, entries(7, 7)))]
        around.recovery.on_shipped("n2", number, 1, 7, 107, None)
        assert around.take_sent() == ([("n1", (FETCH, 2, 6))] if number == 1 else [])
    assert around.served == dict.fromkeys(range(4), (7, 107))


@pytest.mark.parametrize("ending", ["lost", "bad", "restarted"])
def test_the_next_shard_has_its_turn_however_one_ends(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """A shard gives up its turn when a link of it breaks, when its member turns out to be bad, when it begins anew."""
    monkeypatch.setattr(recovery, "RECOVERY_SHARDS_MAX", 1)
    around = Around(make_map(4, 2, shards=2, min_insync=2))
    around.report("n1", copy(7))
    around.report("n2", copy(6))
    around.report("n3", None, copy(7))
    around.report("n4", None, copy(6))
    assert around.map.nodes_of(1) == ["n3", "n4"] and around.take_sent() == [("n1", (FETCH, 0, 6))]
    if ending == "lost":
        around.lose("n2")
    elif ending == "bad":
        around.recovery.on_entries("n1", 0, 6, 1, entries(7, 7))
        assert around.state() == REPAIRING
    else:
        around.recovery.begin(0)
    assert around.take_sent() == [("n3", (FETCH, 1, 6))]


def test_shards_that_wait_for_their_turn_when_a_link_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is shipped from or to a node that is gone, and all of them come to an end."""
    monkeypatch.setattr(recovery, "RECOVERY_SHARDS_MAX", 1)
    around = Around(make_map(3, 3, shards=3))
    for node, seq in (("n1", 7), ("n2", 6), ("n3", 7)):
        around.report(node, *[copy(seq)] * 3)
    assert around.take_sent() == [("n1", (FETCH, 0, 6))]
    around.lose("n1")
    assert not around.sent
    around.wait()
    around.store()
    for number in range(3):
        assert around.take_sent() == [("n3", (FETCH, number, 6))]
        around.recovery.on_entries("n3", number, 6, 106, entries(7, 7))
        around.take_sent()
        around.recovery.on_shipped("n2", number, 1, 7, 107, None)
    assert around.served == dict.fromkeys(range(3), (7, 107))


@pytest.mark.parametrize(
    "frame",
    [
        ("on_entries", "n1", 0, 4, 104, []),  # not the node that was asked
        ("on_entries", "n2", 0, 5, 104, []),  # not what was asked for
        ("on_entries", "n2", 1, 4, 104, entries(5, 7)),  # another shard, which waits
        ("on_shipped", "n1", 0, 1, 7, 107, None),  # nothing was shipped yet
        ("on_shipped", "n1", 1, 1, 7, 107, None),
    ],
)
def test_answers_that_were_not_asked_for(frame: tuple[Any, ...]) -> None:
    """They may be of an attempt that is over: nothing comes of them."""
    around = Around(make_map(2, 2, shards=2))
    around.report("n1", copy(4))
    around.report("n2", copy(7), copy(7))
    around.lose("n1")
    around.report("n1", copy(4), None)
    around.take_sent()
    before = around.state(0), around.state(1)
    getattr(around.recovery, frame[0])(*frame[1:])
    assert not around.sent and (around.state(0), around.state(1)) == before == (SHIPPING, CHANGING)


@pytest.mark.parametrize("found", [[[1]], 7, [[1, "text"]], [[b"1", b"entry"]]], ids=str)
def test_entries_that_are_none(found: Any) -> None:
    """What is no list of entries costs the link."""
    around = begin(copy(4), copy(7))
    with pytest.raises(LinkError, match="n2 sent entries of shard 0 that are none"):
        around.recovery.on_entries("n2", 0, 4, 104, found)


@pytest.mark.parametrize("seq", [4, 3, 8])
def test_a_position_that_cannot_be(seq: int) -> None:
    """A member cannot end before or beyond what was shipped to it."""
    around = begin(copy(4), copy(7))
    around.recovery.on_entries("n2", 0, 4, 104, entries(5, 7))
    with pytest.raises(LinkError, match=f"has shard 0 up to {seq}, which it was not sent"):
        around.recovery.on_shipped("n1", 0, 1, seq, 107, None)


# --- links that break -------------------------------------------------------------------------------


def test_a_link_that_breaks_while_entries_are_shipped() -> None:
    """The shard starts over; what was shipped stays shipped; answers of the first attempt are not looked at."""
    around = begin(copy(4), copy(7))
    around.recovery.on_entries("n2", 0, 4, 104, entries(5, 6))
    around.recovery.on_shipped("n1", 0, 1, 6, 106, None)
    around.take_sent()
    around.lose("n2")
    assert around.state() == WAITING
    around.recovery.on_entries("n2", 0, 6, 106, entries(7, 7))
    around.report("n2", copy(7))
    assert around.take_sent() == [("n2", (FETCH, 0, 6))]
    around.recovery.on_entries("n2", 0, 6, 106, entries(7, 7))
    around.recovery.on_shipped("n1", 0, 1, 7, 107, None)
    assert around.served == {0: (7, 107)}


def test_what_was_found_bad_is_looked_at_again_after_a_new_link() -> None:
    """A member that could not be brought up to date may come back with another copy."""
    around = begin(copy(4), copy(7), min_insync=2)
    around.recovery.on_entries("n2", 0, 4, 1, entries(5, 7))
    assert around.state() == REPAIRING
    around.lose("n1")
    around.report("n1", copy(7))
    assert around.served == {0: (7, 107)}


def test_a_link_that_breaks_while_the_map_is_changed() -> None:
    """The change is waited for, as nobody knows whether it is stored; then the shard starts over, with a new wait."""
    around = begin(copy(7), copy(7), copy(replica_id="new"))
    assert around.state() == CHANGING
    around.lose("n2")
    assert around.state() == CHANGING
    around.report("n2", copy(6))
    assert around.state() == CHANGING and not around.sent
    around.store()
    assert around.take_sent() == [("n1", (FETCH, 0, 6))], "it is judged by what it has now"
    around.lose("n2")
    around.wait(RECOVER_WAIT_MS - 1)
    assert around.state() == WAITING and around.map.nodes_of(0) == ["n1", "n2"]
    around.wait(1)
    around.store()
    assert around.served == {0: (7, 107)}


def test_a_link_that_breaks_while_the_map_is_changed_and_stays_away() -> None:
    """After the change it is waited for as at the beginning."""
    around = begin(copy(7), copy(7), copy(replica_id="new"))
    around.lose("n2")
    around.sequencer.now_ms += 5 * RECOVER_WAIT_MS
    around.store()
    assert around.state() == WAITING and not around.changes
    around.wait()
    around.store()
    assert around.map.nodes_of(0) == ["n1"] and around.served == {0: (7, 107)}


def test_a_link_that_breaks_while_a_member_is_replaced() -> None:
    """The shard starts over, unless the change of the map for the new copy is on its way: then after that."""
    around = begin(copy(7), copy(replica_id="new"), min_insync=2)
    assert around.state() == REPAIRING
    around.lose("n2")
    assert around.state() == WAITING
    around.report("n2", copy(replica_id="new"))
    assert around.state() == REPAIRING
    around.in_flight.add(0)
    around.lose("n1")
    assert around.state() == REPAIRING and around.recovery.shards[0].again
    around.in_flight.clear()
    around.recovery.begin(0)
    assert around.state() == WAITING and not around.recovery.shards[0].again


def test_members_that_were_replaced() -> None:
    """When all bad members are, the shard is served at the position of those that were good."""
    around = begin(copy(7), copy(replica_id="new"), min_insync=2)
    shipping = begin(copy(4), copy(7))
    for case in (around, shipping):
        case.map = case.map.replaced(0, "n2", "n2", "new")
        case.reports["n2"].copies[0] = copy(7, replica_id="new")
        case.sequencer.shards[0].mark(case.sequencer.links["n2"], "")
    around.recovery.replaced(0, "n2", "new")
    assert around.served == {0: (7, 107)} and not around.repairing
    shipping.repairing.add(0)
    with pytest.raises(AssertionError, match="only a shard under repair is repaired"):
        shipping.recovery.replaced(0, "n2", "new")


# --- bad members ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (copy(replica_id="new"), "came back without its data"),
        (copy(9, replica_id="new"), "came back without its data: what it has is not what was written to this cluster"),
        (copy(3, replica_id="new", damage="the log is torn"), "has a damaged copy: the log is torn"),
        (copy(9, complete=False), "has an incomplete copy: it was never finished"), (None, "has no copy of it"),
    ],
)  # fmt: skip
def test_bad_members(row: CopyReport | None, why: str) -> None:
    """R9: another disk, an incomplete copy or none: whatever it holds, it does not count, and the others go on."""
    around = begin(copy(7), row, copy(7))
    assert around.recovery.shards[0].bad == {"n2": why} and not around.sent
    around.store()
    assert around.map.members[0] == (("n1", "disk"), ("n3", "disk")) and around.served == {0: (7, 107)}


def test_a_position_below_what_was_committed_is_an_alarm() -> None:
    """A member that lacks what any member was told to be committed has lost it."""
    around = begin(copy(7), copy(8), copy(9, commit=8))
    assert around.alarms == ["n1 ends at number 7, but number 8 was committed in shard 0"]
    assert around.recovery.shards[0].bad == {"n1": "ends at number 7, but number 8 was committed"}
    around.store()
    assert around.take_sent() == [("n3", (FETCH, 0, 8))]
    around.recovery.on_entries("n3", 0, 8, 108, entries(9, 9))
    around.recovery.on_shipped("n2", 0, 1, 9, 109, None)
    assert around.served == {0: (9, 109)} and len(around.alarms) == 1
    assert begin(copy(7), copy(2, commit=8, replica_id="foreign")).alarms == [], "the number is of another copy"


def test_what_an_incomplete_copy_was_told_counts() -> None:
    """It lost what it had, and not what it knew: with nobody who has it the shard is down."""
    around = begin(copy(7), copy(2, commit=8, complete=False))
    assert around.alarms == ["n1 ends at number 7, but number 8 was committed in shard 0"]
    assert around.state() == DOWN


def test_no_good_member() -> None:
    """The shard is down, and says why of each."""
    around = begin(copy(replica_id="new"), copy(5, complete=False))
    assert around.downs == [
        (0, "none of its members has its data: n1 came back without its data; n2 has an incomplete copy: it was never "
            "finished"),
    ]  # fmt: skip
    assert not around.changes


def test_members_that_differ() -> None:
    """Two good members that end at the same number with different chains: nobody can say which of them is right."""
    around = begin(copy(7), copy(7, chain=1), copy(6))
    why = "its members differ: n1, n2 end at number 7 with different histories"
    assert around.downs == [(0, why)] and around.alarms == [f"shard 0: {why}"]
    assert not around.sent and not around.changes and around.recovery.shards[0].differ


# --- destroyed nodes --------------------------------------------------------------------------------


def destroyed(cluster_map: ClusterMap, *nodes: str) -> ClusterMap:
    """These are declared destroyed."""
    for node in nodes:
        cluster_map = cluster_map.with_destroyed(node)
    return cluster_map


def test_a_destroyed_member_is_not_waited_for() -> None:
    """R9: it counts as fenced; it is removed if enough stay, before others that are bad."""
    around = Around(destroyed(make_map(3, 3, shards=1, min_insync=2), "n2"))
    around.report("n1", copy(7))
    around.report("n3", copy(replica_id="new"))
    assert around.state() == CHANGING
    around.store()
    assert around.map.nodes_of(0) == ["n1", "n3"]
    assert around.repairs == {0: (7, {"n3": "came back without its data"})}


def test_a_destroyed_member_that_has_to_stay_is_replaced() -> None:
    """By a learner, before the shard is served."""
    around = Around(destroyed(make_map(2, 2, shards=1, min_insync=2), "n2"))
    around.report("n1", copy(7))
    assert around.repairs == {0: (7, {"n2": "was declared destroyed"})} and around.state() == REPAIRING


def test_a_destroyed_node_that_answers_does_not_count() -> None:
    """There is no way back from the declaration."""
    around = Around(destroyed(make_map(2, 2, shards=1), "n2"))
    around.report("n2", copy(9))
    around.report("n1", copy(7))
    around.store()
    assert around.map.nodes_of(0) == ["n1"] and around.served == {0: (7, 107)}


def test_a_shard_that_is_down_is_judged_anew_when_a_node_is_declared_destroyed() -> None:
    """`begin` is how the administration asks for it."""
    around = Around(make_map(2, 2, shards=1, min_insync=2))
    around.report("n1", copy(7))
    around.wait()
    assert around.state() == DOWN
    around.map = destroyed(around.map, "n2")
    around.recovery.begin(0)
    around.recovery.tick()
    assert around.state() == REPAIRING


def test_a_row_that_names_lost_copies() -> None:
    """A map that was made again names no copy where nothing could be relied on: the shard is down, and says why."""
    around = Around(make_map(2, 2, shards=1, disk=LOST_REPLICA, min_insync=2))
    around.report("n1", copy(7, replica_id="a"))
    around.report("n2", copy(0, replica_id="b"))
    assert around.state() == DOWN
    (_, why), *_ = around.downs
    assert f"n1 {UNKNOWN_COPY}; n2 {LOST_DATA}" in why


# --- new disks --------------------------------------------------------------------------------------


def founded(factor: int = 2) -> ClusterMap:
    """The map of a cluster whose copies are not known yet."""
    return make_map(factor, factor, shards=1, disk="")


def test_the_first_start() -> None:
    """All copies are new, empty and complete: their disks go into the map; nobody is given up before all are there. One
    that was lost meanwhile counts when it is back."""
    around = Around(founded())
    around.report("n1", copy(replica_id="a"))
    around.wait(60_000)
    around.lose("n1")
    around.report("n2", copy(replica_id="b"))
    assert around.state() == WAITING and not around.changes
    around.report("n1", copy(replica_id="a"))
    around.store()
    assert around.map.members[0] == (("n1", "a"), ("n2", "b"))
    assert around.served == {0: (0, 0)} and around.emptied == []


@pytest.mark.parametrize("row", [copy(3, replica_id="a"), copy(replica_id="a", complete=False)])
def test_data_at_the_first_start(row: CopyReport) -> None:
    """A node that has something of a cluster which the map has just founded: the map is not that cluster's."""
    with pytest.raises(StaleStore, match="node n2 has data of shard 0, the cluster map knows of none"):
        begin(copy(replica_id="b"), row, cluster_map=founded())


def test_an_end_of_a_run_in_memory() -> None:
    """All members are new and empty: after a run in memory that is how it ends, and the shard begins anew; after any
    other it is a loss."""
    durable = make_map(2, 2, shards=1)
    in_memory = replace(durable, durability="memory")
    around = begin(copy(replica_id="a"), copy(replica_id="b"), cluster_map=in_memory)
    around.store()
    assert around.map.members[0] == (("n1", "a"), ("n2", "b"))
    assert around.served == {0: (0, 0)} and around.emptied == [0]
    for rows, cluster_map in (
        ((copy(replica_id="a"), copy(replica_id="b")), durable),
        ((copy(replica_id="a"), copy(3, replica_id="b")), in_memory),
        ((copy(replica_id="a"), copy(replica_id="b", complete=False)), in_memory),
        ((copy(replica_id="a"), None), in_memory),
    ):  # fmt: skip
        assert begin(*rows, cluster_map=cluster_map).state() == DOWN


def test_a_new_copy_of_an_empty_shard() -> None:
    """If a member tells that nothing was ever written, an empty copy has all there is."""
    around = begin(copy(), copy(replica_id="new"), copy(3, replica_id="foreign"))
    around.store()
    assert around.map.replica_id_of(0, "n2") == "new"
    around.store()
    assert around.map.nodes_of(0) == ["n1", "n2"] and around.served == {0: (0, 0)}


def test_what_was_shipped_is_waited_for() -> None:
    """The donor is lost while entries are on their way: the shard is judged by what their target has then, not by what
    it reported before, or the next write would be given a number that it has."""
    around = begin(copy(5), copy(4), cluster_map=make_map(nodes=2, factor=2, shards=1))
    assert around.take_sent() == [("n1", (FETCH, 0, 4))]
    around.recovery.on_entries("n1", 0, 4, 104, entries(5, 5))
    assert around.take_sent() == [("n2", (SHIP, 0, entries(5, 5)))]
    around.lose("n1")
    around.wait()
    assert around.state() == WAITING and not around.changes
    around.recovery.on_shipped("n2", 0, 1, 5, 105, None)
    around.store()
    assert around.served == {0: (5, 105)}


def test_nothing_is_waited_for_that_cannot_come() -> None:
    """The target of entries that are on their way is lost, and comes back: its new report counts."""
    around = begin(copy(5), copy(4), cluster_map=make_map(nodes=2, factor=2, shards=1))
    around.recovery.on_entries("n1", 0, 4, 104, entries(5, 5))
    around.lose("n2")
    around.report("n2", copy(5))
    assert around.served == {0: (5, 105)}


def test_a_removal_is_thought_over_when_its_turn_comes() -> None:
    """R6: a silent member may be removed while a good one is linked. If that one is lost, or lost its data, before the
    map is changed, the silent one may be the last that is good."""
    around = begin(copy(5), None, cluster_map=make_map(nodes=2, factor=2, shards=1))
    around.lose("n2")
    around.wait()
    assert around.state() == CHANGING
    around.lose("n1")
    around.report("n1", copy(replica_id="other"))
    around.store()
    assert around.map.nodes_of(0) == ["n1", "n2"] and 0 not in around.served
    around.report("n2", copy(5))
    around.store()
    assert around.map.nodes_of(0) == ["n2"] and around.served == {0: (5, 105)}
