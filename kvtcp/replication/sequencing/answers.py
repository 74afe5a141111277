"""Answers: acknowledgements become commits, and results are answered when what they show is committed.

Pure. The outgoing half of the sequencer. A write is answered when every member of its shard has it durable (rule R1).
A read is answered when its result is here and (R11 b)

- it shows a present key: the revision it shows is committed. Replicas apply in order, so a later write of that key
  cannot have been queued before the read;
- anything else (absent, a count, a page, a table position): all that was queued for the shard before it is committed,
  because any of it may be the reason for what is not there.

An answer that is not due yet is *held*: in a heap per shard, by the number it waits for, at most WRITE_WAIT_MS. Then,
or at once when the commit cannot come (a member lost its data), it is refused: a read can always be refused.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any

from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import WRITE_WAIT_MS
from kvtcp.errors import Code, text_of
from kvtcp.protocol.operations import EXISTS, GET, REVISION
from kvtcp.replication.sequencing.link import Op, Progress
from kvtcp.replication.sequencing.multi_read import MultiRead
from kvtcp.replication.sequencing.requests import AWAITED, CALL, DUE, LOST, NUMBER, PART, Held, Sink
from kvtcp.replication.sequencing.shard import ClusterState, ShardState


class Answers(ClusterState):
    """Answers out."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self.unknown = 0  # writes answered UNKNOWN, for status
        self._held_order = 0  # of the last answer held: those that wait for one number leave in order

    def _acknowledged(self, shard: ShardState, link: Progress, seq: int) -> None:
        """`link` has the entries of `shard` up to `seq`."""
        if shard.learners and link in shard.learners:
            shard.learners[link].on_acknowledged(seq)
            return
        acked = shard.acked
        if seq <= acked.get(link, seq):  # nothing new, or the link left the members meanwhile
            return
        acked[link] = seq
        commit = seq if len(acked) == 1 else min(acked.values())
        if commit > shard.commit:
            self._commit(shard, commit)

    def _commit(self, shard: ShardState, commit: int) -> None:
        """Everything up to `commit` is on all members (R1)."""
        number = shard.commit
        shard.commit = commit
        take = shard.pending.popleft
        while number < commit:
            number += 1
            op = take()
            _, sink, token, result = op
            if sink is None:
                continue
            if result is NUMBER:
                sink.reply(token, number)
            elif result is AWAITED:  # the member that was to answer is gone; another one was asked, or will be
                op[3] = DUE
                shard.due.append((number, op))
            else:
                self._answer_write(shard, op, result)
        held = shard.held
        while held and held[0][0] <= commit:
            _, _, _, sink, token, value = heappop(held)
            if sink is None:
                self._release_multi(token)
            else:
                sink.reply(token, value)

    def _answer_write(self, shard: ShardState | None, op: Op, result: Any) -> None:
        """The write is committed, and its result is here; or lost for good, which only the shard is asked about."""
        _, sink, token, _ = op
        op[1] = None
        if type(result) is list:
            if len(result) == 1:  # the results of a transaction
                sink.reply(token, result[0])
            else:
                sink.fail(token, result[0], *text_of(result[1], result[2]))
        elif result is LOST:
            assert shard is not None, "who knows of a lost result knows the shard"
            self._answer_unknown(shard, sink, token, "its answer was lost with the connection to a node")
        else:
            sink.reply(token, result)

    def _answer_unknown(self, shard: ShardState, sink: Sink, token: Any, why: str) -> None:
        self.unknown += 1
        text = f"the write to shard {shard.number} may or may not have happened: {why}"
        sink.fail(token, Code.UNKNOWN, text, {"shard": shard.number})

    def _read_done(self, op: Op, result: Any) -> None:
        """The result of a read, of a part or of a control item is here."""
        kind = op[0]
        if kind == CALL:
            then, op[1] = op[1], None
            then(result)
            return
        if kind == PART:
            if op[1].take(op[2], op[3], result):
                self._release_multi(op[1])
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
            self._hold(shard, needed, sink, token, result)

    def _release_multi(self, multi: MultiRead) -> None:
        """Answer `multi` if all it saw is committed, else hold it at the first shard that is behind."""
        for number, needed in multi.needed.items():
            shard = self.shards[number]
            if shard.commit < needed:
                self._hold(shard, needed, None, multi, None)
                return
        multi.answer()

    # --- holding ------------------------------------------------------------------------------------

    def _hold(self, shard: ShardState, needed: int, sink: Sink | None, token: Any, value: Any) -> None:
        if shard.stuck:
            self._refuse_held(shard, sink, token)
            return
        self._held_order += 1
        heappush(shard.held, (needed, self._held_order, self.now_ms + WRITE_WAIT_MS, sink, token, value))

    def _look_whether_stuck(self, shard: ShardState) -> None:
        """A member that is bad and has to stay may keep pending writes from being committed before it is replaced,
        which takes longer than anybody waits: then nobody does."""
        shard.update_stuck(self.min_insync)
        if not shard.stuck:
            return
        for op in shard.pending:
            if op[1] is not None:
                self._answer_unknown(shard, op[1], op[2], shard.stuck)
                op[1] = None
        held, shard.held = sorted(shard.held), []
        for entry in held:
            self._refuse_held(shard, entry[3], entry[4])

    def _refuse_held(self, shard: ShardState, sink: Sink | None, token: Any) -> None:
        if not shard.serving:
            text = f"shard {shard.number} is down: {shard.reason}"
        elif shard.stuck:
            text = f"shard {shard.number} cannot commit what this read saw: {shard.stuck}"
        else:
            behind = "; ".join(
                f"{link.node}: {link.reason or 'slow'}" for link, seq in shard.acked.items() if seq < shard.last_seq
            )
            text = f"what this read saw of shard {shard.number} was not committed in {WRITE_WAIT_MS} ms ({behind})"
        if sink is None:
            self.unavailable += 1
            token.fail(Code.NOT_ENOUGH_REPLICAS, text)
        else:
            self._refuse(sink, token, Code.NOT_ENOUGH_REPLICAS, text, shard)

    def _expire_held(self) -> None:
        """Refuse the answers that were held too long."""
        now_ms = self.now_ms
        for shard in self.shards:
            if shard.held and any(entry[2] <= now_ms for entry in shard.held):
                late: list[Held] = sorted(entry for entry in shard.held if entry[2] <= now_ms)
                shard.held = [entry for entry in shard.held if entry[2] > now_ms]
                heapify(shard.held)
                for entry in late:
                    self._refuse_held(shard, entry[3], entry[4])
