"""Placement: which nodes hold which shard.

Pure. A table, not a hash: every invariant below holds by construction, for any number of shards and nodes, and a change
of the nodes moves as little as possible.

Invariants of `balanced_placement` and of `plan` (tested for all small sizes):
- every shard has `factor` different nodes, in `plan` all of them if there are fewer;
- the numbers of shards of two nodes differ by at most one;
- the numbers of shards that two nodes answer first for (their *first* place) differ by at most one where the
  membership allows it.

`plan` is a minimum-cost flow: a copy on a node that had none costs 1, and a copy too many or too few on a node costs
more than any such gain. A table is the cheapest if no cycle of nodes lowers its costs (M. Klein, 1967: negative
cycles). All rows are kept together: a node's copies are the bits of one integer, so that finding the cheapest row in
which a copy can go from one node to another takes a few operations on such integers, whatever the number of shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

Rows = list[list[str]]

_NEVER: Final = 1 << 60  # costs of a move that is impossible


def balanced_placement(shards: int, nodes: Sequence[str], factor: int) -> Rows:
    """`placement[shard]` = the `factor` node ids that hold the shard; the first one answers its writes.

    Slot k = shard * factor + copy goes to node k modulo the number of nodes, which makes the counts differ by at most
    one and the copies of one shard different. The first place then goes to the member with the fewest first places.
    """
    if not 1 <= factor <= len(nodes):
        raise ValueError(f"a replication factor of {factor} needs at least {factor} nodes, there are {len(nodes)}")
    firsts = dict.fromkeys(nodes, 0)
    placement: Rows = []
    for shard in range(shards):
        members = [nodes[(shard * factor + copy) % len(nodes)] for copy in range(factor)]
        first = min(members, key=lambda node: (firsts[node], members.index(node)))
        firsts[first] += 1
        at = members.index(first)
        placement.append(members[at:] + members[:at])
    return placement


def plan(wanted: Sequence[Sequence[str]], nodes: Sequence[str], factor: int) -> Rows:
    """The balanced placement on `nodes` that is nearest to `wanted`: no other has fewer copies that are not in it.

    The first of each row is chosen so that first places are balanced, with the fewest changes. The same arguments give
    the same rows, and a balanced placement comes back unchanged. Raises ValueError if nothing can be placed.
    """
    if not nodes or factor < 1 or len(set(nodes)) != len(nodes):
        raise ValueError(f"{factor} copies cannot be placed on the nodes {', '.join(nodes) or '(none)'}")
    rows = [[node for node in row if node in nodes] for row in wanted]
    everywhere = [(1 << len(rows)) - 1] * len(nodes)
    copies = _Table(_masks(rows, nodes), everywhere, _masks(_filled(rows, nodes, min(factor, len(nodes))), nodes))
    copies.balance()
    rows = [_in_order(row, new) for row, new in zip(rows, copies.rows(nodes), strict=True)]
    firsts = _masks([row[:1] for row in rows], nodes)
    answering = _Table(_masks([list(row[:1]) for row in wanted], nodes), copies.held, firsts)
    answering.balance()
    return [_in_order(first + row, row) for row, first in zip(rows, answering.rows(nodes), strict=True)]


def _in_order(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The nodes of `new`, those in `old` first and as they are there."""
    order = {node: place for place, node in reversed(list(enumerate(old)))}
    return sorted(new, key=lambda node: order.get(node, len(old)))


def _filled(rows: Rows, nodes: Sequence[str], width: int) -> Rows:
    """Rows of `width` nodes: as many of the old ones as fit, then those that have the fewest so far."""
    filled = [row[:width] for row in rows]
    loads = dict.fromkeys(nodes, 0)
    for row in filled:
        for node in row:
            loads[node] += 1
    for row in filled:
        while len(row) < width:
            node = min((node for node in nodes if node not in row), key=lambda node: loads[node])
            loads[node] += 1
            row.append(node)
    return filled


def _masks(rows: Rows, nodes: Sequence[str]) -> list[int]:
    """The rows of each node, as bits."""
    masks = dict.fromkeys(nodes, 0)
    for n, row in enumerate(rows):
        for node in row:
            if node in masks:
                masks[node] |= 1 << n
    return list(masks.values())


class _Table:
    """A table of rows of equal length, as bits of their nodes, which are numbers here; `balance` makes it cheaper.

    An arc (a, b) is a copy that can go from node a to node b in some row; the hub, one more node, stands for the loads:
    a cycle through the hub leaves its first node with one copy less and its last with one more.
    """

    def __init__(self, old: list[int], allowed: list[int], held: list[int]) -> None:
        """`old[node]` are the rows in which a copy on the node costs nothing, `allowed[node]` those where one may be,
        and `held[node]` those where one is."""
        self.old = old
        self.allowed = allowed
        self.held = held
        self.hub = len(held)
        self.low, rest = divmod(sum(mask.bit_count() for mask in held), len(held))
        self.high = self.low + bool(rest)
        self.penalty = 2 * len(held) + 1  # of a copy too many or too few: above any gain of a cycle
        self.costs = [[_NEVER] * (self.hub + 1) for _ in range(self.hub + 1)]  # [a][b] of the arc

    def rows(self, nodes: Sequence[str]) -> Rows:
        """The nodes of each row, in the order of `nodes`."""
        found: Rows = [[] for _ in range(max(self.allowed).bit_length())]
        for node, mask in zip(nodes, self.held, strict=True):
            while mask:
                found[(mask & -mask).bit_length() - 1].append(node)
                mask &= mask - 1
        return found

    def balance(self) -> None:
        """Move copies around negative cycles until there are none."""
        self._price(range(self.hub))
        while cycle := self._negative_cycle():
            moves = [(a, b, self._cheapest(a, b)[1]) for a, b in cycle if self.hub not in (a, b)]
            for a, b, rows in moves:
                assert rows, "an arc that costs something is a row"
                row = rows & -rows
                self.held[a] ^= row
                self.held[b] ^= row
            self._price([node for node, _ in cycle if node != self.hub])

    def _price(self, changed: Iterable[int]) -> None:
        """Set the costs of the arcs from and to these nodes."""
        for a in changed:
            self.costs[self.hub][a] = self._load_cost(a, -1)
            self.costs[a][self.hub] = self._load_cost(a, 1)
            for b in range(self.hub):
                self.costs[a][b], _ = self._cheapest(a, b)
                self.costs[b][a], _ = self._cheapest(b, a)

    def _cheapest(self, a: int, b: int) -> tuple[int, int]:
        """The cost of moving a copy from a to b, and the rows in which a move costs that."""
        rows = self.held[a] & ~self.held[b] & self.allowed[b]
        if not rows:
            return _NEVER, 0
        charged, free = rows & ~self.old[a], rows & self.old[a]
        if cheap := charged & self.old[b]:
            return -1, cheap
        if even := (charged & ~self.old[b]) | (free & self.old[b]):
            return 0, even
        return 1, rows

    def _load_cost(self, node: int, more: int) -> int:
        """The cost of `more` copies on a node."""
        load = self.held[node].bit_count()
        excess, was = (max(0, self.low - each, each - self.high) for each in (load + more, load))
        return self.penalty * (excess - was)

    def _negative_cycle(self) -> list[tuple[int, int]]:
        """The arcs of a cycle whose costs sum to less than 0; none if there is no such cycle (Bellman, Ford)."""
        distances = [0] * (self.hub + 1)
        before = [-1] * (self.hub + 1)
        while True:
            is_settled = True
            for a, costs in enumerate(self.costs):
                distance = distances[a]
                for b, cost in enumerate(costs):
                    if distance + cost < distances[b]:
                        distances[b] = distance + cost
                        before[b] = a
                        is_settled = False
            if is_settled:
                return []
            if cycle := _cycle(before):
                return cycle


def _cycle(before: Sequence[int]) -> list[tuple[int, int]]:
    """The arcs of a cycle of the graph in which every node has at most one node before it."""
    seen: dict[int, int] = {}  # node -> start of the walk that reached it
    for start in range(len(before)):
        node = start
        while node != -1 and node not in seen:
            seen[node] = start
            node = before[node]
        if node != -1 and seen[node] == start:
            nodes = [node]
            while before[nodes[-1]] != node:
                nodes.append(before[nodes[-1]])
            return [(before[each], each) for each in nodes]
    return []
