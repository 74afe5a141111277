"""Kept entries: what a node can still ship to a member that lacks it.

Pure. After a crash the members of a shard may differ by the entries that were under way, so every entry is kept until
the coordinator says that it is committed: in batches, in order, each with the ordinal of the link that commits it.
Entries from before the present link have ordinal 0.

The windows of the links bound what may be uncommitted. A shard that cannot commit holds back the ordinal of all others,
so when `bytes_max` is exceeded, of each shard only as much is kept as a window can hold.

After a restart the end of the log is here, hundreds of thousands of entries, and a takeover asks for many shards: the
first question sorts all of them by shard (30 ms), and that is kept until something is forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kvtcp.constants import KEPT_BYTES_MAX, WINDOW_BYTES_MAX, WINDOW_ITEMS_MAX
from kvtcp.storage.copy import Logged

Batch = tuple[int, int, list[Logged]]  # ordinal, bytes, entries


class KeptEntries:
    """A queue of batches. `bytes` is what their packed entries have together."""

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self.bytes = 0
        self._batches: deque[Batch] = deque()  # in the order of `add`; ordinals never decrease
        self._bytes_max = bytes_max  # as asked for
        self._look_bytes = bytes_max  # above it old entries are looked for
        self._by_shard: dict[int, list[Logged]] | None = None  # the same entries; None = nobody asked lately

    def add(self, ordinal: int, entries: list[Logged]) -> None:
        """The entries of a batch, in order."""
        size = sum([len(entry[4]) for entry in entries])
        self._batches.append((ordinal, size, entries))
        self.bytes += size
        if self._by_shard is not None:
            for entry in entries:
                self._by_shard.setdefault(entry[0], []).append(entry)
        if self.bytes > self._look_bytes:
            self._drop_old()

    def commit(self, ordinal: int) -> dict[int, int]:
        """Forget what is committed up to this ordinal; shard -> its last number among that."""
        batches = self._batches
        last: dict[int, int] = {}
        while batches and batches[0][0] <= ordinal:
            _, size, entries = batches.popleft()
            self.bytes -= size
            last |= {entry[0]: entry[2] for entry in entries}
        if last:
            self._by_shard = None
        return last

    def new_link(self) -> None:
        """Ordinals begin anew: all that is here is from before."""
        self._batches = deque((0, size, entries) for _, size, entries in self._batches)

    def forget(self, shard: int) -> None:
        """The copy of a shard is not what it was."""
        self._replace((ordinal, [e for e in entries if e[0] != shard]) for ordinal, _, entries in self._batches)

    def of_shard(self, shard: int) -> list[Logged]:
        """The entries of a shard, in order."""
        if self._by_shard is None:
            by_shard: dict[int, list[Logged]] = {}
            for _, _, entries in self._batches:
                for entry in entries:
                    by_shard.setdefault(entry[0], []).append(entry)
            self._by_shard = by_shard
        return list(self._by_shard.get(shard, ()))

    def _drop_old(self) -> None:
        room: dict[int, list[int]] = {}
        stay: list[tuple[int, list[Logged]]] = []
        for ordinal, _, entries in reversed(self._batches):
            kept = []
            for entry in reversed(entries):
                left = room.setdefault(entry[0], [WINDOW_ITEMS_MAX, WINDOW_BYTES_MAX])
                if left[0] > 0 and left[1] > 0:
                    left[0] -= 1
                    left[1] -= len(entry[4])
                    kept.append(entry)
            kept.reverse()
            stay.append((ordinal, kept))
        self._replace(reversed(stay))
        self._look_bytes = max(self._bytes_max, 2 * self.bytes)

    def _replace(self, batches: Iterable[tuple[int, list[Logged]]]) -> None:
        made = list(batches)
        self._by_shard = None
        self._batches = deque()
        self.bytes = 0
        for ordinal, entries in made:
            if entries:
                size = sum([len(entry[4]) for entry in entries])
                self._batches.append((ordinal, size, entries))
                self.bytes += size
