"""Confirmed reads, for a coordinator that shares its config store with others (rule R11 c).

Pure. Another coordinator may have taken over unnoticed. Then writes cannot commit here any more, but a member that was
not fenced yet would still answer reads, and the answer could be old. So a read is released only when |E| - M + 1
members of E have answered something sent after it arrived: a new coordinator fences all but at most |E| - M members
before it serves, so one of these would have been fenced.

With the local config store a lock on the directory ensures that there is one coordinator, and the plain Sequencer is
enough; this one is for a shared store, and runs in simulations.

A tick in which reads arrived ends with a probe to every link, an audit of no shards; all reads of a tick share it, and
its number is their *round*. Reads that wait for their round are refused after WRITE_WAIT_MS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.protocol.operations import AUDIT
from kvtcp.replication.sequencing.link import Link
from kvtcp.replication.sequencing.multi_read import MultiRead
from kvtcp.replication.sequencing.requests import LINK_LOST, Sink
from kvtcp.replication.sequencing.sequencer import Sequencer
from kvtcp.replication.sequencing.shard import Shard


class _Confirmed:
    """The sink of a read: passes its result on when its round is confirmed."""

    __slots__ = ("_numbers", "_round", "_sequencer", "_sink")

    def __init__(self, sequencer: ConfirmingSequencer, numbers: Sequence[int], round_: int, sink: Sink) -> None:
        self._sequencer = sequencer
        self._numbers = numbers
        self._round = round_
        self._sink = sink

    def reply(self, token: Any, result: Any) -> None:
        """Take the result of a read that may be answered by (a) and (b) of the rule."""
        self._sequencer.release_read(self._numbers, self._round, self._sink, token, result)

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """Pass on an error: it shows no data."""
        self._sink.fail(token, code, message, details)


class _ConfirmingShard(Shard):
    """A shard whose reads are confirmed."""

    __slots__ = ("_sequencer",)

    def __init__(self, number: int, members: list[Link], sequencer: ConfirmingSequencer) -> None:
        super().__init__(number, members, sequencer)
        self._sequencer = sequencer

    def read(self, op: int, key: bytes, sink: Sink, token: Any) -> None:
        """See Shard.read."""
        super().read(op, key, self._sequencer.confirmed((self.number,), sink), token)


class ConfirmingSequencer(Sequencer):
    """A Sequencer whose reads are confirmed."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        super().__init__(cluster_map)
        self._round = 1  # of the reads that arrive in this tick
        self._is_asked = False  # a read arrived in it
        self._unasked: set[Link] = set()  # links to ask for the last round, as soon as they have room
        self._confirmed: dict[Link, int] = {}  # the last round that each link answered as the member that it is now
        # (deadline_ms, shards, round, sink, token, result)
        self._unconfirmed: list[tuple[int, Sequence[int], int, Sink, Any, Any]] = []

    def make_shard(self, number: int, members: list[Link]) -> Shard:
        """See Sequencer.make_shard."""
        return _ConfirmingShard(number, members, self)

    def confirmed(self, numbers: Sequence[int], sink: Sink) -> Sink:
        """The sink of a read that arrives in this round."""
        self._is_asked = True
        return _Confirmed(self, numbers, self._round, sink)

    def multi_read(self, multi: MultiRead) -> None:
        """See Sequencer.multi_read."""
        multi.sink = self.confirmed(multi.shards, multi.sink)
        super().multi_read(multi)

    def close_batches(self) -> list[Link]:
        """See Sequencer.close_batches."""
        if self._is_asked:
            self._is_asked = False
            self._unasked = {link for link in self.links.values() if link.shards}
            self._round += 1
        for link in self.links.values():
            if link in self._unasked and link.connected and not link.full:
                self._unasked.discard(link)
                self.call(link, (AUDIT, []), self._prober(link, self._round - 1))
        return super().close_batches()

    def _prober(self, link: Link, round_: int) -> Any:
        members = {shard.number for shard in link.shards if link in shard.good}

        def answered(result: Any) -> None:
            if result is not LINK_LOST and members <= {shard.number for shard in link.shards if link in shard.good}:
                self._confirmed[link] = max(round_, self._confirmed.get(link, 0))
                self._release_some()

        return answered

    def join(self, shard: Shard, link: Link, is_first: bool = False) -> None:
        """See Sequencer.join. Earlier confirmations of the link are not those of a member."""
        self._confirmed.pop(link, None)
        super().join(shard, link, is_first)

    def swap(self, shard: Shard, old: Link, link: Link) -> None:
        """See Sequencer.swap; as with `join`."""
        self._confirmed.pop(link, None)
        super().swap(shard, old, link)

    def release_read(self, numbers: Sequence[int], round_: int, sink: Sink, token: Any, result: Any) -> None:
        """Answer now, or when the round is confirmed."""
        if self._is_confirmed(numbers, round_):
            sink.reply(token, result)
        else:
            self._unconfirmed.append((self.now_ms + WRITE_WAIT_MS, numbers, round_, sink, token, result))

    def _is_confirmed(self, numbers: Sequence[int], round_: int) -> bool:
        for number in numbers:
            shard = self.shards[number]
            heard = sum(self._confirmed.get(link, 0) >= round_ for link in shard.good)
            if heard < len(shard.members) - self.min_insync + 1:
                return False
        return True

    def _release_some(self) -> None:
        waiting, self._unconfirmed = self._unconfirmed, []
        for entry in waiting:
            _, numbers, round_, sink, token, result = entry
            if self._is_confirmed(numbers, round_):
                sink.reply(token, result)
            else:
                self._unconfirmed.append(entry)

    def tick(self) -> None:
        """See Sequencer.tick."""
        super().tick()
        late = [entry for entry in self._unconfirmed if entry[0] <= self.now_ms]
        self._unconfirmed = [entry for entry in self._unconfirmed if entry[0] > self.now_ms]
        for _, numbers, _, sink, token, _ in late:
            self.unavailable += 1
            text = f"too few members confirmed in {WRITE_WAIT_MS} ms that this coordinator still owns the cluster"
            sink.fail(token, Code.NOT_ENOUGH_REPLICAS, text, {"shard": numbers[0]})
