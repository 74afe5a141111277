"""Becoming the owner of the map, and refusing to when the nodes know more than the store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtcp.cluster.map_store import MapStore
from kvtcp.cluster.memory_store import MemoryConfigStore
from kvtcp.cluster.store import Outcome
from kvtcp.constants import STAMP_AHEAD_MS
from kvtcp.coordinator.supervisor import Found
from kvtcp.coordinator.takeover import CannotServe, Predecessor, check_store, found_map, own_map
from kvtcp.runtime.clock import wall_ms
from tests.support.replication_fakes import make_map

NODES = {"n1": ("h", 1), "n2": ("h", 2)}


async def test_found_and_take_over() -> None:
    """The first coordinator founds the cluster; each later one begins an epoch, with its addresses, a later bound."""
    store = MemoryConfigStore()
    began_ms = wall_ms()
    map_store = await MapStore.open(store)
    made = found_map(cluster="c", shards=4, factor=2, min_insync=1, durability="sync", nodes=NODES)
    assert await own_map(map_store, made) == Predecessor(0, 0)
    assert (map_store.map.epoch, map_store.map.version, map_store.map.owner) == (1, 1, made.owner)
    assert map_store.map.stamp_bound_ms >= began_ms + STAMP_AHEAD_MS
    bound_ms = map_store.map.stamp_bound_ms
    map_store = await MapStore.open(store)
    moved = {"n1": ("h", 7), "n2": ("h", 8)}
    next_one = found_map(cluster="c", shards=9, factor=1, min_insync=1, durability="os", nodes=moved)
    assert await own_map(map_store, next_one) == Predecessor(1, bound_ms)
    assert (map_store.map.epoch, map_store.map.version, map_store.map.owner) == (2, 2, next_one.owner)
    assert map_store.map.nodes == moved and map_store.map.shards == 4 and map_store.map.durability == "sync"


async def test_a_store_that_takes_nothing() -> None:
    """An error of the disk, and another coordinator that was faster: one sentence."""

    class FullStore(MemoryConfigStore):
        async def compare_and_set(self, expected_version: int | None, value: bytes) -> Outcome:
            raise OSError(28, "No space left on device")

    made = found_map(cluster="c", shards=4, factor=2, min_insync=1, durability="sync", nodes=NODES)
    with pytest.raises(CannotServe, match="the cluster map cannot be stored: .*No space left on device"):
        await own_map(await MapStore.open(FullStore()), made)
    store = MemoryConfigStore()
    late = await MapStore.open(store)
    await own_map(await MapStore.open(store), made)
    with pytest.raises(CannotServe, match="another coordinator owns it now"):
        await own_map(late, made)


async def test_nodes_that_know_more_than_the_store() -> None:
    """A promise or a version of the map that the store does not know: refused by the node's name."""
    store = MemoryConfigStore()
    map_store = await MapStore.open(store)
    check_store(map_store, {"n1": Found("ours"), "n2": Found("free")})
    with pytest.raises(CannotServe, match=r"n1 promised epoch 1 to a coordinator.*map\.json is missing"):
        check_store(map_store, {"n1": Found("ours", promised=1)})
    await map_store.found(replace(make_map(2, 2), epoch=3, version=8))
    check_store(map_store, {"n1": Found("ours", promised=3, map_version=8)})
    with pytest.raises(CannotServe, match=r"n1 promised epoch 4, the cluster map has 3: map\.json .* an older copy"):
        check_store(map_store, {"n1": Found("ours", promised=4, map_version=8)})
    with pytest.raises(CannotServe, match=r"n1 has seen version 9 of the cluster map, it has 8: map\.json"):
        check_store(map_store, {"n1": Found("ours", promised=3, map_version=9)})
