"""The sequencer: gives every write its number, sends it to all replicas at once, and answers when all have it.

Pure: no sockets, clock or files; events in (requests, results, links up and down, time), batches for the links and
answers to the sinks out. The coordinator's server is a thin shell around it; the same class runs in tests without I/O.
It is put together from `Admission` (requests in), `Answers` (answers out) and `Members` (who takes part); here are the
links and time.

Per shard a write passes: waiting (unsequenced, only if a link is missing or a window full) -> pending (numbered and
queued to every replica in the same step) -> committed (every replica acknowledged it) -> answered.
Reads go to one replica over the same FIFO link, so they see exactly the writes queued before them, and are held until
what they saw is committed.

A link that is lost: its writes are kept and sent again, with their stamps, when the node is back with the position it
acknowledged or a later one; its reads are queued at other members. Whether a node is the member that acknowledged is a
question for each of its shards. A copy that is another one, or has less than it acknowledged, is *bad*: it is not read,
and its shard takes no writes. What was kept for it stays kept, as the process which has the data may still come back.

Invariants (`check`):
- numbers of a shard have no gap; `commit <= last_seq`; `pending` are exactly the numbers (commit, last_seq];
- `commit` is the smallest number acknowledged by all members, and never decreases;
- an op answered is committed on every member (writes), or saw only committed state (reads); it is answered once;
- after the first item of an entry is queued the answer is its result or UNKNOWN; `Unavailable` comes only before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import PURGE_INTERVAL_MS, PURGE_KEYS_MAX, PURGE_SHARDS_MAX
from kvtcp.errors import Code
from kvtcp.protocol.link import CopyReport
from kvtcp.protocol.operations import GET, PURGE
from kvtcp.replication.copy_reports import LOST_DATA, foreign_copy, incomplete_copy
from kvtcp.replication.sequencing.link import ANSWERED, Batch, LinkError, Op, Progress
from kvtcp.replication.sequencing.members import Members, part_of
from kvtcp.replication.sequencing.requests import AWAITED, CALL, DUE, IGNORE, LINK_LOST, PART, WRITE, Sink
from kvtcp.replication.sequencing.shard import ShardState

# what a node has of a shard that is not served yet is not committed, whatever the number
NEVER: Final = 1 << 63


class Sequencer(Members):
    """The write and read path of all shards. Every public method is one synchronous step."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self._flagged: dict[int, None] = {}  # shards that hold expired keys, in the order in which that was told

    # --- batches ------------------------------------------------------------------------------------

    def close_batches(self) -> list[Progress]:
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
            ordinal, last_seqs = uncommitted[0]
            for number, seq in last_seqs.items():
                shard = shards[number]
                if (shard.told() if shard.due else shard.commit) < seq:
                    # A write of a shard that waits for another node may be first for long: drop those behind it.
                    if len(uncommitted) > link.uncommitted_max:
                        link.drop_committed(lambda number, seq: shards[number].told() >= seq)
                    return ordinal
            uncommitted.popleft()
        return link.written_ordinal

    # --- what the nodes say ------------------------------------------------------------------------

    def heard(self, node: str) -> None:
        """Bytes came from the node, whether or not they complete a frame: it is not silent."""
        self.links[node].heard_ms = self.now_ms

    def on_results(self, node: str, applied: int, durable: int, results: list[Any], flags: Sequence[int]) -> None:
        """A RESULTS frame. Raises LinkError if it cannot be true; then nothing was changed, and the link is closed."""
        link = self.links[node]
        if not link.connected:
            raise LinkError(f"{node} is not linked")
        if not (type(applied) is type(durable) is int and type(results) is list):
            raise LinkError(f"{node} sent results that are none")
        answers, results = link.on_applied(applied, durable, results)
        if answers:
            for op, result in zip(answers, results, strict=True):
                if op[0] == WRITE:
                    if op[3] is DUE and op[1] is not None:  # committed before, with another member's help
                        op[3] = result
                        self._answer_write(None, op, result)
                    else:
                        op[3] = result
        # Commits first: a read in the same frame then finds what it saw committed and need not be held.
        shards = self.shards
        for batch in link.on_durable(durable):
            for number, seq in batch.last_seqs.items():
                self._acknowledged(shards[number], link, seq)
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
                            self._hold(shard, needed, sink, op[2], result)
                elif kind != WRITE and op is not ANSWERED:
                    self._read_done(op, result)
        for number in flags:
            if type(number) is int and 0 <= number < len(shards):
                self._flagged[number] = None
        if link.full and link.has_room(0.75):
            self._opened(link)

    # --- links --------------------------------------------------------------------------------------

    def serve(self, number: int, seq: int, chain: int) -> None:
        """The members of the shard, as `set_members` said, are equal: go on from there."""
        shard = self.shards[number]
        assert not shard.serving and not shard.pending, "a shard that is served is not taken over"
        shard.base = (seq, chain)
        shard.last_seq = shard.commit = seq
        shard.acked = dict.fromkeys(shard.members, seq)
        shard.bad = {}
        shard.serving, shard.reason = True, ""
        for link in shard.members:
            link.forget_older(number)
        shard.update_targets()
        shard.update_space()
        self._look_whether_stuck(shard)
        shard.update_writable()

    def equalized(self, number: int, seq: int, bad: Mapping[str, str]) -> None:
        """The members of a shard that is not served are equal up to `seq`, but for the bad ones, which are replaced
        before it is."""
        shard = self.shards[number]
        shard.last_seq = shard.commit = seq
        for link in shard.members:
            shard.acked[link] = seq
            shard.mark(link, bad.get(link.node, ""))
        shard.reason = "; ".join(f"{node} {why}" for node, why in bad.items()) + ": it is being replaced"

    def stop_serving(self, number: int, reason: str) -> None:
        """Nothing more is read or written; what is pending is answered UNKNOWN, what waits is refused."""
        shard = self.shards[number]
        shard.serving, shard.reason = False, reason
        shard.writable = False
        for op in [*shard.pending, *(op for _, op in shard.due)]:
            if op[1] is not None:
                self._answer_unknown(shard, op[1], op[2], reason)
                op[1] = None
        shard.due.clear()
        shard.orphans = []
        for link in list(self._kept):
            self._forget_kept(link, {number})
        self._refuse_stopped(shard)
        held, shard.held = sorted(shard.held), []
        for entry in held:
            self._refuse_held(shard, entry[3], entry[4])

    def hand_back(self, number: int, reason: str) -> None:
        """Stop a shard none of whose linked members is good, so that it can be taken over again."""
        shard = self.shards[number]
        assert not any(link.connected for link in shard.good), "nobody is there who could acknowledge anything"
        self.stop_serving(number, reason)
        shard.pending.clear()
        shard.joining.clear()
        for link in shard.members:
            shard.mark(link, "")

    # --- links up and down --------------------------------------------------------------------------

    def link_up(self, node: str, copies: Mapping[int, CopyReport], space: int = 0) -> dict[int, str]:
        """A node is linked and reported these copies. Returns which of its shards are bad, and why.

        Entries that good copies lack are sent again with their stamps; those they have count as acknowledged. Shards
        that are not served are not judged.
        """
        link = self.links[node]
        assert not link.connected, "link_down comes before the next link_up"
        bad: dict[int, str] = {}
        has: dict[int, int] = {}  # good shards of the node -> number
        older: dict[int, int] = {}  # what it had before this link and may not be committed
        for shard in link.shards:
            copy = copies.get(shard.number)
            if not shard.serving:
                older[shard.number] = NEVER
                continue
            learner = shard.learners.get(link)
            why = self._why_bad(shard, link, copy)
            if copy is None or why:
                bad[shard.number] = why
                if learner is not None:
                    learner.lost_reason = why
                    shard.update_targets()
                else:
                    self._abandon(shard, link, why)
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
        kept = self._kept.pop(link, [])
        stays = [old for old in (part_of(batch, bad, True) for batch in kept) if old.items]
        if stays:
            self._kept[link] = stays
        for old in kept:
            self._send_again(link, part_of(old, bad, False) if stays else old, has)
        for shard in link.shards:
            shard.update_space()
            if shard.number in has:
                self._look_whether_stuck(shard)
                self._acknowledged(shard, link, has[shard.number])
            if shard.orphans:
                self._hand_over(shard)
        if link.has_room():
            self._opened(link)
        else:
            self._filled(link)
        return bad

    def _why_bad(self, shard: ShardState, link: Progress, copy: CopyReport | None) -> str:
        """Why the copy that a node reported is not the member's, or that of the learner which the map is about to name;
        empty if it is."""
        if copy is None:
            return "has no copy of it"
        learner = shard.learners.get(link)
        disk = shard.joining.get(link) if learner is None else learner.disk
        if copy.disk != (disk or self.map.disk_of(shard.number, link.node)):
            return foreign_copy(copy)
        if not copy.complete:
            return incomplete_copy(copy)
        has = f"it has shard {shard.number} up to {copy.seq}"
        acked = shard.acked[link] if learner is None else learner.acked
        if copy.seq < acked:
            return f"{LOST_DATA}: {has}, but acknowledged {acked}"
        if copy.seq > shard.last_seq:
            return f"has another history: {has}, above the last number given, {shard.last_seq}"
        if copy.seq == shard.base[0] and copy.chain != shard.base[1]:
            return f"has another history: it differs at number {copy.seq} or before"
        return ""

    def _send_again(self, link: Progress, old: Batch, has: Mapping[int, int]) -> None:
        """Queue what the node lacks of a kept batch; results of what it has were lost with the link."""
        batch = Batch(old.stamp_ms)
        answers = iter(old.answers)
        for item in old.items:
            op = next(answers) if item[3] else None
            if item[2] <= has.get(item[1], 0):
                if op is not None and op is not ANSWERED and op[1] is not None and op[3] in (AWAITED, DUE):
                    self.shards[item[1]].orphans.append((item[2], op))
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

    def _abandon(self, shard: ShardState, link: Progress, why: str) -> None:
        """The node has not what it acknowledged, so nothing it says counts."""
        shard.mark(link, why)
        shard.writable = False
        self._look_whether_stuck(shard)

    def link_down(self, node: str, reason: str) -> None:
        """The link is gone: writes of its shards wait, its reads are queued at other members, its writes are kept."""
        link = self.links[node]
        if not link.connected:
            link.reason = reason
            return
        kept, reads = link.disconnect(reason)
        self._kept[link] = self._kept.get(link, []) + self._still_due(link, kept)
        for shard in link.shards:
            shard.writable = False
        self._move_reads(reads, None)
        for shard in link.shards:
            self._pass_writes(shard)
        for shard in self.shards:
            if shard.orphans:
                self._hand_over(shard)

    def _move_reads(self, reads: Iterable[Op], avoid: Progress | None) -> list[Op]:
        """Queue reads at other members. `avoid` is the link they are on if it may still answer, None if it is gone.

        Returns those that must stay where they are; none if the link is gone: then they wait, or fail.
        """
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
                    if not multi.movable or multi.moved or is_down or not self._start_multi(multi, avoid):
                        stay.append(op)
                    else:
                        multi.moved = True
                elif multi.movable:
                    self._start_or_wait(multi)
                else:
                    multi.fail(Code.UNKNOWN, "the node it was sent to was lost")
                continue
            kind, sink, token, shard, _, key = op
            if sink is None:
                continue
            other = self._reader(shard, avoid)
            if other is not None:
                self._enqueue_read(other, shard, op)
            elif avoid is not None:
                stay.append(op)
            else:
                op[1] = None
                self._wait(shard, kind, key, None, len(key), sink, token)
        return stay

    # --- time passes --------------------------------------------------------------------------------

    def tick(self) -> None:
        """Refuse what waited too long, move reads from silent nodes, purge expired keys."""
        self._expire_waiting()
        self._expire_held()
        for link in self.links.values():
            self._retry_reads(link)
        self._purge()

    def _retry_reads(self, link: Progress) -> None:
        """Queue the reads of a link that was silent for long at other members as well; the first answer counts."""
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
        would hold the nodes up."""
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
                    self.write(PURGE, number, b"", (PURGE_KEYS_MAX,), 0, IGNORE, None)

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        super().check()
        for shard in self.shards:
            shard.check()
        for link in self.links.values():
            link.check()


__all__ = ["IGNORE", "LinkError", "Sequencer", "ShardState", "Sink"]
