"""Tests of members: who gets what and counts for what when members and learners come and go, and whose results are
asked for. Over real replicas; what is stored in the map is said by hand, or by a whole controller."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import LINK_GRACE_MS, WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.node import write_results
from kvtcp.protocol import operations as op
from kvtcp.replication.sequencing import shard as shard_module
from kvtcp.replication.sequencing.link import Batch, Link
from kvtcp.replication.sequencing.multi_read import count_read
from tests.support.controller_world import World
from tests.support.replication_fakes import Cluster, wire


def leave(cluster: Cluster, node: str, *numbers: int) -> None:
    """The map names this node no more in these shards."""
    shards = [cluster.sequencer.shards[number] for number in numbers or (0,)]
    cluster.sequencer.leave(shards, cluster.sequencer.links[node])
    cluster.sequencer.check()


def lose(cluster: Cluster, node: str) -> None:
    """The link of a node is lost, and the map names it no more."""
    cluster.down(node)
    leave(cluster, node)


def learning(world: World, node: str = "n3") -> None:
    """A node learns the shards, and its learner stays where its copy is frozen: it is live when it is let go."""
    for each in world.nodes.values():
        each.backlog.forget(0)
    world.nodes[node].holds_pulls = True
    world.replace(node)
    world.run(LINK_GRACE_MS)
    assert node not in world.row()
    world.up(node)
    world.pump()
    assert world.shards[0].learners and not world.changes.is_busy


# --- leaving ----------------------------------------------------------------------------------------


def test_a_member_that_leaves_is_not_waited_for() -> None:
    """R2: what the others acknowledged is committed in that step, and what waited for it goes on; other shards keep
    it."""
    cluster = Cluster(shards=2)
    cluster.put("pending")
    cluster.get("held")
    cluster.apply("n3")
    cluster.put("kept", 1)
    cluster.pump("n1", "n2")
    cluster.down("n3")
    cluster.put("waiting")
    cluster.sequencer.multi_read(count_read([0, 1], b"", None, cluster.answers, "count"))
    cluster.put("other", 1)
    cluster.pump("n1", "n2")
    assert cluster.answers.ok.keys() <= {"held"}
    leave(cluster, "n3")
    cluster.pump("n1", "n2")
    assert cluster.answers.ok.keys() == {"pending", "held", "waiting"}
    shard, other = cluster.sequencer.shards
    assert [link.node for link in shard.members] == ["n1", "n2"] and shard.writable
    assert len(other.members) == 3 and not other.writable and other.waiting
    assert cluster.sequencer.links["n3"].shards == [other]
    assert cluster.up("n3") is None
    assert [item[:3] for item in cluster.apply("n3")] == [(op.PUT, 1, 1), (op.PUT, 1, 2)], "nothing of what it left"


def test_much_that_waited_goes_on_when_a_member_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns, all of it, in its order."""
    monkeypatch.setattr(shard_module, "DRAIN_SLICE", 2)
    cluster = Cluster(shards=1)
    cluster.down("n3")
    for n in range(7):
        cluster.put(n)
    leave(cluster, "n3")
    cluster.pump()
    assert cluster.answers.ok == {n: n + 1 for n in range(7)} and cluster.sequencer.waiting_items == 0


def test_a_member_that_leaves_while_its_link_is_up() -> None:
    """What is on the link arrives and counts for nothing; when the link is lost nothing of it is kept."""
    cluster = Cluster(shards=2)
    cluster.put("one")
    cluster.put("other", 1)
    cluster.apply("n3")
    cluster.pump("n1", "n2")
    leave(cluster, "n3")
    assert cluster.answers.ok == {"one": 1}
    cluster.put("two")
    assert [item for item in cluster.apply("n3") if item[1] == 0] == []
    cluster.results("n3")
    assert cluster.answers.ok == {"one": 1, "other": 1}
    cluster.put("three", 1)
    cluster.down("n3")
    assert cluster.up("n3") is None
    assert [item[:3] for item in cluster.apply("n3")] == [(op.PUT, 1, 2)]


def test_what_is_on_the_link_of_one_that_left_is_not_sent_again() -> None:
    """It left, then its link was lost with writes on it: the node may have them."""
    cluster = Cluster(shards=2)
    cluster.put("one")
    cluster.put("other", 1)
    cluster.apply("n3")
    leave(cluster, "n3")
    cluster.down("n3")
    cluster.new_process("n3")
    assert cluster.up("n3") is None
    assert [item[:3] for item in cluster.apply("n3")] == [(op.PUT, 1, 1)]


def test_a_bad_member_that_leaves(cluster: Cluster) -> None:
    """Its mark and what was kept for it go with it."""
    cluster.put("one")
    cluster.pump("n1", "n2")
    cluster.down("n3")
    cluster.new_process("n3", "another")
    assert cluster.up("n3") is not None
    leave(cluster, "n3")
    assert cluster.answers.ok == {"one": 1} and not cluster.sequencer.shards[0].bad
    assert not any(link.resend for link in cluster.sequencer.links.values())


def test_two_bad_members_of_which_one_can_leave() -> None:
    """When it has, the other one has to stay: what reads saw is refused then, and what is pending is UNKNOWN."""
    cluster = Cluster(shards=1, min_insync=2)
    cluster.put("pending")
    cluster.get("held")
    cluster.pump("n1")
    for node in ("n2", "n3"):
        cluster.down(node)
        cluster.new_process(node, "another")
        assert cluster.up(node) is not None
    assert not cluster.answers.failed
    leave(cluster, "n3")
    shard = cluster.sequencer.shards[0]
    assert shard.blocked_reason == "n2 came back without its data"
    assert cluster.answers.failed["held"][0] == Code.NOT_ENOUGH_REPLICAS
    assert cluster.answers.failed["pending"][0] == Code.UNKNOWN


# --- results ----------------------------------------------------------------------------------------


def answering(**options: Any) -> tuple[Cluster, str]:
    """A write whose answering member, the second result, applied it and said nothing yet."""
    cluster = Cluster(shards=1, **options)
    cluster.write(op.INCR, "write", key=b"n", args=(5,))
    first = cluster.sequencer.shards[0].members[0].node
    cluster.apply(first)
    return cluster, first


def test_commit_before_the_result() -> None:
    """The answering member leaves and is lost: the write is committed, and answered when another one was asked."""
    cluster, first = answering()
    others = [node for node in cluster.replicas if node != first]
    cluster.pump(*others)
    leave(cluster, first)
    assert cluster.sequencer.shards[0].commit == 1 and "write" not in cluster.answers
    cluster.down(first)
    asked = [node for node in others if [item[0] for item in cluster.apply(node)] == [op.RESULTS_OF]]
    assert len(asked) == 1
    cluster.results(asked[0])
    assert cluster.answers.ok == {"write": 5}


def test_the_result_before_the_commit() -> None:
    """Another member was asked, and the entry is committed later: the answer waits for that."""
    cluster, first = answering()
    slow, quick = (node for node in cluster.replicas if node != first)
    lose(cluster, first)
    asked = cluster.sequencer.shards[0].good[0].node
    assert asked == slow
    cluster.apply(asked)
    cluster.results(asked, durable=False)
    assert "write" not in cluster.answers and cluster.sequencer.shards[0].commit == 0
    cluster.pump(quick)
    cluster.results(asked)
    assert cluster.answers.ok == {"write": 5}


def test_errors_are_handed_over_too(cluster: Cluster) -> None:
    """The result may be one."""
    cluster.write(op.ADD, "first", key=b"n", args=(b"v",))
    cluster.pump()
    first = cluster.sequencer.shards[0].members[0].node
    cluster.write(op.ADD, "write", key=b"n", args=(b"v",))
    cluster.apply(first)
    lose(cluster, first)
    cluster.pump()
    assert cluster.answers.failed["write"][0] == Code.EXISTS and cluster.answers.failed["write"][2] == {"rev": 1}


def test_results_of_transactions_are_handed_over() -> None:
    """Cells, errors, values and nil, as the lost member would have told them."""
    cluster, first = answering()
    ops = [[op.INCR, b"n", 1], [op.ADD, b"n", b"x"], [op.GET, b"n"], [op.EXISTS, b"x"]]
    cluster.write(op.TRANSACTION, "all", key=b"n", args=([[b"n", 1]], ops))
    cluster.write(op.TRANSACTION, "watched", key=b"n", args=([[b"n", 1]], ops))
    cluster.write(op.STORE, "store", key=b"n", args=(b"v", 1, 0, 0, None, True))
    cluster.apply(first)
    others = [node for node in cluster.replicas if node != first]
    cluster.pump(*others)
    lose(cluster, first)
    cluster.pump(*others)
    results = wire(cluster.answers.ok.pop("all"))
    assert (results[0], results[1][0], results[2:]) == (6, Code.EXISTS, [[b"6", 2, None], False])
    assert cluster.answers.ok == {"write": 5, "watched": None, "store": b"6"}


def test_large_results_are_handed_over_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is UNKNOWN because all of them together are too much for a frame."""
    monkeypatch.setattr(write_results, "RESULTS_BYTES_MAX", 100)
    cluster, first = answering()
    for number in range(9):
        cluster.write(op.STORE, number, key=b"n", args=(b"%d" % number * 60, 1, 0, 0, None, True))
    cluster.apply(first)
    others = [node for node in cluster.replicas if node != first]
    cluster.pump(*others)
    lose(cluster, first)
    asked = 0
    while len(cluster.answers.ok) < 10:
        asked += 1
        assert asked < 10 and not cluster.answers.failed
        cluster.pump(*others)
    expected: dict[Any, Any] = {number: b"%d" % (number - 1) * 60 for number in range(1, 9)}
    assert cluster.answers.ok == {"write": 5, 0: b"5", **expected} and asked >= 4


def test_the_member_that_was_asked_is_lost_too() -> None:
    """Then the next one is, and one that cannot be asked is waited for."""
    cluster, first = answering()
    second, third = (node for node in cluster.replicas if node != first)
    lose(cluster, first)
    cluster.apply(second)
    cluster.down(second)
    cluster.apply(third)
    cluster.down(third)
    assert "write" not in cluster.answers and cluster.sequencer.shards[0].orphans
    for node in (second, third):
        assert cluster.up(node) is None
    cluster.pump()
    assert cluster.answers.ok == {"write": 5}


@pytest.mark.parametrize("forgetful", [1, 2])
def test_members_that_do_not_know(forgetful: int) -> None:
    """A member that was restarted knows no results: the next one is asked, and only if nobody knows it is UNKNOWN."""
    cluster, first = answering()
    others = [node for node in cluster.replicas if node != first]
    cluster.pump(*others)
    for node in others[:forgetful]:
        cluster.replicas[node]._results.forget(0)
    lose(cluster, first)
    cluster.pump(*others)
    cluster.pump(*others)
    if forgetful == 1:
        assert cluster.answers.ok == {"write": 5}
    else:
        assert cluster.answers.failed["write"][0] == Code.UNKNOWN and cluster.sequencer.unknown == 1


def test_some_results_are_known_and_some_are_not() -> None:
    """Each write is answered by itself."""
    cluster, first = answering()
    cluster.write(op.INCR, "later", key=b"n", args=(1,))
    cluster.apply(first)
    others = [node for node in cluster.replicas if node != first]
    cluster.pump(*others)
    for node in others:
        cluster.replicas[node]._results.commit({0: 1})
    lose(cluster, first)
    cluster.pump(*others)
    cluster.pump(*others)
    assert cluster.answers.ok == {"later": 6} and cluster.answers.failed["write"][0] == Code.UNKNOWN


def test_the_answering_member_comes_back_in_time() -> None:
    """It did not leave, and the same process is asked: it knows what it came to."""
    cluster, first = answering(nodes=2, factor=2)
    cluster.down(first)
    assert cluster.up(first) is None
    assert [item[0] for item in cluster.apply(cluster.sequencer.shards[0].good[0].node)][-1] == op.RESULTS_OF
    cluster.pump()
    assert cluster.answers.ok == {"write": 5}


def test_a_result_that_was_here_is_not_asked_for(cluster: Cluster) -> None:
    """Nor one of a write that nobody waits for any more."""
    first = cluster.sequencer.shards[0].members[0].node
    cluster.write(op.INCR, "known", key=b"n", args=(5,))
    cluster.apply(first)
    cluster.results(first, durable=False)
    cluster.put("put")
    cluster.apply(first)
    lose(cluster, first)
    assert all(item[0] != op.RESULTS_OF for node in cluster.replicas for item in cluster.apply(node))
    cluster.pump()
    for node in cluster.replicas:
        if node != first:
            cluster.results(node)
    assert cluster.answers.ok == {"known": 5, "put": 2}


def test_a_result_that_comes_when_nobody_waits_any_more() -> None:
    """The shard was stopped meanwhile, and the write is UNKNOWN, committed or not: nothing more comes of it."""
    cluster, first = answering()
    lose(cluster, first)
    cluster.sequencer.stop_serving(0, "a test")
    assert cluster.answers.failed["write"][0] == Code.UNKNOWN
    cluster.pump()
    assert not cluster.answers.ok
    cluster, first = answering()
    cluster.down(first)
    cluster.sequencer.stop_serving(0, "a test")
    assert cluster.up(first) is None
    cluster.pump()
    assert cluster.answers.failed["write"][0] == Code.UNKNOWN and not cluster.answers.ok
    cluster, first = answering()
    cluster.pump(*(node for node in cluster.replicas if node != first))
    lose(cluster, first)
    cluster.sequencer.stop_serving(0, "a test")
    cluster.pump()
    assert cluster.answers.failed["write"][0] == Code.UNKNOWN and not cluster.answers.ok


def test_nothing_is_told_committed_whose_result_is_still_asked_for() -> None:
    """The nodes would forget it; what is behind it waits too, and is told when it is answered."""
    cluster, first = answering()
    others = [node for node in cluster.replicas if node != first]
    cluster.pump(*others)
    leave(cluster, first)
    cluster.put("next")
    cluster.pump(*others)
    link = cluster.sequencer.links[others[0]]
    assert cluster.sequencer.shards[0].commit == 2 and cluster.sequencer.committed_ordinal(link) == 0
    cluster.results(first)
    assert cluster.answers.ok == {"next": 2, "write": 5}
    assert cluster.sequencer.committed_ordinal(link) == link.written_ordinal == 2


# --- learners ---------------------------------------------------------------------------------------


def test_a_learner_gets_every_write_from_its_item_on(world: World) -> None:
    """In order, never the bit to answer, and it counts for nothing before it joined."""
    world.commit("before")
    learning(world)
    world.put("put")
    world.write(op.INCR, "incr", key=b"n", args=(1,))
    world.pump()
    assert world.answers.ok.keys() == {"before", "put", "incr"} and world.members() == ["n1", "n2"]
    items = [item[:4] for item in world.items("n3", op.PUT, op.INCR) if item[2] > 1]
    assert items == [[op.PUT, 0, 2, 0], [op.INCR, 0, 3, 0]]
    assert world.items("n3", op.LEARN)[-1][:4] == [op.LEARN, 0, 1, 1]
    world.nodes["n3"].pull()
    world.pump()
    assert world.members() == world.row() == ["n1", "n2", "n3"]
    world.assert_equal()


def test_a_learner_that_is_lost_gets_nothing_more(world: World) -> None:
    """Nothing that was on its link is sent again when it is back, and the shard goes on."""
    learning(world)
    world.commit("buffered")
    world.put("on its way")
    world.flush()
    world.down("n3")
    assert not world.shards[0].learners and world.shards[0].writable
    world.nodes["n3"].frames.clear()
    world.up("n3")
    world.pump()
    assert [item for item in world.items("n3", op.PUT) if item[2] < 3] == []
    world.nodes["n3"].holds_pulls = False
    world.run(1_000)
    world.assert_equal()
    assert world.row() == ["n1", "n2", "n3"]


def test_a_learner_that_is_detached_is_told_so_behind_its_writes(world: World) -> None:
    """The node passes over what was on its way."""
    learning(world)
    world.put("buffered")
    [learner] = world.controller.membership.learners_of(0)
    learner.fail("a test")
    world.check()
    world.commit("not for it")
    assert [item[:3] for item in world.items("n3", op.PUT, op.UNLEARN)][-2:] == [[op.PUT, 0, 1], [op.UNLEARN, 0]]


def test_a_learner_whose_window_is_full_holds_writes_back(world: World) -> None:
    """As a member does; they go on when it is detached."""
    learning(world)
    world.sequencer.links["n3"].full = True
    for shard in world.shards:
        shard.update_writable()
    world.put("waits")
    world.pump("n1", "n2")
    assert "waits" not in world.answers
    [learner] = world.controller.membership.learners_of(0)
    learner.fail("a test")
    world.pump("n1", "n2")
    assert world.answers.ok == {"waits": 1}


def test_a_member_from_the_step_on_in_which_it_joins(world: World) -> None:
    """R2: from then on a commit needs it, though the map does not name it yet."""
    learning(world)
    world.store.is_held = True
    world.nodes["n3"].holds_pulls = False
    world.pump()
    assert world.members() == ["n1", "n2", "n3"] and world.row() == ["n1", "n2"]
    world.put("waits for it")
    world.pump("n1", "n2")
    assert "waits for it" not in world.answers
    world.pump()
    assert world.answers.ok == {"waits for it": 1}
    world.release_store()
    assert world.row() == ["n1", "n2", "n3"]


@pytest.mark.parametrize("stored", ["before it is back", "after it is back"])
@pytest.mark.parametrize("wiped", [False, True])
def test_one_that_joined_is_lost_before_the_map_says_so(world: World, stored: str, wiped: bool) -> None:
    """It is one of E, and judged by the disk that it joined with, whatever is stored."""
    world.commit("before")
    learning(world)
    world.store.is_held = True
    world.nodes["n3"].holds_pulls = False
    world.pump()
    world.put("pending")
    world.pump("n1", "n2")
    if wiped:
        world.replace("n3")
    else:
        world.down("n3")
    world.put("waiting")
    if stored == "before it is back":
        world.release_store()
    world.up("n3")
    assert bool(world.shards[0].bad) is wiped
    world.release_store()
    world.run(3_000)
    assert world.answers.ok.keys() == {"before", "pending", "waiting"}
    assert world.row() == ["n1", "n2", "n3"]
    world.assert_equal()


def test_one_that_joined_stays_away_after_the_map_says_so(world: World) -> None:
    """It is let go like any other."""
    learning(world)
    world.store.is_held = True
    world.nodes["n3"].holds_pulls = False
    world.pump()
    world.down("n3")
    world.put("waits")
    world.run(2 * LINK_GRACE_MS)
    assert world.members() == ["n1", "n2", "n3"] and "waits" not in world.answers
    world.release_store()
    world.run(2 * LINK_GRACE_MS)
    assert world.row() == world.members() == ["n1", "n2"] and world.answers.ok == {"waits": 1}


def test_members_of_a_shard_in_service(cluster: Cluster) -> None:
    """They come and go one by one; only of one that is not served they can be set."""
    with pytest.raises(AssertionError, match="come and go one by one"):
        cluster.sequencer.set_members(0, ["n1"])
    cluster.sequencer.stop_serving(0, "a test")
    cluster.sequencer.set_members(0, ["n2"])
    cluster.sequencer.check()
    assert [len(cluster.sequencer.links[node].shards) for node in ("n1", "n2", "n3")] == [0, 1, 0]
    cluster.sequencer.set_members(0, ["n3", "n2"])
    assert [len(cluster.sequencer.links[node].shards) for node in ("n1", "n2", "n3")] == [0, 1, 1]


def test_links_of_nodes_that_come_and_go(cluster: Cluster) -> None:
    """One that is removed holds nothing."""
    link = cluster.sequencer.add_link("n4")
    assert isinstance(link, Link) and cluster.sequencer.links["n4"] is link
    cluster.sequencer.remove_link("n4")
    assert "n4" not in cluster.sequencer.links
    with pytest.raises(AssertionError, match="a node that is removed holds nothing"):
        cluster.sequencer.remove_link("n3")


def test_parts_of_kept_batches() -> None:
    """Items with their answers, of some shards or of the others, up to a number."""
    batch = Batch(7)
    ops: list[list[Any]] = [[0, n] for n in range(2)]
    batch.items = [(op.PUT, 0, 1, 0), (op.DELETE, 1, 1, 1), (op.DELETE, 0, 2, 1), (op.PUT, 1, 2, 0)]
    batch.answers = list(ops)
    batch.bytes = 99
    part = batch.part(lambda number, seq: number == 1)
    assert (part.stamp_ms, part.items, part.answers) == (7, [batch.items[1], batch.items[3]], [ops[0]])
    assert part.last_seqs == {1: 2} and part.bytes == 99
    rest = batch.part(lambda number, seq: number != 1)
    assert rest.items == [batch.items[0], batch.items[2]] and rest.answers == [ops[1]]
    assert batch.part(lambda number, seq: seq > 1).items == batch.items[2:]


def test_writes_that_wait_for_a_member_in_doubt_are_refused_in_time() -> None:
    """Nobody replaced it: R4."""
    world = World(2, 2)
    world.commit("before")
    world.replace("n2", 0)
    world.nodes["n2"].holds_pulls = True
    world.nodes["n1"].backlog.forget(0)
    world.up("n2")
    world.put("waits")
    world.run(WRITE_WAIT_MS - 50)
    assert "waits" not in world.answers
    world.run(50)
    code, text, _ = world.answers.failed["waits"]
    assert code == Code.NOT_ENOUGH_REPLICAS
    assert text == "shard 0 takes no writes: n2 came back without its data; nothing was executed"
