"""Kept entries: what a node can still ship to a member that lacks it.

Pure. After a crash the members of a shard may differ by the entries that were under way, so every entry is kept until
the coordinator says that it is committed: in batches, in order, each with the ordinal of the link that commits it.
Entries from before the present link have ordinal 0.

The windows of the links bound what may be uncommitted. A shard that cannot commit holds back the ordinal of all others,
so when `bytes_max` is exceeded, of each shard only as much is kept as a window can hold: its items, and its bytes with
the item that crosses them, which may be the last one and the largest there is.

What is too old is looked for in passes over all batches, newest first, a slice with each `add`, and what is committed
is forgotten in slices too: a million entries at once would hold the node up for a quarter of a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain

from kvtcp.constants import KEPT_BYTES_MAX, KEPT_PASS_ENTRIES, KEPT_SHARD_BYTES_MAX, WINDOW_ITEMS_MAX
from kvtcp.storage.copy import Logged

Batch = tuple[int, int, list[Logged]]  # ordinal, bytes, entries


class KeptEntries:
    """A queue of batches. `bytes` is what their packed entries have together."""

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self.bytes = 0
        # In the order of `add`, over all three; ordinals never decrease. The first two are empty but during a pass.
        self._older: deque[Batch] = deque()  # that the pass did not look at yet
        self._looked_at: deque[Batch] = deque()  # what it let stay
        self._batches: deque[Batch] = deque()
        self._room: dict[int, list[int]] = {}  # of the pass: shard -> items and bytes that may still be uncommitted
        self._index: dict[int, list[Logged]] | None = None  # of `look_up`: shard -> its entries
        self._bytes_max = bytes_max  # as asked for
        self._look_bytes = bytes_max  # above it a pass begins

    def add(self, ordinal: int, entries: list[Logged]) -> None:
        """The entries of a batch, in order."""
        size = sum([len(entry[4]) for entry in entries])
        self._batches.append((ordinal, size, entries))
        self.bytes += size
        if self._index is not None:
            for entry in entries:
                self._index.setdefault(entry[0], []).append(entry)
        if self._older:
            self._go_on(len(entries))
        elif self.bytes > self._look_bytes:
            self._older, self._batches = self._batches, self._older
            self._room = {}
            self._go_on(len(entries))

    def commit(self, ordinal: int) -> dict[int, int]:
        """Forget what is committed up to this ordinal; shard -> its last number among that. What is left of very much
        is forgotten with the next calls."""
        last: dict[int, int] = {}
        self._index = None
        left = 2 * KEPT_PASS_ENTRIES  # more than a batch adds
        for batches in (self._older, self._looked_at, self._batches):
            while batches and batches[0][0] <= ordinal and left > 0:
                _, size, entries = batches.popleft()
                self.bytes -= size
                left -= len(entries)
                last |= {entry[0]: entry[2] for entry in entries}
        if self._looked_at and not self._older:
            self._end_pass()
        return last

    def new_link(self) -> None:
        """Ordinals begin anew: all that is here is from before."""
        self._replace([(0, size, entries) for _, size, entries in self._all()])

    def forget(self, shard: int) -> None:
        """The copy of a shard is not what it was."""
        stay = [(ordinal, [e for e in entries if e[0] != shard]) for ordinal, _, entries in self._all()]
        self._replace([(ordinal, sum([len(e[4]) for e in entries]), entries) for ordinal, entries in stay if entries])

    def of_shard(self, shard: int) -> list[Logged]:
        """The entries of a shard, in order."""
        return [entry for _, _, entries in self._all() for entry in entries if entry[0] == shard]

    def look_up(self, shard: int) -> list[Logged]:
        """`of_shard` for a takeover, which asks for many shards: an index is made, and lasts until the next batch. What
        a pass has dropped meanwhile may still be in it."""
        if self._index is None:
            self._index = {}
            for _, _, entries in self._all():
                for entry in entries:
                    self._index.setdefault(entry[0], []).append(entry)
        return self._index.get(shard, [])

    def _all(self) -> Iterator[Batch]:
        return chain(self._older, self._looked_at, self._batches)

    def _replace(self, batches: list[Batch]) -> None:
        """From now on it has these, and no pass is under way."""
        self._older, self._looked_at, self._batches = deque(), deque(), deque(batches)
        self._index = None
        self.bytes = sum([size for _, size, _ in batches])

    def _go_on(self, added: int) -> None:
        """A slice of the pass, several times what was `added` meanwhile."""
        older, room = self._older, self._room
        left = max(KEPT_PASS_ENTRIES, 4 * added)
        while older and left > 0:
            ordinal, size, entries = older.pop()
            left -= len(entries)
            self.bytes -= size
            stay = []
            for entry in reversed(entries):
                mine = room.setdefault(entry[0], [WINDOW_ITEMS_MAX, KEPT_SHARD_BYTES_MAX])
                if mine[0] > 0 and mine[1] > 0:
                    mine[0] -= 1
                    mine[1] -= len(entry[4])
                    stay.append(entry)
            if stay:
                stay.reverse()
                size = sum([len(entry[4]) for entry in stay])
                self._looked_at.appendleft((ordinal, size, stay))
                self.bytes += size
        if not older:
            self._end_pass()

    def _end_pass(self) -> None:
        self._looked_at += self._batches
        self._batches, self._looked_at = self._looked_at, deque()
        self._look_bytes = max(self._bytes_max, 2 * self.bytes)
