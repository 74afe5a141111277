"""The cells of a shard: a hash index for single keys beside a B+tree for their order.

Pure. A point read or an overwrite is one dictionary probe and never touches the tree. A new key is appended to `fresh`
and merged into the tree as part of a sorted batch: when `FRESH_KEYS_MAX` wait, and before anything that needs the order
or removes a key. So every answer includes the keys that wait, and no call does more than one such merge (about 1 ms).

The hash index is one dictionary. The insert that makes it grow rehashes every key: 1 ms at 40,000 keys, 7 ms at
200,000, 30 ms at a million. Dividing the cells of a large shard among several dictionaries bounds that pause, but makes
every get 10 to 20 % slower. More shards bound it too, for nothing (docs/operations.md).

A cell is `(value, revision, deadline_ms or None)`, for a key without deadline the very tuple that a read answers with.
Measured on CPython 3.11 with 1 M keys against one bytes object, `revision + value`: 0.02 us to build instead of 0.06,
0.83 us a get in random order instead of 1.15, about 110 bytes more per key. The cyclic collector stops tracking such
tuples the first time it sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import ge
from typing import Any, Final

from kvtcp.constants import FRESH_KEYS_MAX, LEAF_KEYS_MAX
from kvtcp.storage.shard.btree import BTree

Cell = tuple[bytes, int, int | None]  # value, revision, deadline in ms or None
StoredRow = tuple[bytes, bytes, int, int | None]  # key and cell

LOAD_KEYS: Final = 8_192  # inserted into the tree at once by `load`
_TRACKED: Final[list[Any]] = []  # held under None, which is no key, by the dictionary of every index


class OrderError(ValueError):
    """Rows to be loaded do not ascend."""


class Index:
    """Ordered map of keys to cells. `fresh_keys_max` = 1 merges every new key at once."""

    __slots__ = ("cells", "fresh", "fresh_keys_max", "tree")

    def __init__(self, leaf_keys_max: int = LEAF_KEYS_MAX, fresh_keys_max: int = FRESH_KEYS_MAX) -> None:
        self.cells = _new_dict()  # all cells, and the entry under None
        self.tree = BTree(leaf_keys_max)  # all keys but the fresh ones
        self.fresh: list[bytes] = []  # keys in order of arrival that are not in the tree yet
        self.fresh_keys_max = fresh_keys_max  # len(fresh) < fresh_keys_max between two calls

    def __len__(self) -> int:
        return len(self.tree) + len(self.fresh)

    def load(self, pieces: Iterable[tuple[Sequence[bytes], Sequence[Cell]]]) -> None:
        """Fill an empty index from pieces (keys, their cells). OrderError if keys do not ascend strictly over all."""
        assert len(self) == 0, "only an empty index is loaded"
        keys: list[bytes] = []  # loaded keys that are not in the tree yet
        last = b""  # no key is empty
        for some, cells in pieces:
            self.cells.update(zip(some, cells, strict=True))
            # Piece by piece: checking and inserting a million keys at once would hold the interpreter for 100 ms.
            if some and (last >= some[0] or any(map(ge, some, islice(some, 1, None)))):
                raise OrderError("rows are not in ascending order of their keys")
            if some:
                last = some[-1]
            keys += some
            if len(keys) >= LOAD_KEYS:
                self.tree.insert_sorted_batch(keys)
                keys = []
        self.tree.insert_sorted_batch(keys)

    def release(self) -> None:
        """Free all cells and the tree, for an index that is not used any more. May run in another thread."""
        # Cell by cell: `clear` would hold the interpreter until a million cells are freed.
        cells = self.cells
        while cells:
            cells.popitem()
        self.tree.release()

    def get(self, key: bytes) -> Cell | None:
        """The cell of a key, or None."""
        return self.cells.get(key)

    def set(self, key: bytes, cell: Cell) -> None:
        """Insert or replace. (`Table.apply` has a copy of this body in its path for `put`.)"""
        cells = self.cells
        before = len(cells)
        cells[key] = cell
        if len(cells) != before:
            self.fresh.append(key)
            if len(self.fresh) >= self.fresh_keys_max:
                self.merge()

    def delete(self, key: bytes) -> Cell | None:
        """Remove a key; its cell, or None if it was not there."""
        cell = self.cells.pop(key, None)
        if cell is not None:
            if self.fresh:  # the key may be among them; the deletes that follow find nothing to merge
                self.merge()
            self.tree.delete(key)
        return cell

    def delete_all(self, keys: Iterable[bytes]) -> None:
        """Remove many keys in one pass over the tree. Absent keys are ignored."""
        pop = self.cells.pop
        present = [key for key in keys if pop(key, None) is not None]
        present.sort()
        self.merge()
        self.tree.delete_sorted_batch(present)

    def merge(self) -> None:
        """Move the fresh keys into the tree."""
        if self.fresh:
            fresh = self.fresh
            fresh.sort()
            self.tree.insert_sorted_batch(fresh)
            fresh.clear()

    def slice(
        self, lower: bytes = b"", upper: bytes | None = None, limit: int | None = None, reverse: bool = False
    ) -> list[bytes]:
        """The first `limit` keys of [lower, upper), the last ones in descending order with `reverse`."""
        self.merge()
        return self.tree.slice(lower, upper, limit, reverse)

    def cells_of(self, keys: Iterable[bytes]) -> list[Cell]:
        """The cells of present keys, in the same order."""
        return list(map(self.cells.__getitem__, keys))

    def key_at(self, place: int) -> bytes:
        """The key at `place` in the order of keys, from 0. Raises IndexError if there are not so many."""
        self.merge()
        return self.tree.at(place)

    def items(self) -> Iterator[tuple[bytes, Cell]]:
        """Every key with its cell, in no order."""
        return ((key, cell) for key, cell in self.cells.items() if key is not None)

    def count(self, lower: bytes = b"", upper: bytes | None = None) -> int:
        """Number of keys in [lower, upper)."""
        if upper is None and not lower:
            return len(self)
        self.merge()
        return self.tree.count(lower, upper)

    def check(self) -> None:
        """Verify the tree and that tree, fresh keys and dictionary hold the same keys."""
        self.tree.check()
        assert len(self.fresh) < self.fresh_keys_max, "fresh keys are merged when they are many"
        held: dict[Any, Any] = dict(self.cells)
        assert held.pop(None) is _TRACKED, "the cyclic collector always tracks the dictionary"
        assert sorted([*self.tree, *self.fresh]) == sorted(held), "tree and fresh keys are those of the hash index"


def _new_dict() -> dict[bytes, Cell]:
    """A dict without cells that the cyclic collector tracks for good.

    The collector stops tracking a dict when a full collection finds nothing tracked in it, and starts again when the
    next cell is put in: as if the dict were new, so the next two young collections walk all of its cells. After a
    `gc.collect()` with 1 M keys that is two pauses of 50 ms. A list is always tracked, hence so is a dict with one.
    """
    cells: dict[Any, Any] = {None: _TRACKED}
    return cells
