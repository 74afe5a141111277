"""Cluster state: what all shards of a sequencer share: the map, the time, and counts.

Pure. The sequencer is one, and its shards have it. A tick begins with `begin`: what is queued from there to the end of
the tick has one stamp.

Invariants: `stamp_ms` never decreases, and is never above the bound that is stored (R12).
"""

from __future__ import annotations

from kvtcp.cluster.map import ClusterMap


class ClusterState:
    """State of one cluster. The map is the one that the config store holds."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        self.map = cluster_map
        self.min_insync = cluster_map.min_insync
        self.stamp_ms = 0  # of everything queued in this tick
        self.stamp_bound_ms = cluster_map.stamp_bound_ms
        self._time_ended = False
        self.now_ms = 0  # monotonic time of this tick, for deadlines only
        self.unavailable = 0  # requests refused as not executed, for status
        self.unknown = 0  # writes answered UNKNOWN, for status
        self.waiting_items = 0  # requests in all waiting queues
        self.waiting_bytes = 0  # their keys and values
        self.held_order = 0  # of the last answer held: those that wait for one number leave in order

    def begin(self, wall_ms: int, now_ms: int) -> None:
        """A tick begins: what is queued until `close_batches` has one stamp."""
        if wall_ms > self.stamp_ms:
            # R12: time stands still rather than pass what the next coordinator will begin with
            self.stamp_ms = max(self.stamp_ms, min(wall_ms, self.stamp_bound_ms))
        self.now_ms = now_ms

    def end_time(self) -> int:
        """The coordinator ends in peace: whatever bound is still stored, no stamp is given above the last one, which is
        returned."""
        self._time_ended = True
        self.stamp_bound_ms = self.stamp_ms
        return self.stamp_ms

    def map_changed(self, cluster_map: ClusterMap) -> None:
        """The config store holds this map now."""
        self.map = cluster_map
        self.min_insync = cluster_map.min_insync
        if not self._time_ended:
            self.stamp_bound_ms = cluster_map.stamp_bound_ms

    def count_waiting(self, items: int, size: int) -> None:
        """Count requests that begin to wait, and their bytes; negative numbers for those that end to."""
        self.waiting_items += items
        self.waiting_bytes += size
