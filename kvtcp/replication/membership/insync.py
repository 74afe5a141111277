"""Membership: which members stay in sync, which leave, and which nodes learn.

Pure. Compares the sequencer's shards and links, once per tick and after every change, with the placement (`wanted` of
the map), and takes one step per shard at a time:

- a node whose link closed and did not return within LINK_GRACE_MS leaves all its shards by one change of the map
  (R14);
- so does one whose oldest unacknowledged item is older than EVICT_AFTER_MS while its peers acknowledged (slow is not
  dead): one such node per SLOW_INTERVAL_MS, and none right after this process itself stalled. Its link is closed, and
  it learns again after the same time. A learner that holds up no write has LEARNER_EVICT_AFTER_MS;
- a bad copy leaves at once; if it has to stay it is replaced whole in its place; if no good member is left, nor may
  come back, the shard goes back to the recovery;
- a wanted node that is no member learns; a member that is not wanted leaves when there are enough without it, and then
  drops its copy.

Rules kept here: R2 (shrink: change the map, then drop; grow: the learner joins in the step in which it has everything
committed, then the map is changed), R4 (never fewer than `min_insync` members), R6 (no change removes the last member
known to be good, that is good and linked). No step is taken for a shard whose row is being changed (`changing`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import (
    BACKOFF_MAX_MS,
    BACKOFF_MIN_MS,
    EVICT_AFTER_MS,
    LEARNER_EVICT_AFTER_MS,
    LEARNERS_PER_DONOR_MAX,
    LINK_GRACE_MS,
    RECOVER_WAIT_MS,
    SLOW_INTERVAL_MS,
)
from kvtcp.protocol.link import STOP, CopyReport, Report
from kvtcp.protocol.operations import DROP
from kvtcp.replication.membership.learner import FREEZING, PULLING, Learner
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.proposals import Proposals
from kvtcp.replication.sequencing.link import Batch, Link
from kvtcp.replication.sequencing.sequencer import Sequencer
from kvtcp.replication.sequencing.shard import Shard

DONOR_MISSES_MAX: Final = 8  # shards without a free donor after which no more are tried now
DROP_INTERVAL_MS: Final = 500  # between two searches for copies that are not wanted
RECOVERED_ANEW: Final = "its shard is recovered anew"


@dataclass
class NodeState:
    """State of a node beyond its link."""

    lost_ms: int | None = None  # when its link was lost; None = it is up
    learns_after_ms: int = 0  # no learner on it before
    failures: int = 0  # of its learners, one after the other
    leaves: bool = False  # it sent LEAVE, as it is about to stop
    may_stop: bool = False  # and was sent STOP: it has left every in-sync set that it can leave
    dropping: set[int] = field(default_factory=set)  # shards whose copy it was asked to drop


class Membership:
    """All decisions about members and learners. `reports` are those of the linked nodes, `new_token` makes unguessable
    names."""

    def __init__(
        self, sequencer: Sequencer, proposals: Proposals, outbox: Outbox, reports: Mapping[str, Report],
        new_token: Callable[[], bytes],
    ) -> None:  # fmt: skip
        self._sequencer = sequencer
        self._shards = sequencer.shards
        self._proposals = proposals
        self._outbox = outbox
        self._reports = reports
        self._new_token = new_token
        self.nodes: dict[str, NodeState] = {node: NodeState() for node in proposals.map.nodes}
        self.leaving: set[str] = set()  # nodes that are about to be removed from the map: no learner starts there
        self.changing: set[int] = set()  # shards whose row is being changed
        self.repairing: set[int] = set()  # shards that are not served before their bad members are replaced
        self.unsettled: set[int] = set()  # shards whose members are not as wanted, or not all good
        self._lost_since_ms: dict[int, int] = {}  # shards without a good member that is linked, and since when
        self._learners: dict[int, list[Learner]] = {}  # of each shard, and some that are over
        self._waiting: dict[int, None] = {}  # shards that want a learner, and some that did, in order
        self.evictions = 0
        self.joins = 0
        self._last_slow_ms = -SLOW_INTERVAL_MS
        self._last_drop_ms = 0  # time of the last search for copies that are not wanted
        self._checks_all = True
        # called when a member of a shard that is not served was replaced in the map by this copy
        self.on_replaced: Callable[[int, str, str], None] = lambda number, node, replica_id: None
        # called when a served shard has no good member any more: the recovery takes it back
        self.on_hand_back: Callable[[int, str], None] = lambda number, why: None
        self.on_learner_failed: Callable[[Learner, str], None] = lambda learner, why: None

    @property
    def _map(self) -> ClusterMap:
        return self._proposals.map

    @property
    def _now_ms(self) -> int:
        return self._sequencer.now_ms

    def learners(self) -> list[Learner]:
        """All learners. They are few, even with thousands of shards."""
        return [learner for number in list(self._learners) for learner in self.learners_of(number)]

    def learners_of(self, number: int) -> list[Learner]:
        """Learners of one shard."""
        if number not in self._learners:
            return []
        followings = self._shards[number].learners
        found = [each for each in self._learners[number] if followings.get(each.link) is each.following]
        if found:
            self._learners[number] = found
        else:
            del self._learners[number]
        return list(found)

    def copies_of(self, node: str) -> dict[int, CopyReport]:
        """The copies of a linked node, as far as is known; none of another node."""
        report = self._reports.get(node)
        return {} if report is None else report.copies

    # --- events -------------------------------------------------------------------------------------

    def node_up(self, node: str) -> None:
        """Take a node whose link is up."""
        state = self.nodes[node]
        state.lost_ms = None
        state.leaves = state.may_stop = False
        state.dropping.clear()
        self.check_all()

    def node_down(self, node: str) -> None:
        """Take a node whose link is about to be taken down: its learners are over, and those it gave to fail."""
        self.nodes[node].lost_ms = self._now_ms
        for learner in self.learners():
            if learner.proposed:
                continue  # it becomes a member when the map says so, linked or not
            if learner.link.node == node:
                learner.give_up()
                self._sequencer.detach(learner.shard, learner.link)
            elif learner.donor.node == node:
                learner.fail(f"the link to {node}, which gave it its data, was lost")

    def tick(self, stalled: bool) -> None:
        """Take the steps of a tick. `stalled`: this process did not run for a while, so no node counts as slow."""
        if stalled:
            self._last_slow_ms = max(self._last_slow_ms, self._now_ms - SLOW_INTERVAL_MS + EVICT_AFTER_MS)
        for learner in self.learners():
            learner.tick()
            if learner.following.holds_writes:
                learner.shard.writable = False
        self._evict_lost()
        self._evict_slow()
        self.work()
        self._hand_back_lost()
        if self._now_ms - self._last_drop_ms >= DROP_INTERVAL_MS:
            self._last_drop_ms = self._now_ms
            self._drop_copies()

    def work(self) -> None:
        """Take the next steps of all shards."""
        wanted = self._map.wanted
        shards = self._shards if self._checks_all else [self._shards[number] for number in self.unsettled]
        self._checks_all = False
        self.unsettled = {shard.number for shard in shards if _is_unsettled(shard, wanted[shard.number])}
        self._take_steps(sorted(self.unsettled))

    def work_on(self, numbers: Sequence[int]) -> None:
        """Take the next steps of these shards."""
        for number in numbers:
            if _is_unsettled(self._shards[number], self._map.wanted[number]):
                self.unsettled.add(number)
            else:
                self.unsettled.discard(number)
        self._take_steps(numbers)

    def _take_steps(self, numbers: Iterable[int]) -> None:
        for learner in self.learners():
            learner.resume()
        for number in numbers:
            shard = self._shards[number]
            if number in self.unsettled and shard.serving and number not in self.changing:
                self._give_up_unwanted(shard)
                self._evict_bad(shard)
                self._shrink_moved(shard)
            if self._wants_learner(shard):
                self._waiting[number] = None
        self._start_learners()

    def _wants_learner(self, shard: Shard) -> bool:
        number = shard.number
        if number not in self.unsettled or number in self.changing or shard.learners:
            return False
        return shard.serving or number in self.repairing

    def check_all(self) -> None:
        """Have the next `work` check every shard, as links or the map changed. Otherwise only unsettled shards are
        checked: there may be thousands of shards."""
        self._checks_all = True

    # --- shards that are not served -----------------------------------------------------------------

    def repair(self, number: int) -> None:
        """Replace the bad members of a shard that is not served; the others are equal."""
        self.repairing.add(number)
        self.work_on([number])

    def stop_repair(self, number: int) -> None:
        """Stop the replacement of members of a shard."""
        self.repairing.discard(number)
        self.end_learners(number, RECOVERED_ANEW)

    def repair_in_flight(self, number: int) -> bool:
        """Whether the map is being changed for a replaced member."""
        return any(learner.proposed for learner in self.learners_of(number))

    def end_learners(self, number: int, why: str) -> None:
        """End all learners of a shard."""
        for learner in self.learners_of(number):
            learner.fail(why)

    # --- leaving ------------------------------------------------------------------------------------

    def may_leave(self, shard: Shard, link: Link) -> bool:
        """Whether the map can be changed so that `link` is no member, with M members and a good one left."""
        is_changeable = shard.serving and shard.number not in self.changing and link in shard.acked
        return is_changeable and len(shard.members) > self._map.min_insync and _leaves_a_good_one(shard, link)

    def evict(self, link: Link, shards: Iterable[Shard], why: str, level: str = "warning") -> int:
        """R2, R14: propose that `link` leaves those of the shards that it can leave; returns their number."""
        leaving = [shard for shard in shards if self.may_leave(shard, link)]
        if leaving:
            numbers = [shard.number for shard in leaving]
            left: list[Shard] = []

            def edit(old: ClusterMap) -> ClusterMap:
                # The store may have been slow, or have failed: the last good member may be another one now (R6).
                left[:] = [shard for shard in leaving if _leaves_a_good_one(shard, link)]
                return old.without([shard.number for shard in left], link.node)

            def stored(_: ClusterMap) -> None:
                self.changing.difference_update(numbers)
                if left:
                    self._sequencer.leave(left, link)
                    for learner in [learner for shard in left for learner in self.learners_of(shard.number)]:
                        if learner.replaces == link.node:  # that place is gone: it joins as an additional member
                            learner.replaces = None
                    self.left(link.node, left[0].number, len(left), why, level)
                self.work_on(numbers)

            self.changing.update(numbers)
            self._proposals.propose(edit, stored)
        return len(leaving)

    def left(self, node: str, first: int, count: int, why: str, level: str = "warning") -> None:
        """Count and log that the map does not name a node as a member of these shards any more."""
        self.evictions += 1
        self._outbox.event(level, "left-in-sync", node=node, shards=count, first=first, reason=why)

    def _evict_lost(self) -> None:
        for node, state in self.nodes.items():
            link = self._sequencer.links[node]
            if state.leaves and link.connected:
                left = self.evict(link, list(link.shards), "it is about to stop")
                waits = left or any(shard.number in self.changing for shard in link.shards)
                if not waits and not state.may_stop:
                    state.may_stop = True
                    self._outbox.send(node, (STOP,))
            elif state.lost_ms is not None and self._now_ms - state.lost_ms >= LINK_GRACE_MS:
                self.evict(link, list(link.shards), link.reason)

    def _evict_slow(self) -> None:
        now_ms = self._now_ms
        if now_ms - self._last_slow_ms < SLOW_INTERVAL_MS:
            return
        for node, state in self.nodes.items():
            link = self._sequencer.links[node]
            if not link.connected:
                continue
            oldest = link.oldest_unacknowledged()
            if oldest is None or now_ms - oldest.written_ms < self._patience_ms(link, oldest):
                continue
            if not self._peers_have(link, oldest):
                continue
            if not any(link in shard.learners or self.may_leave(shard, link) for shard in link.shards):
                continue  # no shard can do without it, and a new link would only be sent everything again
            self._last_slow_ms = now_ms
            state.learns_after_ms = now_ms + SLOW_INTERVAL_MS
            why = f"it acknowledged nothing for {now_ms - oldest.written_ms} ms while others did"
            self._outbox.event("warning", "slow-node", node=node, reason=why)
            self.evict(link, list(link.shards), why)
            self._outbox.close_link(node, why)
            return

    def _patience_ms(self, link: Link, batch: Batch) -> int:
        """The time that a link may have this batch. A learner, which has much to do, gets more, unless it holds up
        writes."""
        is_awaited = link.full or any(link in self._shards[number].acked for number in batch.last_seqs)
        return EVICT_AFTER_MS if is_awaited else LEARNER_EVICT_AFTER_MS

    def _peers_have(self, link: Link, batch: Batch) -> bool:
        """Whether M other members of some shard acknowledged its writes of this batch: the shard could commit without
        this member, and others that are slow."""
        for number, seq in batch.last_seqs.items():
            acked = self._shards[number].acked
            if sum(acked[other] >= seq for other in acked if other is not link) >= self._map.min_insync:
                return True
        return False

    def _hand_back_lost(self) -> None:
        """R9: hand a shard to the recovery if all its members lack their data, or are destroyed, for RECOVER_WAIT_MS:
        none can be replaced. While a good one may come back the shard stays: numbers given in this epoch are to be sent
        to that member."""
        lost: dict[int, int] = {}
        for number in sorted(self.unsettled):
            shard = self._shards[number]
            if not shard.serving or number in self.changing:
                continue
            if any(link.node not in self._map.destroyed for link in shard.good):
                continue
            lost[number] = since_ms = self._lost_since_ms.get(number, self._now_ms)
            if self._now_ms - since_ms >= RECOVER_WAIT_MS:
                self.end_learners(number, RECOVERED_ANEW)
                self.on_hand_back(number, "none of its members has its data")
        self._lost_since_ms = lost

    def _evict_bad(self, shard: Shard) -> None:
        for link, why in list(shard.bad.items()):
            if self.evict(link, [shard], f"it {why}"):
                return

    def _give_up_unwanted(self, shard: Shard) -> None:
        """End additional learners on nodes where the copy is not wanted any more."""
        for learner in self.learners_of(shard.number):
            if learner.replaces is None and learner.link.node not in self._map.wanted[shard.number]:
                learner.fail("it is not wanted there any more")

    def _shrink_moved(self, shard: Shard) -> None:
        """Let a member that is not wanted leave when there are enough wanted ones."""
        wanted = self._map.wanted[shard.number]
        if shard.number in self.changing or shard.bad or len(shard.members) <= len(wanted):
            return
        link = next(link for link in shard.members if link.node not in wanted)
        self.evict(link, [shard], "it is not wanted there any more", "info")

    def _drop_copies(self) -> None:
        """Drop copies of settled shards on nodes that are no members."""
        for node, state in self.nodes.items():
            link = self._sequencer.links[node]
            if not link.connected:
                continue
            for number in list(self.copies_of(node)):
                shard = self._shards[number]
                is_settled = shard.serving and number not in self.unsettled and shard.is_whole()
                if is_settled and link not in shard.acked and number not in state.dropping:
                    state.dropping.add(number)
                    self._sequencer.call(link, (DROP, number), self._dropped(node, number))

    def _dropped(self, node: str, number: int) -> Callable[[Any], None]:
        def done(result: Any) -> None:
            state = self.nodes.get(node)
            if state is not None and result is None:
                state.dropping.discard(number)
                self.copies_of(node).pop(number, None)

        return done

    # --- learning -----------------------------------------------------------------------------------

    def _start_learners(self) -> None:
        """Start learners for waiting shards, as far as there are donors for them."""
        gives: dict[Link, int] = {}
        for learner in self.learners():
            gives[learner.donor] = gives.get(learner.donor, 0) + 1
        misses = 0
        for number in list(self._waiting):
            shard = self._shards[number]
            found = self._candidate(shard) if self._wants_learner(shard) else None
            del self._waiting[number]
            if found is None:
                continue  # until the next check of the shard
            donor = self._donor(shard, found[0], gives)
            if donor is None:
                self._waiting[number] = None  # behind the others: most likely none of them has one either
                misses += 1
                if misses == DONOR_MISSES_MAX:
                    break
                continue
            gives[donor] = gives.get(donor, 0) + 1
            self.learn(shard, found[0], donor, found[1])

    def learn(self, shard: Shard, link: Link, donor: Link, replaces: str | None, seq_min: int = 0) -> Learner:
        """Begin to bring a copy up to date."""
        learner = Learner(
            shard, link, donor, replaces, seq_min, sequencer=self._sequencer, outbox=self._outbox,
            token_for=self._token_for, on_live=self._learner_is_live, on_failed=self._learner_failed,
        )  # fmt: skip
        shard.learners[link] = learner.following
        self._learners[shard.number] = [*self.learners_of(shard.number), learner]
        self.unsettled.add(shard.number)
        learner.start(self.copies_of(link.node).get(shard.number))
        self._outbox.event("info", "learner-begins", shard=shard.number, node=link.node, donor=donor.node)
        return learner

    def _candidate(self, shard: Shard) -> tuple[Link, str | None] | None:
        """The link to learn the shard next, and the member whose place it takes, None for an additional one."""
        links = self._sequencer.links
        for link in shard.bad:  # members that could leave have left, or are about to
            if link.node in self._map.destroyed:
                return self._substitute(shard, link)
            if self._can_learn(link):
                return link, link.node
        if shard.bad or not shard.serving:
            return None
        for link in shard.members:
            if link.node in self._map.destroyed and len(shard.members) <= self._map.min_insync:
                return self._substitute(shard, link)
        if len(shard.members) > self._map.factor:
            return None
        for node in self._map.wanted[shard.number]:
            if links[node] not in shard.acked and self._can_learn(links[node]):
                return links[node], None
        return None

    def _substitute(self, shard: Shard, gone: Link) -> tuple[Link, str | None] | None:
        """Another node in the place of a destroyed member that cannot just leave."""
        out = {*self._map.draining, *self._map.destroyed}
        wanted = self._map.wanted[shard.number]
        for node in (*wanted, *(node for node in self._map.nodes if node not in wanted and node not in out)):
            link = self._sequencer.links[node]
            if link not in shard.acked and self._can_learn(link):
                return link, gone.node
        return None

    def _can_learn(self, link: Link) -> bool:
        state = self.nodes[link.node]
        is_leaving = state.leaves or link.node in self.leaving
        return link.connected and not is_leaving and state.learns_after_ms <= self._now_ms

    def _donor(self, shard: Shard, link: Link, gives: Mapping[Link, int]) -> Link | None:
        """The good member that gives to the fewest learners."""
        able = [each for each in shard.good if each.connected and each is not link]
        able = [each for each in able if gives.get(each, 0) < LEARNERS_PER_DONOR_MAX]
        return min(able, key=lambda each: (gives.get(each, 0), each.node), default=None)

    def _token_for(self, learner: Learner) -> bytes:
        """A new token, empty while the donor gives another copy: whole copies leave a donor one after the other. A node
        that gives a copy to itself need not wait."""
        is_busy = learner.donor is not learner.link and any(
            other is not learner and other.donor is learner.donor and other.phase in (FREEZING, PULLING) and other.token
            for other in self.learners()
        )
        return b"" if is_busy else self._new_token()

    def _learner_failed(self, learner: Learner, why: str) -> None:
        """Detach the learner, and let its node wait before the next one."""
        state = self.nodes[learner.link.node]
        if state.learns_after_ms <= self._now_ms:  # else another one failed just now: learners of a node fail together
            state.failures += 1
            wait_ms = min(BACKOFF_MIN_MS << min(state.failures, 10), BACKOFF_MAX_MS)
            state.learns_after_ms = self._now_ms + wait_ms
        wait_ms = state.learns_after_ms - self._now_ms
        number, node = learner.shard.number, learner.link.node
        self._outbox.event("warning", "learner-failed", shard=number, node=node, reason=why, again_in_ms=wait_ms)
        self._sequencer.detach(learner.shard, learner.link)
        self.on_learner_failed(learner, why)

    def _learner_is_live(self, learner: Learner) -> None:
        """R2: if the learner acknowledged everything committed, it joins in this step, and then the map is changed; a
        replacement joins when the map says so (R9)."""
        shard = learner.shard
        number = shard.number
        if learner.proposed or number in self.changing or learner.following.acked < shard.commit:
            return
        learner.proposed = True
        link, replaces, replica_id = learner.link, learner.replaces, learner.following.replica_id
        node = link.node
        self.nodes[node].failures = 0
        self.changing.add(number)
        is_first = self._map.wanted[number][0] == node  # so that answering is spread as planned
        if replaces is None:
            self._sequencer.join(shard, link, is_first)

        def stored(_: ClusterMap) -> None:
            self.changing.discard(number)
            self.joins += 1
            if replaces is not None:
                self._sequencer.swap(shard, self._sequencer.links[replaces], link)
            self._outbox.event("info", "joined-in-sync", node=node, shard=number, seq=learner.following.acked)
            if not shard.serving:
                self.on_replaced(number, node, replica_id)
            self.work_on([number])

        if replaces is None:
            def joined(old: ClusterMap) -> ClusterMap:
                new = old.with_member(number, node, replica_id)
                return new.first_answers(number, node) if is_first else new

            self._proposals.propose(joined, stored)
        else:
            self._proposals.propose(lambda old: old.replaced(number, replaces, node, replica_id), stored)


def _is_unsettled(shard: Shard, wanted: Collection[str]) -> bool:
    """Whether the shard may need a step."""
    return bool(shard.bad or shard.learners) or {link.node for link in shard.members} != set(wanted)


def _leaves_a_good_one(shard: Shard, link: Link) -> bool:
    """Whether another member is known to be good, that is good and linked."""
    return any(other is not link and other.connected for other in shard.good)
