"""One sorted run out of many shards: pages of a scan, rows of a backup.

Pure. A key is in exactly one shard, and every shard is in order, so this is a merge. Keys are spread evenly by their
hash: a page of 5 out of 64 shards needs a row or two of each, a page of 1,000 about 16. A page is made in rounds: take
some keys of every shard, sort them together (list.sort merges ordered runs at C speed), and take more only from those
shards whose keys ended before the page did. Values are looked up for the rows of the page alone.

A node's page is columns, not rows: four lists of a thousand are made, packed and unpacked in half the time of a
thousand lists of four.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from kvtcp.constants import MERGE_ROWS
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.index import Cell
from kvtcp.storage.shard.table import Table

# keys, values (None: only the keys were asked for), revs, ttls_ms (None: no row has one), whether rows were cut off
Page = tuple[Sequence[bytes], Sequence[bytes] | None, Sequence[int], Sequence[int | None] | None, bool]
FrozenRow = tuple[int, bytes, bytes, int, int | None]  # shard, key, value, rev, deadline_ms or None
ROW_BYTES = 24  # counted for revision, ttl and framing of a row


def any_key(tables: Sequence[Table], number: int, stamp_ms: int) -> tuple[bytes | None, int]:
    """A visible key of the tables, or None, and the number of their keys, expired ones included. If each `number` is
    equally likely, so is each key, except those that follow expired ones."""
    total = sum(map(len, tables))
    if not total:
        return None, 0
    place = number % total
    start = 0
    while place >= len(tables[start]):
        place -= len(tables[start])
        start += 1
    for table in (*tables[start:], *tables[:start]):
        key = table.any_key(place, stamp_ms)
        if key is not None:
            return key, total
        place = 0
    return None, total


def merge_page(
    tables: Sequence[Table], lower: bytes, upper: bytes | None, limit: int, bytes_max: int, reverse: bool,
    keys_only: bool, stamp_ms: int,
) -> Page:  # fmt: skip
    """The first visible rows of [lower, upper) over all `tables` (in descending order with `reverse`): at most `limit`
    (>= 1), and at most `bytes_max` bytes (`page_bytes`) unless it is one row alone.
    """
    assert limit >= 1, "a page has room for at least one row"
    keys, taken = _first_keys(tables, lower, upper, limit + 1, reverse, stamp_ms)
    more = len(keys) > limit
    del keys[limit:]
    if not keys:
        return (), None if keys_only else (), (), None, False
    cell_of: dict[bytes, Cell] = {}
    for table, some in zip(tables, taken, strict=True):
        while some and (some[-1] < keys[-1] if reverse else some[-1] > keys[-1]):
            some.pop()
        cell_of |= zip(some, table.cells_of(some), strict=True)
    values: Sequence[bytes] | None
    values, revs, deadlines_ms = zip(*map(cell_of.__getitem__, keys), strict=True)
    if keys_only:
        values = None
    fitting = _fitting(keys, values, bytes_max)
    if fitting < len(keys):
        more = True
        keys, revs, deadlines_ms = keys[:fitting], revs[:fitting], deadlines_ms[:fitting]
        values = None if values is None else values[:fitting]
    ttls_ms = None
    if deadlines_ms.count(None) < len(deadlines_ms):
        ttls_ms = [None if deadline_ms is None else deadline_ms - stamp_ms for deadline_ms in deadlines_ms]
    return keys, values, revs, ttls_ms, more


def page_bytes(keys: Sequence[bytes], values: Sequence[bytes] | None) -> int:
    """The bytes that rows count against the limit of a page."""
    return sum(map(len, keys)) + ROW_BYTES * len(keys) + (0 if values is None else sum(map(len, values)))


def _fitting(keys: Sequence[bytes], values: Sequence[bytes] | None, bytes_max: int) -> int:
    """How many rows fit `bytes_max`; the first row always does."""
    if page_bytes(keys, values) <= bytes_max:
        return len(keys)
    size = 0
    for number, key in enumerate(keys):
        size += len(key) + ROW_BYTES + (0 if values is None else len(values[number]))
        if number and size > bytes_max:
            return number
    return len(keys)


def _first_keys(
    tables: Sequence[Table], lower: bytes, upper: bytes | None, wanted: int, reverse: bool, stamp_ms: int
) -> tuple[list[bytes], list[list[bytes]]]:
    """The first `wanted` keys over all tables, fewer if there are no more; and, by table, all keys that were taken from
    it to find them, in order."""
    found: list[bytes] = []
    taken: list[list[bytes]] = [[] for _ in tables]
    # Tables that may have more keys than were taken, each with the bounds of the rest.
    open_tables = [(number, lower, upper) for number in range(len(tables))]
    while open_tables:
        # A little more than the average share, so that few tables are left for the second round.
        share = (wanted + wanted // 2) // len(tables) + 2
        rest: list[tuple[int, bytes, bytes | None]] = []
        for number, low, high in open_tables:
            keys = tables[number].keys(low, high, share, reverse, stamp_ms)
            found += keys
            taken[number] += keys
            if len(keys) == share:
                rest.append((number, low, keys[-1]) if reverse else (number, keys[-1] + b"\0", high))
        found.sort(reverse=reverse)
        del found[wanted:]
        if len(found) == wanted:
            # The rest of a table matters only if it begins before the last key of the page.
            end = found[-1]
            rest = [
                (number, low, high) for number, low, high in rest
                if (high is not None and high > end if reverse else low <= end)
            ]  # fmt: skip
        open_tables = rest
    return found, taken


def merge_frozen(frozens: Sequence[Frozen], rows_per_slice: int = MERGE_ROWS) -> Iterator[FrozenRow]:
    """All rows of frozen shards in order of their keys. A step reads at most `rows_per_slice` rows of one shard; the
    first step reads so many of every shard. Each shard is read to its end, which closes it.
    """
    for key, shard, value, rev, deadline_ms in heapq.merge(*(_rows_of(frozen, rows_per_slice) for frozen in frozens)):
        yield shard, key, value, rev, deadline_ms


def _rows_of(frozen: Frozen, rows_per_slice: int) -> Iterator[tuple[bytes, int, bytes, int, int | None]]:
    while rows := frozen.next_rows(rows_per_slice):
        for key, value, rev, deadline_ms in rows:
            yield key, frozen.shard, value, rev, deadline_ms
