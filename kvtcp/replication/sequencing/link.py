"""Link: what one node was sent, has applied, has durable, and may be sent.

Pure. The coordinator's sequencer keeps one Link per node; the server moves its batches to the socket. The idea is that
of etcd-raft's `tracker/progress.go` and `inflights.go`, for a FIFO link: replies match by order, so the only state of
an item is its place in a batch.

A batch passes through four stages, each a queue in order of ordinals:

    open (being filled in this tick) -> outgoing (closed, not yet written) -> written (awaiting results) -> applied
    (awaiting durability) -> gone, acknowledged

Invariants (`check`):
- `items` and `bytes` count everything in the four stages; a link without room in its window is marked `full`;
- ordinals count the items of this link since HELLO, without a gap over the stages;
- a batch has one stamp and is never merged with another one: an entry keeps its stamp for ever, in a re-send too;
- `resend` has writes only, and is sent before anything new when the node is back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final

from kvtcp.constants import BATCH_BYTES_MAX, READ_RETRY_MS, WINDOW_BYTES_MAX, WINDOW_ITEMS_MAX
from kvtcp.protocol.operations import WRITE_OP_END
from kvtcp.replication.sequencing.requests import AWAITED, UNANSWERED

Item = tuple[Any, ...]  # as operations.py lays it out
Op = list[Any]  # what waits for an answer: see requests.py
Orphan = tuple[int, int, Op]  # shard, number and op of a write whose result does not come over the link any more
Wanted = Callable[[int, int], bool]  # whether a write is meant, by its shard and number

ANSWERED: Final[Op] = [-2]  # stands for the op of a write to be sent again whose result is known already
SEQ_MAX: Final = 1 << 63  # above every number
UNCOMMITTED_MAX: Final = 64  # batches remembered as uncommitted before the committed ones are dropped


class LinkError(Exception):
    """Raised for a node's frame that cannot be true (wrong count, ordinal from the future): the link is closed."""


class Batch:
    """The items of one tick for one node."""

    __slots__ = ("answers", "bytes", "items", "last_ordinal", "last_seqs", "stamp_ms", "unmoved", "written_ms")

    def __init__(self, stamp_ms: int) -> None:
        self.stamp_ms = stamp_ms
        self.items: list[Item] = []
        self.answers: list[Op] = []  # one for each item that the node answers, in order
        self.last_seqs: dict[int, int] = {}  # shard -> highest sequence number in this batch
        self.bytes = 0
        self.last_ordinal = 0  # set when closed
        self.written_ms = 0  # monotonic time of writing
        self.unmoved: list[Op] | None = None  # once its reads were queued elsewhere too: those that could not be

    def part(self, wanted: Wanted) -> Batch:
        """The wanted writes of a batch of writes."""
        part = Batch(self.stamp_ms)
        part.bytes = self.bytes
        answers = iter(self.answers)
        for item in self.items:
            op = next(answers) if item[3] else None
            if wanted(item[1], item[2]):
                part.items.append(item)
                part.last_seqs[item[1]] = item[2]
                if op is not None:
                    part.answers.append(op)
        return part

    def unanswered(self, wanted: Wanted) -> list[Orphan]:
        """The wanted writes of a batch of writes that wait for a result of it."""
        answered = [item for item in self.items if item[3]]
        return [
            (item[1], item[2], op)
            for item, op in zip(answered, self.answers, strict=True)
            if op is not ANSWERED and op[1] is not None and op[3] in (AWAITED, UNANSWERED) and wanted(item[1], item[2])
        ]


class Link:
    """One node as the sequencer sees it."""

    __slots__ = (
        "answered", "applied", "bytes", "connected", "full", "heard_ms", "items", "last_ordinal", "next_turn", "node",
        "open", "outgoing", "reason", "resend", "shards", "space", "uncommitted", "uncommitted_max", "written",
        "written_ordinal",
    )  # fmt: skip

    def __init__(self, node: str) -> None:
        self.node = node
        self.connected = False  # the link is up; whether a copy of the node counts is another matter, see Shard.bad
        self.reason = "not connected yet"  # why not, for people
        self.heard_ms = 0  # monotonic time of the last bytes from the node
        self.full = False  # the window has no room; writes of its shards wait
        self.space = 0  # how short of disk space the node is: 0 not, 1 no growing writes, 2 no writes
        self.items = 0
        self.bytes = 0
        self.last_ordinal = 0  # of the last closed batch
        self.written_ordinal = 0  # of the last written batch; <= last_ordinal
        self.open: Batch | None = None
        self.outgoing: deque[Batch] = deque()
        self.written: deque[Batch] = deque()
        self.applied: deque[Batch] = deque()
        self.answered = 0  # results of the oldest written batch that came already; at least one is still to come
        # batches with writes not yet known committed, in order: the ordinal before the batch, its last_seqs
        self.uncommitted: deque[tuple[int, dict[int, int]]] = deque()
        self.uncommitted_max = UNCOMMITTED_MAX  # length of `uncommitted` above which committed batches are dropped
        self.shards: list[Any] = []  # the Shards with a replica here
        self.resend: list[Batch] = []  # writes for when the node is back, or back with the copy that it had
        self.next_turn = 0  # index of the shard whose waiting requests are next when the window opens

    def is_silent(self, now_ms: int) -> bool:
        """Whether results are awaited and no byte came from the node for READ_RETRY_MS."""
        written = self.written
        return bool(written) and now_ms - max(written[0].written_ms, self.heard_ms) >= READ_RETRY_MS

    def stages(self) -> Iterator[Batch]:
        """All batches, oldest first."""
        last = () if self.open is None else (self.open,)
        return chain(self.applied, self.written, self.outgoing, last)

    def oldest_unacknowledged(self) -> Batch | None:
        """The first batch that was written and is not durable there; None if there is none."""
        return self.applied[0] if self.applied else self.written[0] if self.written else None

    def new_batch(self, stamp_ms: int) -> Batch:
        """Close the open batch, if any, and open one."""
        if self.open is not None:
            self.close_batch()
        self.open = batch = Batch(stamp_ms)
        return batch

    def enqueue(self, item: Item, waiter: Op, size: int, stamp_ms: int) -> None:
        """Queue an item that the node answers."""
        batch = self.open
        if batch is None or batch.bytes > BATCH_BYTES_MAX or batch.stamp_ms != stamp_ms:
            batch = self.new_batch(stamp_ms)
        batch.items.append(item)
        batch.answers.append(waiter)
        batch.bytes += size
        self.bytes += size
        self.items += 1
        if self.items >= WINDOW_ITEMS_MAX or self.bytes >= WINDOW_BYTES_MAX:
            self.fill()

    def fill(self) -> None:
        """Mark the window as full: no write of its shards can be queued."""
        if not self.full:
            self.full = True
            for shard in self.shards:
                shard.writable = False

    def send_again(self, batch: Batch) -> None:
        """Queue a batch of writes with its stamp, unless it is empty."""
        if batch.items:
            self.open = batch
            self.items += len(batch.items)
            self.bytes += batch.bytes
            self.close_batch()

    def drop_resend(self, dropped: Wanted) -> list[Orphan]:
        """Forget these writes of `resend`; returns those that still waited for a result."""
        orphans = [orphan for batch in self.resend for orphan in batch.unanswered(dropped)]
        parts = [batch.part(lambda number, seq: not dropped(number, seq)) for batch in self.resend]
        self.resend = [part for part in parts if part.items]
        return orphans

    def close_batch(self) -> None:
        """Give the open batch its ordinals; it may be written then."""
        batch = self.open
        if batch is None:
            return
        self.open = None
        if batch.last_seqs:
            self.uncommitted.append((self.last_ordinal, batch.last_seqs))
        self.last_ordinal += len(batch.items)
        batch.last_ordinal = self.last_ordinal
        self.outgoing.append(batch)

    def forget_older(self, number: int) -> None:
        """Stop tracking entries from before this link: they are committed, or the node left the shard."""
        if self.uncommitted and self.uncommitted[0][0] < 0:
            self.uncommitted[0][1].pop(number, None)

    def drop_committed(self, committed: Wanted) -> None:
        """Forget the batches whose writes are all committed, so that `uncommitted` is bounded by uncommitted writes. It
        is done again when the rest has doubled."""
        self.uncommitted = deque(
            entry for entry in self.uncommitted if not all(committed(*last) for last in entry[1].items())
        )
        self.uncommitted_max = UNCOMMITTED_MAX + 2 * len(self.uncommitted)

    def next_outgoing(self, now_ms: int) -> Batch | None:
        """Take the next batch to write; its results are awaited from now on."""
        if not self.outgoing:
            return None
        batch = self.outgoing.popleft()
        batch.written_ms = now_ms
        self.written_ordinal = batch.last_ordinal
        self.written.append(batch)
        return batch

    def on_applied(self, ordinal: int, durable: int, results: list[Any]) -> tuple[list[Op], list[Any]]:
        """Ops and results, pairwise, of a frame. Raises LinkError, with nothing changed, if they do not match the items
        sent.

        A node splits large results over several frames: the ordinal then stands still until the batch is complete.
        Results are passed on as they come, so that they do not pile up here.
        """
        if not durable <= ordinal <= self.written_ordinal:
            raise LinkError(
                f"{self.node} applied ordinal {ordinal}, {durable} durably; the last one sent is {self.written_ordinal}"
            )
        written = self.written
        skip = self.answered
        batches = 0  # complete now
        due = 0  # results of these that did not come before
        for batch in written:
            if batch.last_ordinal > ordinal:
                break
            batches += 1
            due += len(batch.answers)
        if batches:
            due -= skip
        early = len(results) - due
        if early < 0:
            raise LinkError(f"{self.node} sent {len(results)} results, {due} were due up to ordinal {ordinal}")
        if early and (batches == len(written) or early > len(written[batches].answers) - (0 if batches else skip)):
            raise LinkError(f"{self.node} sent {early} results that nobody asked for")
        if batches == 1 and not skip and not early:  # the usual frame: the results of one batch
            batch = written.popleft()
            self.applied.append(batch)
            return batch.answers, results
        answers: list[Op] = []
        for _ in range(batches):
            batch = written.popleft()
            self.applied.append(batch)
            answers += batch.answers[skip:]
            skip = 0
        if early:
            answers += written[0].answers[skip : skip + early]
        self.answered = skip + early
        return answers, results

    def on_durable(self, ordinal: int) -> list[Batch]:
        """Take the batches that are acknowledged now: they leave the window."""
        done: list[Batch] = []
        applied = self.applied
        while applied and applied[0].last_ordinal <= ordinal:
            batch = applied.popleft()
            self.items -= len(batch.items)
            self.bytes -= batch.bytes
            done.append(batch)
        return done

    def disconnect(self, reason: str) -> tuple[list[Batch], list[Op]]:
        """Take the link down. Returns the writes, in batches, and the reads to queue elsewhere: those without a result,
        unless they were queued elsewhere already."""
        writes: list[Batch] = []
        reads: list[Op] = []
        answered = len(self.applied)  # the results of these are here already
        for n, old in enumerate(self.stages()):
            batch = Batch(old.stamp_ms)
            answers = iter(old.answers)
            for item in old.items:
                is_write = item[0] < WRITE_OP_END
                op = next(answers) if not is_write or item[3] else None
                if is_write:
                    batch.items.append(item)
                    batch.last_seqs[item[1]] = item[2]
                    if op is not None:
                        batch.answers.append(ANSWERED if n < answered else op)
                elif op is not None and n >= answered and old.unmoved is None:
                    reads.append(op)
            if n >= answered and old.unmoved is not None:
                reads += old.unmoved
            batch.bytes = old.bytes
            if batch.items:
                writes.append(batch)
        self.connected = self.full = False
        self.reason = reason
        self.open = None
        self.answered = 0
        self.items = self.bytes = self.last_ordinal = self.written_ordinal = 0
        self.uncommitted_max = UNCOMMITTED_MAX
        for stage in (self.outgoing, self.written, self.applied, self.uncommitted):
            stage.clear()
        return writes, reads

    def has_room(self, share: float = 1.0) -> bool:
        """Whether less than this share of the window is used."""
        return self.items < WINDOW_ITEMS_MAX * share and self.bytes < WINDOW_BYTES_MAX * share

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        batches = list(self.stages())
        assert self.items == sum(len(b.items) for b in batches), "items counts the items of all stages"
        assert self.bytes == sum(b.bytes for b in batches), "bytes counts the bytes of all stages"
        ordinal = None
        for batch in batches:
            if batch is self.open:
                continue
            if ordinal is not None:
                assert batch.last_ordinal == ordinal + len(batch.items), "ordinals have no gap"
            ordinal = batch.last_ordinal
        assert ordinal is None or ordinal == self.last_ordinal, "last_ordinal is that of the last closed batch"
        assert self.written_ordinal <= self.last_ordinal, "what was written was closed before"
        assert self.full or self.has_room(), "a window without room is marked full"
        assert self.connected or not batches, "a link that is down has nothing under way"
        asked = len(self.written[0].answers) if self.written else 0
        assert self.answered <= asked, "early results are of one batch"
