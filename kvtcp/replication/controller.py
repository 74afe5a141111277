"""The controller: the whole core of a coordinator, put together.

Pure. Reports, frames, ticks and outcomes of the config store in; frames, connections to close, changes of the map and
lines for the log out. The coordinator's server is the shell around it, and simulations run the same class.

    Sequencer    the path of requests: numbers, batches, commits, answers
    Recovery     shards that are not served yet: members made equal at the beginning of an epoch
    Membership   shards that are: who leaves the in-sync set, who learns, who joins
    MapChanges   the map, one change in flight at a time

Every public method is one synchronous step. After any of them the shell takes `take_actions`, `take_events`, what the
map changes want to send, and the batches of the sequencer.

Invariants: a frame is only sent to a node that reported in this epoch; `reports` has exactly the nodes whose links are
up.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from kvtcp.constants import AUDIT_INTERVAL_MS, EVICT_AFTER_MS, NODES_MAX
from kvtcp.errors import AdminError
from kvtcp.protocol.link import ENTRIES, LEARN_FAILED, LEARNED, LEAVE, SHIPPED, CopyReport, Report
from kvtcp.protocol.operations import AUDIT
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.learner import Learner
from kvtcp.replication.map_changes import MapChanges
from kvtcp.replication.membership import Membership, NodeState
from kvtcp.replication.placement import plan
from kvtcp.replication.progress import Progress
from kvtcp.replication.recovery import DOWN, Recovery, StaleStore
from kvtcp.replication.sequencer import Sequencer
from kvtcp.replication.shard_state import LINK_LOST, ShardState

Edit = Callable[[ClusterMap], ClusterMap]
Action = tuple[Any, ...]  # ("send", node, frame) or ("close", node, reason)
Event = tuple[str, str, dict[str, Any]]  # level, word, fields

FRAME_KINDS: Final = frozenset((ENTRIES, SHIPPED, LEARNED, LEARN_FAILED, LEAVE))


class Controller:
    """One coordinator's core. `map_version_before` and `stamp_before_ms` are what the config store held before this
    coordinator owned the map (0 = nothing)."""

    def __init__(
        self,
        changes: MapChanges,
        *,
        durability: str,
        map_version_before: int,
        stamp_before_ms: int,
        sequencer: type[Sequencer] = Sequencer,
        new_token: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self.changes = changes
        changes.on_change = self.map_changed
        self.durability = durability
        self.now_ms = 0
        self.reports: dict[str, Report] = {}
        self.sequencer = sequencer(self.map)
        self.sequencer.stamp_ms = stamp_before_ms
        self.membership = Membership(self)
        self.recovery = Recovery(self, range(self.map.shards))
        self.new_token = new_token
        self.is_ready = False  # every shard was served, or found to be down, once
        self.emptied: list[int] = []  # shards of a run in memory whose data is gone
        self._map_version_before = map_version_before
        self._hellos: dict[str, tuple[int, int]] = {}  # node -> number of its last HELLO, map version told with it
        self._heard: dict[str, int] = {}  # node -> version of the map that it is known to have stored
        self._leaving: set[str] = set()  # destroyed nodes that are about to be removed from the map
        self._actions: list[Action] = []
        self._events: list[Event] = []
        self._tick_ms: int | None = None  # when the last tick was
        self._audit_ms = 0
        self._losses: dict[int, Learner] = {}  # shards whose loss was accepted, until they are judged again

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
        if node not in self.map.nodes:
            self._actions.append(("close", node, "it was removed from the cluster"))
            return
        self.reports[node] = report
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
        if self.reports.pop(node, None) is None:
            link = self.sequencer.links.get(node)
            if link is not None:
                link.reason = reason
            return
        self.event("warning", "link-down", node=node, reason=reason)
        self.membership.node_down(node)
        for number in list(self.membership.repairing):
            self._stop_repair_if_lost(number, node)
        self.sequencer.link_down(node, reason)
        self.recovery.on_lost(node)
        self._losses = {n: loss for n, loss in self._losses.items() if loss.link.node != node}

    def on_results(self, node: str, applied: int, durable: int, results: list[Any], flags: Sequence[int]) -> None:
        """A RESULTS frame. Raises LinkError if it cannot be true."""
        self.sequencer.on_results(node, applied, durable, results, flags)

    def on_frame(self, node: str, message: Sequence[Any]) -> None:
        """One of FRAME_KINDS, with fields of the right types. Raises LinkError if it cannot be true."""
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
        self.membership.work()

    def tick(self) -> None:
        """Time passed; about every TICK_MS."""
        stalled = self._tick_ms is not None and self.now_ms - self._tick_ms >= EVICT_AFTER_MS // 4
        self._tick_ms = self.now_ms
        self.sequencer.tick()
        self.recovery.tick()
        self.membership.tick(stalled)
        self._look_whether_ready()
        if self.now_ms - self._audit_ms >= AUDIT_INTERVAL_MS:
            self._audit_ms = self.now_ms
            self.audit()
        self._remove_destroyed()

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

    def propose_rows(self, numbers: Iterable[int], edit: Edit, done: Callable[[], None]) -> None:
        """Change these rows of the map."""
        self.changes.propose(self._with_heard(edit), lambda _: done())

    def propose(self, edit: Edit, done: Callable[[ClusterMap], None] = lambda _: None) -> None:
        """Change something else in the map."""
        self.changes.propose(self._with_heard(edit), done)

    def _with_heard(self, edit: Edit) -> Edit:
        """With every change of the map goes which version each node is known to have stored."""
        heard = {node: self._heard[node] for node in self.reports}
        return lambda old: edit(old).with_heard(heard)

    def map_changed(self, cluster_map: ClusterMap) -> None:
        """The config store holds this map."""
        self.sequencer.map_changed(cluster_map)

    def may_transfer(self, learner: Learner) -> bool:
        """See Membership."""
        return self.membership.may_transfer(learner)

    def learner_failed(self, learner: Learner, why: str) -> None:
        """See Membership."""
        loss = self._losses.pop(learner.shard.number, None)
        self.membership.learner_failed(learner, why)
        if loss is not None:
            self.event("error", "loss-not-accepted", shard=learner.shard.number, reason=why)

    def learner_is_live(self, learner: Learner) -> None:
        """See Membership."""
        self.membership.learner_is_live(learner)

    # --- for the recovery ---------------------------------------------------------------------------

    def recovered(self, number: int, seq: int, chain: int) -> None:
        """All members of the shard are equal."""
        self.sequencer.set_members(number, self.map.nodes_of(number))
        self.sequencer.serve(number, seq, chain)
        for link in self.sequencer.shards[number].members:
            if not link.connected and self.membership.nodes[link.node].lost_ms is None:
                self.membership.nodes[link.node].lost_ms = self.now_ms

    def repair(self, number: int, seq: int, bad: Mapping[str, str]) -> None:
        """Replace these members; the others are equal, up to `seq`."""
        sequencer = self.sequencer
        shard = sequencer.shards[number]
        shard.last_seq = shard.commit = seq
        sequencer.set_members(number, self.map.nodes_of(number))
        for link in shard.members:
            shard.acked[link] = seq
            shard.mark(link, bad.get(link.node, ""))
        shard.reason = "; ".join(f"{node} {why}" for node, why in bad.items()) + ": it is being replaced"
        self.membership.repairing.add(number)
        self.membership.work()

    def is_down(self, number: int, why: str) -> None:
        """The shard cannot be served now."""
        shard = self.sequencer.shards[number]
        self.sequencer.set_members(number, self.map.nodes_of(number))
        if shard.reason != why:
            shard.reason = why
            self.event("error", "shard-down", shard=number, reason=why)

    def began_empty(self, number: int) -> None:
        """The data of a run in memory is gone."""
        self.emptied.append(number)
        self.event("warning", "began-empty", shard=number, reason="the last run kept its data in memory")

    def _stop_repair_if_lost(self, number: int, node: str) -> None:
        """A member of a shard under repair, or who was to replace one, is gone."""
        shard = self.sequencer.shards[number]
        if not any(link.node == node for link in shard.members) or self.repair_in_flight(number):
            return  # if it is in flight, the recovery starts over when that is stored
        self.membership.repairing.discard(number)
        for learner in list(shard.learners.values()):
            learner.give_up()
            self.sequencer.detach(shard, learner.link)

    def repair_in_flight(self, number: int) -> bool:
        """Whether the map is being changed for a member that was replaced."""
        return any(learner.proposed for learner in self.sequencer.shards[number].learners.values())

    def replaced(self, number: int) -> None:
        """Membership: a member of a shard that is not served was replaced in the map."""
        shard = self.sequencer.shards[number]
        whole = all(node in self.reports for node in self.map.nodes_of(number))
        if number in self.membership.repairing and whole and not shard.bad:
            self.membership.repairing.discard(number)
            self.recovery.repaired(number)
        elif number not in self.membership.repairing or not whole:
            self.membership.repairing.discard(number)
            self.recovery.begin(number)
        if self._losses.pop(number, None) is not None:
            self.event("warning", "loss-accepted", shard=number)

    # --- audit --------------------------------------------------------------------------------------

    def audit(self) -> None:
        """I6: ask all members in one step for the chains of their shards. Links are in order, so they all answer for
        the same moment."""
        asked: dict[int, list[Progress]] = {}
        for shard in self.sequencer.shards:
            good = [link for link in shard.good if link.connected and not link.full]
            if shard.serving and len(good) > 1:
                asked[shard.number] = good
        answers: dict[int, dict[str, Any]] = {}
        by_link: dict[Progress, list[int]] = {}
        for number, links in asked.items():
            for link in links:
                by_link.setdefault(link, []).append(number)
        for link, numbers in by_link.items():
            self.call(link, (AUDIT, numbers), self._auditor(link, numbers, answers, asked))

    def _auditor(
        self, link: Progress, numbers: list[int], answers: dict[int, dict[str, Any]], asked: dict[int, list[Progress]]
    ) -> Callable[[Any], None]:
        def take(result: Any) -> None:
            if result is LINK_LOST:
                return
            for number, position in zip(numbers, result, strict=True):
                found = answers.setdefault(number, {})
                found[link.node] = None if position is None else tuple(position)
                if len(found) == len(asked[number]):
                    self._compare(number, found)

        return take

    def _compare(self, number: int, positions: Mapping[str, Any]) -> None:
        shard = self.sequencer.shards[number]
        if len(set(positions.values())) == 1 or not shard.serving:
            return
        told = ", ".join(f"{node} {position}" for node, position in sorted(positions.items()))
        why = f"its members differ (number, chain): {told}"
        self.alarm(f"shard {number} was stopped: {why}")
        self.sequencer.stop_serving(number, why)

    # --- administration -----------------------------------------------------------------------------

    def usable_nodes(self) -> list[str]:
        """The nodes that may hold shards."""
        out = {*self.map.draining, *self.map.destroyed}
        return [node for node in self.map.nodes if node not in out]

    def add_node(self, host: str, port: int, done: Callable[[dict[str, Any]], None]) -> None:
        """A node more. It holds nothing before the next rebalance, unless shards have too few copies as it is."""
        if (host, port) in self.map.nodes.values():
            node = next(node for node, address in self.map.nodes.items() if address == (host, port))
            raise AdminError(f"{host}:{port} is the address of node {node} already")
        if len(self.map.nodes) >= NODES_MAX:
            raise AdminError(f"a cluster has at most {NODES_MAX} nodes")
        added: list[str] = []

        def edit(old: ClusterMap) -> ClusterMap:
            new, node = old.with_node(host, port)
            added.append(node)
            if any(len(row) < new.factor for row in new.wanted):
                out = {*new.draining, *new.destroyed}
                new = new.with_wanted(plan(new.wanted, [each for each in new.nodes if each not in out], new.factor))
            return new

        def stored(_: ClusterMap) -> None:
            node = added[-1]
            self.sequencer.add_link(node)
            self.membership.nodes[node] = NodeState()
            self._actions.append(("add", node))
            self.event("info", "node-added", node=node, address=f"{host}:{port}")
            done({"node": node})

        self.propose(edit, stored)

    def drain(self, node: str, done: Callable[[dict[str, Any]], None]) -> None:
        """Move everything off a node."""
        self._check_node(node)
        usable = [each for each in self.usable_nodes() if each != node]
        if len(usable) < self.map.factor:
            raise AdminError(
                f"without {node} there are {len(usable)} nodes for a replication factor of {self.map.factor}; "
                "add a node first"
            )
        shards = len(self.map.shards_of(node))

        def edit(old: ClusterMap) -> ClusterMap:
            return old.with_draining(node, True).with_wanted(plan(old.wanted, usable, old.factor))

        self.propose(edit, lambda _: done({"node": node, "shards": shards}))

    def remove(self, node: str, done: Callable[[dict[str, Any]], None]) -> None:
        """A node that holds nothing leaves the cluster."""
        self._check_node(node)
        held = len(self.map.shards_of(node)) or len(self.copies_of(node))
        if held or any(node in row for row in self.map.wanted):
            raise AdminError(f"{node} holds {held} shards; drain it first, and wait until it holds none")

        def stored(_: ClusterMap) -> None:
            self._forget_node(node)
            done({"node": node})

        self.propose(lambda old: old.without_node(node), stored)

    def _forget_node(self, node: str) -> None:
        if node in self.reports:
            self.node_down(node, "it was removed from the cluster")
        self.membership.nodes.pop(node)
        self.sequencer.remove_link(node)
        self._actions.append(("remove", node))
        self.event("info", "node-removed", node=node)

    def forget(self, node: str, done: Callable[[dict[str, Any]], None]) -> None:
        """An operator declares that a node, and what it had, is destroyed (R9)."""
        self._check_node(node)
        if node in self.reports:
            raise AdminError(f"{node} is linked: a node that answers is not destroyed; drain it instead")
        usable = [each for each in self.usable_nodes() if each != node]
        if len(usable) < self.map.min_insync:
            raise AdminError(
                f"without {node} there are {len(usable)} nodes, and every shard needs {self.map.min_insync}; "
                "add a node first"
            )
        shards = len(self.map.shards_of(node))

        def edit(old: ClusterMap) -> ClusterMap:
            return old.with_destroyed(node).with_wanted(plan(old.wanted, usable, old.factor))

        def stored(_: ClusterMap) -> None:
            self.event("warning", "node-destroyed", node=node, shards=shards)
            for number, shard in list(self.recovery.shards.items()):
                if shard.state == DOWN:
                    self.recovery.begin(number)
            self.recovery.tick()
            self.membership.work()
            done({"node": node, "shards": shards})

        self.propose(edit, stored)

    def _remove_destroyed(self) -> None:
        """A destroyed node of which nothing is left in the map leaves it."""
        for node in self.map.destroyed:
            if node in self.membership.nodes and node not in self._leaving and not self.map.shards_of(node):
                self._leaving.add(node)
                self.propose(lambda old, node=node: old.without_node(node), lambda _, node=node: self._forget_node(node))  # type: ignore[misc]

    def rebalance(self, dry_run: bool, done: Callable[[dict[str, Any]], None]) -> None:
        """Place the shards evenly, with the fewest moves."""
        cluster_map = self.map
        rows = plan(cluster_map.wanted, self.usable_nodes(), cluster_map.factor)
        moves = []
        for number, (old, new) in enumerate(zip(cluster_map.wanted, rows, strict=True)):
            leave = [node for node in old if node not in new]
            come = [node for node in new if node not in old]
            for at, node in enumerate(come):
                moves.append([number, leave[at] if at < len(leave) else None, node])
        answer = {"moves": moves, "left": len(self.membership.unsettled)}
        if dry_run or not moves:
            done(answer)
        else:
            self.propose(lambda old: old.with_wanted(rows), lambda _: done(answer))

    def accept_loss(self, number: int, done: Callable[[dict[str, Any]], None]) -> None:
        """A shard without a good member goes on with the best copy there is (R9); numbers begin above all others."""
        if not 0 <= number < self.map.shards:
            raise AdminError(f"there is no shard {number}; the last one is {self.map.shards - 1}")
        found = self.recovery.shards.get(number)
        if found is None or found.state != DOWN:
            raise AdminError(f"shard {number} is not down: nothing is lost")
        if found.good:
            raise AdminError(
                f"shard {number} has a good copy on {', '.join(found.good)}: {self.sequencer.shards[number].reason}; "
                "if a node will never come back, say so with: node forget ID destroyed"
            )
        if number in self._losses:
            raise AdminError(f"the loss of shard {number} is being accepted already")
        copies = {
            node: report.copies[number]
            for node, report in self.reports.items()
            if number in report.copies and report.copies[number].complete
        }
        if not copies:
            raise AdminError(f"no linked node has a complete copy of shard {number}; start its nodes first")
        row = self.map.nodes_of(number)
        node = max(copies, key=lambda each: (copies[each].epoch, copies[each].seq, each in row))
        replaces = node if node in row else next((each for each in row if each not in self.reports), row[0])
        link = self.sequencer.links[node]
        highest = max(copy.seq for report in self.reports.values() for n, copy in report.copies.items() if n == number)
        # no shard takes a thousand writes in every millisecond since 1970
        seq_min = max(self.map.stamp_bound_ms * 1_000, highest + 1)
        self._losses[number] = self.membership.learn(
            self.sequencer.shards[number], link, link, replaces, seq_min
        )
        done({"shard": number, "node": node, "seq": copies[node].seq, "goes_on_at": seq_min})

    def _check_node(self, node: str) -> None:
        if node not in self.map.nodes:
            raise AdminError(f"there is no node {node}; the nodes are {', '.join(self.map.nodes)}")

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        self.sequencer.check()
        for shard in self.sequencer.shards:
            if shard.serving:
                assert len(shard.members) >= self.map.min_insync, "R4: an in-sync set is never smaller than min_insync"
                assert shard.number not in self.recovery.shards, "a shard is served or recovers"
                stored = set(self.map.nodes_of(shard.number))
                assert stored <= {link.node for link in shard.members}, "E has every stored member"
        assert self.reports.keys() == {n for n, link in self.sequencer.links.items() if link.connected}, "links are known"
