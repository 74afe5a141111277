"""Copy reports: sentences on why a reported copy is not the one that the cluster map names.

Pure. The sequencer judges a copy when a link of a served shard comes back, the recovery before a shard is served; both
use the same sentence for the same copy. Each is the end of a sentence that begins with the name of the node.
"""

from __future__ import annotations

from typing import Final

from kvtcp.protocol.link import CopyReport

LOST_DATA: Final = "came back without its data"
UNKNOWN_COPY: Final = "may lack writes: the cluster map, which said whether it does, was lost"


def foreign_copy(copy: CopyReport) -> str:
    """Why a copy with another replica id than the member's is bad."""
    if copy.damage:
        return f"has a damaged copy: {copy.damage}"
    return f"{LOST_DATA}: what it has is not what was written to this cluster" if copy.seq else LOST_DATA


def incomplete_copy(copy: CopyReport) -> str:
    """Why an incomplete copy is bad."""
    return f"has an incomplete copy: {copy.damage or 'it was never finished'}"


def why_other(copy: CopyReport, number: int, replica_id: str, acked: int, last_seq: int, base: tuple[int, int]) -> str:
    """Why a copy is not the one with this replica id that acknowledged `acked`; empty if it is. `last_seq` is the last
    number given in the shard, `base` a position of it, number and chain."""
    if copy.replica_id != replica_id:
        return foreign_copy(copy)
    if not copy.complete:
        return incomplete_copy(copy)
    has = f"it has shard {number} up to {copy.seq}"
    if copy.seq < acked:
        return f"{LOST_DATA}: {has}, but acknowledged {acked}"
    if copy.seq > last_seq:
        return f"has another history: {has}, above the last number given, {last_seq}"
    if copy.seq == base[0] and copy.chain != base[1]:
        return f"has another history: it differs at number {copy.seq} or before"
    return ""
