"""The controller: the whole core of a coordinator, put together.

Pure. Reports, frames, ticks and outcomes of the config store in; frames, connections to close, changes of the map and
lines for the log out. The coordinator's server is the shell around it, and simulations run the same class.

    Sequencer    the path of requests: numbers, batches, commits, answers
    Recovery     shards that are not served yet: members made equal at the beginning of an epoch
    Membership   shards that are: who leaves the in-sync set, who learns, who joins
    Audit        members compared with each other, now and then
    Admin        what an operator asks for: nodes that come and go, placement, accepted losses
    Proposals    changes of the map by all of these, one in flight at a time
    Outbox       what the shell is to do and to log

Every public method is one synchronous step. After any of them the shell takes `take_actions`, `take_events`, what the
map changes want to send, and the batches of the sequencer.

Membership and Recovery hand shards to each other: the recovery knows Membership, which calls it back by what the
controller puts in its `on_` slots.

Invariant: `reports` has exactly the nodes whose links are up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from kvtcp.cluster.changes import MapChanges
from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import AUDIT_INTERVAL_MS, EVICT_AFTER_MS
from kvtcp.protocol.link import ENTRIES, LEARN_FAILED, LEARNED, LEAVE, SHIPPED, CopyReport, Report
from kvtcp.replication.membership.admin import Admin
from kvtcp.replication.membership.audit import Audit
from kvtcp.replication.membership.insync import Membership, NodeState
from kvtcp.replication.membership.recovery import Recovery, StaleStore
from kvtcp.replication.outbox import Action, Event, Outbox
from kvtcp.replication.proposals import Proposals
from kvtcp.replication.sequencing.link import LinkError
from kvtcp.replication.sequencing.sequencer import Sequencer

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
        self.reports: dict[str, Report] = {}
        self.sequencer = sequencer(self.map)
        self.sequencer.stamp_ms = stamp_before_ms
        self.outbox = outbox = Outbox(self.reports)
        self.proposals = Proposals(changes, self.reports)
        parts = self.sequencer, self.proposals, outbox, self.reports
        self.membership = Membership(*parts, new_token)
        self.recovery = Recovery(*parts, self.membership)
        self.membership.on_replaced = self.recovery.replaced
        self.membership.on_hand_back = self.recovery.take_back
        self.membership.on_learner_failed = self.recovery.learner_failed
        self.audit = Audit(self.sequencer, self.membership, outbox)
        self.admin = Admin(*parts, self.membership, self.recovery, self.node_down)
        self.is_ready = False  # every shard was served, or found to be down, once
        self._map_version_before = map_version_before
        self._hellos: dict[str, tuple[int, int]] = {}  # node -> number of its last HELLO, map version told with it
        self._tick_ms: int | None = None  # when the last tick was
        self._audit_ms = 0

    @property
    def map(self) -> ClusterMap:
        """The cluster map as the config store holds it."""
        return self.changes.map

    @property
    def is_talkative(self) -> bool:
        """Whether there may be something for the shell to do."""
        return bool(self.outbox.actions or self.outbox.events or self.changes.is_busy)

    def begin(self, wall_ms: int, now_ms: int) -> None:
        """A tick of the shell begins."""
        self.sequencer.begin(wall_ms, now_ms)

    def take_actions(self) -> list[Action]:
        """What is to be done, in order."""
        actions, self.outbox.actions = self.outbox.actions, []
        return actions

    def take_events(self) -> list[Event]:
        """What is to be logged, in order."""
        events, self.outbox.events = self.outbox.events, []
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
            self.outbox.close_link(node, why)
            return
        self.reports[node] = report
        self.proposals.node_stored(node, version)
        self.membership.node_up(node)
        bad = self.sequencer.link_up(node, report.copies, report.space)
        self.outbox.event("info", "link-up", node=node)
        if bad:
            number, why = next(iter(bad.items()))
            self.outbox.event("error", "node-not-a-member", node=node, shards=len(bad), first=number, reason=why)
        self.recovery.on_report(node)
        self.membership.work()
        self._look_whether_ready()

    def node_down(self, node: str, reason: str) -> None:
        """The link of a node that had reported is gone, or one could not be made."""
        self.proposals.reports_changed()
        if self.reports.pop(node, None) is None:
            link = self.sequencer.links.get(node)
            if link is not None:
                link.reason = reason
            return
        self.outbox.event("warning", "link-down", node=node, reason=reason)
        self.membership.node_down(node)
        self.sequencer.link_down(node, reason)
        self.recovery.on_lost(node)

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
            self.outbox.event("info", "node-leaves", node=node)
            self.membership.tick(False)
            return
        number = message[1]
        if not 0 <= number < self.map.shards:
            return
        if kind == ENTRIES:
            if number in self.recovery.shards:
                self.recovery.on_entries(node, *message[1:])
            for learner in self.membership.learners_of(number):
                learner.on_entries(node, *message[2:])
        elif kind == SHIPPED:
            _, _, epoch, seq, chain, error = message
            if number in self.recovery.shards:
                self.recovery.on_shipped(node, number, epoch, seq, chain, error)
            for learner in self.membership.learners_of(number):
                learner.on_shipped(node, seq, chain, error)
        elif kind == LEARNED:
            _, _, disk, generation, epoch, seq, chain = message
            self.reports[node].copies[number] = CopyReport(disk.decode(), generation, True, epoch, seq, chain)
            for learner in self.membership.learners_of(number):
                learner.on_learned(node, disk, seq)
        else:
            for learner in self.membership.learners_of(number):
                learner.on_failed(node, message[2].decode("utf-8", "replace"))
        self.membership.work_on([number])

    def tick(self) -> None:
        """Time passed; about every TICK_MS."""
        stalled = self._tick_ms is not None and self.sequencer.now_ms - self._tick_ms >= EVICT_AFTER_MS // 4
        self._tick_ms = self.sequencer.now_ms
        self.sequencer.tick()
        self.recovery.tick()
        for node, removed in self.recovery.take_removed().items():
            self.membership.left(node, removed[0][0], len(removed), removed[0][1])
        self.membership.tick(stalled)
        self._look_whether_ready()
        if self.sequencer.now_ms - self._audit_ms >= AUDIT_INTERVAL_MS:
            self._audit_ms = self.sequencer.now_ms
            self.audit.begin()
        self.admin.tick()

    def _look_whether_ready(self) -> None:
        if not self.is_ready and self.recovery.is_settled:
            self.is_ready = True

    def map_changed(self, cluster_map: ClusterMap) -> None:
        """The config store holds this map. Whoever proposed a part of it is told after that, one after the other: so
        that each finds everything, nodes that came are known from here on."""
        self.sequencer.map_changed(cluster_map)
        for node in cluster_map.nodes:
            if node not in self.sequencer.links:
                self.sequencer.add_link(node)
                self.membership.nodes[node] = NodeState()
        self.membership.look_at_all()

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
