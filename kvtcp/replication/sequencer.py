"""The sequencer: gives every write its number, sends it to all replicas at once, and answers when all have it.

Pure: no sockets, clock or files; events in (requests, results, links up and down, time), batches for the links and
answers to the sinks out. The coordinator's server is a thin shell around it; the same class runs in tests without I/O.
It is put together from `Admission` (requests in) and `Answers` (answers out); here are the links and time.

Per shard a write passes: waiting (unsequenced, only if a link is missing or a window full) -> pending (numbered and
queued to every replica in the same step) -> committed (every replica acknowledged it) -> answered.
Reads go to one replica over the same FIFO link, so they see exactly the writes queued before them, and are held until
what they saw is committed.

A link that is lost: its writes are kept and sent again, with their stamps, when the node is back with the position it
acknowledged or a later one; its reads are queued at other members. A node that comes back with less than it
acknowledged is not linked: its pending writes are answered UNKNOWN, reads that saw them are refused. What was kept for
it stays kept, so that the process which has the data may still come back.

Invariants (`check`):
- numbers of a shard have no gap; `commit <= last_seq`; `pending` are exactly the numbers (commit, last_seq];
- `commit` is the smallest number acknowledged by all members, and never decreases;
- an op answered is committed on every member (writes), or saw only committed state (reads); it is answered once;
- after the first item of an entry is queued the answer is its result or UNKNOWN; `Unavailable` comes only before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from kvtcp.constants import PURGE_INTERVAL_MS, PURGE_KEYS_MAX
from kvtcp.errors import Code
from kvtcp.protocol.operations import GET, PURGE
from kvtcp.replication.admission import Admission
from kvtcp.replication.answers import Answers
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.progress import ANSWERED, Batch, LinkError, Op, Progress
from kvtcp.replication.shard_state import AWAITED, IGNORE, LOST, PART, WRITE, ShardState, Sink


class Sequencer(Admission, Answers):
    """The write and read path of all shards. Every public method is one synchronous step."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self._kept: dict[Progress, list[Batch]] = {}  # of links that are down: writes to send again
        self._flagged: set[int] = set()  # shards that hold expired keys

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
                self._flagged.add(number)
        if link.full and link.has_room(0.75):
            self._opened(link)

    # --- links --------------------------------------------------------------------------------------

    def take_over(self, positions: dict[str, dict[int, tuple[int, int]]]) -> None:
        """All nodes reported (seq, chain) per shard, no link is up: agree where to go on, or say why not.

        Every member that kept its data has every committed entry. So where those that have something agree, the shard
        goes on from there; a member that has nothing counts as one that lost it, and `link_up` will refuse it.
        """
        assert not any(link.connected for link in self.links.values()), "shards are taken over before links come up"
        for shard in self.shards:
            reports = {link.node: positions[link.node].get(shard.number, (0, 0)) for link in shard.members}
            found = {position for position in reports.values() if position[0]}
            if len(found) <= 1:
                seq = max(reports.values())[0]
                shard.last_seq = shard.commit = seq
                shard.acked = dict.fromkeys(shard.members, seq)
                shard.serving, shard.reason = True, ""
            else:
                at = ", ".join(f"{node} at {seq}" for node, (seq, _) in reports.items())
                shard.serving, shard.reason = False, f"its members differ ({at})"
            shard.update_writable()

    def link_up(self, node: str, positions: dict[int, int]) -> str | None:
        """A node that the map names is linked and reported these numbers. Returns why it cannot serve, or None.

        Entries it lacks are sent again with their stamps; those it has count as acknowledged. Shards that are not
        served are not looked at.
        """
        link = self.links[node]
        assert not link.connected, "link_down comes before the next link_up"
        served = [shard for shard in link.shards if shard.serving]
        for shard in served:
            seq = positions.get(shard.number, 0)
            if seq < shard.acked[link]:
                reason = f"it has shard {shard.number} up to {seq}, but acknowledged {shard.acked[link]}"
            elif seq > shard.last_seq:
                reason = f"it has shard {shard.number} up to {seq}, above the last number given, {shard.last_seq}"
            else:
                continue
            self._abandon(link, reason)
            return reason
        link.connected = True
        link.reason = link.lost = ""
        for old in self._kept.pop(link, ()):
            self._send_again(link, old, positions)
        for shard in served:
            shard.update_stuck()
            self._acknowledged(shard, link, positions.get(shard.number, 0))
        if link.has_room():
            self._opened(link)
        else:
            self._filled(link)
        return None

    def link_refused(self, node: str, reason: str) -> str:
        """A node answers for a member that it is not, whatever it has: it serves nothing. Returns the reason."""
        self._abandon(self.links[node], reason)
        return reason

    def _send_again(self, link: Progress, old: Batch, positions: dict[int, int]) -> None:
        """Queue what the node lacks of a kept batch; results of what it has were lost with the link."""
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
        """The node lost what it acknowledged, so nothing it says counts and its pending writes cannot commit."""
        link.reason, link.lost = "it came back without its data", reason
        for shard in link.shards:
            for op in shard.pending:
                if op[1] is not None:
                    self._answer_unknown(shard, op[1], op[2], f"{link.node} came back without its data")
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
        self._kept[link] = kept
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
        """Sequence the removal of expired keys, once per shard and interval."""
        for number in list(self._flagged):
            shard = self.shards[number]
            if shard.purge_after_ms <= self.now_ms:
                self._flagged.discard(number)
                if shard.writable:
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
