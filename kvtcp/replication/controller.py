"""The controller: the whole core of a coordinator, put together.

Pure. Reports, frames, ticks and outcomes of the config store in; frames, connections to close, changes of the map and
lines for the log out. The coordinator's server is the shell around it, and simulations run the same class.

    Sequencer    the path of requests: numbers, batches, commits, answers
    Recovery     shards that are not served yet: members made equal at the beginning of an epoch
    Membership   shards that are: who leaves the in-sync set, who learns, who joins
    Audit        members compared with each other, now and then
    ClusterAdmin what an operator asks for: nodes that come and go, placement, accepted losses
    MapChanges   the map, one change in flight at a time

Every public method is one synchronous step. After any of them the shell takes `take_actions`, `take_events`, what the
map changes want to send, and the batches of the sequencer.

Invariants: a frame is only sent to a node that reported in this epoch; `reports` has exactly the nodes whose links are
up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from kvtcp.constants import AUDIT_INTERVAL_MS, EVICT_AFTER_MS
from kvtcp.protocol.link import ENTRIES, LEARN_FAILED, LEARNED, LEAVE, SHIPPED, CopyReport, Report
from kvtcp.replication.audit import Audit
from kvtcp.replication.cluster_admin import ClusterAdmin
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.learner import Learner
from kvtcp.replication.map_changes import MapChanges
from kvtcp.replication.membership import Membership, NodeState
from kvtcp.replication.progress import LinkError, Progress
from kvtcp.replication.recovery import Recovery, StaleStore
from kvtcp.replication.sequencer import Sequencer
from kvtcp.replication.shard_state import ShardState

Edit = Callable[[ClusterMap], ClusterMap]
Action = tuple[Any, ...]  # ("send", node, frame) or ("close", node, reason)
Event = tuple[str, str, dict[str, Any]]  # level, word, fields

FRAME_KINDS: Final = frozenset((ENTRIES, SHIPPED, LEARNED, LEARN_FAILED, LEAVE))


class Controller:
    """One coordinator's core. `map_version_before` and `stamp_before_ms` are what the config store held before this
    coordinator owned the map (0 = nothing). `new_token` makes names that nobody can guess."""

    def __init__(
        self,
        changes: MapChanges,
        *,
        durability: str,
        map_version_before: int,
        stamp_before_ms: int,
        new_token: Callable[[], bytes],
        sequencer: type[Sequencer] = Sequencer,
    ) -> None:
        self.changes = changes
        changes.on_change.append(self.map_changed)
        self.durability = durability
        self.now_ms = 0
        self.reports: dict[str, Report] = {}
        self.sequencer = sequencer(self.map)
        self.sequencer.stamp_ms = stamp_before_ms
        self.membership = Membership(self)
        self.recovery = Recovery(self, range(self.map.shards))
        self.audit = Audit(self)
        self.admin = ClusterAdmin(self)
        self.new_token = new_token
        self.is_ready = False  # every shard was served, or found to be down, once
        self.emptied: list[int] = []  # shards of a run in memory whose data is gone
        self._map_version_before = map_version_before
        self._hellos: dict[str, tuple[int, int]] = {}  # node -> number of its last HELLO, map version told with it
        self._own: tuple[ClusterMap | None, set[str]] = (None, set())  # nodes with copies that this map names
        self._heard: dict[str, int] = {}  # node -> version of the map that it is known to have stored
        self._actions: list[Action] = []
        self._events: list[Event] = []
        self._tick_ms: int | None = None  # when the last tick was
        self._audit_ms = 0

    # --- for the shell ------------------------------------------------------------------------------

    @property
    def map(self) -> ClusterMap:
        """The cluster map as the config store holds it."""
        return self.changes.map

    @property
    def is_talkative(self) -> bool:
        """Whether there may be something for the shell to do."""
        return bool(self._actions or self._events or self.changes.is_busy)

    def begin(self, wall_ms: int, now_ms: int) -> None:
        """A tick of the shell begins."""
        self.now_ms = now_ms
        self.sequencer.begin(wall_ms, now_ms)

    def take_actions(self) -> list[Action]:
        """What is to be done, in order."""
        actions, self._actions = self._actions, []
        return actions

    def take_events(self) -> list[Event]:
        """What is to be logged, in order."""
        events, self._events = self._events, []
        return events

    def hello_fields(self, node: str) -> dict[str, Any]:
        """What a HELLO to this node says, but for version, secret and durability."""
        cluster_map = self.map
        number = self._hellos.get(node, (0, 0))[0] + 1
        self._hellos[node] = (number, cluster_map.version)
        return {
            "cluster": cluster_map.cluster,
            "epoch": cluster_map.epoch,
            "coordinator": cluster_map.owner,
            "link": number,
            "node": node,
            "map_version": cluster_map.version,
            "heard_version": cluster_map.heard.get(node, 0),
            "map": cluster_map.to_json(),
            "shards": cluster_map.shards_of(node),
        }

    def node_up(self, node: str, report: Report) -> None:
        """A node answered HELLO. Raises StaleStore if it knows more than the config store; then nothing is changed."""
        number, version = self._hellos[node]
        version_max = self._map_version_before if number == 1 else self.map.version
        if report.map_version > version_max:
            raise StaleStore(
                f"node {node} has seen version {report.map_version} of the cluster map, the config store has "
                f"version {version_max}"
            )
        if node not in self.map.nodes or node in self.map.destroyed:
            why = "it was declared destroyed" if node in self.map.destroyed else "it was removed from the cluster"
            self._actions.append(("close", node, why))
            return
        self.reports[node] = report
        self._own = (None, set())
        self._heard[node] = version
        self.membership.node_up(node)
        bad = self.sequencer.link_up(node, report.copies, report.space)
        self.event("info", "link-up", node=node)
        if bad:
            number, why = next(iter(bad.items()))
            self.event("error", "node-not-a-member", node=node, shards=len(bad), first=number, reason=why)
        self.recovery.on_report(node)
        self.membership.work()
        self._look_whether_ready()

    def node_down(self, node: str, reason: str) -> None:
        """The link of a node that had reported is gone, or one could not be made."""
        self._own = (None, set())
        if self.reports.pop(node, None) is None:
            link = self.sequencer.links.get(node)
            if link is not None:
                link.reason = reason
            return
        self.event("warning", "link-down", node=node, reason=reason)
        self.membership.node_down(node)
        self.sequencer.link_down(node, reason)
        self.recovery.on_lost(node)
        self.admin.node_down(node)

    def on_results(self, node: str, applied: int, durable: int, results: list[Any], flags: Sequence[int]) -> None:
        """A RESULTS frame. Raises LinkError if it cannot be true."""
        self.sequencer.on_results(node, applied, durable, results, flags)

    def on_frame(self, node: str, message: Sequence[Any]) -> None:
        """One of FRAME_KINDS, with fields of the right types. Raises LinkError if it cannot be true."""
        if node not in self.reports:
            raise LinkError(f"{node} is not linked")
        kind = message[0]
        if kind == LEAVE:
            self.membership.nodes[node].leaves = True
            self.event("info", "node-leaves", node=node)
            self.membership.tick(False)
            return
        number = message[1]
        if not 0 <= number < self.map.shards:
            return
        shard = self.sequencer.shards[number]
        if kind == ENTRIES:
            if number in self.recovery.shards:
                self.recovery.on_entries(node, *message[1:])
            for learner in list(shard.learners.values()):
                learner.on_entries(node, *message[2:])
        elif kind == SHIPPED:
            _, _, epoch, seq, chain, error = message
            if number in self.recovery.shards:
                self.recovery.on_shipped(node, number, epoch, seq, chain, error)
            for learner in list(shard.learners.values()):
                learner.on_shipped(node, seq, chain, error)
        elif kind == LEARNED:
            _, _, disk, generation, epoch, seq, chain = message
            self.reports[node].copies[number] = CopyReport(disk.decode(), generation, True, epoch, seq, chain)
            for learner in list(shard.learners.values()):
                learner.on_learned(node, disk, seq)
        else:
            for learner in list(shard.learners.values()):
                learner.on_failed(node, message[2].decode("utf-8", "replace"))
        self.membership.work_on([number])

    def tick(self) -> None:
        """Time passed; about every TICK_MS."""
        stalled = self._tick_ms is not None and self.now_ms - self._tick_ms >= EVICT_AFTER_MS // 4
        self._tick_ms = self.now_ms
        self.sequencer.tick()
        self.recovery.tick()
        for node, removed in self.recovery.take_removed().items():
            self.membership.left(node, removed[0][0], len(removed), removed[0][1])
        self.membership.tick(stalled)
        self._look_whether_ready()
        if self.now_ms - self._audit_ms >= AUDIT_INTERVAL_MS:
            self._audit_ms = self.now_ms
            self.audit.begin()
        self.admin.tick()

    def _look_whether_ready(self) -> None:
        if not self.is_ready and self.recovery.is_settled:
            self.is_ready = True

    # --- for the parts: frames, map, log ------------------------------------------------------------

    def event(self, level: str, word: str, **fields: Any) -> None:
        """A line of the log."""
        self._events.append((level, word, fields))

    def alarm(self, sentence: str) -> None:
        """What should never be seen."""
        self.event("error", "alarm", reason=sentence)

    def send(self, link: Progress, frame: tuple[Any, ...]) -> None:
        """Send a frame to a node that reported."""
        self.send_to(link.node, frame)

    def send_to(self, node: str, frame: tuple[Any, ...]) -> None:
        """Send a frame to a node that reported."""
        assert node in self.reports, "frames go to nodes that reported"
        self._actions.append(("send", node, frame))

    def close_link(self, link: Progress, reason: str) -> None:
        """Close the connection; it is dialled again."""
        self._actions.append(("close", link.node, reason))

    def attach(self, shard: ShardState, link: Progress, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        """See Sequencer.attach."""
        self.sequencer.attach(shard, link, item, then)

    def call(self, link: Progress, item: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        """See Sequencer.call."""
        self.sequencer.call(link, item, then)

    def address_of(self, node: str) -> tuple[str, int]:
        """Where a node listens."""
        return self.map.nodes[node]

    def copies_of(self, node: str) -> dict[int, CopyReport]:
        """The copies of a linked node, as far as is known; none of one that is not."""
        report = self.reports.get(node)
        return {} if report is None else report.copies

    def is_leaving(self, node: str) -> bool:
        """See ClusterAdmin."""
        return node in self.admin.leaving

    def shards_on(self, node: str) -> set[int]:
        """The shards of which the node is a member or a learner, whatever is stored."""
        link = self.sequencer.links.get(node)
        return set() if link is None else {shard.number for shard in link.shards}

    def propose_rows(self, numbers: Iterable[int], edit: Edit, done: Callable[[], None]) -> None:
        """Change these rows of the map."""
        self.changes.propose(self._with_heard(edit), lambda _: done())

    def propose(
        self, edit: Edit, done: Callable[[ClusterMap], None], failed: Callable[[Exception], None] | None = None
    ) -> None:
        """Change something else in the map; see MapChanges.propose."""
        self.changes.propose(self._with_heard(edit), done, failed)

    def _with_heard(self, edit: Edit) -> Edit:
        """With every change of the map goes which version each member is known to have stored.

        A node none of whose copies is the one that the map names has another directory. The one with the members' data
        may still come back, if it was not mounted for example: it is not to be taken for an older copy then.
        """
        if self._own[0] is not self.map:
            self._own = (self.map, {node for node, report in self.reports.items() if self._is_own(node, report)})
        heard = {node: self._heard[node] for node in sorted(self._own[1])}
        return lambda old: edit(old).with_heard(heard)

    def _is_own(self, node: str, report: Report) -> bool:
        """Whether a copy of this node is the one that the map names, or will name after the founding."""
        for number, copy in report.copies.items():
            if number < self.map.shards and dict(self.map.members[number]).get(node) in (copy.disk, ""):
                return True
        return False

    def map_changed(self, cluster_map: ClusterMap) -> None:
        """The config store holds this map. Whoever proposed a part of it is told after that, one after the other: so
        that each finds everything, nodes that came are known from here on."""
        self.sequencer.map_changed(cluster_map)
        for node in cluster_map.nodes:
            if node not in self.sequencer.links:
                self.sequencer.add_link(node)
                self.membership.nodes[node] = NodeState()
        self.membership.look_at_all()

    def may_transfer(self, learner: Learner) -> bool:
        """See Membership."""
        return self.membership.may_transfer(learner)

    def learner_failed(self, learner: Learner, why: str) -> None:
        """See Membership."""
        self.membership.learner_failed(learner, why)
        self.admin.learner_failed(learner, why)

    def learner_is_live(self, learner: Learner) -> None:
        """See Membership."""
        self.membership.learner_is_live(learner)

    def hand_back(self, number: int, why: str) -> None:
        """Membership: no member of a served shard is good."""
        given = self.sequencer.shards[number].last_seq
        self.sequencer.hand_back(number, why)
        self.recovery.take_back(number, given)

    # --- for the recovery ---------------------------------------------------------------------------

    def row_changed(self, number: int) -> None:
        """The recovery changed the row of a shard."""
        nodes = self.map.nodes_of(number)
        if nodes != [link.node for link in self.sequencer.shards[number].members]:
            self.sequencer.set_members(number, nodes)

    def recovered(self, number: int, seq: int, chain: int) -> None:
        """All members of the shard are equal."""
        self.sequencer.serve(number, seq, chain)
        self.membership.unsettled.add(number)

    def repair(self, number: int, seq: int, bad: Mapping[str, str]) -> None:
        """Replace these members; the others are equal, up to `seq`."""
        sequencer = self.sequencer
        shard = sequencer.shards[number]
        shard.last_seq = shard.commit = seq
        for link in shard.members:
            shard.acked[link] = seq
            shard.mark(link, bad.get(link.node, ""))
        shard.reason = "; ".join(f"{node} {why}" for node, why in bad.items()) + ": it is being replaced"
        self.membership.repairing.add(number)
        self.membership.work_on([number])

    def is_down(self, number: int, why: str) -> None:
        """The shard cannot be served now."""
        shard = self.sequencer.shards[number]
        if shard.reason != why:
            shard.reason = why
            self.event("error", "shard-down", shard=number, reason=why)

    def began_empty(self, number: int) -> None:
        """The data of a run in memory is gone."""
        self.emptied.append(number)
        self.event("warning", "began-empty", shard=number, reason="the last run kept its data in memory")

    def begin_empty(self, number: int, given: int) -> None:
        """A shard of a run in memory begins anew while the coordinator runs, with other numbers."""
        self.sequencer.set_members(number, self.map.nodes_of(number))
        self.admin.begin_empty(number, given)

    def add_action(self, *action: Any) -> None:
        """Something else for the shell to do."""
        self._actions.append(action)

    def stop_repair(self, number: int) -> None:
        """Replace none of its members."""
        self.membership.repairing.discard(number)
        for learner in list(self.sequencer.shards[number].learners.values()):
            learner.fail("its shard is recovered anew")

    def repair_in_flight(self, number: int) -> bool:
        """Whether the map is being changed for a member that was replaced."""
        return any(learner.proposed for learner in self.sequencer.shards[number].learners.values())

    def replaced(self, number: int, node: str, disk: str) -> None:
        """Membership: a member of a shard that is not served was replaced in the map, by this copy of the node, which
        may have lost it since that was proposed."""
        copy = self.copies_of(node).get(number)
        if number in self.recovery.shards:
            is_repair = number in self.membership.repairing  # else a loss was accepted
            is_there = copy is not None and copy.disk == disk
            if not is_repair or not is_there or self.recovery.must_restart(number):
                self.membership.repairing.discard(number)
                self.recovery.begin(number)
            elif not self.sequencer.shards[number].bad:
                self.membership.repairing.discard(number)
                self.recovery.repaired(number)
        self.admin.replaced(number)

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        self.sequencer.check()
        for shard in self.sequencer.shards:
            if shard.serving:
                assert len(shard.members) >= self.map.min_insync, "R4: an in-sync set is never smaller than min_insync"
                assert shard.number not in self.recovery.shards, "a shard is served or recovers"
                stored = set(self.map.nodes_of(shard.number))
                assert stored <= {link.node for link in shard.members}, "E has every stored member"
        linked = {node for node, link in self.sequencer.links.items() if link.connected}
        assert self.reports.keys() == linked, "reports are there of the nodes that are linked"
