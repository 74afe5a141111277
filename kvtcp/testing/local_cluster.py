"""LocalCluster: the real coordinator and nodes inside one event loop, for tests.

It runs the same cores and the same servers as the processes do, over real sockets on 127.0.0.1 with free ports, in
memory; only the process boundary is missing. Everything is ready when `start` returns and gone when `close` does.

    async with LocalCluster(nodes=3) as cluster:
        async with kvtcp.connect(cluster.url) as kv:
            await kv.put("a", "1")
"""

from __future__ import annotations

import secrets
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from kvtcp.constants import HOST_DEFAULT, SHARDS_DEFAULT
from kvtcp.server.coordinator import ClusterConfig, CoordinatorServer
from kvtcp.server.node import NodeServer


class LocalCluster:
    """A cluster of `nodes` nodes in this process. `replication_factor` defaults to min(3, nodes)."""

    def __init__(
        self,
        nodes: int = 3,
        *,
        replication_factor: int | None = None,
        shards: int = SHARDS_DEFAULT,
        min_insync: int | None = None,
        backup_dir: Path | str | None = None,
    ) -> None:
        factor = min(3, nodes) if replication_factor is None else replication_factor
        if not 1 <= factor <= nodes:
            raise ValueError(f"a replication factor of {factor} needs at least {factor} nodes, there are {nodes}")
        self.node_count = nodes
        self.factor = factor
        self.shards = shards
        self.min_insync = min(2, factor) if min_insync is None else min_insync
        self.nodes: dict[str, NodeServer] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="kvtcp-") if backup_dir is None else None
        self.backup_dir = Path(self._temporary.name if self._temporary is not None else str(backup_dir))
        self._coordinator: CoordinatorServer | None = None

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
        """Start everything and wait until it serves."""
        cluster, secret = secrets.token_hex(8), secrets.token_hex(16)
        for number in range(1, self.node_count + 1):
            server = NodeServer(f"n{number}", cluster=cluster, secret=secret)
            await server.start(HOST_DEFAULT, 0)
            self.nodes[f"n{number}"] = server
        self._coordinator = CoordinatorServer(
            ClusterConfig(
                cluster=cluster,
                secret=secret,
                nodes={node: server.address for node, server in self.nodes.items()},
                shards=self.shards,
                factor=self.factor,
                min_insync=self.min_insync,
                backup_dir=self.backup_dir,
            )
        )
        self._coordinator.start_links()
        await self._coordinator.ready.wait()
        bound = socket.socket()
        bound.bind((HOST_DEFAULT, 0))
        await self._coordinator.listen(bound)
        return self

    async def close(self) -> None:
        """Stop everything."""
        if self._coordinator is not None:
            await self._coordinator.close()
        for server in self.nodes.values():
            await server.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
