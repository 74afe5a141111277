"""Admission: requests become items on the links, or wait in a bounded queue, or are refused as not executed.

Pure. The incoming half of the sequencer. A write gets its number and is queued to every member of its shard in the same
synchronous step (rule R10); a read goes to the member with the least outstanding. What cannot be queued now, because a
member is missing or a window is full, waits *unsequenced* and is refused after WRITE_WAIT_MS (R4), at once if the queue
is full. So everything here is bounded: by the windows what was queued, by WAITING_ITEMS_MAX, WAITING_MULTI_MAX and the
deadline what waits; the bytes that wait are counted (`waiting_bytes`) for the server's total cap.

Order. The requests of one shard keep their order while all its members are connected: when the window opens, those that
waited go before new ones. If a member is missing, writes cannot go on and reads go past them to another member. Several
shards that wait for one window take turns of DRAIN_SLICE requests, and the next time begins with the one that was next.

`write` and `read` are on the path of every operation and call nothing in the usual case. With all that follows until
the answer a read takes 0.5 us, a write 0.5 us with one copy and 0.8 us (large batches) to 1.4 us (one write of a shard
per batch) with three: `python -m bench.sequencer_micro`. Written out like this a read is 15 to 25 % cheaper.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import (
    BATCH_BYTES_MAX,
    DRAIN_SLICE,
    WAITING_ITEMS_MAX,
    WAITING_MULTI_MAX,
    WINDOW_BYTES_MAX,
    WINDOW_ITEMS_MAX,
    WRITE_WAIT_MS,
)
from kvtcp.errors import Code
from kvtcp.protocol.operations import (
    ADD,
    APPEND,
    CAS,
    COPY,
    INCR,
    INCR_DECIMAL,
    PUT,
    PUT_ALL,
    RENAME,
    SETBIT,
    SETRANGE,
    STORE,
    TRANSACTION,
    WRITE_OP_END,
)
from kvtcp.replication.sequencing.answers import Answers
from kvtcp.replication.sequencing.link import Op, Progress
from kvtcp.replication.sequencing.multi_read import MultiRead
from kvtcp.replication.sequencing.requests import AWAITED, ITEM_OVERHEAD_BYTES, NUMBER, PART, WRITE, Sink, Waiting
from kvtcp.replication.sequencing.shard import ShardState

# writes that a node short of disk space cannot take
GROWING: Final = frozenset(
    {PUT, ADD, CAS, INCR, STORE, APPEND, SETRANGE, SETBIT, INCR_DECIMAL, RENAME, COPY, PUT_ALL, TRANSACTION}
)


class Admission(Answers):
    """Requests in."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self.waiting_items = 0  # requests in all waiting queues
        self.waiting_bytes = 0  # their keys and values
        self._waiting_multi: deque[tuple[int, MultiRead]] = deque()  # (deadline_ms, read), in order of deadlines

    # --- one key ------------------------------------------------------------------------------------

    def write(self, op: int, number: int, key: bytes, args: Sequence[Any], size: int, sink: Sink, token: Any) -> None:
        """Sequence one write of shard `number`, or let it wait. `size` = bytes of its key and values."""
        shard = self.shards[number]
        if not shard.writable and not self._admits(shard, op, key, args, size, sink, token):
            return
        # R10: from here to the last enqueue there is nothing that could yield.
        shard.last_seq = seq = shard.last_seq + 1
        size += ITEM_OVERHEAD_BYTES
        waiter: Op | None
        if op == PUT:  # its result is its number: nobody needs to answer, and all replicas get the same item
            shard.pending.append([WRITE, sink, token, NUMBER])
            item = answering = (op, number, seq, 0, key, *args)
            waiter = None
        else:
            waiter = [WRITE, sink, token, AWAITED]
            shard.pending.append(waiter)
            answering = (op, number, seq, 1, key, *args)
            item = (op, number, seq, 0, key, *args)
        stamp_ms = self.stamp_ms
        for link in shard.targets:
            batch = link.open
            if batch is None or batch.bytes > BATCH_BYTES_MAX or batch.stamp_ms != stamp_ms:
                batch = link.new_batch(stamp_ms)
            if waiter is not None:
                batch.items.append(answering)
                batch.answers.append(waiter)
                waiter = None
            else:
                batch.items.append(item)
            batch.last_seqs[number] = seq
            batch.bytes += size
            link.bytes = link_bytes = link.bytes + size
            link.items = items = link.items + 1
            if items >= WINDOW_ITEMS_MAX or link_bytes >= WINDOW_BYTES_MAX:
                self._filled(link)

    def read(self, op: int, number: int, key: bytes, sink: Sink, token: Any) -> None:
        """Queue a read of one key (GET, EXISTS, TTL) to the replica with the least outstanding."""
        shard = self.shards[number]
        if shard.writable:  # so every member can take it
            members = shard.members
            link = members[0]
            for other in members:
                if other.items < link.items:
                    link = other
        else:
            found = self._reader(shard, None) if shard.serving else None
            if found is None or (shard.waiting and shard.is_whole()):
                self._wait(shard, op, key, None, len(key), sink, token)
                return
            link = found
        # `_enqueue`, written out: a call less is a tenth of a read
        batch = link.open
        if batch is None or batch.bytes > BATCH_BYTES_MAX or batch.stamp_ms != self.stamp_ms:
            batch = link.new_batch(self.stamp_ms)
        batch.items.append((op, number, key))
        batch.answers.append([op, sink, token, shard, shard.last_seq, key])
        size = len(key) + ITEM_OVERHEAD_BYTES
        batch.bytes += size
        link.bytes = link_bytes = link.bytes + size
        link.items = items = link.items + 1
        if items >= WINDOW_ITEMS_MAX or link_bytes >= WINDOW_BYTES_MAX:
            self._filled(link)

    def _reader(self, shard: ShardState, avoid: Progress | None) -> Progress | None:
        """The good member with room and the least outstanding; if one is avoided for its silence, no silent one. None
        of a shard that was stopped."""
        best = None
        for link in shard.good if shard.serving else ():
            if avoid is not None and link.is_silent(self.now_ms):
                continue
            if link.connected and not link.full and link is not avoid and (best is None or link.items < best.items):
                best = link
        return best

    def _enqueue_read(self, link: Progress, shard: ShardState, read: Op) -> None:
        """Queue a read op; what it sees is all that was queued for its shard until now."""
        key: bytes = read[5]
        read[4] = shard.last_seq
        self._enqueue(link, (read[0], shard.number, key), read, len(key) + ITEM_OVERHEAD_BYTES)

    def _enqueue(self, link: Progress, item: tuple[Any, ...], waiter: Op, size: int) -> None:
        batch = link.open
        if batch is None or batch.bytes > BATCH_BYTES_MAX or batch.stamp_ms != self.stamp_ms:
            batch = link.new_batch(self.stamp_ms)
        batch.items.append(item)
        batch.answers.append(waiter)
        batch.bytes += size
        link.bytes += size
        link.items += 1
        if link.items >= WINDOW_ITEMS_MAX or link.bytes >= WINDOW_BYTES_MAX:
            self._filled(link)

    # --- many keys ----------------------------------------------------------------------------------

    def multi_read(self, multi: MultiRead) -> None:
        """Queue a read over several shards in this one step, so that its answer is one consistent cut."""
        self._start_or_wait(multi)

    def _start_or_wait(self, multi: MultiRead) -> None:
        if self._is_refused(multi):
            return
        if self._start_multi(multi, None):
            return
        multi.cancel_attempt()
        if len(self._waiting_multi) >= WAITING_MULTI_MAX:
            self.unavailable += 1
            multi.fail(Code.OVERLOADED, f"{WAITING_MULTI_MAX} reads over several shards wait already")
            return
        self._waiting_multi.append((self.now_ms + WRITE_WAIT_MS, multi))
        self._count_waiting(1, multi.bytes)

    def _is_refused(self, multi: MultiRead) -> bool:
        """Whether a shard of it is not served, and it was told so."""
        for number in multi.shards:
            shard = self.shards[number]
            if not shard.serving:
                multi.done = True
                text = f"shard {number} is down: {shard.reason}"
                self._refuse(multi.sink, multi.token, Code.SHARD_DOWN, text, shard)
                return True
        return False

    def _start_multi(self, multi: MultiRead, avoid: Progress | None) -> bool:
        cover: list[tuple[Progress, list[int]]] | None = None
        if multi.spread > 1 and avoid is None:
            cover = self._spread(multi.shards, multi.spread)
        cover = cover or self._cover(multi.shards, avoid)
        if cover is None:
            return False
        multi.start(len(cover), {number: self.shards[number].last_seq for number in multi.shards})
        for index, (link, numbers) in enumerate(cover):
            item, size = multi.build(numbers)
            self._enqueue(link, item, [PART, multi, multi.attempt, index], size + ITEM_OVERHEAD_BYTES)
        return True

    def _spread(self, numbers: Sequence[int], links_max: int) -> list[tuple[Progress, list[int]]] | None:
        """The shards shared out over several links that nothing waits for, None if there are not two. One reader has
        its page sooner, since the nodes work at the same time; many readers would only pay for more parts."""
        idle = [link for link in self.links.values() if link.connected and not link.items][:links_max]
        if len(idle) < 2:
            return None
        parts: list[list[int]] = [[] for _ in idle]
        for number in numbers:
            good = self.shards[number].good
            able = [part for link, part in zip(idle, parts, strict=True) if link in good]
            if not able:
                return None
            able[number % len(able)].append(number)
        return [(link, part) for link, part in zip(idle, parts, strict=True) if part]

    def _cover(self, numbers: Sequence[int], avoid: Progress | None) -> list[tuple[Progress, list[int]]] | None:
        """Few links that hold all the shards: one if there is one, the least busy of equals."""
        left = list(numbers)
        shards = self.shards
        able = [link for link in self.links.values() if link.connected and not link.full and link is not avoid]
        if avoid is not None:
            able = [link for link in able if not link.is_silent(self.now_ms)]
        cover: list[tuple[Progress, list[int]]] = []
        while left:
            best: Progress | None = None
            best_numbers: list[int] = []
            for link in able:
                mine = [number for number in left if link in shards[number].good]
                if len(mine) > len(best_numbers) or (
                    best is not None and len(mine) == len(best_numbers) and link.items < best.items
                ):
                    best, best_numbers = link, mine
            if best is None:
                return None
            cover.append((best, best_numbers))
            if len(best_numbers) == len(left):
                break
            taken = set(best_numbers)
            left = [number for number in left if number not in taken]
        return cover

    def control(self, node: str, item: tuple[Any, ...], shards: Sequence[int], sink: Sink, token: Any) -> bool:
        """Queue a control item (freeze, chain_at) to one node. False if its link is down.

        It is answered when everything queued for `shards` before it is committed; UNKNOWN if the link is lost first.
        """
        link = self.links[node]
        if not link.connected:
            return False
        multi = MultiRead(shards, sink, token, lambda numbers: (item, 0), lambda results: results[0], 0)
        multi.movable = False
        multi.start(1, {number: self.shards[number].last_seq for number in shards})
        self._enqueue(link, item, [PART, multi, multi.attempt, 0], ITEM_OVERHEAD_BYTES)
        return True

    # --- waiting ------------------------------------------------------------------------------------

    def _admits(
        self, shard: ShardState, op: int, key: bytes, args: Any, size: int, sink: Sink, token: Any
    ) -> bool:
        """Whether a write of a shard that is not `writable` can be sequenced now; if not it waits, or is refused."""
        if shard.serving and shard.space and (shard.space > 1 or op in GROWING):
            self._refuse(sink, token, Code.NO_SPACE, self._no_space(shard), shard)
            return False
        if shard.space and shard.takes_writes():
            return True
        self._wait(shard, op, key, args, size, sink, token)
        return False

    def _no_space(self, shard: ShardState) -> str:
        short = ", ".join(link.node for link in shard.members if link.space == shard.space)
        takes = "no growing writes" if shard.space == 1 else "no writes"
        return f"shard {shard.number} takes {takes}: too little disk space on {short}; nothing was executed"

    def _wait(self, shard: ShardState, op: int, key: bytes, args: Any, size: int, sink: Sink, token: Any) -> None:
        if not shard.serving:
            self._refuse(sink, token, Code.SHARD_DOWN, f"shard {shard.number} is down: {shard.reason}", shard)
            return
        if len(shard.waiting) >= WAITING_ITEMS_MAX:
            text = f"{WAITING_ITEMS_MAX} requests wait for shard {shard.number} already; nothing was executed"
            self._refuse(sink, token, Code.OVERLOADED, text, shard)
            return
        size += ITEM_OVERHEAD_BYTES
        shard.waiting.append((self.now_ms + WRITE_WAIT_MS, size, op, key, args, sink, token))
        shard.waiting_reads += op >= WRITE_OP_END
        self._count_waiting(1, size)

    def _count_waiting(self, items: int, size: int) -> None:
        self.waiting_items += items
        self.waiting_bytes += size

    def _forget_waiting(self, shard: ShardState, entry: Waiting) -> None:
        """`entry` left the queue of `shard`."""
        shard.waiting_reads -= entry[2] >= WRITE_OP_END
        self._count_waiting(-1, -entry[1])

    def _filled(self, link: Progress) -> None:
        """The window of `link` has no room any more."""
        if not link.full:
            link.full = True
            for shard in link.shards:
                shard.writable = False

    def _opened(self, link: Progress) -> None:
        """`link` may take items again: those that waited for it go first."""
        link.full = False
        for shard in link.shards:
            shard.update_writable()
        # They are few, at most one item per link each, and would find every window full behind the others.
        self._start_waiting_multi()
        shards = link.shards
        at = link.next_turn
        queue: deque[ShardState] = deque(shard for shard in shards[at:] + shards[:at] if shard.waiting)
        while queue:
            shard = queue.popleft()
            if self._drain(shard):
                queue.append(shard)
            elif link.full:
                link.next_turn = shards.index(shard)
                break

    def _drain(self, shard: ShardState) -> bool:
        """Queue what waits, as far as the windows allow; true if it stopped because its turn is over."""
        waiting = shard.waiting
        for _ in range(min(DRAIN_SLICE, len(waiting))):
            entry = waiting[0]
            _, size, op, key, args, sink, token = entry
            if op >= WRITE_OP_END:
                link = self._reader(shard, None)
                if link is None:
                    return False
                self._enqueue_read(link, shard, [op, sink, token, shard, 0, key])
            else:
                if shard.is_blocked():
                    self._pass_writes(shard)
                    return False
                shard.writable = True
                self.write(op, shard.number, key, args, size - ITEM_OVERHEAD_BYTES, sink, token)
                shard.writable = False
            waiting.popleft()
            self._forget_waiting(shard, entry)
        shard.update_writable()
        return bool(waiting)

    def _pass_writes(self, shard: ShardState) -> None:
        """If a member is missing or bad, let the reads that wait go past the writes to another member."""
        if not shard.waiting_reads or shard.is_whole():
            return
        stay: deque[Waiting] = deque()
        for entry in shard.waiting:
            link = self._reader(shard, None) if entry[2] >= WRITE_OP_END else None
            if link is None:
                stay.append(entry)
            else:
                self._enqueue_read(link, shard, [entry[2], entry[5], entry[6], shard, 0, entry[3]])
                self._forget_waiting(shard, entry)
        shard.waiting = stay
        shard.update_writable()

    def _start_waiting_multi(self) -> None:
        blocked: set[int] = set()  # shards that a read could not be started for; rooms only shrink in this loop
        for _ in range(len(self._waiting_multi)):
            entry = self._waiting_multi.popleft()
            multi = entry[1]
            if blocked.isdisjoint(multi.shards) and self._start_multi(multi, None):
                self._count_waiting(-1, -multi.bytes)
            else:
                blocked.update(n for n in multi.shards if self._reader(self.shards[n], None) is None)
                self._waiting_multi.append(entry)

    def refuse_waiting(self, code: Code, text: str, wanted: Callable[[bytes], bool]) -> None:
        """Refuse what waits unsequenced and whose key `wanted` says so."""
        for shard in self.shards:
            self._refuse_some(shard, code, text, lambda entry: wanted(entry[3]))

    def _refuse_stopped(self, shard: ShardState) -> None:
        """Refuse everything that waits for a shard which is not served any more."""
        self._refuse_some(shard, Code.SHARD_DOWN, f"shard {shard.number} is down: {shard.reason}", lambda entry: True)
        waiting, self._waiting_multi = self._waiting_multi, deque()
        for entry in waiting:
            if self._is_refused(entry[1]):
                self._count_waiting(-1, -entry[1].bytes)
            else:
                self._waiting_multi.append(entry)

    def _refuse_some(self, shard: ShardState, code: Code, text: str, wanted: Callable[[Waiting], bool]) -> None:
        """Refuse what waits for `shard` and `wanted` says so."""
        keep: deque[Waiting] = deque()
        for entry in shard.waiting:
            if wanted(entry):
                self._forget_waiting(shard, entry)
                self._refuse(entry[5], entry[6], code, text, shard)
            else:
                keep.append(entry)
        shard.waiting = keep
        shard.update_writable()

    def on_space(self, node: str, level: int) -> None:
        """The node is short of disk space, or is no more."""
        link = self.links[node]
        link.space = level
        for shard in link.shards:
            shard.update_space()
            if shard.space and shard.waiting:
                level = shard.space
                self._refuse_some(
                    shard, Code.NO_SPACE, self._no_space(shard),
                    lambda entry: entry[2] in GROWING or (level > 1 and entry[2] < WRITE_OP_END),  # noqa: B023
                )  # fmt: skip
            shard.update_writable()

    def refuse_waiting_multi(self, code: Code, text: str) -> None:
        """Refuse all reads over several shards that wait to begin."""
        while self._waiting_multi:
            _, multi = self._waiting_multi.popleft()
            self._count_waiting(-1, -multi.bytes)
            self.unavailable += 1
            multi.fail(code, text)

    def _expire_waiting(self) -> None:
        """Refuse what waited too long."""
        now_ms = self.now_ms
        for shard in self.shards:
            waiting = shard.waiting
            while waiting and waiting[0][0] <= now_ms:
                entry = waiting.popleft()
                self._forget_waiting(shard, entry)
                code, text = self._why_not(shard, "reading" if entry[2] >= WRITE_OP_END else "writing")
                self._refuse(entry[5], entry[6], code, text, shard)
            if not waiting and not shard.writable:
                shard.update_writable()
        while self._waiting_multi and self._waiting_multi[0][0] <= now_ms:
            multi = self._waiting_multi.popleft()[1]
            self._count_waiting(-1, -multi.bytes)
            self.unavailable += 1
            blocked = [n for n in multi.shards if self._reader(self.shards[n], None) is None] or multi.shards
            multi.fail(*self._why_not(self.shards[blocked[0]], "reading"))

    def _why_not(self, shard: ShardState, what: str) -> tuple[Code, str]:
        missing = [f"{link.node} {why}" for link, why in shard.bad.items()]
        missing += [f"{link.node} is missing ({link.reason})" for link in shard.good if not link.connected]
        if missing:
            names = ", ".join(missing)
            takes = "takes no writes" if what == "writing" else "cannot be read"
            return Code.NOT_ENOUGH_REPLICAS, f"shard {shard.number} {takes}: {names}; nothing was executed"
        text = f"no room in the windows of shard {shard.number} for {WRITE_WAIT_MS} ms; nothing was executed"
        return Code.OVERLOADED, text

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        items = sum(len(shard.waiting) for shard in self.shards) + len(self._waiting_multi)
        assert self.waiting_items == items, "waiting requests are counted"
        size = sum(entry[1] for shard in self.shards for entry in shard.waiting)
        assert self.waiting_bytes == size + sum(m.bytes for _, m in self._waiting_multi), "waiting bytes are counted"
        assert all(not multi.done for _, multi in self._waiting_multi), "what waits was not answered"
