"""Tests of the sequencer: links lost and back, copies that lost their data, takeover, time, and random simulations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvtcp.constants import PURGE_INTERVAL_MS, PURGE_SHARDS_MAX, READ_RETRY_MS, WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.protocol.operations import ADD, AUDIT, DELETE, GET, INCR, PURGE, PUT
from kvtcp.replication.sequencing import link as link_module
from kvtcp.replication.sequencing.link import LinkError
from kvtcp.replication.sequencing.multi_read import count_read, mget_read
from kvtcp.replication.sequencing.requests import LINK_LOST
from kvtcp.replication.sequencing.sequencer import Sequencer
from tests.support.replication_fakes import Cluster

# --- links ------------------------------------------------------------------------------------------


def test_write_is_answered_when_all_members_have_it() -> None:
    """R1: the answer waits for the last of the three members."""
    cluster = Cluster()
    cluster.put("w")
    for node in ("n1", "n2"):
        cluster.pump(node)
        assert "w" not in cluster.answers
    cluster.pump("n3")
    assert cluster.answers.ok == {"w": 1}


def test_kept_writes_are_sent_again_with_their_stamps(cluster: Cluster) -> None:
    """A node that missed a part of the batches gets exactly that, with the old stamps and the bit to answer. What it
    had applied it is asked for again: the result was lost with the link, not with the node."""
    first = cluster.sequencer.shards[0].members[0].node
    cluster.write(INCR, "one", args=(1,))
    cluster.apply(first)  # its result is lost with the link
    stamps = [cluster.sequencer.stamp_ms]
    cluster.begin(5)
    cluster.write(INCR, "two", args=(1,))
    cluster.sequencer.close_batches()
    stamps.append(cluster.sequencer.stamp_ms)
    cluster.down(first)
    cluster.begin(5)
    assert cluster.up(first) is None
    assert [batch.stamp_ms for batch in cluster.sequencer.links[first].outgoing] == stamps[1:]
    cluster.pump()
    assert cluster.answers.ok == {"one": 1, "two": 2} and cluster.sequencer.unknown == 0
    assert len({replica.tables[0].digest() for replica in cluster.replicas.values()}) == 1


def test_result_that_nobody_knows_any_more() -> None:
    """The only member is another process now, with the entry and without its result: the outcome is UNKNOWN."""
    cluster = Cluster(shards=1, nodes=1, factor=1)
    cluster.write(INCR, "one", args=(1,))
    cluster.apply("n1")
    cluster.down("n1")
    cluster.replicas["n1"]._results.forget(0)  # as a restart does
    assert cluster.up("n1") is None
    cluster.pump()
    code, text, details = cluster.answers.failed["one"]
    assert (code, details) == (Code.UNKNOWN, {"shard": 0})
    assert text == (
        "the write to shard 0 may or may not have happened: its answer was lost with the connection to a node"
    )
    assert cluster.sequencer.unknown == 1


def test_result_that_arrived_survives_the_link() -> None:
    """Applied and answered, not yet acknowledged: the client gets the result when the node is back, also when the
    node has to apply the entry a second time."""
    for lost in (False, True):
        cluster = Cluster(shards=1)
        first = cluster.sequencer.shards[0].members[0].node
        cluster.write(ADD, "add", args=(b"v",))
        cluster.apply(first)
        cluster.results(first, durable=False)
        cluster.down(first)
        if lost:
            cluster.new_process(first)  # it acknowledged nothing, so an empty one is as good
        assert cluster.up(first) is None
        cluster.get("read")
        cluster.pump()
        assert cluster.answers.ok["add"] == 1 and "read" in cluster.answers.ok
        if lost:  # once more: the stand-in for the known result is kept as well
            cluster.down(first)
            assert cluster.up(first) is None


def test_retry_passes_over_known_results(cluster: Cluster) -> None:
    """Batches that were sent again hold no reads that could be moved."""
    first = cluster.sequencer.shards[0].members[0].node
    cluster.write(ADD, "add", args=(b"v",))
    cluster.apply(first)
    cluster.results(first, durable=False)
    cluster.down(first)
    cluster.new_process(first)
    assert cluster.up(first) is None
    cluster.apply(first)
    cluster.tick(READ_RETRY_MS)
    cluster.pump()
    assert cluster.answers.ok == {"add": 1}


def test_node_that_lost_its_data_and_has_to_stay() -> None:
    """Its shard's pending writes are UNKNOWN, what reads saw of them is refused; later writes wait, as it may be
    replaced, and are refused in time; reads go to the others; other shards go on. The process that has the data may
    come back and everything goes on."""
    cluster = Cluster(shards=2, min_insync=3)
    cluster.commit("committed")
    cluster.put("pending")
    cluster.apply("n1")
    cluster.apply("n2")
    cluster.get("held")
    cluster.down("n3")
    cluster.put("waiting")
    member = cluster.replicas["n3"]
    cluster.pump("n1", "n2")
    assert "held" not in cluster.answers
    cluster.new_process("n3")
    why = "came back without its data: it has shard 0 up to 0, but acknowledged 1"
    assert cluster.up("n3") == why
    shard, other = cluster.sequencer.shards
    assert shard.bad == {cluster.sequencer.links["n3"]: why} and not other.bad and other.writable
    assert cluster.answers.failed["pending"][0] == Code.UNKNOWN and f"n3 {why}" in cluster.answers.failed["pending"][1]
    assert cluster.answers.failed["held"][0] == Code.NOT_ENOUGH_REPLICAS
    assert f"n3 {why}" in cluster.answers.failed["held"][1]
    cluster.put("waits too")
    assert "waits too" not in cluster.answers and "waiting" not in cluster.answers
    cluster.get("again")
    cluster.sequencer.multi_read(count_read([0], b"", None, cluster.answers, "count"))
    cluster.put("elsewhere", 1)
    assert not [item for item in cluster.apply("n3") if item[1] in (0, [0])], "a bad copy is asked nothing"
    cluster.pump()
    assert cluster.answers.failed["again"][0] == cluster.answers.failed["count"][0] == Code.NOT_ENOUGH_REPLICAS
    assert cluster.answers.ok["elsewhere"] == 1
    cluster.tick(WRITE_WAIT_MS)
    for token in ("waiting", "waits too"):
        code, text, _ = cluster.answers.failed[token]
        assert code == Code.NOT_ENOUGH_REPLICAS
        assert text == f"shard 0 takes no writes: n3 {why}; nothing was executed"
    cluster.down("n3")
    cluster.replicas["n3"] = member
    member.tables[1].apply_entry(cluster.replicas["n1"].tables[1].last_entry)
    assert cluster.up("n3") is None
    cluster.put("after")
    cluster.get("last")
    cluster.pump()
    assert cluster.answers.ok["after"] == 3 and cluster.answers.ok["last"][1] == 3
    assert shard.blocked_reason == "" and not shard.bad


def test_node_that_lost_its_data_and_may_leave(cluster: Cluster) -> None:
    """With enough members besides it nothing is answered UNKNOWN or refused: it may be gone in a moment, and then what
    is pending commits and what waits goes on."""
    cluster.commit("committed")
    cluster.put("pending")
    cluster.apply("n1")
    cluster.apply("n2")
    cluster.get("held")
    cluster.down("n3")
    cluster.pump("n1", "n2")
    cluster.new_process("n3")
    assert cluster.up("n3") is not None
    cluster.put("waiting")
    cluster.get("held too", key=b"none")
    cluster.pump("n1", "n2")
    assert cluster.answers.ok.keys() == {"committed"} and not cluster.answers.failed
    shard = cluster.sequencer.shards[0]
    cluster.sequencer.leave([shard], cluster.sequencer.links["n3"])
    cluster.sequencer.check()
    assert cluster.answers.ok["pending"] == 2 and cluster.answers.ok["held"][1] == 2
    assert cluster.answers.ok["held too"] is None
    cluster.pump()
    assert cluster.answers.ok["waiting"] == 3 and not cluster.answers.failed


def test_what_is_kept_for_a_bad_copy_survives_more_links() -> None:
    """A bad copy is linked and lost again: its writes still wait for the one that has the data, in order."""
    cluster = Cluster(nodes=2, factor=2, shards=1, min_insync=2)
    first = cluster.sequencer.shards[0].members[0].node
    cluster.commit("committed")
    for token in ("one", "two"):
        cluster.begin()
        cluster.write(INCR, token, key=b"n", args=(1,))
    member = cluster.replicas[first]
    for _ in range(2):
        cluster.down(first)
        cluster.new_process(first)
        assert cluster.up(first) is not None
        cluster.pump()
    assert [cluster.answers.failed[token][0] for token in ("one", "two")] == [Code.UNKNOWN] * 2
    cluster.down(first)
    cluster.replicas[first] = member
    assert cluster.up(first) is None
    cluster.pump()
    assert cluster.sequencer.shards[0].commit == 3
    assert len({replica.tables[0].digest() for replica in cluster.replicas.values()}) == 1
    cluster.write(INCR, "three", key=b"n", args=(1,))
    cluster.pump()
    assert cluster.answers.ok["three"] == 3


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"replica_id": "other", "seq": 0, "chain": 0}, "came back without its data"),
        ({"replica_id": "other"}, "came back without its data: what it has is not what was written to this cluster"),
        ({"replica_id": "other", "damage": "segment 3 is torn"}, "has a damaged copy: segment 3 is torn"),
        ({"complete": False}, "has an incomplete copy: it was never finished"),
        ({"complete": False, "damage": "a snapshot is gone"}, "has an incomplete copy: a snapshot is gone"),
        ({"seq": 5}, "has another history: it has shard 0 up to 5, above the last number given, 1"),
        ({"seq": 0}, "came back without its data: it has shard 0 up to 0, but acknowledged 1"),
        (None, "has no copy of it"), ({}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_copies_that_are_not_the_member(changes: dict[str, Any] | None, why: str) -> None:
    """A copy with another disk, an incomplete one, one with less than it acknowledged or more than was given is bad,
    each for its shard alone."""
    cluster = Cluster(nodes=2, factor=2, shards=2)
    cluster.commit("w")
    cluster.down("n2")
    copies = cluster.hello("n2")
    if changes is None:
        del copies[0]
    else:
        copies[0] = copies[0]._replace(**changes)
    assert cluster.sequencer.link_up("n2", copies) == ({0: why} if why else {})
    cluster.sequencer.check()
    assert cluster.sequencer.shards[0].writable is not bool(why) and cluster.sequencer.shards[1].writable


def test_a_new_disk_is_no_member_before_the_map_says_so() -> None:
    """Also where nothing was ever written, and the copy is empty and complete."""
    cluster = Cluster(nodes=2, factor=2, shards=2)
    cluster.down("n1")
    cluster.new_process("n1", "new")
    copies = cluster.hello("n1")
    assert set(cluster.sequencer.link_up("n1", copies)) == {0, 1}
    cluster.down("n1")
    cluster.map = cluster.map.with_replica_ids({0: {"n1": "new"}})
    cluster.sequencer.map_changed(cluster.map)
    assert set(cluster.sequencer.link_up("n1", copies)) == {1}
    assert cluster.sequencer.shards[0].writable


def test_nodes_are_told_when_what_is_older_than_the_link_is_committed() -> None:
    """The commit of a link is -1 while entries that the node had before it are not on all members; a heartbeat is
    enough to tell it when they are."""
    cluster = Cluster(nodes=2, factor=2, shards=1)
    cluster.put("w")
    cluster.apply("n1")
    cluster.down("n1")
    assert cluster.up("n1") is None
    link = cluster.sequencer.links["n1"]
    assert cluster.sequencer.committed_ordinal(link) == -1
    cluster.put("next")
    cluster.apply("n1")
    assert cluster.replicas["n1"].copies[0].commit == 0
    cluster.pump()
    assert cluster.sequencer.committed_ordinal(link) == 1
    cluster.replicas["n1"].begin(0, 1, [])
    assert cluster.replicas["n1"].copies[0].commit == 2


def test_nodes_are_not_told_while_a_shard_is_not_served() -> None:
    """What they have of it may be lost: the commit of the link is -1 until every shard of the node is served."""
    cluster = Cluster(nodes=2, factor=2, shards=2, link=False)
    sequencer = cluster.sequencer
    sequencer.shards[1].serve(0, 0)
    for node in ("n1", "n2"):
        cluster.replicas[node].begin(1, 0, [(PUT, 0, 1, 0, b"k", b"v")])
        assert cluster.replicas[node].run([])
        assert cluster.up(node) is None
    cluster.commit("w", 1)
    link = sequencer.links["n1"]
    assert cluster.answers.ok == {"w": 1} and sequencer.committed_ordinal(link) == -1
    sequencer.shards[0].serve(1, cluster.replicas["n1"].tables[0].chain)
    sequencer.check()
    assert sequencer.committed_ordinal(link) == 1


def test_control_item_of_a_lost_node_fails(cluster: Cluster) -> None:
    """Nobody else can answer it, also when it was looked at by the retry before; a node that is down takes none."""
    assert cluster.sequencer.control("n1", (AUDIT, [0]), [0], cluster.answers, "control")
    cluster.apply("n1")
    cluster.tick(READ_RETRY_MS)
    cluster.tick()
    cluster.down("n1")
    assert cluster.answers.failed["control"][0] == Code.UNKNOWN
    assert not cluster.sequencer.control("n1", (AUDIT, [0]), [0], cluster.answers, "refused")
    cluster.down("n1", "still away")
    assert cluster.sequencer.links["n1"].reason == "still away"


def test_a_call_is_called_once() -> None:
    """Its result came in a piece of a batch, then the link is lost before the batch is complete."""
    cluster = Cluster(shards=1, nodes=1, factor=1)
    told: list[Any] = []
    link = cluster.sequencer.links["n1"]
    for number in range(2):
        cluster.sequencer.call(link, (AUDIT, [0]), lambda result, number=number: told.append((number, result)))
    cluster.apply("n1")
    cluster.sequencer.on_results("n1", 0, 0, [(0, 0)], [])
    cluster.tick(READ_RETRY_MS)
    cluster.down("n1")
    assert told == [(0, (0, 0)), (1, LINK_LOST)]


def test_control_item_is_answered_at_commit(cluster: Cluster) -> None:
    """A table position of one node is handed out when the others have it too."""
    cluster.put("w")
    assert cluster.sequencer.control("n1", (AUDIT, [0]), [0], cluster.answers, "control")
    cluster.pump("n1", "n2")
    assert not cluster.answers.ok
    cluster.pump("n3")
    assert cluster.answers.ok["control"] == [(1, cluster.replicas["n2"].tables[0].chain)]


@pytest.mark.parametrize("frame", [(b"1", 1, []), (1, None, []), (1, 1, b"x"), (True, 1, []), (2, 2, [])], ids=str)
def test_frame_that_cannot_be_true(frame: tuple[Any, ...]) -> None:
    """The link is closed for it; reads in it are answered by another member, and nothing is lost."""
    cluster = Cluster(shards=1, factor=2, nodes=2)
    cluster.get("read")
    cluster.write(ADD, "add", args=(b"v",))
    node = next(name for name, link in cluster.sequencer.links.items() if link.open and len(link.open.items) == 2)
    cluster.apply(node)
    with pytest.raises(LinkError):
        cluster.sequencer.on_results(node, *frame, [])
    cluster.sequencer.check()
    cluster.down(node)
    assert cluster.up(node) is None
    cluster.pump()
    assert cluster.answers.ok["read"] is None or cluster.answers.ok["read"][1] == 1
    assert "add" in cluster.answers


def test_results_of_a_link_that_is_down(cluster: Cluster) -> None:
    """Late frames of a lost link are refused."""
    cluster.down("n1")
    with pytest.raises(LinkError, match="not linked"):
        cluster.sequencer.on_results("n1", 0, 0, [], [])


# --- reads that move --------------------------------------------------------------------------------


def reader_of(cluster: Cluster) -> str:
    """The node with something to answer that is no write."""
    cluster.sequencer.close_batches()
    (name,) = (name for name, link in cluster.sequencer.links.items() if any(b.answers for b in link.outgoing))
    return name


def test_read_moves_from_a_silent_node_and_is_answered_once(cluster: Cluster) -> None:
    """The first answer counts, the second is dropped."""
    cluster.get("read")
    silent = reader_of(cluster)
    cluster.apply(silent)
    cluster.tick(READ_RETRY_MS - 1)
    others = [node for node in cluster.replicas if node != silent]
    cluster.pump(*others)
    assert not cluster.answers.ok
    cluster.tick(1)
    cluster.tick(1)
    cluster.pump(*others)
    assert cluster.answers.ok == {"read": None}
    cluster.results(silent)


def test_a_node_that_sends_is_not_silent(cluster: Cluster) -> None:
    """Large results take their time: as long as bytes come, reads stay, and a page is not begun anew."""
    cluster.sequencer.multi_read(mget_read([b"k"], [0], cluster.answers, "mget"))
    slow = reader_of(cluster)
    cluster.apply(slow)
    for _ in range(5):
        cluster.tick(READ_RETRY_MS - 1)
        cluster.sequencer.heard(slow)
    assert not any(link.open or link.outgoing for link in cluster.sequencer.links.values())
    cluster.tick(READ_RETRY_MS)
    assert any(link.open or link.outgoing for link in cluster.sequencer.links.values()), "now it is silent"


def test_a_page_moves_once_from_silent_nodes() -> None:
    """Nodes that need longer than READ_RETRY_MS for a page still answer it: it is not begun anew for ever."""
    cluster = Cluster(nodes=2, factor=2, shards=1)
    cluster.sequencer.multi_read(mget_read([b"k"], [0], cluster.answers, "mget"))
    first = reader_of(cluster)
    second = next(node for node in cluster.replicas if node != first)
    cluster.apply(first)
    cluster.tick(READ_RETRY_MS)
    cluster.apply(second)
    cluster.results(first)  # of the first attempt: too late
    assert not cluster.answers.ok
    for _ in range(5):
        cluster.tick(READ_RETRY_MS)
    cluster.results(second)
    assert cluster.answers.ok == {"mget": [None]}


def test_read_that_could_not_move_is_tried_again() -> None:
    """No other member when the node fell silent: the read moves when one is back, or when the silent link is lost."""
    for lost in (False, True):
        cluster = Cluster(nodes=2, factor=2, shards=1)
        cluster.down("n2")
        cluster.get("read")
        cluster.sequencer.multi_read(mget_read([b"k"], [0], cluster.answers, "mget"))
        cluster.apply("n1")
        cluster.tick(READ_RETRY_MS)
        if lost:
            cluster.down("n1")
        cluster.up("n2")
        cluster.tick()
        cluster.pump("n2")
        assert cluster.answers.ok == {"read": None, "mget": [None]}


def test_read_moved_twice(cluster: Cluster) -> None:
    """Silent, moved, and the second node is lost: a third member answers."""
    cluster.get("read")
    first = reader_of(cluster)
    cluster.apply(first)
    cluster.tick(READ_RETRY_MS)
    second = next(name for name, link in cluster.sequencer.links.items() if name != first and link.open)
    cluster.apply(second)
    cluster.down(second)
    third = next(name for name in cluster.replicas if name not in (first, second))
    cluster.pump(third)
    if not cluster.answers.ok:  # it may as well have gone back to the first
        cluster.pump(first)
    assert cluster.answers.ok == {"read": None}


def test_answered_read_does_not_move(cluster: Cluster) -> None:
    """A read that was moved and answered by the second node stays answered when the first is lost."""
    cluster.get("read")
    first = reader_of(cluster)
    cluster.apply(first)
    cluster.tick(READ_RETRY_MS)
    cluster.pump(*(node for node in cluster.replicas if node != first))
    cluster.down(first)
    cluster.pump()
    assert cluster.answers.ok == {"read": None}


def test_multi_read_whose_links_are_lost_waits_once() -> None:
    """Both links of an attempt are lost: it waits once, and is answered once when they are back."""
    cluster = Cluster(nodes=2, factor=1, shards=2)
    cluster.sequencer.multi_read(count_read([0, 1], b"", None, cluster.answers, "count"))
    cluster.apply("n1")
    cluster.apply("n2")
    cluster.down("n1")
    cluster.down("n2")
    assert cluster.sequencer.waiting_items == 1
    cluster.up("n1")
    cluster.up("n2")
    cluster.pump()
    assert cluster.answers.ok == {"count": 0}
    cluster.tick(WRITE_WAIT_MS)


def test_multi_read_moves_from_a_silent_node(cluster: Cluster) -> None:
    """Another attempt replaces the first; parts of the first that arrive later are not looked at."""
    cluster.commit("w")
    cluster.sequencer.multi_read(mget_read([b"k"], [0], cluster.answers, "mget"))
    silent = reader_of(cluster)
    cluster.apply(silent)
    cluster.tick(READ_RETRY_MS)
    cluster.results(silent)
    assert "mget" not in cluster.answers
    cluster.pump()
    assert cluster.answers.ok["mget"] == [(b"v", 1, None)]


def test_reads_of_a_lost_link_wait_if_no_other_member_is_there() -> None:
    """With one copy a read waits for the node and is refused with its name if it does not come back."""
    cluster = Cluster(nodes=1, factor=1, shards=1)
    cluster.get("early")
    cluster.down("n1", "pulled out")
    cluster.get("late")
    assert cluster.sequencer.waiting_items == 2
    cluster.tick(WRITE_WAIT_MS)
    for token in ("early", "late"):
        code, text, details = cluster.answers.failed[token]
        assert (code, details) == (Code.NOT_ENOUGH_REPLICAS, {"shard": 0})
        assert "shard 0 cannot be read: n1 is missing (pulled out); nothing was executed" in text


# --- takeover, time ---------------------------------------------------------------------------------


def test_shards_are_served_one_by_one() -> None:
    """A new coordinator over nodes that run on: the numbers of a shard go on when it is served; before, it is refused
    with the reason."""
    cluster = Cluster(shards=2)
    for number in (0, 1, 1):
        cluster.put(object(), number)
    cluster.pump()
    sequencer = Sequencer(cluster.map)
    for name in cluster.replicas:
        assert sequencer.link_up(name, cluster.hello(name)) == {}
        sequencer.check()
    answers = cluster.answers
    sequencer.shards[1].reason = "its members differ: n1, n2"

    def refused(*tokens: str) -> None:
        sequencer.shards[1].write(PUT, b"k", (b"v",), 2, answers, tokens[0])
        sequencer.shards[1].read(GET, b"k", answers, tokens[1])
        sequencer.multi_read(count_read([0, 1], b"", None, answers, tokens[2]))
        for token in tokens:
            code, text, details = answers.failed[token]
            assert (code, details) == (Code.SHARD_DOWN, {"shard": 1})
            assert text == f"shard 1 is down: {sequencer.shards[1].reason}"

    sequencer.shards[0].serve(1, cluster.replicas["n1"].tables[0].chain)
    assert sequencer.shards[0].writable and not sequencer.shards[1].serving
    refused("down", "down too", "down as well")
    sequencer.shards[0].write(PUT, b"k", (b"v",), 2, answers, "ok")
    assert sequencer.shards[0].last_seq == 2
    sequencer.shards[1].serve(2, cluster.replicas["n1"].tables[1].chain)
    sequencer.shards[1].write(PUT, b"k", (b"v",), 2, answers, "ok too")
    sequencer.check()
    assert sequencer.shards[1].last_seq == 3 and "ok too" not in answers
    with pytest.raises(AssertionError, match="is not taken over"):
        sequencer.shards[0].serve(1, 0)


def test_a_shard_that_is_stopped() -> None:
    """What is pending is UNKNOWN, what waits and what is held is refused, and nothing of it comes later: reads are not
    queued elsewhere, writes are not sent again."""
    cluster = Cluster(shards=2)
    sequencer, answers = cluster.sequencer, cluster.answers
    down = (Code.SHARD_DOWN, "shard 0 is down: its members differ")
    cluster.commit("committed")
    cluster.write(INCR, "pending", key=b"n", args=(1,))
    cluster.get("held", key=b"n")
    cluster.pump("n1", "n2")
    for node in ("n2", "n3"):
        cluster.down(node)
    cluster.get("moves")
    cluster.put("waiting")
    sequencer.multi_read(count_read([0, 1], b"", None, answers, "count moves"))
    cluster.apply("n1")
    assert cluster.up("n2") is None
    sequencer.stop_serving(0, "its members differ")
    sequencer.check()
    assert answers.failed["pending"][0] == Code.UNKNOWN and "its members differ" in answers.failed["pending"][1]
    assert answers.failed["waiting"][:2] == down
    assert answers.failed["held"][:2] == (Code.NOT_ENOUGH_REPLICAS, down[1])
    cluster.down("n1")
    for token in ("moves", "count moves"):
        assert answers.failed[token][:2] == down
    for node in ("n1", "n3"):
        assert cluster.up(node) is None
        assert [item for item in cluster.apply(node) if item[1] == 0] == []
    cluster.put("refused")
    cluster.commit("elsewhere", 1)
    assert answers.failed["refused"][:2] == down
    assert answers.ok.keys() == {"committed", "elsewhere"}


def test_a_shard_that_is_handed_back(cluster: Cluster) -> None:
    """It is stopped, and may be taken over again, wherever its members are then; not while a good one is linked."""
    sequencer, shard = cluster.sequencer, cluster.sequencer.shards[0]
    cluster.write(INCR, "due", key=b"n", args=(1,))
    cluster.apply("n1")
    cluster.pump("n2", "n3")
    sequencer.leave([shard], sequencer.links["n1"])
    cluster.put("pending")
    cluster.apply("n2")
    with pytest.raises(AssertionError, match="no linked member could acknowledge"):
        sequencer.hand_back(0, "a test")
    for node in ("n1", "n2", "n3"):
        cluster.down(node)
    sequencer.hand_back(0, "a test")
    sequencer.check()
    assert {token: failed[0] for token, failed in cluster.answers.failed.items()} == {
        "due": Code.UNKNOWN, "pending": Code.UNKNOWN,
    }  # fmt: skip
    for node in ("n1", "n2", "n3"):
        cluster.new_process(node)
        assert cluster.up(node) is None
    sequencer.shards[0].serve(0, 0)
    cluster.commit("after")
    assert cluster.answers.ok == {"after": 1}


def test_a_read_of_a_silent_node_does_not_move_in_a_shard_that_is_stopped() -> None:
    """Neither of one key nor of several shards."""
    cluster = Cluster(shards=2, nodes=2, factor=2)
    cluster.sequencer.multi_read(count_read([0, 1], b"", None, cluster.answers, "count"))
    silent = reader_of(cluster)
    cluster.apply(silent)
    cluster.sequencer.stop_serving(0, "its members differ")
    cluster.tick(READ_RETRY_MS)
    assert not any(link.open or link.outgoing for link in cluster.sequencer.links.values())


def test_reads_that_wait_for_a_shard_that_is_stopped() -> None:
    """A read over several shards that waits to begin is refused with the shard that is stopped, and the others wait
    on."""
    cluster = Cluster(shards=2, nodes=1, factor=1)
    cluster.down("n1")
    cluster.get("one")
    for token, numbers in (("both", [0, 1]), ("other", [1])):
        cluster.sequencer.multi_read(count_read(numbers, b"", None, cluster.answers, token))
    cluster.sequencer.stop_serving(0, "its members differ")
    cluster.sequencer.check()
    assert {token: failed[0] for token, failed in cluster.answers.failed.items()} == {
        "one": Code.SHARD_DOWN, "both": Code.SHARD_DOWN,
    }  # fmt: skip
    assert cluster.up("n1") is None
    cluster.pump()
    assert cluster.answers.ok == {"other": 0}


def test_another_history_at_the_position_of_the_takeover() -> None:
    """A member that comes back at the number where this coordinator began, with another chain, is not that member."""
    cluster = Cluster(nodes=2, factor=2, shards=1)
    cluster.commit("w")
    copies = cluster.hello("n2")
    sequencer = Sequencer(cluster.map)
    sequencer.shards[0].serve(1, copies[0].chain)
    assert sequencer.link_up("n1", copies) == {}
    other = {0: copies[0]._replace(chain=7)}
    assert sequencer.link_up("n2", other) == {0: "has another history: it differs at number 1 or before"}


def test_committed_ordinal_is_bounded_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops before the first batch with an uncommitted write, goes on after its commit, and what is remembered
    meanwhile does not grow with what other shards commit."""
    monkeypatch.setattr(link_module, "UNCOMMITTED_MAX", 4)
    cluster = Cluster(nodes=3, factor=2, shards=3)
    sequencer = cluster.sequencer
    other = next(s.number for s in sequencer.shards if "n3" not in cluster.map.nodes_of(s.number))
    number = next(s.number for s in sequencer.shards if set(cluster.map.nodes_of(s.number)) == {"n1", "n3"})
    link = sequencer.links["n1"]
    cluster.put("first", other)
    cluster.pump("n1", "n2")
    assert sequencer.committed_ordinal(link) == 1
    cluster.put("stays", number)
    cluster.pump("n1")
    for n in range(50):
        cluster.begin()
        cluster.put(n, other)
        cluster.pump("n1", "n2")
        assert n in cluster.answers.ok
        assert sequencer.committed_ordinal(link) == 1
    assert len(link.uncommitted) <= link_module.UNCOMMITTED_MAX + 4
    cluster.pump("n3")
    assert "stays" in cluster.answers.ok
    assert sequencer.committed_ordinal(link) == link.last_ordinal == 52
    assert not link.uncommitted


def test_purge_follows_a_flag() -> None:
    """A node that flags a shard makes the sequencer purge it, once per interval; nonsense flags are passed over."""
    cluster = Cluster(shards=2)
    cluster.sequencer.shards[1].write(PUT, b"k", (b"v", 5), 2, cluster.answers, "w")
    cluster.pump()
    for flags in ([1], [1, 2, -1, b"x", []]):
        cluster.sequencer.on_results("n1", 1, 1, [], flags)
    cluster.tick(10)
    assert [item[:3] for item in cluster.apply("n2")] == [(PURGE, 1, 2)]
    cluster.pump()
    assert len(cluster.replicas["n1"].tables[1]) == 0
    cluster.sequencer.on_results("n1", 2, 2, [], [1])
    cluster.tick(1)
    assert cluster.apply("n2") == []
    cluster.down("n3")
    cluster.tick(PURGE_INTERVAL_MS)  # a purge is no reason to wait for a missing node
    assert cluster.apply("n2") == [] and cluster.sequencer.waiting_items == 0


def test_many_shards_are_purged_in_turn() -> None:
    """A few in each tick, in the order in which they were told, and none twice before all were."""
    shards = 3 * PURGE_SHARDS_MAX
    cluster = Cluster(shards=shards)
    cluster.sequencer.on_results("n1", 0, 0, [], list(range(shards)))
    turns = []
    for _ in range(3):
        cluster.tick()
        turns.append([item[1] for item in cluster.apply("n2")])
        cluster.pump()
        cluster.sequencer.on_results("n1", sum(map(len, turns)), sum(map(len, turns)), [], list(range(shards)))
    assert [len(turn) for turn in turns] == [PURGE_SHARDS_MAX] * 3
    assert sorted(number for turn in turns for number in turn) == list(range(shards))
    cluster.tick()
    assert cluster.apply("n2") == [], "the interval"


def test_stamps_never_decrease() -> None:
    """A wall clock that jumps back does not take the stamps with it."""
    cluster = Cluster()
    cluster.sequencer.begin(5_000_000, 1)
    cluster.sequencer.begin(4_000_000, 2)
    assert cluster.sequencer.stamp_ms == 5_000_000


def test_stamps_stop_at_the_bound(cluster: Cluster) -> None:
    """R12: time stands still at the bound that is stored, and goes on when the next one is; what a takeover began with
    does not sink to the bound."""
    sequencer = cluster.sequencer
    sequencer.map_changed(replace(cluster.map, stamp_bound_ms=5_000_000))
    sequencer.begin(6_000_000, 1)
    assert sequencer.stamp_ms == 5_000_000
    sequencer.map_changed(cluster.map.with_stamp_bound(7_000_000))
    sequencer.begin(6_000_000, 2)
    assert sequencer.stamp_ms == 6_000_000
    sequencer.map_changed(replace(cluster.map, stamp_bound_ms=5_000_000))
    sequencer.begin(8_000_000, 3)
    assert sequencer.stamp_ms == 6_000_000


def test_time_ends_with_its_coordinator(cluster: Cluster) -> None:
    """The last stamp was told to the store: a bound that is stored after that lets no higher one be given."""
    sequencer = cluster.sequencer
    sequencer.begin(6_000_000, 1)
    assert sequencer.end_time() == 6_000_000
    sequencer.map_changed(cluster.map.with_stamp_bound(7_000_000))
    sequencer.begin(6_500_000, 2)
    assert sequencer.stamp_ms == 6_000_000


def test_unused_delete_is_an_entry(cluster: Cluster) -> None:
    """An operation without effect is numbered, applied everywhere and answered like any other."""
    cluster.write(DELETE, "delete")
    cluster.pump()
    assert cluster.answers.ok == {"delete": False} and cluster.sequencer.shards[0].commit == 1
