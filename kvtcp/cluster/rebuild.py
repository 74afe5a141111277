"""Rebuild: makes a lost cluster map again from the copies of the nodes and the maps that they keep.

Pure. Every node keeps the map of its last HELLO. The newest of these has the fields that change rarely: shards, factor,
`min_insync` (M), nodes, placement. The in-sync sets may have changed since, so every row is made from the copies
themselves, and the recovery of the next epoch (recovery.py) judges it like any other.

**Why nothing committed is lost** if every node answers with its data. Let T be the map that was lost.
1. Every member of T's row for a shard has everything committed, and there were at least M of them. A copy in doubt says
   so for ever (`damage`, or incomplete), and one whose replica id a later map names was made whole since. So if fewer
   than M copies of a shard are in doubt, one copy that is not, m, is a member of T. (A node drops a copy only when it
   is no member any more.)
2. Let b be the copy with the highest (epoch, seq) of all that are complete and not in doubt, so not below m.
   Same epoch as m: one coordinator gave the numbers of an epoch, once each, so b continues where m ends, or equals it.
   Higher epoch: the committed entries end on m, so they are of older epochs than the last entry of b. A copy with an
   entry of an epoch had first everything committed before it (recovery, or learning). So b has all that m must have.
3. The row has b and its equals. Others are added only to have M members; then none of the row can be left out, so no
   recovery serves it without b. Entries of b that were not committed are rolled forward, which is right (R6).
4. No coordinator is linked while the nodes are asked, and the epoch of the new map is the highest one promised: the
   takeover that follows begins a higher one, and stops if another coordinator was faster.
If M or more copies are in doubt or their nodes were declared destroyed, if fewer than M are there at all, if a node
knows of a committed number that no copy reaches, or if two best copies differ, nothing is chosen: the row names replica
ids that no copy has, the shard is down, and the operator may accept its loss, which takes the best copy there is.

**What an operator decides** with `accept`: nodes that do not answer, or came back empty, are gone, and had nothing that
the others lack. A shard of which M copies are left is served; one with fewer is down as above. A shard without any copy
keeps its row, so it is served when its nodes come back as they were.

A directory that was lost and re-created has empty copies that no map names. They are in doubt if the shard is not
empty elsewhere, or a map names another copy of it on that node. A node that knows an older map than another node's map
says it had stored runs on an older copy of its directory: all its copies are in doubt. Two things do not show here: a
node that joined after the last HELLO of every node that was asked, and an older copy of a directory that no map gives
away. In mode `memory` a restarted node is one that came back empty.

The version is far above any that a node has seen, the bound of stamps above every stamp and the clock. Whether a
restore was under way is as the newest map says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvtcp.cluster.map import LOST_REPLICA, ClusterMap, MapError, Member, last_number
from kvtcp.constants import STAMP_AHEAD_MS
from kvtcp.protocol.link import CopyReport, Told

VERSION_DISTANCE: Final = 1_000  # from the versions that nodes have seen, so that it is taken for none of them


class CannotRecover(Exception):
    """Raised if the map cannot be made; one sentence for the operator."""


@dataclass(frozen=True)
class Recovered:
    """A map that can be stored, and its flaws, for the operator."""

    map: ClusterMap
    missing: dict[str, str]  # nodes that it does without, and why they are missing
    down: dict[int, str]  # shards that will not be served, and why


def newest_map(answers: Mapping[str, Told]) -> ClusterMap | None:
    """The newest map that a node keeps, None if none has one. Raises CannotRecover for one that cannot be read."""
    return max(_maps(answers), key=lambda each: (each.epoch, each.version), default=None)


def missing_nodes(newest: ClusterMap, answers: Mapping[str, Told], silent: Mapping[str, str]) -> dict[str, str]:
    """The nodes of the map that should answer with their data and do not, and why, as far as `silent` says."""
    missing = {}
    for node in newest.nodes:
        if node in newest.destroyed:
            continue
        if node not in answers:
            missing[node] = silent.get(node, "it does not answer")
        elif answers[node].report.promised == 0:
            missing[node] = "it has no data of this cluster"
    return missing


def recovered_map(
    answers: Mapping[str, Told], silent: Mapping[str, str], *, owner: str, wall_ms: int, accept: bool = False
) -> Recovered:
    """The map that takes the lost one's place, from the answers of the nodes. Raises CannotRecover."""
    maps = _maps(answers)
    newest = newest_map(answers)
    if newest is None:
        raise CannotRecover("no node that answers keeps a cluster map, so there is nothing to make one from")
    missing = missing_nodes(newest, answers, silent)
    if missing and not accept:
        named = ", ".join(f"{node} ({why})" for node, why in missing.items())
        raise CannotRecover(
            f"not all nodes of the cluster told what they have, and data that only they have would be lost: {named}; "
            "start them with their data, or, if they are gone for good, go on without them with --recover-map accept"
        )
    rows = _Rows(newest, maps, answers, bool(missing))
    found = [rows.of(shard) for shard in range(newest.shards)]
    reports = [each.report for each in answers.values()]
    stamps_ms = [newest.stamp_bound_ms, wall_ms, *(report.stamp_ms for report in reports)]
    made = replace(
        newest.with_heard({node: each.report.map_version for node, each in answers.items()}),
        epoch=max(newest.epoch, *(report.promised for report in reports)),
        owner=owner,
        last_node=max(newest.last_node, last_number(answers)),
        members=tuple(row for row, _ in found),
        stamp_bound_ms=max(stamps_ms) + STAMP_AHEAD_MS,
        version=max(newest.version, *(report.map_version for report in reports)) + VERSION_DISTANCE,
    )
    made.check()
    return Recovered(made, missing, {shard: why for shard, (_, why) in enumerate(found) if why})


def _maps(answers: Mapping[str, Told]) -> list[ClusterMap]:
    """The maps that the nodes keep, each once."""
    maps: dict[bytes, ClusterMap] = {}
    for node, each in answers.items():
        if each.map and each.map not in maps:
            try:
                maps[each.map] = ClusterMap.from_json(each.map)
            except MapError as error:
                raise CannotRecover(f"the cluster map that node {node} keeps cannot be used: {error}") from error
    return list(maps.values())


class _Rows:
    """Makes the rows of the members. `is_short`: nodes are missing, and the operator accepted that."""

    def __init__(
        self, newest: ClusterMap, maps: Sequence[ClusterMap], answers: Mapping[str, Told], is_short: bool
    ) -> None:
        self._newest = newest
        self._is_short = is_short
        # (shard, node, replica id) of copies that had everything when a map named them
        rows = [(shard, row) for each in maps for shard, row in enumerate(each.members)]
        self._named = {(shard, node, replica_id) for shard, row in rows for node, replica_id in row if replica_id}
        self._members = {(shard, node) for shard, node, _ in self._named}
        self._reports = {
            node: answers[node].report for node in newest.nodes if node in answers and node not in newest.destroyed
        }
        self._older = {
            node
            for node, report in self._reports.items()
            if 0 < report.map_version < max(each.heard.get(node, 0) for each in maps)
        }

    def of(self, shard: int) -> tuple[tuple[Member, ...], str]:
        """The row of a shard, and why the shard will be down; empty if it will not."""
        intact, doubtful = self._sorted(shard)
        if not intact and not doubtful:
            return self._old_row(shard), "no node has a copy of it"
        why = self._why_down(shard, intact, doubtful)
        if why:
            return self._lost_row(shard, [*intact, *doubtful]), why
        best = max(map(_order, intact.values()))
        row = [node for node in self._preferred(shard, intact) if _order(intact[node]) == best]
        members = [(node, intact[node].replica_id) for node in row[: self._newest.factor]]
        return tuple(members + self._fill(shard, intact, doubtful, row)), ""

    def _sorted(self, shard: int) -> tuple[dict[str, CopyReport], dict[str, CopyReport]]:
        """The copies that are complete and beyond doubt, and the others."""
        intact: dict[str, CopyReport] = {}
        doubtful: dict[str, CopyReport] = {}
        for node, report in self._reports.items():
            copy = report.copies.get(shard)
            if copy is not None:
                is_named = (shard, node, copy.replica_id) in self._named
                is_intact = copy.complete and node not in self._older and (is_named or not copy.damage)
                (intact if is_intact else doubtful)[node] = copy
        has_data = any(copy.seq for copy in (*intact.values(), *doubtful.values()))
        for node, copy in list(intact.items()):
            is_new = not copy.seq and (shard, node, copy.replica_id) not in self._named
            if is_new and (has_data or (shard, node) in self._members):
                doubtful[node] = intact.pop(node)
        return intact, doubtful

    def _why_down(self, shard: int, intact: Mapping[str, CopyReport], doubtful: Mapping[str, CopyReport]) -> str:
        """Why no copy can be trusted to have everything; empty if the best one can."""
        minimum = self._newest.min_insync
        destroyed = self._destroyed(shard)
        in_doubt = [*doubtful, *destroyed]
        if len(in_doubt) >= minimum or not intact:
            return f"{', '.join(in_doubt)} may have had writes that the others lack, and cannot be relied on any more"
        if len(intact) < minimum and (self._is_short or len(intact) + len(in_doubt) < minimum):
            return f"only {', '.join(intact)} of the {minimum} members that every shard had at least can be found"
        best = max(map(_order, intact.values()))
        hint = max(copy.commit for copy in (*intact.values(), *doubtful.values()))
        if best[1] < hint:
            return f"number {hint} was committed, and the best copy ends at {best[1]}"
        equals = [node for node, copy in intact.items() if _order(copy) == best]
        if len({intact[node].chain for node in equals}) > 1:
            return f"{', '.join(equals)} end at number {best[1]} with different histories"
        return ""

    def _destroyed(self, shard: int) -> list[str]:
        """Members of the row that were declared destroyed: no such node joined a row after that."""
        return [node for node in self._newest.nodes_of(shard) if node in self._newest.destroyed]

    def _fill(
        self, shard: int, intact: Mapping[str, CopyReport], doubtful: Mapping[str, CopyReport], row: Sequence[str]
    ) -> list[Member]:
        """Members to add to `row` so that it has M: the recovery brings them up to date, or whole."""
        hint = max(copy.commit for copy in (*intact.values(), *doubtful.values()))
        rest = [node for node in self._preferred(shard, intact) if node not in row]
        rest.sort(key=lambda node: _order(intact[node]), reverse=True)  # stable
        usable = [(node, intact[node].replica_id) for node in rest if intact[node].seq >= hint]
        # a copy that ends below a committed number was no member, or lost something: it is replaced whole
        other = [(node, LOST_REPLICA) for node in (*rest, *doubtful, *self._destroyed(shard))]
        taken = {node for node, _ in usable}
        fill = usable + [member for member in other if member[0] not in taken]
        return fill[: max(0, self._newest.min_insync - len(row))]

    def _preferred(self, shard: int, nodes: Mapping[str, CopyReport]) -> list[str]:
        """These nodes: those that shall hold the shard first, in the order of the newest row."""
        wanted, row = self._newest.wanted[shard], self._newest.nodes_of(shard)
        every = list(self._newest.nodes)
        return sorted(nodes, key=lambda n: (n not in wanted, row.index(n) if n in row else len(row), every.index(n)))

    def _old_row(self, shard: int) -> tuple[Member, ...]:
        """The newest known row. A member whose copy was not known yet gets an id that no copy has."""
        return tuple((node, replica_id or LOST_REPLICA) for node, replica_id in self._newest.members[shard])

    def _lost_row(self, shard: int, holders: Sequence[str]) -> tuple[Member, ...]:
        """A row without a good member. Nodes with a copy come first, so that not all of it looks new and empty."""
        nodes = list(dict.fromkeys([*holders, *self._newest.nodes_of(shard)]))
        return tuple((node, LOST_REPLICA) for node in nodes[: max(self._newest.factor, self._newest.min_insync)])


def _order(copy: CopyReport) -> tuple[int, int]:
    """Which of two copies is the better one."""
    return copy.epoch, copy.seq
