"""LocalCluster: the real coordinator and nodes inside one event loop, for tests.

LocalCluster runs the same cores and servers as the processes do, over real sockets on 127.0.0.1 with free ports, in
memory; only the process boundary is missing. Everything is ready when `start` returns and gone when `close` does.

    async with LocalCluster(nodes=3) as cluster:
        async with kvtcp.connect(cluster.url) as kv:
            await kv.put("a", "1")
            await cluster.kill_node("n2")

    with LocalCluster.run_in_thread() as cluster:           # no event loop of one's own
        with kvtcp.sync.connect(cluster.url) as kv: ...

A node is killed as a process would be: port, link and data are gone at once. The others continue to serve, and to take
writes as long as `min_insync` of them are left. A restarted node has the same address and is empty; it learns
everything from the others and is in sync again (`status`). A restarted coordinator takes the nodes over as they are.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvtcp.cluster.map_store import MapStore
from kvtcp.cluster.memory_store import MemoryConfigStore
from kvtcp.constants import HOST_DEFAULT, SHARDS_DEFAULT
from kvtcp.coordinator.server import ClusterConfig, CoordinatorServer
from kvtcp.coordinator.supervisor import Found
from kvtcp.coordinator.takeover import check_store, found_map, own_map
from kvtcp.node.server import NodeServer

START_S = 10.0  # for all nodes to report
STOP_S = 10.0  # for the thread of run_in_thread to end


class LocalCluster:
    """A cluster of `nodes` nodes in this process. `replication_factor` defaults to min(3, nodes).

    `durability` can be "memory" only.
    """

    def __init__(
        self, nodes: int = 3, *, replication_factor: int | None = None, shards: int = SHARDS_DEFAULT,
        min_insync: int | None = None, durability: str = "memory", backup_dir: Path | str | None = None,
        resp: bool = True,
    ) -> None:  # fmt: skip
        if durability != "memory":
            raise ValueError(f"a LocalCluster keeps its data in memory, durability cannot be {durability!r}")
        factor = min(3, nodes) if replication_factor is None else replication_factor
        if not 1 <= factor <= nodes:
            raise ValueError(f"a replication factor of {factor} needs at least {factor} nodes, there are {nodes}")
        self.node_count = nodes
        self.factor = factor
        self.shards = shards
        self.min_insync = min(2, factor) if min_insync is None else min_insync
        self.durability = durability
        self.resp = resp
        self.nodes: dict[str, NodeServer] = {}
        self.store = MemoryConfigStore()
        self._temporary = tempfile.TemporaryDirectory(prefix="kvtcp-") if backup_dir is None else None
        self.backup_dir = Path(self._temporary.name if self._temporary is not None else str(backup_dir))
        self._coordinator: CoordinatorServer | None = None  # None before `start` and after `close`
        self._identity = (secrets.token_hex(8), secrets.token_hex(16))  # cluster id and secret
        self._addresses: dict[str, tuple[str, int]] = {}  # where a node listens, or did before it was killed

    @property
    def coordinator(self) -> CoordinatorServer:
        """The coordinator's server. RuntimeError before `start`."""
        if self._coordinator is None:
            raise RuntimeError("the cluster is not started")
        return self._coordinator

    @property
    def url(self) -> str:
        """Address for clients."""
        host, port = self.coordinator.address
        return f"kvtcp://{host}:{port}"

    async def start(self) -> Self:
        """Start everything and wait until it serves. After a failure nothing is left.

        Raises TimeoutError if the nodes did not report within START_S; RuntimeError if it is started already.
        """
        if self._coordinator is not None:
            raise RuntimeError("the cluster is started already")
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def _start(self) -> None:
        for number in range(1, self.node_count + 1):
            await self._start_node(f"n{number}", 0)
        await self._start_coordinator(0)

    async def _start_coordinator(self, port: int) -> None:
        cluster, secret = self._identity
        map_store = await MapStore.open(self.store)
        replicas = {node: server.replica for node, server in self.nodes.items()}
        check_store(map_store, {node: Found("ours", "", r.promised, r.map_version) for node, r in replicas.items()})
        first = found_map(
            cluster=cluster, shards=self.shards, factor=self.factor, min_insync=self.min_insync,
            durability=self.durability, nodes=self._addresses,
        )  # fmt: skip
        before = await own_map(map_store, first)
        config = ClusterConfig(secret, self.durability, self.backup_dir, self.resp)
        self._coordinator = CoordinatorServer(config, map_store, before)
        self._coordinator.start_links()
        async with asyncio.timeout(START_S):
            await self._coordinator.wait_ready()
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((HOST_DEFAULT, port))
            await self._coordinator.listen(bound)
        except BaseException:
            bound.close()
            raise

    async def _start_node(self, node: str, port: int) -> None:
        cluster, secret = self._identity
        server = NodeServer(node, cluster=cluster, secret=secret)
        await server.start(HOST_DEFAULT, port)
        self._addresses[node] = server.address
        self.nodes[node] = server

    async def close(self) -> None:
        """Stop everything. May be called again, and before `start`."""
        coordinator, self._coordinator = self._coordinator, None
        if coordinator is not None:
            await coordinator.close()
        while self.nodes:
            _, server = self.nodes.popitem()
            await server.close()
        if self._temporary is not None:
            self._temporary.cleanup()
        await asyncio.sleep(0)  # transports report their end in the next turn of the loop

    # --- faults -------------------------------------------------------------------------------------

    async def kill_node(self, node: str) -> None:
        """End a node at once: its link breaks, its port is free, its data is gone. KeyError if it does not run."""
        server = self.nodes.pop(node)
        for connection in list(server.connections):
            connection.abort()
        await server.close()

    async def restart_node(self, node: str) -> None:
        """Start a killed node again, empty, at its old address; a running one is killed first."""
        if node in self.nodes:
            await self.kill_node(node)
        await self._start_node(node, self._addresses[node][1])

    async def restart_coordinator(self) -> None:
        """End the coordinator at once and start the next one at the same address, over the nodes, which keep running.

        Its clients lose their connections; writes without an answer have an unknown outcome.
        """
        port = self.coordinator.address[1]
        coordinator, self._coordinator = self.coordinator, None
        await coordinator.kill()
        await self._start_coordinator(port)

    def cut_link(self, node: str) -> None:
        """Break the connection between coordinator and node; the coordinator dials again. KeyError if unknown."""
        connection = self.coordinator.links[node].connection
        if connection is not None:
            connection.abort()

    # --- without an event loop ----------------------------------------------------------------------

    @classmethod
    @contextmanager
    def run_in_thread(cls, nodes: int = 3, **arguments: Any) -> Iterator[ThreadCluster]:
        """A started cluster in a thread with an event loop of its own; `arguments` are those of LocalCluster."""
        cluster = ThreadCluster(cls, {"nodes": nodes, **arguments})
        try:
            yield cluster
        finally:
            cluster.close()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class ThreadCluster:
    """A LocalCluster in a thread of its own. Made by `LocalCluster.run_in_thread`; may be used from any thread."""

    def __init__(self, kind: type[LocalCluster], arguments: dict[str, Any]) -> None:
        self.url = ""  # address for clients
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvtcp-cluster", daemon=True)
        self._thread.start()
        try:
            self._cluster = self._run(self._make(kind, arguments))
        except BaseException:
            self._end()
            raise
        self.url = self._cluster.url

    @staticmethod
    async def _make(kind: type[LocalCluster], arguments: dict[str, Any]) -> LocalCluster:
        return await kind(**arguments).start()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def kill_node(self, node: str) -> None:
        """See LocalCluster."""
        self._run(self._cluster.kill_node(node))

    def restart_node(self, node: str) -> None:
        """See LocalCluster."""
        self._run(self._cluster.restart_node(node))

    def restart_coordinator(self) -> None:
        """See LocalCluster."""
        self._run(self._cluster.restart_coordinator())

    def cut_link(self, node: str) -> None:
        """See LocalCluster."""

        async def cut() -> None:
            self._cluster.cut_link(node)

        self._run(cut())

    def close(self) -> None:
        """Stop everything and end the thread. May be called again."""
        if self._loop.is_closed():
            return
        try:
            self._run(self._cluster.close())
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            raise RuntimeError(f"the thread of the cluster did not end within {STOP_S:g} s")
        self._loop.close()
