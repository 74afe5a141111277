"""Tests of the cluster map."""

from __future__ import annotations

import pytest
from replication_fakes import make_map

from kvtcp.replication.cluster_map import ClusterMap


def test_create() -> None:
    """Every shard has `factor` members on different nodes, and a node knows its shards."""
    cluster_map = make_map(nodes=4, factor=2, shards=8)
    assert [len(set(members)) for members in cluster_map.members] == [2] * 8
    for node in cluster_map.nodes:
        assert cluster_map.shards_of(node) == [n for n in range(8) if node in cluster_map.members[n]]
    assert sum(len(cluster_map.shards_of(node)) for node in cluster_map.nodes) == 16


@pytest.mark.parametrize("min_insync", [0, 3])
def test_min_insync_that_does_not_fit(min_insync: int) -> None:
    """min_insync is from 1 to the factor."""
    nodes = {"a": ("h", 1), "b": ("h", 2)}
    with pytest.raises(ValueError, match=f"from 1 to the replication factor 2, not {min_insync}"):
        ClusterMap.create(cluster="c", epoch=1, owner="o", shards=4, factor=2, min_insync=min_insync, nodes=nodes)


def test_join_raises_the_version_only_for_another_disk() -> None:
    """The same disk again changes nothing; another one is another member."""
    cluster_map = make_map()
    cluster_map.join("n1", "d1")
    assert (cluster_map.version, cluster_map.disks) == (2, {"n1": "d1"})
    cluster_map.join("n1", "d1")
    assert cluster_map.version == 2
    cluster_map.join("n1", "d2")
    assert (cluster_map.version, cluster_map.disks) == (3, {"n1": "d2"})
