"""Write results: what the writes came to that may be uncommitted, for the coordinator to ask again.

Pure. One member of a shard answers a write; if it is lost before its answer came, another one is asked (RESULTS_OF).
Every member evaluates every operation at the same position, so it knows the same result. A put's result is its number,
which needs no asking and is not kept: the path of every put does nothing here.

Of each shard the results above its last committed number are kept, at most as many as a window holds: what is older
than that is committed. They are in memory only: a node that was restarted knows none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvtcp.constants import MGET_VALUES_BYTES_MAX, WINDOW_ITEMS_MAX
from kvtcp.storage.transaction import result_bytes


class WriteResults:
    """Results by shard and number."""

    __slots__ = ("_shards",)

    def __init__(self) -> None:
        self._shards: dict[int, deque[tuple[int, Any]]] = {}  # (number, result) in order

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

    def commit(self, committed: Mapping[int, int]) -> None:
        """Forget what is committed up to these numbers of shards."""
        for shard, seq in committed.items():
            mine = self._shards.get(shard)
            if mine is not None:
                while mine and mine[0][0] <= seq:
                    mine.popleft()
                if not mine:
                    del self._shards[shard]

    def forget(self, shard: int) -> None:
        """The copy of a shard is not what it was."""
        self._shards.pop(shard, None)

    def of(self, shard: int, seqs: Sequence[int]) -> list[list[Any] | None]:
        """[result] for each of these numbers, None where it is not known, or not in the same frame: it has room for the
        values of MGET_VALUES_BYTES_MAX."""
        known = dict(self._shards.get(shard, ()))
        found: list[list[Any] | None] = []
        size = 0
        for seq in seqs:
            size += result_bytes(known.get(seq))
            found.append([known[seq]] if seq in known and size <= MGET_VALUES_BYTES_MAX else None)
        return found
