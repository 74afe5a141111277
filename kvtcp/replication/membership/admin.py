"""Administration: requests of an operator, as changes of the cluster map.

Pure, a part of the controller. A request changes the placement or the nodes; Membership then moves the copies. It is
refused with AdminError, one sentence that says why and what to do, and nothing is changed; or it is answered through
`done` when its change is stored.

- add: one more node. It holds nothing before the next rebalance, unless shards have too few copies.
- drain, remove: everything is moved off a node; then it leaves the cluster. undrain: it stays after all.
- forget: a node is declared destroyed. Its copies count as fenced for ever (R9).
- rebalance: shards are placed evenly, by the fewest moves.
- accept a loss: a shard without a good copy continues with the best one there is, or empty if none is left and none can
  come any more. Its numbers begin above every number ever shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.placement import plan
from kvtcp.constants import NODES_MAX
from kvtcp.errors import AdminError
from kvtcp.protocol.link import Report
from kvtcp.replication.membership.insync import Membership
from kvtcp.replication.membership.recovery import DOWN, Recovery
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.proposals import Proposals
from kvtcp.replication.sequencing.sequencer import Sequencer

Done = Callable[[dict[str, Any] | AdminError], None]


class Admin:
    """Requests of operators, one method each. `node_down` is called for a linked node that leaves the cluster."""

    def __init__(
        self, sequencer: Sequencer, proposals: Proposals, outbox: Outbox, reports: Mapping[str, Report],
        membership: Membership, recovery: Recovery, node_down: Callable[[str, str], None],
    ) -> None:  # fmt: skip
        self._sequencer = sequencer
        self._proposals = proposals
        self._outbox = outbox
        self._reports = reports
        self._membership = membership
        self._recovery = recovery
        self._node_down = node_down

    @property
    def _map(self) -> ClusterMap:
        return self._proposals.map

    def tick(self) -> None:
        """Remove destroyed nodes that hold nothing any more."""
        leaving = self._membership.leaving
        for node in self._map.destroyed:
            if node in self._map.nodes and node not in leaving and not self._map.shards_of(node):
                self._remove_destroyed(node)

    # --- requests -----------------------------------------------------------------------------------

    def add_node(self, host: str, port: int, done: Done) -> None:
        """Add a node."""
        added: list[str] = []

        def edit(old: ClusterMap) -> ClusterMap:
            for node, address in old.nodes.items():
                if address == (host, port):
                    raise ValueError(f"{host}:{port} is the address of node {node} already")
            if len(old.nodes) >= NODES_MAX:
                raise ValueError(f"a cluster has at most {NODES_MAX} nodes")
            new, node = old.with_node(host, port)
            added.append(node)
            if any(len(row) < new.factor for row in new.wanted):
                new = new.with_wanted(plan(new.wanted, new.usable_nodes(), new.factor))
            return new

        def stored() -> dict[str, Any]:
            node = added[-1]
            self._outbox.actions.append(("add", node))
            self._outbox.event("info", "node-added", node=node, address=f"{host}:{port}")
            return {"node": node}

        self._request(edit, stored, done)

    def drain(self, node: str, done: Done) -> None:
        """Move everything off a node."""

        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)
            usable = [each for each in old.usable_nodes() if each != node]
            if len(usable) < old.factor:
                few = f"{len(usable)} nodes for a replication factor of {old.factor}"
                raise ValueError(f"without {node} there are {few}; add a node first")
            return old.with_draining(node, True).with_wanted(plan(old.wanted, usable, old.factor))

        def stored() -> dict[str, Any]:
            self._membership.work()
            return {"node": node, "shards": len(self._map.shards_of(node))}

        self._request(edit, stored, done)

    def undrain(self, node: str, done: Done) -> None:
        """Let a node that was to be emptied hold shards again. Moved shards come back with a rebalance."""

        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)
            if node not in old.draining:
                raise ValueError(f"{node} is not being drained")
            return old.with_draining(node, False)

        self._request(edit, lambda: {"node": node}, done)

    def remove(self, node: str, done: Done) -> None:
        """Remove a node that holds nothing."""

        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)
            link = self._sequencer.links.get(node)
            taking_part = [] if link is None else [shard.number for shard in link.shards]  # whatever the map says
            held = len({*old.shards_of(node), *self._membership.copies_of(node), *taking_part})
            wanted = sum(node in row for row in old.wanted)
            if held or wanted:
                is_empty_soon = node in old.draining and not old.shards_of(node) and not wanted
                do = "it is letting them go, try again in a moment" if is_empty_soon else (
                    "drain it first, and wait until it holds none"
                )  # fmt: skip
                raise ValueError(f"{node} holds {held or wanted} shards; {do}")
            return old.without_node(node)

        def stored() -> dict[str, Any]:
            self._forget_node(node)
            return {"node": node}

        def answered(answer: dict[str, Any] | AdminError) -> None:
            if not was_leaving:  # else another request about it is pending
                self._membership.leaving.discard(node)
            done(answer)

        was_leaving = node in self._membership.leaving
        self._membership.leaving.add(node)
        self._request(edit, stored, answered)

    def forget(self, node: str, done: Done) -> None:
        """Declare a node, with all its copies, destroyed (R9)."""

        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)
            if node in self._reports:
                raise ValueError(f"{node} is linked: a node that answers is not destroyed; drain it instead")
            usable = [each for each in old.usable_nodes() if each != node]
            if len(usable) < old.min_insync:
                few = f"{len(usable)} nodes, and every shard needs {old.min_insync}"
                raise ValueError(f"without {node} there are {few}; add a node first")
            return old.with_destroyed(node).with_wanted(plan(old.wanted, usable, old.factor))

        def stored() -> dict[str, Any]:
            shards = len(self._map.shards_of(node))
            self._outbox.event("warning", "node-destroyed", node=node, shards=shards)
            if node in self._reports:  # it was linked while the change was stored
                self._outbox.close_link(node, "it was declared destroyed")
            for number, shard in list(self._recovery.shards.items()):
                if shard.state == DOWN:
                    self._recovery.begin(number)
            self._recovery.tick()
            self._membership.work()
            return {"node": node, "shards": shards}

        self._request(edit, stored, done)

    def rebalance(self, dry_run: bool, done: Done) -> None:
        """Place the shards evenly, with the fewest moves."""
        moves: list[list[Any]] = []

        def edit(old: ClusterMap) -> ClusterMap:
            rows = plan(old.wanted, old.usable_nodes(), old.factor)
            moves[:] = _moves(old.wanted, rows)
            return old.with_wanted(rows)

        def answer() -> dict[str, Any]:
            self._membership.work()
            return {"moves": moves, "left": len(self._membership.unsettled)}

        if dry_run:
            edit(self._map)
            done(answer())
        else:
            self._request(edit, answer, done)

    def accept_loss(self, number: int, done: Done) -> None:
        """Continue a shard without a good member with the best copy there is (R9)."""
        try:
            done(self._accept_loss(number))
        except ValueError as error:
            done(AdminError(str(error)))

    # --- doing it -----------------------------------------------------------------------------------

    def _request(
        self, edit: Callable[[ClusterMap], ClusterMap], stored: Callable[[], dict[str, Any]], done: Done
    ) -> None:
        """Change the map, then answer; refuse an edit that raises ValueError, now or when its turn comes."""

        def refused(error: Exception) -> None:
            done(AdminError(str(error)))

        try:
            edit(self._map)
        except ValueError as error:
            refused(error)
        else:
            self._proposals.propose(edit, lambda _: done(stored()), refused)

    def _remove_destroyed(self, node: str) -> None:
        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)  # an operator may have removed it meanwhile
            if old.shards_of(node):
                raise ValueError(f"{node} joined before it was known that it is destroyed")
            return old.without_node(node)

        leaving = self._membership.leaving
        leaving.add(node)
        self._proposals.propose(edit, lambda _: self._forget_node(node), lambda error: leaving.discard(node))

    def _forget_node(self, node: str) -> None:
        self._membership.leaving.discard(node)
        if node in self._reports:
            self._node_down(node, "it was removed from the cluster")
        self._membership.nodes.pop(node)
        self._sequencer.remove_link(node)
        self._outbox.actions.append(("remove", node))
        self._outbox.event("info", "node-removed", node=node)

    def _accept_loss(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self._map.shards:
            raise ValueError(f"there is no shard {number}; the last one is {self._map.shards - 1}")
        found = self._recovery.shards.get(number)
        if found is None and not self._sequencer.shards[number].serving:
            raise ValueError(f"shard {number} was stopped in this run: restart the coordinator, which looks at it anew")
        if found is None or found.state != DOWN:
            raise ValueError(f"shard {number} is not down: nothing is lost")
        if found.good and not found.differ:
            raise ValueError(
                f"shard {number} has a good copy on {', '.join(found.good)}: {self._sequencer.shards[number].reason}; "
                "if a node will never come back, say so with: node forget ID destroyed"
            )
        if number in self._recovery.losses:
            raise ValueError(f"the loss of shard {number} is being accepted already")
        copies = {node: report.copies[number] for node, report in self._reports.items() if number in report.copies}
        copies = {node: copy for node, copy in copies.items() if copy.complete}
        row = self._map.nodes_of(number)
        best = max(copies, key=lambda each: (copies[each].epoch, copies[each].seq, each in row), default=None)
        node = best or self._node_to_begin_empty(number)
        replaces = node if node in row else next((each for each in row if each not in self._reports), row[0])
        # no shard takes a thousand writes in every millisecond since 1970
        seq_min = max(self._map.stamp_bound_ms * 1_000, max([copy.seq for copy in copies.values()], default=0) + 1)
        self._recovery.begin_from(number, node, replaces, seq_min)
        seq = copies[node].seq if copies else 0
        return {"shard": number, "node": node, "seq": seq, "goes_on_at": seq_min}

    def _node_to_begin_empty(self, number: int) -> str:
        """A linked node for a shard of which no copy is left. Raises ValueError if one may still come."""
        missing = [n for n in self._map.nodes_of(number) if n not in self._reports and n not in self._map.destroyed]
        if missing:
            raise ValueError(
                f"no linked node has a complete copy of shard {number}, {', '.join(missing)} may have one: start it, "
                "or, if it will never come back, say so with: node forget ID destroyed"
            )
        able = [node for node in (*self._map.wanted[number], *self._map.usable_nodes()) if node in self._reports]
        able = [node for node in able if node not in self._membership.leaving]
        if not able:
            raise ValueError(f"no node that may hold shard {number} is linked; start one first")
        return able[0]


def _check_node(cluster_map: ClusterMap, node: str) -> None:
    if node not in cluster_map.nodes:
        raise ValueError(f"there is no node {node}; the nodes are {', '.join(cluster_map.nodes)}")


def _moves(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> list[list[Any]]:
    """[shard, from, to] of every copy that moves; from is empty for an additional one."""
    moves = []
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        leave = [node for node in old if node not in new]
        come = [node for node in new if node not in old]
        moves += [[number, leave[at] if at < len(leave) else "", node] for at, node in enumerate(come)]
    return moves
