"""Learning and donating: what a node remembers of a shard whose copy is being brought up to date, or given away.

Pure. A Learning stands between a shard's copy and the items of the link: from the item LEARN on they are buffered here.
When the copy has everything up to `last_seq` (entries were shipped to it, or a whole one was pulled and published) it
is *ready*: what is buffered and not in the copy is applied, some at a time, and then the copy is live. The replica does
all of that; this module only has the state of it.

    begun --(the copy reaches last_seq)--> ready --(the buffer is empty)--> live: the Learning is gone

A pulled copy may be ahead of the link: it was frozen at the donor, whose link is another one. Items of the link that it
has already are dropped; it is live only when the last of them has come (`seen_seq`), because a live copy takes nothing
but the next number.

A Donation is a shard frozen at a position, under the token by which the learner asks for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from kvtcp.constants import LEARN_ITEM_BYTES
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.table import Logged

Item = Sequence[Any]


class Learning:
    """One shard that is being learned."""

    __slots__ = (
        "buffer", "bytes", "copy", "disk", "fresh", "generation", "is_ready", "kept", "last_seq", "seen_seq", "shard",
    )  # fmt: skip

    def __init__(self, shard: int, last_seq: int, disk: str, generation: int, copy: Copy | None) -> None:
        """`copy` None: it is to be pulled, as one of this disk and generation."""
        self.shard = shard
        self.fresh = copy is None
        self.disk = disk
        self.generation = generation
        self.last_seq = last_seq  # the last number that does not come by the link
        self.copy = copy  # to be completed; of a fresh one None until it is loaded
        self.is_ready = False  # the copy has last_seq, and is durable as far as it is
        self.kept: list[Logged] = []  # entries that came with a pulled copy, which may be uncommitted
        self.buffer: deque[tuple[int, Item, int]] = deque()  # stamp, item, bytes
        self.bytes = 0  # of what is buffered
        self.seen_seq = last_seq  # number of the last item that came by the link

    @property
    def is_live(self) -> bool:
        """Whether the next item of the link is the next one of the copy."""
        return self.is_ready and not self.buffer and self.copy is not None and self.seen_seq >= self.copy.table.seq

    def put_off(self, stamp_ms: int, item: Item) -> int:
        """Buffer an item; its bytes."""
        size = LEARN_ITEM_BYTES + sum([len(field) for field in item[4:] if type(field) is bytes])
        self.buffer.append((stamp_ms, item, size))
        self.bytes += size
        self.seen_seq = item[2]
        return size


class Donation:
    """A frozen shard that is to be pulled. `position` is that of the copy which is given away."""

    __slots__ = ("frozen", "keys", "position", "shard")

    def __init__(self, frozen: Frozen, position: tuple[int, int, int]) -> None:
        self.shard = frozen.shard
        self.frozen = frozen
        self.position = position  # epoch, seq, chain
        self.keys = frozen.rows_left

    def close(self) -> None:
        """Let go of it. Closing twice is allowed."""
        self.frozen.close()
