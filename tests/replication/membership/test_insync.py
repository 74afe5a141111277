"""Tests of membership: who is let go and when, who learns from whom, how copies move, over real replicas. The world
checks with every stored map that no in-sync set gets too small or changes by more than one step (R4, I7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.store import Outcome
from kvtcp.constants import (
    BACKOFF_MIN_MS,
    EVICT_AFTER_MS,
    LEARNER_EVICT_AFTER_MS,
    LEARNERS_PER_DONOR_MAX,
    LINK_GRACE_MS,
    MAP_RESEND_MS,
    RECOVER_WAIT_MS,
    SLOW_INTERVAL_MS,
    TICK_MS,
    WRITE_WAIT_MS,
)
from kvtcp.errors import Code
from kvtcp.protocol.link import LEAVE
from kvtcp.protocol.operations import DONATE, DROP, INCR, LEARN, PUT, UNLEARN
from kvtcp.replication.membership import insync
from kvtcp.replication.membership.learner import FREEZING, LIVE, PULLING
from kvtcp.replication.membership.recovery import DOWN
from tests.support.controller_world import World


def wanted(*rows: list[str]) -> Callable[[ClusterMap], ClusterMap]:
    """Where the copies shall be."""
    return lambda old: old.with_wanted(rows)


def want(world: World, *rows: list[str]) -> None:
    """Change that in a running cluster."""
    world.controller.proposals.propose(wanted(*rows), lambda stored: world.controller.membership.work())


def replaced(world: World, node: str) -> None:
    """A node loses its data, is let go, and learns."""
    world.replace(node)
    world.run(LINK_GRACE_MS)
    world.pull(node)


# --- links that are lost ----------------------------------------------------------------------------


def test_a_link_that_is_back_in_time_is_no_loss(world: World) -> None:
    """R14: within LINK_GRACE_MS nothing is stored, and what waited goes on."""
    version = world.map.version
    world.down("n3")
    world.put("waits")
    world.run(LINK_GRACE_MS - 1)
    assert "waits" not in world.answers
    world.up("n3")
    world.pump()
    assert world.answers.ok == {"waits": 1}
    world.run(5 * LINK_GRACE_MS)
    assert world.map.version == version and world.controller.membership.evictions == 0


def test_a_lost_node_leaves_all_its_shards_by_one_change() -> None:
    """R14; writes go on without it."""
    world = World(shards=4)
    version = world.map.version
    world.down("n3", reason="pulled out")
    for number in range(4):
        world.put(number, number)
    world.run(LINK_GRACE_MS)
    assert world.map.version == version + 1 and world.controller.membership.evictions == 1
    assert all("n3" not in world.row(number) for number in range(4)) and world.answers.ok == dict.fromkeys(range(4), 1)
    assert world.words("left-in-sync") == [{"node": "n3", "shards": 4, "first": 0, "reason": "pulled out"}]


def test_a_lost_node_stays_where_it_has_to(world: World) -> None:
    """R4: never fewer than M; writes wait, and are refused in time. A node that is back joins all the same: it has
    everything that was committed; then the lost one may leave."""
    world.down("n3")
    world.run(LINK_GRACE_MS)
    assert world.row() == ["n1", "n2"]
    world.down("n2")
    world.put("waits")
    world.run(WRITE_WAIT_MS)
    assert world.row() == ["n1", "n2"] and world.answers.failed["waits"][0] == Code.NOT_ENOUGH_REPLICAS
    world.put("waits too")
    world.up("n3")
    world.run(200)
    assert world.row() == ["n1", "n3"] and world.answers.ok == {"waits too": 1}
    world.settled(up="n2")


@pytest.mark.parametrize("first", ["n1", "n2"])
def test_the_last_linked_member_is_not_removed(first: str) -> None:
    """R6: with M = 1 both members are lost: nobody knows which one would be enough."""
    world = World(2, 2, min_insync=1)
    second = "n2" if first == "n1" else "n1"
    world.store.is_held = True
    world.down(first)
    world.down(second)
    world.run(10 * LINK_GRACE_MS)
    world.release_store()
    world.run(10 * LINK_GRACE_MS)
    assert world.row() == ["n1", "n2"] and world.controller.membership.evictions == 0
    world.up(first)
    world.run(LINK_GRACE_MS)
    assert world.row() == [first]


def test_a_removal_is_thought_over_when_the_store_failed() -> None:
    """R6: n1 may leave while n2 is good. The store takes nothing for a while, and n2 is lost: now n1 has to stay."""
    world = World(2, 2, min_insync=1, writes=1)
    world.store.is_held = True
    world.down("n1")
    world.run(2 * LINK_GRACE_MS)
    assert world.sent is not None
    world.sent = None
    world.controller.changes.on_failed(OSError("no space"), now_ms=world.now_ms)
    world.down("n2")
    world.release_store()
    world.run(10 * LINK_GRACE_MS + MAP_RESEND_MS)
    assert world.row() == ["n1", "n2"] and world.controller.membership.evictions == 0
    world.up("n2")
    world.run(LINK_GRACE_MS)
    assert world.row() == ["n2"]


def test_two_nodes_are_lost_at_once() -> None:
    """I7: one leaves after the other; the second when the first change is known to be stored."""
    world = World(3, 3, min_insync=1, writes=1)
    world.store.is_held = True
    world.down("n2", "n3")
    world.put("waits")
    world.run(5 * LINK_GRACE_MS)
    assert world.members() == ["n1", "n2", "n3"] and "waits" not in world.answers
    world.release_store()
    world.run(LINK_GRACE_MS)
    assert world.row() == ["n1"] and world.answers.ok["waits"] == 2
    world.up("n2", "n3")
    world.settled()


@pytest.mark.parametrize("stored", [True, False])
def test_the_outcome_of_an_eviction_is_not_known(world: World, stored: bool) -> None:
    """R2: E keeps the node until the change is known to be stored; the same change is sent until then."""
    world.store.is_held = True
    world.down("n3")
    world.put("waits")
    world.run(LINK_GRACE_MS)
    world.flush()
    sent = world.sent
    assert sent is not None
    if stored:
        world.store.compare_and_set(*sent)
    world.settle(Outcome.UNKNOWN)
    world.up("n3")
    world.pump()
    assert world.answers.ok == {"waits": 1} and world.members() == ["n1", "n2", "n3"], "it counts as before"
    world.put("needs it")
    world.pump("n1", "n2")
    assert "needs it" not in world.answers
    world.begin(MAP_RESEND_MS)
    world.flush()
    assert world.sent == sent, "the same bytes"
    world.settle(world.store.compare_and_set(*sent))
    world.run(MAP_RESEND_MS)
    world.release_store()
    world.settled()
    assert world.answers.ok["needs it"] == 2


def test_a_node_that_is_back_while_it_is_let_go() -> None:
    """The change is on its way: it leaves, and learns again."""
    world = World(writes=1)
    world.store.is_held = True
    world.down("n3")
    world.run(LINK_GRACE_MS)
    world.up("n3")
    world.fill()
    world.release_store()
    assert world.row() == ["n1", "n2"]
    world.settled()
    assert len(world.words("joined-in-sync")) == 1


# --- nodes that are slow ----------------------------------------------------------------------------


def slow(world: World, node: str, ms: int = EVICT_AFTER_MS, step_ms: int = 200) -> None:
    """One node says nothing for so long, while the others acknowledge."""
    world.nodes[node].is_paused = True
    world.commit(("slow", world.now_ms))
    end_ms = world.now_ms + ms
    while world.now_ms < end_ms:
        world.tick(min(step_ms, end_ms - world.now_ms))
        world.pump()


def test_a_slow_node_is_let_go(world: World) -> None:
    """R14: its link is up and its oldest item is EVICT_AFTER_MS old; it leaves, its link is closed, and after
    SLOW_INTERVAL_MS it learns."""
    slow(world, "n3", EVICT_AFTER_MS - 1)
    assert world.members() == ["n1", "n2", "n3"] and not world.closed and not world.answers.ok
    world.tick(1)
    world.pump()
    why = f"it acknowledged nothing for {EVICT_AFTER_MS} ms while others did"
    assert world.closed == [("n3", why)] and world.words("slow-node") == [{"node": "n3", "reason": why}]
    assert world.row() == ["n1", "n2"] and len(world.answers.ok) == 1
    world.nodes["n3"].is_paused = False
    world.up("n3")
    world.run(SLOW_INTERVAL_MS - 200)
    assert world.row() == ["n1", "n2"] and not world.shards[0].learners
    world.settled()


def test_a_node_that_applies_and_syncs_nothing_is_slow(world: World) -> None:
    """What counts is what is durable."""
    world.nodes["n3"].withholds = True
    world.commit("w")
    world.run(EVICT_AFTER_MS)
    assert world.row() == ["n1", "n2"] and world.answers.ok == {"w": 1}


def test_one_slow_node_per_interval() -> None:
    """R14: two are slow at once, and M others acknowledged: the second is let go SLOW_INTERVAL_MS after the first."""
    world = World(4, 4)
    world.nodes["n4"].is_paused = True
    slow(world, "n3")
    assert len(world.closed) == 1 and not world.answers.ok
    slow(world, "n3", SLOW_INTERVAL_MS - 50)
    assert len(world.closed) == 1
    slow(world, "n3", 200)
    assert sorted(node for node, _ in world.closed) == ["n3", "n4"] and sorted(world.row()) == ["n1", "n2"]
    assert len(world.answers.ok) == 3


def test_slow_nodes_without_which_nothing_goes_on(world: World) -> None:
    """Two of three with M = 2: it would not help to let one of them go."""
    world.nodes["n2"].is_paused = True
    slow(world, "n3", 3 * EVICT_AFTER_MS)
    assert not world.closed and world.row() == ["n1", "n2", "n3"]


def test_nobody_is_slow_while_nobody_acknowledges(world: World) -> None:
    """The fault may be here, or all of them wait for the same disk."""
    for node in world.nodes.values():
        node.is_paused = True
    world.put("w")
    for _ in range(2 * EVICT_AFTER_MS // 200):
        world.tick(200)
        world.flush()
    assert not world.closed and world.members() == ["n1", "n2", "n3"]


def test_a_slow_node_that_has_to_stay_keeps_its_link() -> None:
    """Nothing would be won: it would only have to be sent everything again."""
    world = World(2, 2)
    slow(world, "n2", 3 * EVICT_AFTER_MS)
    assert not world.closed and world.row() == ["n1", "n2"] and not world.words("slow-node")
    world.nodes["n2"].is_paused = False
    world.pump()
    assert len(world.answers.ok) == 1


def test_a_slow_node_is_let_go_after_a_change_that_is_on_its_way() -> None:
    """I7: its shard is changing; until that is stored nothing is done about it."""
    world = World(4, 4)
    away(world, "n4")
    world.store.is_held = True
    world.up("n4")
    world.pump()
    assert world.members() == ["n1", "n2", "n3", "n4"]
    slow(world, "n3", 2 * EVICT_AFTER_MS)
    assert not world.closed
    world.release_store()
    slow(world, "n3", 50)
    assert [node for node, _ in world.closed] == ["n3"]
    world.run(200)
    assert world.row() == ["n1", "n2", "n4"]


def test_a_slow_learner_is_given_up() -> None:
    """It would hold the writes of its shard back; another node is not let go for it."""
    world = World(writes=1, ships=False)
    replaced(world, "n3")
    assert world.shards[0].learners
    slow(world, "n3")
    assert not world.closed and world.shards[0].learners, "it has more time than a member"
    world.run(LEARNER_EVICT_AFTER_MS)
    assert [node for node, _ in world.closed] == ["n3"] and not world.shards[0].learners
    assert world.row() == ["n1", "n2"] and len(world.answers.failed) == 0


# --- copies that are not what they should be --------------------------------------------------------


def test_a_bad_copy_leaves_at_once() -> None:
    """Where enough members stay: without a grace, and then it learns."""
    world = World(shards=2, writes=1)
    world.store.is_held = True
    world.replace("n3", 1)
    world.up("n3")
    world.commit("waits", 1)
    assert list(world.shards[1].bad.values()) == ["came back without its data"] and "waits" not in world.answers
    assert not world.shards[0].bad
    world.release_store()
    assert world.row(1) == [node for node in world.row(1) if node != "n3"] and "n3" in world.row(0)
    world.pump()
    assert world.answers.ok["waits"] == 2
    world.settled()
    assert [fields["reason"] for fields in world.words("left-in-sync")] == ["it came back without its data"]


def test_a_bad_copy_that_has_to_stay_is_replaced_in_its_place() -> None:
    """R9: until the map names the new disk, nothing that it acknowledges counts; what was pending commits then, and
    what waited goes on. The pending write was answered UNKNOWN."""
    world = World(2, 2, writes=1, ships=False)
    world.put("pending")
    world.flush()
    world.replace("n2")
    world.pump()
    world.store.is_held = True
    world.up("n2")
    assert world.answers.failed["pending"][0] == Code.UNKNOWN
    world.commit("waiting")
    [learner] = world.controller.membership.learners_of(0)
    assert learner.phase == LIVE and learner.proposed and learner.following.acked == 2 and world.shards[0].commit == 1
    assert world.row() == world.members() == ["n1", "n2"] and "waiting" not in world.answers
    world.release_store()
    world.pump()
    assert world.answers.ok["waiting"] == 3
    assert world.map.replica_id_of(0, "n2") == learner.following.replica_id != "n2-1"
    world.settled(0)


def test_a_bad_copy_that_leaves_while_it_is_replaced() -> None:
    """It had to stay when that began, and may leave now: the new copy comes in addition."""
    world = World(3, 3, writes=1, ships=False)
    world.replace("n3")
    world.store.is_held = True
    world.up("n3")
    shard, links = world.shards[0], world.controller.sequencer.links
    assert links["n3"] in shard.bad and 0 in world.controller.membership.changing
    learner = world.controller.membership.learn(shard, links["n3"], links["n1"], "n3")
    world.pump()
    assert learner.phase == LIVE and not learner.proposed
    world.release_store()
    world.run(200)
    assert world.row() == ["n1", "n2", "n3"] and world.map.replica_id_of(0, "n3") == learner.following.replica_id
    world.fill()
    world.settled()


def test_a_new_copy_of_an_empty_shard_needs_no_transfer() -> None:
    """An empty copy has all there is."""
    world = World(2, 2)
    world.replace("n2")
    world.up("n2")
    world.settled(500)
    assert world.map.replica_id_of(0, "n2") == "n2-2" and world.items("n1", DONATE) == []


@pytest.mark.parametrize("lost", ["n1", "n2"])
@pytest.mark.parametrize("comes_back", ["as it was", "wiped"])
def test_a_link_that_breaks_while_a_replacement_in_a_served_shard_is_stored(lost: str, comes_back: str) -> None:
    """R9: whatever comes back is judged by the disk that is stored then. The one that has the data may be lost only
    after the other has it too."""
    world = World(2, 2, writes=3, ships=False)
    world.replace("n2")
    world.store.is_held = True
    world.up("n2")
    world.pump()
    assert world.controller.membership.changing == {0}
    if comes_back == "wiped":
        world.replace(lost)
    else:
        world.down(lost)
    world.run(5 * LINK_GRACE_MS)
    world.up(lost)
    world.pump()
    world.commit("waits")
    assert "waits" not in world.answers
    world.release_store()
    world.settled(1_000)
    assert world.answers.ok["waits"] == 4


def test_a_link_that_breaks_before_a_replacement_in_a_served_shard_is_proposed() -> None:
    """The learner is over; the member stays bad, and the next learner begins when its node is back."""
    world = World(2, 2, writes=1, ships=False)
    world.replace("n2")
    world.pull("n2")
    assert [learner.phase for learner in world.controller.membership.learners_of(0)] == [PULLING]
    world.down("n2")
    assert not world.shards[0].learners and world.shards[0].bad
    world.nodes["n2"].holds_pulls = False
    world.settled(up="n2")


def test_the_only_good_member_is_lost_while_it_gives_its_copy() -> None:
    """Nobody is replaced from a bad one; it goes on when the good one is back."""
    world = World(2, 2, writes=1, ships=False)
    world.replace("n2")
    world.pull("n2")
    world.down("n1")
    assert [fields["reason"] for fields in world.words("learner-failed")] == [
        "the link to n1, which gave it its data, was lost"
    ]
    world.nodes["n2"].holds_pulls = False
    world.run(RECOVER_WAIT_MS - TICK_MS)
    assert world.row() == ["n1", "n2"] and world.shards[0].bad and not world.shards[0].learners
    world.settled(up="n1")


def test_nobody_is_left_who_has_the_data() -> None:
    """R9: the shard is not served any more, and says why; what waits and what comes is refused. Others go on."""
    world = World(2, 2, shards=2, writes=1, ships=False)
    world.put("pending")
    world.flush()
    world.replace("n1", 0)
    world.replace("n2", 0)
    world.up("n1", "n2")
    world.put("waits")
    world.run(RECOVER_WAIT_MS - 2 * TICK_MS)
    assert world.shards[0].serving and "waits" not in world.answers
    world.run(3 * RECOVER_WAIT_MS)
    assert world.controller.recovery.shards.keys() == {0} and world.controller.recovery.shards[0].state == DOWN
    why = "none of its members has its data: n1 came back without its data; n2 came back without its data"
    assert world.words("shard-down")[-1] == {"shard": 0, "reason": why}
    assert world.answers.failed["pending"][0] == Code.UNKNOWN
    world.get("refused")
    assert world.answers.failed["refused"][0] == Code.SHARD_DOWN
    assert world.shards[1].serving, "both of its members have what is theirs"


def test_a_member_that_is_destroyed_is_not_waited_for() -> None:
    """The other one lost its data: the shard is down when the operator says that this one will not come."""
    world = World(2, 2, min_insync=1, writes=1)
    world.down("n1")
    world.replace("n2")
    world.up("n2")
    world.run(3 * RECOVER_WAIT_MS)
    assert world.shards[0].serving, "it may come"
    world.controller.admin.forget("n1", lambda answer: None)
    world.run(3 * RECOVER_WAIT_MS)
    assert world.controller.recovery.shards[0].state == DOWN
    assert "n1 was declared destroyed" in world.shards[0].reason


def test_a_member_without_its_data_where_there_is_one() -> None:
    """Factor 1: it is down until the operator accepts the loss, or the data is back."""
    world = World(1, 1, min_insync=1, writes=1)
    kept = world.nodes["n1"].replica.copies[0]
    world.replace("n1")
    world.up("n1")
    world.run(2 * RECOVER_WAIT_MS)
    assert world.controller.recovery.shards[0].state == DOWN
    world.down("n1")
    world.nodes["n1"].copies = [kept]
    world.nodes["n1"].start()
    world.up("n1")
    world.settled(500)
    assert world.shards[0].commit == 1
    world.fill()


# --- learning ---------------------------------------------------------------------------------------


def away(world: World, node: str = "n3", writes: int = 5) -> None:
    """A node is let go, and misses some writes."""
    world.down(node)
    world.run(LINK_GRACE_MS)
    world.fill(writes)


def test_a_node_that_was_away_gets_what_it_missed() -> None:
    """By entries, while writes go on; it keeps its disk."""
    world = World(writes=1)
    disk = world.map.replica_id_of(0, "n3")
    away(world)
    world.up("n3")
    world.commit("meanwhile")
    world.settled()
    assert world.map.replica_id_of(0, "n3") == disk and world.items("n1", DONATE) == world.items("n2", DONATE) == []
    assert world.controller.membership.joins == 1


def test_a_node_that_missed_too_much_gets_a_whole_copy() -> None:
    """Under a new disk, while writes go on."""
    world = World(writes=1)
    away(world)
    world.forget_entries()
    world.nodes["n3"].holds_pulls = True
    world.up("n3")
    for n in range(3):
        world.commit(n)
        assert n in world.answers.ok
    world.nodes["n3"].holds_pulls = False
    world.settled()
    assert world.map.replica_id_of(0, "n3") == "n3-2"


def test_a_node_with_another_history_gets_a_whole_copy() -> None:
    """R7: entries that only it had, of an epoch that is over: nothing is cut, it is replaced whole."""
    world = World(3, 3, min_insync=1, writes=1)
    world.put("lost with its coordinator")
    world.flush()
    world.work("n3")
    world.take_over("n1", "n2")
    world.run(2_000)
    assert world.row() == ["n1", "n2"] and world.nodes["n3"].replica.tables[0].seq == 2
    world.fill(3)
    world.settled(up="n3")
    assert world.map.replica_id_of(0, "n3") == "n3-2"


def test_few_learners_at_a_time_from_one_donor() -> None:
    """So many, and whole copies one after the other; donors share the work."""
    shards = 3 * LEARNERS_PER_DONOR_MAX
    world = World(3, 3, shards=shards, writes=1, ships=False)
    replaced(world, "n3")
    learners = world.controller.membership.learners()
    by_donor = {node: [each for each in learners if each.donor.node == node] for node in ("n1", "n2")}
    assert [len(each) for each in by_donor.values()] == [LEARNERS_PER_DONOR_MAX] * 2
    for each in by_donor.values():
        assert sorted(learner.phase for learner in each) == [FREEZING] * (LEARNERS_PER_DONOR_MAX - 1) + [PULLING]
    world.nodes["n3"].holds_pulls = False
    world.settled()


def test_shards_with_a_free_donor_do_not_wait_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most wait for the same donor: a few of them are looked at in every step, then the others have their turn."""
    monkeypatch.setattr(insync, "DONOR_MISSES_MAX", 2)
    busy, free = 3 * LEARNERS_PER_DONOR_MAX, 2
    rows = [["n1", "n3"]] * busy + [["n2", "n3"]] * free

    def founding(old: ClusterMap) -> ClusterMap:
        members = tuple(tuple((node, "") for node in row) for row in rows)
        return replace(old, members=members, wanted=tuple(map(tuple, rows)))

    world = World(3, 2, shards=busy + free, min_insync=1, changes=founding, writes=1, ships=False)
    world.replace("n3")
    world.run(LINK_GRACE_MS)
    world.nodes["n3"].holds_pulls = True
    world.up("n3")
    for _ in range(busy // 2 + 1):
        world.tick(1)
    donors = [learner.donor.node for learner in world.controller.membership.learners()]
    assert donors.count("n1") == LEARNERS_PER_DONOR_MAX and donors.count("n2") == free
    world.nodes["n3"].holds_pulls = False
    world.settled()


def test_a_donor_that_is_lost() -> None:
    """The learner is told to forget what it set aside, and begins anew with another donor."""
    world = World(4, 4, writes=1, ships=False)
    replaced(world, "n4")
    [learner] = world.controller.membership.learners()
    donor = learner.donor.node
    world.down(donor)
    assert not world.shards[0].learners
    world.nodes["n4"].holds_pulls = False
    world.run(1_000)
    assert world.items("n4", UNLEARN, LEARN)[-2:] == [[UNLEARN, 0], [LEARN, 0, 1, 1]] or donor not in world.row()
    world.up(donor)
    world.settled()


def test_a_learner_that_fails_is_tried_again_later_and_later() -> None:
    """The pause is doubled with every failure, and forgotten when it joined."""
    world = World(writes=1, ships=False)
    world.replace("n3")
    world.run(LINK_GRACE_MS)
    world.nodes["n3"].holds_pulls = True
    world.up("n3")
    for failures in (1, 2, 3):
        world.run(2 * BACKOFF_MIN_MS << failures)
        assert world.shards[0].learners
        world.nodes["n3"].replica.learn_failed(0, "the disk is full")
        world.nodes["n3"].tell_news()
        world.pump()
        assert not world.shards[0].learners
        again_in_ms = BACKOFF_MIN_MS << failures
        assert world.words("learner-failed")[-1] == {
            "shard": 0, "node": "n3", "reason": "the disk is full", "again_in_ms": again_in_ms,
        }  # fmt: skip
        world.run(again_in_ms - TICK_MS)
        assert not world.shards[0].learners
    world.nodes["n3"].holds_pulls = False
    world.settled()
    assert world.controller.membership.nodes["n3"].failures == 0


def test_learners_that_fail_together_fail_once() -> None:
    """All of a donor that was lost: the pause is that of one failure."""
    world = World(3, 2, shards=4, min_insync=1, wanted=2, writes=1, ships=False)
    world.nodes["n3"].holds_pulls = True
    want(world, *[["n1", "n3"]] * 4)
    world.pump()
    donors = {learner.donor.node for learner in world.controller.membership.learners()}
    assert len(world.controller.membership.learners()) == 4 and donors == {"n1", "n2"}
    world.down("n1", "n2")
    failed = world.words("learner-failed")
    assert [fields["again_in_ms"] for fields in failed] == [2 * BACKOFF_MIN_MS] * 4
    assert world.controller.membership.nodes["n3"].failures == 1
    world.up("n1", "n2")
    world.nodes["n3"].holds_pulls = False
    world.settled()


@pytest.mark.parametrize("stored", [True, False])
def test_the_outcome_of_a_join_is_not_known(world: World, stored: bool) -> None:
    """R2: it is one of E from the step in which it joined, whatever is stored."""
    away(world)
    world.store.is_held = True
    world.up("n3")
    world.pump()
    assert world.members() == ["n1", "n2", "n3"]
    world.flush()
    sent = world.sent
    assert sent is not None
    if stored:
        world.store.compare_and_set(*sent)
    world.settle(Outcome.UNKNOWN)
    world.put("needs it")
    world.pump("n1", "n2")
    assert "needs it" not in world.answers
    world.pump()
    assert "needs it" in world.answers.ok and world.row() == ["n1", "n2"]
    world.begin(MAP_RESEND_MS)
    world.flush()
    assert world.sent == sent, "the same bytes"
    world.settle(world.store.compare_and_set(*sent))
    world.begin(MAP_RESEND_MS)
    world.release_store()
    world.settled()


def test_a_learner_that_is_live_while_another_change_is_on_its_way() -> None:
    """I7: it joins after that, also if nothing is written any more."""
    world = World(4, 4, writes=1)
    away(world, "n4")
    world.forget_entries()
    world.pull("n4")
    world.store.is_held = True
    world.down("n3")
    world.run(LINK_GRACE_MS)
    assert world.controller.membership.changing == {0}
    world.nodes["n4"].holds_pulls = False
    world.run(500)
    [learner] = world.controller.membership.learners()
    assert learner.phase == LIVE and not learner.proposed and not learner.following.holds_writes
    world.release_store()
    world.run(100)
    assert world.row() == ["n1", "n2", "n4"]
    world.settled(up="n3")


def test_a_learner_that_lacks_something_committed_does_not_join() -> None:
    """R2: not before it acknowledged it; writes that go on and on wait for it after a while."""
    world = World(writes=1)
    away(world)
    world.nodes["n3"].withholds = True
    world.up("n3")
    world.pump()
    world.fill()
    world.run(200)
    assert world.members() == ["n1", "n2"]
    world.nodes["n3"].release()
    world.settled()


@pytest.mark.parametrize("ending", ["it joins", "it is lost"])
def test_writes_wait_for_a_learner_that_runs_after_the_members(ending: str) -> None:
    """Live, and always one write behind: after some ticks writes wait until it joined, or until it is over."""
    world = World(writes=1)
    away(world)
    world.up("n3")
    late = n = 0
    while not any(learner.following.holds_writes for learner in world.controller.membership.learners()):
        n += 1
        world.put(n)
        world.flush()
        world.work()
        world.deliver("n1")
        world.deliver("n2")
        assert n in world.answers.ok and n < 20
        world.deliver("n3", late)
        late = len(world.nodes["n3"].outbox)
        world.tick(1)
    world.put("waits")
    world.pump("n1", "n2")
    assert "waits" not in world.answers and world.members() == ["n1", "n2"] and not world.shards[0].writable
    if ending == "it is lost":
        world.down("n3")
    world.pump()
    assert "waits" in world.answers.ok
    if ending == "it is lost":
        world.up("n3")
    world.settled()


def test_a_node_that_leaves_does_not_learn(world: World) -> None:
    """It is about to stop."""
    away(world)
    world.up("n3")
    world.controller.receive("n3", (LEAVE,))
    [learner] = world.controller.membership.learners()
    learner.fail("a test")
    world.run(2_000)
    assert world.row() == ["n1", "n2"] and not world.shards[0].learners


# --- moves ------------------------------------------------------------------------------------------


def test_a_copy_moves() -> None:
    """Grown first, then shrunk, then dropped: there are never fewer members than before."""
    world = World(4, 3, wanted=3, writes=1)
    want(world, ["n1", "n2", "n4"])
    world.settled()
    assert world.rows() == [["n1", "n2", "n3"], ["n1", "n2", "n3", "n4"], ["n1", "n2", "n4"]]
    assert world.items("n3", DROP) == [[DROP, 0]] and not world.nodes["n3"].replica.copies
    assert not world.controller.membership.copies_of("n3")
    assert world.words("left-in-sync")[-1]["reason"] == "it is not wanted there any more"


def test_all_copies_move() -> None:
    """To other nodes altogether: one at a time, never more than one above the factor."""
    world = World(6, 3, wanted=3, writes=1)
    want(world, ["n4", "n5", "n6"])
    for _ in range(20):
        world.tick()
        world.fill()
    world.settled()
    assert [len(row) for row in world.rows()] == [3, 4, 3, 4, 3, 4, 3]
    assert all(not world.nodes[node].replica.copies for node in ("n1", "n2", "n3"))


def test_a_copy_is_not_dropped_before_the_shard_is_as_it_is_wanted() -> None:
    """It may be all there is, if the others are lost now."""
    world = World(4, 3, wanted=3, writes=1)
    world.down("n4")
    want(world, ["n1", "n2", "n4"])
    world.run(2_000)
    assert world.row() == ["n1", "n2", "n3"] and world.items("n3", DROP) == []
    away(world, "n3", 1)
    world.up("n3")
    world.run(2_000)
    assert world.row() == ["n1", "n2"] and world.items("n3", DROP) == [], "n4 has no copy yet"
    world.down("n2")
    world.up("n4")
    world.run(2_000)
    assert world.items("n3", DROP) == []
    world.settled(up="n2")
    assert world.items("n3", DROP) == [[DROP, 0]]


def test_a_drop_that_died_with_the_link_is_asked_for_again() -> None:
    """When the node is back and has the copy still; once while the link is up."""
    world = World(4, 3, wanted=3, writes=1)
    want(world, ["n1", "n2", "n4"])
    while world.row() != ["n1", "n2", "n4"]:
        world.run(TICK_MS)
    world.nodes["n3"].is_paused = True
    world.run(3_000)
    assert world.controller.membership.copies_of("n3").keys() == {0}
    world.down("n3")
    world.nodes["n3"].is_paused = False
    world.up("n3")
    assert world.controller.membership.copies_of("n3").keys() == {0} and world.items("n3", DROP) == []
    world.settled()
    assert world.items("n3", DROP) == [[DROP, 0]] and not world.controller.membership.copies_of("n3")
    world.down("n3")
    world.up("n3")
    world.run(3_000)
    assert len(world.items("n3", DROP)) == 1


def test_the_copy_of_a_node_that_was_away_while_it_moved_is_dropped() -> None:
    """It comes back with a copy that nobody wants."""
    world = World(4, 3, wanted=3, writes=1)
    away(world, "n3")
    want(world, ["n1", "n2", "n4"])
    world.run(2_000)
    assert world.row() == ["n1", "n2", "n4"]
    world.settled(up="n3")
    assert world.items("n3", DROP) == [[DROP, 0]]


def test_a_learner_on_a_node_that_is_not_wanted_any_more_is_given_up() -> None:
    """It would have to leave at once."""
    world = World(5, 3, wanted=3, writes=1, ships=False)
    world.nodes["n4"].holds_pulls = True
    want(world, ["n1", "n2", "n4"])
    world.pump()
    [learner] = world.controller.membership.learners()
    assert learner.link.node == "n4"
    want(world, ["n1", "n2", "n5"])
    world.pump()
    assert world.items("n4", UNLEARN) == [[UNLEARN, 0]]
    world.settled()
    assert world.row() == ["n1", "n2", "n5"] and not world.nodes["n4"].replica.copies
    assert [fields["node"] for fields in world.words("joined-in-sync")] == ["n5"]


# --- destroyed nodes --------------------------------------------------------------------------------


def forget(world: World, node: str) -> list[Any]:
    """An operator declares it destroyed; what he is answered."""
    answers: list[Any] = []
    world.controller.admin.forget(node, answers.append)
    return answers


def test_a_destroyed_member_of_a_served_shard_is_substituted() -> None:
    """R9: it cannot leave, so another node takes its place; then what was pending commits."""
    world = World(3, 2, wanted=2, writes=1)
    world.put("pending")
    world.flush()
    world.down("n2")
    world.pump()
    world.put("waiting")
    world.run(5 * LINK_GRACE_MS)
    assert not {"pending", "waiting"} & world.answers.ok.keys()
    answers = forget(world, "n2")
    world.run(200)
    assert answers == [{"node": "n2", "shards": 1}] and world.row() == ["n1", "n3"]
    assert world.answers.ok["pending"] == 2 and world.answers.ok["waiting"] == 3
    world.settled()
    assert "n2" not in world.map.nodes


def test_a_bad_member_that_is_declared_destroyed_is_substituted() -> None:
    """It came back without its data, could not leave, and went away again."""
    world = World(3, 2, wanted=2, writes=1, ships=False)
    world.replace("n2")
    world.pull("n2")
    world.down("n2")
    assert world.shards[0].bad
    forget(world, "n2")
    world.settled(1_000)
    assert world.row() == ["n1", "n3"]


def test_a_draining_node_is_no_substitute() -> None:
    """Nor a destroyed one: the shard waits for a node that may hold something."""
    world = World(4, 2, wanted=2, changes=lambda founded: founded.with_draining("n3", True), writes=1)
    world.down("n2", "n4")
    forget(world, "n2")
    world.run(1_000)
    assert world.row() == ["n1", "n2"] and not world.shards[0].learners
    world.settled(up="n4")
    assert world.row() == ["n1", "n4"]


def test_a_destroyed_member_that_can_leave_just_leaves() -> None:
    """A substitute would have to be there first."""
    world = World(3, 3, writes=1)
    world.down("n3")
    world.run(50)
    forget(world, "n3")
    world.run(LINK_GRACE_MS)
    assert world.row() == ["n1", "n2"]
    world.settled()
    assert "n3" not in world.map.nodes and world.map.wanted == (("n1", "n2"),)


@pytest.mark.parametrize("comes_back", ["as it was", "wiped"])
def test_a_substitute_that_is_lost_while_the_map_is_changed(comes_back: str) -> None:
    """It counts when that is stored, by the disk that is stored; with another one it is bad, and is replaced in its
    place."""
    world = World(4, 2, wanted=2, writes=2)
    world.down("n2", "n4")
    world.run(LINK_GRACE_MS)
    forget(world, "n2")
    world.flush()
    world.store.is_held = True
    world.pump()
    [learner] = world.controller.membership.learners_of(0)
    assert learner.proposed and learner.link.node == "n3"
    if comes_back == "wiped":
        world.replace("n3")
    else:
        world.down("n3")
    world.put("waits")
    world.run(LINK_GRACE_MS)
    world.up("n3")
    world.pump()
    assert "waits" not in world.answers
    world.release_store()
    world.settled(1_000)
    assert world.answers.ok["waits"] == 3 and world.row() == ["n1", "n3"]
    assert (world.map.replica_id_of(0, "n3") == learner.following.replica_id) is (comes_back == "as it was")


def test_writes_of_a_learner_are_its_shards_alone() -> None:
    """A node that learns one shard gets nothing of others that it does not hold."""
    world = World(4, 2, shards=2, min_insync=1, wanted=2, writes=1)
    want(world, ["n1", "n4"], list(world.map.wanted[1]))
    world.pump()
    world.fill(3)
    world.settled()
    assert {item[1] for item in world.items("n4", PUT, LEARN)} == {0}


def test_who_shall_answer_answers_again(world: World) -> None:
    """A node that was away joins in the place that was planned, or one node would answer everything in the end."""
    first = world.map.wanted[0][0]
    assert world.row()[0] == first
    world.down(first)
    world.run(1_000)
    world.write(INCR, "one", args=(1,))
    world.pump()
    assert first not in world.row()
    world.up(first)
    world.run(1_000)
    assert world.row()[0] == first == world.shards[0].members[0].node
    world.write(INCR, "two", args=(1,))
    world.pump()
    assert world.answers.ok["two"] == 2
