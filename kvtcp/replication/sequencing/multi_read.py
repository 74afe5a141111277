"""Reads over several shards: pages of a scan, counts, mget. One cut, many nodes, one answer.

Pure. The sequencer queues the parts of a MultiRead to all links concerned in one synchronous step with one stamp; since
every link is in order, the parts together see one point in time. The read is answered when every part has arrived and
every shard has committed all writes queued before it. If a link is lost the whole read starts again (a new attempt):
parts of different attempts would belong to different cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from operator import itemgetter
from typing import Any, Final, Protocol

from kvtcp.constants import PAGE_BYTES_MAX
from kvtcp.errors import Code, text_of
from kvtcp.protocol.messages import make_cursor
from kvtcp.protocol.operations import ANY_KEY, COUNT, MGET, PAGE

Numbers = Sequence[int]
SPARE_ROWS: Final = 8  # rows to ask a node for beyond its likely part of a page: for small pages
SPREAD_ROWS: Final = 500  # rows of a page for which it is worth asking one more node
KEY_OVERHEAD_BYTES: Final = 32  # size of a key of an mget in a batch beyond its bytes
Columns = Sequence[Any]  # a node's part of a page: keys, values or nil, revs, ttls_ms or nil, whether it was cut
Row = tuple[bytes, bytes | None, int, int | None]  # key, value or nil, rev, ttl_ms or nil


class Holder(Protocol):
    """A shard of a read over several."""

    commit: int

    def hold(self, needed: int, sink: Any, token: Any, value: Any) -> None:
        """Keep an answer until `needed` is committed; without a sink the token is a MultiRead, to be released then."""


class MultiRead:
    """One request over `shards`. `build` makes a node's item and its size, `merge` the result from the parts."""

    __slots__ = (
        "attempt", "build", "bytes", "done", "error", "merge", "missing",
        "movable", "moved", "needed", "parts", "shards", "sink", "spread", "token",
    )  # fmt: skip

    def __init__(
        self, shards: Numbers, sink: Any, token: Any, build: Callable[[list[int]], tuple[tuple[Any, ...], int]],
        merge: Callable[[list[Any]], Any], size: int, spread: int = 1,
    ) -> None:  # fmt: skip
        self.shards = shards
        self.spread = spread  # number of nodes worth sharing it among, if they are idle
        self.sink = sink
        self.token = token
        self.build = build
        self.merge = merge
        self.bytes = size  # of its keys or bounds, counted while it waits
        self.attempt = 0  # parts of other attempts are ignored
        self.parts: list[Any] = []  # results of this attempt, by index
        self.missing = 0  # parts that have not arrived
        self.needed: dict[Holder, int] = {}  # shard -> number that must be committed before the answer
        self.movable = True  # whether another node could answer as well
        self.moved = False  # started again because a node was silent: only once, or slow nodes would keep it for ever
        self.error: list[Any] | None = None  # [code, message, details] if a part is one
        self.done = False  # all parts of an attempt arrived, or it failed

    def start(self, parts: int, needed: dict[Holder, int]) -> None:
        """Begin an attempt of so many parts."""
        self.attempt += 1
        self.parts = [None] * parts
        self.missing = parts
        self.needed = needed
        self.error = None

    def cancel_attempt(self) -> None:
        """End the attempt: parts that still arrive are ignored."""
        self.attempt += 1

    def take(self, attempt: int, index: int, result: Any) -> bool:
        """Take a part; true if it was the last one."""
        if attempt != self.attempt or self.done:
            return False
        if type(result) is list and len(result) == 3 and type(result[0]) is int and type(result[2]) is dict:
            self.error = result
        self.parts[index] = result
        self.missing -= 1
        self.done = self.missing == 0
        return self.done

    def release(self) -> None:
        """Answer if every entry that the parts show is committed, else wait for the first shard that is behind."""
        for shard, needed in self.needed.items():
            if shard.commit < needed:
                shard.hold(needed, None, self, None)
                return
        self.answer()

    def answer(self) -> None:
        """Give the sink the merged result, or the error of a part."""
        if self.error is not None:
            self.sink.fail(self.token, self.error[0], *text_of(self.error[1], self.error[2]))
        else:
            self.sink.reply(self.token, self.merge(self.parts))

    def fail(self, code: Code, text: str) -> None:
        """Refuse the read."""
        self.done = True
        self.sink.fail(self.token, code, text, {})


def page_read(
    shards: Numbers, lower: bytes, upper: bytes | None, limit: int, reverse: bool, keys_only: bool, sink: Any,
    token: Any,
) -> MultiRead:  # fmt: skip
    """One page of a scan; the result is `[rows, cursor or nil]`."""
    size = len(lower) + len(upper or b"")

    def build(numbers: list[int]) -> tuple[tuple[Any, ...], int]:
        rows = _share(limit, len(numbers), len(shards))
        return (PAGE, numbers, lower, upper, rows, reverse, keys_only), size + 3 * len(numbers)

    return MultiRead(
        shards, sink, token, build, lambda runs: merge_runs(runs, limit, reverse), size, limit // SPREAD_ROWS
    )


def _share(limit: int, some: int, shards: int) -> int:
    """Rows to ask a node for that has `some` of the shards. Keys are spread by their hash, so it has about that part of
    the page's rows, and seldom two standard deviations and a few rows more; then the page is shorter."""
    part = some / shards
    mean = limit * part
    return min(limit, int(mean + 2 * sqrt(mean * (1 - part))) + SPARE_ROWS)


def merge_runs(runs: Sequence[Columns], limit: int, reverse: bool) -> list[Any]:
    """One page from the sorted runs of the nodes, as `[rows, cursor or nil]`, each row `(key, value, rev, ttl_ms)`.

    A node may have more rows beyond the last key of a run that was cut, so the page ends at the smallest such key (the
    largest, if reversed). It also ends at `limit` rows and at PAGE_BYTES_MAX; it has a row if there is one.
    """
    rows: list[Row] = []
    for keys, values, revs, ttls_ms, _ in runs:
        nothing = [None] * len(keys)
        rows += zip(keys, values or nothing, revs, ttls_ms or nothing, strict=True)
    ends = [keys[-1] for keys, _, _, _, is_cut in runs if is_cut and keys]
    more = bool(ends)
    if len(runs) > 1:
        rows.sort(key=itemgetter(0), reverse=reverse)  # timsort merges the runs
        if ends:
            end = max(ends) if reverse else min(ends)
            while rows[-1][0] < end if reverse else rows[-1][0] > end:
                rows.pop()
    if len(rows) > limit:
        rows, more = rows[:limit], True
    if len(runs) > 1:
        fitting = _fitting(rows)
        if fitting < len(rows):
            rows, more = rows[:fitting], True
    return [rows, make_cursor(rows[-1][0], reverse) if more and rows else None]


def _fitting(rows: Sequence[Row]) -> int:
    """The number of rows within the bytes of a page; the first one always is."""
    if sum([len(row[0]) + len(row[1] or b"") for row in rows]) <= PAGE_BYTES_MAX:
        return len(rows)
    size = 0
    for number, row in enumerate(rows):
        size += len(row[0]) + len(row[1] or b"")
        if number and size > PAGE_BYTES_MAX:
            return number
    return len(rows)


def count_read(shards: Numbers, lower: bytes, upper: bytes | None, sink: Any, token: Any) -> MultiRead:
    """The number of live keys in the range."""
    size = len(lower) + len(upper or b"")

    def build(numbers: list[int]) -> tuple[tuple[Any, ...], int]:
        return (COUNT, numbers, lower, upper), size + 3 * len(numbers)

    return MultiRead(shards, sink, token, build, sum, size)


def any_key_read(shards: Numbers, number: int, sink: Any, token: Any) -> MultiRead:
    """One of all live keys, None if there is none; equally likely each if the number is."""

    def build(numbers: list[int]) -> tuple[tuple[Any, ...], int]:
        return (ANY_KEY, numbers, number), 3 * len(numbers)

    def merge(parts: list[Any]) -> Any:  # of each node: [a key or nil, how many keys it has]
        found = [(key, keys) for key, keys in parts if key is not None]
        place = number % sum(keys for _, keys in found) if found else 0
        for key, keys in found:
            if place < keys:
                return key
            place -= keys
        return None

    return MultiRead(shards, sink, token, build, merge, 0)


def mget_read(keys: Sequence[bytes], shard_numbers: Sequence[int], sink: Any, token: Any) -> MultiRead:
    """Many keys at one cut; the result has one cell `[value, rev, ttl_ms]` or nil for each key, in order."""
    by_shard: dict[int, list[int]] = {}
    for index, number in enumerate(shard_numbers):
        by_shard.setdefault(number, []).append(index)
    parts: list[list[int]] = []  # per part of the current attempt: the places of its keys

    def build(numbers: list[int]) -> tuple[tuple[Any, ...], int]:
        if multi.attempt != built[0]:
            built[0] = multi.attempt
            parts.clear()
        places = [place for number in numbers for place in by_shard[number]]
        parts.append(places)
        wanted = [(shard_numbers[place], keys[place]) for place in places]
        # a pair is an array of its own: counted, so that a batch stays within the decoder's limit on containers
        return (MGET, wanted), sum(KEY_OVERHEAD_BYTES + len(keys[place]) for place in places)

    def merge(results: list[Any]) -> list[Any]:
        merged: list[Any] = [None] * len(keys)
        for places, cells in zip(parts, results, strict=True):
            for place, cell in zip(places, cells, strict=True):
                merged[place] = cell
        return merged

    built = [0]
    size = sum(map(len, keys)) + KEY_OVERHEAD_BYTES * len(keys)
    multi = MultiRead(list(by_shard), sink, token, build, merge, size)
    return multi
