"""The sequencer: the path of requests of all shards, over the links to all nodes.

Pure: events in (requests, results, links up and down, time), batches for the links and answers to the sinks out.
Requests of one key go to their `Shard` (shard.py); everything about several shards or a whole `Link` (link.py) is here.

Per shard a write passes: waiting (unsequenced, only if a link is missing or a window full) -> pending (numbered and
queued to every replica in the same step) -> committed (every replica acknowledged it) -> answered.
Reads go to one replica over the same FIFO link, so they see exactly the writes queued before them, and are held until
those are committed.

When a link is lost its writes stay and are sent again, with their stamps, when the node is back with the position it
acknowledged or a later one; its reads are queued at other members. The copies of a node are judged one by one. A copy
that is another one, or has less than it acknowledged, is *bad*: it is not read, and its shard takes no writes. The
writes for it stay, as the process that has the data may still come back.

Membership and Recovery decide whether a node becomes a member or leaves, and store it in the map; here are the
consequences for batches, acknowledgements and answers. A learner gets every write from `attach` on and counts for
nothing, until it `join`s or `swap`s in. Writes to be sent again over a link that is no member any more are forgotten;
a result that only its node could have given is asked for at another member, which evaluated the same operation.

Several shards that wait for one window take turns of DRAIN_SLICE requests; the next turn is remembered (`next_turn`).

Invariants (`check`):
- numbers of a shard have no gap; `commit <= last_seq`; `pending` are exactly the numbers (commit, last_seq];
- `commit` is the smallest number acknowledged by all members, and never decreases;
- an op answered is committed on every member (writes), or saw only committed state (reads); it is answered once;
- after the first item of an entry is queued the answer is its result or UNKNOWN; `Unavailable` comes only before;
- a link's `shards` are those of which it is a member or a learner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import PURGE_INTERVAL_MS, PURGE_KEYS_MAX, PURGE_SHARDS_MAX
from kvtcp.errors import Code
from kvtcp.protocol.link import CopyReport
from kvtcp.protocol.operations import EXISTS, GET, PURGE, REVISION
from kvtcp.replication.sequencing.cluster_state import ClusterState
from kvtcp.replication.sequencing.link import ANSWERED, SEQ_MAX, Batch, Link, LinkError, Op, Orphan, Wanted
from kvtcp.replication.sequencing.multi_read import MultiRead
from kvtcp.replication.sequencing.reads import Reads
from kvtcp.replication.sequencing.requests import (
    CALL,
    IGNORE,
    ITEM_OVERHEAD_BYTES,
    LINK_LOST,
    PART,
    UNANSWERED,
    WRITE,
    Sink,
)
from kvtcp.replication.sequencing.shard import Shard, answer_write

# entries of a shard that is not served yet never count as committed
NEVER: Final = SEQ_MAX


class Sequencer(ClusterState):
    """The write and read path of all shards. Every public method is one synchronous step."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self.links = {node: Link(node) for node in cluster_map.nodes}
        self.shards: list[Shard] = []
        for number, members in enumerate(cluster_map.members):
            shard = self.make_shard(number, [self.links[node] for node, _ in members])
            self.shards.append(shard)
            for link in shard.members:
                link.shards.append(shard)
        self.reads = Reads(self, self.shards, self.links)
        self._flagged: dict[int, None] = {}  # shards that hold expired keys, in the order of the nodes' flags

    def make_shard(self, number: int, members: list[Link]) -> Shard:
        """A shard that is not served yet."""
        return Shard(number, members, self)

    def map_changed(self, cluster_map: ClusterMap) -> None:
        """The config store holds this map now."""
        super().map_changed(cluster_map)
        for shard in self.shards:
            if shard.joining:
                named = cluster_map.members[shard.number]
                shard.joining = {link: each for link, each in shard.joining.items() if (link.node, each) not in named}

    # --- reads over several shards, and control items -----------------------------------------------

    def multi_read(self, multi: MultiRead) -> None:
        """Queue a read over several shards in this one step, so that its answer is one consistent cut."""
        self.reads.start_or_wait(multi)

    def control(self, node: str, item: tuple[Any, ...], shards: Sequence[int], sink: Sink, token: Any) -> bool:
        """Queue a control item (freeze) to one node; false if its link is down. The item is answered when everything
        queued for `shards` before it is committed; UNKNOWN if the link is lost first."""
        link = self.links[node]
        if not link.connected:
            return False
        multi = MultiRead(shards, sink, token, lambda numbers: (item, 0), lambda results: results[0], 0)
        multi.movable = False
        multi.start(1, {self.shards[number]: self.shards[number].last_seq for number in shards})
        link.enqueue(item, [PART, multi, multi.attempt, 0], ITEM_OVERHEAD_BYTES, self.stamp_ms)
        return True

    def call(self, link: Link, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        """Queue a control item; `then` gets its result, or LINK_LOST."""
        link.enqueue(item, [CALL, then], ITEM_OVERHEAD_BYTES, self.stamp_ms)

    # --- what waits ---------------------------------------------------------------------------------

    def _opened(self, link: Link) -> None:
        """Queue the requests that waited for a link with room again, before any new one."""
        link.full = False
        for shard in link.shards:
            shard.update_writable()
        # Few, at most one item per link each, and behind the others they would find every window full.
        self.reads.start_waiting()
        shards = link.shards
        at = link.next_turn
        queue: deque[Shard] = deque(shard for shard in shards[at:] + shards[:at] if shard.waiting)
        while queue:
            shard = queue.popleft()
            if shard.drain():
                queue.append(shard)
            elif link.full:
                link.next_turn = shards.index(shard)
                break

    def _resume(self, shards: Iterable[Shard]) -> None:
        """Queue the requests that waited for these shards."""
        for shard in shards:
            while shard.waiting and shard.drain():
                pass
            shard.update_writable()
        self.reads.start_waiting()

    def refuse_waiting(self, code: Code, text: str, wanted: Callable[[bytes], bool]) -> None:
        """Refuse the unsequenced requests whose key is `wanted`."""
        for shard in self.shards:
            shard.refuse_waiting(code, text, lambda entry: wanted(entry[3]))

    def on_space(self, node: str, level: int) -> None:
        """Take a node's new level of disk space."""
        link = self.links[node]
        link.space = level
        for shard in link.shards:
            shard.update_space()
            shard.refuse_without_space()
            shard.update_writable()

    # --- batches ------------------------------------------------------------------------------------

    def close_batches(self) -> list[Link]:
        """End the tick: close the open batches; returns the links with something to send."""
        ready = []
        for link in self.links.values():
            if link.open is not None:
                link.close_batch()
            if link.outgoing:
                ready.append(link)
        return ready

    def committed_ordinal(self, link: Link) -> int:
        """The ordinal of `link` up to which every write is committed, for its next batch."""
        uncommitted = link.uncommitted
        shards = self.shards
        while uncommitted:
            ordinal, last_seqs = uncommitted[0]
            for number, seq in last_seqs.items():
                shard = shards[number]
                if (shard.announced_commit() if shard.unanswered else shard.commit) < seq:
                    # A write that waits for another node may stay first for long: drop the batches behind it.
                    if len(uncommitted) > link.uncommitted_max:
                        link.drop_committed(lambda number, seq: shards[number].announced_commit() >= seq)
                    return ordinal
            uncommitted.popleft()
        return link.written_ordinal

    # --- what the nodes say ------------------------------------------------------------------------

    def heard(self, node: str) -> None:
        """Note that bytes came from the node, whether or not they complete a frame: it is not silent."""
        self.links[node].heard_ms = self.now_ms

    def on_results(self, node: str, applied: int, durable: int, results: list[Any], flags: Sequence[int]) -> None:
        """Take a RESULTS frame. Raises LinkError, with nothing changed, if it cannot be true."""
        link = self.links[node]
        if not link.connected:
            raise LinkError(f"{node} is not linked")
        if not (type(applied) is type(durable) is int and type(results) is list):
            raise LinkError(f"{node} sent results that are none")
        answers, results = link.on_applied(applied, durable, results)
        if answers:
            for op, result in zip(answers, results, strict=True):
                if op[0] == WRITE:
                    if op[3] is UNANSWERED and op[1] is not None:  # committed before, with another member's help
                        op[3] = result
                        answer_write(op, result)
                    else:
                        op[3] = result
        # Commits first: a read in the same frame then finds the writes that it saw committed, and need not be held.
        shards = self.shards
        for batch in link.on_durable(durable):
            for number, seq in batch.last_seqs.items():
                shards[number].acknowledged(link, seq)
        if answers:
            for op, result in zip(answers, results, strict=True):
                kind = op[0]
                if kind == GET:  # `_read_done` of the most frequent read, written out
                    sink = op[1]
                    if sink is not None:
                        op[1] = None
                        shard = op[3]
                        needed = op[4] if result is None else result[1]
                        if needed <= shard.commit:
                            sink.reply(op[2], result)
                        else:
                            shard.hold(needed, sink, op[2], result)
                elif kind != WRITE and op is not ANSWERED:
                    self._read_done(op, result)
        for number in flags:
            if type(number) is int and 0 <= number < len(shards):
                self._flagged[number] = None
        if link.full and link.has_room(0.75):
            self._opened(link)

    def _read_done(self, op: Op, result: Any) -> None:
        """Take the result of a read, of a part or of a control item."""
        kind = op[0]
        if kind == CALL:
            then, op[1] = op[1], None
            then(result)
            return
        if kind == PART:
            if op[1].take(op[2], op[3], result):
                op[1].release()
            return
        _, sink, token, shard, needed, _ = op
        if sink is None:  # answered by another member meanwhile
            return
        op[1] = None
        if result is None:
            result = False if kind == EXISTS else None
        elif kind == GET:
            needed = result[1]
        elif kind == EXISTS:
            needed, result = result[0], True
        elif kind == REVISION:
            needed = result = result[0]
        else:
            needed = result[0]
            result = -1 if result[1] is None else result[1]
        if needed <= shard.commit:
            sink.reply(token, result)
        else:
            shard.hold(needed, sink, token, result)

    # --- members ------------------------------------------------------------------------------------

    def add_link(self, node: str) -> Link:
        """Add a node of the map."""
        link = self.links[node] = Link(node)
        return link

    def remove_link(self, node: str) -> None:
        """Remove a node that left the cluster, and holds nothing."""
        link = self.links.pop(node)
        assert not link.shards and not link.connected, "a node that is removed holds nothing"

    def set_members(self, number: int, nodes: Sequence[str]) -> None:
        """Set the members of a shard that is not served."""
        shard = self.shards[number]
        assert not shard.serving, "members of a shard in service come and go one by one"
        members = [self.links[node] for node in nodes]
        for link in shard.members:
            if link not in members and link not in shard.learners:
                link.shards.remove(shard)
                link.forget_older(number)
        for link in members:
            if shard not in link.shards:
                link.shards.append(shard)
        shard.members = members
        shard.bad = {link: why for link, why in shard.bad.items() if link in members}
        shard.acked = {link: shard.acked.get(link, shard.commit) for link in members}
        shard.retarget()

    def attach(self, shard: Shard, link: Link, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        """Queue a LEARN to the link of a learner, and from there on every write of the shard, in one step (R10)."""
        self.call(link, item, then)
        if shard not in link.shards:
            link.shards.append(shard)
        shard.update_targets()
        shard.update_writable()

    def detach(self, shard: Shard, link: Link) -> None:
        """End a learner: the link gets no more writes of the shard."""
        del shard.learners[link]
        if link not in shard.acked and shard in link.shards:  # else it was not attached yet
            link.shards.remove(shard)
        shard.retarget()
        self._resume([shard])

    def join(self, shard: Shard, link: Link, is_first: bool = False) -> None:
        """R2: make a learner that acknowledged everything committed one of E, with `is_first` the one that answers
        writes."""
        learner = shard.learners.pop(link)
        assert link not in shard.acked and learner.acked >= shard.commit, "it acknowledged everything committed"
        shard.members = [link, *shard.members] if is_first else [*shard.members, link]
        acked = {**shard.acked, link: learner.acked}
        shard.acked = {member: acked[member] for member in shard.members}
        shard.joining[link] = learner.replica_id
        shard.retarget()
        if learner.holds_writes:
            self._resume([shard])

    def leave(self, shards: Sequence[Shard], link: Link) -> None:
        """R2: remove from E a member that the map does not name any more."""
        for shard in shards:
            shard.members = [member for member in shard.members if member is not link]
            shard.bad.pop(link, None)
            del shard.acked[link]
        for shard in shards:
            shard.retarget()
        gone = {shard.number for shard in shards}
        link.shards = [shard for shard in link.shards if shard.number not in gone or link in shard.learners]
        self._forget_resend(link, lambda number, seq: number in gone)
        for shard in shards:
            shard.commit_acknowledged()
        self._resume(shards)

    def swap(self, shard: Shard, old: Link, link: Link) -> None:
        """Put a learner that the map names now in the place of the member `old`, which may be another copy of the same
        node."""
        learner = shard.learners.pop(link)
        assert learner.acked >= shard.commit, "it acknowledged everything committed"
        if old is link:
            self._take_orphans(link.drop_resend(lambda number, seq: number == shard.number and seq <= learner.acked))
        else:
            self._forget_resend(old, lambda number, seq: number == shard.number)
        shard.bad.pop(old, None)
        if learner.lost_reason:
            shard.bad[link] = learner.lost_reason
        shard.members = [link if member is old else member for member in shard.members]
        acked = {**shard.acked, link: learner.acked}
        shard.acked = {member: acked[member] for member in shard.members}
        shard.retarget()
        if old is not link:
            old.shards.remove(shard)
            old.forget_older(shard.number)
        if shard.serving:
            shard.commit_acknowledged()
            self._resume([shard])

    def _forget_resend(self, link: Link, forgotten: Wanted) -> None:
        """Send none of these writes again: the link is no member of their shards any more."""
        self._take_orphans(link.drop_resend(forgotten))
        self._hand_over()

    def _still_due(self, link: Link, batches: Iterable[Batch]) -> list[Batch]:
        """The writes to send again when a lost link is back: none of shards that were stopped, or of which it is no
        member or learner any more."""
        over = {
            shard.number
            for shard in [self.shards[number] for batch in batches for number in batch.last_seqs]
            if not shard.serving or (link not in shard.acked and link not in shard.learners)
        }
        if not over:
            return list(batches)
        for batch in batches:
            self._take_orphans(batch.unanswered(lambda number, seq: number in over))
        parts = [batch.part(lambda number, seq: number not in over) for batch in batches]
        return [part for part in parts if part.items]

    def _take_orphans(self, orphans: Iterable[Orphan]) -> None:
        """Note writes whose results do not come over their link any more."""
        for number, seq, op in orphans:
            self.shards[number].orphans.append((seq, op))

    def _hand_over(self) -> None:
        """Ask other members for the results of orphans."""
        for shard in self.shards:
            if shard.orphans:
                shard.hand_over()

    def equalized(self, number: int, seq: int, bad: Mapping[str, str]) -> None:
        """Note that the members of a shard that is not served are equal up to `seq`, except the bad ones, which are
        replaced before it is served."""
        shard = self.shards[number]
        shard.last_seq = shard.commit = seq
        for link in shard.members:
            shard.acked[link] = seq
            shard.mark(link, bad.get(link.node, ""))
        shard.reason = "; ".join(f"{node} {why}" for node, why in bad.items()) + ": it is being replaced"

    def stop_serving(self, number: int, reason: str) -> None:
        """Stop reads and writes of a shard: pending writes are answered UNKNOWN, waiting requests are refused."""
        shard = self.shards[number]
        shard.serving = shard.writable = False
        shard.reason = reason
        for op in [*shard.pending, *(op for _, op in shard.unanswered)]:
            shard.answer_unknown(op, reason)
        shard.unanswered.clear()
        shard.orphans = []
        for link in self.links.values():
            if link.resend:
                self._forget_resend(link, lambda each, seq: each == number)
        shard.refuse_waiting(Code.SHARD_DOWN, f"shard {number} is down: {reason}", lambda entry: True)
        self.reads.refuse_stopped()
        shard.refuse_all_held()

    def hand_back(self, number: int, reason: str) -> None:
        """Stop a shard none of whose linked members is good, so that it can be taken over again."""
        shard = self.shards[number]
        assert not any(link.connected for link in shard.good), "no linked member could acknowledge anything"
        self.stop_serving(number, reason)
        shard.pending.clear()
        shard.joining.clear()
        for link in shard.members:
            shard.mark(link, "")

    # --- links up and down --------------------------------------------------------------------------

    def link_up(self, node: str, copies: Mapping[int, CopyReport], space: int = 0) -> dict[int, str]:
        """Link a node that reported these copies. Returns its bad shards, and why.

        Entries that good copies lack are sent again with their stamps; those they have count as acknowledged. Shards
        that are not served are not judged.
        """
        link = self.links[node]
        assert not link.connected, "link_down comes before the next link_up"
        bad: dict[int, str] = {}
        has: dict[int, int] = {}  # good shards of the node -> number
        older: dict[int, int] = {}  # shards with entries from before this link that may not be committed -> the last
        for shard in link.shards:
            copy = copies.get(shard.number)
            if not shard.serving:
                older[shard.number] = NEVER
                continue
            learner = shard.learners.get(link)
            why = shard.why_bad(link, copy)
            if copy is None or why:
                bad[shard.number] = why
                if learner is not None:
                    learner.lost_reason = why
                    shard.update_targets()
                else:
                    shard.abandon(link, why)
                continue
            has[shard.number] = copy.seq
            if learner is None:
                shard.mark(link, "")
            if copy.seq > shard.commit:
                older[shard.number] = copy.seq
        link.connected = True
        link.reason = ""
        link.space = space
        if older:
            link.uncommitted.append((-1, older))
        resend = link.resend
        parts = [batch.part(lambda number, seq: number in bad) for batch in resend]
        link.resend = [part for part in parts if part.items]
        for batch in resend:
            self._take_orphans(batch.unanswered(lambda number, seq: number not in bad and seq <= has.get(number, 0)))
            link.send_again(batch.part(lambda number, seq: number not in bad and seq > has.get(number, 0)))
        for shard in link.shards:
            shard.update_space()
            if shard.number in has:
                shard.check_blocked()
                shard.acknowledged(link, has[shard.number])
            if shard.orphans:
                shard.hand_over()
        if link.has_room():
            self._opened(link)
        else:
            link.fill()
        return bad

    def link_down(self, node: str, reason: str) -> None:
        """Take a link down: new writes of its shards wait, its reads move to other members, its writes to `resend`."""
        link = self.links[node]
        if not link.connected:
            link.reason = reason
            return
        writes, reads = link.disconnect(reason)
        link.resend += self._still_due(link, writes)
        for shard in link.shards:
            shard.writable = False
        self._move_reads(reads, None)
        for shard in link.shards:
            shard.pass_writes()
        self._hand_over()

    def _move_reads(self, reads: Iterable[Op], avoid: Link | None) -> list[Op]:
        """Queue reads at other members. `avoid` is their link if it may still answer, None if it is gone. Returns the
        reads that must stay; none if the link is gone: then they wait, or fail."""
        stay = []
        for op in reads:
            if op[0] == CALL:
                if avoid is not None:
                    stay.append(op)
                elif op[1] is not None:
                    op[1](LINK_LOST)
                continue
            if op[0] == PART:
                _, multi, attempt, _ = op
                if attempt != multi.attempt or multi.done:
                    continue
                if avoid is not None:
                    is_down = not all(self.shards[number].serving for number in multi.shards)
                    if not multi.movable or multi.moved or is_down or not self.reads.start(multi, avoid):
                        stay.append(op)
                    else:
                        multi.moved = True
                elif multi.movable:
                    self.reads.start_or_wait(multi)
                else:
                    multi.fail(Code.UNKNOWN, "the node it was sent to was lost")
                continue
            kind, sink, token, shard, _, key = op
            if sink is None:
                continue
            other = shard.reader(avoid)
            if other is not None:
                shard.enqueue_read(other, op)
            elif avoid is not None:
                stay.append(op)
            else:
                op[1] = None
                shard.wait(kind, key, None, len(key), sink, token)
        return stay

    # --- time passes --------------------------------------------------------------------------------

    def tick(self) -> None:
        """Refuse what waited too long, move reads from silent nodes, purge expired keys."""
        for shard in self.shards:
            shard.expire_waiting()
        self.reads.expire()
        for shard in self.shards:
            shard.expire_held()
        for link in self.links.values():
            self._retry_reads(link)
        self._purge()

    def _retry_reads(self, link: Link) -> None:
        """Queue the reads of a silent link at other members as well; the first answer counts."""
        if not link.is_silent(self.now_ms):
            return
        # not those of the open batch: reads may still join it
        for batch in chain(link.written, link.outgoing):
            if batch.unmoved is None:
                batch.unmoved = [op for op in batch.answers if op[0] != WRITE and op is not ANSWERED]
            if batch.unmoved:
                batch.unmoved = self._move_reads(batch.unmoved, link)

    def _purge(self) -> None:
        """Sequence the removal of expired keys, once per shard and interval, of a few shards at a time: all at once
        would delay the nodes."""
        left = PURGE_SHARDS_MAX
        for number in list(self._flagged):
            shard = self.shards[number]
            if shard.purge_after_ms <= self.now_ms:
                if not left:
                    break
                left -= 1
                del self._flagged[number]
                if shard.space < 2 and shard.takes_writes():
                    shard.purge_after_ms = self.now_ms + PURGE_INTERVAL_MS
                    shard.write(PURGE, b"", (PURGE_KEYS_MAX,), 0, IGNORE, None)

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        multis = self.reads.waiting()
        entries = [entry for shard in self.shards for entry in shard.waiting]
        assert self.waiting_items == len(entries) + len(multis), "waiting requests are counted"
        size = sum(entry[1] for entry in entries) + sum(multi.bytes for multi in multis)
        assert self.waiting_bytes == size, "waiting bytes are counted"
        assert not any(multi.done for multi in multis), "a waiting read was not answered"
        for shard in self.shards:
            shard.check()
        for link in self.links.values():
            link.check()
