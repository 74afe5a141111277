"""The sequencer: gives every write its number, sends it to all replicas at once, and answers when all have it.

Pure: no sockets, clock or files; events in (requests, results, links up and down, time), batches for the links and
answers to the sinks out. The coordinator's server is a thin shell around it; the same class runs in tests without I/O.
It is put together from `Admission` (requests in) and `Answers` (answers out); here are the links and time.

Per shard a write passes: waiting (unsequenced, only if a link is missing or a window full) -> pending (numbered and
queued to every replica in the same step) -> committed (every replica acknowledged it) -> answered.
Reads go to one replica over the same FIFO link, so they see exactly the writes queued before them, and are held until
what they saw is committed.

A link that is lost: its writes are kept and sent again, with their stamps, when the node is back with the position it
acknowledged or a later one; its reads are queued at other members. Whether a node is the member that acknowledged is a
question for each of its shards. A copy that is another one, or has less than it acknowledged, is *bad*: it is not read,
and its shard takes no writes. What was kept for it stays kept, as the process which has the data may still come back.

Members come and go (`attach`, `join`, `leave`, `swap`), when `Membership` says so: here is only what follows from it.
A result that was lost with its member is asked for at another one, which evaluated the same operation (`_hand_over`).

Invariants (`check`):
- numbers of a shard have no gap; `commit <= last_seq`; `pending` are exactly the numbers (commit, last_seq];
- `commit` is the smallest number acknowledged by all members, and never decreases;
- an op answered is committed on every member (writes), or saw only committed state (reads); it is answered once;
- after the first item of an entry is queued the answer is its result or UNKNOWN; `Unavailable` comes only before.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from kvtcp.constants import PURGE_INTERVAL_MS, PURGE_KEYS_MAX, PURGE_SHARDS_MAX
from kvtcp.errors import Code
from kvtcp.protocol.link import CopyReport
from kvtcp.protocol.operations import GET, PURGE, RESULTS_OF, WRITE_OP_END
from kvtcp.replication.admission import Admission
from kvtcp.replication.answers import Answers
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.progress import ANSWERED, Batch, LinkError, Op, Progress
from kvtcp.replication.recovery import LOST_DATA, foreign_copy, incomplete_copy
from kvtcp.replication.shard_state import (
    AWAITED,
    CALL,
    DUE,
    IGNORE,
    LINK_LOST,
    LOST,
    PART,
    WRITE,
    ShardState,
    Sink,
)

# what a node has of a shard that is not served yet is not committed, whatever the number
NEVER: Final = 1 << 63


class Sequencer(Admission, Answers):
    """The write and read path of all shards. Every public method is one synchronous step."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self._kept: dict[Progress, list[Batch]] = {}  # writes to send again: of links that are down, of bad copies
        self._flagged: dict[int, None] = {}  # shards that hold expired keys, in the order in which that was told

    # --- batches ------------------------------------------------------------------------------------

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
            ordinal, last_seqs = uncommitted[0]
            for number, seq in last_seqs.items():
                if shards[number].commit < seq:
                    # A write of a shard that waits for another node may be first for long: drop those behind it.
                    if len(uncommitted) > link.uncommitted_max:
                        link.drop_committed(lambda number, seq: shards[number].commit >= seq)
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
            if link.uncommitted and link.uncommitted[0][0] < 0:
                link.uncommitted[0][1].pop(number, None)
        shard.update_targets()
        shard.update_space()
        shard.update_stuck()
        shard.update_writable()

    def stop_serving(self, number: int, reason: str) -> None:
        """Nothing more is read or written; what is pending is answered UNKNOWN, what waits is refused."""
        shard = self.shards[number]
        shard.serving, shard.reason = False, reason
        shard.writable = False
        for op in [*shard.pending, *(op for _, op in shard.orphans)]:
            if op[1] is not None:
                self._answer_unknown(shard, op[1], op[2], reason)
                op[1] = None
        shard.orphans = []
        self._refuse_some(shard, Code.SHARD_DOWN, f"shard {number} is down: {reason}", lambda entry: True)
        held, shard.held = sorted(shard.held), []
        for entry in held:
            self._refuse_held(shard, entry[3], entry[4])

    # --- members ------------------------------------------------------------------------------------

    def add_link(self, node: str) -> Progress:
        """A node that was not there before."""
        link = self.links[node] = Progress(node)
        return link

    def remove_link(self, node: str) -> None:
        """The node belongs to the cluster no more, and holds nothing."""
        link = self.links.pop(node)
        assert not link.shards and not link.connected, "a node that is removed holds nothing"
        self._kept.pop(link, None)

    def set_members(self, number: int, nodes: Sequence[str]) -> None:
        """The members of a shard that is not served."""
        shard = self.shards[number]
        assert not shard.serving, "members of a shard in service come and go one by one"
        members = [self.links[node] for node in nodes]
        for link in shard.members:
            if link not in members and link not in shard.learners:
                link.shards.remove(shard)
        for link in members:
            if shard not in link.shards:
                link.shards.append(shard)
        shard.members = members
        shard.bad = {link: why for link, why in shard.bad.items() if link in members}
        shard.acked = {link: shard.acked.get(link, shard.commit) for link in members}
        self._retarget([shard])

    def _retarget(self, shards: Iterable[ShardState]) -> None:
        """Members or learners of these changed: set what depends on them."""
        for shard in shards:
            shard.update_targets()
            shard.update_space()
            shard.update_stuck()
            shard.update_writable()

    def attach(self, shard: ShardState, link: Progress, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        """Queue a LEARN to the link of a learner, and from there on every write of the shard (R10: in this one step)."""
        self._enqueue(link, item, [CALL, then], ITEM_OVERHEAD_BYTES)
        if link in shard.targets:
            return  # attached anew: the writes flow already, and the node drops what it had set aside
        if shard not in link.shards:
            link.shards.append(shard)
        shard.update_targets()
        shard.update_writable()

    def detach(self, shard: ShardState, link: Progress) -> None:
        """It is no learner any more, and gets no writes from here on."""
        del shard.learners[link]
        if link not in shard.acked:
            link.shards.remove(shard)
        self._retarget([shard])
        self._resume([shard])

    def call(self, link: Progress, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        """Queue a control item; `then` gets its result, or LINK_LOST."""
        self._enqueue(link, item, [CALL, then], ITEM_OVERHEAD_BYTES)

    def join(self, shard: ShardState, link: Progress) -> None:
        """R2: a learner that acknowledged everything committed is one of E from this step on."""
        learner = shard.learners.pop(link)
        assert link not in shard.acked and learner.acked >= shard.commit, "it acknowledged everything committed"
        shard.members = [*shard.members, link]
        shard.acked[link] = learner.acked
        self._retarget([shard])

    def leave(self, shards: Sequence[ShardState], link: Progress) -> None:
        """R2: the map does not name this member any more, so it leaves E."""
        for shard in shards:
            shard.members = [member for member in shard.members if member is not link]
            shard.bad.pop(link, None)
            del shard.acked[link]
        self._retarget(shards)
        gone = {shard.number for shard in shards}
        link.shards = [shard for shard in link.shards if shard.number not in gone or link in shard.learners]
        self._forget_kept(link, gone)
        for shard in shards:
            commit = min(shard.acked.values())
            if commit > shard.commit:
                self._commit(shard, commit)
        self._resume(shards)

    def swap(self, shard: ShardState, old: Progress, link: Progress) -> None:
        """The map names the learner `link` in the place of the member `old`, which may be the same node with the disk
        it had before."""
        learner = shard.learners.pop(link)
        assert learner.acked >= shard.commit, "it acknowledged everything committed"
        self._forget_kept(old, {shard.number})
        shard.bad.pop(old, None)
        shard.members = [link if member is old else member for member in shard.members]
        acked = {**shard.acked, link: learner.acked}
        shard.acked = {member: acked[member] for member in shard.members}
        self._retarget([shard])
        if old is not link:
            old.shards.remove(shard)
        if shard.serving:
            commit = min(shard.acked.values())
            if commit > shard.commit:
                self._commit(shard, commit)
            self._resume([shard])

    def _resume(self, shards: Iterable[ShardState]) -> None:
        """What waited for these may go on now, in turns as when a window opens."""
        for shard in shards:
            while shard.waiting and self._drain(shard):
                pass
            shard.update_writable()
        self._start_waiting_multi()

    def _forget_kept(self, link: Progress, numbers: Container[int]) -> None:
        """The link is no member of these shards any more: nothing of theirs is sent to it again."""
        stays: list[Batch] = []
        for batch in self._kept.pop(link, []):
            self._take_orphans(batch, numbers)
            part = _part(batch, numbers, False)
            if part.items:
                stays.append(part)
        if stays:
            self._kept[link] = stays
        for shard in self.shards:
            if shard.orphans:
                self._hand_over(shard)

    def _take_orphans(self, batch: Batch, numbers: Container[int]) -> None:
        """Writes of these shards that wait for a result of this batch are orphans."""
        answers = iter(batch.answers)
        for item in batch.items:
            if item[3]:
                op = next(answers)
                if op is not ANSWERED and item[1] in numbers and op[1] is not None and op[3] in (AWAITED, DUE):
                    self.shards[item[1]].orphans.append((item[2], op))

    def _hand_over(self, shard: ShardState) -> None:
        """Ask another member for the results of writes that lost theirs; all members evaluate the same."""
        link = next((each for each in shard.good if each.connected), None)
        if link is None or not shard.orphans:
            return
        orphans, shard.orphans = shard.orphans, []

        def take(results: Any) -> None:
            if results is LINK_LOST:
                shard.orphans += orphans
                self._hand_over(shard)
                return
            for (_, op), found in zip(orphans, results, strict=True):
                result = found[0] if found is not None else LOST
                if op[3] is AWAITED:
                    op[3] = result
                elif op[3] is DUE and op[1] is not None:
                    self._answer_write(shard, op, result)

        self.call(link, (RESULTS_OF, shard.number, [seq for seq, _ in orphans]), take)

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
            why = self._why_bad(shard, link, copy)
            if copy is None or why:
                bad[shard.number] = why
                self._abandon(shard, link, why)
                continue
            has[shard.number] = copy.seq
            shard.mark(link, "")
            if copy.seq > shard.commit:
                older[shard.number] = copy.seq
        link.connected = True
        link.reason = ""
        link.space = space
        if older:
            link.uncommitted.append((-1, older))
        kept = self._kept.pop(link, [])
        stays = [old for old in (_part(batch, bad, True) for batch in kept) if old.items]
        if stays:
            self._kept[link] = stays
        for old in kept:
            self._send_again(link, _part(old, bad, False) if stays else old, has)
        for shard in link.shards:
            shard.update_space()
            if shard.number in has:
                shard.update_stuck()
                self._acknowledged(shard, link, has[shard.number])
            if shard.orphans:
                self._hand_over(shard)
        if link.has_room():
            self._opened(link)
        else:
            self._filled(link)
        return bad

    def _why_bad(self, shard: ShardState, link: Progress, copy: CopyReport | None) -> str:
        """Why the copy that a node reported is not the member's; empty if it is."""
        if copy is None:
            return "has no copy of it"
        if copy.disk != self.map.disk_of(shard.number, link.node):
            return foreign_copy(copy)
        if not copy.complete:
            return incomplete_copy(copy)
        has = f"it has shard {shard.number} up to {copy.seq}"
        if copy.seq < shard.acked[link]:
            return f"{LOST_DATA}: {has}, but acknowledged {shard.acked[link]}"
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
        """The node has not what it acknowledged, so nothing it says counts. If it cannot be removed either, pending
        writes do not commit before it is replaced, which takes longer than anybody waits."""
        shard.mark(link, why)
        shard.writable = False
        if len(shard.members) > self.min_insync and shard.good:
            return
        for op in shard.pending:
            if op[1] is not None:
                self._answer_unknown(shard, op[1], op[2], f"{link.node} {why}")
                op[1] = None
        shard.update_stuck()
        if shard.stuck:
            held, shard.held = sorted(shard.held), []
            for entry in held:
                self._refuse_held(shard, entry[3], entry[4])

    def link_down(self, node: str, reason: str) -> None:
        """The link is gone: writes of its shards wait, its reads are queued at other members, its writes are kept."""
        link = self.links[node]
        if not link.connected:
            link.reason = reason
            return
        kept, reads = link.disconnect(reason)
        self._kept[link] = self._kept.get(link, []) + kept
        for shard in link.shards:
            shard.writable = False
        self._move_reads(reads, None)
        for shard in link.shards:
            self._pass_writes(shard)

    def _move_reads(self, reads: Iterable[Op], avoid: Progress | None) -> list[Op]:
        """Queue reads at other members. `avoid` is the link they are on if it may still answer, None if it is gone.

        Returns those that must stay where they are; none if the link is gone: then they wait, or fail.
        """
        stay = []
        for op in reads:
            if op[0] == CALL:
                if avoid is None:
                    op[1](LINK_LOST)
                else:
                    stay.append(op)
                continue
            if op[0] == PART:
                _, multi, attempt, _ = op
                if attempt != multi.attempt or multi.done:
                    continue
                if avoid is not None:
                    if not multi.movable or multi.moved or not self._start_multi(multi, avoid):
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


def _part(old: Batch, bad: Container[int], wanted: bool) -> Batch:
    """Of a kept batch what belongs to bad shards (`wanted`), or what does not."""
    part = Batch(old.stamp_ms)
    part.bytes = old.bytes
    answers = iter(old.answers)
    for item in old.items:
        op = next(answers) if item[3] else None
        if (item[1] in bad) is wanted:
            part.items.append(item)
            part.last_seqs[item[1]] = item[2]
            if op is not None:
                part.answers.append(op)
    return part


__all__ = ["IGNORE", "LinkError", "Sequencer", "ShardState", "Sink"]
