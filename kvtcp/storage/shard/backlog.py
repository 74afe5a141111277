"""Kept entries: what a node can still ship to a member that lacks it.

Pure. After a crash the members of a shard may differ by the entries that were under way, so every entry is kept until
the coordinator says that it is committed: in batches, in order, each with the ordinal of the link that commits it.
Entries from *before* the present link have ordinal 0. Entries that another member *shipped* have no ordinal: that an
item of the link is committed says nothing of them. They stay until the next entry of their shard is added, and go with
it.

The windows of the links bound what may be uncommitted. A shard that cannot commit holds back the ordinal of all others,
so when `bytes_max` is exceeded, of each shard only as much is kept as a window can hold: its items, and its bytes with
the item that crosses them, which may be the last one and the largest there is.

What is committed is *recent* for a while: the newest `recent_bytes_max` of it, for nodes that were away. A batch of it
is one string, by `marshal`: the same entries one by one, by the hundred thousand, take twice the memory. Nothing is
done for a single entry until somebody asks (`look_up`): then an index is made, and kept up as long as it is used; the
batches that are in it are lists.

What is from before the link is kept by shard: a node that was away begins with very many entries, and each of its
shards is set aside when it learns what it missed. Out of the batches that took a tenth of a second for each of them.

What is too old is looked for in passes over all batches, newest first, a slice with each `add`, and what is committed
is moved in slices too: a million entries at once would hold the node up for a quarter of a second.
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
from kvtcp.storage.shard.copy import Logged

Batch = tuple[int, int, list[Logged]]  # ordinal, bytes, entries

_MARSHAL_VERSION: Final = 2  # without references between objects, which cost time to look for
INDEX_IDLE_COMMITS: Final = 4_096  # batches of the link without a question after which the index is dropped


class _OfShard:
    """Entries of one shard, in order."""

    __slots__ = ("bytes", "entries")

    def __init__(self) -> None:
        self.entries: deque[Logged] = deque()
        self.bytes = 0

    def add(self, entries: list[Logged]) -> None:
        """More of them."""
        self.entries += entries
        self.bytes += _size(entries)

    def cut(self) -> list[Logged]:
        """Take out those that a window cannot hold, oldest first."""
        over: list[Logged] = []
        while len(self.entries) > WINDOW_ITEMS_MAX or self.bytes > KEPT_SHARD_BYTES_MAX:
            entry = self.entries.popleft()
            self.bytes -= len(entry[4])
            over.append(entry)
        return over


class KeptEntries:
    """A queue of batches. `bytes` is what the packed entries have together that may be uncommitted, without those that
    were shipped; `recent_bytes` counts the committed ones with RECENT_ENTRY_BYTES for each."""

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX, recent_bytes_max: int = RECENT_BYTES_MAX) -> None:
        self.bytes = 0
        self.recent_bytes = 0
        # In the order of `add`, over all three; ordinals never decrease. The first two are empty but during a pass.
        self._older: deque[Batch] = deque()  # that the pass did not look at yet
        self._looked_at: deque[Batch] = deque()  # what it let stay
        self._batches: deque[Batch] = deque()
        self._room: dict[int, list[int]] = {}  # of the pass: shard -> items and bytes that may still be uncommitted
        self._bytes_max = bytes_max  # as asked for
        self._look_bytes = bytes_max  # above it a pass begins
        self._before: dict[int, _OfShard] = {}  # from before the link: older than all else of their shard
        self._shipped: dict[int, _OfShard] = {}  # that no ordinal commits: newer than all else of their shard
        self._recent: deque[tuple[int, list[Logged] | bytes]] = deque()  # bytes as counted, entries
        self._recent_first = 0  # number of the first one of them, counted over all there ever were
        self._recent_bytes_max = recent_bytes_max
        self._void: dict[int, int] = {}  # shard -> its entries in recent batches below this number are of no use
        self._index: dict[int, dict[int, Logged]] | None = None  # of `look_up`: shard -> number -> entry
        self._indexed = 0  # recent batches below this number are in it
        self._is_index_whole = False
        self._unasked = 0  # commits since the last question

    def add(self, ordinal: int, entries: list[Logged]) -> None:
        """The entries of a batch, in order."""
        if self._index is not None:
            self._add_to_index(entries)
        if self._shipped:
            entries = self._behind_shipped(entries)
        size = _size(entries)
        self._batches.append((ordinal, size, entries))
        self.bytes += size
        if self._older:
            self._go_on(len(entries))
        elif self.bytes > self._look_bytes:
            self._older, self._batches = self._batches, self._older
            self._room = {}
            self._go_on(len(entries))

    def add_shipped(self, shard: int, entries: list[Logged]) -> None:
        """Entries of one shard, in order, that came from another member. Those that a window cannot hold are
        committed."""
        if self._index is not None:
            self._add_to_index(entries)
        mine = self._shipped.setdefault(shard, _OfShard())
        mine.add(entries)
        over = mine.cut()
        if over:
            self._add_recent(_size(over), over)

    def _behind_shipped(self, entries: list[Logged]) -> list[Logged]:
        """The entries of a batch behind those of their shards that were shipped."""
        before: list[Logged] = []
        for shard in {entry[0] for entry in entries} & self._shipped.keys():
            before += self._shipped.pop(shard).entries
        return before + entries

    def commit(self, ordinal: int) -> dict[int, int]:
        """What is committed up to this ordinal is only recent from now on; shard -> its last number among that. What is
        left of very much is moved with the next calls."""
        last: dict[int, int] = {}
        left = 2 * KEPT_PASS_ENTRIES  # more than a batch adds
        while self._before and ordinal >= 0 and left > 0:
            shard = next(iter(self._before))
            entries = list(self._before[shard].entries)
            last[shard] = entries[-1][2]
            left -= len(entries)
            self._add_recent(self._take_before(shard), entries)
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
        """Ordinals begin anew: all that is here is from before."""
        before: dict[int, list[Logged]] = {}
        for _, _, entries in self._all():
            for entry in entries:
                before.setdefault(entry[0], []).append(entry)
        self._shipped = {}
        self._before = {}
        for shard, entries in before.items():
            self._before[shard] = mine = _OfShard()
            mine.add(entries)
        self._replace([])
        if self.bytes > self._bytes_max:
            for mine in self._before.values():
                over = mine.cut()
                self.bytes -= _size(over)
                if self._index is not None:
                    self._drop_from_index(over)

    def _take_before(self, shard: int) -> int:
        """Those of a shard from before the link are not there any more. Returns their bytes."""
        mine = self._before.pop(shard, None)
        if mine is None:
            return 0
        self.bytes -= mine.bytes
        return mine.bytes

    def forget(self, shard: int) -> None:
        """The copy of a shard is not what it was."""
        self._shipped.pop(shard, None)
        self._take_before(shard)
        self._void[shard] = self._recent_first + len(self._recent)
        if self._index is not None:
            self._index.pop(shard, None)
        batches = (self._older, self._looked_at, self._batches)
        stay = [(ordinal, [e for e in entries if e[0] != shard]) for ordinal, _, entries in chain(*batches)]
        self._replace([(ordinal, sum([len(e[4]) for e in entries]), entries) for ordinal, entries in stay if entries])

    def set_aside(self, shard: int) -> None:
        """The copy is being learned: what it has so far counts as if it were shipped, so no ordinal of this link says
        that it is committed. The coordinator tells ordinals by what members have, and this one is none."""
        entries = self.of_shard(shard)
        if entries:
            self._shipped.pop(shard, None)
            self._take_before(shard)
            batches = (self._older, self._looked_at, self._batches)
            stay = [(ordinal, [e for e in found if e[0] != shard]) for ordinal, _, found in chain(*batches)]
            self._replace([(ordinal, sum([len(e[4]) for e in found]), found) for ordinal, found in stay if found])
            self.add_shipped(shard, entries)

    def of_shard(self, shard: int) -> list[Logged]:
        """The entries of a shard that may be uncommitted, in order."""
        found = [mine.entries for mine in (self._before.get(shard),) if mine is not None]
        batches = chain(self._older, self._looked_at, self._batches)
        found.append(deque([entry for _, _, entries in batches for entry in entries if entry[0] == shard]))
        found += [mine.entries for mine in (self._shipped.get(shard),) if mine is not None]
        return list(chain(*found))

    def _all(self) -> Iterator[Batch]:
        before, shipped = (
            [(0, mine.bytes, list(mine.entries)) for mine in kept.values()] for kept in (self._before, self._shipped)
        )
        return chain(before, self._older, self._looked_at, self._batches, shipped)

    def _replace(self, batches: list[Batch]) -> None:
        """From now on it has these, and no pass is under way."""
        self._older, self._looked_at, self._batches = deque(), deque(), deque(batches)
        self.bytes = sum([size for _, size, _ in batches]) + sum([mine.bytes for mine in self._before.values()])

    # --- recent entries, and the index ----------------------------------------------------------------

    def look_up(self, shard: int) -> Mapping[int, Logged]:
        """The entries of a shard by number: those that may be uncommitted and the recent ones. There may be gaps."""
        while not self.index_some():
            pass
        assert self._index is not None, "it is whole now"
        return self._index.get(shard, {})

    def index_some(self, entries_max: int = KEPT_PASS_ENTRIES) -> bool:
        """Go on with the index that `look_up` needs, about so many entries; true when it is whole."""
        self._unasked = 0
        if self._index is None:
            self._index = {}
            self._indexed = self._recent_first
            self._is_index_whole = False
        while not self._is_index_whole and entries_max > 0:
            self._indexed = max(self._indexed, self._recent_first)
            place = self._indexed - self._recent_first
            if place < len(self._recent):
                size, found = self._recent[place]
                entries: list[Logged] = marshal.loads(found) if isinstance(found, bytes) else found
                self._recent[place] = (size, entries)
                self._add_to_index([entry for entry in entries if self._void.get(entry[0], 0) <= self._indexed])
                self._indexed += 1
                entries_max -= len(entries)
            else:
                for _, _, newest in self._all():
                    self._add_to_index(newest)
                self._is_index_whole = True
        return self._is_index_whole

    def _add_to_index(self, entries: list[Logged]) -> None:
        index = self._index
        assert index is not None, "there is one"
        for entry in entries:
            index.setdefault(entry[0], {})[entry[2]] = entry

    def _drop_from_index(self, entries: list[Logged]) -> None:
        """They are not kept any more. (An entry may be here twice, by a snapshot and by the log.)"""
        assert self._index is not None, "there is one"
        for entry in entries:
            mine = self._index.get(entry[0])
            if mine is not None and mine.get(entry[2]) is entry:
                del mine[entry[2]]

    def _add_recent(self, size: int, entries: list[Logged]) -> None:
        size += RECENT_ENTRY_BYTES * len(entries)
        self._recent.append((size, entries if self._index is not None else marshal.dumps(entries, _MARSHAL_VERSION)))
        self.recent_bytes += size
        while self.recent_bytes > self._recent_bytes_max:
            size, oldest = self._recent.popleft()
            self._recent_first += 1
            self.recent_bytes -= size
            if self._index is not None and not isinstance(oldest, bytes):
                self._drop_from_index(oldest)

    # --- passes ---------------------------------------------------------------------------------------

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
                elif self._index is not None:
                    self._drop_from_index([entry])
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
        self._look_bytes = max(self._bytes_max, 2 * self.bytes)


def _size(entries: list[Logged]) -> int:
    """The bytes of the packed entries."""
    return sum([len(entry[4]) for entry in entries])
