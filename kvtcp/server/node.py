"""The node's server: an I/O shell around the Replica.

It listens on one port for the coordinator's link. The first frame must be a HELLO with this cluster's secret; after it
the newest link is the only one, older ones are closed with their unread input. Everything a read of the socket brings
is applied in one step and answered with one write. While the coordinator does not read, nothing more is applied (the
transport's high-water mark), so memory stays bounded in both directions.

With a disk (`Durability`) results are sent at once, and acknowledged as durable when they are: a frame of RESULTS that
has nothing to tell but that waits for the end of the sync that is under way. A report is sent when the promise, new
copies and everything applied are durable.

An exception while applying, or an error of the disk, ends the process without another acknowledgement: a replica that
went on after it might differ from the others.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from kvtcp.constants import (
    LINK_FRAME_BYTES_MAX,
    LINK_WRITE_BUFFER_BYTES,
    ORPHAN_MS,
    RESULTS_BYTES_MAX,
    SHARDS_MAX,
    SNAPSHOT_LOG_BYTES,
    YOUNG_CELLS_MAX,
)
from kvtcp.errors import ProtocolError
from kvtcp.protocol.link import (
    BACKUP,
    BATCH,
    ENTRIES,
    FETCH,
    HELLO,
    REFUSED,
    REPORT,
    RESULTS,
    SHIP,
    SHIPPED,
    SPACE,
    STOP,
)
from kvtcp.replication.replica import Refused, Replica
from kvtcp.server.backup_job import BackupJob
from kvtcp.server.durability import Durability
from kvtcp.server.transport import FramedConnection
from kvtcp.storage.store import NodeStore

log = logging.getLogger("kvtcp.node")


class LinkConnection(FramedConnection):
    """The node's end of a link."""

    def __init__(self, server: NodeServer) -> None:
        super().__init__(server.loop, LINK_FRAME_BYTES_MAX)
        self.server = server
        self.accepted = False  # its HELLO was; only then anything else is looked at
        self.inbox: deque[list[Any]] = deque()  # batches not yet applied
        self.running = False  # the batch at the head of the inbox is half done
        self.durable = 0  # ordinal up to which everything is durable

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=LINK_WRITE_BUFFER_BYTES)
        self.server.connections.add(self)

    def messages_received(self, messages: list[Any]) -> None:
        for message in messages:
            if type(message) is not list or not message:
                raise ProtocolError("a frame of a link is an array [kind, ...]")
            if self.accepted and message[0] == BATCH and len(message) == 4:
                self.inbox.append(message)
            elif message[0] == HELLO and not self.accepted and len(message) == 2:
                self.server.hello(self, message[1])
            elif self.accepted and message[0] in (FETCH, SHIP) and len(message) == 3:
                self.server.recovery_frame(self, message)
            elif self.accepted and message[0] == STOP:
                log.info("event=stop node=%s reason=asked by the coordinator", self.server.replica.node)
                self.server.stop_requested()
            else:
                raise ProtocolError("the first frame of a link is HELLO with the cluster's secret")
        if self.inbox:
            self.apply()

    def apply(self) -> None:
        """Apply what is in the inbox; whatever goes wrong there ends the node."""
        try:
            self.run()
        except Exception as error:
            self.abort()
            self.server.failed(error)

    def run(self) -> None:
        """Apply what is in the inbox as far as the coordinator reads the results."""
        replica = self.server.replica
        inbox = self.inbox
        results: list[Any] = []
        heartbeat = False  # a batch without items wants an answer of its own
        while inbox and not self.write_paused:
            if not self.running:
                replica.begin(*inbox[0][1:])
                self.running = True
            finished = replica.run(results)
            if finished:
                self.running = False
                heartbeat = not inbox.popleft()[3] or heartbeat
            if not finished or not inbox or replica.results_bytes > RESULTS_BYTES_MAX:
                if self.server.log_applied(self) or results or heartbeat:
                    self.send_results(results)
                results = []
                heartbeat = False
        if self.server.durability is not None:
            self.server.durability.flush()
        if replica.freezes:
            self.server.start_backups()

    def send_results(self, results: list[Any]) -> None:
        """What was applied, and what of it is durable."""
        replica = self.server.replica
        self.send((RESULTS, replica.applied, self.durable, results, replica.take_flags()))
        self.flush()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport is not None:
            self.transport.resume_reading()
            self.apply()

    def closed(self, reason: str) -> None:
        self.inbox.clear()
        self.server.connection_closed(self, reason)


class NodeServer:
    """One node: its replica, its port, its links."""

    def __init__(
        self,
        node: str,
        *,
        cluster: str | None = None,
        secret: str | None = None,
        on_identity: Callable[[str, str], None] | None = None,
        on_stop: Callable[[], None] | None = None,
        spawned: bool = False,
        orphan_ms: int = ORPHAN_MS,
        store: NodeStore | None = None,
        snapshot_log_bytes: int = SNAPSHOT_LOG_BYTES,
    ) -> None:
        """`store` None keeps everything in memory."""
        self.loop = asyncio.get_running_loop()
        self.durability: Durability | None = None
        self.replica = Replica(node, os.getpid(), lambda: secrets.token_hex(8))
        if store is not None:
            self._open(node, store, snapshot_log_bytes)
        self.cluster = cluster  # None: the first coordinator that says HELLO creates the identity
        self.secret = secret
        self.connections: set[LinkConnection] = set()
        self.address = ("", 0)
        self.stopped = asyncio.Event()
        self.failure: BaseException | None = None  # what ended the node, for the exit code
        self._on_identity = on_identity
        self._on_stop = on_stop
        self._spawned = spawned
        self._orphan_ms = orphan_ms  # a spawned node without a coordinator for so long stops
        self._link: LinkConnection | None = None  # the newest accepted link
        self._young_cells = 0  # made since the last young collection, at most
        self._link_number = 0  # of the newest accepted link; only grows
        self._orphan: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None
        self._jobs: set[BackupJob] = set()

    def _open(self, node: str, store: NodeStore, snapshot_log_bytes: int) -> None:
        """Go on with what was recovered."""
        manifest = store.manifest
        self.replica = Replica(
            node,
            os.getpid(),
            lambda: secrets.token_hex(8),
            manifest.durability,
            store.copies.values(),
            store.kept,
            manifest.promised,
            manifest.coordinator,
            manifest.map_version,
        )
        self.durability = Durability(
            self.loop,
            store,
            on_durable=self._durable,
            on_failed=self.failed,
            on_space=self._space_changed,
            freeze=lambda shard: (self.replica.tables[shard].freeze(), self.replica.kept.of_shard(shard)),
            snapshot_log_bytes=snapshot_log_bytes,
        )

    async def start(self, host: str, port: int, bound: socket.socket | None = None) -> None:
        """Listen, on this bound socket if there is one. Raises OSError if the port is taken."""
        if bound is None:
            self._server = await self.loop.create_server(lambda: LinkConnection(self), host, port)
        else:
            self._server = await self.loop.create_server(lambda: LinkConnection(self), sock=bound)
        self.address = self._server.sockets[0].getsockname()[:2]
        log.info("event=listening node=%s address=%s:%s pid=%s", self.replica.node, *self.address, os.getpid())
        self._arm_orphan()

    def hello(self, connection: LinkConnection, fields: Any) -> None:
        """Accept or refuse a link."""
        replica = self.replica
        try:
            if type(fields) is not dict or not _hello_is_complete(fields):
                raise ProtocolError("a HELLO lacks fields")
            cluster, secret = fields[b"cluster"].decode(), fields[b"secret"].decode()
            if self.secret is not None:
                if not hmac.compare_digest(secret.encode(), self.secret.encode()):
                    raise Refused("SECRET", "the cluster's secret is not the one of this node")
                if cluster != self.cluster:
                    raise Refused("CLUSTER", f"this node belongs to cluster {self.cluster}")
            epoch, number = fields[b"epoch"], fields[b"link"]
            if epoch == replica.promised and number <= self._link_number and replica.coordinator:
                raise Refused("LINK", f"link {number} is older than link {self._link_number}")
            report = replica.hello(fields)
            if self.secret is None:  # only now: a coordinator that is refused, or just asks, founds no cluster
                self.cluster, self.secret = cluster, secret
                if self._on_identity is not None:
                    self._on_identity(cluster, secret)
        except Refused as refused:
            asked = type(fields) is dict and fields.get(b"epoch") == 0  # a coordinator that only asks who is here
            level = logging.DEBUG if asked else logging.WARNING
            log.log(level, "event=hello-refused peer=%s code=%s reason=%s", connection.peer, refused.code, refused)
            connection.send((REFUSED, refused.code, str(refused), replica.promised, replica.map_version))
            connection.close()
            return
        self._link_number = number
        older, self._link = self._link, connection
        if older is not None:
            older.inbox.clear()
            older.accepted = False
            older.abort()
        for job in list(self._jobs):
            job.abort("the link it was asked for on is gone")
        self._disarm_orphan()
        log.info("event=linked node=%s peer=%s epoch=%s link=%s", replica.node, connection.peer, epoch, number)
        if self.durability is None:
            self._report(connection, report)
        else:
            manifest = self.durability.store.manifest
            manifest.promised, manifest.coordinator = replica.promised, replica.coordinator
            manifest.map_version, manifest.map = replica.map_version, replica.map
            self.durability.write_manifest(replica.copies.values(), lambda: self._report(connection, report))

    def _report(self, connection: LinkConnection, report: dict[str, Any]) -> None:
        """What the report says is durable: send it, and take frames from now on."""
        if connection is self._link:
            connection.accepted = True
            connection.send((REPORT, report))
            connection.flush()

    def recovery_frame(self, connection: LinkConnection, message: list[Any]) -> None:
        """A takeover asks for entries, or brings some."""
        kind, shard, argument = message
        replica = self.replica
        if kind == FETCH:
            connection.send((ENTRIES, shard, argument, *replica.entries_after(shard, argument)))
            connection.flush()
            return
        error = replica.ship(shard, argument)
        copy = replica.copies.get(shard)
        position = (0, 0, 0) if copy is None else copy.table.position

        def shipped() -> None:
            if connection is self._link:
                connection.send((SHIPPED, shard, *position, error))
                connection.flush()

        self.log_applied(connection)
        if self.durability is None:
            shipped()
        else:
            self.durability.when_durable(shipped)

    # --- the disk -----------------------------------------------------------------------------------

    def log_applied(self, connection: LinkConnection) -> bool:
        """Log what was applied; true if all of it is durable already."""
        replica = self.replica
        entries = replica.take_logged()
        self._young_cells += len(entries)
        if self._young_cells > YOUNG_CELLS_MAX:
            self._young_cells = 0
            gc.collect(0)
        if self.durability is None or self.durability.append(entries, connection, replica.applied):
            connection.durable = replica.applied
            return True
        return False

    def _durable(self, connection: LinkConnection, ordinal: int) -> None:
        """Everything up to this ordinal of a connection is durable."""
        if ordinal == connection.durable:
            return  # entries that were shipped, or those of half a batch
        connection.durable = ordinal
        if connection is self._link and connection.accepted:
            connection.send_results([])

    def _space_changed(self, level: int) -> None:
        self.replica.space = level
        if self._link is not None and self._link.accepted:
            self._link.send((SPACE, level))
            self._link.flush()

    def snapshot_all(self) -> None:
        """Snapshot what has changed, on demand."""
        if self.durability is not None:
            self.durability.snapshot_all()

    def connection_closed(self, connection: LinkConnection, reason: str) -> None:
        """A connection is gone; a spawned node does not outlive its coordinator for long."""
        self.connections.discard(connection)
        if connection is self._link:
            log.info("event=link-closed node=%s reason=%s", self.replica.node, reason)
            self._link = None
            for job in list(self._jobs):
                job.abort("the link closed")
            self._arm_orphan()

    def _arm_orphan(self) -> None:
        if self._spawned and self._orphan is None:
            self._orphan = self.loop.call_later(self._orphan_ms / 1000, self._orphaned)

    def _disarm_orphan(self) -> None:
        if self._orphan is not None:
            self._orphan.cancel()
            self._orphan = None

    def _orphaned(self) -> None:
        log.warning("event=orphaned node=%s reason=no coordinator for %s ms", self.replica.node, self._orphan_ms)
        self.stop_requested()

    def start_backups(self) -> None:
        """Start writing what the last batches froze."""
        while self.replica.freezes:
            job = BackupJob(self.loop, self.replica.node, self.replica.freezes.popleft(), self._backup_done)
            self._jobs.add(job)
            job.start()

    def _backup_done(self, job: BackupJob, report: dict[str, Any] | None, error: str | None) -> None:
        self._jobs.discard(job)
        if self._link is not None:
            self._link.send((BACKUP, job.name, report, error))
            self._link.flush()

    def failed(self, error: BaseException) -> None:
        """An exception nobody expected, or an error of the disk: this replica might differ from the others, or from
        what it acknowledged. Nothing more is acknowledged."""
        if isinstance(error, OSError):
            log.critical("event=disk-failed node=%s reason=%s", self.replica.node, error)
        else:
            log.critical("event=apply-failed node=%s reason=%r", self.replica.node, error, exc_info=error)
        self.failure = error
        for connection in list(self.connections):
            connection.abort()
        if self._server is not None:
            self._server.close()
        self.stop_requested()

    def stop_requested(self) -> None:
        """Stop, from inside."""
        self.stopped.set()
        if self._on_stop is not None:
            self._on_stop()

    async def close(self) -> None:
        """Close port and links."""
        self._disarm_orphan()
        self._spawned = False
        for job in list(self._jobs):
            job.abort("the node stops")
        if self._server is not None:
            self._server.close()
        if self.durability is not None:
            await self.durability.close()
        for connection in list(self.connections):
            connection.close()
        await asyncio.sleep(0)


_HELLO_FIELDS = {
    b"version": int, b"cluster": bytes, b"secret": bytes, b"epoch": int, b"coordinator": bytes, b"link": int,
    b"node": bytes, b"shards": list, b"map_version": int, b"heard_version": int,
    b"durability": bytes,
}  # fmt: skip


def _hello_is_complete(fields: dict[bytes, Any]) -> bool:
    if not all(type(fields.get(name)) is kind for name, kind in _HELLO_FIELDS.items()):
        return False
    if type(fields.get(b"map")) not in (bytes, type(None)):
        return False
    try:
        for name, kind in _HELLO_FIELDS.items():
            if kind is bytes:
                fields[name].decode()
        (fields.get(b"map") or b"").decode()
    except UnicodeDecodeError:
        return False
    return all(type(shard) is int and 0 <= shard < SHARDS_MAX for shard in fields[b"shards"])


