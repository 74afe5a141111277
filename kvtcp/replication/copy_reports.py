"""Copy reports: the sentences that say why a reported copy is not the one that the cluster map names.

Pure. The sequencer judges a copy when a link of a served shard comes back, the recovery before a shard is served; both
say the same of the same copy. Each sentence is the end of one that begins with the name of the node.
"""

from __future__ import annotations

from typing import Final

from kvtcp.protocol.link import CopyReport

LOST_DATA: Final = "came back without its data"
UNKNOWN_COPY: Final = "may lack writes: the cluster map, which said whether it does, was lost"


def foreign_copy(copy: CopyReport) -> str:
    """Why a copy whose disk is not the member's is bad."""
    if copy.damage:
        return f"has a damaged copy: {copy.damage}"
    return f"{LOST_DATA}: what it has is not what was written to this cluster" if copy.seq else LOST_DATA


def incomplete_copy(copy: CopyReport) -> str:
    """Why an incomplete copy is bad."""
    return f"has an incomplete copy: {copy.damage or 'it was never finished'}"
