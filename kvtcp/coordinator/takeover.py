"""Ownership: how a coordinator becomes the one that the cluster map names, and when it must not.

Between the survey of the nodes and the first HELLO. The next epoch is stored before any node hears of it, so a node
that promised an epoch which the config store does not know, or saw a version of the map that it has not reached, says
that the store is older than the cluster: an old copy was put back, or another coordinator is at work. Then nothing is
changed, neither in the store nor on a node: the store would catch up with its numbers, but not with its content.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.map_store import MapStore, NotOwner
from kvtcp.cluster.store import ConfigStoreError
from kvtcp.constants import STAMP_AHEAD_MS
from kvtcp.coordinator.supervisor import Found
from kvtcp.replication.ownership import next_epoch
from kvtcp.runtime.clock import wall_ms


class CannotServe(Exception):
    """The coordinator cannot begin (`is_start`), or go on: one sentence for the user."""

    def __init__(self, sentence: str, is_start: bool = True) -> None:
        super().__init__(sentence)
        self.is_start = is_start


@dataclass(frozen=True)
class Predecessor:
    """What the config store held before this coordinator owned the map."""

    map_version: int = 0  # 0 = there was no map
    stamp_bound_ms: int = 0  # no stamp of the coordinators before was higher


async def own_map(map_store: MapStore, first: ClusterMap) -> Predecessor:
    """Take the cluster over in the config store: begin the next epoch, or found the cluster with the map `first`, which
    also has the owner, the addresses and the bound of stamps of a new epoch.

    Raises CannotServe.
    """
    try:
        if not map_store.is_founded:
            await map_store.found(first)
            return Predecessor()
        before = Predecessor(map_store.map.version, map_store.map.stamp_bound_ms)
        await map_store.change(lambda old: next_epoch(old, first))
        return before
    except OSError as error:
        raise CannotServe(f"the cluster map cannot be stored: {error}") from error
    except (NotOwner, ConfigStoreError) as error:
        raise CannotServe(str(error)) from error


def found_map(
    *, cluster: str, shards: int, factor: int, min_insync: int, durability: str, nodes: Mapping[str, tuple[str, int]],
) -> ClusterMap:  # fmt: skip
    """The map of a new cluster with this coordinator as its owner. Raises ValueError for values that do not fit."""
    return ClusterMap.found(
        cluster=cluster, owner=uuid.uuid4().hex, shards=shards, factor=factor, min_insync=min_insync,
        durability=durability, nodes=nodes, stamp_bound_ms=wall_ms() + STAMP_AHEAD_MS,
    )  # fmt: skip


def check_store(map_store: MapStore, found: Mapping[str, Found]) -> None:
    """Raise CannotServe if a node (by its id) knows more than the config store."""
    epoch, version = (map_store.map.epoch, map_store.map.version) if map_store.is_founded else (0, 0)
    for node, answer in found.items():
        if answer.promised > epoch and not map_store.is_founded:
            raise CannotServe(
                f"node {node} promised epoch {answer.promised} to a coordinator of this cluster, and there is no "
                "cluster map: map.json is missing in the coordinator's data directory; put its newest copy back, or "
                "start with --recover-map to make it again from what the nodes have, or move the data directories of "
                "the nodes away to begin anew"
            )
        if answer.promised > epoch:
            raise CannotServe(stale_store(f"node {node} promised epoch {answer.promised}, the cluster map has {epoch}"))
        if answer.map_version > version:
            raise CannotServe(
                stale_store(f"node {node} has seen version {answer.map_version} of the cluster map, it has {version}")
            )


def stale_store(what: str) -> str:
    """The sentence for a config store that knows less than the nodes."""
    return (
        f"{what}: map.json in the coordinator's data directory is an older copy, or another coordinator uses these "
        "nodes; put its newest copy back"
    )
