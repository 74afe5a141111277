"""Write results: what the writes came to that may be uncommitted, for the coordinator to ask again.

Pure. One member of a shard answers a write; if it is lost before its answer came, another one is asked (RESULTS_OF).
Every member evaluates every operation at the same position, so it knows the same result. A put's result is its number,
which needs no asking and is not kept: the path of every put does nothing here.

Of each shard the results above its last committed number are kept, at most as many as a window holds: what is older
than that is committed. Values among them may be large and nowhere else any more; of more than WRITE_RESULTS_BYTES_MAX
the oldest are forgotten, as if the node had been restarted: all of it is in memory only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvtcp.constants import RESULTS_BYTES_MAX, WINDOW_ITEMS_MAX, WRITE_RESULTS_BYTES_MAX
from kvtcp.storage.shard.transaction import result_bytes


class WriteResults:
    """Results by shard and number."""

    __slots__ = ("_bytes", "_shards")

    def __init__(self) -> None:
        self._shards: dict[int, deque[tuple[int, Any]]] = {}  # (number, result) in order
        self._bytes: dict[int, int] = {}  # of large results, by shard; more than those that are still there

    def __bool__(self) -> bool:
        """Whether any are kept."""
        return bool(self._shards)

    def add(self, results: Iterable[tuple[int, int, Any]]) -> None:
        """(shard, number, result) of new writes, in order."""
        shards = self._shards
        for shard, seq, result in results:
            mine = shards.get(shard)
            if mine is None:
                mine = shards[shard] = deque(maxlen=WINDOW_ITEMS_MAX)
            mine.append((seq, result))
            if type(result) is bytes or type(result) is list:
                self._bytes[shard] = self._bytes.get(shard, 0) + result_bytes(result)
                if self._bytes[shard] > WRITE_RESULTS_BYTES_MAX:
                    self._cut(shard, mine)

    def _cut(self, shard: int, mine: deque[tuple[int, Any]]) -> None:
        """Count what is there, and forget the oldest while it is too much; half of it goes, so that this is rare."""
        size = sum(result_bytes(result) for _, result in mine)
        if size > WRITE_RESULTS_BYTES_MAX:
            while size > WRITE_RESULTS_BYTES_MAX // 2 and len(mine) > 1:
                size -= result_bytes(mine.popleft()[1])
        self._bytes[shard] = size

    def commit(self, committed: Mapping[int, int]) -> None:
        """Forget what is committed up to these numbers of shards."""
        for shard, seq in committed.items():
            mine = self._shards.get(shard)
            if mine is not None:
                while mine and mine[0][0] <= seq:
                    mine.popleft()
                if not mine:
                    self.forget(shard)

    def forget(self, shard: int) -> None:
        """The copy of a shard is not what it was."""
        self._shards.pop(shard, None)
        self._bytes.pop(shard, None)

    def of(self, shard: int, seqs: Sequence[int]) -> tuple[list[list[Any] | None], int]:
        """[result] for each of these numbers, None where it is not known, and about the bytes of all. It ends behind
        the one with which there are RESULTS_BYTES_MAX: the others are to be asked for again."""
        known = dict(self._shards.get(shard, ()))
        found: list[list[Any] | None] = []
        size = 0
        for seq in seqs:
            found.append([known[seq]] if seq in known else None)
            size += result_bytes(known.get(seq))
            if size > RESULTS_BYTES_MAX:
                break
        return found, size
