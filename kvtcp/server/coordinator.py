"""The coordinator's server: an I/O shell around gateway and sequencer.

One event loop. Clients' sockets and nodes' links bring messages; the cores queue batches and answers; once per tick
(`_flush`, one `call_soon` however many messages came) every link and every client gets at most one write; a tick that
brings very many requests sends in between, so that nodes and clients have work meanwhile. No task and no future is made
for an operation.

Everything that is decided is decided in the Controller; here its frames are sent, its links closed and dialled, its
changes of the map stored, its events logged (`_act`). Clients are let in when every shard is served, or known to be
down, and what the takeover found is in the map.

The map belongs to this coordinator until somebody else changes it or a node refuses its epoch (R13). Then it is
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

from kvtcp.config_store.keeper import MapKeeper, NotOwner
from kvtcp.config_store.store import ConfigStoreError
from kvtcp.constants import (
    BUFFERED_BYTES_MAX,
    CLIENT_CONNECTIONS_MAX,
    HEARTBEAT_MS,
    LEAVE_TIME_MS,
    SEND_REQUESTS,
    STAMP_AHEAD_MS,
    STAMP_MOVE_MS,
    TICK_MS,
    WRITE_WAIT_MS,
)
from kvtcp.errors import AdminError, Code
from kvtcp.protocol.link import Report
from kvtcp.replication.cluster_admin import Admin, Done
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.controller import Controller
from kvtcp.replication.gateway import Gateway, Session
from kvtcp.replication.recovery import StaleStore
from kvtcp.resp.door import Door
from kvtcp.server import status
from kvtcp.server.backups import Backups
from kvtcp.server.caps import FOR_STOP, FOR_TOTAL, CappedConnection
from kvtcp.server.links import NodeLink
from kvtcp.server.ownership import CannotServe, Predecessor, stale_store, wall_ms, wall_us
from kvtcp.server.resp_host import RespHost
from kvtcp.server.runtime import join_address
from kvtcp.server.sessions import ClientSession
from kvtcp.server.supervisor import who_is_there
from kvtcp.server.write_times import WriteTimes

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
        self.durability = config.durability
        self.local_sockets = config.local_sockets
        self.keeper = keeper
        keeper.changes.on_lost = lambda error: self.deposed(str(error))
        keeper.changes.on_change.append(lambda cluster_map: self.begin())  # the parts of the core are next
        self._before = before
        self.controller = Controller(
            keeper.changes,
            map_version_before=before.map_version,
            stamp_before_ms=before.stamp_bound_ms,
            new_token=lambda: secrets.token_bytes(16),
        )
        self.sequencer = self.controller.sequencer
        keeper.on_crash = self.core_failed
        self.write_times = WriteTimes(self.sequencer.shards, self.loop.time)
        self.gateway = Gateway(self.sequencer, self)
        self.backups = Backups(self, config.backup_dir)
        self.links = {node: NodeLink(self, node) for node in self.map.nodes}
        self.progressed_at = self.loop.time()  # when a node last reported
        self.on_node_removed: Callable[[str], None] = lambda node: None
        self.restarts_of: Callable[[str], int | None] = lambda node: None  # of a process; None = it is not watched here
        self.door = Door(self.gateway, RespHost(self), self.now_ms, wall_us, secrets.randbelow) if config.resp else None
        self.sessions: set[CappedConnection] = set()
        self.dirty: list[CappedConnection] = []  # sessions with answers to flush in this tick
        self.address = ("", 0)
        self.ready = asyncio.Event()  # the shards were taken over
        self.failed: asyncio.Future[None] = self.loop.create_future()  # an error that must end the process
        self._killed = False  # it ends without another word
        self.is_deposed = False  # the nodes belong to another coordinator: they are not to be stopped
        self.protocol_errors = 0
        self.buffered_bytes = 0  # held for clients, as of the last tick
        self.held_bytes = 0  # held for clients by their sessions, at any time
        self.lag_ms = 0.0  # how late the last tick was
        self._unsent = 0  # requests read since the last time everything was sent
        self._flushing = False  # a flush is scheduled: this tick's stamp is fixed
        self._is_opening = False  # the takeover is over: what it found is being stored
        self._over_total = False  # clients are not read because of the total cap
        self._over_since_ms = 0  # since when; meaningful while _over_total
        self._tasks: set[asyncio.Task[None]] = set()
        self._bound_task: asyncio.Task[None] | None = None  # moves the bound of stamps
        self.bound_failed = ""  # why the config store did not take it, for people; empty = it did
        self._bound_retry_ms = 0  # monotonic time before which that is not tried again
        self._server: asyncio.Server | None = None
        self._ticks = 0
        self._started_at = self.loop.time()
        self._tick_due = 0.0
        self._tick_handle: asyncio.TimerHandle | None = None

    @property
    def map(self) -> ClusterMap:
        """The cluster map as the config store holds it."""
        return self.keeper.map

    # --- life ---------------------------------------------------------------------------------------

    def start_links(self) -> None:
        """Dial the nodes and let time pass."""
        for link in self.links.values():
            self._start_link(link)
        self._schedule_tick()

    def _start_link(self, link: NodeLink) -> None:
        link.task = self._start_task(link.run(), f"link to {link.node}")

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task that must not fail."""
        task = self.loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self.core_task_done)
        return task

    def core_failed(self, error: BaseException) -> None:
        """Something unexpected happened where it must not: the process ends rather than go on with damaged state."""
        if not self.failed.done():
            if isinstance(error, CannotServe):
                log.critical("event=cannot-serve reason=%s", error)
            else:
                log.critical("event=core-failed reason=%r", error, exc_info=error)
            self.failed.set_exception(error)

    def deposed(self, reason: str) -> None:
        """Another coordinator owns the cluster. R13: from this moment on no client is answered."""
        for session in list(self.sessions):
            session.abort()
        if self._server is not None:
            self._server.close()
        self.is_deposed = True
        self.core_failed(
            CannotServe(f"this coordinator does not own the cluster any more: {reason}", not self.ready.is_set())
        )

    def core_task_done(self, task: asyncio.Task[None]) -> None:
        """Done callback of tasks that must not fail: the exception of one ends the process."""
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
        self._server = await self.loop.create_server(lambda: ClientSession(self), sock=bound, backlog=1024)
        self.address = self._server.sockets[0].getsockname()[:2]

    async def drain(self, wait_ms: int) -> None:
        """Take no new clients and read no new requests; return when the open ones are answered, or after `wait_ms`."""
        if self._server is not None:
            self._server.close()
        for session in self.sessions:
            session.pause(FOR_STOP)
        deadline = self.loop.time() + wait_ms / 1000
        # looked at now and then: an event would have to be kept on the path of every answer
        while self.loop.time() < deadline and any(s.outstanding or s.out for s in self.sessions):  # noqa: ASYNC110
            await asyncio.sleep(TICK_MS / 1000 / 5)

    async def kill(self) -> None:
        """End as a process does that is killed: nothing more is said to anybody."""
        self._killed = True
        for session in list(self.sessions):
            session.abort()
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
        for session in list(self.sessions):
            session.close()
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

    def uptime_s(self) -> float:
        """How long the coordinator runs."""
        return self.loop.time() - self._started_at

    def now_ms(self) -> int:
        """Monotonic milliseconds, for deadlines."""
        return int(self.loop.time() * 1000)

    def begin(self) -> None:
        """Something happened: this tick gets its stamp, and is flushed at its end."""
        if not self._flushing:
            self._flushing = True
            self.controller.begin(wall_ms(), int(self.loop.time() * 1000))
            self.loop.call_soon(self._flush)

    def took(self, requests: int) -> None:
        """A client sent so many requests. Nodes and clients are not kept waiting until very many are read."""
        self._unsent += requests
        if self._unsent >= SEND_REQUESTS:
            self._send()

    def _flush(self) -> None:
        self._flushing = False
        self._send()

    def _send(self) -> None:
        """Everything that is to go out."""
        self._unsent = 0
        controller = self.controller
        if controller.is_talkative:
            self._act()
        ready = self.sequencer.close_batches()
        self.write_times.look(ready)
        for progress in ready:
            self.links[progress.node].write_batches()
        dirty = self.dirty
        if dirty:
            self.dirty = []
            for session in dirty:
                session.flush()

    def _schedule_tick(self) -> None:
        self._tick_due = self.loop.time() + TICK_MS / 1000
        self._tick_handle = self.loop.call_later(TICK_MS / 1000, self._tick)

    def _tick(self) -> None:
        self.lag_ms = max(0.0, (self.loop.time() - self._tick_due) * 1000)
        self._ticks += 1
        self.begin()
        self.controller.tick()
        self._act()
        for link in self.links.values():
            # after a stall of this process nobody can be called silent: what they said may still lie in the sockets
            link.watch_silence(self.sequencer.now_ms, self.lag_ms >= HEARTBEAT_MS)
        if self._ticks % HEARTBEAT_TICKS == 0:
            for link in self.links.values():
                link.heartbeat()
        self._watch_bound()
        now_ms = self.now_ms()
        for session in [s for s in self.sessions if s.frame_is_late(now_ms)]:
            log.warning("event=session-closed peer=%s reason=its frame was never finished", session.peer)
            session.abort()
        for session in list(self.sessions):
            session.look_at_unread()
        self._enforce_total()
        self._schedule_tick()

    # --- the map ------------------------------------------------------------------------------------

    def _watch_bound(self) -> None:
        """R12: move the bound of stamps before the clock reaches it."""
        is_near = wall_ms() + STAMP_MOVE_MS > self.map.stamp_bound_ms
        if is_near and self.ready.is_set() and self._bound_task is None and self.now_ms() >= self._bound_retry_ms:
            self._bound_task = self._start_task(self._move_bound(), "bound of stamps")

    async def _move_bound(self) -> None:
        try:
            await self.keeper.change(lambda old: old.with_stamp_bound(wall_ms() + STAMP_AHEAD_MS))
            self.bound_failed = ""
        except NotOwner:
            return  # `deposed` was told
        except (OSError, ConfigStoreError) as error:
            log.error("event=bound-not-moved reason=%s", error)
            self.bound_failed = str(error)
            self._bound_retry_ms = self.now_ms() + BOUND_RETRY_MS
        finally:
            self._bound_task = None

    async def _leave_time(self) -> None:
        """Nothing gets a stamp any more: the next coordinator need not begin with the bound, seconds ahead."""
        stamp_ms = self.sequencer.end_time()
        try:
            async with asyncio.timeout(LEAVE_TIME_MS / 1000):
                await self.keeper.change(lambda old: old.with_last_stamp(stamp_ms))
        except (OSError, NotOwner, ConfigStoreError) as error:  # a TimeoutError is an OSError
            log.warning("event=time-not-left reason=%s", error or "no answer in time")

    async def remember_restoring(self, prefix: bytes | None) -> None:
        """The next coordinator shall know which prefix is in pieces; None for none. Raises OSError if it will not."""
        try:
            await self.keeper.change(lambda old: replace(old, restoring=prefix))
        except (NotOwner, ConfigStoreError) as error:
            raise OSError(f"the cluster map cannot be stored: {error}") from error

    # --- clients ------------------------------------------------------------------------------------

    def session_opened(self, session: CappedConnection) -> None:
        """A client connected."""
        self.sessions.add(session)
        if len(self.sessions) > CLIENT_CONNECTIONS_MAX:
            log.warning("event=session-refused peer=%s reason=%s connections", session.peer, CLIENT_CONNECTIONS_MAX)
            session.abort()
        elif self._over_total:
            session.pause(FOR_TOTAL)

    def session_closed(self, session: CappedConnection, reason: str) -> None:
        """A client is gone; what it asked for is still executed."""
        self.sessions.discard(session)

    def account(self, difference_bytes: int) -> None:
        """A session holds so much more (or less); at once, as much can come within one tick."""
        self.held_bytes += difference_bytes
        if self.held_bytes > BUFFERED_BYTES_MAX:
            self._enforce_total()

    def _enforce_total(self) -> None:
        """Keep what is held for all clients under BUFFERED_BYTES_MAX.

        Over it nobody is read any more. What waits for nodes is gone after WRITE_WAIT_MS, but unfinished frames and
        unread answers may stay for ever, and would keep everybody out: the sessions that hold most of them are closed,
        at once as far as they are over the limit by themselves, else when waiting did not help.
        """
        held = held_by_sessions = sum(session.held_bytes for session in self.sessions)
        held += self.sequencer.waiting_bytes
        self.buffered_bytes = held
        resume_bytes = BUFFERED_BYTES_MAX * 3 // 4
        if held > BUFFERED_BYTES_MAX and not self._over_total:
            self._over_total = True
            self._over_since_ms = self.now_ms()
            log.warning("event=over-total held_bytes=%s limit_bytes=%s", held, BUFFERED_BYTES_MAX)
            for session in self.sessions:
                session.pause(FOR_TOTAL)
        if not self._over_total:
            return
        late = self.now_ms() - self._over_since_ms > WRITE_WAIT_MS
        allowed_bytes = resume_bytes - 1 if late else BUFFERED_BYTES_MAX
        if held_by_sessions > allowed_bytes:
            for session in sorted(self.sessions, key=lambda session: session.held_bytes, reverse=True):
                log.warning(
                    "event=session-closed peer=%s reason=the server holds %s bytes for clients, the limit is %s, "
                    "and this client holds most of them (%s)",
                    session.peer, held, BUFFERED_BYTES_MAX, session.held_bytes,
                )  # fmt: skip
                held_by_sessions -= session.held_bytes
                held -= session.held_bytes
                session.abort()
                if held_by_sessions <= allowed_bytes:
                    break
        if held < resume_bytes:
            self._over_total = False
            for session in self.sessions:
                session.resume(FOR_TOTAL)

    # --- nodes --------------------------------------------------------------------------------------

    def node_reported(self, link: NodeLink, report: Report) -> None:
        """A node answered HELLO: from now on batches flow."""
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
        """A frame for the core. Raises LinkError if it cannot be true."""
        self.progressed_at = self.loop.time()
        self.controller.on_frame(node, message)
        self._act()

    def node_lost(self, node: str, reason: str) -> None:
        """The link of a node that had reported is gone."""
        self.backups.node_lost(node)
        self.begin()
        self.controller.node_down(node, reason)
        self._act()

    def _act(self) -> None:
        """Do what the core wants."""
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
                link = self.links[node] = NodeLink(self, node)
                self._start_link(link)
            else:
                link = self.links.pop(node)
                link.stop_node()
                link.end()
                self.on_node_removed(node)
        self.keeper.wake()
        if controller.is_ready and not self._is_opening:
            self._is_opening = True
            self._start_task(self._open_shards(), "end of the takeover")

    async def _open_shards(self) -> None:
        """Store what the takeover found, then serve."""
        shards = self.sequencer.shards
        reports = self.controller.reports.values()
        stamp_ms = max([self._before.stamp_bound_ms, *(report.stamp_ms for report in reports)])

        def edit(old: ClusterMap) -> ClusterMap:
            is_empty = not any(shard.last_seq or not shard.serving for shard in shards)
            new = replace(old, durability=self.durability, restoring=None if is_empty else old.restoring)
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

    def fenced(self, link: NodeLink) -> None:
        """A node refused this coordinator's epoch."""
        if self.ready.is_set():
            self.deposed(f"{link.node} says: {link.refused}")

    def link_failed(self, link: NodeLink, reason: str) -> None:
        """A node cannot be reached, or refused."""
        self.begin()
        self.controller.node_down(link.node, reason)
        log.debug("event=link-failed node=%s reason=%s", link.node, reason)

    # --- administration -----------------------------------------------------------------------------

    def start_backup(self, session: Session, ident: int, name: str | None) -> None:
        """See Backups."""
        self.backups.start_backup(session, ident, name)

    def start_restore(
        self, session: Session, ident: int, name: str, mode: str, prefix: bytes, dry_run: bool
    ) -> None:
        """See Backups."""
        self.backups.start_restore(session, ident, name, mode, prefix, dry_run)

    def node_add(self, session: Session, ident: int, host: str, port: int) -> None:
        """A node at this address becomes one of the cluster."""
        self._start_task(self._add_node(session, ident, host, port), "node add")

    async def _add_node(self, session: Session, ident: int, host: str, port: int) -> None:
        """A wrong address would be a node for ever that is never linked, and keep the next coordinator from starting:
        look who is there before."""
        node = f"n{self.map.last_node + 1}"
        if (host, port) not in self.map.nodes.values():  # else it is refused below
            found = await who_is_there(host, port, node, self.map.cluster, self.secret)
            self.begin()  # a tick, at whose end the answer leaves
            if found.kind != "ours":
                what = f"is {found.what}" if found.what else "nobody answers"
                text = f"at {join_address(host, port)} {what}; start the new node there with --id {node}, then add it"
                session.fail(ident, Code.REFUSED, text, {})
                return
        self._change(session, ident, lambda admin, done: admin.add_node(host, port, done))

    def node_drain(self, session: Session, ident: int, node: str) -> None:
        """Everything a node holds is to be moved to others."""
        self._change(session, ident, lambda admin, done: admin.drain(node, done))

    def node_undrain(self, session: Session, ident: int, node: str) -> None:
        """A node may hold shards again."""
        self._change(session, ident, lambda admin, done: admin.undrain(node, done))

    def node_remove(self, session: Session, ident: int, node: str) -> None:
        """A node that holds nothing leaves the cluster."""
        self._change(session, ident, lambda admin, done: admin.remove(node, done))

    def node_forget(self, session: Session, ident: int, node: str) -> None:
        """A node is destroyed: it will never come back with what it held."""
        self._change(session, ident, lambda admin, done: admin.forget(node, done))

    def rebalance(self, session: Session, ident: int, dry_run: bool) -> None:
        """Spread the shards evenly over the nodes, by the fewest moves."""
        self._change(session, ident, lambda admin, done: admin.rebalance(dry_run, done))

    def shard_accept_loss(self, session: Session, ident: int, shard: int) -> None:
        """A shard that is down goes on with what is left of it."""
        self._change(session, ident, lambda admin, done: admin.accept_loss(shard, done))

    def _change(self, session: Session, ident: int, change: Callable[[Admin, Done], None]) -> None:
        """Answer when the change is stored; its refusal is an answer too."""

        def done(answer: dict[str, Any] | AdminError) -> None:
            if isinstance(answer, AdminError):
                session.fail(ident, answer.code, answer.message, answer.details)
            else:
                session.reply(ident, answer)

        change(self.controller.admin, done)
        self._act()

    def degraded(self) -> list[str]:
        """Everything that is not as it should be, one sentence each."""
        return status.degraded(self)

    def status(self) -> dict[str, Any]:
        """The map of `status`; docs/administration.md explains every key."""
        return status.status(self)

    def nodes(self) -> list[dict[str, Any]]:
        """The list of `nodes`."""
        return status.nodes(self)

    def shards(self) -> list[dict[str, Any]]:
        """The list of `shards`."""
        return status.shards(self)
