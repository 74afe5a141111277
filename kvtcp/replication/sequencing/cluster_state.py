"""Cluster state, shared by all shards of a sequencer: the map, the time, and counts.

Pure. The sequencer is one, and its shards refer to it. A tick begins with `begin`: items queued in it have one stamp.

Invariants: `stamp_ms` never decreases, and is never above the bound that is stored (R12).
"""

from __future__ import annotations

from kvtcp.cluster.map import ClusterMap


class ClusterState:
    """State of one cluster. The map is the one in the config store."""

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
        self.held_order = 0  # of the last answer held: answers that wait for one number leave in order

    def begin(self, wall_ms: int, now_ms: int) -> None:
        """Begin a tick, until `close_batches`."""
        if wall_ms > self.stamp_ms:
            # R12: time stands still rather than pass the bound at which the next coordinator will begin
            self.stamp_ms = max(self.stamp_ms, min(wall_ms, self.stamp_bound_ms))
        self.now_ms = now_ms

    def end_time(self) -> int:
        """End in order: no stamp is given above the last one, which is returned, whatever bound is stored later."""
        self._time_ended = True
        self.stamp_bound_ms = self.stamp_ms
        return self.stamp_ms

    def map_changed(self, cluster_map: ClusterMap) -> None:
        """Take a map that was stored."""
        self.map = cluster_map
        self.min_insync = cluster_map.min_insync
        if not self._time_ended:
            self.stamp_bound_ms = cluster_map.stamp_bound_ms

    def count_waiting(self, items: int, size: int) -> None:
        """Count requests that begin to wait, and their bytes; negative for those that leave."""
        self.waiting_items += items
        self.waiting_bytes += size
