"""Cluster administration: what an operator asks of the cluster, as changes of its map.

Pure, a part of the controller. Everything is a change of where copies shall be, or of who is a node; Membership then
does the moving. A request is refused with AdminError, one sentence that says why and what to do, and nothing was
changed; or it is answered through `done` when its change is stored.

- add: a node more. It holds nothing before the next rebalance, unless shards have too few copies as it is.
- drain, remove: everything is moved off a node; then it leaves the cluster. undrain: it stays after all.
- forget: a node is declared destroyed. What it had counts as fenced for ever (R9).
- rebalance: shards are placed evenly, by the fewest moves.
- accept a loss: a shard without a good copy goes on with the best one there is; if nothing is left of it, and nothing
  can come any more, empty. Its numbers begin above every number that was ever shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvtcp.constants import NODES_MAX
from kvtcp.errors import AdminError
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.learner import Learner
from kvtcp.replication.placement import plan
from kvtcp.replication.recovery import DOWN

if TYPE_CHECKING:
    from kvtcp.replication.controller import Controller

Done = Callable[[dict[str, Any] | AdminError], None]


class ClusterAdmin:
    """Of one controller."""

    def __init__(self, controller: Controller) -> None:
        self._core = controller
        self.leaving: set[str] = set()  # nodes that are about to be removed from the map: nothing learns there
        self._losses: dict[int, Learner] = {}  # shards whose loss was accepted, until they are judged again

    def tick(self) -> None:
        """A destroyed node of which nothing is left in the map leaves it."""
        for node in self._core.map.destroyed:
            if node in self._core.map.nodes and node not in self.leaving and not self._core.map.shards_of(node):
                self._remove_destroyed(node)

    def node_down(self, node: str) -> None:
        """A link is gone, and with it the learners on it."""
        for loss in list(self._losses.values()):
            if loss.link.node == node and not loss.proposed:
                self.learner_failed(loss, f"the link to {node} was lost")

    def learner_failed(self, learner: Learner, why: str) -> None:
        """A learner is over."""
        if self._losses.pop(learner.shard.number, None) is not None:
            self._core.event("error", "loss-not-accepted", shard=learner.shard.number, reason=why)

    def replaced(self, number: int) -> None:
        """A member of a shard that is not served was replaced in the map."""
        if self._losses.pop(number, None) is not None:
            self._core.event("warning", "loss-accepted", shard=number)

    # --- requests -----------------------------------------------------------------------------------

    def add_node(self, host: str, port: int, done: Done) -> None:
        """A node more."""
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
                new = new.with_wanted(plan(new.wanted, usable_nodes(new), new.factor))
            return new

        def stored() -> dict[str, Any]:
            node = added[-1]
            self._core.add_action("add", node)
            self._core.event("info", "node-added", node=node, address=f"{host}:{port}")
            return {"node": node}

        self._request(edit, stored, done)

    def drain(self, node: str, done: Done) -> None:
        """Move everything off a node."""

        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)
            usable = [each for each in usable_nodes(old) if each != node]
            if len(usable) < old.factor:
                raise ValueError(
                    f"without {node} there are {len(usable)} nodes for a replication factor of {old.factor}; "
                    "add a node first"
                )
            return old.with_draining(node, True).with_wanted(plan(old.wanted, usable, old.factor))

        def stored() -> dict[str, Any]:
            self._core.membership.work()
            return {"node": node, "shards": len(self._core.map.shards_of(node))}

        self._request(edit, stored, done)

    def undrain(self, node: str, done: Done) -> None:
        """A node that was to be emptied may hold shards again. What has moved comes back with a rebalance."""

        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)
            if node not in old.draining:
                raise ValueError(f"{node} is not being drained")
            return old.with_draining(node, False)

        self._request(edit, lambda: {"node": node}, done)

    def remove(self, node: str, done: Done) -> None:
        """A node that holds nothing leaves the cluster."""

        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)
            held = len({*old.shards_of(node), *self._core.copies_of(node), *self._core.shards_on(node)})
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
            if not was_leaving:  # else another request is about it still
                self.leaving.discard(node)
            done(answer)

        was_leaving = node in self.leaving
        self.leaving.add(node)
        self._request(edit, stored, answered)

    def forget(self, node: str, done: Done) -> None:
        """An operator declares that a node, and what it had, is destroyed (R9)."""

        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)
            if node in self._core.reports:
                raise ValueError(f"{node} is linked: a node that answers is not destroyed; drain it instead")
            usable = [each for each in usable_nodes(old) if each != node]
            if len(usable) < old.min_insync:
                raise ValueError(
                    f"without {node} there are {len(usable)} nodes, and every shard needs {old.min_insync}; "
                    "add a node first"
                )
            return old.with_destroyed(node).with_wanted(plan(old.wanted, usable, old.factor))

        def stored() -> dict[str, Any]:
            shards = len(self._core.map.shards_of(node))
            self._core.event("warning", "node-destroyed", node=node, shards=shards)
            if node in self._core.reports:  # it came while that was stored
                self._core.close_link(self._core.sequencer.links[node], "it was declared destroyed")
            for number, shard in list(self._core.recovery.shards.items()):
                if shard.state == DOWN:
                    self._core.recovery.begin(number)
            self._core.recovery.tick()
            self._core.membership.work()
            return {"node": node, "shards": shards}

        self._request(edit, stored, done)

    def rebalance(self, dry_run: bool, done: Done) -> None:
        """Place the shards evenly, with the fewest moves."""
        moves: list[list[Any]] = []

        def edit(old: ClusterMap) -> ClusterMap:
            rows = plan(old.wanted, usable_nodes(old), old.factor)
            moves[:] = _moves(old.wanted, rows)
            return old.with_wanted(rows)

        def answer() -> dict[str, Any]:
            self._core.membership.work()
            return {"moves": moves, "left": len(self._core.membership.unsettled)}

        if dry_run:
            edit(self._core.map)
            done(answer())
        else:
            self._request(edit, answer, done)

    def accept_loss(self, number: int, done: Done) -> None:
        """A shard without a good member goes on with the best copy there is (R9)."""
        try:
            done(self._accept_loss(number))
        except ValueError as error:
            done(AdminError(str(error)))

    # --- doing it -----------------------------------------------------------------------------------

    def _request(
        self, edit: Callable[[ClusterMap], ClusterMap], stored: Callable[[], dict[str, Any]], done: Done
    ) -> None:
        """Change the map, then answer; an edit that raises ValueError, now or when its turn comes, is refused."""

        def refused(error: Exception) -> None:
            done(AdminError(str(error)))

        try:
            edit(self._core.map)
        except ValueError as error:
            refused(error)
        else:
            self._core.propose(edit, lambda _: done(stored()), refused)

    def _remove_destroyed(self, node: str) -> None:
        def edit(old: ClusterMap) -> ClusterMap:
            _check_node(old, node)  # an operator may have removed it meanwhile
            if old.shards_of(node):
                raise ValueError(f"{node} joined before it was known that it is destroyed")
            return old.without_node(node)

        self.leaving.add(node)
        self._core.propose(edit, lambda _: self._forget_node(node), lambda error: self.leaving.discard(node))

    def _forget_node(self, node: str) -> None:
        self.leaving.discard(node)
        if node in self._core.reports:
            self._core.node_down(node, "it was removed from the cluster")
        self._core.membership.nodes.pop(node)
        self._core.sequencer.remove_link(node)
        self._core.add_action("remove", node)
        self._core.event("info", "node-removed", node=node)

    def _accept_loss(self, number: int) -> dict[str, Any]:
        core = self._core
        if not 0 <= number < core.map.shards:
            raise ValueError(f"there is no shard {number}; the last one is {core.map.shards - 1}")
        found = core.recovery.shards.get(number)
        if found is None and not core.sequencer.shards[number].serving:
            raise ValueError(f"shard {number} was stopped in this run: restart the coordinator, which looks at it anew")
        if found is None or found.state != DOWN:
            raise ValueError(f"shard {number} is not down: nothing is lost")
        if found.good and not found.differ:
            raise ValueError(
                f"shard {number} has a good copy on {', '.join(found.good)}: {core.sequencer.shards[number].reason}; "
                "if a node will never come back, say so with: node forget ID destroyed"
            )
        if number in self._losses:
            raise ValueError(f"the loss of shard {number} is being accepted already")
        copies = {
            node: report.copies[number]
            for node, report in core.reports.items()
            if number in report.copies and report.copies[number].complete
        }
        row = core.map.nodes_of(number)
        if copies:
            node = max(copies, key=lambda each: (copies[each].epoch, copies[each].seq, each in row))
        else:
            node = self._node_to_begin_empty(number)
        replaces = node if node in row else next((each for each in row if each not in core.reports), row[0])
        link = core.sequencer.links[node]
        # no shard takes a thousand writes in every millisecond since 1970
        seq_min = max(core.map.stamp_bound_ms * 1_000, max([copy.seq for copy in copies.values()], default=0) + 1)
        shard = core.sequencer.shards[number]
        self._losses[number] = core.membership.learn(shard, link, link, replaces, seq_min)
        seq = copies[node].seq if copies else 0
        return {"shard": number, "node": node, "seq": seq, "goes_on_at": seq_min}

    def begin_empty(self, number: int, given: int) -> None:
        """Nobody has anything of a shard that was kept in memory: a member begins empty, above the numbers that were
        given. Nobody needs to accept that."""
        core = self._core
        node = core.map.nodes_of(number)[0]
        link, shard = core.sequencer.links[node], core.sequencer.shards[number]
        self._losses[number] = core.membership.learn(shard, link, link, node, given + 1)

    def _node_to_begin_empty(self, number: int) -> str:
        """A linked node for a shard of which nothing is left. Raises ValueError if something may still come."""
        core = self._core
        missing = [n for n in core.map.nodes_of(number) if n not in core.reports and n not in core.map.destroyed]
        if missing:
            raise ValueError(
                f"no linked node has a complete copy of shard {number}, {', '.join(missing)} may have one: start it, "
                "or, if it will never come back, say so with: node forget ID destroyed"
            )
        able = [node for node in (*core.map.wanted[number], *usable_nodes(core.map)) if node in core.reports]
        able = [node for node in able if node not in self.leaving]
        if not able:
            raise ValueError(f"no node that may hold shard {number} is linked; start one first")
        return able[0]


def usable_nodes(cluster_map: ClusterMap) -> list[str]:
    """The nodes that may hold shards."""
    out = {*cluster_map.draining, *cluster_map.destroyed}
    return [node for node in cluster_map.nodes if node not in out]


def _check_node(cluster_map: ClusterMap, node: str) -> None:
    if node not in cluster_map.nodes:
        raise ValueError(f"there is no node {node}; the nodes are {', '.join(cluster_map.nodes)}")


def _moves(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> list[list[Any]]:
    """[shard, from, to] of every copy that moves; from is empty if it comes in addition."""
    moves = []
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        leave = [node for node in old if node not in new]
        come = [node for node in new if node not in old]
        moves += [[number, leave[at] if at < len(leave) else "", node] for at, node in enumerate(come)]
    return moves
