"""Frozen: the rows of one shard exactly as they were at one position, read in slices while writes continue.

Pure. One mechanism for snapshots, learners and backups. The scan walks the live index in key order; the first change of
a key the scan has not passed saves the key's old cell (or None: it was absent), and the scan emits the saved cell
instead of the live one. A saved cell is dropped when the scan passes its key, so the extra memory is one old cell per
changed key, and nothing is stopped, copied or replayed.

A wipe of the shard saves no cells: the table continues with a new index and leaves the old one, which never changes
again, to its open scans.

Invariant: rows still to come = keys >= `_lower` that are saved with a cell, or in the index and not saved.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtcp.storage.shard.btree import BTree
from kvtcp.storage.shard.index import Cell, Index, StoredRow


class Frozen:
    """The rows of shard `shard` at position (`epoch`, `seq`, `chain`). Made by `Table.freeze`. Closing it, or reading
    it to the end, releases the index and the saved cells."""

    def __init__(
        self, index: Index, shard: int, epoch: int, seq: int, chain: int, on_close: Callable[[Frozen], None]
    ) -> None:
        self.shard = shard
        self.epoch = epoch  # epoch, seq, chain: the position whose state the rows are
        self.seq = seq
        self.chain = chain
        self.rows_left = len(index)  # rows not yet returned; at the start all rows of the position
        self._index: Index | None = index  # the live one until a wipe; None when closed
        self._on_close = on_close
        self._lower = b""  # keys below it are passed
        self._saved: dict[bytes, Cell | None] = {}  # changed and not passed: key -> cell at the position, None = absent
        self._saved_order = BTree()  # the keys of `_saved`

    def save(self, key: bytes, cell: Cell | None) -> None:
        """Save the cell (None: absent) of a key that the table is about to change."""
        # Only the first change counts: a later one replaces a cell that is newer than the position. A key below
        # `_lower` is passed.
        if key >= self._lower and key not in self._saved:
            self._saved[key] = cell
            self._saved_order.insert(key)

    def next_rows(self, limit: int) -> list[StoredRow]:
        """The next rows (key, value, rev, deadline_ms or None), at most `limit` and at least one; empty at the end."""
        return [(key, *cell) for key, cell in zip(*self.next_cells(limit), strict=True)]

    def next_cells(self, limit: int) -> tuple[list[bytes], list[Cell]]:
        """The next keys and their cells, at most `limit` and at least one; empty at the end."""
        assert limit >= 1, "a slice has at least one row"
        found: list[bytes] = []
        cells: list[Cell] = []
        while self.rows_left and not found:
            assert self._index is not None, "a frozen shard is not read after close"
            keys = self._next_keys(self._index, limit)
            assert keys, "rows are left while there are keys"
            # All keys of a slice may be newer than the position (saved as absent). Then the loop takes another slice,
            # so an empty result always means the end.
            if self._saved:
                for key in keys:
                    cell = self._pass(key) if key in self._saved else self._index.get(key)
                    if cell is not None:
                        found.append(key)
                        cells.append(cell)
            else:
                found, cells = keys, self._index.cells_of(keys)
            self._lower = keys[-1] + b"\0"
            self.rows_left -= len(found)
        if not self.rows_left:
            self.close()
        return found, cells

    def close(self) -> None:
        """Release the index and the saved cells. Closing twice is allowed."""
        if self._index is not None:
            self._index = None
            self._saved = {}
            self._saved_order = BTree()
            self._on_close(self)

    def _next_keys(self, index: Index, limit: int) -> list[bytes]:
        """The next keys to pass, in order: live keys, and saved keys that may be deleted since."""
        keys = index.slice(self._lower, None, limit)
        if self._saved:
            # If the slice is full, saved keys above its last key belong to a later slice.
            upper = keys[-1] if len(keys) == limit else None
            keys = sorted({*keys, *self._saved_order.slice(self._lower, upper, limit)})[:limit]
        return keys

    def _pass(self, key: bytes) -> Cell | None:
        self._saved_order.delete(key)
        return self._saved.pop(key)
