"""The coordinator's server: an I/O shell around gateway and sequencer.

One event loop. Clients' sockets and nodes' links bring messages; the cores queue batches and answers; once per tick
(`_flush`, one `call_soon` however many messages came) every link and every client gets at most one write; a tick that
brings very many requests sends in between, so that nodes and clients have work meanwhile. No task and no future is made
for an operation.

Everything that is decided is decided in the Controller; here its frames are sent, its links closed and dialled, its
changes of the map stored, its events logged (`_act`). Clients are let in when every shard is served, or known to be
down, and what the takeover found is in the map.

The map belongs to this coordinator until another one changes it or a node refuses its epoch (R13). Then it is
`deposed`: no client gets another answer, and the process ends.
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

from kvtcp.cluster.keeper import MapKeeper, NotOwner
from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.store import ConfigStoreError
from kvtcp.constants import (
    HEARTBEAT_MS,
    LEAVE_TIME_MS,
    SEND_REQUESTS,
    STAMP_AHEAD_MS,
    STAMP_MOVE_MS,
    TICK_MS,
)
from kvtcp.coordinator.administration import Administration
from kvtcp.coordinator.backups import Backups
from kvtcp.coordinator.latency import WriteTimes
from kvtcp.coordinator.links import NodeLink
from kvtcp.coordinator.redis_info import RedisInfo
from kvtcp.coordinator.status import Status
from kvtcp.coordinator.takeover import CannotServe, Predecessor, stale_store, wall_ms, wall_us
from kvtcp.frontend.clients import Clients
from kvtcp.frontend.keyspace import Keyspace
from kvtcp.frontend.native.gateway import Gateway
from kvtcp.frontend.port import Port
from kvtcp.frontend.resp.service import Door
from kvtcp.protocol.link import Report
from kvtcp.replication.controller import Controller
from kvtcp.replication.membership.recovery import StaleStore

log = logging.getLogger("kvtcp.coordinator")

HEARTBEAT_TICKS = HEARTBEAT_MS // TICK_MS
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
BOUND_RETRY_MS = 1_000  # after the config store did not take the next bound of stamps


@dataclass(frozen=True)
class ClusterConfig:
    """What a coordinator is started with, beyond the map."""

    secret: str
    durability: str
    backup_dir: Path
    resp: bool = True  # clients of Redis are served too
    local_sockets: Mapping[str, Path] = field(default_factory=dict)  # Unix sockets of the nodes that are watched here


class CoordinatorServer:
    """One coordinator: the client port, the links, the cores. It owns the map of `keeper` (see `own_map`)."""

    def __init__(self, config: ClusterConfig, keeper: MapKeeper, before: Predecessor) -> None:
        self.loop = asyncio.get_running_loop()
        self.secret = config.secret
        self.local_sockets = config.local_sockets
        self.keeper = keeper
        keeper.changes.on_lost = lambda error: self.deposed(str(error))
        keeper.changes.on_change.append(lambda stored: self.begin())  # a turn, in which the next listeners act
        keeper.on_crash = self.core_failed
        self._before = before
        self.controller = Controller(
            keeper.changes,
            durability=config.durability,
            map_version_before=before.map_version,
            stamp_before_ms=before.stamp_bound_ms,
            new_token=lambda: secrets.token_bytes(16),
        )
        self.sequencer = self.controller.sequencer
        self.links = {node: NodeLink(node, self.controller, self) for node in self.map.nodes}
        self.clients = Clients(lambda: int(self.loop.time() * 1000), lambda: self.sequencer.waiting_bytes)
        self.keyspace = Keyspace(self.map.shards)
        self.backups = Backups(
            config.backup_dir,
            self.sequencer,
            self.keyspace,
            begin=self.begin,
            remember=self.remember_restoring,
            start_task=self._start_task,
        )
        self.write_times = WriteTimes(self.sequencer.shards, self.loop.time)
        self.status = Status(self.controller, self.links, self.clients, self.backups, self.write_times)
        administration = Administration(
            self.controller,
            self.backups,
            self.status,
            config.secret,
            begin=self.begin,
            act=self._act,
            start_task=self._start_task,
        )
        self.gateway = Gateway(self.sequencer, self.keyspace, administration.requests)
        info = RedisInfo(self.status, self.clients, lambda: self.address[1])
        door = None
        if config.resp:
            door = Door(self.sequencer, self.keyspace, info, self.clients.now_ms, wall_us, secrets.randbelow)
        self.port = Port(self.clients, self.begin, self.requests_read, self.gateway, door)
        self.progressed_at = self.loop.time()  # when a node last reported
        self.on_node_removed: Callable[[str], None] = lambda node: None
        self.address = ("", 0)
        self.ready = asyncio.Event()  # the shards were taken over
        self.failed: asyncio.Future[None] = self.loop.create_future()  # an error that must end the process
        self._killed = False  # it ends without another word
        self.is_deposed = False  # the nodes belong to another coordinator: they are not to be stopped
        self._unsent = 0  # requests read since the last time everything was sent
        self._flushing = False  # a flush is scheduled: this tick's stamp is fixed
        self._is_opening = False  # the takeover is over: what it found is being stored
        self._tasks: set[asyncio.Task[None]] = set()
        self._bound_task: asyncio.Task[None] | None = None  # moves the bound of stamps
        self._bound_retry_ms = 0  # monotonic time before which that is not tried again
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
        await self.keeper.close()
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
            self._send()

    def _flush(self) -> None:
        self._flushing = False
        self._send()

    def _send(self) -> None:
        """Send everything that is queued."""
        self._unsent = 0
        controller = self.controller
        if controller.is_talkative:
            self._act()
        ready = self.sequencer.close_batches()
        self.write_times.look(ready)
        for progress in ready:
            self.links[progress.node].write_batches()
        if self.clients.dirty:
            self.clients.flush()

    def _schedule_tick(self) -> None:
        self._tick_due = self.loop.time() + TICK_MS / 1000
        self._tick_handle = self.loop.call_later(TICK_MS / 1000, self._tick)

    def _tick(self) -> None:
        lag_ms = self.status.lag_ms = max(0.0, (self.loop.time() - self._tick_due) * 1000)
        self._ticks += 1
        self.begin()
        self.controller.tick()
        self._act()
        for link in self.links.values():
            # after a stall of this process no node can be called silent: its answers may still lie in the sockets
            link.watch_silence(self.sequencer.now_ms, lag_ms >= HEARTBEAT_MS)
        if self._ticks % HEARTBEAT_TICKS == 0:
            for link in self.links.values():
                link.heartbeat()
        self._watch_bound()
        self.clients.tick()
        self._schedule_tick()

    # --- the map: opening, the bound of stamps, the end of ownership --------------------------------

    async def _open_shards(self) -> None:
        """Store what the takeover found, then serve."""
        shards = self.sequencer.shards
        reports = self.controller.reports.values()
        stamp_ms = max([self._before.stamp_bound_ms, *(report.stamp_ms for report in reports)])

        def edit(old: ClusterMap) -> ClusterMap:
            is_empty = not any(shard.last_seq or not shard.serving for shard in shards)
            new = replace(old, durability=self.controller.durability, restoring=None if is_empty else old.restoring)
            return new if stamp_ms <= new.stamp_bound_ms else new.with_stamp_bound(stamp_ms + STAMP_AHEAD_MS)

        stored: asyncio.Future[ClusterMap] = self.loop.create_future()
        self.controller.proposals.propose(edit, stored.set_result)
        self.keeper.wake()
        await stored
        self.begin()
        self.sequencer.stamp_ms = max(self.sequencer.stamp_ms, stamp_ms)
        self.backups.resume(self.map.restoring)
        self.ready.set()
        log.info("event=ready cluster=%s nodes=%s epoch=%s", self.map.cluster, len(self.links), self.map.epoch)

    def _watch_bound(self) -> None:
        """R12: move the bound of stamps before the clock reaches it."""
        is_near = wall_ms() + STAMP_MOVE_MS > self.map.stamp_bound_ms
        may_try = self._bound_task is None and self.clients.now_ms() >= self._bound_retry_ms
        if is_near and may_try and self.ready.is_set():
            self._bound_task = self._start_task(self._move_bound(), "bound of stamps")

    async def _move_bound(self) -> None:
        try:
            await self.keeper.change(lambda old: old.with_stamp_bound(wall_ms() + STAMP_AHEAD_MS))
            self.status.bound_failed = ""
        except NotOwner:
            return  # `deposed` was called
        except (OSError, ConfigStoreError) as error:
            log.error("event=bound-not-moved reason=%s", error)
            self.status.bound_failed = str(error)
            self._bound_retry_ms = self.clients.now_ms() + BOUND_RETRY_MS
        finally:
            self._bound_task = None

    async def _leave_time(self) -> None:
        """Store the last stamp, so that the next coordinator need not begin with the bound, seconds ahead."""
        stamp_ms = self.sequencer.end_time()
        try:
            async with asyncio.timeout(LEAVE_TIME_MS / 1000):
                await self.keeper.change(lambda old: old.with_last_stamp(stamp_ms))
        except (OSError, NotOwner, ConfigStoreError) as error:  # a TimeoutError is an OSError
            log.warning("event=time-not-left reason=%s", error or "no answer in time")

    def deposed(self, reason: str) -> None:
        """End: another coordinator owns the cluster. R13: from this moment on no client is answered."""
        self.clients.abort()
        if self._server is not None:
            self._server.close()
        self.is_deposed = True
        self.core_failed(
            CannotServe(f"this coordinator does not own the cluster any more: {reason}", not self.ready.is_set())
        )

    def fenced(self, link: NodeLink) -> None:
        """End, as a node refused this coordinator's epoch, unless it is starting: then `refused` says why."""
        if self.ready.is_set():
            self.deposed(f"{link.node} says: {link.refused}")

    async def remember_restoring(self, prefix: bytes | None) -> None:
        """Store for the next coordinator which prefix is in pieces, None for none. Raises OSError."""
        try:
            await self.keeper.change(lambda old: replace(old, restoring=prefix))
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
        self._act()

    def node_frame(self, node: str, message: list[Any]) -> None:
        """Pass a frame to the controller. Raises LinkError if it cannot be true."""
        self.progressed_at = self.loop.time()
        self.controller.on_frame(node, message)
        self._act()

    def node_lost(self, node: str, reason: str) -> None:
        """Fail what waits for a node whose link is gone."""
        self.backups.node_lost(node)
        self.begin()
        self.controller.node_down(node, reason)
        self._act()

    def _act(self) -> None:
        """Do what the controller wants."""
        controller = self.controller
        for level, word, fields in controller.take_events():
            text = " ".join(f"{name}={value}" for name, value in fields.items())
            log.log(_LEVELS[level], "event=%s %s", word, text)
        for kind, node, *rest in controller.take_actions():
            if kind == "send":
                connection = self.links[node].connection
                if connection is not None:
                    connection.send(rest[0])
                    connection.flush()
            elif kind == "close":
                self.links[node].give_up(rest[0])
            elif kind == "add":
                link = self.links[node] = NodeLink(node, self.controller, self)
                link.start(self._start_task)
            else:
                link = self.links.pop(node)
                link.stop_node()
                link.end()
                self.on_node_removed(node)
        self.keeper.wake()
        if controller.is_ready and not self._is_opening:
            self._is_opening = True
            self._start_task(self._open_shards(), "end of the takeover")

    def file_done(self, node: str, name: bytes, report: Any, error: bytes | None) -> None:
        """See Backups."""
        self.backups.file_done(node, name, report, error)

    def link_failed(self, link: NodeLink, reason: str) -> None:
        """Remember why a node is not linked."""
        self.begin()
        self.controller.node_down(link.node, reason)
        log.debug("event=link-failed node=%s reason=%s", link.node, reason)
