"""Tests of the learner: every phase, every failure, and answers that come too late. What it asks for is answered by
hand; tests/replication/membership/test_insync.py has it over real replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvtcp.protocol.link import FETCH, PULL, SHIP, CopyReport
from kvtcp.protocol.operations import DONATE, LEARN, UNLEARN
from kvtcp.replication.membership import learner as phases
from kvtcp.replication.membership.learner import HOLD_AFTER_TICKS, Learner
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.sequencing.cluster_state import ClusterState
from kvtcp.replication.sequencing.link import Link, LinkError
from kvtcp.replication.sequencing.requests import LINK_LOST
from kvtcp.replication.sequencing.shard import Shard
from tests.support.replication_fakes import make_map

LAST = 10  # last number given when the learner is attached


class Around(Outbox):
    """What a learner needs: sequencer and outbox in one, and what Membership answers. It remembers what it was asked
    for."""

    def __init__(self) -> None:
        super().__init__(("n1", "n2", "n3"))
        self.map = make_map(3, 2, shards=4)
        self.asked: list[tuple[str, tuple[Any, ...]]] = []  # node, item or frame
        self.calls: list[Callable[[Any], None]] = []  # of the items, in order
        self.failed: list[str] = []
        self.live: list[int] = []  # what was acknowledged, each time
        self.may = True
        self.tokens = 0

    def attach(self, shard: Shard, link: Link, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        self.call(link, item, then)

    def call(self, link: Link, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        self.asked.append((link.node, item))
        self.calls.append(then)

    def send(self, node: str, frame: tuple[Any, ...]) -> None:
        self.asked.append((node, frame))

    def token_for(self, learner: Learner) -> bytes:
        if not self.may:
            return b""
        self.tokens += 1
        return b"token%d" % self.tokens

    def on_failed(self, learner: Learner, why: str) -> None:
        self.failed.append(why)

    def on_live(self, learner: Learner) -> None:
        self.live.append(learner.following.acked)

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """What was asked for since the last call."""
        asked, self.asked = self.asked, []
        return asked


class Case:
    """Shard 3 with the members n1 and n2 up to number LAST, and a learner n3."""

    def __init__(self, copy: CopyReport | None = None, *, donor: str = "n1", seq_min: int = 0) -> None:
        links = {node: Link(node) for node in ("n1", "n2", "n3")}
        self.shard = Shard(3, [links["n1"], links["n2"]], ClusterState(make_map()))
        self.shard.serving = True
        self.shard.last_seq = self.shard.commit = LAST
        self.shard.acked = dict.fromkeys(self.shard.members, LAST)
        for link in links.values():
            link.connected = True
        self.links = links
        self.around = around = Around()
        self.learner = Learner(
            self.shard, links["n3"], links[donor], None, seq_min, sequencer=around, outbox=around,
            token_for=around.token_for, on_live=around.on_live, on_failed=around.on_failed,
        )  # fmt: skip
        self.learner.start(copy)

    def learn(self, fresh: bool, seq: int = 0, last: int = LAST) -> None:
        """The node answers LEARN."""
        assert self.around.take() == [("n3", (LEARN, 3, int(fresh), last))] and self.learner.phase == phases.ASKED
        assert self.learner.fresh is fresh
        disk = b"new" if fresh else b"old"
        self.around.calls[-1]([disk, 2, not fresh, 0 if fresh else 1, seq, 100 + seq])

    def assert_begins_anew(self) -> None:
        """It asked for a whole copy."""
        assert self.around.take() == [("n3", (LEARN, 3, 1, LAST))]
        assert self.learner.phase == phases.ASKED and not self.around.failed


def copy(seq: int, **fields: Any) -> CopyReport:
    """A copy as its node reported it."""
    return CopyReport("old", 1, True, 1, seq, 100 + seq)._replace(**fields)


def entries(first: int, last: int) -> list[list[Any]]:
    """Entries as they are shipped."""
    return [[100 + seq, b"packed"] for seq in range(first, last + 1)]


def fetching(seq: int = 7) -> Case:
    """The learner's own copy ends at this number, and the donor is asked for what follows."""
    case = Case(copy(seq))
    case.learn(False, seq)
    assert case.around.take() == [("n1", (FETCH, 3, seq))] and case.learner.phase == phases.FETCHING
    return case


def shipping() -> Case:
    """Entries 8 and 9 of 10 were shipped."""
    case = fetching()
    case.learner.on_entries("n1", 7, 107, entries(8, 9))
    assert case.around.take() == [("n3", (SHIP, 3, entries(8, 9)))] and case.learner.phase == phases.SHIPPING
    return case


def freezing() -> Case:
    """A whole copy is needed, and the donor was asked to freeze its own."""
    case = Case()
    case.learn(True)
    assert case.around.take() == [("n1", (DONATE, 3, b"token1", 0))] and case.learner.phase == phases.FREEZING
    return case


def pulling() -> Case:
    """The node fetches it."""
    case = freezing()
    case.around.calls[-1]([1, LAST, 110, 55])
    assert case.around.take() == [("n3", (PULL, 3, "h", 1, b"token1"))] and case.learner.phase == phases.PULLING
    assert case.learner.keys_total == 55
    return case


def live() -> Case:
    """It has everything."""
    case = pulling()
    case.learner.on_learned("n3", b"new", LAST)
    assert case.learner.phase == phases.LIVE and case.around.live == [LAST]
    return case


PHASES: dict[str, Callable[[], Case]] = {
    phases.ASKED: lambda: Case(copy(7)), phases.FETCHING: fetching, phases.SHIPPING: shipping,
    phases.FREEZING: freezing, phases.PULLING: pulling, phases.LIVE: live,
}  # fmt: skip


# --- the ways to be live ----------------------------------------------------------------------------


def test_by_entries() -> None:
    """What the copy lacks is fetched and shipped until it has the last number given before it was attached; what is
    acknowledged counts from LEARNED on."""
    case = shipping()
    learner = case.learner
    assert learner.following.replica_id == "old" and learner.entries_left == LAST - 7
    learner.on_shipped("n3", 9, 109, None)
    assert case.around.take() == [("n1", (FETCH, 3, 9))]
    assert (learner.phase, learner.entries_left) == (phases.FETCHING, 1)
    learner.on_entries("n1", 9, 109, entries(10, 12))
    assert case.around.take() == [("n3", (SHIP, 3, entries(10, 12)))] and learner.entries_shipped == 5
    learner.on_shipped("n3", 12, 112, None)
    assert case.around.take() == [] and learner.phase == phases.SHIPPING
    learner.acknowledged(11)
    assert learner.following.acked == 0 and not case.around.live
    case.shard.last_seq = 14
    learner.on_learned("n3", b"old", 13)
    assert learner.phase == phases.LIVE and case.around.live == [learner.following.acked] == [learner.seq] == [13]
    learner.acknowledged(13)
    learner.acknowledged(14)
    assert learner.following.acked == 14 and case.around.live == [13, 14] and learner.entries_left == 0


@pytest.mark.parametrize("order", ["entries, learned", "learned, entries"])
def test_a_copy_that_has_everything_is_compared_all_the_same(order: str) -> None:
    """R7: it may be another history of the same length: until the donor's chain is here nothing counts."""
    case = fetching(LAST)
    case.shard.last_seq = LAST + 3
    answers = {
        "entries": lambda: case.learner.on_entries("n1", LAST, 110, []),
        "learned": lambda: case.learner.on_learned("n3", b"old", LAST),
    }
    first, second = order.split(", ")
    answers[first]()
    case.learner.acknowledged(LAST + 2)
    assert case.learner.following.acked == 0 and case.learner.phase != phases.LIVE
    answers[second]()
    assert case.learner.phase == phases.LIVE and case.around.take() == []
    assert case.learner.following.acked == (LAST + 2 if first == "learned" else LAST)


def test_by_a_whole_copy() -> None:
    """Frozen at the donor after the learner was attached, pulled, published, live."""
    case = pulling()
    assert case.learner.token == b"token1" and case.learner.following.replica_id == "new"
    case.learner.acknowledged(LAST + 1)
    assert case.learner.following.acked == 0
    case.learner.on_learned("n3", b"new", LAST)
    assert case.learner.phase == phases.LIVE and case.learner.following.acked == LAST


def test_a_copy_that_gives_itself() -> None:
    """After an accepted loss: frozen first, begun anew then, and pulled from its own node."""
    case = Case(copy(4), donor="n3", seq_min=500)
    learner, around = case.learner, case.around
    assert around.take() == [("n3", (DONATE, 3, b"token1", 500))] and learner.phase == phases.FREEZING
    assert not learner.following.takes_writes
    around.calls[-1]([2, 501, 0, 9])
    case.learn(True, last=501)
    assert learner.following.takes_writes
    assert around.take() == [("n3", (PULL, 3, "h", 3, b"token1"))] and learner.keys_total == 9
    learner.on_learned("n3", b"new", 501)
    assert learner.phase == phases.LIVE and learner.following.acked == 501 and learner.entries_left == 0


@pytest.mark.parametrize(
    "found", [None, copy(7, complete=False), copy(LAST + 1)], ids=["absent", "incomplete", "too long"]
)
def test_copies_that_cannot_be_completed(found: CopyReport | None) -> None:
    """They are replaced whole from the beginning."""
    case = Case(found)
    case.learn(True)
    assert case.learner.phase == phases.FREEZING


# --- what makes it begin anew -----------------------------------------------------------------------


def test_a_node_that_refuses_to_complete_its_copy() -> None:
    """Its copy is not what it reported: it is replaced whole."""
    case = Case(copy(7))
    case.around.take()
    case.around.calls[-1](None)
    case.assert_begins_anew()
    case.around.calls[-1](None)
    assert case.around.failed == ["its node refused to begin a new copy"]
    assert case.around.take() == [("n3", (UNLEARN, 3))]


@pytest.mark.parametrize(
    ("chain", "found"), [(1, entries(8, 10)), (None, entries(8, 10)), (None, None), (107, None)],
    ids=["another history", "chain not known", "too old", "entries not there"],
)  # fmt: skip
def test_entries_that_do_not_follow_its_copy(chain: int | None, found: Any) -> None:
    """R7: another history, or nobody knows: it is replaced whole, never cut."""
    case = fetching()
    case.learner.on_entries("n1", 7, chain, found)
    case.assert_begins_anew()


def test_a_donor_that_is_behind_is_asked_again() -> None:
    """It has not got there yet, or has nothing more yet: a little later it has."""
    case = fetching()
    case.shard.acked[case.links["n1"]] = 5
    for chain, found in ((None, None), (107, [])):
        case.learner.on_entries("n1", 7, chain, found)
        assert case.learner.phase == phases.FETCHING and case.around.take() == []
        case.learner.tick()
        assert case.around.take() == [("n1", (FETCH, 3, 7))]
        case.learner.tick()
        assert case.around.take() == [], "one question at a time"


@pytest.mark.parametrize("found", [[[1]], 7, [[1, "text"]]], ids=str)
def test_entries_that_are_none(found: Any) -> None:
    """They cost the donor's link."""
    case = fetching()
    with pytest.raises(LinkError, match="n1 sent entries of shard 3 that are none"):
        case.learner.on_entries("n1", 7, 107, found)


def test_a_node_that_cannot_take_what_it_lacks() -> None:
    """The entries do not follow what it has."""
    case = shipping()
    case.learner.on_shipped("n3", 7, 107, b"the chain of entry 8 is another one")
    case.assert_begins_anew()


@pytest.mark.parametrize("phase", [phases.FETCHING, phases.SHIPPING])
def test_learn_failed_of_a_copy_that_is_completed(phase: str) -> None:
    """The buffer ran over, say: a whole copy may be there sooner."""
    case = PHASES[phase]()
    case.learner.on_failed("n3", "too much was written meanwhile")
    case.assert_begins_anew()


@pytest.mark.parametrize("phase", [phases.FREEZING, phases.PULLING])
def test_learn_failed_of_a_whole_copy(phase: str) -> None:
    """The attempt is over; the node knows that already."""
    case = PHASES[phase]()
    case.learner.on_failed("n3", "the transfer broke off")
    assert case.around.failed == ["the transfer broke off"] and case.around.take() == []
    case.learner.fail("again")
    case.learner.on_learned("n3", b"new", LAST)
    assert len(case.around.failed) == 1


def test_a_donor_without_a_copy() -> None:
    """Frozen nothing: the attempt is over, and the node is told so."""
    case = freezing()
    case.around.calls[-1](None)
    assert case.around.failed == ["n1 has no copy to give"] and case.around.take() == [("n3", (UNLEARN, 3))]
    itself = Case(copy(4), donor="n3", seq_min=500)
    itself.around.take()
    itself.around.calls[-1](None)
    assert itself.around.failed == ["its node has no copy to give"]


def test_a_donor_that_gives_to_another_one_is_waited_for() -> None:
    """Whole copies leave a donor one after the other."""
    case = Case()
    case.around.may = False
    case.learn(True)
    case.learner.tick()
    case.learner.resume()
    assert case.learner.phase == phases.FREEZING and case.around.take() == [] and not case.learner.token
    case.around.may = True
    case.learner.resume()
    case.learner.resume()
    assert case.around.take() == [("n1", (DONATE, 3, b"token1", 0))]


# --- links that are lost, and what comes too late ---------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_an_attempt_that_fails(phase: str) -> None:
    """In every phase: the node is told to forget what it set aside, whoever keeps learners is told once, and nothing
    that still comes is looked at."""
    case = PHASES[phase]()
    case.around.take()
    case.learner.fail("the donor was lost")
    assert case.around.take() == [("n3", (UNLEARN, 3))] and case.around.failed == ["the donor was lost"]
    case.learner.fail("once more")
    for then in case.around.calls:
        then(None)
        then(LINK_LOST)
    assert len(case.around.failed) == 1 and case.around.take() == []


def test_a_learner_whose_link_is_gone_is_told_nothing() -> None:
    """There is nobody to tell."""
    case = shipping()
    case.links["n3"].connected = False
    case.learner.fail("its link was lost")
    assert case.around.take() == [] and case.around.failed == ["its link was lost"]


@pytest.mark.parametrize("phase", [phases.ASKED, phases.FREEZING])
def test_an_answer_that_died_with_a_link(phase: str) -> None:
    """The attempt is over."""
    case = PHASES[phase]()
    case.around.calls[-1](LINK_LOST)
    assert case.around.failed == ["a link was lost"]


def test_a_learner_that_was_given_up_does_nothing() -> None:
    """Nobody is told anything, whatever comes."""
    case = Case(copy(7))
    case.around.take()
    case.learner.give_up()
    case.around.calls[-1]([b"old", 1, True, 1, 7, 107])
    case.learner.fail("too late")
    assert case.around.take() == [] and not case.around.failed and case.learner.phase == phases.ASKED


def test_a_learner_whose_change_of_the_map_is_on_its_way_cannot_fail() -> None:
    """It counts when the map says so."""
    case = live()
    case.learner.proposed = True
    case.learner.fail("a link was lost")
    case.learner.on_failed("n3", "why")
    case.learner.tick()
    assert not case.around.failed and case.around.take() == [] and case.around.live == [LAST]


@pytest.mark.parametrize("phase", PHASES)
def test_frames_that_are_not_awaited(phase: str) -> None:
    """Of other nodes, of other numbers, of other disks, of earlier attempts: they change nothing."""
    case = PHASES[phase]()
    learner = case.learner
    before = (learner.phase, learner.seq, learner.following.acked, learner.fresh, learner.token)
    case.around.take()
    learner.on_entries("n2", 7, 107, entries(8, 10))
    learner.on_entries("n1", 6, 106, entries(7, 10))
    learner.on_shipped("n1", 9, 109, None)
    learner.on_shipped("n3", 8, 108, None)
    learner.on_learned("n1", b"old", LAST)
    learner.on_learned("n3", b"other", LAST)
    learner.on_learned("n3", b"old", LAST - 1)
    learner.on_failed("n1", "why")
    learner.acknowledged(9)
    if phase != phases.FETCHING:
        learner.on_entries("n1", 7, 107, entries(8, 10))
    if phase != phases.SHIPPING:
        learner.on_shipped("n3", 9, 109, None)
    if phase in (phases.ASKED, phases.LIVE):
        learner.on_failed("n3", "why")
        learner.on_learned("n3", b"old", LAST)
    assert before == (learner.phase, learner.seq, learner.following.acked, learner.fresh, learner.token)
    assert case.around.take() == [] and not case.around.failed


def test_results_of_earlier_attachments() -> None:
    """LEARN is answered twice when the copy was begun anew meanwhile: the first answer is not looked at, nor is that of
    a donor."""
    case = fetching()
    first = case.around.calls[-1]
    case.learner.on_failed("n3", "too much was written meanwhile")
    case.assert_begins_anew()
    first([b"old", 1, True, 1, 7, 107])
    assert case.learner.phase == phases.ASKED and case.around.take() == []
    case.around.calls[-1]([b"new", 2, False, 0, 0, 0])
    assert case.learner.phase == phases.FREEZING and case.learner.seq == 0


def test_learned_of_an_earlier_attachment_by_the_same_disk() -> None:
    """It is told when it is durable, which may be after the next attachment was answered: it ends before that."""
    case = fetching(LAST)
    case.learner.on_learned("n3", b"old", LAST - 1)
    case.learner.on_entries("n1", LAST, 110, [])
    assert case.learner.phase == phases.SHIPPING
    case.learner.on_learned("n3", b"old", LAST)
    assert case.learner.phase == phases.LIVE and case.learner.following.acked == LAST


def test_a_number_that_was_never_given() -> None:
    """A node cannot have more than there is."""
    case = pulling()
    with pytest.raises(LinkError, match="n3 has shard 3 up to 11, the last number given is 10"):
        case.learner.on_learned("n3", b"new", LAST + 1)
    assert case.learner.phase == phases.PULLING


# --- running after the members ----------------------------------------------------------------------


def test_a_learner_that_runs_after_the_members() -> None:
    """Live, and always a little behind: after some ticks writes wait for it. One that has everything committed and
    waits for the map only keeps nobody waiting."""
    case = live()
    for _ in range(3 * HOLD_AFTER_TICKS):
        case.learner.tick()
    assert not case.learner.following.holds_writes and set(case.around.live) == {LAST}
    case.shard.last_seq = case.shard.commit = LAST + 5
    for _ in range(HOLD_AFTER_TICKS):
        case.learner.tick()
    assert not case.learner.following.holds_writes
    case.learner.tick()
    assert case.learner.following.holds_writes
