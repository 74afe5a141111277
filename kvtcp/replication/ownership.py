"""Ownership: rights and duties of the coordinator that owns the map in the config store, until it is deposed.

Pure. A part of the controller.

- *Opening*: at the end of the takeover its results are stored: the durability of this run, and a bound above every
  stamp that a node has seen. Then clients are let in.
- *R12*: no stamp is above the stored bound: the sequencer holds time still there. The bound is moved before the clock
  comes nearer than STAMP_MOVE_MS, and again after BOUND_RETRY_MS if the store did not take it.
- *The end in order*: no stamp is given any more, and the last one is stored in place of the bound, so that the next
  coordinator need not begin seconds ahead of its clock.
- *R13*: a coordinator whose map was changed by another one, or whose epoch a node refuses, is *deposed*. That is final:
  from this step on the controller takes nothing in and lets nothing out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from kvtcp.cluster.changes import MapChanges, NotOwner
from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.placement import plan
from kvtcp.constants import BOUND_RETRY_MS, STAMP_AHEAD_MS, STAMP_MOVE_MS
from kvtcp.protocol.link import Report
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.proposals import Proposals
from kvtcp.replication.sequencing.sequencer import Sequencer


def next_epoch(old: ClusterMap, first: ClusterMap) -> ClusterMap:
    """The map of the next epoch: with owner, bound, addresses, `min_insync` and new nodes of `first`. New nodes hold
    nothing before a rebalance, unless shards have too few copies."""
    known = {node: address for node, address in first.nodes.items() if node in old.nodes}
    new = old.taken_over(owner=first.owner, epoch=old.epoch + 1, nodes=known, stamp_bound_ms=first.stamp_bound_ms)
    for node in sorted(first.nodes.keys() - known.keys(), key=lambda each: int(each[1:])):
        new, given = new.with_node(*first.nodes[node])
        assert given == node, "new nodes have the next ids"
    if new.nodes.keys() != old.nodes.keys() and any(len(row) < new.factor for row in new.wanted):
        new = new.with_wanted(plan(new.wanted, new.usable_nodes(), new.factor))
    return new if new.min_insync == first.min_insync else new.with_min_insync(first.min_insync)


class Ownership:
    """One coordinator's ownership, from the takeover to its end. `stamp_before_ms` is the bound of its predecessors: no
    stamp of theirs is higher."""

    def __init__(
        self, changes: MapChanges, proposals: Proposals, sequencer: Sequencer, outbox: Outbox,
        reports: Mapping[str, Report], *, durability: str, stamp_before_ms: int,
    ) -> None:  # fmt: skip
        self.durability = durability
        self.is_open = False  # the results of the takeover are stored: clients may ask
        self.deposed = ""  # sentence: another coordinator owns the cluster; empty = none does, as far as is known
        self.bound_failed = ""  # why the config store did not take the last bound of stamps, for people; empty = it did
        self.on_deposed: Callable[[str], None] = lambda reason: None
        self._changes = changes
        self._proposals = proposals
        self._sequencer = sequencer
        self._outbox = outbox
        self._reports = reports
        self._stamp_before_ms = stamp_before_ms
        self._is_opening = False
        self._is_ending = False
        self._is_moving = False  # a new bound is being stored
        self._retry_ms = 0  # monotonic time before which the bound is not moved again
        sequencer.stamp_ms = stamp_before_ms  # time begins at the bound of the coordinator before
        changes.on_lost = lambda error: self._depose(str(error))

    def open(self) -> None:
        """Store the results of the takeover, after which every shard was judged; then serve."""
        if self._is_opening:
            return
        self._is_opening = True
        shards = self._sequencer.shards
        stamp_ms = max([self._stamp_before_ms, *(report.stamp_ms for report in self._reports.values())])

        def edit(old: ClusterMap) -> ClusterMap:
            is_empty = not any(shard.last_seq or not shard.serving for shard in shards)
            new = replace(old, durability=self.durability, restoring=None if is_empty else old.restoring)
            return new if stamp_ms <= new.stamp_bound_ms else new.with_stamp_bound(stamp_ms + STAMP_AHEAD_MS)

        def done(cluster_map: ClusterMap) -> None:
            self._sequencer.stamp_ms = max(self._sequencer.stamp_ms, stamp_ms)
            self.is_open = True
            about = {"cluster": cluster_map.cluster, "nodes": len(cluster_map.nodes), "epoch": cluster_map.epoch}
            self._outbox.event("info", "ready", **about)
            self._outbox.actions.append(("open", ""))

        self._proposals.propose(edit, done)

    def tick(self, wall_ms: int) -> None:
        """R12: move the bound of stamps before the clock reaches it."""
        is_near = wall_ms + STAMP_MOVE_MS > self._changes.map.stamp_bound_ms
        may_try = self.is_open and not self._is_ending and not self._is_moving
        if not is_near or not may_try or self._sequencer.now_ms < self._retry_ms:
            return
        self._is_moving = True
        bound_ms = wall_ms + STAMP_AHEAD_MS
        self._changes.propose(lambda old: old.with_stamp_bound(bound_ms), self._moved, self._not_moved)

    def _moved(self, cluster_map: ClusterMap) -> None:
        self._is_moving = False
        self.bound_failed = ""

    def _not_moved(self, error: Exception) -> None:
        self._is_moving = False
        if isinstance(error, NotOwner):
            return  # deposed
        self.bound_failed = str(error)
        self._retry_ms = self._sequencer.now_ms + BOUND_RETRY_MS
        self._outbox.event("error", "bound-not-moved", reason=error)

    def end(self, done: Callable[[ClusterMap], None], failed: Callable[[Exception], None]) -> None:
        """End in order: store the last stamp, then call one of the two."""
        self._is_ending = True
        stamp_ms = self._sequencer.end_time()
        self._changes.propose(lambda old: old.with_last_stamp(stamp_ms), done, failed)

    def refused(self, node: str, text: str) -> None:
        """Take a node's refusal of this epoch. Before opening, the next change of the map shows whether another
        coordinator owns it; until then the user is told why the node is not linked."""
        if self.is_open:
            self._depose(f"{node} says: {text}")

    def _depose(self, reason: str) -> None:
        if not self.deposed:
            self.deposed = reason
            self.on_deposed(reason)
