"""The cluster map: the one small versioned value that says what the cluster is and who holds what.

Pure. Every coordinator and node that decides anything decides it by a map. Today the map lives in the coordinator's
memory and its identity (cluster id, secret, shards, factor, min_insync) in its data directory; the members of a shard
do not change while the coordinator lives. A member is a pair (node, disk): `disk` is the uuid of the copies of one
node, so a node that comes back with another disk is not the member that acknowledged.

Invariants: `version` and `epoch` only grow; every shard has exactly `factor` members, on different nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtcp.replication.placement import balanced_placement


@dataclass
class ClusterMap:
    """`members[shard]` are node ids, first the one that answers; `disks[node]` is the uuid of its copies."""

    cluster: str
    epoch: int
    owner: str
    shards: int
    factor: int
    min_insync: int
    nodes: dict[str, tuple[str, int]]
    members: list[list[str]]
    version: int = 1
    disks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        *,
        cluster: str,
        epoch: int,
        owner: str,
        shards: int,
        factor: int,
        min_insync: int,
        nodes: dict[str, tuple[str, int]],
    ) -> ClusterMap:
        """A map with balanced placement. Raises ValueError for values that do not fit together."""
        if not 1 <= min_insync <= factor:
            raise ValueError(f"min_insync must be from 1 to the replication factor {factor}, not {min_insync}")
        members = balanced_placement(shards, list(nodes), factor)
        return cls(cluster, epoch, owner, shards, factor, min_insync, nodes, members)

    def shards_of(self, node: str) -> list[int]:
        """The shards that `node` holds, ascending."""
        return [shard for shard, members in enumerate(self.members) if node in members]

    def join(self, node: str, disk: str) -> None:
        """The copies of `node` are those with this uuid from now on."""
        if self.disks.get(node) != disk:
            self.disks[node] = disk
            self.version += 1
