"""Membership: who is in sync, who is let go, and who learns.

Pure. Looks at the sequencer's shards and links once per tick and whenever something changed, compares them with where
the copies shall be (`wanted` of the map), and takes one step per shard at a time:

- a node whose link closed and did not return within LINK_GRACE_MS leaves all its shards by one change of the map
  (R14);
- so does one whose oldest unacknowledged item is older than EVICT_AFTER_MS while its peers acknowledged (slow is not
  dead): one such node per SLOW_INTERVAL_MS, and none right after this process itself stalled. Its link is closed, and
  it learns again after the same time. A learner for which nobody waits has LEARNER_EVICT_AFTER_MS;
- a bad copy leaves at once; if it has to stay it is replaced whole in its place; if no good member is left, nor may
  come back, the shard goes back to the recovery;
- a wanted node that is no member learns; a member that is not wanted leaves when there are enough without it, and then
  drops its copy.

Rules kept here: R2 (shrink: change the map, then drop; grow: the learner joins in the step in which it has everything
committed, then the map is changed), R4 (never fewer than `min_insync` members), R6 (no change removes the last member
known to be good, that is good and linked). A shard with a change of its row on its way is left alone (`changing`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

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
from kvtcp.protocol.link import STOP, CopyReport
from kvtcp.protocol.operations import DROP
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.learner import FREEZING, PULLING, Learner
from kvtcp.replication.progress import Batch, Progress
from kvtcp.replication.sequencer import Sequencer
from kvtcp.replication.shard_state import ShardState

Edit = Callable[[ClusterMap], ClusterMap]

DONOR_MISSES_MAX: Final = 8  # shards without a free donor after which no more are looked at now
DROP_INTERVAL_MS: Final = 500  # how often copies that are not wanted are looked for


class Surroundings(Protocol):
    """What membership needs of the controller, beyond what its learners need."""

    map: ClusterMap
    sequencer: Sequencer

    def propose_rows(self, numbers: Iterable[int], edit: Edit, done: Callable[[], None]) -> None:
        """Change these rows of the map; `done` when that is stored."""

    def send(self, link: Progress, frame: tuple[Any, ...]) -> None:
        """Send a frame."""

    def close_link(self, link: Progress, reason: str) -> None:
        """Close the connection; it is dialled again."""

    def replaced(self, number: int, node: str, disk: str) -> None:
        """A member of a shard that is not served was replaced in the map, by this copy."""

    def hand_back(self, number: int, why: str) -> None:
        """Do not serve the shard any more: the recovery judges it anew."""

    def copies_of(self, node: str) -> dict[int, CopyReport]:
        """The copies of a linked node, as far as is known."""

    def is_leaving(self, node: str) -> bool:
        """Whether the node is about to be removed from the map."""

    def event(self, level: str, word: str, **fields: Any) -> None:
        """For the log."""


@dataclass
class NodeState:
    """What is remembered of a node beyond its link."""

    lost_ms: int | None = None  # when its link was lost; None = it is up
    learns_after_ms: int = 0  # no learner on it before
    failures: int = 0  # of its learners, one after the other
    leaves: bool = False  # it asked to leave the in-sync sets, as it is about to stop
    may_stop: bool = False  # and was told that it has left, as far as it can
    dropping: set[int] = field(default_factory=set)  # shards whose copy it was told to drop


class Membership:
    """All decisions about members and learners. `around` is the controller."""

    def __init__(self, around: Any) -> None:
        self._around = around
        self.nodes: dict[str, NodeState] = {node: NodeState() for node in around.map.nodes}
        self.changing: set[int] = set()  # shards with a change of their row on its way
        self.repairing: set[int] = set()  # shards that are not served before their bad members are replaced
        self.unsettled: set[int] = set()  # shards whose members are not what is wanted, or not all good
        self._lost_since_ms: dict[int, int] = {}  # shards without a good member that is linked, and since when
        self._learning: dict[int, None] = {}  # shards with learners, and some that had
        self._waiting: dict[int, None] = {}  # shards that want a learner, and some that did, in their order
        self.evictions = 0
        self.joins = 0
        self._last_slow_ms = -SLOW_INTERVAL_MS
        self._last_drop_ms = 0  # when copies that are not wanted were looked for
        self._looks_at_all = True

    @property
    def _now_ms(self) -> int:
        return int(self._around.now_ms)

    @property
    def _shards(self) -> list[ShardState]:
        shards: list[ShardState] = self._around.sequencer.shards
        return shards

    def learners(self) -> list[Learner]:
        """All of them. They are few, so that nothing here takes long for each of thousands of shards."""
        shards = self._shards
        for number in [number for number in self._learning if not shards[number].learners]:
            del self._learning[number]
        return [learner for number in self._learning for learner in shards[number].learners.values()]

    # --- events -------------------------------------------------------------------------------------

    def node_up(self, node: str) -> None:
        """Its link is up."""
        state = self.nodes[node]
        state.lost_ms = None
        state.leaves = state.may_stop = False
        state.dropping.clear()
        self.look_at_all()

    def node_down(self, node: str) -> None:
        """Its link is about to be taken down: its learners are over, and those it gave to begin anew."""
        self.nodes[node].lost_ms = self._now_ms
        for learner in self.learners():
            if learner.proposed:
                continue  # it counts when the map says so, linked or not
            if learner.link.node == node:
                learner.give_up()
                self._around.sequencer.detach(learner.shard, learner.link)
            elif learner.donor.node == node:
                learner.fail(f"the link to {node}, which gave it its data, was lost")

    def tick(self, stalled: bool) -> None:
        """Time passed. `stalled`: this process did not run for a while, so nobody else can be called slow."""
        if stalled:
            self._last_slow_ms = max(self._last_slow_ms, self._now_ms - SLOW_INTERVAL_MS + EVICT_AFTER_MS)
        for learner in self.learners():
            learner.tick()
            if learner.hurry:
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
        wanted = self._around.map.wanted
        shards = self._shards if self._looks_at_all else [self._shards[number] for number in self.unsettled]
        self._looks_at_all = False
        self.unsettled = {shard.number for shard in shards if _is_unsettled(shard, wanted[shard.number])}
        self._take_steps(sorted(self.unsettled))

    def work_on(self, numbers: Sequence[int]) -> None:
        """Take the next steps of these shards."""
        for number in numbers:
            if _is_unsettled(self._shards[number], self._around.map.wanted[number]):
                self.unsettled.add(number)
            else:
                self.unsettled.discard(number)
        self._take_steps(numbers)

    def _take_steps(self, numbers: Iterable[int]) -> None:
        for learner in self.learners():
            learner.go_on()
        for number in numbers:
            shard = self._shards[number]
            if number in self.unsettled and shard.serving and number not in self.changing:
                self._give_up_unwanted(shard)
                self._evict_bad(shard)
                self._shrink_moved(shard)
            if self._wants_learner(shard):
                self._waiting[number] = None
        self._start_learners()

    def _wants_learner(self, shard: ShardState) -> bool:
        number = shard.number
        if number not in self.unsettled or number in self.changing or shard.learners:
            return False
        return shard.serving or number in self.repairing

    def look_at_all(self) -> None:
        """Links or the map changed: any shard may not be as it is wanted. Thousands of shards are not looked at for
        every frame."""
        self._looks_at_all = True

    # --- leaving ------------------------------------------------------------------------------------

    def may_leave(self, shard: ShardState, link: Progress) -> bool:
        """Whether the map can be changed so that `link` is no member, with M members and a good one left."""
        return (
            shard.serving
            and shard.number not in self.changing
            and link in shard.acked
            and len(shard.members) > self._around.map.min_insync
            and _leaves_a_good_one(shard, link)
        )

    def evict(self, link: Progress, shards: Iterable[ShardState], why: str, level: str = "warning") -> int:
        """R2, R14: propose that `link` leaves those of the shards that it can leave; how many they are."""
        leaving = [shard for shard in shards if self.may_leave(shard, link)]
        if leaving:
            numbers = [shard.number for shard in leaving]
            left: list[ShardState] = []

            def edit(old: ClusterMap) -> ClusterMap:
                # The store may have taken its time, or have failed: the last good member may be another one now (R6).
                left[:] = [shard for shard in leaving if _leaves_a_good_one(shard, link)]
                return old.without([shard.number for shard in left], link.node)

            def stored() -> None:
                self.changing.difference_update(numbers)
                if left:
                    self._around.sequencer.leave(left, link)
                    for learner in [learner for shard in left for learner in shard.learners.values()]:
                        if learner.replaces == link.node:  # its place is free: it comes in addition
                            learner.replaces = None
                    self.left(link.node, left[0].number, len(left), why, level)
                self.work_on(numbers)

            self.changing.update(numbers)
            self._around.propose_rows(numbers, edit, stored)
        return len(leaving)

    def left(self, node: str, first: int, count: int, why: str, level: str = "warning") -> None:
        """The map does not name the node any more as a member of so many shards."""
        self.evictions += 1
        self._around.event(level, "left-in-sync", node=node, shards=count, first=first, reason=why)

    def _evict_lost(self) -> None:
        for node, state in self.nodes.items():
            link = self._around.sequencer.links[node]
            if state.leaves and link.connected:
                left = self.evict(link, list(link.shards), "it is about to stop")
                waits = left or any(shard.number in self.changing for shard in link.shards)
                if not waits and not state.may_stop:
                    state.may_stop = True
                    self._around.send(link, (STOP,))
            elif state.lost_ms is not None and self._now_ms - state.lost_ms >= LINK_GRACE_MS:
                self.evict(link, list(link.shards), link.reason)

    def _evict_slow(self) -> None:
        now_ms = self._now_ms
        if now_ms - self._last_slow_ms < SLOW_INTERVAL_MS:
            return
        for node, state in self.nodes.items():
            link = self._around.sequencer.links[node]
            if not link.connected:
                continue
            oldest = link.oldest_unacknowledged()
            if oldest is None or now_ms - oldest.written_ms < self._patience_ms(link, oldest):
                continue
            if not self._peers_have(link, oldest):
                continue
            if not any(link in shard.learners or self.may_leave(shard, link) for shard in link.shards):
                continue  # nothing goes on without it: with a new link it would only be sent everything again
            self._last_slow_ms = now_ms
            state.learns_after_ms = now_ms + SLOW_INTERVAL_MS
            why = f"it acknowledged nothing for {now_ms - oldest.written_ms} ms while others did"
            self._around.event("warning", "slow-node", node=node, reason=why)
            self.evict(link, list(link.shards), why)
            self._around.close_link(link, why)
            return

    def _patience_ms(self, link: Progress, batch: Batch) -> int:
        """How long the link may have this batch. Nobody waits for a learner, which has much to do, before it holds the
        writes of its shards back."""
        is_awaited = link.full or any(link in self._shards[number].acked for number in batch.last_seqs)
        return EVICT_AFTER_MS if is_awaited else LEARNER_EVICT_AFTER_MS

    def _peers_have(self, link: Progress, batch: Batch) -> bool:
        """Whether for some shard M other members acknowledged what this batch has of it: without this one, and others
        that are slow, it would go on."""
        for number, seq in batch.last_seqs.items():
            acked = self._shards[number].acked
            if sum(acked[other] >= seq for other in acked if other is not link) >= self._around.map.min_insync:
                return True
        return False

    def _hand_back_lost(self) -> None:
        """R9: a shard all of whose members have lost their data, or are destroyed, for RECOVER_WAIT_MS: nobody can be
        replaced. The recovery says that it is down. As long as a good one may come back the shard stays here: numbers
        that were given in this epoch are on their way to it."""
        lost: dict[int, int] = {}
        for number in sorted(self.unsettled):
            shard = self._shards[number]
            if not shard.serving or number in self.changing:
                continue
            if any(link.node not in self._around.map.destroyed for link in shard.good):
                continue
            lost[number] = since_ms = self._lost_since_ms.get(number, self._now_ms)
            if self._now_ms - since_ms >= RECOVER_WAIT_MS:
                for learner in list(shard.learners.values()):
                    learner.fail("its shard is recovered anew")
                self._around.hand_back(number, "none of its members has its data")
        self._lost_since_ms = lost

    def _evict_bad(self, shard: ShardState) -> None:
        for link, why in list(shard.bad.items()):
            if self.evict(link, [shard], f"it {why}"):
                return

    def _give_up_unwanted(self, shard: ShardState) -> None:
        """A learner that comes in addition, on a node where the copy is not wanted any more."""
        for learner in list(shard.learners.values()):
            if learner.replaces is None and learner.link.node not in self._around.map.wanted[shard.number]:
                learner.fail("it is not wanted there any more")

    def _shrink_moved(self, shard: ShardState) -> None:
        """A member that is not wanted leaves when there are enough wanted ones."""
        wanted = self._around.map.wanted[shard.number]
        if shard.number in self.changing or shard.bad or len(shard.members) <= len(wanted):
            return
        link = next(link for link in shard.members if link.node not in wanted)
        self.evict(link, [shard], "it is not wanted there any more", "info")

    def _drop_copies(self) -> None:
        """Copies of shards that are as they are wanted, on nodes that are not: they are let go."""
        around = self._around
        for node, state in self.nodes.items():
            link = around.sequencer.links[node]
            if not link.connected:
                continue
            for number in list(around.copies_of(node)):
                shard = self._shards[number]
                is_settled = shard.serving and number not in self.unsettled and shard.is_whole()
                if is_settled and link not in shard.acked and number not in state.dropping:
                    state.dropping.add(number)
                    around.call(link, (DROP, number), self._dropped(node, number))

    def _dropped(self, node: str, number: int) -> Callable[[Any], None]:
        def done(result: Any) -> None:
            state = self.nodes.get(node)
            if state is not None and result is None:
                state.dropping.discard(number)
                self._around.copies_of(node).pop(number, None)

        return done

    # --- learning -----------------------------------------------------------------------------------

    def _start_learners(self) -> None:
        """Begin with the shards that wait, as far as there are donors for them."""
        gives: dict[Progress, int] = {}
        for learner in self.learners():
            gives[learner.donor] = gives.get(learner.donor, 0) + 1
        misses = 0
        for number in list(self._waiting):
            shard = self._shards[number]
            found = self._candidate(shard) if self._wants_learner(shard) else None
            if found is None:
                del self._waiting[number]  # until the next look at it
                continue
            donor = self._donor(shard, found[0], gives)
            del self._waiting[number]
            if donor is None:
                self._waiting[number] = None  # behind the others: most likely none of them has one either
                misses += 1
                if misses == DONOR_MISSES_MAX:
                    break
                continue
            gives[donor] = gives.get(donor, 0) + 1
            self.learn(shard, found[0], donor, found[1])

    def learn(
        self, shard: ShardState, link: Progress, donor: Progress, replaces: str | None, seq_min: int = 0
    ) -> Learner:
        """Begin to bring a copy up to date."""
        learner = Learner(shard, link, donor, self._around, replaces, seq_min)
        shard.learners[link] = learner
        self._learning[shard.number] = None
        self.unsettled.add(shard.number)
        learner.start(self._around.copies_of(link.node).get(shard.number))
        self._around.event("info", "learner-begins", shard=shard.number, node=link.node, donor=donor.node)
        return learner

    def _candidate(self, shard: ShardState) -> tuple[Progress, str | None] | None:
        """Who shall learn the shard next, and whose place it takes."""
        around = self._around
        links: dict[str, Progress] = around.sequencer.links
        for link in shard.bad:  # those that could leave have left, or are about to
            if link.node in around.map.destroyed:
                return self._substitute(shard, link)
            if self._can_learn(link):
                return link, link.node
        if shard.bad or not shard.serving:
            return None
        for link in shard.members:
            if link.node in around.map.destroyed and len(shard.members) <= around.map.min_insync:
                return self._substitute(shard, link)
        if len(shard.members) > around.map.factor:
            return None
        for node in around.map.wanted[shard.number]:
            if links[node] not in shard.acked and self._can_learn(links[node]):
                return links[node], None
        return None

    def _substitute(self, shard: ShardState, gone: Progress) -> tuple[Progress, str | None] | None:
        """Another node for a member that was declared destroyed and cannot just leave."""
        around = self._around
        out = {*around.map.draining, *around.map.destroyed}
        wanted = around.map.wanted[shard.number]
        nodes = [*wanted, *(node for node in around.map.nodes if node not in wanted and node not in out)]
        for node in nodes:
            link = around.sequencer.links[node]
            if link not in shard.acked and self._can_learn(link):
                return link, gone.node
        return None

    def _can_learn(self, link: Progress) -> bool:
        state = self.nodes[link.node]
        is_leaving = state.leaves or self._around.is_leaving(link.node)
        return link.connected and not is_leaving and state.learns_after_ms <= self._now_ms

    def _donor(self, shard: ShardState, link: Progress, gives: Mapping[Progress, int]) -> Progress | None:
        """The good member that gives to fewest learners."""
        able = [each for each in shard.good if each.connected and each is not link]
        able = [each for each in able if gives.get(each, 0) < LEARNERS_PER_DONOR_MAX]
        return min(able, key=lambda each: (gives.get(each, 0), each.node), default=None)

    def may_transfer(self, learner: Learner) -> bool:
        """Whole copies leave a donor one after the other."""
        return not any(
            other is not learner and other.donor is learner.donor and other.phase in (FREEZING, PULLING) and other.token
            for other in self.learners()
        )

    def learner_failed(self, learner: Learner, why: str) -> None:
        """Try again after a while."""
        state = self.nodes[learner.link.node]
        if state.learns_after_ms <= self._now_ms:  # else another one failed just now: of a node they fail together
            state.failures += 1
            wait_ms = min(BACKOFF_MIN_MS << min(state.failures, 10), BACKOFF_MAX_MS)
            state.learns_after_ms = self._now_ms + wait_ms
        wait_ms = state.learns_after_ms - self._now_ms
        number, node = learner.shard.number, learner.link.node
        self._around.event("warning", "learner-failed", shard=number, node=node, reason=why, again_in_ms=wait_ms)
        self._around.sequencer.detach(learner.shard, learner.link)

    def learner_is_live(self, learner: Learner) -> None:
        """R2: if it acknowledged everything committed, it joins in this step, and then the map is changed; one that
        takes the place of another joins when the map says so (R9)."""
        shard = learner.shard
        number = shard.number
        if learner.proposed or number in self.changing or learner.acked < shard.commit:
            return
        learner.proposed = True
        link, node, disk, replaces = learner.link, learner.link.node, learner.disk, learner.replaces
        self.nodes[node].failures = 0
        self.changing.add(number)
        is_first = self._around.map.wanted[number][0] == node  # so that answering is spread as it was planned
        if replaces is None:
            self._around.sequencer.join(shard, link, is_first)

        def stored() -> None:
            self.changing.discard(number)
            self.joins += 1
            if replaces is not None:
                self._around.sequencer.swap(shard, self._around.sequencer.links[replaces], link)
            self._around.event("info", "joined-in-sync", node=node, shard=number, seq=learner.acked)
            if not shard.serving:
                self._around.replaced(number, node, disk)
            self.work_on([number])

        if replaces is None:
            def joined(old: ClusterMap) -> ClusterMap:
                new = old.with_member(number, node, disk)
                return new.first_answers(number, node) if is_first else new

            self._around.propose_rows([number], joined, stored)
        else:
            self._around.propose_rows([number], lambda old: old.replaced(number, replaces, node, disk), stored)


def _is_unsettled(shard: ShardState, wanted: Collection[str]) -> bool:
    """Whether there may be something to do for the shard."""
    return bool(shard.bad or shard.learners) or {link.node for link in shard.members} != set(wanted)


def _leaves_a_good_one(shard: ShardState, link: Progress) -> bool:
    """Whether a member known to be good, that is good and linked, is there without this one."""
    return any(other is not link and other.connected for other in shard.good)
