"""What a coordinator may do because the map is its own: opening, the bound of stamps, the end; over nodes' cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvtcp.cluster.changes import NotOwner
from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import BOUND_RETRY_MS, STAMP_AHEAD_MS, STAMP_MOVE_MS, TICK_MS
from kvtcp.protocol.link import LEAVE, RESULTS
from kvtcp.replication.ownership import Ownership, next_epoch
from tests.support.controller_world import World

FAR_MS = 10**7  # wall-clock milliseconds that the world does not reach


def ownership_of(world: World) -> Ownership:
    """The part of the world's controller."""
    return world.controller.ownership


def opened(factor: int = 2) -> World:
    """A world that lets clients in."""
    world = World(factor, factor)
    world.tick()
    world.pump()
    assert world.controller.ownership.is_open
    return world


def near_the_bound(world: World, left_ms: int) -> int:
    """Bring the clock so near to the stored bound; returns the bound."""
    bound_ms = world.map.stamp_bound_ms
    world.controller.begin(bound_ms - left_ms, world.now_ms)
    return bound_ms


def test_clients_are_let_in_when_what_was_found_is_stored() -> None:
    """Every shard was judged, but as long as the store has no outcome nothing is open; time begins above what nodes
    saw."""
    world = World(2, 2, up=False)
    world.nodes["n2"].core.replica.stamp_ms = world.map.stamp_bound_ms + 5
    world.up("n1", "n2")
    world.pump()
    world.store.is_held = True
    world.run(10 * TICK_MS)
    assert world.controller.recovery.is_settled and not ownership_of(world).is_open
    world.release_store()
    world.run(2 * TICK_MS)
    assert ownership_of(world).is_open and len(world.words("ready")) == 1
    stamp_ms = world.nodes["n2"].core.replica.stamp_ms
    assert world.sequencer.stamp_ms >= stamp_ms and world.map.stamp_bound_ms >= stamp_ms + STAMP_AHEAD_MS


def test_a_restore_that_is_over_is_forgotten_with_the_data() -> None:
    """A takeover that finds no data opens the prefix that was being restored."""
    world = World(2, 2, up=False, changes=lambda founded: replace(founded, restoring=b"p"))
    world.up("n1", "n2")
    world.run(2 * TICK_MS)
    assert world.map.restoring is None


def test_the_bound_is_moved_before_the_clock_reaches_it() -> None:
    """R12: once, and not while it is far away."""
    world = opened()
    bound_ms = near_the_bound(world, STAMP_MOVE_MS + 1)
    world.controller.tick()
    assert not world.changes.is_busy
    near_the_bound(world, STAMP_MOVE_MS - 1)
    world.controller.tick()
    world.controller.tick()
    assert world.sequencer.stamp_bound_ms == bound_ms, "it counts when it is stored"
    world.send_map()
    assert world.map.stamp_bound_ms == bound_ms - STAMP_MOVE_MS + 1 + STAMP_AHEAD_MS
    assert world.sequencer.stamp_bound_ms == world.map.stamp_bound_ms


def test_a_bound_that_the_store_refuses_is_tried_again() -> None:
    """After a pause; meanwhile people can read why."""
    world = opened()
    near_the_bound(world, 1)
    world.controller.tick()
    assert world.changes.to_send(world.now_ms) is not None
    world.changes.on_failed(OSError("disk full"), now_ms=world.now_ms)
    assert ownership_of(world).bound_failed == "disk full"
    world.act()
    assert world.words("bound-not-moved") and not world.changes.is_busy
    world.controller.tick()
    assert not world.changes.is_busy
    world.now_ms += BOUND_RETRY_MS
    near_the_bound(world, 1)
    world.controller.tick()
    world.send_map()
    assert ownership_of(world).bound_failed == ""


def test_the_end_leaves_the_last_stamp() -> None:
    """The next coordinator begins there, not at the bound; nothing moves it any more."""
    world = opened()
    stored: list[ClusterMap] = []
    ownership_of(world).end(stored.append, lambda error: None)
    world.send_map()
    assert stored[0].stamp_bound_ms == world.sequencer.stamp_ms
    world.controller.begin(FAR_MS, world.now_ms)
    world.controller.tick()
    assert not world.changes.is_busy and world.sequencer.stamp_ms == stored[0].stamp_bound_ms


def test_a_refusal_deposes_one_that_is_open() -> None:
    """R13: told once, and final. While it opens the refusal is only the reason why the node is not linked."""
    world = World(2, 2, up=False)
    told: list[str] = []
    ownership_of(world).on_deposed = told.append
    world.controller.refused("n1", b"FENCED", "epoch 1 is older")
    world.up("n1", "n2")
    world.pump()
    world.run(2 * TICK_MS)
    assert told == [] and ownership_of(world).is_open
    world.controller.refused("n1", b"LINK", "link 1 is older")
    world.controller.refused("n1", b"FENCED", "epoch 1 is older")
    world.controller.refused("n2", b"FENCED", "epoch 1 is older")
    assert told == ["n1 says: epoch 1 is older"] and ownership_of(world).deposed == told[0]


def test_nothing_goes_in_or_out_after_deposing() -> None:
    """R13: results are not heard, time does not pass, nothing is let out."""
    world = opened()
    world.put("a")
    world.flush()
    world.work()
    world.controller.outbox.event("info", "word")
    world.controller.refused("n1", b"FENCED", "older")
    events, actions = list(world.events), list(world.actions)
    for node in world.nodes:
        while world.nodes[node].outbox:
            assert world.controller.receive(node, world.nodes[node].outbox.popleft())
    assert world.controller.receive("n1", [RESULTS, 1, 1, [], []]) and world.controller.receive("n1", [LEAVE])
    world.controller.node_down("n1", "cut")
    world.controller.tick()
    world.controller.end_turn(world)
    assert world.answers.ok == {} and world.answers.failed == {}
    assert (world.events, world.actions) == (events, actions) and world.controller.reports.keys() == {"n1", "n2"}


def test_another_owner_deposes() -> None:
    """A change of the map that meets another version."""
    world = opened()
    told: list[str] = []
    failed: list[Exception] = []
    ownership_of(world).on_deposed = told.append
    world.store.version += 1
    world.controller.proposals.propose(lambda old: replace(old, restoring=b"x"), lambda _: None, failed.append)
    world.send_map()
    assert len(told) == 1 and "changed by somebody else" in told[0] == ownership_of(world).deposed
    assert isinstance(failed[0], NotOwner)


def test_the_next_epoch() -> None:
    """Owner, bound, addresses and M come from the new coordinator, nodes that the map does not have are added; the
    placement changes only where shards have too few copies."""

    def first(min_insync: int = 1, **nodes: tuple[str, int]) -> ClusterMap:
        return ClusterMap.found(
            cluster="c", owner="new", shards=2, factor=2, min_insync=min_insync, durability="sync", nodes=nodes,
            stamp_bound_ms=50,
        )  # fmt: skip

    old = replace(first(n1=("h", 1), n2=("h", 2)), owner="old", epoch=4, stamp_bound_ms=90)
    new = next_epoch(old, first(2, n1=("h", 7), n2=("h", 2), n3=("h", 3)))
    assert (new.owner, new.epoch, new.stamp_bound_ms, new.min_insync, new.last_node) == ("new", 5, 90, 2, 3)
    assert new.nodes == {"n1": ("h", 7), "n2": ("h", 2), "n3": ("h", 3)} and new.wanted == old.wanted

    def wanted(cluster_map: ClusterMap) -> list[Any]:
        return [list(row) for row in cluster_map.wanted]

    short = replace(old, wanted=(("n1",), ("n2",)))
    assert all(len(row) == 2 for row in wanted(next_epoch(short, first(n1=("h", 1), n2=("h", 2), n3=("h", 3)))))
