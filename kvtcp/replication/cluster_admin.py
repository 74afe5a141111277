"""Cluster administration: what an operator asks of the cluster, as changes of its map.

Pure, a part of the controller. Everything is a change of where copies shall be, or of who is a node; Membership then
does the moving. A request is refused with AdminError, one sentence that says why and what to do, and nothing was
changed; or it is answered through `done` when its change is stored.

- add: a node more. It holds nothing before the next rebalance, unless shards have too few copies as it is.
- drain, remove: everything is moved off a node; then it leaves the cluster.
- forget: a node is declared destroyed. What it had counts as fenced for ever (R9).
- rebalance: shards are placed evenly, by the fewest moves.
- accept a loss: a shard without a good copy goes on with the best one there is. Its numbers begin above every number
  that was ever shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvtcp.constants import NODES_MAX
from kvtcp.errors import AdminError
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.learner import Learner
from kvtcp.replication.membership import NodeState
from kvtcp.replication.placement import plan
from kvtcp.replication.recovery import DOWN

if TYPE_CHECKING:
    from kvtcp.replication.controller import Controller

Done = Callable[[dict[str, Any]], None]


class ClusterAdmin:
    """Of one controller."""

    def __init__(self, controller: Controller) -> None:
        self._core = controller
        self._leaving: set[str] = set()  # destroyed nodes that are about to be removed from the map
        self._losses: dict[int, Learner] = {}  # shards whose loss was accepted, until they are judged again

    def tick(self) -> None:
        """A destroyed node of which nothing is left in the map leaves it."""
        for node in self._core.map.destroyed:
            if node in self._core.membership.nodes and node not in self._leaving and not self._core.map.shards_of(node):
                self._remove_destroyed(node)

    def node_down(self, node: str) -> None:
        """A link is gone, and with it the learners on it."""
        self._losses = {n: loss for n, loss in self._losses.items() if loss.link.node != node or loss.proposed}

    def learner_failed(self, learner: Learner, why: str) -> None:
        """A learner is over."""
        if self._losses.pop(learner.shard.number, None) is not None:
            self._core.event("error", "loss-not-accepted", shard=learner.shard.number, reason=why)

    def replaced(self, number: int) -> None:
        """A member of a shard that is not served was replaced in the map."""
        if self._losses.pop(number, None) is not None:
            self._core.event("warning", "loss-accepted", shard=number)

    def usable_nodes(self) -> list[str]:
        """The nodes that may hold shards."""
        out = {*self._core.map.draining, *self._core.map.destroyed}
        return [node for node in self._core.map.nodes if node not in out]

    def add_node(self, host: str, port: int, done: Done) -> None:
        """A node more. It holds nothing before the next rebalance, unless shards have too few copies as it is."""
        if (host, port) in self._core.map.nodes.values():
            node = next(node for node, address in self._core.map.nodes.items() if address == (host, port))
            raise AdminError(f"{host}:{port} is the address of node {node} already")
        if len(self._core.map.nodes) >= NODES_MAX:
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
            self._core.sequencer.add_link(node)
            self._core.membership.nodes[node] = NodeState()
            self._core.add_action("add", node)
            self._core.event("info", "node-added", node=node, address=f"{host}:{port}")
            done({"node": node})

        self._core.propose(edit, stored)

    def drain(self, node: str, done: Done) -> None:
        """Move everything off a node."""
        self._check_node(node)
        usable = [each for each in self.usable_nodes() if each != node]
        if len(usable) < self._core.map.factor:
            raise AdminError(
                f"without {node} there are {len(usable)} nodes for a replication factor of {self._core.map.factor}; "
                "add a node first"
            )
        shards = len(self._core.map.shards_of(node))

        def edit(old: ClusterMap) -> ClusterMap:
            return old.with_draining(node, True).with_wanted(plan(old.wanted, usable, old.factor))

        self._core.propose(edit, lambda _: done({"node": node, "shards": shards}))

    def remove(self, node: str, done: Done) -> None:
        """A node that holds nothing leaves the cluster."""
        self._check_node(node)
        held = len(self._core.map.shards_of(node)) or len(self._core.copies_of(node))
        if held or any(node in row for row in self._core.map.wanted):
            raise AdminError(f"{node} holds {held} shards; drain it first, and wait until it holds none")

        def stored(_: ClusterMap) -> None:
            self._forget_node(node)
            done({"node": node})

        self._core.propose(lambda old: old.without_node(node), stored)

    def _forget_node(self, node: str) -> None:
        if node in self._core.reports:
            self._core.node_down(node, "it was removed from the cluster")
        self._core.membership.nodes.pop(node)
        self._core.sequencer.remove_link(node)
        self._core.add_action("remove", node)
        self._core.event("info", "node-removed", node=node)

    def forget(self, node: str, done: Done) -> None:
        """An operator declares that a node, and what it had, is destroyed (R9)."""
        self._check_node(node)
        if node in self._core.reports:
            raise AdminError(f"{node} is linked: a node that answers is not destroyed; drain it instead")
        usable = [each for each in self.usable_nodes() if each != node]
        if len(usable) < self._core.map.min_insync:
            raise AdminError(
                f"without {node} there are {len(usable)} nodes, and every shard needs {self._core.map.min_insync}; "
                "add a node first"
            )
        shards = len(self._core.map.shards_of(node))

        def edit(old: ClusterMap) -> ClusterMap:
            return old.with_destroyed(node).with_wanted(plan(old.wanted, usable, old.factor))

        def stored(_: ClusterMap) -> None:
            self._core.event("warning", "node-destroyed", node=node, shards=shards)
            for number, shard in list(self._core.recovery.shards.items()):
                if shard.state == DOWN:
                    self._core.recovery.begin(number)
            self._core.recovery.tick()
            self._core.membership.work()
            done({"node": node, "shards": shards})

        self._core.propose(edit, stored)

    def _remove_destroyed(self, node: str) -> None:
        self._leaving.add(node)
        self._core.propose(lambda old: old.without_node(node), lambda _: self._forget_node(node))

    def rebalance(self, dry_run: bool, done: Done) -> None:
        """Place the shards evenly, with the fewest moves."""
        cluster_map = self._core.map
        rows = plan(cluster_map.wanted, self.usable_nodes(), cluster_map.factor)
        moves = []
        for number, (old, new) in enumerate(zip(cluster_map.wanted, rows, strict=True)):
            leave = [node for node in old if node not in new]
            come = [node for node in new if node not in old]
            for at, node in enumerate(come):
                moves.append([number, leave[at] if at < len(leave) else "", node])
        answer = {"moves": moves, "left": len(self._core.membership.unsettled)}
        if dry_run or not moves:
            done(answer)
        else:
            self._core.propose(lambda old: old.with_wanted(rows), lambda _: done(answer))

    def accept_loss(self, number: int, done: Done) -> None:
        """A shard without a good member goes on with the best copy there is (R9); numbers begin above all others."""
        if not 0 <= number < self._core.map.shards:
            raise AdminError(f"there is no shard {number}; the last one is {self._core.map.shards - 1}")
        found = self._core.recovery.shards.get(number)
        if found is None or found.state != DOWN:
            raise AdminError(f"shard {number} is not down: nothing is lost")
        if found.good:
            why = self._core.sequencer.shards[number].reason
            raise AdminError(
                f"shard {number} has a good copy on {', '.join(found.good)}: {why}; "
                "if a node will never come back, say so with: node forget ID destroyed"
            )
        if number in self._losses:
            raise AdminError(f"the loss of shard {number} is being accepted already")
        copies = {
            node: report.copies[number]
            for node, report in self._core.reports.items()
            if number in report.copies and report.copies[number].complete
        }
        if not copies:
            raise AdminError(f"no linked node has a complete copy of shard {number}; start its nodes first")
        row = self._core.map.nodes_of(number)
        node = max(copies, key=lambda each: (copies[each].epoch, copies[each].seq, each in row))
        replaces = node if node in row else next((each for each in row if each not in self._core.reports), row[0])
        link = self._core.sequencer.links[node]
        highest = max(copy.seq for copy in copies.values())
        # no shard takes a thousand writes in every millisecond since 1970
        seq_min = max(self._core.map.stamp_bound_ms * 1_000, highest + 1)
        self._losses[number] = self._core.membership.learn(
            self._core.sequencer.shards[number], link, link, replaces, seq_min
        )
        done({"shard": number, "node": node, "seq": copies[node].seq, "goes_on_at": seq_min})

    def _check_node(self, node: str) -> None:
        if node not in self._core.map.nodes:
            raise AdminError(f"there is no node {node}; the nodes are {', '.join(self._core.map.nodes)}")
