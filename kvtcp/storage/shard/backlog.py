"""Backlog: the entries that a node can still ship to a member that lacks them.

Pure. After a crash the members of a shard may differ by the entries that were in flight. So a node keeps every entry
until the coordinator announces it as committed, and the newest committed ones a little longer. Two questions are
answered: which entries of a shard may be uncommitted (`of_shard`), and which entry has a given number (`look_up`).

An entry is in exactly one of four places. Of one shard they hold, from the oldest entry to the newest:

    recent      committed; the newest `recent_bytes_max` bytes of it, for nodes that were away
    before      from before the present link, by shard; committed by ordinal 0
    batches     from the present link, in order; each batch has the ordinal that commits it
    shipped     from another member, by shard; no ordinal commits it, for an ordinal counts items of the link only. A
                shipped entry moves into the next batch with an entry of its shard, and is committed with that batch

**The bound.** A shard that cannot commit holds back the ordinal of all others, so the batches may grow without limit.
When `bytes_max` is exceeded, a pass over all batches keeps of each shard only what the window of a link can hold; older
entries are committed, whatever the ordinal says. A window holds its items, and its bytes with the item that crosses
them, which may be the largest there is.

**No long pause.** All work on many entries is done in slices: a pass proceeds with each `add`, a long commit with each
`commit`, the index with each `index_some`. A million entries at once would stop the node for a quarter of a second.

**Cost.** The path of a batch (`add`, `commit`) has no Python loop over entries, only comprehensions; these read fields
as `entry[n]`, which takes two thirds of the time of unpacking five. A recent batch is one string, by `marshal`: as
tuples the same entries take twice the memory.
"""

from __future__ import annotations

import marshal
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Final

from kvtcp.constants import (
    KEPT_BYTES_MAX,
    KEPT_PASS_ENTRIES,
    KEPT_SHARD_BYTES_MAX,
    RECENT_BYTES_MAX,
    RECENT_ENTRY_BYTES,
    WINDOW_ITEMS_MAX,
)
from kvtcp.storage.shard.table import Logged

AppliedBatch = tuple[int, int, list[Logged]]  # ordinal, bytes, entries

_MARSHAL_VERSION: Final = 2  # without references between objects, which cost time to look for
INDEX_IDLE_COMMITS: Final = 4_096  # commits without a question after which the index is dropped


class _OfShard:
    """Entries of one shard, in order."""

    __slots__ = ("bytes", "entries")

    def __init__(self) -> None:
        self.entries: deque[Logged] = deque()
        self.bytes = 0  # of the packed entries

    def add(self, entries: list[Logged]) -> None:
        """Append newer entries."""
        self.entries += entries
        self.bytes += _size(entries)

    def cut(self) -> list[Logged]:
        """Remove the oldest entries, as far as a window cannot hold them; returns them."""
        over: list[Logged] = []
        while len(self.entries) > WINDOW_ITEMS_MAX or self.bytes > KEPT_SHARD_BYTES_MAX:
            entry = self.entries.popleft()
            self.bytes -= len(entry[4])
            over.append(entry)
        return over


class Backlog:
    """Entries by shard and by age. `bytes` counts the packed entries that may be uncommitted, without shipped ones;
    `recent_bytes` counts the committed ones, with RECENT_ENTRY_BYTES added for each."""

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX, recent_bytes_max: int = RECENT_BYTES_MAX) -> None:
        self.bytes = 0
        self.recent_bytes = 0
        # Batches in the order of `add`, oldest first, over these three; ordinals never decrease. Without a pass all are
        # in the last one. A pass moves batches from the end of `_older` to the front of `_looked_at`: three queues, so
        # that none is ever changed in its middle, and none is copied at once.
        self._older: deque[AppliedBatch] = deque()  # not yet looked at by the pass
        self._looked_at: deque[AppliedBatch] = deque()  # what the pass let stay
        self._batches: deque[AppliedBatch] = deque()  # added since the pass began
        self._room: dict[int, list[int]] = {}  # of the pass: shard -> items and bytes its window still holds
        self._bytes_max = bytes_max
        self._look_bytes = bytes_max  # a pass begins above it; >= bytes_max
        self._before: dict[int, _OfShard] = {}  # none is empty
        self._shipped: dict[int, _OfShard] = {}  # none is empty
        self._recent: deque[tuple[int, list[Logged] | bytes]] = deque()  # bytes as counted; entries, or marshalled ones
        self._recent_first = 0  # number of recent[0], counted over all recent batches there ever were
        self._recent_bytes_max = recent_bytes_max
        self._void: dict[int, int] = {}  # shard -> its entries in recent batches below this number are of a lost copy
        self._index: dict[int, dict[int, Logged]] | None = None  # shard -> number -> entry; None = nobody asked lately
        self._indexed = 0  # recent batches below this number are in the index
        self._is_index_whole = False  # the index has all recent batches and all that may be uncommitted
        self._unasked = 0  # commits since the last question

    def add(self, ordinal: int, entries: list[Logged]) -> None:
        """Append the entries of a batch, in order, which `ordinal` commits."""
        self._add_to_index(entries)
        if self._shipped:
            entries = self._behind_shipped(entries)
        size = _size(entries)
        self._batches.append((ordinal, size, entries))
        self.bytes += size
        if self._older:
            self._continue_pass(len(entries))
        elif self.bytes > self._look_bytes:
            self._older, self._batches = self._batches, self._older
            self._room = {}
            self._continue_pass(len(entries))

    def add_shipped(self, shard: int, entries: list[Logged]) -> None:
        """Append entries of one shard, in order, that another member shipped. Those beyond a window are committed."""
        self._add_to_index(entries)
        shipped = self._shipped.setdefault(shard, _OfShard())
        shipped.add(entries)
        over = shipped.cut()
        if over:
            self._add_recent(_size(over), over)

    def _behind_shipped(self, entries: list[Logged]) -> list[Logged]:
        """The entries of a batch, behind the shipped ones of the same shards, which leave `_shipped`."""
        before: list[Logged] = []
        for shard in {entry[0] for entry in entries} & self._shipped.keys():
            before += self._shipped.pop(shard).entries
        return before + entries

    def commit(self, ordinal: int) -> dict[int, int]:
        """Move the entries that `ordinal` commits to the recent ones; returns shard -> its last number among them. A
        long commit is continued by the next calls: their ordinals are not lower."""
        last: dict[int, int] = {}
        left = 2 * KEPT_PASS_ENTRIES  # more than a batch adds, so the rest shrinks
        while self._before and ordinal >= 0 and left > 0:
            shard, before = next(iter(self._before.items()))
            del self._before[shard]
            entries = list(before.entries)
            self.bytes -= before.bytes
            left -= len(entries)
            last[shard] = entries[-1][2]
            self._add_recent(before.bytes, entries)
        for batches in (self._older, self._looked_at, self._batches):
            while batches and batches[0][0] <= ordinal and left > 0:
                _, size, entries = batches.popleft()
                self.bytes -= size
                left -= len(entries)
                last |= {entry[0]: entry[2] for entry in entries}
                self._add_recent(size, entries)
        if self._looked_at and not self._older:
            self._end_pass()
        if self._index is not None:
            self._unasked += 1
            if self._unasked > INDEX_IDLE_COMMITS:
                self._index = None
        return last

    def new_link(self) -> None:
        """Ordinals begin at 1 again: all entries that may be uncommitted are from before the link now.

        They are sorted by shard here, once. A node that was away has very many, and then sets its shards aside one by
        one, as each begins to learn; filtering all batches took a tenth of a second for each shard.
        """
        by_shard: dict[int, list[Logged]] = {}
        for _, _, entries in self._all():
            for entry in entries:
                by_shard.setdefault(entry[0], []).append(entry)
        self._shipped = {}
        self._before = {}
        for shard, entries in by_shard.items():
            self._before[shard] = before = _OfShard()
            before.add(entries)
        self._replace([])
        if self.bytes > self._bytes_max:
            for before in self._before.values():
                over = before.cut()
                self.bytes -= _size(over)
                self._drop_from_index(over)

    def forget(self, shard: int) -> None:
        """Drop all entries of a shard: its copy was replaced or removed, and they are not of the next one."""
        self._take_out(shard)
        # recent batches are not searched for its entries: too many. `index_some` passes them over
        self._void[shard] = self._recent_first + len(self._recent)
        if self._index is not None:
            self._index.pop(shard, None)

    def set_aside(self, shard: int) -> None:
        """Treat the entries of a shard as shipped, because its copy is about to learn. The coordinator derives the
        ordinals of a link from members, and a learner is none: no ordinal commits an entry that it has so far."""
        entries = self._take_out(shard)
        if entries:
            self.add_shipped(shard, entries)

    def of_shard(self, shard: int) -> list[Logged]:
        """The entries of a shard that may be uncommitted, in order."""
        batches = chain(self._older, self._looked_at, self._batches)
        found = [entry for _, _, entries in batches for entry in entries if entry[0] == shard]
        before, shipped = self._before.get(shard), self._shipped.get(shard)
        return [*(before.entries if before else ()), *found, *(shipped.entries if shipped else ())]

    def _take_out(self, shard: int) -> list[Logged]:
        """Remove the entries of a shard that may be uncommitted; returns them in order."""
        entries = self.of_shard(shard)
        if entries:
            self._before.pop(shard, None)
            self._shipped.pop(shard, None)
            stay: list[AppliedBatch] = []
            for ordinal, _, found in chain(self._older, self._looked_at, self._batches):
                others = [entry for entry in found if entry[0] != shard]
                if others:
                    stay.append((ordinal, _size(others), others))
            self._replace(stay)
        return entries

    def _all(self) -> Iterator[AppliedBatch]:
        before, shipped = (
            [(0, mine.bytes, list(mine.entries)) for mine in place.values()] for place in (self._before, self._shipped)
        )
        return chain(before, self._older, self._looked_at, self._batches, shipped)

    def _replace(self, batches: list[AppliedBatch]) -> None:
        """Exchange all batches; a pass under way ends without a result, and may begin again."""
        self._older, self._looked_at, self._batches = deque(), deque(), deque(batches)
        self.bytes = sum([size for _, size, _ in batches]) + sum([mine.bytes for mine in self._before.values()])

    # --- recent entries, and the index ----------------------------------------------------------------

    def look_up(self, shard: int) -> Mapping[int, Logged]:
        """The entries of a shard by number: those that may be uncommitted and the recent ones. There may be gaps."""
        while not self.index_some():
            pass
        assert self._index is not None, "the index is whole now"
        return self._index.get(shard, {})

    def index_some(self, entries_max: int = KEPT_PASS_ENTRIES) -> bool:
        """Extend the index that `look_up` needs by about `entries_max` entries; true when it is whole."""
        self._unasked = 0
        if self._index is None:
            self._index = {}
            self._indexed = self._recent_first
            self._is_index_whole = False
        while not self._is_index_whole and entries_max > 0:
            self._indexed = max(self._indexed, self._recent_first)  # the oldest batches may be gone since the last call
            place = self._indexed - self._recent_first
            if place < len(self._recent):
                size, found = self._recent[place]
                entries: list[Logged] = marshal.loads(found) if isinstance(found, bytes) else found
                # stored as a list: when the batch gets too old, `_drop_from_index` needs the indexed objects themselves
                self._recent[place] = (size, entries)
                self._add_to_index([entry for entry in entries if self._void.get(entry[0], 0) <= self._indexed])
                self._indexed += 1
                entries_max -= len(entries)
            else:
                # What may be uncommitted comes last, and in one piece: the windows bound it, and a commit between two
                # slices moves it to the recent batches, where it is found.
                for _, _, newest in self._all():
                    self._add_to_index(newest)
                self._is_index_whole = True
        return self._is_index_whole

    def _add_to_index(self, entries: list[Logged]) -> None:
        index = self._index
        if index is not None:
            for entry in entries:
                index.setdefault(entry[0], {})[entry[2]] = entry

    def _drop_from_index(self, entries: list[Logged]) -> None:
        index = self._index
        if index is not None:
            for entry in entries:
                numbers = index.get(entry[0])
                # an entry may be here twice, from a snapshot and from the log: the other one stays
                if numbers is not None and numbers.get(entry[2]) is entry:
                    del numbers[entry[2]]

    def _add_recent(self, size: int, entries: list[Logged]) -> None:
        size += RECENT_ENTRY_BYTES * len(entries)
        self._recent.append((size, entries if self._index is not None else marshal.dumps(entries, _MARSHAL_VERSION)))
        self.recent_bytes += size
        while self.recent_bytes > self._recent_bytes_max:
            size, oldest = self._recent.popleft()
            self._recent_first += 1
            self.recent_bytes -= size
            if not isinstance(oldest, bytes):
                self._drop_from_index(oldest)

    # --- passes ---------------------------------------------------------------------------------------

    def _continue_pass(self, added: int) -> None:
        """Look at the next slice of batches, newest first: several times what was `added`, so the pass comes to an end.

        The newest entries of a shard are those that its window may hold. Once its room is used up, everything older is
        committed, and is dropped.
        """
        older, room = self._older, self._room
        left = max(KEPT_PASS_ENTRIES, 4 * added)
        while older and left > 0:
            ordinal, size, entries = older.pop()
            left -= len(entries)
            self.bytes -= size
            stay: list[Logged] = []
            over: list[Logged] = []
            for entry in reversed(entries):
                window = room.setdefault(entry[0], [WINDOW_ITEMS_MAX, KEPT_SHARD_BYTES_MAX])
                if window[0] > 0 and window[1] > 0:
                    window[0] -= 1
                    window[1] -= len(entry[4])
                    stay.append(entry)
                else:
                    over.append(entry)
            self._drop_from_index(over)
            if stay:
                stay.reverse()
                size = _size(stay)
                self._looked_at.appendleft((ordinal, size, stay))
                self.bytes += size
        if not older:
            self._end_pass()

    def _end_pass(self) -> None:
        self._looked_at += self._batches
        self._batches, self._looked_at = self._looked_at, deque()
        # If so much really may be uncommitted, the next pass would find nothing: not before twice as much is here.
        self._look_bytes = max(self._bytes_max, 2 * self.bytes)


def _size(entries: list[Logged]) -> int:
    """The bytes of the packed entries."""
    return sum([len(entry[4]) for entry in entries])
