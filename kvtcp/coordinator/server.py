"""The coordinator's server: an I/O shell around request handler and sequencer.

One event loop. Clients' sockets and nodes' links bring messages; the cores queue batches and answers; once per tick
(`_flush`, one `call_soon` however many messages came) every link and every client gets at most one write; a tick that
brings very many requests sends in between, so that nodes and clients have work meanwhile. No task and no future is made
for an operation.

Everything is decided in the Controller, the order included. Here what it says is performed (as a CoordinatorProcess):
frames sent, links closed and dialled, changes of the map stored, lines logged, clients let in. When it is deposed, no
client gets another answer, and the process ends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.map_store import MapStore, NotOwner, ends_of
from kvtcp.cluster.store import ConfigStoreError
from kvtcp.constants import (
    HEARTBEAT_MS,
    LEAVE_TIME_MS,
    SEND_REQUESTS,
    TICK_MS,
)
from kvtcp.coordinator.administration import Administration
from kvtcp.coordinator.backups import Backups
from kvtcp.coordinator.latency import WriteTimes
from kvtcp.coordinator.links import NodeLink
from kvtcp.coordinator.redis_info import RedisInfo
from kvtcp.coordinator.status import Status
from kvtcp.coordinator.takeover import CannotServe, Predecessor, stale_store
from kvtcp.frontend.clients import Clients
from kvtcp.frontend.keyspace import Keyspace
from kvtcp.frontend.native.handler import RequestHandler
from kvtcp.frontend.port import Port
from kvtcp.frontend.resp.service import RespService
from kvtcp.protocol.link import Report
from kvtcp.replication.controller import Controller
from kvtcp.replication.membership.recovery import StaleStore
from kvtcp.replication.sequencing.link import Link
from kvtcp.runtime.clock import wall_ms, wall_us

log = logging.getLogger("kvtcp.coordinator")

HEARTBEAT_TICKS = HEARTBEAT_MS // TICK_MS
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(frozen=True)
class ClusterConfig:
    """What a coordinator is started with, beyond the map."""

    secret: str
    durability: str
    backup_dir: Path
    resp: bool = True  # clients of Redis are served too
    local_sockets: Mapping[str, Path] = field(default_factory=dict)  # Unix sockets of the nodes that are watched here


class CoordinatorServer:
    """One coordinator: the client port, the links, the cores. It owns the map of `map_store` (see `own_map`)."""

    def __init__(self, config: ClusterConfig, map_store: MapStore, before: Predecessor) -> None:
        self.loop = asyncio.get_running_loop()
        self.address: tuple[str, int] = ("", 0)
        self.secret = config.secret
        self.local_sockets = config.local_sockets
        self.map_store = map_store
        map_store.changes.on_change.append(lambda stored: self.begin())  # a turn, in which the next listeners act
        map_store.on_crash = self.core_failed
        self.controller = Controller(
            map_store.changes, durability=config.durability, map_version_before=before.map_version,
            stamp_before_ms=before.stamp_bound_ms, new_token=lambda: secrets.token_bytes(16),
        )  # fmt: skip
        self.controller.ownership.on_deposed = self._deposed
        self.sequencer = self.controller.sequencer
        self.links = {node: NodeLink(node, self.controller, self) for node in self.map.nodes}
        self.clients = Clients(lambda: int(self.loop.time() * 1000), lambda: self.sequencer.waiting_bytes)
        self.keyspace = Keyspace(self.map.shards)
        self.backups = Backups(
            config.backup_dir, self.sequencer, self.keyspace, begin=self.begin, remember=self.remember_restoring,
            start_task=self._start_task,
        )  # fmt: skip
        self.file_done = self.backups.file_done  # of links
        self.store_map = map_store.wake  # of the controller
        self.write_times = WriteTimes(self.sequencer.shards, self.loop.time)
        self.status = Status(self.controller, self.links, self.clients, self.backups, self.write_times)
        administration = Administration(
            self.controller, self.backups, self.status, config.secret, begin=self.begin,
            act=lambda: self.controller.act(self), start_task=self._start_task,
        )  # fmt: skip
        self.handler = RequestHandler(self.sequencer, self.keyspace, administration.requests)
        info = RedisInfo(self.status, self.clients, lambda: self.address[1])
        service = None
        if config.resp:
            service = RespService(self.sequencer, self.keyspace, info, self.clients.now_ms, wall_us, secrets.randbelow)
        self.port = Port(self.clients, self.begin, self.requests_read, self.handler, service)
        self.progressed_at = self.loop.time()  # when a node last reported
        self.on_node_removed: Callable[[str], None] = lambda node: None
        self.ready = asyncio.Event()  # the shards were taken over
        self.failed: asyncio.Future[None] = self.loop.create_future()  # an error that must end the process
        self._killed = False  # it ends without another word
        self._unsent = 0  # requests read since the last time everything was sent
        self._flushing = False  # a flush is scheduled: this tick's stamp is fixed
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._ticks = 0
        self._tick_due = 0.0
        self._tick_handle: asyncio.TimerHandle | None = None

    @property
    def map(self) -> ClusterMap:
        """The cluster map as the config store holds it."""
        return self.controller.map

    # --- life ---------------------------------------------------------------------------------------

    def start_links(self) -> None:
        """Dial the nodes and let time pass."""
        for link in self.links.values():
            link.start(self._start_task)
        self._schedule_tick()

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that must not fail: an exception of it ends the process."""
        task = self.loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def core_failed(self, error: BaseException) -> None:
        """End the process: an unexpected error may have damaged its state."""
        if not self.failed.done():
            if isinstance(error, CannotServe):
                log.critical("event=cannot-serve reason=%s", error)
            else:
                log.critical("event=core-failed reason=%r", error, exc_info=error)
            self.failed.set_exception(error)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.core_failed(error)

    async def wait_ready(self) -> None:
        """Return when the shards are served. Raises CannotServe, and what else ends the coordinator before."""
        waiting: asyncio.Future[Any] = self.loop.create_task(self.ready.wait())
        failed: asyncio.Future[Any] = self.failed
        await asyncio.wait({waiting, failed}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self.failed.done():
            self.failed.result()

    async def listen(self, bound: socket.socket) -> None:
        """Accept clients on this bound socket."""
        self._server = await self.loop.create_server(self.port.connection, sock=bound, backlog=1024)
        self.address = self._server.sockets[0].getsockname()[:2]

    async def drain(self, wait_ms: int) -> None:
        """Take no new clients and read no new requests; return when the open ones are answered, or after `wait_ms`."""
        if self._server is not None:
            self._server.close()
        await self.clients.drain(wait_ms)

    async def kill(self) -> None:
        """End as a killed process does: nothing more is sent."""
        self._killed = True
        self.clients.abort()
        for link in self.links.values():
            link.closing = True
            if link.connection is not None:
                link.connection.abort()
        await self.close()

    async def close(self) -> None:
        """Stop serving: no new clients, answers flushed, links closed."""
        await self.backups.close()
        if self._tick_handle is not None:
            self._tick_handle.cancel()
        if self._server is not None:
            self._server.close()
        self._flush()
        self.clients.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in self.links.values():
            link.close()
        if self.ready.is_set() and not self.failed.done() and not self._killed:
            await self._leave_time()
        await self.map_store.close()
        self.failed.cancel()
        await asyncio.sleep(0)

    # --- ticks --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a turn, unless one is under way: it has one stamp, and is flushed at its end."""
        if not self._flushing:
            self._flushing = True
            self.controller.begin(wall_ms(), int(self.loop.time() * 1000))
            self.loop.call_soon(self._flush)

    def requests_read(self, requests: int) -> None:
        """Send in between when a turn reads very many requests: nodes and clients are not kept waiting for its end."""
        self._unsent += requests
        if self._unsent >= SEND_REQUESTS:
            self._unsent = 0
            self.controller.end_turn(self)

    def _flush(self) -> None:
        self._flushing = False
        self._unsent = 0
        self.controller.end_turn(self)

    def _schedule_tick(self) -> None:
        self._tick_due = self.loop.time() + TICK_MS / 1000
        self._tick_handle = self.loop.call_later(TICK_MS / 1000, self._tick)

    def _tick(self) -> None:
        lag_ms = self.status.lag_ms = max(0.0, (self.loop.time() - self._tick_due) * 1000)
        self._ticks += 1
        self.begin()
        self.controller.tick()
        self.controller.act(self)
        for link in self.links.values():
            # after a stall of this process no node can be called silent: its answers may still lie in the sockets
            link.watch_silence(self.sequencer.now_ms, lag_ms >= HEARTBEAT_MS)
        if self._ticks % HEARTBEAT_TICKS == 0:
            for link in self.links.values():
                link.heartbeat()
        self.clients.tick()
        self._schedule_tick()

    # --- the map, and the end of ownership ----------------------------------------------------------

    async def _leave_time(self) -> None:
        """Store the last stamp, so that the next coordinator need not begin with the bound, seconds ahead."""
        stored: asyncio.Future[ClusterMap] = self.loop.create_future()
        self.controller.ownership.end(*ends_of(stored))
        self.map_store.wake()
        try:
            async with asyncio.timeout(LEAVE_TIME_MS / 1000):
                await stored
        except (OSError, NotOwner, ConfigStoreError) as error:  # a TimeoutError is an OSError
            log.warning("event=time-not-left reason=%s", error or "no answer in time")

    def _deposed(self, reason: str) -> None:
        """End: another coordinator owns the cluster. R13: from this moment on no client is answered."""
        self.clients.abort()
        if self._server is not None:
            self._server.close()
        sentence = f"this coordinator does not own the cluster any more: {reason}"
        self.core_failed(CannotServe(sentence, not self.ready.is_set()))

    async def remember_restoring(self, prefix: bytes | None) -> None:
        """Store for the next coordinator which prefix is in pieces, None for none. Raises OSError."""
        try:
            await self.map_store.change(lambda old: replace(old, restoring=prefix))
        except (NotOwner, ConfigStoreError) as error:
            raise OSError(f"the cluster map cannot be stored: {error}") from error

    # --- nodes --------------------------------------------------------------------------------------

    def node_reported(self, link: NodeLink, report: Report) -> None:
        """Take a node into use that answered HELLO: from now on batches flow."""
        self.begin()
        assert link.connection is not None, "a node reports on its connection"
        link.connection.live = True
        self.progressed_at = self.loop.time()
        try:
            self.controller.node_up(link.node, report)
        except StaleStore as error:
            self.core_failed(CannotServe(stale_store(str(error)), not self.ready.is_set()))
            return
        self.controller.act(self)

    def node_progressed(self) -> None:
        """Let the controller act on a frame at once."""
        self.progressed_at = self.loop.time()
        self.controller.act(self)

    def node_lost(self, node: str, reason: str) -> None:
        """Fail what waits for a node whose link is gone, or could not be made."""
        self.backups.node_lost(node)
        self.begin()
        self.controller.node_down(node, reason)
        self.controller.act(self)

    # --- what the controller wants: a CoordinatorProcess ---------------------------------------------

    def event(self, level: str, word: str, **fields: Any) -> None:
        """Log a line."""
        text = " ".join(f"{name}={value}" for name, value in fields.items())
        log.log(_LEVELS[level], "event=%s %s", word, text)

    def send(self, node: str, frame: tuple[Any, ...]) -> None:
        """Send a frame to a node, if it is linked."""
        connection = self.links[node].connection
        if connection is not None:
            connection.send(frame)
            connection.flush()

    def close_link(self, node: str, reason: str) -> None:
        """Close the connection to a node; it is dialled again."""
        self.links[node].give_up(reason)

    def add_node(self, node: str) -> None:
        """Dial a node that came."""
        link = self.links[node] = NodeLink(node, self.controller, self)
        link.start(self._start_task)

    def remove_node(self, node: str) -> None:
        """Stop a node that left the cluster, and dial it no more."""
        link = self.links.pop(node)
        link.stop_node()
        link.end()
        self.on_node_removed(node)

    def open(self) -> None:
        """Let clients in."""
        self.backups.resume(self.map.restoring)
        self.ready.set()

    def write_batches(self, links: list[Link]) -> None:
        """Write the batches of these links, then what clients are answered."""
        self.write_times.look(links)
        for link in links:
            self.links[link.node].write_batches()
        if self.clients.dirty:
            self.clients.flush()
