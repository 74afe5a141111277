"""Following: a shard's record of a learner, one node's copy on its way into the in-sync set.

Pure. The learner (learner.py) fills the record; the shard queues writes by it, and calls `on_acknowledged`.
"""

from __future__ import annotations

from collections.abc import Callable


class Following:
    """A record of one learner of one shard."""

    __slots__ = ("acked", "attached", "holds_writes", "lost_reason", "on_acknowledged", "replica_id")

    def __init__(self, on_acknowledged: Callable[[int], None]) -> None:
        self.on_acknowledged = on_acknowledged  # called with the number up to which an ordinal of the link covers it
        self.attached = False  # LEARN was queued
        self.holds_writes = False  # it cannot catch up with the writes, so they wait a moment
        self.acked = 0  # number up to which it has everything, durably; 0 before its copy is live
        self.replica_id = ""  # of the copy by which it will be a member
        self.lost_reason = ""  # why its copy is not what it was when it was proposed as a member; empty = it is

    @property
    def takes_writes(self) -> bool:
        """Whether the learner gets the writes of the shard."""
        return self.attached and not self.lost_reason
