"""The node's server: an I/O shell around the Replica.

It listens on one port for the coordinator's link. The first frame must be a HELLO with this cluster's secret; after it
the newest link is the only one, older ones are closed with their unread input. Everything a read of the socket brings
is applied in one step and answered with one write. While the coordinator does not read, nothing more is applied (the
transport's high-water mark), so memory stays bounded in both directions.

Frames of a link are worked off in their order, batches and others alike. A connection whose first frame is GIVE is that
of another node, which pulls what this one donates (donations.py); this node's own transfers are in pulls.py. One whose
first frame is ASK is told what is here, and that changes nothing.

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
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kvtcp.constants import (
    LEAVE_MS,
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
    ASK,
    BACKUP,
    BATCH,
    ENTRIES,
    FETCH,
    GIVE,
    HELLO,
    LEARN_FAILED,
    LEARNED,
    LEAVE,
    LINK_VERSION,
    PULL,
    REFUSED,
    REPORT,
    RESULTS,
    SHIP,
    SHIPPED,
    SPACE,
    STATS,
    STOP,
    TOLD,
)
from kvtcp.replication.replica import Refused, Replica
from kvtcp.server.backup_job import BackupJob
from kvtcp.server.donations import Donations, DonationStream
from kvtcp.server.durability import Durability
from kvtcp.server.node_stats import NodeStats
from kvtcp.server.pulls import Pulls
from kvtcp.server.transport import FramedConnection
from kvtcp.storage.copy import Copy
from kvtcp.storage.store import NodeStore

log = logging.getLogger("kvtcp.node")

PAUSE_S: Final = 0.002  # between two slices of work that takes long: for batches
_FRAME_TYPES: Final = {FETCH: (int, int, int), SHIP: (int, int, list), PULL: (int, int, bytes, int, bytes)}


class LinkConnection(FramedConnection):
    """The node's end of a link."""

    def __init__(self, server: NodeServer) -> None:
        super().__init__(server.loop, LINK_FRAME_BYTES_MAX)
        self.server = server
        self.accepted = False  # its HELLO was; only then anything else is looked at
        self.stream: DonationStream | None = None  # it is not a link: another node pulls a copy
        self.inbox: deque[list[Any]] = deque()  # frames not yet worked off
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
            elif self.stream is not None:
                raise ProtocolError("a node that pulls a copy says nothing after GIVE")
            elif message[0] == HELLO and not self.accepted and len(message) == 2:
                self.server.hello(self, message[1])
            elif message[0] == GIVE and not self.accepted and len(message) == 2:
                self.server.give(self, message[1])
            elif message[0] == ASK and not self.accepted and len(message) == 2:
                self.server.asked(self, message[1])
            elif self.accepted and _FRAME_TYPES.get(message[0]) == tuple(map(type, message)):
                self.inbox.append(message)
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
            if inbox[0][0] != BATCH:  # what was applied before it is told already
                self.server.frame(self, inbox.popleft())
                continue
            if not self.running:
                replica.begin(*inbox[0][1:])
                self.running = True
            finished = replica.run(results)
            if finished:
                self.running = False
                heartbeat = not inbox.popleft()[3] or heartbeat
            is_last = not inbox or inbox[0][0] != BATCH
            if not finished or is_last or replica.results_bytes > RESULTS_BYTES_MAX:
                if self.server.log_applied(self) or results or heartbeat:
                    self.send_results(results)
                results = []
                heartbeat = False
        if self.server.durability is not None:
            self.server.durability.flush()
        if replica.freezes:
            self.server.start_backups()
        if replica.news:
            self.server.tell_news()

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
            if self.stream is not None:
                self.stream.resumed()
            else:
                self.apply()

    def closed(self, reason: str) -> None:
        self.inbox.clear()
        if self.stream is not None:
            self.stream.abort(f"the connection was lost: {reason}")
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
        self.replica = Replica(node, os.getpid(), lambda: secrets.token_hex(8), retire=self._retire)
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
        self._leaving: asyncio.TimerHandle | None = None  # the coordinator was told that this node is about to stop
        self._server: asyncio.Server | None = None
        self._local_server: asyncio.AbstractServer | None = None
        self._jobs: set[BackupJob] = set()
        self._catching_up = False  # the next slice of a buffer is due
        self.donations = Donations(self.loop, self.replica)
        self.pulls = Pulls(
            self.loop, self.replica, self.durability, self._identity, self.replica_changed, self.failed
        )
        self._stats = NodeStats(
            self.loop,
            self.replica,
            self.durability,
            lambda: self.pulls.bytes_total,
            lambda stats: self._send((STATS, stats)),
        )

    def _identity(self) -> tuple[str, str]:
        return self.cluster or "", self.secret or ""

    def _retire(self, copy: Copy) -> None:
        self.pulls.let_go(copy)

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
            generations=manifest.generations,
            retire=self._retire,
        )
        self.durability = Durability(
            self.loop,
            store,
            on_durable=self._durable,
            on_failed=self.failed,
            on_space=self._space_changed,
            freeze=lambda shard: (self.replica.copies[shard].table.freeze(), self.replica.kept.of_shard(shard)),
            snapshot_log_bytes=snapshot_log_bytes,
        )

    async def start(
        self, host: str, port: int, bound: socket.socket | None = None, local: Path | None = None
    ) -> None:
        """Listen, on this bound socket if there is one, and at the Unix socket `local`: a message there costs a third.
        Raises OSError if the port is taken."""
        if bound is None:
            self._server = await self.loop.create_server(lambda: LinkConnection(self), host, port)
        else:
            self._server = await self.loop.create_server(lambda: LinkConnection(self), sock=bound)
        self.address = self._server.sockets[0].getsockname()[:2]
        if local is not None:
            try:
                with suppress(FileNotFoundError):
                    os.unlink(local)  # of a process that is gone: this one has the directory
                self._local_server = await self.loop.create_unix_server(lambda: LinkConnection(self), str(local))
            except OSError as error:  # it is served at its port all the same
                log.warning("event=no-local-socket node=%s reason=%s", self.replica.node, error)
        log.info("event=listening node=%s address=%s:%s pid=%s", self.replica.node, *self.address, os.getpid())
        self._arm_orphan()
        self._stats.start()

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
        self._end_transfers("the link it was asked for on is gone")
        self._disarm_orphan()
        log.info("event=linked node=%s peer=%s epoch=%s link=%s", replica.node, connection.peer, epoch, number)
        if self.durability is None:
            self._report(connection, report)
        else:
            manifest = self.durability.store.manifest
            manifest.promised, manifest.coordinator = replica.promised, replica.coordinator
            manifest.map_version, manifest.map = replica.map_version, replica.map
            self.durability.write_manifest(replica.copies.values(), lambda: self._report(connection, report))

    def asked(self, connection: LinkConnection, fields: Any) -> None:
        """Somebody rebuilds a lost cluster map: tell what is here, as a restart would find it. Changes nothing."""
        names = (b"cluster", b"secret", b"node")
        if type(fields) is not dict or not all(type(fields.get(name)) is bytes for name in names):
            raise ProtocolError("an ASK lacks fields")
        code = why = ""
        if fields.get(b"version") != LINK_VERSION:
            code, why = "VERSION", f"this node speaks link version {LINK_VERSION}"
        elif self.secret is not None and not hmac.compare_digest(fields[b"secret"], self.secret.encode()):
            code, why = "SECRET", "the cluster's secret is not the one of this node"
        elif self.cluster is not None and fields[b"cluster"] != self.cluster.encode():
            code, why = "CLUSTER", f"this node belongs to cluster {self.cluster}"
        elif fields[b"node"] not in (b"", self.replica.node.encode()):
            code, why = "NODE", f"this is node {self.replica.node}"
        if code:
            connection.send((REFUSED, code, why, self.replica.promised, self.replica.map_version))
            connection.close()
            return
        told = self.replica.report()
        told["map"] = (self.replica.map if self.durability is None else self.durability.store.manifest.map) or None
        told["linked"] = self._link is not None

        def tell() -> None:
            connection.send((TOLD, told))
            connection.close()

        if self.durability is None:
            tell()
        else:
            self.durability.when_durable(tell)

    def _report(self, connection: LinkConnection, report: dict[str, Any]) -> None:
        """What the report says is durable: send it, and take frames from now on."""
        if connection is self._link:
            connection.accepted = True
            connection.send((REPORT, report))
            connection.flush()

    def _end_transfers(self, reason: str) -> None:
        """What a link began ends with it."""
        for job in list(self._jobs):
            job.abort(reason)
        self.pulls.abort(reason)
        self.donations.abort(reason)

    def _send(self, frame: Any) -> None:
        """To the coordinator, if there is one."""
        if self._link is not None and self._link.accepted:
            self._link.send(frame)
            self._link.flush()

    def frame(self, connection: LinkConnection, message: list[Any]) -> None:
        """A frame of the link that is no batch: entries are asked for or brought, or a copy is to be fetched."""
        kind, shard, *arguments = message
        if kind == FETCH:
            self._fetch(connection, shard, arguments[0])
        elif kind == SHIP:
            self._ship(connection, shard, arguments[0])
        else:
            host, port, token = arguments
            refused = self.pulls.start(shard, host.decode("utf-8", "replace"), port, token)
            if refused is not None:
                self._send((LEARN_FAILED, shard, refused))

    def _fetch(self, connection: LinkConnection, shard: int, after: int) -> None:
        """The answer may need an index of many entries, which is made in slices."""
        if connection is not self._link:
            return
        if not self.replica.kept.index_some():
            self.loop.call_later(PAUSE_S, self._fetch, connection, shard, after)
            return
        self._send((ENTRIES, shard, after, *self.replica.entries_after(shard, after)))

    def _ship(self, connection: LinkConnection, shard: int, entries: list[Any]) -> None:
        replica = self.replica
        error = replica.ship(shard, entries)
        copy = replica.copies.get(shard)
        position = (0, 0, 0) if copy is None else copy.table.position
        self.log_applied(connection)
        self._when_durable(connection, (SHIPPED, shard, *position, error))
        self.replica_changed()

    def _when_durable(self, connection: LinkConnection, frame: Any) -> None:
        """Send a frame when everything applied so far is durable, if the link is still the same."""

        def send() -> None:
            if connection is self._link:
                self._send(frame)

        if self.durability is None:
            send()
        else:
            self.durability.when_durable(send)

    # --- learning -----------------------------------------------------------------------------------

    def give(self, connection: LinkConnection, fields: Any) -> None:
        """Another node comes for what this one donates."""
        if type(fields) is not dict or not all(type(fields.get(name)) is bytes for name in (b"cluster", b"secret")):
            raise ProtocolError("a GIVE lacks fields")
        code, why = "TOKEN", "nothing is donated under this token, or not any more"
        if fields.get(b"version") != LINK_VERSION:
            code, why = "VERSION", f"this node speaks link version {LINK_VERSION}"
        elif (
            self.secret is None
            or self.cluster is None
            or not hmac.compare_digest(fields[b"secret"], self.secret.encode())
            or fields[b"cluster"] != self.cluster.encode()
        ):
            code, why = "SECRET", "cluster and secret are not those of this node"
        else:
            connection.stream = self.donations.give(connection, fields)
            if connection.stream is not None:
                return
        log.warning("event=give-refused peer=%s code=%s reason=%s", connection.peer, code, why)
        connection.send((REFUSED, code, why, self.replica.promised, self.replica.map_version))
        connection.close()

    def replica_changed(self) -> None:
        """Copies were changed without a batch: log it and tell it; what waits in buffers is applied in slices."""
        link = self._link
        if link is None:
            return
        try:
            more = self.replica.catch_up()
            self.log_applied(link)
        except Exception as error:
            link.abort()
            self.failed(error)
            return
        if self.durability is not None:
            self.durability.flush()
        self.tell_news()
        if more and not self._catching_up:
            self._catching_up = True
            self.loop.call_later(PAUSE_S, self._catch_up)

    def _catch_up(self) -> None:
        self._catching_up = False
        if self.failure is None:
            self.replica_changed()

    def tell_news(self) -> None:
        """Copies that are live, or could not be learned; donations that begin to wait."""
        replica = self.replica
        replica.news = False
        self.donations.look()
        link = self._link
        if link is None:
            return
        for shard, reason in replica.take_failed():
            log.warning("event=learn-failed node=%s shard=%s reason=%s", replica.node, shard, reason)
            self._send((LEARN_FAILED, shard, reason))
        was_doubtful = False
        for shard in replica.take_learned():
            copy = replica.copies[shard]
            was_doubtful = was_doubtful or bool(copy.reason)
            copy.reason = ""  # what was wrong with it is made good, by what others have
            log.info("event=learned node=%s shard=%s disk=%s seq=%s", replica.node, shard, copy.disk, copy.table.seq)
            self._when_durable(link, (LEARNED, shard, copy.disk, copy.generation, *copy.table.position))
        if was_doubtful and self.durability is not None:
            self.durability.write_manifest(replica.copies.values(), lambda: None)

    def _make_drops_durable(self, dropped: list[int]) -> None:
        log.info("event=dropped node=%s shards=%s", self.replica.node, dropped)
        if self.durability is not None:
            self.durability.change_copies(self.replica.copies.values())

    # --- the disk -----------------------------------------------------------------------------------

    def log_applied(self, connection: LinkConnection) -> bool:
        """Log what was applied; true if all of it is durable already."""
        replica = self.replica
        if replica.news:
            dropped = replica.take_dropped()
            if dropped:
                self._make_drops_durable(dropped)
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
        self._send((SPACE, level))

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
            self.replica.link_lost()
            self._end_transfers("the link closed")
            self._arm_orphan()
            if self._leaving is not None:
                self.stop_requested()

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
        self._send((BACKUP, job.name, report, error))

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
        for server in (self._server, self._local_server):
            if server is not None:
                server.close()
        self.stop_requested()

    def leave(self) -> None:
        """Stop, but let the coordinator take this node out of the in-sync sets first, so that no write waits for it. It
        answers with STOP; without a link, at the second call, or after LEAVE_MS the node stops as it is."""
        if self._link is None or not self._link.accepted or self._leaving is not None:
            self.stop_requested()
            return
        self._leaving = self.loop.call_later(LEAVE_MS / 1000, self.stop_requested)
        self._link.send((LEAVE,))
        self._link.flush()

    def stop_requested(self) -> None:
        """Stop, from inside."""
        self.stopped.set()
        if self._on_stop is not None:
            self._on_stop()

    async def close(self) -> None:
        """Close port and links."""
        self._disarm_orphan()
        if self._leaving is not None:
            self._leaving.cancel()
        self._spawned = False
        self._stats.stop()
        self._end_transfers("the node stops")
        self.pulls.stop()
        for server in (self._server, self._local_server):
            if server is not None:
                server.close()
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


