"""The start of a coordinator: which nodes it waits for, and which it refuses; test_processes.py runs it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvtcp.cluster.map_store import MapStore
from kvtcp.cluster.memory_store import MemoryConfigStore
from kvtcp.coordinator import launch
from kvtcp.coordinator.server import ClusterConfig
from kvtcp.coordinator.supervisor import Found, Supervisor
from kvtcp.coordinator.takeover import found_map
from kvtcp.node.server import NodeServer
from kvtcp.runtime import process as runtime
from kvtcp.runtime.process import StartError
from tests.processes.cluster import free_ports


async def test_foreign_nodes_that_can_never_join(kvtcp_cluster: Any) -> None:
    """An address of --nodes with a node of another cluster is refused; one where nobody listens yet is waited for."""
    address = kvtcp_cluster.nodes["n1"].address
    with pytest.raises(StartError, match="meant for n1, is a node of another cluster"):
        await launch.survey({"n1": address}, "other", "secret")
    with runtime.bind("127.0.0.1", 0) as silent:
        found = await launch.survey({"n1": silent.getsockname()}, "other", "secret")
        assert found == {"n1": Found("free")}


async def test_a_first_start_needs_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new cluster waits for every one of --nodes, and says which did not come; one with data begins without some."""
    monkeypatch.setattr(launch, "START_S", 0.1)
    monkeypatch.setattr(launch, "RECOVER_WAIT_MS", 50)
    node = NodeServer("n1")
    await node.start("127.0.0.1", 0)
    map_store = await MapStore.open(MemoryConfigStore())
    nodes = {"n1": node.address, "n2": ("127.0.0.1", free_ports(1))}
    first = found_map(cluster="c", shards=1, factor=2, min_insync=1, durability="memory", nodes=nodes)
    supervisor = Supervisor("127.0.0.1", {}, Path(), [], lambda: None)
    config = ClusterConfig("s", "memory", Path())
    coordinator = launch.Coordinator(config, map_store, supervisor, asyncio.Event())
    try:
        with pytest.raises(StartError, match=r"after 0 s these nodes had not reported: n2 \(connection refused\)"):
            await coordinator._answering(first)
        await map_store.found(first)
        found = await coordinator._answering(first)
        assert found == {"n1": Found("ours"), "n2": Found("free")}
        await node.close()
        with pytest.raises(StartError, match="n1 .*, n2 "):
            await coordinator._answering(first)
    finally:
        await node.close()
        await map_store.close()
