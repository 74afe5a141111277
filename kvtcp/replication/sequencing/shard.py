"""Shard: one shard as the coordinator sees it, from a request to its answer.

Pure. A write gets its number and is queued to every member in the same synchronous step (rule R10); it is answered when
every member has it durable (R1). A read goes to the member with the fewest outstanding items. It is answered when its
result is here and (R11 b)

- for a present key: the revision that it shows is committed. Replicas apply in order, so a later write of that key
  cannot have been queued before the read;
- for anything else (absent, a count, a page): all writes queued for the shard before it are committed, because any of
  them may be the reason for an absence.

An answer that must wait for a commit is *held*: in a heap, by the number it waits for, at most WRITE_WAIT_MS. Then, or
at once when the commit cannot come (a member lost its data), it is refused: a read can always be refused.

A request that cannot be queued now, because a member is missing or a window is full, waits *unsequenced* and is refused
after WRITE_WAIT_MS (R4), at once if the queue is full. So everything here is bounded: queued items by the windows,
waiting requests by WAITING_ITEMS_MAX and the deadline; their bytes count for the server's total limit. The requests of
a shard keep their order while all its members are connected: when a window opens, those that waited go before new ones.
If a member is missing, writes wait and reads pass them to another member.

`write` and `read` are on the path of every operation and call nothing in the usual case. With all that follows until
the answer a read takes 0.5 us, a write 0.5 us with one copy and 0.8 us (large batches) to 1.4 us (one write of a shard
per batch) with three: `python -m bench.sequencer_micro`. Written out like this a read is 15 to 25 % cheaper.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any

from kvtcp.constants import (
    BATCH_BYTES_MAX,
    DRAIN_SLICE,
    WAITING_ITEMS_MAX,
    WINDOW_BYTES_MAX,
    WINDOW_ITEMS_MAX,
    WRITE_WAIT_MS,
)
from kvtcp.errors import Code, text_of
from kvtcp.protocol.link import CopyReport
from kvtcp.protocol.operations import PUT, RESULTS_OF, WRITE_OP_END
from kvtcp.replication.copy_reports import why_other
from kvtcp.replication.sequencing.cluster_state import ClusterState
from kvtcp.replication.sequencing.following import Following
from kvtcp.replication.sequencing.link import Link, Op
from kvtcp.replication.sequencing.requests import (
    AWAITED,
    CALL,
    GROWING,
    ITEM_OVERHEAD_BYTES,
    LINK_LOST,
    LOST,
    NUMBER,
    UNANSWERED,
    WRITE,
    Held,
    Sink,
    Waiting,
)


class Shard:
    """One shard."""

    __slots__ = (
        "acked", "bad", "base", "blocked_reason", "cluster", "commit", "good", "held", "joining", "last_seq",
        "learners", "members", "number", "orphans", "pending", "purge_after_ms", "reason", "serving", "space",
        "targets", "unanswered", "waiting", "waiting_reads", "writable",
    )  # fmt: skip

    def __init__(self, number: int, members: list[Link], cluster: ClusterState) -> None:
        self.number = number
        self.cluster = cluster
        self.members = members  # E: all of them must have an entry before it is committed; the first answers writes
        self.learners: dict[Link, Following] = {}  # nodes whose copies are being brought up to date
        self.joining: dict[Link, str] = {}  # replica ids of members that the stored map does not name yet
        self.targets = members  # links that get the writes: good members, then learners
        self.bad: dict[Link, str] = {}  # members that do not count, and why, as the end of a sentence
        self.good = members  # members that are not bad, in their order
        self.base = (0, 0)  # number and chain at which this coordinator took the shard over
        self.acked: dict[Link, int] = dict.fromkeys(members, 0)  # highest number each member has durable
        self.last_seq = 0  # highest number given
        self.commit = 0  # highest number durable on all members; <= last_seq
        self.pending: deque[Op] = deque()  # writes (commit, last_seq], in order
        # writes committed without their result, in order; the first may be answered meanwhile
        self.unanswered: deque[tuple[int, Op]] = deque()
        self.orphans: list[tuple[int, Op]] = []  # writes whose result was lost, to be asked for when a member is linked
        self.held: list[Held] = []  # heap of answers whose first field is above commit
        self.waiting: deque[Waiting] = deque()  # not sequenced yet, in order of arrival
        self.waiting_reads = 0  # reads in `waiting`
        self.serving = False  # its members are equal, and it takes requests
        self.reason = "its members have not reported yet"  # why not serving, for people
        self.blocked_reason = ""  # why the pending writes cannot commit now, for people; empty = they can
        self.space = 0  # how short of disk space the worst member is, see Link.space
        self.writable = False  # every write can be sequenced: see `update_writable`
        self.purge_after_ms = 0  # no purge before this time

    # --- requests in --------------------------------------------------------------------------------

    def write(self, op: int, key: bytes, args: Any, size: int, sink: Sink, token: Any) -> None:
        """Sequence one write, or let it wait. `args` is a sequence, `size` = bytes of its key and values."""
        if not self.writable and not self._admits(op, key, args, size, sink, token):
            return
        # R10: nothing from here to the last enqueue could yield.
        number = self.number
        self.last_seq = seq = self.last_seq + 1
        size += ITEM_OVERHEAD_BYTES
        waiter: Op | None
        if op == PUT:  # its result is its number: no node needs to answer, and all replicas get the same item
            self.pending.append([WRITE, sink, token, NUMBER])
            item = answering = (op, number, seq, 0, key, *args)
            waiter = None
        else:
            waiter = [WRITE, sink, token, AWAITED]
            self.pending.append(waiter)
            answering = (op, number, seq, 1, key, *args)
            item = (op, number, seq, 0, key, *args)
        stamp_ms = self.cluster.stamp_ms
        for link in self.targets:
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
                link.fill()

    def read(self, op: int, key: bytes, sink: Sink, token: Any) -> None:
        """Queue a read of one key (GET, EXISTS, TTL) to the replica with the fewest outstanding items."""
        if self.writable:  # so every member can take it
            members = self.members
            link = members[0]
            for other in members:
                if other.items < link.items:
                    link = other
        else:
            found = self.reader(None) if self.serving else None
            if found is None or (self.waiting and self.is_whole()):
                self.wait(op, key, None, len(key), sink, token)
                return
            link = found
        # `Link.enqueue`, written out: a call less is a tenth of a read
        stamp_ms = self.cluster.stamp_ms
        batch = link.open
        if batch is None or batch.bytes > BATCH_BYTES_MAX or batch.stamp_ms != stamp_ms:
            batch = link.new_batch(stamp_ms)
        batch.items.append((op, self.number, key))
        batch.answers.append([op, sink, token, self, self.last_seq, key])
        size = len(key) + ITEM_OVERHEAD_BYTES
        batch.bytes += size
        link.bytes = link_bytes = link.bytes + size
        link.items = items = link.items + 1
        if items >= WINDOW_ITEMS_MAX or link_bytes >= WINDOW_BYTES_MAX:
            link.fill()

    def reader(self, avoid: Link | None) -> Link | None:
        """The good member with room and the fewest outstanding items; if one is avoided for its silence, no silent one.
        A stopped shard has none."""
        best = None
        for link in self.good if self.serving else ():
            if avoid is not None and link.is_silent(self.cluster.now_ms):
                continue
            if link.connected and not link.full and link is not avoid and (best is None or link.items < best.items):
                best = link
        return best

    def enqueue_read(self, link: Link, read: Op) -> None:
        """Queue a read op; it sees all writes queued for the shard until now."""
        key: bytes = read[5]
        read[4] = self.last_seq
        link.enqueue((read[0], self.number, key), read, len(key) + ITEM_OVERHEAD_BYTES, self.cluster.stamp_ms)

    def _admits(self, op: int, key: bytes, args: Any, size: int, sink: Sink, token: Any) -> bool:
        """Whether a write of a shard that is not `writable` can be sequenced now; if not, it waits or is refused."""
        if self.serving and self.space and (self.space > 1 or op in GROWING):
            self.refuse(sink, token, Code.NO_SPACE, self._no_space())
            return False
        if self.space and self.takes_writes():
            return True
        self.wait(op, key, args, size, sink, token)
        return False

    def _no_space(self) -> str:
        short = ", ".join(link.node for link in self.members if link.space == self.space)
        takes = "no growing writes" if self.space == 1 else "no writes"
        return f"shard {self.number} takes {takes}: too little disk space on {short}; nothing was executed"

    def refuse(self, sink: Sink, token: Any, code: Code, text: str) -> None:
        """Answer a request as not executed."""
        self.cluster.unavailable += 1
        sink.fail(token, code, text, {"shard": self.number})

    # --- waiting ------------------------------------------------------------------------------------

    def wait(self, op: int, key: bytes, args: Any, size: int, sink: Sink, token: Any) -> None:
        """Let a request wait unsequenced; `args` is None for a read."""
        if not self.serving:
            self.refuse(sink, token, Code.SHARD_DOWN, f"shard {self.number} is down: {self.reason}")
            return
        if len(self.waiting) >= WAITING_ITEMS_MAX:
            text = f"{WAITING_ITEMS_MAX} requests wait for shard {self.number} already; nothing was executed"
            self.refuse(sink, token, Code.OVERLOADED, text)
            return
        size += ITEM_OVERHEAD_BYTES
        self.waiting.append((self.cluster.now_ms + WRITE_WAIT_MS, size, op, key, args, sink, token))
        self.waiting_reads += op >= WRITE_OP_END
        self.cluster.count_waiting(1, size)

    def _forget_waiting(self, entry: Waiting) -> None:
        """Count that `entry` left the queue."""
        self.waiting_reads -= entry[2] >= WRITE_OP_END
        self.cluster.count_waiting(-1, -entry[1])

    def drain(self) -> bool:
        """Queue the waiting requests as far as the windows allow; true if some are left because the turn is over."""
        waiting = self.waiting
        for _ in range(min(DRAIN_SLICE, len(waiting))):
            entry = waiting[0]
            _, size, op, key, args, sink, token = entry
            if op >= WRITE_OP_END:
                link = self.reader(None)
                if link is None:
                    return False
                self.enqueue_read(link, [op, sink, token, self, 0, key])
            else:
                if not self.targets_ready():
                    self.pass_writes()
                    return False
                self.writable = True
                self.write(op, key, args, size - ITEM_OVERHEAD_BYTES, sink, token)
                self.writable = False
            waiting.popleft()
            self._forget_waiting(entry)
        self.update_writable()
        return bool(waiting)

    def pass_writes(self) -> None:
        """If a member is missing or bad, let the waiting reads pass the writes, to another member."""
        if not self.waiting_reads or self.is_whole():
            return
        stay: deque[Waiting] = deque()
        for entry in self.waiting:
            link = self.reader(None) if entry[2] >= WRITE_OP_END else None
            if link is None:
                stay.append(entry)
            else:
                self.enqueue_read(link, [entry[2], entry[5], entry[6], self, 0, entry[3]])
                self._forget_waiting(entry)
        self.waiting = stay
        self.update_writable()

    def refuse_waiting(self, code: Code, text: str, wanted: Callable[[Waiting], bool]) -> None:
        """Refuse the waiting requests that are `wanted`."""
        keep: deque[Waiting] = deque()
        for entry in self.waiting:
            if wanted(entry):
                self._forget_waiting(entry)
                self.refuse(entry[5], entry[6], code, text)
            else:
                keep.append(entry)
        self.waiting = keep
        self.update_writable()

    def refuse_without_space(self) -> None:
        """Refuse the waiting requests that need more disk space than the worst member has."""
        level = self.space
        if level and self.waiting:
            self.refuse_waiting(
                Code.NO_SPACE, self._no_space(),
                lambda entry: entry[2] in GROWING or (level > 1 and entry[2] < WRITE_OP_END),
            )  # fmt: skip

    def expire_waiting(self) -> None:
        """Refuse the requests that waited too long."""
        waiting = self.waiting
        while waiting and waiting[0][0] <= self.cluster.now_ms:
            entry = waiting.popleft()
            self._forget_waiting(entry)
            code, text = self.why_not("reading" if entry[2] >= WRITE_OP_END else "writing")
            self.refuse(entry[5], entry[6], code, text)
        if not waiting and not self.writable:
            self.update_writable()

    def why_not(self, what: str) -> tuple[Code, str]:
        """Why a request could not be queued in time; `what` is reading or writing."""
        missing = [f"{link.node} {why}" for link, why in self.bad.items()]
        missing += [f"{link.node} is missing ({link.reason})" for link in self.good if not link.connected]
        if missing:
            names = ", ".join(missing)
            takes = "takes no writes" if what == "writing" else "cannot be read"
            return Code.NOT_ENOUGH_REPLICAS, f"shard {self.number} {takes}: {names}; nothing was executed"
        text = f"no room in the windows of shard {self.number} for {WRITE_WAIT_MS} ms; nothing was executed"
        return Code.OVERLOADED, text

    # --- answers out --------------------------------------------------------------------------------

    def acknowledged(self, link: Link, seq: int) -> None:
        """Note that `link` has the entries up to `seq`."""
        if self.learners and link in self.learners:
            self.learners[link].on_acknowledged(seq)
            return
        acked = self.acked
        if seq <= acked.get(link, seq):  # nothing new, or the link left the members meanwhile
            return
        acked[link] = seq
        commit = seq if len(acked) == 1 else min(acked.values())
        if commit > self.commit:
            self.commit_to(commit)

    def commit_to(self, commit: int) -> None:
        """Commit everything up to this number, which all members have (R1)."""
        number = self.commit
        self.commit = commit
        take = self.pending.popleft
        while number < commit:
            number += 1
            op = take()
            _, sink, token, result = op
            if sink is None:
                continue
            if result is NUMBER:
                sink.reply(token, number)
            elif result is AWAITED:  # its member is gone; another one was asked for the result, or will be
                op[3] = UNANSWERED
                self.unanswered.append((number, op))
            elif result is LOST:
                self._answer_lost(op)
            else:
                answer_write(op, result)
        held = self.held
        while held and held[0][0] <= commit:
            _, _, _, sink, token, value = heappop(held)
            if sink is None:
                token.release()
            else:
                sink.reply(token, value)

    def commit_acknowledged(self) -> None:
        """Commit the entries that all members have acknowledged, after the members changed."""
        commit = min(self.acked.values())
        if commit > self.commit:
            self.commit_to(commit)

    def answer_unknown(self, op: Op, why: str) -> None:
        """Answer a write, unless it is answered already, without saying whether it happened."""
        _, sink, token, _ = op
        if sink is not None:
            op[1] = None
            self.cluster.unknown += 1
            text = f"the write to shard {self.number} may or may not have happened: {why}"
            sink.fail(token, Code.UNKNOWN, text, {"shard": self.number})

    def _answer_lost(self, op: Op) -> None:
        self.answer_unknown(op, "its answer was lost with the connection to a node")

    def hold(self, needed: int, sink: Sink | None, token: Any, value: Any) -> None:
        """Keep an answer until `needed` is committed; without a sink the token is a read over several shards."""
        if self.blocked_reason:
            self.refuse_held(sink, token)
            return
        cluster = self.cluster
        cluster.held_order += 1
        heappush(self.held, (needed, cluster.held_order, cluster.now_ms + WRITE_WAIT_MS, sink, token, value))

    def refuse_held(self, sink: Sink | None, token: Any) -> None:
        """Refuse a read whose answer was held."""
        if not self.serving:
            text = f"shard {self.number} is down: {self.reason}"
        elif self.blocked_reason:
            text = f"shard {self.number} cannot commit what this read saw: {self.blocked_reason}"
        else:
            behind = "; ".join(
                f"{link.node}: {link.reason or 'slow'}" for link, seq in self.acked.items() if seq < self.last_seq
            )
            text = f"what this read saw of shard {self.number} was not committed in {WRITE_WAIT_MS} ms ({behind})"
        if sink is None:
            self.cluster.unavailable += 1
            token.fail(Code.NOT_ENOUGH_REPLICAS, text)
        else:
            self.refuse(sink, token, Code.NOT_ENOUGH_REPLICAS, text)

    def refuse_all_held(self) -> None:
        """Refuse all reads whose answers are held, in order."""
        held, self.held = sorted(self.held), []
        for entry in held:
            self.refuse_held(entry[3], entry[4])

    def expire_held(self) -> None:
        """Refuse the answers that were held too long."""
        now_ms = self.cluster.now_ms
        if self.held and any(entry[2] <= now_ms for entry in self.held):
            late: list[Held] = sorted(entry for entry in self.held if entry[2] <= now_ms)
            self.held = [entry for entry in self.held if entry[2] > now_ms]
            heapify(self.held)
            for entry in late:
                self.refuse_held(entry[3], entry[4])

    # --- results that were lost ---------------------------------------------------------------------

    def hand_over(self) -> None:
        """Ask another member for lost results of writes; all members evaluate the same."""
        orphans, self.orphans = self.orphans, []
        self._ask(orphans, [])

    def _ask(self, orphans: list[tuple[int, Op]], asked: list[Link]) -> None:
        """Ask a member that was not `asked` yet: those that were do not know, as no restarted node does."""
        link = next((each for each in self.good if each.connected and each not in asked), None)
        if link is None:
            if asked:
                for _, op in orphans:
                    self._result_found(op, LOST)
            else:
                self.orphans += orphans  # until a member is linked
            return

        def take(results: Any) -> None:
            if results is LINK_LOST:
                self._ask(orphans, asked)
                return
            if len(results) < len(orphans):  # they are large
                self._ask(orphans[len(results) :], asked)
            unknown = []
            for orphan, found in zip(orphans, results, strict=False):
                if found is None:
                    unknown.append(orphan)
                else:
                    self._result_found(orphan[1], found[0])
            if unknown:
                self._ask(unknown, [*asked, link])

        item = (RESULTS_OF, self.number, [seq for seq, _ in orphans])
        link.enqueue(item, [CALL, take], ITEM_OVERHEAD_BYTES, self.cluster.stamp_ms)

    def _result_found(self, op: Op, result: Any) -> None:
        """Take the result of a write from a member that was asked for it, or LOST."""
        if op[3] is AWAITED:
            op[3] = result
        elif op[3] is UNANSWERED and op[1] is not None:
            if result is LOST:
                self._answer_lost(op)
            else:
                answer_write(op, result)

    # --- members ------------------------------------------------------------------------------------

    def serve(self, seq: int, chain: int) -> None:
        """Serve the shard from a position that all members have."""
        assert not self.serving and not self.pending, "a shard that is served is not taken over"
        self.base = (seq, chain)
        self.last_seq = self.commit = seq
        self.acked = dict.fromkeys(self.members, seq)
        self.bad = {}
        self.serving, self.reason = True, ""
        for link in self.members:
            link.forget_older(self.number)
        self.retarget()

    def retarget(self) -> None:
        """Set all that depends on members and learners, after a change of them."""
        self.update_targets()
        self.update_space()
        self.check_blocked()
        self.update_writable()

    def mark(self, link: Link, why: str) -> None:
        """Mark a member as bad, or (empty) as good."""
        if why:
            self.bad[link] = why
        else:
            self.bad.pop(link, None)
        self.update_targets()

    def abandon(self, link: Link, why: str) -> None:
        """Mark a member as bad and block writes: the node lacks entries that it acknowledged."""
        self.mark(link, why)
        self.writable = False
        self.check_blocked()

    def why_bad(self, link: Link, copy: CopyReport | None) -> str:
        """Why a reported copy is not that of the member, or of the learner that the map is about to name; empty if it
        is."""
        if copy is None:
            return "has no copy of it"
        learner = self.learners.get(link)
        if learner is None:
            replica_id, acked = self.joining.get(link, ""), self.acked[link]
        else:
            replica_id, acked = learner.replica_id, learner.acked
        replica_id = replica_id or self.cluster.map.replica_id_of(self.number, link.node)
        return why_other(copy, self.number, replica_id, acked, self.last_seq, self.base)

    def check_blocked(self) -> None:
        """Set `blocked_reason`. If a bad member has to stay, pending writes cannot commit before it is replaced, which
        takes longer than clients wait: they are answered now."""
        lost = [f"{link.node} {why}" for link, why in self.bad.items() if self.acked[link] < self.last_seq]
        may_leave = len(self.members) > self.cluster.min_insync and self.good
        self.blocked_reason = "" if may_leave else "; ".join(lost)
        if self.blocked_reason:
            for op in self.pending:
                self.answer_unknown(op, self.blocked_reason)
            self.refuse_all_held()

    def update_targets(self) -> None:
        """Set `good` and `targets` from what they depend on."""
        self.good = [member for member in self.members if member not in self.bad]
        self.targets = self.good + [
            link for link, learner in self.learners.items() if learner.takes_writes and link not in self.good
        ]

    def update_writable(self) -> None:
        """Set `writable`: serving, no request waits, every member is good, linked, and has room in its window and on
        its disk."""
        self.writable = not self.space and self.takes_writes()

    def update_space(self) -> None:
        """Set `space` from the members."""
        self.space = max([link.space for link in self.members], default=0)

    # --- questions ----------------------------------------------------------------------------------

    def announced_commit(self) -> int:
        """The highest commit number to announce. Nodes drop results up to it, so it stays below any write whose result
        is still missing."""
        unanswered = self.unanswered
        while unanswered and unanswered[0][1][1] is None:
            unanswered.popleft()
        return unanswered[0][0] - 1 if unanswered else self.commit

    def is_whole(self) -> bool:
        """Whether every member is linked and good, so that writes continue as soon as there is room."""
        return not self.bad and all(link.connected for link in self.members)

    def targets_ready(self) -> bool:
        """Whether all members and learners can take a write now."""
        if self.bad or any(learner.holds_writes for learner in self.learners.values()):
            return False
        ready = True
        for link in self.targets:  # a loop: `all` would make a generator for every request that waited
            if link.full or not link.connected:
                ready = False
        return ready

    def takes_writes(self) -> bool:
        """Whether a write that needs no space can be sequenced now."""
        return self.serving and not self.waiting and self.targets_ready()

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        assert list(self.acked) == self.members, "acked has the members, in their order"
        if self.serving:
            assert self.commit <= self.last_seq, "commit is at most the last number"
            assert len(self.pending) == self.last_seq - self.commit, "pending are the numbers above commit"
            assert self.commit == min(self.acked.values()), "commit is what all members have"
            assert max(self.acked.values()) <= self.last_seq, "no member acknowledged a number that was not given"
        assert not self.unanswered or self.unanswered[-1][0] <= self.commit, "unanswered writes are committed"
        assert not self.held or self.held[0][0] > self.commit, "a committed answer is not held"
        assert not self.held or not self.blocked_reason, "nothing is held for a commit that cannot come"
        reads = sum(entry[4] is None for entry in self.waiting)
        assert self.waiting_reads == reads, "waiting reads are counted"
        if self.writable:
            assert self.serving and not self.waiting, "a writable shard serves, and no request waits"
            assert all(link.connected and not link.full for link in self.targets), "all members can take a write"
            assert not self.bad and not self.space, "a writable shard has no bad member, and space"
        assert self.good == [link for link in self.members if link not in self.bad], "good members are those not bad"
        assert self.bad.keys() <= set(self.members), "only a member is bad"
        learning = [link for link, each in self.learners.items() if each.takes_writes and link not in self.good]
        assert self.targets == self.good + learning, "writes go to good members and learners"


def answer_write(op: Op, result: Any) -> None:
    """Answer a committed write with its result."""
    _, sink, token, _ = op
    op[1] = None
    if type(result) is list:
        if len(result) == 1:  # the results of a transaction
            sink.reply(token, result[0])
        else:
            sink.fail(token, result[0], *text_of(result[1], result[2]))
    else:
        sink.reply(token, result)
