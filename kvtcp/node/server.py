"""The node's server: a port, a disk, and the process around the core of a node.

I/O shell: it performs what the NodeCore decides. It listens on one port, and at a Unix socket for callers on the same
machine; connections are in connection.py, the disk in durability.py, transfers in donor.py and puller.py,
backups in backup.py. It implements the `NodeProcess` of the core.

An exception while applying, or an error of the disk, ends the process without another acknowledgement.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kvtcp.constants import ORPHAN_MS, SNAPSHOT_LOG_BYTES
from kvtcp.node.access import Identity
from kvtcp.node.backup import BackupJob
from kvtcp.node.connection import NodeConnection
from kvtcp.node.core import NodeCore
from kvtcp.node.donor import Donations
from kvtcp.node.durability import Durability
from kvtcp.node.learning import Learning
from kvtcp.node.puller import Pulls
from kvtcp.node.replica import FreezeRequest, Replicas
from kvtcp.node.stats import NodeStats
from kvtcp.protocol.link import STATS
from kvtcp.storage.disk.store import NodeStore
from kvtcp.storage.shard.copy import Copy

log = logging.getLogger("kvtcp.node")

LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


class NodeServer:
    """One node: its core, its port, its disk."""

    def __init__(
        self, node: str, *, cluster: str | None = None, secret: str | None = None,
        on_identity: Callable[[str, str], None] | None = None, on_stop: Callable[[], None] | None = None,
        spawned: bool = False, orphan_ms: int = ORPHAN_MS, store: NodeStore | None = None,
        snapshot_log_bytes: int = SNAPSHOT_LOG_BYTES,
    ) -> None:  # fmt: skip
        """`cluster` and `secret` None: the first coordinator that says HELLO founds them. `store` None keeps everything
        in memory."""
        self.loop = asyncio.get_running_loop()
        self.replica = _replica_of(node, store, self._retire)
        self.core = NodeCore(self.replica, self, Identity(cluster, secret))
        self.durability: Durability | None = None
        if store is not None:
            self.durability = self.core.persistence = self._open(store, snapshot_log_bytes)
        self.connections: set[NodeConnection] = set()
        self.address = ("", 0)
        self.stopped = asyncio.Event()
        self.failure: BaseException | None = None  # what ended the node, for the exit code
        self._on_identity = on_identity
        self._on_stop = on_stop
        self._spawned = spawned
        self._orphan_ms = orphan_ms  # a spawned node without a coordinator for so long stops
        self._orphan: asyncio.TimerHandle | None = None
        self._is_closing = False
        self._server: asyncio.Server | None = None
        self._local_server: asyncio.AbstractServer | None = None
        self._local_path: Path | None = None
        self._jobs: set[BackupJob] = set()
        self.donations = Donations(self.loop, self.replica)
        self.pulls = Pulls(self.loop, self.core, self.durability, self.failed)
        self._stats = NodeStats(
            self.loop, self.replica, self.durability, lambda: self.pulls.bytes_total,
            lambda stats: self.core.send((STATS, stats)),
        )  # fmt: skip

    @property
    def cluster(self) -> str | None:
        """The cluster that this node belongs to."""
        return self.core.identity.cluster

    @property
    def secret(self) -> str | None:
        """The secret of that cluster."""
        return self.core.identity.secret

    def _retire(self, copy: Copy) -> None:
        self.pulls.let_go(copy)

    def _open(self, store: NodeStore, snapshot_log_bytes: int) -> Durability:
        replica = self.replica
        return Durability(
            self.loop, store, on_durable=self.core.durable, on_failed=self.failed, on_space=self.core.space_changed,
            freeze=lambda shard: (replica.copies[shard].table.freeze(), replica.backlog.of_shard(shard)),
            snapshot_log_bytes=snapshot_log_bytes,
        )  # fmt: skip

    async def start(
        self, host: str, port: int, bound: socket.socket | None = None, local: Path | None = None
    ) -> None:
        """Listen, on this bound socket if there is one, and at the Unix socket `local`: a message there costs a third.
        Raises OSError if the port is taken."""
        if bound is None:
            self._server = await self.loop.create_server(lambda: NodeConnection(self), host, port)
        else:
            self._server = await self.loop.create_server(lambda: NodeConnection(self), sock=bound)
        self.address = self._server.sockets[0].getsockname()[:2]
        if local is not None:
            try:
                with suppress(FileNotFoundError):
                    os.unlink(local)  # of a process that is gone: this one has the directory
                self._local_path = local
                self._local_server = await self.loop.create_unix_server(lambda: NodeConnection(self), str(local))
            except OSError as error:  # it is served at its port all the same
                log.warning("event=no-local-socket node=%s reason=%s", self.replica.node, error)
        log.info("event=listening node=%s address=%s:%s pid=%s", self.replica.node, *self.address, os.getpid())
        self.unlinked()
        self._stats.start()

    def snapshot_all(self) -> None:
        """Snapshot what has changed, on demand."""
        if self.durability is not None:
            self.durability.snapshot_all()

    def leave(self) -> None:
        """Stop, after the coordinator took this node out of the in-sync sets."""
        self.core.leave()

    # --- what the core wants --------------------------------------------------------------------------

    def event(self, level: str, word: str, **fields: Any) -> None:
        """A line for the log."""
        if log.isEnabledFor(LEVELS[level]):
            text = " ".join([f"{name}={value}" for name, value in fields.items()])
            log.log(LEVELS[level], "event=%s node=%s %s", word, self.replica.node, text)

    def later(self, delay_ms: int, callback: Callable[[], None], /) -> None:
        """Call back, unless the node is ending."""
        self.loop.call_later(delay_ms / 1000, self._call_back, callback)

    def _call_back(self, callback: Callable[[], None]) -> None:
        if not self._is_closing and self.failure is None:
            callback()

    def founded(self, cluster: str, secret: str) -> None:
        """The node belongs to this cluster from now on."""
        if self._on_identity is not None:
            self._on_identity(cluster, secret)

    def linked(self) -> None:
        """There is a coordinator: a spawned node is no orphan."""
        if self._orphan is not None:
            self._orphan.cancel()
            self._orphan = None

    def unlinked(self) -> None:
        """There is none: a spawned node does not outlive its coordinator for long."""
        if self._spawned and self._orphan is None:
            self._orphan = self.loop.call_later(self._orphan_ms / 1000, self._orphaned)

    def _orphaned(self) -> None:
        log.warning("event=orphaned node=%s reason=no coordinator for %s ms", self.replica.node, self._orphan_ms)
        self.stop()

    def end_transfers(self, reason: str) -> None:
        """End everything that a link began."""
        for job in list(self._jobs):
            job.abort(reason)
        self.pulls.abort(reason)
        self.donations.abort(reason)

    def start_pull(self, learning: Learning, host: str, port: int, token: bytes) -> None:
        """Fetch a copy from another node."""
        self.pulls.start(learning, host, port, token)

    def end_pull(self, shard: int, reason: str) -> None:
        """End the pull of a shard, if there is one."""
        self.pulls.end(shard, reason)

    def donations_changed(self) -> None:
        """Donations began to wait, or ended."""
        self.donations.look()

    def start_backup(self, request: FreezeRequest) -> None:
        """Start writing what a batch froze."""
        job = BackupJob(self.loop, self.replica.node, request, self._backup_done)
        self._jobs.add(job)
        job.start()

    def _backup_done(self, job: BackupJob, report: dict[str, Any] | None, error: str | None) -> None:
        self._jobs.discard(job)
        self.core.backup_ended(job.name, report, error)

    def collect_young(self) -> None:
        """Collect young objects before there are too many."""
        gc.collect(0)

    def failed(self, error: BaseException) -> None:
        """An unexpected exception, or an error of the disk: this replica might differ from the others, or from
        what it acknowledged. Nothing more is acknowledged."""
        if isinstance(error, OSError):
            log.critical("event=disk-failed node=%s reason=%s", self.replica.node, error)
        else:
            log.critical("event=apply-failed node=%s reason=%r", self.replica.node, error, exc_info=error)
        self.failure = error
        for connection in list(self.connections):
            connection.abort()
        for server in (self._server, self._local_server):
            if server is not None:
                server.close()
        self.stop()

    def stop(self) -> None:
        """Stop, from inside."""
        self.stopped.set()
        if self._on_stop is not None:
            self._on_stop()

    async def close(self) -> None:
        """Close port and links."""
        self._is_closing = True
        self.linked()
        self._spawned = False
        self._stats.stop()
        self.end_transfers("the node stops")
        self.pulls.stop()
        for server in (self._server, self._local_server):
            if server is not None:
                server.close()
        if self._local_path is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._local_path)
        if self.durability is not None:
            await self.durability.close()
        for connection in list(self.connections):
            connection.close()
        await asyncio.sleep(0)


def _replica_of(node: str, store: NodeStore | None, retire: Callable[[Copy], None]) -> Replicas:
    """The replica of a new node, or one with what was recovered."""
    if store is None:
        return Replicas(node, os.getpid(), lambda: secrets.token_hex(8), retire=retire)
    manifest = store.manifest
    return Replicas(
        node, os.getpid(), lambda: secrets.token_hex(8), manifest.durability, store.copies.values(), store.backlog,
        manifest.promised, manifest.coordinator, manifest.map_version, cluster_map=manifest.map,
        generations=manifest.generations, retire=retire,
    )  # fmt: skip
