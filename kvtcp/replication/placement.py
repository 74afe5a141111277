"""Placement: which nodes hold which shard.

Pure. A table, not a hash: the copies are dealt out so that every invariant below holds by construction, for any number
of shards and nodes.

Invariants of `balanced_placement` (tested for all small sizes):
- every shard has `factor` different nodes;
- the numbers of shards of two nodes differ by at most one;
- the numbers of shards that two nodes answer first for (their *first* place) differ by at most one where the
  membership allows it.
"""

from __future__ import annotations

from collections.abc import Sequence


def balanced_placement(shards: int, nodes: Sequence[str], factor: int) -> list[list[str]]:
    """`placement[shard]` = the `factor` node ids that hold the shard; the first one answers its writes.

    Slot k = shard * factor + copy goes to node k modulo the number of nodes, which makes the counts differ by at most
    one and the copies of one shard different. The first place then goes to the member that has fewest of them.
    """
    if not 1 <= factor <= len(nodes):
        raise ValueError(f"a replication factor of {factor} needs at least {factor} nodes, there are {len(nodes)}")
    firsts = dict.fromkeys(nodes, 0)
    placement: list[list[str]] = []
    for shard in range(shards):
        members = [nodes[(shard * factor + copy) % len(nodes)] for copy in range(factor)]
        first = min(members, key=lambda node: (firsts[node], members.index(node)))
        firsts[first] += 1
        at = members.index(first)
        placement.append(members[at:] + members[:at])
    return placement
