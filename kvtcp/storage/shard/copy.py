"""Copy: one replica of one shard on a node, a table and who it is.

Pure. A copy is known by its *disk*, a uuid that the cluster map names: a copy that is new, reset, or of which anything
is in doubt is another one with another uuid, whatever it holds. `generation` tells the log entries of a copy from those
of an earlier one of the same shard on the same node.

A copy that is not complete serves nothing and takes no entries; it says why, and keeps saying it after restarts.
"""

from __future__ import annotations

from typing import Any

from kvtcp.storage.shard.table import Table


class Copy:
    """One shard on one node."""

    __slots__ = ("commit", "complete", "disk", "reason", "table")

    def __init__(
        self,
        shard: int,
        disk: str,
        *,
        generation: int = 1,
        complete: bool = True,
        reason: str = "",
        table: Table | None = None,
    ) -> None:
        self.table = Table(shard) if table is None else table
        self.table.generation = generation
        self.disk = disk
        self.complete = complete  # everything that was acknowledged is here
        self.reason = reason  # why it is not complete, or what else was found wrong, for people
        self.commit = 0  # highest number this node was told to be committed; a hint, 0 after a restart

    @property
    def shard(self) -> int:
        """Its number."""
        return self.table.shard

    @property
    def generation(self) -> int:
        """How often the copy was begun anew on this node, from 1."""
        return self.table.generation

    def report(self) -> list[Any]:
        """Its row in the report: shard, disk, generation, complete, epoch, seq, chain, commit."""
        epoch, seq, chain = self.table.position
        return [self.shard, self.disk, self.generation, self.complete, epoch, seq, chain, self.commit]
