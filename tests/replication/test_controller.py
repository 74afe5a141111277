"""Tests of the controller: the whole core over real replicas. Founding and takeovers, links that break in every state
of a recovery, frames that are for nobody, what the shell is told."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.store import Outcome
from kvtcp.constants import AUDIT_INTERVAL_MS, EVICT_AFTER_MS, LINK_GRACE_MS, RECOVER_WAIT_MS
from kvtcp.errors import Code
from kvtcp.protocol import link as wire
from kvtcp.protocol.operations import AUDIT, INCR, LEARN, UNLEARN
from kvtcp.replication.membership import recovery
from kvtcp.replication.membership.recovery import CHANGING, DOWN, REPAIRING, SHIPPING, WAITING, StaleStore
from kvtcp.replication.sequencing.link import LinkError
from tests.support.controller_walk import walk
from tests.support.controller_world import Node, World

WALKS = 40


def state(world: World, number: int = 0) -> str:
    """Of a shard that is not served."""
    return world.controller.recovery.shards[number].state


def behind(world: World, node: str, writes: int = 3) -> None:
    """All members but this one get so many writes, which nobody was answered about; then all links are lost."""
    for number in range(writes):
        world.put(("unanswered", number), key=b"%d" % number)
    world.flush()
    others = [each for each in world.nodes if each != node]
    world.work(*others)
    world.down(*world.nodes)


# --- the first start, and the next ones -------------------------------------------------------------


def test_the_first_start() -> None:
    """The disks of all copies go into the map, then the shards are served, and the core is ready."""
    world = World(3, 2, shards=3, up=False)
    world.up("n1", "n2")
    world.pump()
    assert not world.controller.recovery.is_settled
    assert [shard.serving for shard in world.shards] == [True, False, False]
    world.up("n3")
    world.run(100)
    assert world.controller.recovery.is_settled and all(shard.writable for shard in world.shards)
    assert all(disk for row in world.map.members for _, disk in row)
    world.commit("first")
    assert world.answers.ok == {"first": 1}
    assert {word for word, _ in world.events} == {"link-up", "ready"}


def test_a_takeover(world: World) -> None:
    """The next coordinator goes on with the numbers, with a higher epoch, and with time where the store says; entries
    that not all members have are shipped to those that lack them."""
    world.commit("answered")
    behind(world, "n2")
    world.take_over()
    assert world.sequencer.stamp_ms == world.map.stamp_bound_ms
    world.up("n1", "n2", "n3")
    assert state(world) == SHIPPING
    world.pump()
    world.assert_equal()
    assert world.shards[0].commit == 4 and world.map.epoch == 3
    world.get("read", key=b"2")
    world.pump()
    assert world.answers.ok["read"] == [b"v", 4, None]


def test_hello_says_what_the_node_has_to_know() -> None:
    """Numbers of links grow; the version that the node is known to have stored comes back to it with the map."""
    world = World(2, 1, shards=3, min_insync=1)
    kind, fields = world.controller.hello("n2", "s")
    assert kind == wire.HELLO and fields == {
        "version": wire.LINK_VERSION, "secret": "s", "durability": "sync", "cluster": "c", "epoch": 2,
        "coordinator": "o2", "link": 2, "node": "n2", "map_version": world.map.version,
        "heard_version": world.map.heard["n2"], "map": world.map.to_json(), "shards": [1],
    }  # fmt: skip
    assert world.controller.hello("n2", "s")[1]["link"] == 3 and fields["heard_version"] == 2


def test_a_node_that_knows_a_newer_map() -> None:
    """The store is an older copy, or lost: nothing goes on, and nothing was changed. With a later HELLO the node may
    know what this coordinator itself told it."""
    world = World(2, 2, up=False)
    controller = world.controller

    def report(version: int) -> wire.Report:
        return wire.Report("n1", 1, "sync", 0, 2, version, 0, {0: wire.CopyReport("n1-1")})

    controller.hello("n1", "s")
    with pytest.raises(StaleStore, match="n1 has seen version 2 of the cluster map, the config store has version 1"):
        controller.node_up("n1", report(2))
    world.check()
    assert not controller.reports and not controller.outbox.take_events()
    controller.hello("n1", "s")
    controller.node_up("n1", report(2))
    assert controller.reports.keys() == {"n1"}
    world.down("n1")
    controller.hello("n1", "s")
    with pytest.raises(StaleStore, match="n1 has seen version 3 of the cluster map, the config store has version 2"):
        controller.node_up("n1", report(3))


def test_a_node_that_is_none_of_the_cluster_any_more() -> None:
    """Its link is closed; no batch goes to it."""
    world = World(3, 2, wanted=2)
    world.down("n3")
    world.controller.hello("n3", "s")
    removed: list[Any] = []
    world.controller.admin.remove("n3", removed.append)
    world.pump("n1", "n2")
    assert removed == [{"node": "n3"}]
    world.controller.node_up("n3", wire.Report("n3", 1, "sync", 0, 2, 0, 0, {}))
    assert world.controller.outbox.take_actions() == [("close", "n3", "it was removed from the cluster")]
    world.controller.node_down("n3", "closed")
    world.check()


def test_a_destroyed_node_that_comes_back() -> None:
    """R9: its copies count as fenced for ever, so it is not let in again."""
    world = World(3, 3, min_insync=1)
    world.commit("before")
    world.down("n3")
    world.controller.admin.forget("n3", lambda answer: None)
    world.flush()
    world.up("n3")
    assert world.closed == [("n3", "it was declared destroyed")] and "n3" not in world.controller.reports
    world.run(LINK_GRACE_MS)
    assert world.row() == ["n1", "n2"] and "n3" not in world.map.nodes


def test_why_a_node_is_not_linked_is_known() -> None:
    """Also of one that was never linked."""
    world = World(2, 2, up=False)
    world.controller.node_down("n1", "connection refused")
    world.controller.node_down("n9", "not known")
    assert world.sequencer.links["n1"].reason == "connection refused" and not world.controller.outbox.actions


# --- recovery over real replicas --------------------------------------------------------------------


def test_silent_members_are_removed(world: World) -> None:
    """As far as enough stay; the shard is served by the others."""
    world.commit("answered")
    world.take_over("n1", "n2")
    world.run(RECOVER_WAIT_MS)
    assert world.row() == world.members() == ["n1", "n2"] and world.shards[0].writable
    world.tick()
    assert world.words("left-in-sync") == [
        {"node": "n3", "shards": 1, "first": 0, "reason": "it did not report in time"}
    ]
    assert world.controller.membership.evictions == 1
    assert world.commit("more") == 2
    world.up("n3")
    world.run(1_000)
    assert world.row() == ["n1", "n2", "n3"]
    world.assert_equal()


def test_a_shard_below_min_insync_is_down_and_retried() -> None:
    """It says why, once; it is served when the node is back."""
    world = World(2, 2)
    world.commit("answered")
    world.take_over("n1")
    world.run(2 * RECOVER_WAIT_MS)
    assert state(world) == DOWN and world.controller.recovery.is_settled
    [event] = world.words("shard-down")
    assert event["shard"] == 0 and "n2 may have writes that the others lack" in event["reason"]
    world.get("refused")
    assert world.answers.failed["refused"][0] == Code.SHARD_DOWN
    assert world.answers.failed["refused"][1] == f"shard 0 is down: {event['reason']}"
    world.down("n1")
    world.up("n1")
    world.run(2 * RECOVER_WAIT_MS)
    assert len(world.words("shard-down")) == 1
    world.up("n2")
    world.pump()
    assert world.shards[0].writable and world.controller.check() is None


def test_a_bad_member_that_has_to_stay_is_replaced_in_its_place() -> None:
    """R9: brought whole to the best, it enters the map under its new disk; only then the shard is served."""
    world = World(2, 2)
    world.commit("answered")
    world.replace("n2")
    world.take_over()
    world.store.is_held = True
    world.up("n1", "n2")
    world.pump()
    assert state(world) == REPAIRING and world.controller.recovery.is_settled and not world.shards[0].serving
    assert world.shards[0].reason == "n2 came back without its data: it is being replaced"
    assert world.map.members[0] == (("n1", "n1-1"), ("n2", "n2-1")), "nothing is stored yet"
    world.get("too early")
    assert world.answers.failed["too early"][0] == Code.SHARD_DOWN
    world.release_store()
    world.pump()
    assert world.map.members[0] == (("n1", "n1-1"), ("n2", "n2-2"))
    assert world.shards[0].commit == 1
    world.commit("more")
    world.assert_equal()


def test_two_bad_members_are_replaced_one_after_the_other() -> None:
    """And the shard is served after the second."""
    world = World(3, 3, min_insync=3)
    world.commit("answered")
    world.replace("n1")
    world.replace("n3")
    world.take_over("n1", "n2", "n3")
    world.run(500)
    assert len(world.words("joined-in-sync")) == 2
    world.assert_equal()
    assert world.row() == ["n1", "n2", "n3"] and world.shards[0].commit == 1


def test_a_member_that_is_behind_and_cannot_be_shipped_to_is_replaced() -> None:
    """The others do not have the entries any more: it is bad, and has to stay."""
    world = World(2, 2)
    behind(world, "n2")
    for name in world.nodes:
        world.nodes[name].backlog.forget(0)
    world.take_over("n1", "n2")
    world.run(500)
    assert world.shards[0].commit == 3
    assert world.map.replica_id_of(0, "n2") != "n2-1"
    world.assert_equal()


def test_a_destroyed_member_is_substituted() -> None:
    """R9: by a node that holds nothing; then the shard is served."""
    world = World(3, 2, wanted=2)
    world.commit("answered")
    world.take_over("n1", "n3")
    world.run(RECOVER_WAIT_MS)
    assert state(world) == DOWN
    answers: list[Any] = []
    world.controller.admin.forget("n2", answers.append)
    world.run(500)
    assert answers == [{"node": "n2", "shards": 1}]
    assert world.row() == ["n1", "n3"] and world.shards[0].commit == 1
    world.assert_equal()
    assert "n2" not in world.map.nodes and world.map.destroyed == ("n2",)
    assert ("remove", "n2") in world.actions


def test_a_destroyed_member_waits_for_a_node_that_can_take_its_place() -> None:
    """None is there: the shard is not served, and goes on as soon as one is."""
    world = World(3, 2, wanted=2)
    world.take_over("n1")
    world.controller.admin.forget("n2", lambda answer: None)
    world.run(2 * RECOVER_WAIT_MS)
    assert state(world) == REPAIRING and not world.shards[0].serving
    world.up("n3")
    world.run(200)
    assert world.row() == ["n1", "n3"]
    world.assert_equal()


def test_all_copies_in_memory_are_lost_while_the_coordinator_runs() -> None:
    """The shard begins anew, and nobody waits for what was there. Its numbers go on: who read one that is gone does not
    take another value for it."""
    world = World(2, 2, durability="memory")
    world.fill(3)
    world.replace("n1")
    world.replace("n2")
    world.up("n1", "n2")
    world.run(2_000)
    assert len(world.words("began-empty")) == 1
    world.get("read")
    assert world.commit("new") == 5 and world.answers.ok["read"] is None
    world.assert_equal()


def test_all_copies_are_lost_while_the_coordinator_runs() -> None:
    """The shard is down, and an operator may accept that."""
    world = World(2, 2)
    world.commit("gone")
    world.replace("n1")
    world.put("pending")
    world.replace("n2")
    world.up("n1", "n2")
    world.run(2_000)
    assert state(world) == DOWN and len(world.words("shard-down")) == 1
    world.get("read")
    world.pump()
    assert world.answers.failed["read"][0] == Code.SHARD_DOWN
    done: list[Any] = []
    world.controller.admin.accept_loss(0, done.append)
    world.run(500)
    assert done[0]["goes_on_at"] > 1 and world.shards[0].serving
    world.commit("new")
    assert world.answers.ok["new"] > done[0]["goes_on_at"]
    world.assert_equal()


def test_a_copy_is_lost_again_before_it_is_known_to_be_a_member() -> None:
    """It was to take the place of a destroyed one; the map names it, and it is not there any more."""
    world = World(3, 2, wanted=2)
    world.commit("kept")
    world.take_over("n1", "n3")
    world.run(2 * RECOVER_WAIT_MS)
    assert state(world) == DOWN
    world.controller.admin.forget("n2", lambda answer: setattr(world.store, "is_held", True))
    world.run(500)
    assert state(world) == REPAIRING and world.controller.membership.repair_in_flight(0)
    world.replace("n3")
    world.up("n3")
    world.pump()
    world.release_store()
    assert not world.shards[0].serving, "the map names a copy that is lost"
    world.run(2_000)
    assert world.commit("new") == 2
    world.assert_equal()


def test_a_number_is_not_given_twice_in_an_epoch() -> None:
    """All copies turned out to be bad, and a good one comes that lacks numbers which were given: another epoch may give
    them again, this one may not."""
    world = World(2, 2, min_insync=1)
    world.commit("kept")
    world.nodes["n1"].is_paused = world.nodes["n2"].is_paused = True
    world.put("pending")
    world.flush()
    world.down("n1", "n2")
    before = list(world.nodes["n2"].replica.copies.values())
    world.replace("n1")
    world.replace("n2")
    world.nodes["n1"].is_paused = world.nodes["n2"].is_paused = False
    world.up("n1", "n2")
    world.run(2_000)
    assert state(world) == DOWN
    world.down("n2")
    world.nodes["n2"].copies = before
    world.nodes["n2"].start()
    world.up("n2")
    world.run(500)
    assert state(world) == DOWN and "restart the coordinator" in world.shards[0].reason
    world.take_over("n1", "n2")
    world.run(1_500)
    assert world.shards[0].serving and world.shards[0].last_seq == 1
    world.assert_equal()


def test_a_shard_waits_for_a_good_member_that_may_come() -> None:
    """The others lost their data: what was given and is on its way to it keeps its numbers."""
    world = World(2, 2)
    world.commit("kept")
    world.nodes["n1"].is_paused = world.nodes["n2"].is_paused = True
    world.put("pending")
    world.flush()
    world.down("n1", "n2")
    world.replace("n1")
    world.nodes["n1"].is_paused = world.nodes["n2"].is_paused = False
    world.up("n1")
    world.run(3_000)
    assert world.shards[0].serving and 0 not in world.controller.recovery.shards
    world.up("n2")
    world.run(1_000)
    assert world.commit("next") == 3
    world.assert_equal()


def test_shards_of_a_run_in_memory_with_one_copy_left() -> None:
    """Nothing began anew there: who has the data gives it to the other."""
    world = World(2, 2, durability="memory")
    world.commit("kept")
    world.replace("n1")
    world.take_over("n1", "n2")
    world.run(500)
    assert world.controller.recovery.emptied == [] and world.shards[0].commit == 1
    world.assert_equal()


def test_a_node_is_told_of_commits_though_a_shard_is_not_its_own_any_more() -> None:
    """It reported a copy of a shard that was not served then, and was removed from it: the others count."""
    world = World(3, 3, shards=2)
    world.put("answered", 0)
    world.commit("answered too", 1)
    world.down("n1", "n2", "n3")
    world.nodes["n3"].wipe(0)
    world.nodes["n1"].backlog.forget(0)
    world.nodes["n2"].backlog.forget(0)
    world.take_over()
    world.nodes["n3"].holds_pulls = True
    world.up("n1", "n2", "n3")
    world.pump()
    assert sorted(world.row(0)) == ["n1", "n2"] and sorted(world.row(1)) == ["n1", "n2", "n3"]
    world.commit("more", 1)
    link = world.sequencer.links["n3"]
    assert world.sequencer.committed_ordinal(link) == link.written_ordinal
    world.commit("last", 1)
    assert world.nodes["n3"].replica.copies[1].commit >= 2


# --- links that break in a recovery -----------------------------------------------------------------


@pytest.mark.parametrize("lost", ["n1", "n2"])
@pytest.mark.parametrize("step", range(5))
def test_a_link_that_breaks_while_entries_are_shipped(lost: str, step: int) -> None:
    """After every frame of it: the shard is not served before its members are equal."""
    world = World(2, 2)
    behind(world, "n2")
    world.take_over("n1", "n2")
    for _ in range(step):
        assert state(world) == SHIPPING
        node = next(node for node in world.nodes.values() if node.inbox or node.outbox)
        if node.inbox:
            node.work()
        else:
            world.deliver(node.name, 1)
    if step < 4:
        world.down(lost)
        assert state(world) == WAITING
        world.run(100)
        world.up(lost)
    world.pump()
    world.assert_equal()
    assert world.shards[0].commit == 3


@pytest.mark.parametrize("lost", ["n1", "n2"])
@pytest.mark.parametrize("comes_back", ["before it is stored", "after it is stored", "wiped"])
def test_a_link_that_breaks_while_a_removal_is_stored(lost: str, comes_back: str) -> None:
    """Whether the change is stored or not: the shard is served by good members of the stored row alone."""
    world = World(3, 3, min_insync=2)
    world.commit("answered")
    world.replace("n3")
    world.take_over()
    world.store.is_held = True
    world.up("n1", "n2", "n3")
    assert state(world) == CHANGING
    if comes_back == "wiped":
        world.replace(lost)
    else:
        world.down(lost)
    if comes_back != "after it is stored":
        world.up(lost)
    assert state(world) == CHANGING and not world.shards[0].serving
    world.release_store()
    assert world.row() == ["n1", "n2"]
    if comes_back == "after it is stored":
        world.run(100)
        assert not world.shards[0].serving
        world.up(lost)
    world.run(3_000)
    assert world.shards[0].commit == 1 and world.row() == ["n1", "n2", "n3"]
    world.assert_equal()


@pytest.mark.parametrize("lost", ["n1", "n2"])
@pytest.mark.parametrize("comes_back", ["at once", "later", "wiped"])
@pytest.mark.parametrize("outcome", ["held", "unknown, stored", "unknown, not stored"])
def test_a_link_that_breaks_while_a_replacement_is_stored(lost: str, comes_back: str, outcome: str) -> None:
    """The change old disk -> new disk is in flight: until it is known to be stored nothing goes on; then the shard
    starts over with what the map says. Only if the good copy is lost before, so is the shard."""
    world = World(2, 2)
    world.commit("answered")
    world.replace("n2")
    world.take_over()
    world.store.is_held = True
    world.up("n1", "n2")
    world.pump()
    assert world.changes.is_busy and world.controller.membership.repair_in_flight(0)
    sent = world.sent
    assert sent is not None
    if outcome != "held":
        if outcome == "unknown, stored":
            world.store.compare_and_set(*sent)
        world.settle(Outcome.UNKNOWN)
    if comes_back == "wiped":
        world.replace(lost)
    else:
        world.down(lost)
    world.tick()
    if comes_back != "later":
        world.up(lost)
        world.pump()
    assert not world.shards[0].serving and state(world) == REPAIRING
    world.store.is_held = False
    if outcome == "held":
        world.settle(world.store.compare_and_set(*sent))
    world.run(500)
    assert world.map.replica_id_of(0, "n2") != "n2-1"
    if comes_back == "later":
        assert not world.shards[0].serving
        world.up(lost)
    world.run(2_000)
    assert world.shards[0].commit == 1
    world.assert_equal()
    assert not world.words("alarm")


@pytest.mark.parametrize("lost", ["n1", "n2"])
def test_a_link_that_breaks_before_a_replacement_is_proposed(lost: str) -> None:
    """The learner is over, and its node is told so; the next one begins when all are back."""
    world = World(2, 2)
    world.commit("answered")
    world.down("n1", "n2")
    world.replace("n2")
    world.nodes["n1"].backlog.forget(0)
    world.take_over()
    world.nodes["n2"].holds_pulls = True
    world.up("n1", "n2")
    world.pump()
    assert state(world) == REPAIRING and world.shards[0].learners
    world.down(lost)
    assert state(world) == WAITING and not world.shards[0].learners and not world.controller.membership.repairing
    if lost == "n1":
        world.nodes["n2"].holds_pulls = False
        world.pump()
        assert world.items("n2", UNLEARN) == [[UNLEARN, 0]]
    world.nodes["n2"].holds_pulls = False
    world.run(100)
    world.up(lost)
    world.run(1_000)
    world.assert_equal()
    assert len(world.items("n2", LEARN)) >= 1 and world.shards[0].commit == 1


def test_a_link_that_breaks_while_the_first_disks_are_stored() -> None:
    """The founding goes on from what is stored."""
    world = World(2, 2, up=False)
    world.store.is_held = True
    world.up("n1", "n2")
    assert state(world) == CHANGING
    world.down("n2")
    world.release_store()
    world.run(500)
    assert all(disk for _, disk in world.map.members[0]) and not world.shards[0].serving
    world.up("n2")
    world.pump()
    assert world.shards[0].writable


# --- frames, ticks, events --------------------------------------------------------------------------


def test_frames_for_nobody() -> None:
    """Of shards that are not, of attempts that are over: nothing comes of them. One that cannot be true, or is of a
    node that is not linked, costs the connection."""
    world = World(2, 2)
    for frame in (
        (wire.ENTRIES, 9, 0, 0, []), (wire.ENTRIES, -1, 0, 0, []), (wire.ENTRIES, 0, 0, 0, []),
        (wire.SHIPPED, 0, 1, 5, 5, None), (wire.LEARNED, 0, b"n1-1", 1, 2, 0, 0), (wire.LEARN_FAILED, 0, b"why"),
        (wire.LEARN_FAILED, 9, b"why"),
    ):  # fmt: skip
        world.controller.receive("n1", frame)
        world.check()
    assert not world.controller.outbox.take_actions() and world.shards[0].writable
    with pytest.raises(LinkError, match="the last one sent is"):
        world.controller.receive("n1", [wire.RESULTS, 99, 99, [], []])
    world.down("n1")
    for frame in ((wire.LEARNED, 0, b"n1-1", 1, 2, 0, 0), (wire.LEAVE,)):
        with pytest.raises(LinkError, match="n1 is not linked"):
            world.controller.receive("n1", frame)


def test_a_node_that_leaves_is_let_go_and_told_to_stop() -> None:
    """R14: its shards lose a member before the node is gone, so no write waits; then it is told STOP."""
    world = World(3, 3, shards=2)
    world.controller.receive("n2", (wire.LEAVE,))
    assert [fields["node"] for fields in world.words("node-leaves")] == [] and not world.nodes["n2"].is_stopped
    world.run(100)
    assert world.row(0) == world.row(1) == ["n1", "n3"] or set(world.row(1)) == {"n1", "n3"}
    assert world.nodes["n2"].is_stopped and world.words("node-leaves") == [{"node": "n2"}]
    assert {fields["reason"] for fields in world.words("left-in-sync")} == {"it is about to stop"}
    world.down("n2")
    world.commit("at once")
    assert world.answers.ok == {"at once": 1}


def test_a_node_that_leaves_where_it_has_to_stay() -> None:
    """It is told to stop at once: there is nothing to wait for."""
    world = World(2, 2)
    world.controller.receive("n2", (wire.LEAVE,))
    world.pump()
    assert world.row() == ["n1", "n2"] and world.nodes["n2"].is_stopped


def test_bad_copies_are_told() -> None:
    """A node that comes back without its data is named, with how many shards that is about."""
    world = World(3, 3, shards=2)
    world.replace("n3")
    world.up("n3")
    assert world.words("node-not-a-member") == [
        {"node": "n3", "shards": 2, "first": 0, "reason": "came back without its data"}
    ]


def test_every_change_of_the_map_has_the_versions_that_nodes_stored() -> None:
    """Whoever knows less than that goes on from an older copy of its directory."""
    world = World(3, 3)
    version = world.map.version
    world.down("n2", "n3")
    world.up("n2")
    world.run(LINK_GRACE_MS)
    assert world.map.nodes_of(0) == ["n1", "n2"]
    assert world.map.heard["n2"] == version > world.map.heard["n1"] == world.map.heard["n3"] == 2


def test_a_directory_that_was_missing_for_a_while() -> None:
    """Where the data of nodes is not mounted, they come back empty, and store every version of the map. That is not
    taken for something that the nodes with the data should know: they serve when they are back."""
    world = World(3, 3)
    world.commit("answered")
    world.down("n1", "n2", "n3")
    whole = {node: world.nodes[node] for node in ("n2", "n3")}
    for node in whole:
        whole[node].stop()
        world.nodes[node] = Node(world, node)
        world.nodes[node].disks = (f"{node}-empty-{number}" for number in count(1))
    world.take_over("n2", "n3")
    world.run(RECOVER_WAIT_MS)
    world.controller.proposals.propose(lambda old: old, lambda _: None)
    world.pump("n2", "n3")
    assert state(world) == DOWN and world.map.heard == {"n1": 2, "n2": 2, "n3": 2}
    world.down("n2", "n3")
    world.nodes |= whole
    for node in whole:
        whole[node].start()
    world.take_over("n2", "n3")
    world.run(RECOVER_WAIT_MS)
    assert world.row() == ["n2", "n3"] and world.shards[0].commit == 1
    assert world.map.heard["n2"] == world.map.heard["n3"] > world.map.heard["n1"]


def test_an_audit_now_and_then() -> None:
    """All members are asked every AUDIT_INTERVAL_MS."""
    world = World(2, 2)
    world.run(AUDIT_INTERVAL_MS)
    assert len(world.items("n1", AUDIT)) == 1
    world.run(2 * AUDIT_INTERVAL_MS)
    assert len(world.items("n1", AUDIT)) == len(world.items("n2", AUDIT)) == 3


def test_after_a_stall_nobody_is_slow() -> None:
    """This process did not run for a while: what the nodes said may still lie in the sockets."""
    world = World(3, 3)
    world.tick()
    for stalled in (True, False):
        world.put(stalled)
        world.pump("n1", "n2")
        world.tick(EVICT_AFTER_MS if stalled else 50)
        assert not world.closed
        world.pump()
    world.put("slow")
    for _ in range(2 * EVICT_AFTER_MS // 50):
        world.pump("n1", "n2")
        world.tick()
    assert [node for node, _ in world.closed] == ["n3"]


def test_check_finds() -> None:
    """Broken invariants are named."""
    world = World(2, 2)
    shard = world.shards[0]
    world.controller.recovery.shards[0] = recovery._Shard(0)
    with pytest.raises(AssertionError, match="a shard is served or recovers"):
        world.controller.check()
    del world.controller.recovery.shards[0]
    world.sequencer.leave([shard], shard.members[1])
    with pytest.raises(AssertionError, match="never smaller than min_insync"):
        world.controller.check()
    world.changes._map = replace(world.map, min_insync=1)
    with pytest.raises(AssertionError, match="E has every stored member"):
        world.controller.check()
    other = World(2, 2)
    del other.controller.reports["n1"]
    with pytest.raises(AssertionError, match="of the nodes that are linked"):
        other.controller.check()


def test_a_write_whose_answer_was_lost_is_answered_by_another_member() -> None:
    """The answering member is killed after it applied: the result comes from one that evaluated the same."""
    world = World(3, 3)
    first = world.members()[0]
    world.write(INCR, "incr", key=b"n", args=(5,))
    world.flush()
    world.nodes[first].work()
    world.down(first)
    world.run(LINK_GRACE_MS)
    assert world.answers.ok == {"incr": 5} and first not in world.row()


def test_the_map_is_the_one_that_is_stored() -> None:
    """A change in flight is none yet."""
    world = World(2, 2)
    world.store.is_held = True
    world.controller.proposals.propose(lambda old: replace(old, restoring=b"x"), lambda stored: None)
    world.flush()
    assert world.map.restoring is None
    world.release_store()
    assert world.map.restoring == b"x" == ClusterMap.from_json(world.store.value).restoring
    assert not world.nodes["n1"].frames or world.nodes["n1"].frames[-1][0] != wire.STOP


def test_random_walks() -> None:
    """Frame by frame, with everything that can happen at any moment, and an operator who asks for everything."""
    for seed in range(WALKS):
        walk(seed)
