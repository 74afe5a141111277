"""One sorted run out of many shards: pages of a scan, rows of a backup.

Pure. A key is in exactly one shard, and every shard is in order, so this is a merge. Keys are spread evenly by their
hash: a page of 5 out of 64 shards needs a row or two of each, a page of 1,000 about 16. A page is made in rounds: take
some rows of every shard, sort them together (runs in order, which list.sort merges at C speed: 5 times faster than
heapq.merge), and go on with those shards only whose rows ended before the page did.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from kvtcp.constants import MERGE_ROWS
from kvtcp.storage.freeze import Frozen
from kvtcp.storage.table import LiveRow, Table

PageRow = list[bytes | int | None]  # [key, value or None, rev, ttl_ms or None]
FrozenRow = tuple[int, bytes, bytes, int, int | None]  # shard, key, value, rev, deadline_ms or None
ROW_BYTES = 24  # counted for revision, ttl and framing of a row


def merge_page(
    tables: Sequence[Table],
    lower: bytes,
    upper: bytes | None,
    limit: int,
    bytes_max: int,
    reverse: bool,
    keys_only: bool,
    stamp_ms: int,
) -> tuple[list[PageRow], bool]:
    """The first visible rows of [lower, upper) over all `tables` (in descending order with `reverse`): at most `limit`
    (>= 1), and at most `bytes_max` bytes unless it is one row alone. The second result tells that rows were cut off.
    """
    assert limit >= 1, "a page has room for at least one row"
    rows = _first_rows(tables, lower, upper, limit + 1, reverse, stamp_ms)
    page: list[PageRow] = []
    page_bytes = 0
    for key, value, rev, ttl_ms in rows[:limit]:
        page_bytes += len(key) + ROW_BYTES + (0 if keys_only else len(value))
        if page and page_bytes > bytes_max:
            break
        page.append([key, None if keys_only else value, rev, ttl_ms])
    return page, len(page) < len(rows)


def _first_rows(
    tables: Sequence[Table], lower: bytes, upper: bytes | None, wanted: int, reverse: bool, stamp_ms: int
) -> list[LiveRow]:
    """The first `wanted` rows over all tables, fewer if there are no more."""
    rows: list[LiveRow] = []
    # tables that may have more rows than were taken, each with the bounds of the rest
    open_tables = [(table, lower, upper) for table in tables]
    while open_tables:
        # a little more than the average share, so that the second round has few tables left
        share = (wanted + wanted // 2) // len(tables) + 2
        rest: list[tuple[Table, bytes, bytes | None]] = []
        for table, low, high in open_tables:
            taken = table.rows(low, high, share, reverse, stamp_ms)
            rows += taken
            if len(taken) == share:
                last = taken[-1][0]
                rest.append((table, low, last) if reverse else (table, last + b"\0", high))
        rows.sort(reverse=reverse)
        del rows[wanted:]
        if len(rows) == wanted:
            # the rest of a table begins behind its bound; it matters only if that is before the last row of the page
            end = rows[-1][0]
            rest = [r for r in rest if (r[2] is not None and r[2] > end if reverse else r[1] <= end)]
        open_tables = rest
    return rows


def merge_frozen(frozens: Sequence[Frozen], rows_per_slice: int = MERGE_ROWS) -> Iterator[FrozenRow]:
    """All rows of frozen shards in order of their keys. A step takes at most `rows_per_slice` rows of one shard, the
    first step of every shard. Every one is read to its end, and with that closed.
    """
    for key, shard, value, rev, deadline_ms in heapq.merge(*(_rows_of(frozen, rows_per_slice) for frozen in frozens)):
        yield shard, key, value, rev, deadline_ms


def _rows_of(frozen: Frozen, rows_per_slice: int) -> Iterator[tuple[bytes, int, bytes, int, int | None]]:
    while rows := frozen.next_rows(rows_per_slice):
        for key, value, rev, deadline_ms in rows:
            yield key, frozen.shard, value, rev, deadline_ms
