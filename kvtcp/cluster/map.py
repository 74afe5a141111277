"""The cluster map: the one small versioned value that says what the cluster is and who holds what.

Pure. The map lives in the config store, and every change of it is a compare-and-set there (changes.py): a ClusterMap is
immutable, its edits return the next one. Coordinators and nodes decide by the map and by nothing else.

A *member* of a shard is a pair (node, replica id), where the replica id is the uuid of one copy of that shard: a node
with another copy is not the member that acknowledged. At the founding every replica id is "" until all nodes have
reported. The members are the in-sync set as it is stored; `wanted` is where the copies shall be, and the members follow
it, one at a time.

Invariants: `version`, `epoch` and `last_node` only grow; every shard has from `min_insync` to `factor` + 1 members, on
different nodes of the map (one more than `factor` while a copy moves); the stamp of an entry or a read is never above
the `stamp_bound_ms` that was stored when it was made; the id of a node is never given again, not even after that node
was removed. `factor` may exceed the number of nodes after a removal.

As JSON the fields are those of the class, `nodes` as {id: [host, port]}, `members` as a list of [node, replica id] for
each shard, `wanted` as a list of nodes for each, `restoring` in hexadecimal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from kvtcp.cluster.placement import balanced_placement
from kvtcp.constants import DURABILITIES, NODES_MAX, SHARDS_MAX

Member = tuple[str, str]  # node, replica id
LOST_REPLICA: Final = "lost"  # no copy has this id (uuids are hexadecimal): a member not to be relied on (rebuild.py)


class MapError(Exception):
    """Bytes or fields that are no cluster map; the sentence names the field."""


@dataclass(frozen=True, kw_only=True)
class ClusterMap:
    """One version of the map."""

    cluster: str
    epoch: int
    owner: str  # uuid of the coordinator of that epoch
    shards: int
    factor: int
    min_insync: int
    durability: str  # mode of the last run in which the shards were served
    nodes: dict[str, tuple[str, int]]
    last_node: int  # number of the last id that was given: 7 after "n7"
    members: tuple[tuple[Member, ...], ...]  # of each shard, first the one that answers writes
    wanted: tuple[tuple[str, ...], ...]  # nodes that shall hold each shard; the members may differ from it meanwhile
    draining: tuple[str, ...] = ()  # sorted; nodes that shall hold nothing
    destroyed: tuple[str, ...] = ()  # sorted; declared destroyed: their copies count as fenced for ever
    stamp_bound_ms: int
    restoring: bytes | None = None  # prefix that a restore is replacing, or left in pieces
    heard: dict[str, int] = field(default_factory=dict)  # node -> version of the map that it is known to have stored
    version: int = 1

    @classmethod
    def found(
        cls, *, cluster: str, owner: str, shards: int, factor: int, min_insync: int, durability: str,
        nodes: Mapping[str, tuple[str, int]], stamp_bound_ms: int,
    ) -> ClusterMap:  # fmt: skip
        """The first map of a cluster, with balanced placement. Raises ValueError for values that do not fit."""
        if not 1 <= min_insync <= factor:
            raise ValueError(f"min_insync must be from 1 to the replication factor {factor}, not {min_insync}")
        placement = balanced_placement(shards, list(nodes), factor)
        return cls(
            cluster=cluster, epoch=1, owner=owner, shards=shards, factor=factor, min_insync=min_insync,
            durability=durability, nodes=dict(nodes), last_node=last_number(nodes), stamp_bound_ms=stamp_bound_ms,
            members=tuple(tuple((node, "") for node in row) for row in placement), wanted=tuple(map(tuple, placement)),
        )  # fmt: skip

    # --- questions ----------------------------------------------------------------------------------

    def shards_of(self, node: str) -> list[int]:
        """The shards that `node` holds, ascending."""
        return [shard for shard, members in enumerate(self.members) if any(each == node for each, _ in members)]

    def nodes_of(self, shard: int) -> list[str]:
        """The nodes that hold `shard`, first the one that answers."""
        return [node for node, _ in self.members[shard]]

    def usable_nodes(self) -> list[str]:
        """The nodes that may hold shards."""
        return [node for node in self.nodes if node not in self.draining and node not in self.destroyed]

    def replica_id_of(self, shard: int, node: str) -> str:
        """The replica id by which `node` is a member of `shard`; "" before it is known."""
        return dict(self.members[shard])[node]

    # --- edits of the coordinator's own -------------------------------------------------------------

    def taken_over(
        self, *, owner: str, epoch: int, nodes: Mapping[str, tuple[str, int]], stamp_bound_ms: int
    ) -> ClusterMap:
        """The map of the next coordinator: a higher epoch, its addresses of nodes, a bound that is no lower. Nodes that
        `nodes` leaves out keep their addresses."""
        assert epoch > self.epoch, "the epoch only grows"
        assert nodes.keys() <= self.nodes.keys(), "a takeover brings addresses of nodes of the map, and no other nodes"
        bound_ms = max(self.stamp_bound_ms, stamp_bound_ms)
        return replace(self, owner=owner, epoch=epoch, nodes={**self.nodes, **nodes}, stamp_bound_ms=bound_ms)

    def with_stamp_bound(self, stamp_bound_ms: int) -> ClusterMap:
        """Move the bound up."""
        return replace(self, stamp_bound_ms=max(self.stamp_bound_ms, stamp_bound_ms))

    def with_last_stamp(self, stamp_ms: int) -> ClusterMap:
        """End in order: no stamp was given above this one, and the next coordinator may begin there."""
        return replace(self, stamp_bound_ms=min(self.stamp_bound_ms, stamp_ms))

    def with_heard(self, heard: Mapping[str, int]) -> ClusterMap:
        """Note the versions that nodes have stored: one that knows less then has an older copy of its directory."""
        known = {node: max(version, self.heard.get(node, 0)) for node, version in heard.items() if node in self.nodes}
        return self if known.items() <= self.heard.items() else replace(self, heard={**self.heard, **known})

    def with_min_insync(self, min_insync: int) -> ClusterMap:
        """Change the number of members that must acknowledge; part of a takeover (R3). Raises ValueError if a shard has
        fewer members, or the factor is smaller."""
        if not 1 <= min_insync <= self.factor:
            raise ValueError(f"min_insync must be from 1 to the replication factor {self.factor}, not {min_insync}")
        for shard, row in enumerate(self.members):
            if len(row) < min_insync:
                raise ValueError(f"min_insync cannot be {min_insync}: shard {shard} has {len(row)} in-sync members")
        return replace(self, min_insync=min_insync)

    # --- edits of members ---------------------------------------------------------------------------

    def with_replica_ids(self, replica_ids: Mapping[int, Mapping[str, str]]) -> ClusterMap:
        """Change members to other copies: `replica_ids[shard][node]`. Nodes that are no members are passed over."""
        return self._with_rows({
            shard: [(node, changed.get(node, known)) for node, known in self.members[shard]]
            for shard, changed in replica_ids.items()
        })  # fmt: skip

    def with_member(self, shard: int, node: str, replica_id: str) -> ClusterMap:
        """Add a learner at the end of the row."""
        row = self.members[shard]
        assert node in self.nodes, f"{node} is no node of the map"
        assert replica_id, f"the copy of shard {shard} by which {node} joins is known"
        assert node not in self.nodes_of(shard), f"{node} is a member of shard {shard} already"
        assert len(row) <= self.factor, f"shard {shard} has {len(row)} members with factor {self.factor}"
        return self._with_rows({shard: [*row, (node, replica_id)]})

    def without(self, shards: Iterable[int], node: str) -> ClusterMap:
        """Remove `node` from these shards; `min_insync` members of each stay (R4)."""
        rows: dict[int, list[Member]] = {}
        for shard in shards:
            row = self.members[shard]
            left = [each for each in row if each[0] != node]
            assert len(left) == len(row) - 1, f"{node} is no member of shard {shard}"
            assert len(left) >= self.min_insync, f"shard {shard} would have fewer than {self.min_insync} members"
            rows[shard] = left
        return self._with_rows(rows)

    def replaced(self, shard: int, old_node: str, node: str, replica_id: str) -> ClusterMap:
        """Put a copy of `node` in the place of that of `old_node`, which may be the same node."""
        held = self.nodes_of(shard)
        assert old_node in held, f"{old_node} is no member of shard {shard}"
        assert node == old_node or node not in held, f"{node} is a member of shard {shard} already"
        assert node in self.nodes, f"{node} is no node of the map"
        assert replica_id, f"the copy of shard {shard} by which {node} joins is known"
        row = [(node, replica_id) if each == old_node else (each, known) for each, known in self.members[shard]]
        return self._with_rows({shard: row})

    def first_answers(self, shard: int, node: str) -> ClusterMap:
        """Let `node` answer the writes of the shard: its pair moves to the front of the row."""
        assert node in self.nodes_of(shard), f"{node} is no member of shard {shard}"
        return self._with_rows({shard: sorted(self.members[shard], key=lambda member: member[0] != node)})

    def _with_rows(self, rows: Mapping[int, Sequence[Member]]) -> ClusterMap:
        members = list(self.members)
        for shard, row in rows.items():
            members[shard] = tuple(row)
        return replace(self, members=tuple(members))

    # --- edits of nodes -----------------------------------------------------------------------------

    def with_node(self, host: str, port: int) -> tuple[ClusterMap, str]:
        """Add a node with the next id, which is returned too. The node holds nothing yet."""
        assert len(self.nodes) < NODES_MAX, f"a cluster has at most {NODES_MAX} nodes"
        assert (host, port) not in self.nodes.values(), f"{host}:{port} is the address of another node"
        node = f"n{self.last_node + 1}"
        return replace(self, nodes={**self.nodes, node: (host, port)}, last_node=self.last_node + 1), node

    def without_node(self, node: str) -> ClusterMap:
        """Remove a node that holds nothing, and shall hold nothing. That it was destroyed is remembered."""
        assert node in self.nodes, f"{node} is no node of the map"
        assert not self.shards_of(node), f"{node} is a member of {len(self.shards_of(node))} shards"
        assert not any(node in row for row in self.wanted), f"{node} shall hold shards"
        nodes = {each: address for each, address in self.nodes.items() if each != node}
        heard = {each: version for each, version in self.heard.items() if each != node}
        draining = tuple(each for each in self.draining if each != node)
        return replace(self, nodes=nodes, draining=draining, heard=heard)

    def with_draining(self, node: str, on: bool) -> ClusterMap:
        """Set whether `node` shall hold nothing. `wanted` stays."""
        assert node in self.nodes, f"{node} is no node of the map"
        others = set(self.draining) - {node}
        return replace(self, draining=tuple(sorted(others | {node} if on else others)))

    def with_destroyed(self, node: str) -> ClusterMap:
        """Note an operator's word that `node` will never come back. There is no way back from that."""
        assert node in self.nodes, f"{node} is no node of the map"
        return replace(self, destroyed=tuple(sorted({*self.destroyed, node})))

    def with_wanted(self, rows: Sequence[Sequence[str]]) -> ClusterMap:
        """Change the placement, to nodes that may hold something."""
        wanted = tuple(map(tuple, rows))
        assert len(wanted) == self.shards, f"the placement has {len(wanted)} rows for {self.shards} shards"
        usable = self.nodes.keys() - {*self.draining, *self.destroyed}
        for shard, row in enumerate(wanted):
            assert self._may_be_wanted(row, usable), f"shard {shard} cannot be placed on {row}"
        return replace(self, wanted=wanted)

    def _may_be_wanted(self, row: Sequence[str], usable: Iterable[str]) -> bool:
        return 1 <= len(row) <= self.factor and len(set(row)) == len(row) and set(row) <= set(usable)

    # --- JSON ---------------------------------------------------------------------------------------

    def to_json(self) -> bytes:
        """The map as UTF-8 text, one field and one shard a line."""
        lines = []
        for each in fields(self):
            value: Any = getattr(self, each.name)
            if each.name == "restoring":
                value = None if value is None else value.hex()
            if each.name in ("members", "wanted"):
                text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
            else:
                text = json.dumps(value)
            lines.append(f' "{each.name}": {text}')
        return ("{\n" + ",\n".join(lines) + "\n}").encode()

    @classmethod
    def from_json(cls, data: bytes) -> ClusterMap:
        """The map of `to_json`. Raises MapError, naming the field that is wrong."""
        try:
            found = json.loads(data)
        except ValueError as error:
            raise MapError(f"the cluster map is not JSON: {error}") from error
        if type(found) is not dict:
            raise MapError("the cluster map is not a JSON object")
        names = {each.name for each in fields(cls)}
        for name in sorted(names - found.keys()):
            raise MapError(f"the cluster map has no {name}")
        for name in sorted(found.keys() - names):
            raise MapError(f"the cluster map has {name}, which this version does not know")
        for name, is_right in _FIELDS.items():
            if not is_right(found[name]):
                raise MapError(f"{name} of the cluster map cannot be {_shown(found[name])}")
        nodes = {node: (host, port) for node, (host, port) in found["nodes"].items()}
        values = {**found, "nodes": nodes, "wanted": tuple(map(tuple, found["wanted"]))}
        values["members"] = tuple(tuple((node, replica_id) for node, replica_id in row) for row in found["members"])
        values["draining"], values["destroyed"] = tuple(found["draining"]), tuple(found["destroyed"])
        values["restoring"] = None if found["restoring"] is None else bytes.fromhex(found["restoring"])
        made = cls(**values)
        made.check()
        return made

    def check(self) -> None:
        """Raise MapError if the fields do not fit together."""
        if self.last_node < last_number(self.nodes):
            raise MapError(f"last_node of the cluster map is {self.last_node}, and it has n{last_number(self.nodes)}")
        for node in self.draining:
            if node not in self.nodes:
                raise MapError(f"draining of the cluster map has {_shown(node)}, which is no node of it")
        if self.min_insync > self.factor:
            raise MapError(f"min_insync of the cluster map is {self.min_insync} with factor {self.factor}")
        if len(self.members) != self.shards:
            raise MapError(f"members of the cluster map has {len(self.members)} shards, not {self.shards}")
        for shard, members in enumerate(self.members):
            nodes = {node for node, _ in members}
            is_long_enough = self.min_insync <= len(members) <= self.factor + 1
            if not is_long_enough or len(nodes) != len(members) or not nodes <= self.nodes.keys():
                raise MapError(f"members of the cluster map has a wrong row for shard {shard}: {_shown(members)}")
        if len(self.wanted) != self.shards:
            raise MapError(f"wanted of the cluster map has {len(self.wanted)} shards, not {self.shards}")
        for shard, wanted in enumerate(self.wanted):
            if not self._may_be_wanted(wanted, self.nodes):
                raise MapError(f"wanted of the cluster map has a wrong row for shard {shard}: {_shown(wanted)}")


_NUMBERED: Final = re.compile("n([1-9][0-9]*)")


def last_number(nodes: Iterable[str]) -> int:
    """The highest number of the ids that are an n and a number; 0 if there are none."""
    return max((int(found[1]) for node in nodes if (found := _NUMBERED.fullmatch(node))), default=0)


def _is_text(value: Any) -> bool:
    return type(value) is str and bool(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_address(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and _is_text(value[0]) and type(value[1]) is int


def _is_member(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and _is_text(value[0]) and type(value[1]) is str


def _is_rows(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return type(value) is list and all(type(row) is list and all(map(is_item, row)) for row in value)


def _is_sorted_set(value: Any) -> bool:
    return type(value) is list and all(map(_is_text, value)) and value == sorted(set(value))


def _is_hexadecimal(value: Any) -> bool:
    try:
        return type(value) is str and bytes.fromhex(value).hex() == value
    except ValueError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_FIELDS: Final[dict[str, Callable[[Any], bool]]] = {
    "cluster": _is_text,
    "epoch": _is_count,
    "owner": _is_text,
    "shards": lambda value: _is_count(value) and value <= SHARDS_MAX,
    "factor": _is_count,
    "min_insync": _is_count,
    "durability": lambda value: value in DURABILITIES,
    "nodes": lambda value: type(value) is dict and all(map(_is_address, value.values())),
    "last_node": lambda value: type(value) is int and value >= 0,
    "members": lambda value: _is_rows(value, _is_member),
    "wanted": lambda value: _is_rows(value, _is_text),
    "draining": _is_sorted_set,
    "destroyed": _is_sorted_set,
    "stamp_bound_ms": lambda value: type(value) is int and value >= 0,
    "restoring": lambda value: value is None or _is_hexadecimal(value),
    "heard": lambda value: type(value) is dict and all(type(v) is int and v >= 0 for v in value.values()),
    "version": _is_count,
}
