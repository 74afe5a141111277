"""The cluster map: the one small versioned value that says what the cluster is and who holds what.

Pure. It lives in the config store, and every change of it is a compare-and-set there (config_store/keeper.py): a
ClusterMap is immutable, the methods return the next one. Coordinators and nodes decide by it and by nothing else.

A *member* of a shard is a pair (node, disk), where `disk` is the uuid of one copy of that shard: a node that comes back
with another copy is not the member that acknowledged. At the founding no copy is known yet, and every disk is "" until
all nodes have reported.

Invariants: `version` and `epoch` only grow; every shard has exactly `factor` members, on different nodes; the stamp of
an entry or a read is never above the `stamp_bound_ms` that was stored when it was made.

As JSON the fields are those of the class, `nodes` as {id: [host, port]}, `members` as a list of [node, disk] for each
shard, `restoring` in hexadecimal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from kvtcp.constants import DURABILITIES, SHARDS_MAX
from kvtcp.replication.placement import balanced_placement

Member = tuple[str, str]  # node, disk


class MapError(Exception):
    """This is no cluster map; the sentence names the field."""


@dataclass(frozen=True)
class ClusterMap:
    """`members[shard]` are pairs (node, disk), first the one that answers."""

    cluster: str
    epoch: int
    owner: str  # uuid of the coordinator of that epoch
    shards: int
    factor: int
    min_insync: int
    durability: str  # mode of the last run in which the shards were served
    nodes: dict[str, tuple[str, int]]
    members: tuple[tuple[Member, ...], ...]
    stamp_bound_ms: int
    restoring: bytes | None = None  # prefix that a restore is replacing, or left in pieces
    heard_version: int = 0  # version that every node stored before the shards were served last
    version: int = 1

    @classmethod
    def found(
        cls,
        *,
        cluster: str,
        owner: str,
        shards: int,
        factor: int,
        min_insync: int,
        durability: str,
        nodes: Mapping[str, tuple[str, int]],
        stamp_bound_ms: int,
    ) -> ClusterMap:
        """The first map of a cluster, with balanced placement. Raises ValueError for values that do not fit."""
        if not 1 <= min_insync <= factor:
            raise ValueError(f"min_insync must be from 1 to the replication factor {factor}, not {min_insync}")
        placement = balanced_placement(shards, list(nodes), factor)
        members = tuple(tuple((node, "") for node in row) for row in placement)
        return cls(cluster, 1, owner, shards, factor, min_insync, durability, dict(nodes), members, stamp_bound_ms)

    # --- questions ----------------------------------------------------------------------------------

    def shards_of(self, node: str) -> list[int]:
        """The shards that `node` holds, ascending."""
        return [shard for shard, members in enumerate(self.members) if any(each == node for each, _ in members)]

    def nodes_of(self, shard: int) -> list[str]:
        """The nodes that hold `shard`, first the one that answers."""
        return [node for node, _ in self.members[shard]]

    def disk_of(self, shard: int, node: str) -> str:
        """The disk by which `node` is a member of `shard`; "" before it is known."""
        return dict(self.members[shard])[node]

    # --- changes ------------------------------------------------------------------------------------

    def taken_over(
        self, *, owner: str, epoch: int, nodes: Mapping[str, tuple[str, int]], stamp_bound_ms: int
    ) -> ClusterMap:
        """The map of the next coordinator: a higher epoch, the addresses that it uses, a bound that is no lower."""
        assert epoch > self.epoch, "the epoch only grows"
        assert set(nodes) == set(self.nodes), "the nodes of a cluster are fixed"
        bound_ms = max(self.stamp_bound_ms, stamp_bound_ms)
        return replace(self, owner=owner, epoch=epoch, nodes=dict(nodes), stamp_bound_ms=bound_ms)

    def with_disks(self, disks: Mapping[int, Mapping[str, str]]) -> ClusterMap:
        """Members by other copies: `disks[shard][node]` is the new disk."""
        members = list(self.members)
        for shard, changed in disks.items():
            members[shard] = tuple((node, changed.get(node, disk)) for node, disk in members[shard])
        return replace(self, members=tuple(members))

    def with_stamp_bound(self, stamp_bound_ms: int) -> ClusterMap:
        """The bound moves up."""
        return replace(self, stamp_bound_ms=max(self.stamp_bound_ms, stamp_bound_ms))

    def with_last_stamp(self, stamp_ms: int) -> ClusterMap:
        """The coordinator ends in peace: it gave no stamp above this one, and the next one may begin there."""
        return replace(self, stamp_bound_ms=min(self.stamp_bound_ms, stamp_ms))

    # --- JSON ---------------------------------------------------------------------------------------

    def to_json(self) -> bytes:
        """As UTF-8 text, one field and one shard a line."""
        lines = []
        for each in fields(self):
            value: Any = getattr(self, each.name)
            if each.name == "restoring":
                value = None if value is None else value.hex()
            if each.name == "members":
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
        members = tuple(tuple((node, disk) for node, disk in row) for row in found["members"])
        restoring = found["restoring"]
        values = {**found, "nodes": nodes, "members": members}
        values["restoring"] = None if restoring is None else bytes.fromhex(restoring)
        made = cls(**values)
        made._check()
        return made

    def _check(self) -> None:
        """Raise MapError if the fields do not fit together."""
        if self.factor > len(self.nodes):
            raise MapError(f"factor of the cluster map is {self.factor} with {len(self.nodes)} nodes")
        if self.min_insync > self.factor:
            raise MapError(f"min_insync of the cluster map is {self.min_insync} with factor {self.factor}")
        if len(self.members) != self.shards:
            raise MapError(f"members of the cluster map has {len(self.members)} shards, not {self.shards}")
        for shard, row in enumerate(self.members):
            nodes = {node for node, _ in row}
            if len(row) != self.factor or len(nodes) != self.factor or not nodes <= self.nodes.keys():
                raise MapError(f"members of the cluster map has a wrong row for shard {shard}: {_shown(row)}")


def _is_text(value: Any) -> bool:
    return type(value) is str and bool(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_address(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and _is_text(value[0]) and type(value[1]) is int


def _is_member(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and _is_text(value[0]) and type(value[1]) is str


def _is_hexadecimal(value: Any) -> bool:
    try:
        return type(value) is str and bytes.fromhex(value).hex() == value
    except ValueError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_FIELDS = {
    "cluster": _is_text,
    "epoch": _is_count,
    "owner": _is_text,
    "shards": lambda value: _is_count(value) and value <= SHARDS_MAX,
    "factor": _is_count,
    "min_insync": _is_count,
    "durability": lambda value: value in DURABILITIES,
    "nodes": lambda value: type(value) is dict and all(map(_is_address, value.values())),
    "members": lambda value: type(value) is list and all(type(r) is list and all(map(_is_member, r)) for r in value),
    "stamp_bound_ms": lambda value: type(value) is int and value >= 0,
    "restoring": lambda value: value is None or _is_hexadecimal(value),
    "heard_version": lambda value: type(value) is int and value >= 0,
    "version": _is_count,
}
