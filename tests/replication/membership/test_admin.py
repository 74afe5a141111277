"""Tests of cluster administration: nodes that come and go, placement, destroyed nodes, accepted losses, over real
replicas; what is refused, and requests that cross each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import LINK_GRACE_MS, NODES_MAX, RECOVER_WAIT_MS
from kvtcp.errors import AdminError, Code
from kvtcp.protocol.operations import DONATE, DROP
from kvtcp.replication.membership.admin import Admin
from kvtcp.replication.membership.recovery import DOWN
from tests.support.controller_world import World

Request = Callable[[Admin, Callable[[Any], None]], None]


def ask(world: World, name: str, *args: Any) -> list[Any]:
    """A request; its answer is in the list when there is one."""
    answers: list[Any] = []
    getattr(world.controller.admin, name)(*args, answers.append)
    world.check()
    return answers


def answer(world: World, name: str, *args: Any) -> Any:
    """The answer to a request that is stored at once."""
    answers = ask(world, name, *args)
    world.pump()
    assert len(answers) == 1
    return answers[0]


def refused(world: World, name: str, *args: Any) -> str:
    """Why a request is refused; nothing was proposed."""
    found = ask(world, name, *args)
    assert len(found) == 1 and isinstance(found[0], AdminError) and not world.changes.is_busy
    return str(found[0])


def counts(world: World) -> dict[str, int]:
    """How many shards each node holds."""
    return {node: len(world.map.shards_of(node)) for node in world.map.nodes}


# --- nodes that come --------------------------------------------------------------------------------


def test_a_node_is_added() -> None:
    """It gets the next id, is dialled, and holds nothing before the next rebalance."""
    world = World(3, 3, shards=2)
    assert answer(world, "add_node", "h", 9) == {"node": "n4"}
    assert world.map.nodes["n4"] == ("h", 9) and world.actions == [("add", "n4")]
    assert world.words("node-added") == [{"node": "n4", "address": "h:9"}]
    world.up("n4")
    world.run(1_000)
    assert counts(world)["n4"] == 0 and not world.controller.membership.learners()
    assert answer(world, "add_node", "h", 10) == {"node": "n5"}


def test_a_node_is_added_to_shards_with_too_few_copies() -> None:
    """It is what they were waiting for."""
    world = World(2, 2, shards=2, min_insync=1, writes=1)
    world.down("n2")
    answer(world, "forget", "n2")
    world.run(500)
    assert world.map.wanted == (("n1",), ("n1",)) and "n2" not in world.map.nodes
    assert answer(world, "add_node", "h", 9) == {"node": "n3"}
    world.settled(up="n3")
    assert counts(world) == {"n1": 2, "n3": 2}


def test_nodes_that_are_not_added() -> None:
    """An address that is one already, and one node too many."""
    world = World(3, 3)
    assert refused(world, "add_node", "h", 2) == "h:2 is the address of node n2 already"
    full = World(NODES_MAX, 3, up=False)
    assert refused(full, "add_node", "h", 999) == f"a cluster has at most {NODES_MAX} nodes"


def test_two_nodes_with_one_address() -> None:
    """The second request waits for the first, and is refused when its turn comes."""
    world = World(3, 3)
    world.store.is_held = True
    first, second = ask(world, "add_node", "h", 9), ask(world, "add_node", "h", 9)
    assert first == second == []
    world.release_store()
    assert first == [{"node": "n4"}] and str(second[0]) == "h:9 is the address of node n4 already"
    assert list(world.map.nodes) == ["n1", "n2", "n3", "n4"] and world.actions == [("add", "n4")]


def test_others_that_are_told_of_the_map_with_a_new_node_know_it() -> None:
    """An eviction and the node, wanted at once, are stored by one change: whoever is told first finds the node."""
    world = World(3, 3, shards=2, min_insync=1, writes=1)
    world.down("n3")
    answer(world, "forget", "n3")
    world.store.is_held = True
    world.run(LINK_GRACE_MS)
    added = ask(world, "add_node", "h", 9)
    world.release_store()
    world.run(100)
    assert added == [{"node": "n4"}]
    world.settled(up="n4")
    assert counts(world) == {"n1": 2, "n2": 2, "n4": 2}


# --- nodes that go ----------------------------------------------------------------------------------


def test_a_node_is_drained_and_removed() -> None:
    """Everything moves off it, while it works; then it leaves the cluster, and its id is not given again."""
    world = World(4, 3, shards=4, writes=1)
    held = counts(world)["n2"]
    assert answer(world, "drain", "n2") == {"node": "n2", "shards": held} and held > 0
    assert world.map.draining == ("n2",)
    world.settled()
    assert counts(world) == {"n1": 4, "n2": 0, "n3": 4, "n4": 4} and not world.nodes["n2"].replica.copies
    world.fill(token="after")
    assert answer(world, "remove", "n2") == {"node": "n2"}
    assert "n2" not in world.map.nodes and ("remove", "n2") in world.actions and not world.map.draining
    assert world.words("node-removed") == [{"node": "n2"}]
    assert "n2" not in world.sequencer.links and "n2" not in world.controller.reports
    assert answer(world, "add_node", "h", 2) == {"node": "n5"}
    world.fill(token="last")


def test_a_node_that_is_not_linked_is_removed() -> None:
    """If it holds nothing."""
    world = World(4, 3, wanted=3)
    world.down("n4")
    assert answer(world, "remove", "n4") == {"node": "n4"} and list(world.map.nodes) == ["n1", "n2", "n3"]


def test_a_drain_is_taken_back() -> None:
    """What has moved stays where it is before the next rebalance."""
    world = World(4, 3, shards=4)
    answer(world, "drain", "n2")
    world.settled()
    assert refused(world, "undrain", "n1") == "n1 is not being drained"
    assert answer(world, "undrain", "n2") == {"node": "n2"} and world.map.draining == ()
    world.settled()
    assert counts(world)["n2"] == 0
    answer(world, "rebalance", False)
    world.settled()
    assert set(counts(world).values()) == {3}


@pytest.mark.parametrize("name", ["drain", "undrain", "remove", "forget"])
def test_nodes_that_are_none(name: str) -> None:
    """The sentence says which there are."""
    world = World(2, 2)
    assert refused(world, name, "n9") == "there is no node n9; the nodes are n1, n2"


def test_nodes_that_cannot_be_drained() -> None:
    """There would be too few nodes for all copies."""
    world = World(3, 3)
    assert refused(world, "drain", "n1") == (
        "without n1 there are 2 nodes for a replication factor of 3; add a node first"
    )


def test_nodes_that_cannot_be_removed() -> None:
    """As long as they hold something, shall hold something, or are about to."""
    world = World(4, 3, shards=2, wanted=3, writes=1)
    assert refused(world, "remove", "n1") == "n1 holds 2 shards; drain it first, and wait until it holds none"
    world.nodes["n4"].is_paused = True
    answers = ask(world, "drain", "n3")
    world.pump()
    assert len(answers) == 1 and counts(world)["n4"] == 0
    assert refused(world, "remove", "n4") == "n4 holds 2 shards; drain it first, and wait until it holds none"
    assert refused(world, "remove", "n3") == "n3 holds 2 shards; drain it first, and wait until it holds none"
    world.nodes["n4"].is_paused = False
    while counts(world)["n3"]:
        world.run(50)
    assert world.items("n3", DROP) == []
    assert "n3 holds 2 shards" in refused(world, "remove", "n3"), "it has copies that it was not told to drop yet"
    world.settled()
    assert answer(world, "remove", "n3") == {"node": "n3"}


def test_a_node_that_is_about_to_be_removed_learns_nothing() -> None:
    """Not even as a substitute, which may be any node."""
    world = World(3, 2, wanted=2, writes=1)
    world.down("n2")
    world.run(LINK_GRACE_MS)
    world.store.is_held = True
    removed, forgotten = ask(world, "remove", "n3"), ask(world, "forget", "n2")
    assert "n3" in world.controller.membership.leaving
    world.store.is_held = False
    world.run(1_000)
    assert removed == [{"node": "n3"}] and world.map.nodes.keys() == {"n1", "n2"}
    assert isinstance(forgotten[0], AdminError), "every shard needs two nodes"
    assert "n3" not in world.controller.membership.leaving


def test_a_removal_that_is_refused_when_its_turn_comes() -> None:
    """The node may learn again."""
    world = World(4, 3, wanted=3, writes=1)
    world.store.is_held = True
    rebalanced = ask(world, "drain", "n3")
    removed = ask(world, "remove", "n4")
    world.release_store()
    assert len(rebalanced) == 1 and isinstance(removed[0], AdminError)
    assert "n4" not in world.controller.membership.leaving
    world.settled()
    assert counts(world) == {"n1": 1, "n2": 1, "n3": 0, "n4": 1}


# --- destroyed nodes --------------------------------------------------------------------------------


def test_a_destroyed_node_is_removed_when_nothing_of_it_is_left() -> None:
    """And that it was destroyed is remembered for ever."""
    world = World(4, 3, shards=4, writes=1)
    world.down("n2")
    shards = counts(world)["n2"]
    assert answer(world, "forget", "n2") == {"node": "n2", "shards": shards}
    assert "n2" in world.map.nodes and world.words("node-destroyed") == [{"node": "n2", "shards": shards}]
    world.settled()
    assert world.map.destroyed == ("n2",) and list(world.map.nodes) == ["n1", "n3", "n4"]
    assert ("remove", "n2") in world.actions and counts(world) == {"n1": 4, "n3": 4, "n4": 4}


def test_a_destroyed_node_is_removed_by_itself_and_by_an_operator() -> None:
    """Both at once, whoever is first: it is removed once, and the other one hears that it is gone."""
    world = World(4, 3, wanted=3, writes=1)
    world.down("n4")
    assert answer(world, "forget", "n4")["shards"] == 0
    world.store.is_held = True
    world.tick()
    assert world.changes.is_busy and "n4" in world.controller.membership.leaving
    answers = ask(world, "remove", "n4") + ask(world, "remove", "n4")
    world.controller.membership.leaving.discard("n4")  # as after a request of that kind that was refused
    world.tick()
    world.release_store()
    world.run(200)
    assert "n4" not in world.map.nodes and world.actions.count(("remove", "n4")) == 1
    assert all(isinstance(each, AdminError) for each in answers)


def test_nodes_that_cannot_be_forgotten() -> None:
    """One that answers, and one without which there are too few nodes."""
    world = World(3, 3)
    assert refused(world, "forget", "n3") == "n3 is linked: a node that answers is not destroyed; drain it instead"
    world.down("n2", "n3")
    assert ask(world, "forget", "n3") == []
    world.run(200)
    assert refused(world, "forget", "n2") == "without n2 there are 1 nodes, and every shard needs 2; add a node first"


def test_a_node_comes_while_it_is_declared_destroyed() -> None:
    """The declaration was true when it was made, and there is no way back: its link is closed."""
    world = World(3, 3, writes=1)
    world.down("n3")
    world.store.is_held = True
    answers = ask(world, "forget", "n3")
    world.flush()
    world.up("n3")
    world.pump()
    world.release_store()
    assert len(answers) == 1 and world.closed == [("n3", "it was declared destroyed")]
    world.settled()
    assert list(world.map.nodes) == ["n1", "n2"]


def test_a_node_that_joined_while_it_was_declared_destroyed() -> None:
    """Its join was proposed before the declaration was stored: the node leaves, and then it is removed."""
    world = World(3, 3, writes=1)
    world.down("n3")
    world.run(LINK_GRACE_MS)
    world.fill(token="missed")
    world.store.is_held = True
    answers = ask(world, "forget", "n3")
    world.flush()
    world.up("n3")
    world.pump()
    assert world.members() == ["n1", "n2", "n3"] and world.row() == ["n1", "n2"]
    assert world.sent is not None
    world.settle(world.store.compare_and_set(*world.sent))
    world.tick()
    world.release_store()
    world.settled()
    assert len(answers) == 1 and list(world.map.nodes) == ["n1", "n2"] and world.row() == ["n1", "n2"]


def test_a_destroyed_node_in_a_shard_that_is_not_served() -> None:
    """Its row is changed while the others are made equal; the node leaves the cluster meanwhile."""
    world = World(3, 3, min_insync=2, writes=1)
    world.put("unanswered")
    world.flush()
    world.work("n1")
    world.take_over("n1", "n2")
    answer_ = ask(world, "forget", "n3")
    world.nodes["n2"].is_paused = True
    world.run(3 * RECOVER_WAIT_MS)
    assert len(answer_) == 1 and list(world.map.nodes) == ["n1", "n2"] and not world.shards[0].serving
    world.nodes["n2"].is_paused = False
    world.settled()
    assert world.shards[0].commit == 2


# --- placement --------------------------------------------------------------------------------------


def test_rebalance() -> None:
    """First told only, then done: as few moves as it takes, and the counts differ by at most one."""
    world = World(3, 3, shards=4, writes=1)
    answer(world, "add_node", "h", 9)
    world.up("n4")
    version = world.map.version
    told = answer(world, "rebalance", True)
    assert len(told["moves"]) == 3 and told["left"] == 0 and world.map.version == version
    assert all(to == "n4" and from_ in ("n1", "n2", "n3") for _, from_, to in told["moves"])
    done = answer(world, "rebalance", False)
    assert done["moves"] == told["moves"] and done["left"] > 0
    world.settled()
    assert set(counts(world).values()) == {3}
    world.fill(token="after")
    assert answer(world, "rebalance", False) == {"moves": [], "left": 0}


def test_copies_that_come_in_addition() -> None:
    """A move from nowhere."""
    world = World(
        3, 3, shards=2, min_insync=1, changes=lambda founded: founded.with_wanted([["n1", "n2"], ["n1", "n2"]])
    )
    assert answer(world, "rebalance", True)["moves"] == [[0, "", "n3"], [1, "", "n3"]]


# --- accepted losses --------------------------------------------------------------------------------


def lost(world: World, *nodes: str, up: tuple[str, ...] = ()) -> None:
    """These nodes lose their copies of shard 0 while no coordinator is there; after the takeover it is down."""
    world.down(*world.nodes)
    for node in nodes:
        world.replace(node, 0)
    world.take_over()
    world.up(*(up or tuple(world.nodes)))
    world.run(2 * RECOVER_WAIT_MS)


def test_the_loss_of_a_shard_is_accepted() -> None:
    """It goes on with the best copy there is, with numbers above every number that was ever shown; the others are
    brought to it; then it takes writes."""
    world = World(2, 2, shards=2, writes=1)
    world.fill(token="more")
    lost(world, "n1", "n2")
    assert world.controller.recovery.shards[0].state == DOWN and world.shards[1].serving
    found = answer(world, "accept_loss", 0)
    seq = world.map.stamp_bound_ms * 1_000
    assert found == {"shard": 0, "node": "n1", "seq": 0, "goes_on_at": seq}
    world.settled()
    assert world.words("loss-accepted") == [{"shard": 0}] and world.shards[0].commit == seq
    world.fill(token="after")
    assert world.answers.ok["after", 0] == seq + 1
    world.settled(0)


def test_the_copy_of_the_highest_position_is_taken() -> None:
    """Though it has another disk than the map says; what it has is there again."""
    world = World(2, 2, writes=1)
    world.fill(token="more")
    world.down("n1", "n2")
    world.nodes["n2"].copies = []
    world.nodes["n2"].replica.copies[0].disk = "in doubt"
    world.replace("n1")
    world.take_over("n1", "n2")
    world.run(100)
    assert world.controller.recovery.shards[0].state == DOWN
    assert answer(world, "accept_loss", 0)["node"] == "n2"
    world.settled()
    world.get("read")
    world.pump()
    assert world.answers.ok["read"][:2] == [b"v", 2]


def test_a_copy_of_a_node_that_is_no_member() -> None:
    """It takes the place of a member that is not there."""
    world = World(3, 2, wanted=2, writes=1)
    world.down("n3")
    world.nodes["n3"].replica.copies[0] = world.nodes["n1"].replica.copies[0]
    world.nodes["n3"].stop()
    world.nodes["n3"].copies[0].disk = "of a member once"
    world.nodes["n3"].start()
    lost(world, "n1", up=("n1", "n3"))
    assert world.controller.recovery.shards[0].state == DOWN
    assert answer(world, "accept_loss", 0)["node"] == "n3"
    world.run(3_000)
    assert set(world.row()) == {"n1", "n3"} and world.shards[0].serving
    world.get("read")
    world.pump()
    assert world.answers.ok["read"][0] == b"v"
    world.settled(up="n2")


def test_a_shard_of_which_nothing_is_left_begins_empty() -> None:
    """Its only node was declared destroyed: it begins anew where it is wanted, above every number ever shown; and so
    does one all of whose copies are damaged."""
    world = World(3, 1, shards=3, min_insync=1, writes=1)
    lost(world, "n2", up=("n1", "n3"))
    answer(world, "forget", "n2")
    assert refused(world, "accept_loss", 0) == "shard 0 is not down: nothing is lost"
    assert world.shards[1].reason == "none of its members has its data: n2 was declared destroyed"
    found = answer(world, "accept_loss", 1)
    [wanted] = world.map.wanted[1]
    assert found == {"shard": 1, "node": wanted, "seq": 0, "goes_on_at": world.map.stamp_bound_ms * 1_000}
    world.run(1_000)
    world.fill(token="after")
    assert world.answers.ok["after", 1] == found["goes_on_at"] + 1 and world.row(1) == [wanted]
    assert "n2" not in world.map.nodes, "nothing of it is left in the map"
    world = World(2, 2, writes=1)
    for node in ("n1", "n2"):
        world.nodes[node].replica.copies[0].complete = False
    world.take_over("n1", "n2")
    world.run(100)
    assert answer(world, "accept_loss", 0)["seq"] == 0
    world.settled()
    world.fill(token="after")


def test_a_loss_when_the_link_breaks() -> None:
    """At every moment: before it is frozen, while it is pulled, while the map is changed. It may be accepted again."""
    for moment in ("asked", "pulled", "stored"):
        world = World(3, 2, wanted=2, writes=1)
        lost(world, "n1", "n2", up=("n1", "n2", "n3"))
        world.nodes["n1"].holds_pulls = moment == "pulled"
        world.store.is_held = moment == "stored"
        assert ask(world, "accept_loss", 0)[0]["node"] == "n1"
        if moment != "asked":
            world.pump()
        assert str(ask(world, "accept_loss", 0)[0]) == (
            "the loss of shard 0 is being accepted already" if moment != "nothing" else ""
        )
        world.down("n1")
        if moment != "stored":
            assert world.words("loss-not-accepted") == [{"shard": 0, "reason": "the link to n1 was lost"}]
        world.nodes["n1"].holds_pulls = False
        world.release_store()
        world.run(100)
        world.up("n1")
        world.run(2 * RECOVER_WAIT_MS)
        if moment == "stored":
            assert world.words("loss-accepted") == [{"shard": 0}]
        else:
            assert not world.shards[0].serving
            answer(world, "accept_loss", 0)
        world.settled()


def test_a_loss_on_a_node_that_is_no_member_when_the_link_breaks() -> None:
    """Nothing of it stays behind."""
    world = World(3, 2, wanted=2, writes=1)
    world.down("n3")
    world.nodes["n3"].replica.copies[0] = world.nodes["n1"].replica.copies[0]
    world.nodes["n3"].stop()
    world.nodes["n3"].copies[0].disk = "of a member once"
    world.nodes["n3"].start()
    lost(world, "n1", up=("n1", "n3"))
    assert ask(world, "accept_loss", 0)[0]["node"] == "n3"
    world.down("n3")
    assert not world.shards[0].learners and world.sequencer.links["n3"].shards == []
    world.up("n3")
    world.run(100)
    answer(world, "accept_loss", 0)
    world.run(3_000)
    assert world.shards[0].serving and set(world.row()) == {"n1", "n3"}


def test_a_good_member_comes_back_while_a_loss_is_accepted() -> None:
    """Then nothing is lost: the shard is served with all it had, and the operator is told."""
    world = World(2, 2, writes=1)
    lost(world, "n1", up=("n1",))
    assert world.controller.recovery.shards[0].state == DOWN
    world.nodes["n1"].holds_pulls = True
    answer(world, "accept_loss", 0)
    world.up("n2")
    world.nodes["n1"].holds_pulls = False
    world.settled()
    assert world.words("loss-not-accepted") == [{"shard": 0, "reason": "its shard is recovered anew"}]
    assert world.shards[0].commit == 1 and not world.words("loss-accepted")


def test_a_good_member_comes_back_when_the_loss_is_being_stored() -> None:
    """It is too late: it is brought to the copy that was taken. Numbers are above all it ever showed."""
    world = World(2, 2, writes=1)
    lost(world, "n1", up=("n1",))
    world.store.is_held = True
    answer(world, "accept_loss", 0)
    world.up("n2")
    world.run(500)
    assert not world.shards[0].serving
    world.release_store()
    world.settled()
    assert world.words("loss-accepted") == [{"shard": 0}] and world.shards[0].commit > 10**15


def test_a_transfer_that_fails_is_told() -> None:
    """The shard is down as before."""
    world = World(2, 2, writes=1)
    lost(world, "n1", "n2")
    world.nodes["n1"].holds_pulls = True
    answer(world, "accept_loss", 0)
    world.nodes["n1"].replica.learn_failed(0, "the disk is full")
    world.nodes["n1"].tell_news()
    world.pump()
    assert world.words("loss-not-accepted") == [{"shard": 0, "reason": "the disk is full"}]
    assert world.controller.recovery.shards[0].state == DOWN


def test_members_that_differ_are_a_loss_too() -> None:
    """Nobody can say which of them is right, but the operator can say that one shall be."""
    world = World(2, 2, writes=1)
    world.down("n1", "n2")
    table = world.nodes["n2"].replica.copies[0].table
    table.load([], table.epoch, table.seq, table.chain ^ 1)
    world.take_over("n1", "n2")
    world.run(100)
    assert world.controller.recovery.shards[0].state == DOWN and len(world.words("alarm")) == 1
    assert answer(world, "accept_loss", 0)["node"] == "n1"
    world.events.clear()
    world.settled()
    world.fill(token="after")


def test_a_shard_that_nobody_has_begins_empty() -> None:
    """Its only member was destroyed: as long as that may come back it is waited for, and then it begins anew where it
    is wanted."""
    world = World(3, 1, shards=3, min_insync=1, writes=1)
    [lost_node] = world.row(1)
    world.down(lost_node)
    world.put("pending", 1)
    world.run(2 * RECOVER_WAIT_MS)
    assert refused(world, "accept_loss", 1) == "shard 1 is not down: nothing is lost"
    assert answer(world, "forget", lost_node) == {"node": lost_node, "shards": 1}
    world.run(3 * RECOVER_WAIT_MS)
    assert world.controller.recovery.shards[1].state == DOWN
    others = [node for node in world.nodes if node != lost_node]
    world.down(*others)
    assert refused(world, "accept_loss", 1) == "no node that may hold shard 1 is linked; start one first"
    world.up(*others)
    found = answer(world, "accept_loss", 1)
    assert found["seq"] == 0 and [found["node"]] == list(world.map.wanted[1])
    world.settled()
    assert lost_node not in world.map.nodes
    world.fill(token="after")


def test_losses_that_are_none() -> None:
    """A shard that is not, that is served, that has a good copy, that nobody has a copy of, that was stopped."""
    world = World(2, 2, writes=1)
    assert refused(world, "accept_loss", 7) == "there is no shard 7; the last one is 0"
    assert refused(world, "accept_loss", -1) == "there is no shard -1; the last one is 0"
    assert refused(world, "accept_loss", 0) == "shard 0 is not down: nothing is lost"
    world.sequencer.stop_serving(0, "its members differ")
    assert refused(world, "accept_loss", 0) == (
        "shard 0 was stopped in this run: restart the coordinator, which looks at it anew"
    )
    world = World(2, 2, writes=1)
    lost(world, up=("n1",))
    assert refused(world, "accept_loss", 0) == (
        "shard 0 has a good copy on n1: n2 may have writes that the others lack, or not: it is waited for, as 2 of its "
        "members are the fewest allowed; if a node will never come back, say so with: node forget ID destroyed"
    )
    world = World(2, 2, writes=1)
    lost(world, "n1", up=("n1",))
    world.nodes["n1"].replica.copies[0].complete = False
    world.down("n1")
    world.up("n1")
    world.run(2 * RECOVER_WAIT_MS)
    assert refused(world, "accept_loss", 0) == (
        "no linked node has a complete copy of shard 0, n2 may have one: start it, or, if it will never come back, say "
        "so with: node forget ID destroyed"
    )
    world.get("refused")
    assert world.answers.failed["refused"][0] == Code.SHARD_DOWN and world.items("n1", DONATE) == []


def test_a_request_waits_for_the_store() -> None:
    """It is answered when its change is stored, in order with the others."""
    world = World(4, 3, wanted=3)
    world.store.is_held = True
    answers: list[Any] = []
    world.controller.admin.drain("n3", lambda answer: answers.append(("drain", answer)))
    world.controller.admin.undrain("n3", lambda answer: answers.append(("undrain", answer)))
    assert [name for name, _ in answers] == ["undrain"], "it looks at what is stored"
    world.release_store()
    assert [name for name, _ in answers] == ["undrain", "drain"]
    assert isinstance(ClusterMap.from_json(world.store.value), ClusterMap) and world.map.draining == ("n3",)
