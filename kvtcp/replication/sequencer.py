"""The sequencer: gives every write its number, sends it to all replicas at once, and answers when all have it.

Pure: no sockets, clock or files; events in (requests, results, links up and down, time), batches for the links and
answers to the sinks out. The coordinator's server is a thin shell around it; the same class runs in tests without I/O.

Per shard a write passes: waiting (unsequenced, only if a link is missing or a window full) -> pending (numbered and
queued to every replica in the same step) -> committed (every replica acknowledged it) -> answered.
Reads go to one replica over the same FIFO link, so they see exactly the writes queued before them, and are held until
what they saw is committed.

Invariants (`check`):
- numbers of a shard have no gap; `commit <= last_seq`; `pending` are exactly the numbers (commit, last_seq];
- `commit` is the smallest number acknowledged by all members, and never decreases;
- an op answered is committed on every member (writes), or saw only committed state (reads);
- after the first item of an entry is queued the answer is its result or UNKNOWN; `Unavailable` comes only before.

Ops are lists, not objects, and one list is all that a request costs here (making an instance costs five times as much):
    write  [WRITE, sink, token, result]
    read   [op, sink, token, shard state, last number queued before it, key]     sink None = answered
    part   [PART, multi read, attempt, index]
A sink has `reply(token, result)` and `fail(token, code, message, details)`; both only append to buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Any, Final, Protocol

from kvtcp.constants import (
    BATCH_BYTES_MAX,
    PURGE_INTERVAL_MS,
    PURGE_KEYS_MAX,
    READ_RETRY_MS,
    WAITING_ITEMS_MAX,
    WINDOW_BYTES_MAX,
    WINDOW_ITEMS_MAX,
    WRITE_WAIT_MS,
)
from kvtcp.errors import Code
from kvtcp.protocol.operations import EXISTS, GET, PURGE, PUT, WRITE_OP_END
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.multi_read import MultiRead
from kvtcp.replication.progress import ANSWERED, Batch, LinkError, Op, Progress

WRITE: Final = 0
PART: Final = -1
ITEM_OVERHEAD_BYTES: Final = 32  # what an item counts in a window beyond its key and value

NUMBER: Final = object()  # result of a write that is its own number (put)
AWAITED: Final = object()  # result that has not arrived
LOST: Final = object()  # result that died with a link: the entry is applied, nobody here knows what it gave


class Sink(Protocol):
    """Where answers go."""

    def reply(self, token: Any, result: Any) -> None:
        """The request succeeded."""

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """The request ended with an error."""


class ShardState:
    """One shard as the coordinator sees it."""

    __slots__ = (
        "acked", "commit", "held", "last_seq", "members", "number", "pending", "purge_after_ms", "reason",
        "serving", "stuck", "waiting", "writable",
    )  # fmt: skip

    def __init__(self, number: int, members: list[Progress]) -> None:
        self.number = number
        self.members = members  # first the one that answers writes
        self.acked: dict[Progress, int] = dict.fromkeys(members, 0)  # highest number each member has durable
        self.last_seq = 0  # highest number given
        self.commit = 0  # highest number durable on all members; <= last_seq
        self.pending: deque[Op] = deque()  # writes (commit, last_seq], in order
        self.held: list[tuple[int, int, Any, Any, Any]] = []  # heap of answers waiting for commit >= first field
        # unsequenced: (deadline_ms, bytes, op, key, args or None for a read, sink, token)
        self.waiting: deque[tuple[int, int, int, bytes, Any, Any, Any]] = deque()
        self.serving = False  # all members were heard of and agreed when the coordinator took the shard over
        self.reason = "its members have not reported yet"  # why not serving, for people
        self.stuck = ""  # why the pending writes can never commit, for people; empty = they can
        self.writable = False  # serving, every member connected with room in its window, nobody waiting
        self.purge_after_ms = 0  # no purge before this time


class Sequencer:
    """The write and read path of all shards. Every public method is one synchronous step."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        self.map = cluster_map
        self.links = {node: Progress(node) for node in cluster_map.nodes}
        self.shards = [
            ShardState(n, [self.links[node] for node in members]) for n, members in enumerate(cluster_map.members)
        ]
        for shard in self.shards:
            for link in shard.members:
                link.shards.append(shard)
        self.stamp_ms = 0  # of everything queued in this tick; never decreases
        self.now_ms = 0  # monotonic time of this tick, for deadlines only
        self.waiting_bytes = 0  # keys and values in all waiting queues
        self.waiting_items = 0
        self.unavailable = 0  # requests refused as not executed, for status
        self.unknown = 0  # writes answered UNKNOWN, for status
        self._held_order = 0  # tie-breaker of the held heaps
        self._waiting_multi: deque[tuple[int, MultiRead]] = deque()
        self._kept: dict[Progress, list[Batch]] = {}  # of links that are down: writes to send again
        self._flagged: set[int] = set()  # shards that hold expired keys

    # --- time ---------------------------------------------------------------------------------------

    def begin(self, wall_ms: int, now_ms: int) -> None:
        """A tick begins: what is queued until `close_batches` has one stamp."""
        if wall_ms > self.stamp_ms:
            self.stamp_ms = wall_ms
        self.now_ms = now_ms

    def close_batches(self) -> Iterable[Progress]:
        """The tick ends: every link with something to send, its batches closed."""
        ready = []
        for link in self.links.values():
            if link.open is not None:
                link.close_batch()
            if link.outgoing:
                ready.append(link)
        return ready

    def committed_ordinal(self, link: Progress) -> int:
        """The ordinal of `link` up to which every write is committed, for its next batch."""
        uncommitted = link.uncommitted
        shards = self.shards
        while uncommitted:
            for number, seq in uncommitted[0].last_seqs.items():
                if shards[number].commit < seq:
                    return uncommitted[0].last_ordinal - len(uncommitted[0].items)
            uncommitted.popleft()
        return link.last_ordinal - sum(len(batch.items) for batch in link.outgoing)

    # --- writes -------------------------------------------------------------------------------------

    def write(self, op: int, number: int, key: bytes, args: Sequence[Any], size: int, sink: Sink, token: Any) -> None:
        """Sequence one write of shard `number`, or let it wait. `size` = bytes of its key and values."""
        shard = self.shards[number]
        if not shard.writable:
            self._wait(shard, op, key, args, size, sink, token)
            return
        # R10: from here to the last enqueue there is nothing that could yield.
        shard.last_seq = seq = shard.last_seq + 1
        size += ITEM_OVERHEAD_BYTES
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
        for link in shard.members:
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
            link.bytes += size
            link.items = items = link.items + 1
            if items >= WINDOW_ITEMS_MAX or link.bytes >= WINDOW_BYTES_MAX:
                self._filled(link)

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
        self.waiting_bytes += size
        self.waiting_items += 1

    def _refuse(self, sink: Sink, token: Any, code: Code, text: str, shard: ShardState | None) -> None:
        self.unavailable += 1
        sink.fail(token, code, text, {} if shard is None else {"shard": shard.number})

    def _filled(self, link: Progress) -> None:
        if not link.full:
            link.full = True
            for shard in link.shards:
                shard.writable = False

    def _opened(self, link: Progress) -> None:
        """`link` may take writes again: those that waited for it go first."""
        link.full = False
        for shard in link.shards:
            self._update_writable(shard)
        # one pass over the shards with a waiting queue, each as far as the windows allow
        for shard in link.shards:
            if shard.waiting:
                self._drain(shard)
        while self._waiting_multi:
            if not self._start_multi(self._waiting_multi[0][1]):
                break
            self._waiting_multi.popleft()

    def _update_writable(self, shard: ShardState) -> None:
        writable = shard.serving and not shard.waiting
        for link in shard.members:
            if link.full or not link.connected:
                writable = False
        shard.writable = writable

    def _drain(self, shard: ShardState) -> None:
        waiting = shard.waiting
        while waiting:
            _, size, op, key, args, sink, token = waiting[0]
            if op >= WRITE_OP_END:
                link = self._reader(shard, None)
                if link is None:
                    return
                self._enqueue_read(link, shard, op, key, sink, token)
            else:
                for link in shard.members:
                    if link.full or not link.connected:
                        return
                shard.writable = True
                self.write(op, shard.number, key, args, size - ITEM_OVERHEAD_BYTES, sink, token)
                shard.writable = False
            waiting.popleft()
            self.waiting_bytes -= size
            self.waiting_items -= 1
        self._update_writable(shard)

    def refuse_waiting(self, code: Code, text: str, wanted: Callable[[bytes], bool]) -> None:
        """Refuse what waits unsequenced and whose key `wanted` says so."""
        for shard in self.shards:
            keep = [entry for entry in shard.waiting if not wanted(entry[3])]
            for entry in shard.waiting:
                if wanted(entry[3]):
                    self._forget_waiting(entry)
                    self._refuse(entry[5], entry[6], code, text, shard)
            shard.waiting = deque(keep)
            self._update_writable(shard)

    def _forget_waiting(self, entry: tuple[int, int, int, bytes, Any, Any, Any]) -> None:
        self.waiting_bytes -= entry[1]
        self.waiting_items -= 1

    # --- reads --------------------------------------------------------------------------------------

    def read(self, op: int, number: int, key: bytes, sink: Sink, token: Any) -> None:
        """Queue a read of one key (GET, EXISTS, TTL) to the replica with the least outstanding."""
        shard = self.shards[number]
        members = shard.members
        link: Progress | None
        if len(members) == 1 and shard.writable:
            link = members[0]
        else:
            link = self._reader(shard, None) if shard.serving else None
            if link is None or (shard.waiting and self._only_full(shard)):
                # Behind writes that wait for room a read waits too, so that a client's order stays; if a
                # replica is missing the reads go past the writes to another one.
                self._wait(shard, op, key, None, len(key), sink, token)
                return
        self._enqueue_read(link, shard, op, key, sink, token)

    def _only_full(self, shard: ShardState) -> bool:
        return all(link.connected for link in shard.members)

    def _reader(self, shard: ShardState, avoid: Progress | None) -> Progress | None:
        best = None
        for link in shard.members:
            if link.connected and not link.full and link is not avoid and (best is None or link.items < best.items):
                best = link
        return best

    def _enqueue_read(self, link: Progress, shard: ShardState, op: int, key: bytes, sink: Sink, token: Any) -> None:
        item = (op, shard.number, key)
        self._enqueue(link, item, [op, sink, token, shard, shard.last_seq, key], len(key) + ITEM_OVERHEAD_BYTES)

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

    def multi_read(self, multi: MultiRead) -> None:
        """Queue a read over several shards in this one step, so that its answer is one consistent cut."""
        for number in multi.shards:
            shard = self.shards[number]
            if not shard.serving:
                text = f"shard {number} is down: {shard.reason}"
                self._refuse(multi.sink, multi.token, Code.SHARD_DOWN, text, shard)
                return
        if self._waiting_multi or not self._start_multi(multi):
            self._waiting_multi.append((self.now_ms + WRITE_WAIT_MS, multi))

    def _start_multi(self, multi: MultiRead, avoid: Progress | None = None) -> bool:
        cover = self._cover(multi.shards, avoid)
        if cover is None:
            return False
        multi.start(len(cover), {number: self.shards[number].last_seq for number in multi.shards})
        for index, (link, numbers) in enumerate(cover):
            item, size = multi.item(numbers)
            self._enqueue(link, item, [PART, multi, multi.attempt, index], size + ITEM_OVERHEAD_BYTES)
        return True

    def _cover(self, numbers: Sequence[int], avoid: Progress | None) -> list[tuple[Progress, list[int]]] | None:
        """Few links that hold all the shards: one if there is one, the least busy of equals."""
        left = list(numbers)
        cover: list[tuple[Progress, list[int]]] = []
        while left:
            best: Progress | None = None
            best_numbers: list[int] = []
            for link in self.links.values():
                if not link.connected or link.full or link is avoid:
                    continue
                mine = [number for number in left if link in self.shards[number].acked]
                if len(mine) > len(best_numbers) or (
                    best is not None and len(mine) == len(best_numbers) and link.items < best.items
                ):
                    best, best_numbers = link, mine
            if best is None:
                return None
            cover.append((best, best_numbers))
            taken = set(best_numbers)
            left = [number for number in left if number not in taken]
        return cover

    def control(self, node: str, item: tuple[Any, ...], shards: Sequence[int], sink: Sink, token: Any) -> bool:
        """Queue a control item (freeze, chain_at) to one node. False if its link is down.

        It is answered when everything queued for `shards` before it is committed.
        """
        link = self.links[node]
        if not link.connected:
            return False
        multi = MultiRead(shards, sink, token, lambda numbers: (item, 0), lambda results: results[0])
        multi.start(1, {number: self.shards[number].last_seq for number in shards})
        multi.movable = False
        self._enqueue(link, item, [PART, multi, multi.attempt, 0], ITEM_OVERHEAD_BYTES)
        return True

    # --- what the nodes say ------------------------------------------------------------------------

    def on_results(self, node: str, applied: int, durable: int, results: list[Any], flags: Sequence[int]) -> None:
        """A RESULTS frame. Raises LinkError if it cannot be true."""
        link = self.links[node]
        link.heard_ms = self.now_ms
        reads: list[tuple[Op, Any]] = []
        for pair in link.on_applied(applied, results):
            op = pair[0]
            if op[0] == WRITE:
                op[3] = pair[1]
            elif op is not ANSWERED:
                reads.append(pair)
        # Commits first: a read in the same frame then finds what it saw committed and need not be held.
        shards = self.shards
        for batch in link.on_durable(durable):
            for number, seq in batch.last_seqs.items():
                self._acknowledged(shards[number], link, seq)
        for op, result in reads:
            self._read_done(op, result)
        if flags:
            self._flagged.update(number for number in flags if number < len(shards))
        if link.full and link.has_room(0.75):
            self._opened(link)

    def _acknowledged(self, shard: ShardState, link: Progress, seq: int) -> None:
        acked = shard.acked
        if seq <= acked[link]:
            return
        acked[link] = seq
        commit = seq if len(acked) == 1 else min(acked.values())
        number = shard.commit
        if commit <= number:
            return
        shard.commit = commit
        pending = shard.pending
        while number < commit:
            number += 1
            _, sink, token, result = pending.popleft()
            if sink is None:
                continue
            if result is NUMBER:
                sink.reply(token, number)
            elif type(result) is list:
                sink.fail(token, result[0], result[1], result[2])
            elif result is LOST:
                self._answer_unknown(shard, sink, token, "its answer was lost with the connection to a node")
            else:
                assert result is not AWAITED, "the member that answers acknowledged, so its result came before"
                sink.reply(token, result)
        held = shard.held
        while held and held[0][0] <= commit:
            _, _, sink, token, value = heappop(held)
            if sink is None:
                self._release_multi(token)
            else:
                sink.reply(token, value)

    def _answer_unknown(self, shard: ShardState, sink: Sink, token: Any, why: str) -> None:
        self.unknown += 1
        text = f"the write to shard {shard.number} may or may not have happened: {why}"
        sink.fail(token, Code.UNKNOWN, text, {"shard": shard.number})

    def _read_done(self, op: Op, result: Any) -> None:
        kind = op[0]
        if kind == PART:
            if op[1].take(op[2], op[3], result):
                self._release_multi(op[1])
            return
        _, sink, token, shard, needed, _ = op
        if sink is None:  # answered by another member meanwhile
            return
        op[1] = None
        # R11 (b): an answer that shows a key waits for that revision, every other for all that was queued before it
        if kind == GET:
            if result is not None:
                needed = result[1]
        elif result is None:
            result = False if kind == EXISTS else None
        elif kind == EXISTS:
            needed, result = result[0], True
        else:
            needed = result[0]
            result = -1 if result[1] is None else result[1]
        if needed <= shard.commit:
            sink.reply(token, result)
        else:
            self._hold(shard, needed, sink, token, result)

    def _hold(self, shard: ShardState, needed: int, sink: Any, token: Any, value: Any) -> None:
        if shard.stuck:
            self._refuse_held(shard, sink, token)
            return
        self._held_order += 1
        heappush(shard.held, (needed, self._held_order, sink, token, value))

    def _refuse_held(self, shard: ShardState, sink: Any, token: Any) -> None:
        text = f"shard {shard.number} cannot commit what this read saw: {shard.stuck}"
        if sink is None:
            self.unavailable += 1
            token.fail(Code.NOT_ENOUGH_REPLICAS, text)
        else:
            self._refuse(sink, token, Code.NOT_ENOUGH_REPLICAS, text, shard)

    def _release_multi(self, multi: MultiRead) -> None:
        """Answer `multi` if all it saw is committed, else hold it at the first shard that is behind."""
        for number, needed in multi.needed.items():
            shard = self.shards[number]
            if shard.commit < needed:
                self._hold(shard, needed, None, multi, None)
                return
        multi.answer()

    # --- links --------------------------------------------------------------------------------------

    def link_down(self, node: str, reason: str) -> None:
        """The link is gone: writes of its shards wait, its reads are queued at other members, its writes are kept."""
        link = self.links[node]
        if not link.connected:
            link.reason = reason
            return
        kept, reads = link.disconnect(reason)
        self._kept[link] = kept
        for shard in link.shards:
            shard.writable = False
        self._move_reads(reads, None)

    def _move_reads(self, reads: Iterable[Op], avoid: Progress | None) -> None:
        for op in reads:
            if op[0] == PART:
                multi, attempt = op[1], op[2]
                if attempt != multi.attempt or multi.done:
                    continue
                if avoid is not None:  # the silent node may still answer: only another attempt replaces it
                    if multi.movable:
                        self._start_multi(multi, avoid)
                elif not multi.movable:
                    multi.fail(Code.UNKNOWN, "the node it was sent to was lost")
                elif not self._start_multi(multi):
                    self._waiting_multi.append((self.now_ms + WRITE_WAIT_MS, multi))
                continue
            kind, sink, token, shard, _, key = op
            if sink is None:
                continue
            other = self._reader(shard, avoid)
            if other is not None:
                self._enqueue_moved(other, op)
            elif avoid is None:
                op[1] = None
                self._wait(shard, kind, key, None, len(key), sink, token)

    def _enqueue_moved(self, link: Progress, op: Op) -> None:
        shard, key = op[3], op[5]
        op[4] = max(op[4], shard.last_seq)
        self._enqueue(link, (op[0], shard.number, key), op, len(key) + ITEM_OVERHEAD_BYTES)

    def link_up(self, node: str, positions: dict[int, int]) -> str | None:
        """A node that the map names is linked and reported these numbers. Returns why it cannot serve, or None.

        Entries it lacks are sent again with their stamps; those it has count as acknowledged.
        """
        link = self.links[node]
        assert not link.connected, "link_down comes before the next link_up"
        for shard in link.shards:
            seq = positions.get(shard.number, 0)
            if not shard.acked[link] <= seq <= shard.last_seq:
                reason = (
                    f"it has shard {shard.number} up to {seq}, but acknowledged {shard.acked[link]}"
                    if seq < shard.acked[link]
                    else f"it has shard {shard.number} up to {seq}, above the last number given, {shard.last_seq}"
                )
                self._abandon(link, reason)
                return reason
        link.connected = True
        link.reason = ""
        kept = self._kept.pop(link, [])
        for old in kept:
            self._send_again(link, old, positions)
        for shard in link.shards:
            self._acknowledged(shard, link, positions.get(shard.number, 0))
        if not link.has_room():
            self._filled(link)
        else:
            self._opened(link)
        return None

    def _send_again(self, link: Progress, old: Batch, positions: dict[int, int]) -> None:
        batch = Batch(old.stamp_ms)
        answers = iter(old.answers)
        for item in old.items:
            op = next(answers) if item[3] else None
            if item[2] <= positions.get(item[1], 0):
                if op is not None and op is not ANSWERED and op[3] is AWAITED:
                    op[3] = LOST
                continue
            batch.items.append(item)
            batch.last_seqs[item[1]] = item[2]
            if op is not None:
                batch.answers.append(op)
        if batch.items:
            batch.bytes = old.bytes
            link.open = batch
            link.items += len(batch.items)
            link.bytes += batch.bytes
            link.close_batch()

    def _abandon(self, link: Progress, reason: str) -> None:
        """The node lost what it acknowledged: it is no member any more, and nothing it says counts."""
        link.reason = reason
        self._kept.pop(link, None)
        for shard in link.shards:
            for op in shard.pending:
                if op[1] is not None:
                    self._answer_unknown(shard, op[1], op[2], f"{link.node} came back without its data")
                    op[1] = None
            if shard.last_seq > shard.acked[link]:
                shard.stuck = f"{link.node}: {reason}"
                held, shard.held = shard.held, []
                for _, _, sink, token, _ in held:
                    self._refuse_held(shard, sink, token)

    def take_over(self, positions: dict[str, dict[int, tuple[int, int]]]) -> None:
        """All nodes reported (seq, chain) per shard, no link is up: agree where to go on, or say why not."""
        for shard in self.shards:
            reports = {link.node: positions[link.node].get(shard.number, (0, 0)) for link in shard.members}
            if len(set(reports.values())) == 1:
                seq = next(iter(reports.values()))[0]
                shard.last_seq = shard.commit = seq
                shard.acked = dict.fromkeys(shard.members, seq)
                shard.serving, shard.reason = True, ""
            else:
                at = ", ".join(f"{node} at {seq}" for node, (seq, _) in reports.items())
                shard.serving, shard.reason = False, f"its members differ ({at})"
            self._update_writable(shard)

    # --- time passes --------------------------------------------------------------------------------

    def tick(self) -> None:
        """Refuse what waited too long, move reads from silent nodes, purge expired keys."""
        now_ms = self.now_ms
        for shard in self.shards:
            waiting = shard.waiting
            while waiting and waiting[0][0] <= now_ms:
                entry = waiting.popleft()
                self._forget_waiting(entry)
                code, text = self._why_not(shard, entry[2] < WRITE_OP_END)
                self._refuse(entry[5], entry[6], code, text, shard)
            if not waiting and not shard.writable:
                self._update_writable(shard)
        while self._waiting_multi and self._waiting_multi[0][0] <= now_ms:
            multi = self._waiting_multi.popleft()[1]
            self.unavailable += 1
            multi.fail(Code.NOT_ENOUGH_REPLICAS, "not every shard of the request has a node that can read it now")
        for link in self.links.values():
            self._retry_reads(link)
        for number in list(self._flagged):
            shard = self.shards[number]
            if shard.purge_after_ms <= now_ms:
                self._flagged.discard(number)
                if shard.writable:
                    shard.purge_after_ms = now_ms + PURGE_INTERVAL_MS
                    self.write(PURGE, number, b"", (PURGE_KEYS_MAX,), 0, IGNORE, None)

    def _retry_reads(self, link: Progress) -> None:
        # Only from silence, not from work that takes long: reads moved from a busy node would make others busy too.
        if not link.written or max(link.written[0].written_ms, link.heard_ms) + READ_RETRY_MS > self.now_ms:
            return
        for batch in link.stages():
            if not batch.reads_moved and batch.answers:
                batch.reads_moved = True
                self._move_reads([op for op in batch.answers if op[0] != WRITE], link)

    def _why_not(self, shard: ShardState, is_write: bool) -> tuple[Code, str]:
        missing = [link for link in shard.members if not link.connected]
        if missing:
            names = "; ".join(f"{link.node}: {link.reason}" for link in missing)
            what = "writing" if is_write else "reading"
            return (
                Code.NOT_ENOUGH_REPLICAS,
                f"{what} shard {shard.number} needs nodes that are missing ({names}); nothing was executed",
            )
        return (
            Code.OVERLOADED,
            f"no room in the windows of shard {shard.number} for {WRITE_WAIT_MS} ms; nothing was executed",
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        for shard in self.shards:
            assert shard.commit <= shard.last_seq, "commit is at most the last number"
            assert len(shard.pending) == shard.last_seq - shard.commit, "pending are the numbers above commit"
            assert shard.commit == min(shard.acked.values()), "commit is what all members have"
            assert not shard.held or shard.held[0][0] > shard.commit, "what is committed is not held"
        for link in self.links.values():
            link.check()
        assert self.waiting_items == sum(len(s.waiting) for s in self.shards), "waiting items are counted"


class _Ignore:
    """Sink of the sequencer's own writes."""

    def reply(self, token: Any, result: Any) -> None:
        """Nobody waits for it."""

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """Nobody waits for it."""


IGNORE: Final = _Ignore()
__all__ = ["IGNORE", "LinkError", "Sequencer", "ShardState", "Sink"]
