"""Members: who takes part in a shard, as the sequencer sees it.

Pure. Whether a node is to become a member or to leave is decided elsewhere (membership.py, recovery.py) and stored in
the map; here is what follows for batches, acknowledgements and answers. A learner gets every write from `attach` on and
counts for nothing, until it `join`s or `swap`s in. What was kept for a link that is no member any more is forgotten,
and a result that only it could have given is asked for at another member, which evaluated the same operation.

Invariants: see ShardState.check. A link's `shards` are those of which it is a member or a learner.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Final

from kvtcp.cluster.map import ClusterMap
from kvtcp.protocol.operations import RESULTS_OF
from kvtcp.replication.sequencing.admission import Admission
from kvtcp.replication.sequencing.link import ANSWERED, Batch, Op, Progress
from kvtcp.replication.sequencing.requests import AWAITED, CALL, DUE, ITEM_OVERHEAD_BYTES, LINK_LOST, LOST
from kvtcp.replication.sequencing.shard import ShardState

SEQ_MAX: Final = 1 << 63  # above every number


class Members(Admission):
    """Members and learners of all shards."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self._kept: dict[Progress, list[Batch]] = {}  # writes to send again: of links that are down, of bad copies

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
                link.forget_older(number)
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
            self._look_whether_stuck(shard)
            shard.update_writable()

    def attach(self, shard: ShardState, link: Progress, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        """Queue a LEARN to the link of a learner, and from there on every write of the shard, in one step (R10)."""
        self._enqueue(link, item, [CALL, then], ITEM_OVERHEAD_BYTES)
        if shard not in link.shards:
            link.shards.append(shard)
        shard.update_targets()
        shard.update_writable()

    def detach(self, shard: ShardState, link: Progress) -> None:
        """It is no learner any more, and gets no writes from here on."""
        del shard.learners[link]
        if link not in shard.acked and shard in link.shards:  # else it was not attached yet
            link.shards.remove(shard)
        self._retarget([shard])
        self._resume([shard])

    def call(self, link: Progress, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        """Queue a control item; `then` gets its result, or LINK_LOST."""
        self._enqueue(link, item, [CALL, then], ITEM_OVERHEAD_BYTES)

    def join(self, shard: ShardState, link: Progress, is_first: bool = False) -> None:
        """R2: a learner that acknowledged everything committed is one of E from this step on, perhaps the one that
        answers writes."""
        learner = shard.learners.pop(link)
        assert link not in shard.acked and learner.acked >= shard.commit, "it acknowledged everything committed"
        shard.members = [link, *shard.members] if is_first else [*shard.members, link]
        acked = {**shard.acked, link: learner.acked}
        shard.acked = {member: acked[member] for member in shard.members}
        shard.joining[link] = learner.disk
        self._retarget([shard])
        if learner.holds_writes:
            self._resume([shard])

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
        if old is link:
            self._keep_after(link, shard.number, learner.acked)
        else:
            self._forget_kept(old, {shard.number})
        shard.bad.pop(old, None)
        if learner.lost_reason:
            shard.bad[link] = learner.lost_reason
        shard.members = [link if member is old else member for member in shard.members]
        acked = {**shard.acked, link: learner.acked}
        shard.acked = {member: acked[member] for member in shard.members}
        self._retarget([shard])
        if old is not link:
            old.shards.remove(shard)
            old.forget_older(shard.number)
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
            part = part_of(batch, numbers, False)
            if part.items:
                stays.append(part)
        if stays:
            self._kept[link] = stays
        for shard in self.shards:
            if shard.orphans:
                self._hand_over(shard)

    def _keep_after(self, link: Progress, number: int, seq: int) -> None:
        """What was kept of this shard for another copy of the node, up to this number, is not sent again."""
        kept = self._kept.get(link, [])
        for at, batch in enumerate(kept):
            self._take_orphans(batch, {number}, seq)
            kept[at] = part_of(batch, {number}, False, seq)

    def _still_due(self, link: Progress, batches: Iterable[Batch]) -> list[Batch]:
        """The link is lost: of what was on it, what has to be sent again when it is back. That is nothing of shards
        that it left, or of which it was a learner that is over now, or that were stopped."""
        over = {
            shard.number
            for shard in [self.shards[number] for batch in batches for number in batch.last_seqs]
            if not shard.serving or (link not in shard.acked and link not in shard.learners)
        }
        if not over:
            return list(batches)
        for batch in batches:
            self._take_orphans(batch, over)
        parts = [part_of(batch, over, False) for batch in batches]
        return [part for part in parts if part.items]

    def _take_orphans(self, batch: Batch, numbers: Container[int], seq_max: int = SEQ_MAX) -> None:
        """Writes of these shards, up to this number, that wait for a result of this batch are orphans."""
        answers = iter(batch.answers)
        for item in batch.items:
            if item[3]:
                op = next(answers)
                if op is ANSWERED or item[1] not in numbers or item[2] > seq_max:
                    continue
                if op[1] is not None and op[3] in (AWAITED, DUE):
                    self.shards[item[1]].orphans.append((item[2], op))

    def _hand_over(self, shard: ShardState) -> None:
        """Ask another member for the results of writes that lost theirs; all members evaluate the same."""
        orphans, shard.orphans = shard.orphans, []
        self._ask(shard, orphans, [])

    def _ask(self, shard: ShardState, orphans: list[tuple[int, Op]], asked: list[Progress]) -> None:
        """Ask a member that was not `asked` yet: those that were do not know, as none does that was restarted."""
        link = next((each for each in shard.good if each.connected and each not in asked), None)
        if link is None:
            if asked:
                for _, op in orphans:
                    self._result_found(shard, op, LOST)
            else:
                shard.orphans += orphans  # until a member is linked
            return

        def take(results: Any) -> None:
            if results is LINK_LOST:
                self._ask(shard, orphans, asked)
                return
            if len(results) < len(orphans):  # they are large
                self._ask(shard, orphans[len(results) :], asked)
            unknown = []
            for orphan, found in zip(orphans, results, strict=False):
                if found is None:
                    unknown.append(orphan)
                else:
                    self._result_found(shard, orphan[1], found[0])
            if unknown:
                self._ask(shard, unknown, [*asked, link])

        self.call(link, (RESULTS_OF, shard.number, [seq for seq, _ in orphans]), take)

    def _result_found(self, shard: ShardState, op: Op, result: Any) -> None:
        """The result of a write, from a member that was asked for it, or LOST."""
        if op[3] is AWAITED:
            op[3] = result
        elif op[3] is DUE and op[1] is not None:
            self._answer_write(shard, op, result)


def part_of(old: Batch, bad: Container[int], wanted: bool, seq_max: int = SEQ_MAX) -> Batch:
    """Of a kept batch what belongs to bad shards, up to this number (`wanted`), or what does not."""
    part = Batch(old.stamp_ms)
    part.bytes = old.bytes
    answers = iter(old.answers)
    for item in old.items:
        op = next(answers) if item[3] else None
        if (item[1] in bad and item[2] <= seq_max) is wanted:
            part.items.append(item)
            part.last_seqs[item[1]] = item[2]
            if op is not None:
                part.answers.append(op)
    return part
