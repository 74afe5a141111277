"""Copy: one replica of one shard on a node, a table and its identity.

Pure. A copy is identified by its *disk*, a uuid that the cluster map names. A copy that is new, reset or in doubt gets
another uuid, whatever it holds. `generation` distinguishes the log entries of a copy from those of earlier copies of
the same shard on the same node.

A copy that is not complete serves nothing and takes no entries. Its `reason` says why, and survives restarts.
"""

from __future__ import annotations

from typing import Any

from kvtcp.storage.shard.table import Table


class Copy:
    """One shard on one node."""

    __slots__ = ("commit", "complete", "disk", "reason", "table")

    def __init__(
        self, shard: int, disk: str, *, generation: int = 1, complete: bool = True, reason: str = "",
        table: Table | None = None,
    ) -> None:  # fmt: skip
        self.table = Table(shard) if table is None else table
        self.table.generation = generation
        self.disk = disk
        self.complete = complete  # the copy has every acknowledged entry
        self.reason = reason  # for people: why the copy is not complete, or what else was found wrong
        self.commit = 0  # highest number that the coordinator announced as committed; a hint, 0 after a restart

    @property
    def shard(self) -> int:
        """The number of the shard."""
        return self.table.shard

    @property
    def generation(self) -> int:
        """How many copies of the shard this node has had, this one included."""
        return self.table.generation

    def report(self) -> list[Any]:
        """The row of the copy in a REPORT: shard, disk, generation, complete, epoch, seq, chain, commit."""
        epoch, seq, chain = self.table.position
        return [self.shard, self.disk, self.generation, self.complete, epoch, seq, chain, self.commit]
