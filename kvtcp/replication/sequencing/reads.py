"""Reads over several shards on their way: which nodes have part of them, and those that wait to begin.

Pure. The parts of a read are queued in one synchronous step with one stamp (multi_read.py says why). A read that cannot
begin, because no member of some shard has room, waits WRITE_WAIT_MS at most, in order; at most WAITING_MULTI_MAX wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvtcp.constants import WAITING_MULTI_MAX, WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.replication.sequencing.cluster_state import ClusterState
from kvtcp.replication.sequencing.link import Link, Op
from kvtcp.replication.sequencing.multi_read import MultiRead
from kvtcp.replication.sequencing.requests import ITEM_OVERHEAD_BYTES, PART
from kvtcp.replication.sequencing.shard import Shard


class Reads:
    """Reads of one sequencer over several shards."""

    def __init__(self, cluster: ClusterState, shards: list[Shard], links: dict[str, Link]) -> None:
        self._cluster = cluster
        self._shards = shards
        self._links = links
        self._waiting: deque[tuple[int, MultiRead]] = deque()  # (deadline_ms, read), in order of deadlines

    def start_or_wait(self, multi: MultiRead) -> None:
        """Queue the parts of a read in this one step, let it wait, or refuse it."""
        if self._is_refused(multi) or self.start(multi, None):
            return
        multi.cancel_attempt()
        if len(self._waiting) >= WAITING_MULTI_MAX:
            self._cluster.unavailable += 1
            multi.fail(Code.OVERLOADED, f"{WAITING_MULTI_MAX} reads over several shards wait already")
            return
        self._waiting.append((self._cluster.now_ms + WRITE_WAIT_MS, multi))
        self._cluster.count_waiting(1, multi.bytes)

    def _is_refused(self, multi: MultiRead) -> bool:
        """Whether a shard of the read is not served: then the read is refused."""
        for number in multi.shards:
            shard = self._shards[number]
            if not shard.serving:
                multi.done = True
                shard.refuse(multi.sink, multi.token, Code.SHARD_DOWN, f"shard {number} is down: {shard.reason}")
                return True
        return False

    def start(self, multi: MultiRead, avoid: Link | None) -> bool:
        """Queue the parts of a read, not to the link to be avoided for its silence; false if some shard cannot be read
        now."""
        cover = self._spread(multi.shards, multi.spread) if multi.spread > 1 and avoid is None else None
        cover = cover or self._cover(multi.shards, avoid)
        if cover is None:
            return False
        multi.start(len(cover), {self._shards[number]: self._shards[number].last_seq for number in multi.shards})
        for index, (link, numbers) in enumerate(cover):
            item, size = multi.build(numbers)
            part: Op = [PART, multi, multi.attempt, index]
            link.enqueue(item, part, size + ITEM_OVERHEAD_BYTES, self._cluster.stamp_ms)
        return True

    def _spread(self, numbers: Sequence[int], links_max: int) -> list[tuple[Link, list[int]]] | None:
        """The shards shared out over several idle links, None if there are not two. A single reader gets its page
        sooner, since the nodes work at the same time; many readers would only pay for more parts."""
        idle = [link for link in self._links.values() if link.connected and not link.items][:links_max]
        if len(idle) < 2:
            return None
        parts: list[list[int]] = [[] for _ in idle]
        for number in numbers:
            good = self._shards[number].good
            able = [part for link, part in zip(idle, parts, strict=True) if link in good]
            if not able:
                return None
            able[number % len(able)].append(number)
        return [(link, part) for link, part in zip(idle, parts, strict=True) if part]

    def _cover(self, numbers: Sequence[int], avoid: Link | None) -> list[tuple[Link, list[int]]] | None:
        """Few links that hold all the shards: one if possible, the least busy of equals."""
        left = list(numbers)
        shards = self._shards
        able = [link for link in self._links.values() if link.connected and not link.full and link is not avoid]
        if avoid is not None:
            able = [link for link in able if not link.is_silent(self._cluster.now_ms)]
        cover: list[tuple[Link, list[int]]] = []
        while left:
            best: Link | None = None
            best_numbers: list[int] = []
            for link in able:
                mine = [number for number in left if link in shards[number].good]
                is_idler = best is not None and len(mine) == len(best_numbers) and link.items < best.items
                if len(mine) > len(best_numbers) or is_idler:
                    best, best_numbers = link, mine
            if best is None:
                return None
            cover.append((best, best_numbers))
            if len(best_numbers) == len(left):
                break
            taken = set(best_numbers)
            left = [number for number in left if number not in taken]
        return cover

    def start_waiting(self) -> None:
        """Start the waiting reads whose shards can be read now."""
        blocked: set[int] = set()  # shards without a reader; room only shrinks in this loop
        for _ in range(len(self._waiting)):
            entry = self._waiting.popleft()
            multi = entry[1]
            if blocked.isdisjoint(multi.shards) and self.start(multi, None):
                self._cluster.count_waiting(-1, -multi.bytes)
            else:
                blocked.update(n for n in multi.shards if self._shards[n].reader(None) is None)
                self._waiting.append(entry)

    def refuse_waiting(self, code: Code, text: str) -> None:
        """Refuse all reads that wait to begin."""
        while self._waiting:
            self._refuse_first(code, text)

    def refuse_stopped(self) -> None:
        """Refuse the waiting reads of a shard that is not served any more."""
        waiting, self._waiting = self._waiting, deque()
        for entry in waiting:
            if self._is_refused(entry[1]):
                self._cluster.count_waiting(-1, -entry[1].bytes)
            else:
                self._waiting.append(entry)

    def expire(self) -> None:
        """Refuse the reads that waited too long."""
        shards = self._shards
        while self._waiting and self._waiting[0][0] <= self._cluster.now_ms:
            numbers = self._waiting[0][1].shards
            blocked = [n for n in numbers if shards[n].reader(None) is None] or numbers
            self._refuse_first(*shards[blocked[0]].why_not("reading"))

    def _refuse_first(self, code: Code, text: str) -> None:
        _, multi = self._waiting.popleft()
        self._cluster.count_waiting(-1, -multi.bytes)
        self._cluster.unavailable += 1
        multi.fail(code, text)

    def waiting(self) -> list[MultiRead]:
        """Reads that wait to begin, in order."""
        return [multi for _, multi in self._waiting]
