"""Tests of the cluster map: founding, changes, and its JSON, in which every wrong field is named."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from replication_fakes import make_map

from kvtcp.replication.cluster_map import ClusterMap, MapError


def test_found() -> None:
    """Every shard has `factor` members on different nodes with unknown disks, and a node knows its shards."""
    cluster_map = make_map(nodes=4, factor=2, shards=8, disk="")
    assert [len(set(cluster_map.nodes_of(shard))) for shard in range(8)] == [2] * 8
    assert {disk for row in cluster_map.members for _, disk in row} == {""}
    for node in cluster_map.nodes:
        assert cluster_map.shards_of(node) == [n for n in range(8) if node in cluster_map.nodes_of(n)]
    assert sum(len(cluster_map.shards_of(node)) for node in cluster_map.nodes) == 16
    assert (cluster_map.version, cluster_map.epoch, cluster_map.restoring) == (1, 1, None)


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
    with pytest.raises(AssertionError, match="are fixed"):
        new.taken_over(owner="q", epoch=6, nodes={"n1": ("h", 1)}, stamp_bound_ms=0)


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
    new = old.with_disks({1: {node: "new"}})
    assert new.disk_of(1, node) == "new" and new.nodes_of(1) == old.nodes_of(1)
    assert new.disk_of(1, old.nodes_of(1)[0]) == "disk"
    assert new.members[0] == old.members[0] and new.members[2] == old.members[2]
    assert old.with_disks({}) == old


def test_json_and_back() -> None:
    """What was written is read; one field and one shard a line, for people."""
    for restoring in (None, b"", b"user:\xff"):
        cluster_map = replace(make_map(3, 2, shards=5), restoring=restoring, version=9, epoch=4)
        text = cluster_map.to_json()
        assert ClusterMap.from_json(text) == cluster_map
        assert set(json.loads(text)) == {each.name for each in fields(ClusterMap)}
        assert text.count(b"\n") == 2 + len(fields(ClusterMap)) - 1 + 5 + 1


def damaged(**changes: Any) -> bytes:
    """A map with other fields; ... removes one."""
    found = {**json.loads(make_map(3, 2, shards=2).to_json()), **changes}
    return json.dumps({name: value for name, value in found.items() if value is not ...}).encode()


ROW = [["n1", "d"], ["n2", "d"]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
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
        (damaged(factor=4), "factor of the cluster map is 4 with 3 nodes"),
        (damaged(min_insync=3), "min_insync of the cluster map is 3 with factor 2"),
        (damaged(durability="none"), "durability of the cluster map cannot be 'none'"),
        (damaged(nodes=["n1"]), "nodes of the cluster map cannot be"),
        (damaged(nodes={"n1": ["h"]}), "nodes of the cluster map cannot be"),
        (damaged(nodes={"n1": ["h", "1"]}), "nodes of the cluster map cannot be"),
        (damaged(members={}), "members of the cluster map cannot be {}"),
        (damaged(members=[ROW, [["n1"]]]), "members of the cluster map cannot be"),
        (damaged(members=[ROW, ROW[:1]]), "members of the cluster map has a wrong row for shard 1"),
        (damaged(members=[ROW, ROW[:1] * 2]), "members of the cluster map has a wrong row for shard 1"),
        (damaged(members=[[["n1", "d"], ["n9", "d"]], ROW]), "members of the cluster map has a wrong row for shard 0"),
        (damaged(stamp_bound_ms=-1), "stamp_bound_ms of the cluster map cannot be -1"),
        (damaged(restoring="xy"), "restoring of the cluster map cannot be 'xy'"),
        (damaged(restoring=1), "restoring of the cluster map cannot be 1"),
        (damaged(heard_version=-1), "heard_version of the cluster map cannot be -1"),
        (damaged(version=0), "version of the cluster map cannot be 0"),
    ],
)
def test_json_that_is_no_map(data: bytes, words: str) -> None:
    """Whatever is wrong is named."""
    with pytest.raises(MapError, match=words):
        ClusterMap.from_json(data)
