"""The deadlines of a shard in order of time, only for the keys that have one.

Pure. A B+tree of `8-byte big-endian deadline_ms + key`, so an overwritten deadline is really removed: a key whose
deadline is renewed every second costs one entry, where a heap with lazy deletion would collect thousands. Order (time,
then key) depends on content alone, so a purge takes the same keys on every replica.

A key is *expired* at a stamp when its deadline <= the stamp.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import merge
from typing import Final

from kvtcp.constants import LEAF_KEYS_MAX
from kvtcp.storage.shard.btree import BTree

STAMP_BYTES: Final = 8
NEVER_MS: Final = 2**64  # above every deadline
SORTED_AT_ONCE_MAX: Final = 32_768  # entries, in 10 ms


class Deadlines:
    """Set of pairs (deadline_ms, key). 0 <= deadline_ms < 2**64."""

    __slots__ = ("_earliest_ms", "_tree")

    def __init__(self, pairs: Iterable[tuple[int, bytes]] = (), leaf_keys_max: int = LEAF_KEYS_MAX) -> None:
        self._tree = BTree.from_sorted(_sorted([_entry(ms, key) for ms, key in pairs]), leaf_keys_max)
        self._earliest_ms: int = 0  # <= every deadline; equal to the first one after `any_expired` read the tree

    def __len__(self) -> int:
        return len(self._tree)

    def add(self, deadline_ms: int, key: bytes) -> None:
        """Add a pair that is not there."""
        self._tree.insert(_entry(deadline_ms, key))
        self._earliest_ms = min(self._earliest_ms, deadline_ms)

    def remove(self, deadline_ms: int, key: bytes) -> None:
        """Remove a pair. Raises KeyError if it is not there."""
        self._tree.delete(_entry(deadline_ms, key))

    def remove_all(self, pairs: Iterable[tuple[int, bytes]]) -> None:
        """Remove many pairs in one pass. Raises KeyError if one is not there."""
        self._tree.delete_sorted_batch(sorted(_entry(ms, key) for ms, key in pairs))

    def any_expired(self, stamp_ms: int) -> bool:
        """Whether a key is expired. Usually one comparison."""
        if stamp_ms < self._earliest_ms:
            return False
        first = self._tree.first()
        if first is None:
            self._earliest_ms = NEVER_MS
            return False
        self._earliest_ms = int.from_bytes(first[:STAMP_BYTES], "big")
        return self._earliest_ms <= stamp_ms

    def count_expired(self, stamp_ms: int) -> int:
        """Number of expired keys. O(log n)."""
        return self._tree.rank(_entry(stamp_ms + 1, b"")) if self.any_expired(stamp_ms) else 0

    def expired(self, stamp_ms: int, limit: int | None = None) -> list[bytes]:
        """At most `limit` expired keys, by deadline, then key."""
        return [entry[STAMP_BYTES:] for entry in self._tree.slice(b"", _entry(stamp_ms + 1, b""), limit)]

    def pairs(self) -> list[tuple[int, bytes]]:
        """All pairs in order."""
        return [(int.from_bytes(entry[:STAMP_BYTES], "big"), entry[STAMP_BYTES:]) for entry in self._tree]

    def release(self) -> None:
        """Free all pairs, for deadlines that are not used any more; see `BTree.release`."""
        self._tree.release()

    def check(self) -> None:
        """Verify the tree and `_earliest_ms`; AssertionError names what is broken."""
        self._tree.check()
        first = self._tree.first()
        bound_holds = first is None or self._earliest_ms <= int.from_bytes(first[:STAMP_BYTES], "big")
        assert bound_holds, "no deadline is earlier than the bound"


def _sorted(entries: list[bytes]) -> list[bytes]:
    """`entries` in ascending order. A long list is sorted in pieces, because no other thread runs during a sort."""
    if len(entries) <= SORTED_AT_ONCE_MAX:
        return sorted(entries)
    starts = range(0, len(entries), SORTED_AT_ONCE_MAX)
    return list(merge(*(sorted(entries[start : start + SORTED_AT_ONCE_MAX]) for start in starts)))


def _entry(deadline_ms: int, key: bytes) -> bytes:
    return deadline_ms.to_bytes(STAMP_BYTES, "big") + key
