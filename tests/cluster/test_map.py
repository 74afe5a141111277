"""Tests of the cluster map: founding, edits and what they refuse, and its JSON, in which every wrong field is named."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtcp.cluster.map import ClusterMap, MapError
from kvtcp.constants import NODES_MAX
from tests.support.replication_fakes import make_map


def test_found() -> None:
    """Every shard has `factor` members on different nodes with unknown disks, and a node knows its shards."""
    cluster_map = make_map(nodes=4, factor=2, shards=8, disk="")
    assert [len(set(cluster_map.nodes_of(shard))) for shard in range(8)] == [2] * 8
    assert {disk for row in cluster_map.members for _, disk in row} == {""}
    for node in cluster_map.nodes:
        assert cluster_map.shards_of(node) == [n for n in range(8) if node in cluster_map.nodes_of(n)]
    assert sum(len(cluster_map.shards_of(node)) for node in cluster_map.nodes) == 16
    assert (cluster_map.version, cluster_map.epoch, cluster_map.restoring) == (1, 1, None)
    assert [list(row) for row in cluster_map.wanted] == [cluster_map.nodes_of(shard) for shard in range(8)]
    assert (cluster_map.draining, cluster_map.destroyed, cluster_map.last_node) == ((), (), 4)


@pytest.mark.parametrize("min_insync", [0, 3])
def test_min_insync_that_does_not_fit(min_insync: int) -> None:
    """min_insync is from 1 to the factor."""
    with pytest.raises(ValueError, match=f"from 1 to the replication factor 2, not {min_insync}"):
        ClusterMap.found(
            cluster="c", owner="o", shards=4, factor=2, min_insync=min_insync, durability="sync",
            nodes={"a": ("h", 1), "b": ("h", 2)}, stamp_bound_ms=0,
        )  # fmt: skip


def test_taken_over() -> None:
    """The next coordinator has a higher epoch, its own addresses, and a bound that never sinks."""
    old = replace(make_map(2, 2), stamp_bound_ms=100)
    nodes = {"n1": ("other", 7), "n2": ("other", 8)}
    new = old.taken_over(owner="p", epoch=5, nodes=nodes, stamp_bound_ms=50)
    assert (new.owner, new.epoch, new.nodes, new.stamp_bound_ms) == ("p", 5, nodes, 100)
    assert new.taken_over(owner="q", epoch=6, nodes=nodes, stamp_bound_ms=150).stamp_bound_ms == 150
    assert new.members == old.members
    with pytest.raises(AssertionError, match="only grows"):
        new.taken_over(owner="q", epoch=5, nodes=nodes, stamp_bound_ms=0)
    some = new.taken_over(owner="q", epoch=6, nodes={"n1": ("h", 1)}, stamp_bound_ms=0)
    assert some.nodes == {"n1": ("h", 1), "n2": ("other", 8)}, "what is not brought stays"
    with pytest.raises(AssertionError, match="of nodes of the map"):
        new.taken_over(owner="q", epoch=6, nodes={**nodes, "n3": ("h", 1)}, stamp_bound_ms=0)


def test_the_bound_of_stamps() -> None:
    """It moves up while a coordinator is at work, and down to its last stamp when it ends in peace."""
    cluster_map = replace(make_map(), stamp_bound_ms=100)
    assert cluster_map.with_stamp_bound(200).stamp_bound_ms == 200
    assert cluster_map.with_stamp_bound(50).stamp_bound_ms == 100
    assert cluster_map.with_last_stamp(50).stamp_bound_ms == 50
    assert cluster_map.with_last_stamp(200).stamp_bound_ms == 100


def test_other_disks() -> None:
    """A member by another copy keeps its place; nobody else changes."""
    old = make_map(3, 2, shards=3)
    node = old.nodes_of(1)[1]
    new = old.with_replica_ids({1: {node: "new"}})
    assert new.replica_id_of(1, node) == "new" and new.nodes_of(1) == old.nodes_of(1)
    assert new.replica_id_of(1, old.nodes_of(1)[0]) == "disk"
    assert new.members[0] == old.members[0] and new.members[2] == old.members[2]
    assert old.with_replica_ids({}) == old


def pairs(row: str) -> tuple[tuple[str, str], ...]:
    """Members from "n1.disk n2.disk"."""
    return tuple((node, disk) for node, _, disk in (each.partition(".") for each in row.split()))


def moving_map() -> ClusterMap:
    """Four nodes, factor 2, min_insync 1: shard 0 has one member, shard 1 has two, shard 2 has three."""
    founded = make_map(4, 2, shards=3)
    rows = (pairs("n1.a"), pairs("n1.a n2.b"), pairs("n1.a n2.b n3.c"))
    return replace(founded, members=rows, wanted=(("n1", "n2"), ("n1", "n2"), ("n1", "n3")))


def test_a_member_joins_and_leaves() -> None:
    """The new one is last in its row, a node leaves several shards at once, and no other row changes."""
    old = moving_map()
    new = old.with_member(1, "n4", "d")
    assert new.members == (old.members[0], pairs("n1.a n2.b n4.d"), old.members[2])
    gone = new.without([1, 2], "n2")
    assert gone.members == (old.members[0], pairs("n1.a n4.d"), pairs("n1.a n3.c"))
    assert gone.wanted == old.wanted and gone.version == old.version
    assert old.without([], "n4") == old


def test_a_member_takes_the_place_of_another() -> None:
    """Another node, or another copy of the same node, where the old one stood."""
    old = moving_map()
    assert old.replaced(2, "n2", "n4", "d").members[2] == pairs("n1.a n4.d n3.c")
    assert old.replaced(2, "n1", "n1", "new").members[2] == pairs("n1.new n2.b n3.c")


def test_another_member_answers() -> None:
    """Its pair comes first, the others keep their order."""
    old = moving_map()
    assert old.first_answers(2, "n3").members[2] == pairs("n3.c n1.a n2.b")
    assert old.first_answers(2, "n1") == old


def test_a_node_joins_and_leaves() -> None:
    """Ids count up and are never given again; a node that leaves is not draining any more, but still destroyed."""
    old = moving_map()
    new, node = old.with_node("h", 9)
    assert (node, new.nodes["n5"], new.last_node) == ("n5", ("h", 9), 5)
    assert new.shards_of("n5") == [] and "n5" not in old.nodes
    gone = new.with_draining("n5", True).with_destroyed("n5").without_node("n5")
    assert (gone.nodes, gone.draining, gone.destroyed) == (old.nodes, (), ("n5",))
    assert gone.with_node("h", 9)[1] == "n6"
    assert ClusterMap.from_json(gone.to_json()) == gone


def test_draining_and_destroyed() -> None:
    """Both are sorted sets; the first can be taken back."""
    old = moving_map()
    new = old.with_draining("n3", True).with_draining("n1", True).with_draining("n3", True)
    assert new.draining == ("n1", "n3")
    assert new.with_draining("n1", False).draining == ("n3",) and new.with_draining("n2", False) == new
    assert old.with_destroyed("n2").with_destroyed("n1").with_destroyed("n2").destroyed == ("n1", "n2")
    assert new.members == old.members and new.wanted == old.wanted


def test_another_placement() -> None:
    """Rows may be shorter than the factor when there are few nodes; the members do not move by themselves."""
    old = moving_map()
    new = old.with_wanted([["n4", "n1"], ["n2"], ("n3", "n4")])
    assert new.wanted == (("n4", "n1"), ("n2",), ("n3", "n4")) and new.members == old.members


def test_another_min_insync() -> None:
    """It moves between 1 and the smallest row."""
    old = moving_map()
    grown = old.with_member(0, "n2", "d")
    assert grown.with_min_insync(2).with_min_insync(1) == grown
    with pytest.raises(ValueError, match="min_insync cannot be 2: shard 0 has 1 in-sync members"):
        old.with_min_insync(2)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"from 1 to the replication factor 2, not {wrong}"):
            grown.with_min_insync(wrong)


@pytest.mark.parametrize(("edit", "words"), [
    (lambda m: m.with_member(1, "n9", "d"), "n9 is no node"),
    (lambda m: m.with_member(1, "n2", "d"), "n2 is a member of shard 1 already"),
    (lambda m: m.with_member(1, "n3", ""), "copy of shard 1 by which n3 joins is known"),
    (lambda m: m.with_member(2, "n4", "d"), "shard 2 has 3 members with factor 2"),
    (lambda m: m.without([1], "n3"), "n3 is no member of shard 1"),
    (lambda m: m.without([1, 0], "n1"), "shard 0 would have fewer than 1 members"),
    (lambda m: m.replaced(1, "n3", "n4", "d"), "n3 is no member of shard 1"),
    (lambda m: m.replaced(1, "n1", "n2", "d"), "n2 is a member of shard 1 already"),
    (lambda m: m.replaced(1, "n1", "n9", "d"), "n9 is no node"),
    (lambda m: m.replaced(1, "n1", "n3", ""), "copy of shard 1 by which n3 joins is known"),
    (lambda m: m.first_answers(1, "n3"), "n3 is no member of shard 1"),
    (lambda m: m.with_node("h", 4), "h:4 is the address of another node"),
    (lambda m: m.without_node("n9"), "n9 is no node"),
    (lambda m: m.without_node("n1"), "n1 is a member of 3 shards"),
    (lambda m: m.with_wanted([["n4"]] * 3).without_node("n4"), "n4 shall hold shards"),
    (lambda m: m.with_draining("n9", True), "n9 is no node"),
    (lambda m: m.with_destroyed("n9"), "n9 is no node"),
    (lambda m: m.with_wanted([["n1"]]), "1 rows for 3 shards"),
    (lambda m: m.with_wanted([["n1"], [], ["n1"]]), "shard 1 cannot be placed"),
    (lambda m: m.with_wanted([["n1"], ["n2", "n2"], ["n1"]]), "shard 1 cannot be placed"),
    (lambda m: m.with_wanted([["n1"], ["n1", "n2", "n3"], ["n1"]]), "shard 1 cannot be placed"),
    (lambda m: m.with_wanted([["n1"], ["n1"], ["n9"]]), "shard 2 cannot be placed"),
    (lambda m: m.with_draining("n2", True).with_wanted([["n1"], ["n2"], ["n1"]]), "shard 1 cannot be placed"),
    (lambda m: m.with_destroyed("n2").with_wanted([["n1"], ["n2"], ["n1"]]), "shard 1 cannot be placed"),
])  # fmt: skip
def test_an_edit_that_does_not_fit(edit: Callable[[ClusterMap], Any], words: str) -> None:
    """It is not made."""
    with pytest.raises(AssertionError, match=words):
        edit(moving_map())


def test_too_many_nodes() -> None:
    """The map takes nodes up to the limit of a cluster."""
    cluster_map = make_map()
    while len(cluster_map.nodes) < NODES_MAX:
        cluster_map, _ = cluster_map.with_node("h", len(cluster_map.nodes) + 1)
    with pytest.raises(AssertionError, match=f"at most {NODES_MAX} nodes"):
        cluster_map.with_node("h", 0)


EDITS: list[Callable[[ClusterMap, int, str, str], ClusterMap]] = [
    lambda m, shard, node, other: m.with_member(shard, node, "d"),
    lambda m, shard, node, other: m.without([shard], node),
    lambda m, shard, node, other: m.without(m.shards_of(node), node),
    lambda m, shard, node, other: m.replaced(shard, node, other, "r"),
    lambda m, shard, node, other: m.with_replica_ids({shard: {node: "e"}}),
    lambda m, shard, node, other: m.first_answers(shard, node),
    lambda m, shard, node, other: m.with_node("h", 100 + m.last_node)[0],
    lambda m, shard, node, other: m.without_node(node),
    lambda m, shard, node, other: m.with_draining(node, shard == 0),
    lambda m, shard, node, other: m.with_destroyed(node),
    lambda m, shard, node, other: m.with_wanted([[node, other]] * m.shards),
    lambda m, shard, node, other: m.with_min_insync(shard + 1),
]


@given(st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 1), st.integers(1, 5), st.integers(1, 5))))
def test_random_edits(steps: list[tuple[Callable[[ClusterMap, int, str, str], ClusterMap], int, int, int]]) -> None:
    """After any edits that were not refused the map fits together, survives its JSON, and gave no id twice."""
    cluster_map = make_map(3, 2, shards=2)
    given_ids = set(cluster_map.nodes)
    for edit, shard, node, other in steps:
        before = cluster_map
        try:
            cluster_map = edit(before, shard, f"n{node}", f"n{other}")
        except (AssertionError, ValueError):
            continue
        assert ClusterMap.from_json(cluster_map.to_json()) == cluster_map
        assert not (cluster_map.nodes.keys() - before.nodes.keys()) & given_ids
        given_ids |= cluster_map.nodes.keys()
        for row, old_row in zip(cluster_map.members, before.members, strict=True):
            assert len(set(row) - set(old_row)) <= 1 and len(set(old_row) - set(row)) <= 1, "one member at a time"


def test_other_ids_than_numbered_ones() -> None:
    """Ids that are not an n and a number do not count as given."""
    made = ClusterMap.found(
        cluster="c", owner="o", shards=2, factor=1, min_insync=1, durability="sync",
        nodes={"n07": ("h", 1), "n-3": ("h", 2), "n2": ("h", 3), "on9": ("h", 4)}, stamp_bound_ms=0,
    )  # fmt: skip
    assert made.last_node == 2 and made.with_node("h", 5)[1] == "n3"


def test_json_and_back() -> None:
    """What was written is read; one field and one shard a line, for people."""
    for restoring in (None, b"", b"user:\xff"):
        cluster_map = replace(make_map(3, 2, shards=5), restoring=restoring, version=9, epoch=4)
        cluster_map = cluster_map.with_draining("n2", True).with_destroyed("n3").with_node("h", 9)[0]
        text = cluster_map.to_json()
        assert ClusterMap.from_json(text) == cluster_map
        assert set(json.loads(text)) == {each.name for each in fields(ClusterMap)}
        assert text.count(b"\n") == 2 + len(fields(ClusterMap)) - 1 + 2 * (5 + 1)


def damaged(**changes: Any) -> bytes:
    """A map with other fields; ... removes one."""
    found = {**json.loads(make_map(3, 2, shards=2).to_json()), **changes}
    return json.dumps({name: value for name, value in found.items() if value is not ...}).encode()


ROW = [["n1", "d"], ["n2", "d"]]


@pytest.mark.parametrize(("data", "words"), [
    (b"", "is not JSON"),
    (b"\xff", "is not JSON"),
    (b"[]", "is not a JSON object"),
    (damaged(owner=...), "has no owner"),
    (damaged(learners=[]), "has learners, which this version does not know"),
    (damaged(cluster=""), "cluster of the cluster map cannot be ''"),
    (damaged(epoch=0), "epoch of the cluster map cannot be 0"),
    (damaged(epoch=True), "epoch of the cluster map cannot be True"),
    (damaged(owner=5), "owner of the cluster map cannot be 5"),
    (damaged(shards=0), "shards of the cluster map cannot be 0"),
    (damaged(shards=4097), "shards of the cluster map cannot be 4097"),
    (damaged(shards=3), "members of the cluster map has 2 shards, not 3"),
    (damaged(factor="2"), "factor of the cluster map cannot be '2'"),
    (damaged(factor=0), "factor of the cluster map cannot be 0"),
    (damaged(min_insync=3), "min_insync of the cluster map is 3 with factor 2"),
    (damaged(durability="none"), "durability of the cluster map cannot be 'none'"),
    (damaged(nodes=["n1"]), "nodes of the cluster map cannot be"),
    (damaged(nodes={"n1": ["h"]}), "nodes of the cluster map cannot be"),
    (damaged(nodes={"n1": ["h", "1"]}), "nodes of the cluster map cannot be"),
    (damaged(members={}), "members of the cluster map cannot be {}"),
    (damaged(members=[ROW, [["n1"]]]), "members of the cluster map cannot be"),
    (damaged(members=[ROW, []]), "members of the cluster map has a wrong row for shard 1"),
    (damaged(members=[ROW, ROW[:1]], min_insync=2), "members of the cluster map has a wrong row for shard 1"),
    (damaged(members=[ROW, [[f"n{n}", "d"] for n in (1, 2, 3)]], factor=1), "has a wrong row for shard 1"),
    (damaged(members=[ROW, ROW[:1] * 2]), "members of the cluster map has a wrong row for shard 1"),
    (damaged(members=[[["n1", "d"], ["n9", "d"]], ROW]), "members of the cluster map has a wrong row for shard 0"),
    (damaged(last_node=...), "has no last_node"),
    (damaged(wanted=..., draining=...), "has no draining"),
    (damaged(last_node=-1), "last_node of the cluster map cannot be -1"),
    (damaged(last_node=2), "last_node of the cluster map is 2, and it has n3"),
    (damaged(wanted=[["n1"], 5]), "wanted of the cluster map cannot be"),
    (damaged(wanted=[["n1"], [""]]), "wanted of the cluster map cannot be"),
    (damaged(wanted=[["n1"]]), "wanted of the cluster map has 1 shards, not 2"),
    (damaged(wanted=[["n1"], []]), "wanted of the cluster map has a wrong row for shard 1"),
    (damaged(wanted=[["n1"], ["n1", "n2", "n3"]]), "wanted of the cluster map has a wrong row for shard 1"),
    (damaged(wanted=[["n1"], ["n2", "n2"]]), "wanted of the cluster map has a wrong row for shard 1"),
    (damaged(wanted=[["n9"], ["n1"]]), "wanted of the cluster map has a wrong row for shard 0"),
    (damaged(draining="n1"), "draining of the cluster map cannot be 'n1'"),
    (damaged(draining=["n2", "n1"]), "draining of the cluster map cannot be"),
    (damaged(draining=["n9"]), "draining of the cluster map has 'n9', which is no node of it"),
    (damaged(destroyed=["n1", "n1"]), "destroyed of the cluster map cannot be"),
    (damaged(destroyed=[1]), "destroyed of the cluster map cannot be"),
    (damaged(stamp_bound_ms=-1), "stamp_bound_ms of the cluster map cannot be -1"),
    (damaged(restoring="xy"), "restoring of the cluster map cannot be 'xy'"),
    (damaged(restoring=1), "restoring of the cluster map cannot be 1"),
    (damaged(heard={"n1": -1}), "heard of the cluster map cannot be"),
    (damaged(heard=[]), "heard of the cluster map cannot be"),
    (damaged(heard_version=1), "has heard_version, which this version does not know"),
    (damaged(version=0), "version of the cluster map cannot be 0"),
])  # fmt: skip
def test_json_that_is_no_map(data: bytes, words: str) -> None:
    """Whatever is wrong is named."""
    with pytest.raises(MapError, match=words):
        ClusterMap.from_json(data)
