"""The controller: the whole core of a coordinator, put together.

Pure. Reports, frames, ticks and outcomes of the config store in; frames, connections to close, changes of the map and
lines for the log out. The coordinator's server is the shell around it, and simulations run the same class.

    Sequencer    the path of requests: numbers, batches, commits, answers
    Ownership    what follows from owning the map: opening, the bound of stamps, the end
    Recovery     shards that are not served yet: members made equal at the beginning of an epoch
    Membership   shards that are served: which members leave, which nodes learn and join
    Audit        members compared with each other, now and then
    Admin        requests of an operator: nodes that come and go, placement, accepted losses
    Proposals    changes of the map by all of these, one in flight at a time
    Outbox       actions and log lines for the shell

One door: events go in by `hello`, `node_up`, `receive`, `refused`, `node_down` and `tick`, in turns that `begin` opens;
requests go to the sequencer. Decisions go out by `act`, after any step, and by `end_turn`, to a CoordinatorProcess,
which performs them:

    lines of the log, then frames, links and nodes in the order of the decisions, then changes of the map, then batches

So a frame never follows an item of a later decision. After the coordinator was deposed nothing goes in or out (R13).

Membership and Recovery hand shards to each other: Recovery calls Membership, which calls back through its `on_` slots.

Invariant: `reports` has exactly the nodes whose links are up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from kvtcp.cluster.changes import MapChanges
from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import AUDIT_INTERVAL_MS, EVICT_AFTER_MS
from kvtcp.protocol.link import (
    BATCH,
    ENTRIES,
    HELLO,
    LEARNED,
    LEAVE,
    LINK_VERSION,
    RESULTS,
    SHIPPED,
    SPACE,
    CopyReport,
    Report,
    is_core_frame,
)
from kvtcp.replication.membership.admin import Admin
from kvtcp.replication.membership.audit import Audit
from kvtcp.replication.membership.insync import Membership, NodeState
from kvtcp.replication.membership.recovery import Recovery, StaleStore
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.ownership import Ownership
from kvtcp.replication.proposals import Proposals
from kvtcp.replication.sequencing.link import Link, LinkError
from kvtcp.replication.sequencing.sequencer import Sequencer

_RESULTS_TYPES: Final = (int, int, int, list, list)


class CoordinatorProcess(Protocol):
    """The process of a controller."""

    def event(self, level: str, word: str, **fields: Any) -> None:
        """Log a line: "info", "warning" or "error"."""

    def send(self, node: str, frame: tuple[Any, ...]) -> None:
        """Send a frame to a node, if it is linked."""

    def close_link(self, node: str, reason: str) -> None:
        """Close the connection to a node; it is dialled again."""

    def add_node(self, node: str) -> None:
        """Dial a node that came."""

    def remove_node(self, node: str) -> None:
        """Stop a node that left the cluster, and dial it no more."""

    def open(self) -> None:
        """Let clients in."""

    def store_map(self) -> None:
        """Send the next change of the map to the config store."""

    def write_batches(self, links: list[Link]) -> None:
        """Write the batches of these links, then the answers to clients."""


class Controller:
    """One coordinator's core. `map_version_before` and `stamp_before_ms` are from the map before this coordinator owned
    it (0 = there was none). `new_token` makes unguessable names."""

    def __init__(
        self, changes: MapChanges, *, durability: str, map_version_before: int, stamp_before_ms: int,
        new_token: Callable[[], bytes], sequencer: type[Sequencer] = Sequencer,
    ) -> None:  # fmt: skip
        self.changes = changes
        changes.on_change.append(self.map_changed)
        self.durability = durability
        self.reports: dict[str, Report] = {}
        self.sequencer = sequencer(self.map)
        self.outbox = outbox = Outbox(self.reports)
        self.proposals = Proposals(changes, self.reports)
        self.ownership = Ownership(
            changes, self.proposals, self.sequencer, outbox, self.reports,
            durability=durability, stamp_before_ms=stamp_before_ms,
        )  # fmt: skip
        parts = self.sequencer, self.proposals, outbox, self.reports
        self.membership = Membership(*parts, new_token)
        self.recovery = Recovery(*parts, self.membership)
        self.membership.on_replaced = self.recovery.replaced
        self.membership.on_hand_back = self.recovery.take_back
        self.membership.on_learner_failed = self.recovery.learner_failed
        self.audit = Audit(self.sequencer, self.membership, outbox)
        self.admin = Admin(*parts, self.membership, self.recovery, self.node_down)
        self._map_version_before = map_version_before
        self._hellos: dict[str, tuple[int, int]] = {}  # node -> number of its last HELLO, and its map version
        self._wall_ms = 0  # of this turn
        self._tick_ms: int | None = None  # time of the last tick
        self._audit_ms = 0

    @property
    def map(self) -> ClusterMap:
        """The cluster map in the config store."""
        return self.changes.map

    # --- turns --------------------------------------------------------------------------------------

    def begin(self, wall_ms: int, now_ms: int) -> None:
        """Begin a turn: all items queued in it have one stamp."""
        self._wall_ms = wall_ms
        self.sequencer.begin(wall_ms, now_ms)

    def act(self, process: CoordinatorProcess) -> None:
        """Let out the decisions of the last steps, except batches, which are closed when the turn ends."""
        if self.ownership.deposed:
            return
        outbox = self.outbox
        for level, word, fields in outbox.take_events():
            process.event(level, word, **fields)
        for kind, node, *rest in outbox.take_actions():
            if kind == "send":
                process.send(node, rest[0])
            elif kind == "close":
                process.close_link(node, rest[0])
            elif kind == "add":
                process.add_node(node)
            elif kind == "remove":
                process.remove_node(node)
            else:
                process.open()
        process.store_map()

    def end_turn(self, process: CoordinatorProcess) -> None:
        """Let out everything."""
        if self.ownership.deposed:
            return
        if self.outbox.actions or self.outbox.events or self.changes.is_busy:
            self.act(process)
        process.write_batches(self.sequencer.close_batches())

    def tick(self) -> None:
        """Do the periodic work, about every TICK_MS."""
        if self.ownership.deposed:
            return
        stalled = self._tick_ms is not None and self.sequencer.now_ms - self._tick_ms >= EVICT_AFTER_MS // 4
        self._tick_ms = self.sequencer.now_ms
        self.sequencer.tick()
        self.recovery.tick()
        for node, removed in self.recovery.take_removed().items():
            self.membership.left(node, removed[0][0], len(removed), removed[0][1])
        self.membership.tick(stalled)
        self._open_when_settled()
        if self.sequencer.now_ms - self._audit_ms >= AUDIT_INTERVAL_MS:
            self._audit_ms = self.sequencer.now_ms
            self.audit.begin()
        self.admin.tick()
        self.ownership.tick(self._wall_ms)

    def _open_when_settled(self) -> None:
        if self.recovery.is_settled:  # every shard was served, or found to be down, once
            self.ownership.open()

    def batch_frames(self, link: Link) -> Iterator[tuple[Any, ...]]:
        """The outgoing batches of a link as frames; a batch counts as written when it is taken."""
        sequencer = self.sequencer
        committed = sequencer.committed_ordinal(link)
        while (batch := link.next_outgoing(sequencer.now_ms)) is not None:
            yield (BATCH, batch.stamp_ms, committed, batch.items)

    def heartbeat(self, link: Link) -> tuple[Any, ...]:
        """An empty batch: the node searches for expired keys, and has to answer."""
        return (BATCH, self.sequencer.stamp_ms, self.sequencer.committed_ordinal(link), [])

    # --- links --------------------------------------------------------------------------------------

    def hello(self, node: str, secret: str) -> tuple[int, dict[str, Any]]:
        """The HELLO for a new connection to this node, numbered one above the last one."""
        cluster_map = self.map
        number = self._hellos.get(node, (0, 0))[0] + 1
        self._hellos[node] = (number, cluster_map.version)
        return (HELLO, {
            "version": LINK_VERSION, "secret": secret, "durability": self.durability, "cluster": cluster_map.cluster,
            "epoch": cluster_map.epoch, "coordinator": cluster_map.owner, "link": number, "node": node,
            "map_version": cluster_map.version, "heard_version": cluster_map.heard.get(node, 0),
            "map": cluster_map.to_json(), "shards": cluster_map.shards_of(node),
        })  # fmt: skip

    def mismatch(self, report: Report) -> str:
        """Why a node that answered HELLO cannot be used; empty if it can."""
        ours, theirs = self.durability, report.durability
        other = f"it was started with --durability {theirs}, the coordinator with --durability {ours}"
        return other if theirs != ours else ""

    def node_up(self, node: str, report: Report) -> None:
        """Take a node's answer to HELLO. Raises StaleStore, with nothing changed, if it has seen a newer map."""
        if self.ownership.deposed:
            return
        number, version = self._hellos[node]
        version_max = self._map_version_before if number == 1 else self.map.version
        if report.map_version > version_max:
            seen = f"node {node} has seen version {report.map_version} of the cluster map"
            raise StaleStore(f"{seen}, the config store has version {version_max}")
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
        self._open_when_settled()

    def node_down(self, node: str, reason: str) -> None:
        """Take the loss of a link, or a failure to make one."""
        if self.ownership.deposed:
            return
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

    def refused(self, node: str, code: bytes, text: str) -> None:
        """Take a node's refusal of HELLO."""
        if code == b"FENCED":
            self.ownership.refused(node, text)

    def receive(self, node: str, message: list[Any]) -> bool:
        """Take a frame of a node that reported; false if it is of another kind. Raises LinkError, with nothing changed,
        if it cannot be true; the link is to be closed then."""
        if self.ownership.deposed:
            return True
        kind = message[0]
        if kind == RESULTS and tuple(map(type, message)) == _RESULTS_TYPES:
            self.sequencer.on_results(node, message[1], message[2], message[3], message[4])
        elif kind == SPACE and len(message) == 2 and message[1] in (0, 1, 2):
            self.sequencer.on_space(node, message[1])
        elif is_core_frame(message):
            self._on_frame(node, message)
        else:
            return False
        return True

    def _on_frame(self, node: str, message: Sequence[Any]) -> None:
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
            _, _, replica_id, generation, epoch, seq, chain = message
            self.reports[node].copies[number] = CopyReport(replica_id.decode(), generation, True, epoch, seq, chain)
            for learner in self.membership.learners_of(number):
                learner.on_learned(node, replica_id, seq)
        else:
            for learner in self.membership.learners_of(number):
                learner.on_failed(node, message[2].decode("utf-8", "replace"))
        self.membership.work_on([number])

    def map_changed(self, cluster_map: ClusterMap) -> None:
        """Take a map that was stored, before the `done` of any of its proposals: all of them find its new nodes."""
        self.sequencer.map_changed(cluster_map)
        for node in cluster_map.nodes:
            if node not in self.sequencer.links:
                self.sequencer.add_link(node)
                self.membership.nodes[node] = NodeState()
        self.membership.check_all()

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
        assert self.reports.keys() == linked, "there are reports of the nodes that are linked"
