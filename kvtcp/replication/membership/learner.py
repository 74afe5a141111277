"""The learner: one node's copy of one shard on its way into the in-sync set.

Pure. Rejoin after a crash, replacement of a lost copy and a move to another node are all this one mechanism.
Membership begins and ends learners. A learner queues its items through the sequencer and its frames through the outbox;
the controller passes on the answers of nodes. The shard sees only the learner's `following`.

    ASKED      the item LEARN is queued: from there on the node gets, and buffers, every write of the shard
    FETCHING   a member is asked for the entries that the node lacks
    SHIPPING   the node has to apply them, by their effects
    FREEZING   they are not available, so a member freezes its whole copy
    PULLING    and the node fetches that copy
    LIVE       the node has everything, buffered writes included, and acknowledges like a member

A copy that is continued is compared first: the donor's chain at the copy's position must be the copy's own (R7). A copy
that does not match, or to which the entries cannot be shipped, is replaced whole, under a new replica id. Acknowledged
numbers of a learner count only when LIVE (`acknowledged`), and it joins only when they cover everything committed (R2).

Answers to requests of an attempt that is over are ignored.

Invariants: `following.acked` is 0 before LIVE; a copy that was not replaced whole is LIVE only after its chain was
compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvtcp.protocol.link import FETCH, PULL, SHIP, CopyReport, is_entry
from kvtcp.protocol.operations import DONATE, LEARN, UNLEARN
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.sequencing.following import Following
from kvtcp.replication.sequencing.link import Link, LinkError
from kvtcp.replication.sequencing.requests import LINK_LOST
from kvtcp.replication.sequencing.sequencer import Sequencer
from kvtcp.replication.sequencing.shard import Shard

ASKED: Final = "asked"
FETCHING: Final = "fetching"
SHIPPING: Final = "shipping"
FREEZING: Final = "freezing"
PULLING: Final = "pulling"
LIVE: Final = "live"

HOLD_AFTER_TICKS: Final = 4  # ticks for which a live learner lags behind the members before writes wait for it


class Learner:
    """One attempt. `replaces` is the member whose place the learner takes at the end: an earlier copy of the same node,
    or a destroyed node; None for an additional member."""

    def __init__(
        self, shard: Shard, link: Link, donor: Link, replaces: str | None, seq_min: int, *,
        sequencer: Sequencer, outbox: Outbox, token_for: Callable[[Learner], bytes],
        on_live: Callable[[Learner], None], on_failed: Callable[[Learner, str], None],
    ) -> None:  # fmt: skip
        """Numbers up to `seq_min` were lost with an accepted loss; 0 = none. `token_for` makes an unguessable name for
        the transfer, empty while the donor gives another copy. `on_live` is called when the learner acknowledged more,
        `on_failed` once, when it will not become a member."""
        self.shard = shard
        self.link = link
        self.donor = donor
        self.replaces = replaces
        self.following = Following(self.acknowledged)
        self.phase = ASKED
        self.fresh = False  # the copy is replaced whole
        self.seq = 0  # last known number of its own copy
        self.proposed = False  # the change of the map that makes it a member is on its way
        self.entries_shipped = 0
        self.keys_total = 0  # of the copy that is transferred
        self.token = b""  # of the transfer that was asked for; empty if none was
        self._sequencer = sequencer
        self._outbox = outbox
        self._token_for = token_for
        self._on_live = on_live
        self._on_failed = on_failed
        self._chain = 0  # of `seq`
        self._seq_min = seq_min
        self._attempt = 0  # counts attachments: results of earlier ones are ignored
        self._attach_seq = 0  # last number given before the writes that are queued to the learner
        self._compared = False  # the copy's chain is that of the donor, or the copy is a transferred one
        self._learned = -1  # number at which the node said that its copy is live; -1 = not yet
        self._fetches = False  # FETCH was sent and not answered
        self._shipped_to = 0  # last number of the entries sent to it
        self._ticks_behind = 0  # ticks in which it was live and lacked something committed
        self._over = False

    @property
    def entries_left(self) -> int:
        """Count of the entries that it still lacks, as far as is known."""
        return max(0, self.shard.last_seq - max(self.seq, self.following.acked))

    def start(self, copy: CopyReport | None) -> None:
        """Attach the learner, whose node reported `copy`."""
        if self.donor is self.link:
            self._give_itself()
            return
        usable = copy is not None and copy.complete and copy.seq <= self.shard.last_seq
        self._attach(fresh=not usable)

    def _attach(self, fresh: bool) -> None:
        self.phase = ASKED
        self.fresh = self._compared = fresh
        self._fetches = False
        self._learned = -1
        self.token = b""
        self._attempt += 1
        self._attach_seq = max(self.shard.last_seq, self._seq_min)
        self.following.attached = True
        item = (LEARN, self.shard.number, int(fresh), self._attach_seq)
        self._sequencer.attach(self.shard, self.link, item, self._guarded(self._on_learn))

    def _give_itself(self) -> None:
        """Continue a copy, after an accepted loss, as a new one with higher numbers."""
        self.phase = FREEZING
        self.token = token = self._token_for(self)

        def frozen(result: Any) -> None:
            if result is None:
                self.fail("its node has no copy to give")
                return
            self._seq_min, self.keys_total = result[1], result[3]
            self._attach(fresh=True)
            self.token = token

        item = (DONATE, self.shard.number, token, self._seq_min)
        self._sequencer.call(self.donor, item, self._guarded(frozen))

    def _guarded(self, then: Callable[[Any], None]) -> Callable[[Any], None]:
        """`then`, called only if this attempt is not over when the result comes."""
        attempt = self._attempt

        def guarded(result: Any) -> None:
            if self._over or attempt != self._attempt:
                return
            if result is LINK_LOST:
                self.fail("a link was lost")
            else:
                then(result)

        return guarded

    def give_up(self) -> None:
        """End this attempt: the link of its node is lost."""
        self._over = True

    def fail(self, why: str) -> None:
        """End this attempt; the node drops the buffered writes."""
        if not self._over and not self.proposed:
            self._over = True
            if self.link.connected:
                self._sequencer.call(self.link, (UNLEARN, self.shard.number), lambda _: None)
            self._on_failed(self, why)

    def tick(self) -> None:
        """Ask a donor that was behind again; hold writes if the learner lags behind for long."""
        if self.phase == FETCHING and not self._fetches:
            self._fetch()
        elif self.phase == LIVE and not self.proposed:
            self._on_live(self)
            if not self.proposed and self.following.acked < self.shard.commit:
                self._ticks_behind += 1
                self.following.holds_writes = self._ticks_behind > HOLD_AFTER_TICKS

    def resume(self) -> None:
        """Try again for a donor that may be free now."""
        if self.phase == FREEZING and not self.token:
            self._freeze()

    # --- what comes back ----------------------------------------------------------------------------

    def _on_learn(self, result: Any) -> None:
        """Take the node's answer to LEARN: it buffers writes from now on, and this is its copy."""
        if result is None:
            if self.fresh:
                self.fail("its node refused to begin a new copy")
            else:
                self._attach(fresh=True)
            return
        replica_id, _, _, _, seq, chain = result
        self.following.replica_id, self.seq, self._chain = replica_id.decode(), seq, chain
        if self.donor is self.link:
            self._pull()
        elif self.fresh:
            self._freeze()
        else:
            self._fetch()

    def _fetch(self) -> None:
        self.phase = FETCHING
        self._fetches = True
        self._outbox.send(self.donor.node, (FETCH, self.shard.number, self.seq))

    def on_entries(self, node: str, after: int, chain: int | None, entries: Any) -> None:
        """Take ENTRIES of the donor. Raises LinkError if they are malformed."""
        if self.phase != FETCHING or node != self.donor.node or after != self.seq:
            return
        self._fetches = False
        if chain is None and self.shard.acked.get(self.donor, 0) < after:
            return  # the donor is behind: `tick` asks again
        if chain is None or chain != self._chain or entries is None:
            self._attach(fresh=True)  # another history, or too old: the copy is replaced whole
            return
        if not (type(entries) is list and all(map(is_entry, entries))):
            raise LinkError(f"{node} sent entries of shard {self.shard.number} that are none")
        self._compared = True
        if entries and after < self._attach_seq:
            self.phase = SHIPPING
            self._shipped_to = after + len(entries)
            self.entries_shipped += len(entries)
            self._outbox.send(self.link.node, (SHIP, self.shard.number, entries))
        elif after >= self._attach_seq:
            self.phase = SHIPPING  # it has all, and reports that when it is durable
            self._check_live()

    def on_shipped(self, node: str, seq: int, chain: int, error: bytes | None) -> None:
        """Take SHIPPED of the learner."""
        if self.phase != SHIPPING or node != self.link.node:
            return
        if error is not None:
            self._attach(fresh=True)
        elif seq == self._shipped_to:  # else of an attempt that is over
            self.seq, self._chain = seq, chain
            if seq < self._attach_seq:
                self._fetch()

    def _freeze(self) -> None:
        self.phase = FREEZING
        self.token = self._token_for(self)
        if not self.token:
            return  # `resume` tries again
        item = (DONATE, self.shard.number, self.token, self._seq_min)
        self._sequencer.call(self.donor, item, self._guarded(self._on_frozen))

    def _on_frozen(self, result: Any) -> None:
        """Let the node fetch the frozen copy, which has every write queued before the learner was attached."""
        if result is None:
            self.fail(f"{self.donor.node} has no copy to give")
            return
        self.keys_total = result[3]
        self._pull()

    def _pull(self) -> None:
        self.phase = PULLING
        host, port = self._sequencer.map.nodes[self.donor.node]
        self._outbox.send(self.link.node, (PULL, self.shard.number, host, port, self.token))

    def on_learned(self, node: str, replica_id: bytes, seq: int) -> None:
        """Take LEARNED: the copy is complete and live at this number. Raises LinkError if that cannot be true."""
        if self.phase in (ASKED, LIVE) or node != self.link.node or replica_id.decode() != self.following.replica_id:
            return  # of an attempt that is over
        if seq < self._attach_seq:
            return  # of one with the same replica id: LEARNED waits until the copy is durable
        last_seq = max(self.shard.last_seq, self._attach_seq)
        if seq > last_seq:
            raise LinkError(f"{node} has shard {self.shard.number} up to {seq}, the last number given is {last_seq}")
        self._learned = seq
        self._check_live()

    def _check_live(self) -> None:
        if self._learned >= 0 and self._compared:
            self.phase = LIVE
            self.seq = self.following.acked = self._learned
            self._on_live(self)

    def on_failed(self, node: str, why: str) -> None:
        """Take LEARN_FAILED: the node is as it was before."""
        if self.phase in (ASKED, LIVE) or node != self.link.node:
            return  # of an attempt that is over
        if self.fresh:
            self._over = True
            self._on_failed(self, why)
        else:
            self._attach(fresh=True)

    def acknowledged(self, seq: int) -> None:
        """Note that an ordinal of the link covers the entries up to this number. They count only when the copy is live:
        before, the node had buffered them."""
        if self.phase == LIVE:
            if seq > self.following.acked:
                self.seq = self.following.acked = seq
                self._on_live(self)
        elif 0 <= self._learned < seq:
            self._learned = seq  # live as far as the node knows, but not compared yet
