"""Tests of the audit: members are asked in one step, and a shard whose members differ is stopped (I6)."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import LINK_GRACE_MS
from kvtcp.errors import Code
from kvtcp.protocol.operations import AUDIT, INCR
from kvtcp.replication.membership.recovery import DOWN
from tests.support.controller_world import World


def audit(world: World) -> None:
    """Ask now."""
    world.controller.audit.begin()
    world.check()


def spoil(world: World, node: str, number: int = 0) -> None:
    """One copy has another chain than it should."""
    world.nodes[node].replica.tables[number].chain ^= 1


def write(world: World, *tokens: Any) -> None:
    """Writes to all shards."""
    for token in tokens:
        for shard in world.shards:
            world.put((token, shard.number), shard.number)
    world.pump()


def test_members_that_are_equal() -> None:
    """One item for each link, with all its shards; nothing comes of it."""
    world = World(3, 2, shards=3)
    write(world, "a")
    audit(world)
    world.pump()
    assert [world.items(node, AUDIT) for node in world.nodes] == [
        [[AUDIT, world.map.shards_of(node)]] for node in world.nodes
    ]
    assert all(shard.writable for shard in world.shards) and not world.words("alarm")


def test_writes_around_it_change_nothing(world: World) -> None:
    """All are asked in one step, and links are in order: every answer is about the same number."""
    for node in ("n1", "n2", "n3"):
        world.put(("before", node))
        audit(world)
        world.write(INCR, ("after", node), key=b"n", args=(1,))
        world.flush()
        world.work(node)
    world.pump()
    assert not world.words("alarm") and len(world.answers.ok) == 6


def test_members_that_differ_are_stopped() -> None:
    """Whichever is read may be wrong: the shard answers nothing more, the alarm says what each has; others go on."""
    world = World(3, 3, shards=2)
    write(world, "a")
    spoil(world, "n2")
    world.put("pending")
    audit(world)
    world.get("read")
    world.pump()
    chains = {node: world.nodes[node].replica.tables[0].chain for node in world.nodes}
    told = ", ".join(f"{node} (2, {chains[node]})" for node in sorted(chains))
    assert world.words("alarm") == [{"reason": f"shard 0 was stopped: its members differ (number, chain): {told}"}]
    assert not world.shards[0].serving and world.shards[1].writable
    world.put("refused")
    code, text, _ = world.answers.failed["refused"]
    assert (code, text) == (Code.SHARD_DOWN, f"shard 0 is down: its members differ (number, chain): {told}")
    write_ok = ("other", 1)
    world.put(write_ok, 1)
    world.run(1_000)
    assert write_ok in world.answers.ok and len(world.words("alarm")) == 1
    audit(world)
    world.pump()
    assert world.items("n1", AUDIT)[-1] == [AUDIT, [1]], "it is not asked any more"


def test_a_member_without_a_live_copy_differs() -> None:
    """It should have one."""
    world = World(2, 2)
    write(world, "a")
    del world.nodes["n2"].replica.tables[0]
    audit(world)
    world.pump()
    assert "n2 None" in world.words("alarm")[0]["reason"] and not world.shards[0].serving


@pytest.mark.parametrize("lost", ["before it answered", "while it was full", "before it was asked"])
def test_who_cannot_answer_is_not_compared(world: World, lost: str) -> None:
    """A link that is lost, or has no room; the others are compared the next time."""
    write(world, "a")
    spoil(world, "n3")
    if lost == "before it was asked":
        world.down("n3")
    elif lost == "while it was full":
        world.sequencer.links["n3"].full = True
        for shard in world.shards:
            shard.update_writable()
    audit(world)
    if lost == "before it answered":
        world.flush()
        world.work()
        world.down("n3")
    world.pump()
    assert not world.words("alarm") and world.shards[0].serving
    world.run(LINK_GRACE_MS)


def test_one_member_is_not_compared() -> None:
    """With nobody."""
    world = World(2, 1, shards=2, min_insync=1)
    audit(world)
    world.pump()
    assert world.items("n1", AUDIT) == world.items("n2", AUDIT) == []


def test_a_shard_that_was_stopped_meanwhile() -> None:
    """Two audits are under way: the second finds the same, and says nothing more."""
    world = World(2, 2)
    write(world, "a")
    spoil(world, "n2")
    audit(world)
    audit(world)
    world.pump()
    assert len(world.words("alarm")) == 1


def test_a_learner_of_a_shard_that_is_stopped(world: World) -> None:
    """It is given up: nothing is learned from members that differ, and nothing changes in the map."""
    write(world, "a")
    for node in world.nodes.values():
        node.backlog.forget(0)
    world.replace("n3")
    world.run(LINK_GRACE_MS)
    world.pull("n3")
    assert world.shards[0].learners
    spoil(world, "n2")
    audit(world)
    world.pump()
    assert not world.shards[0].serving and not world.shards[0].learners
    world.nodes["n3"].holds_pulls = False
    world.run(3_000)
    assert world.row() == ["n1", "n2"] and not world.shards[0].serving


@pytest.mark.parametrize("change", ["joins", "is replaced", "leaves"])
def test_a_change_of_the_map_that_is_on_its_way_when_a_shard_is_stopped(change: str) -> None:
    """It is stored, and nothing comes of it: the shard stays stopped until the next coordinator looks at it."""
    world = World(3, 3, min_insync=2) if change != "is replaced" else World(3, 3, min_insync=3)
    write(world, "a")
    world.store.is_held = True
    if change == "joins":
        world.store.is_held = False
        world.down("n3")
        world.run(LINK_GRACE_MS)
        world.store.is_held = True
        world.up("n3")
    elif change == "is replaced":
        world.replace("n3")
        world.up("n3")
    else:
        world.down("n3")
        world.run(LINK_GRACE_MS)
    world.pump()
    assert world.controller.membership.changing == {0}
    spoil(world, "n2")
    audit(world)
    world.pump()
    assert not world.shards[0].serving
    row = world.row()
    world.release_store()
    world.run(1_000)
    assert not world.shards[0].serving and 0 not in world.controller.recovery.shards
    assert set(world.row()) == {"joins": {"n1", "n2", "n3"}, "leaves": {"n1", "n2"}}.get(change, set(row))
    for node in ("n1", "n2", "n3"):
        world.down(node)
        world.up(node)
    world.run(1_000)
    assert not world.shards[0].serving and len(world.words("alarm")) == 1


def test_the_next_coordinator_looks_at_a_stopped_shard_anew() -> None:
    """And finds that its members differ: it is down until an operator says what shall be."""
    world = World(2, 2)
    write(world, "a")
    spoil(world, "n2")
    audit(world)
    world.pump()
    world.take_over("n1", "n2")
    assert world.controller.recovery.shards[0].state == DOWN
    assert "its members differ" in world.shards[0].reason
