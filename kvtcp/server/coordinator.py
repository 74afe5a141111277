"""The coordinator's server: an I/O shell around gateway and sequencer.

One event loop. Clients' sockets and nodes' links bring messages; the cores queue batches and answers; once per tick
(`_flush`, one `call_soon` however many messages came) every link and every client gets at most one write. No task and
no future is made for an operation.

Readiness: when every node of the map has reported, the sequencer takes the shards over; from then on a node that
reconnects goes on where it was, and one that lost its data serves nothing (`bad`, shown by `status`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtcp._version import __version__
from kvtcp.constants import (
    BUFFERED_BYTES_MAX,
    CLIENT_CONNECTIONS_MAX,
    EVICT_AFTER_MS,
    HEARTBEAT_MS,
    TICK_MS,
    WRITE_WAIT_MS,
)
from kvtcp.errors import show_bytes
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.gateway import Gateway, Session
from kvtcp.replication.sequencer import Sequencer, ShardState
from kvtcp.server.backups import Backups
from kvtcp.server.links import NodeLink
from kvtcp.server.sessions import FOR_STOP, FOR_TOTAL, ClientSession

log = logging.getLogger("kvtcp.coordinator")

HEARTBEAT_TICKS = HEARTBEAT_MS // TICK_MS


@dataclass
class ClusterConfig:
    """What a coordinator is started with. `nodes` maps node ids to their addresses."""

    cluster: str
    secret: str
    nodes: dict[str, tuple[str, int]]
    shards: int
    factor: int
    min_insync: int
    backup_dir: Path
    epoch: int = 1
    restoring: bytes | None = None  # prefix that a restore of an earlier coordinator left in pieces
    remember_restoring: Callable[[bytes | None], None] = lambda prefix: None  # for the next one; raises OSError
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)


class CoordinatorServer:
    """One coordinator: the client port, the links, the cores."""

    def __init__(self, config: ClusterConfig) -> None:
        self.loop = asyncio.get_running_loop()
        self.secret = config.secret
        self._config = config
        self.map = ClusterMap.create(
            cluster=config.cluster,
            epoch=config.epoch,
            owner=config.owner,
            shards=config.shards,
            factor=config.factor,
            min_insync=config.min_insync,
            nodes=config.nodes,
        )
        self.sequencer = Sequencer(self.map)
        self.gateway = Gateway(self.sequencer, self)
        self.backups = Backups(self, config.backup_dir)
        self.links = {node: NodeLink(self, node, host, port) for node, (host, port) in config.nodes.items()}
        self.sessions: set[ClientSession] = set()
        self.dirty: list[ClientSession] = []  # sessions with answers to flush in this tick
        self.address = ("", 0)
        self.ready = asyncio.Event()  # every node has reported and the shards were taken over
        self.failed: asyncio.Future[None] = self.loop.create_future()  # an error that must end the process
        self.protocol_errors = 0
        self.buffered_bytes = 0  # held for clients, as of the last tick
        self.held_bytes = 0  # held for clients by their sessions, at any time
        self.lag_ms = 0.0  # how late the last tick was
        self._flushing = False  # a flush is scheduled: this tick's stamp is fixed
        self._over_total = False  # clients are not read because of the total cap
        self._over_since_ms = 0  # since when; meaningful while _over_total
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None
        self._ticks = 0
        self._started = time.monotonic()
        self._tick_due = 0.0
        self._tick_handle: asyncio.TimerHandle | None = None

    # --- life ---------------------------------------------------------------------------------------

    def start_links(self) -> None:
        """Dial the nodes and let time pass."""
        for link in self.links.values():
            task = self.loop.create_task(link.run(), name=f"link to {link.node}")
            task.add_done_callback(self.core_task_done)
            self._tasks.append(task)
        self._schedule_tick()

    def core_failed(self, error: BaseException) -> None:
        """Something unexpected happened where it must not: the process ends rather than go on with damaged state."""
        if not self.failed.done():
            log.critical("event=core-failed reason=%r", error, exc_info=error)
            self.failed.set_exception(error)

    def core_task_done(self, task: asyncio.Task[None]) -> None:
        """Done callback of tasks that must not fail: the exception of one ends the process."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.core_failed(error)

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
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self.links.values():
            link.close()
        self.failed.cancel()
        await asyncio.sleep(0)

    # --- ticks --------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """Monotonic milliseconds, for deadlines."""
        return int(self.loop.time() * 1000)

    def begin(self) -> None:
        """Something happened: this tick gets its stamp, and is flushed at its end."""
        if not self._flushing:
            self._flushing = True
            self.sequencer.begin(time.time_ns() // 1_000_000, int(self.loop.time() * 1000))
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        for progress in self.sequencer.close_batches():
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
        self.sequencer.tick()
        for link in self.links.values():
            # after a stall of this process nobody can be called silent: what they said may still lie in the sockets
            link.watch_silence(self.sequencer.now_ms, self.lag_ms >= HEARTBEAT_MS)
        if self._ticks % HEARTBEAT_TICKS == 0:
            for link in self.links.values():
                link.heartbeat()
        now_ms = self.now_ms()
        for session in [s for s in self.sessions if s.frame_is_late(now_ms)]:
            log.warning("event=session-closed peer=%s reason=its frame was never finished", session.peer)
            session.abort()
        self._enforce_total()
        self._schedule_tick()

    # --- clients ------------------------------------------------------------------------------------

    def session_opened(self, session: ClientSession) -> None:
        """A client connected."""
        self.sessions.add(session)
        if len(self.sessions) > CLIENT_CONNECTIONS_MAX:
            log.warning("event=session-refused peer=%s reason=%s connections", session.peer, CLIENT_CONNECTIONS_MAX)
            session.abort()
        elif self._over_total:
            session.pause(FOR_TOTAL)

    def session_closed(self, session: ClientSession, reason: str) -> None:
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

    def node_reported(self, link: NodeLink) -> None:
        """A node answered HELLO."""
        self.begin()
        report = link.report
        disk = report[b"disk"].decode()
        self.sequencer.stamp_ms = max(self.sequencer.stamp_ms, report[b"stamp_ms"])
        if not self.ready.is_set():
            self.map.join(link.node, disk)
            if all(each.connection is not None for each in self.links.values()):
                self._take_over()
            return
        positions = {number: seq for number, _, seq, _ in report[b"shards"]}
        reason: str | None
        if self.map.disks[link.node] != disk and any(positions.values()):
            # another disk is another member: whatever it has, it is not what was acknowledged
            reason = self.sequencer.link_refused(link.node, "what it has is not what was written to this cluster")
        else:
            reason = self.sequencer.link_up(link.node, positions)
        if reason is None:
            self.map.join(link.node, disk)
            link.bad = ""
            assert link.connection is not None
            link.connection.live = True
            log.info("event=link-up node=%s", link.node)
        else:
            link.bad = f"came back without its data: {reason}"
            log.error("event=node-not-a-member node=%s reason=%s", link.node, reason)

    def _take_over(self) -> None:
        positions = {
            link.node: {number: (seq, chain) for number, _, seq, chain in link.report[b"shards"]}
            for link in self.links.values()
        }
        self.sequencer.take_over(positions)
        is_empty = not any(seq for position in positions.values() for seq, _ in position.values())
        self.backups.resume(self._config.restoring, is_empty, self._config.remember_restoring)
        for link in self.links.values():
            reason = self.sequencer.link_up(link.node, {n: seq for n, (seq, _) in positions[link.node].items()})
            assert link.connection is not None
            if reason is None:
                link.connection.live = True
            else:
                link.bad = f"came back without its data: {reason}"
                log.error("event=node-not-a-member node=%s reason=%s", link.node, reason)
        down = [shard for shard in self.sequencer.shards if not shard.serving]
        if down:
            log.error("event=shards-down shards=%s first=%s reason=%s", len(down), down[0].number, down[0].reason)
        self.ready.set()
        log.info("event=ready cluster=%s nodes=%s epoch=%s", self.map.cluster, len(self.links), self.map.epoch)

    def link_failed(self, link: NodeLink, reason: str) -> None:
        """A node cannot be reached, or refused."""
        self.begin()
        if not link.progress.connected:
            link.progress.reason = "it came back without its data" if link.bad else reason
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

    def degraded(self) -> list[str]:
        """Everything that is not as it should be, one sentence each."""
        sentences = []
        for link in self.links.values():
            if link.bad:
                sentences.append(f"{link.node} serves nothing: {link.bad}")
            elif not link.progress.connected:
                sentences.append(f"{link.node} is not linked: {link.progress.reason}")
            elif self._silent(link):
                silent_ms = self.now_ms() - link.progress.heard_ms
                sentences.append(f"{link.node} has not answered for {silent_ms} ms: writes of its shards wait for it")
        down = [shard for shard in self.sequencer.shards if not shard.serving]
        if down:
            first = f"shard {down[0].number}: {down[0].reason}"
            sentences.append(f"{len(down)} shards are down, the first is {first}")
        readonly = [s.number for s in self.sequencer.shards if s.serving and not all(m.connected for m in s.members)]
        if readonly:
            sentences.append(f"{len(readonly)} shards refuse writes: a replica of each is missing")
        if self.backups.restoring is not None:
            prefix = self.backups.restoring
            shown = f"keys that begin with {show_bytes(prefix)}" if prefix else "all keys"
            sentences.append(f"{shown} are closed until a restore completes")
        return sentences

    def _silent(self, link: NodeLink) -> bool:
        """Whether a linked node does not even answer heartbeats."""
        return link.progress.connected and self.now_ms() - link.progress.heard_ms >= EVICT_AFTER_MS

    def _node_state(self, link: NodeLink) -> str:
        if link.progress.connected:
            return "silent" if self._silent(link) else "linked"
        return "bad" if link.bad else "unreachable"

    def status(self) -> dict[str, Any]:
        """The map of `status`; docs/protocol.md explains every key."""
        sequencer = self.sequencer
        degraded = self.degraded()
        return {
            "cluster": self.map.cluster,
            "server": f"kvtcp {__version__}",
            "state": "degraded" if degraded else "ok",
            "degraded": degraded,
            "epoch": self.map.epoch,
            "nodes": len(self.links),
            "nodes_linked": sum(link.progress.connected for link in self.links.values()),
            "shards": self.map.shards,
            "replication_factor": self.map.factor,
            "min_insync": self.map.min_insync,
            "durability": "memory",
            "clients": len(self.sessions),
            "operations": self.gateway.operations,
            "unavailable": sequencer.unavailable,
            "outcome_unknown": sequencer.unknown,
            "protocol_errors": self.protocol_errors,
            "waiting": sequencer.waiting_items,
            "buffered_bytes": self.buffered_bytes,
            "loop_lag_ms": round(self.lag_ms, 1),
            "running": self.backups.busy,
            "uptime_s": int(time.monotonic() - self._started),
        }

    def nodes(self) -> list[dict[str, Any]]:
        """The list of `nodes`."""
        return [
            {
                "node": link.node,
                "address": f"{link.host}:{link.port}",
                "state": self._node_state(link),
                "reason": link.bad or link.progress.reason,
                "shards": len(link.progress.shards),
                "first_of": sum(shard.members[0] is link.progress for shard in link.progress.shards),
                "outstanding": link.progress.items,
                "outstanding_bytes": link.progress.bytes,
                "pid": link.report.get(b"pid"),
            }
            for link in self.links.values()
        ]

    def shards(self) -> list[dict[str, Any]]:
        """The list of `shards`."""

        def state(shard: ShardState) -> str:
            if not shard.serving:
                return "down"
            return "ok" if all(link.connected for link in shard.members) else "read-only"

        return [
            {
                "shard": shard.number,
                "state": state(shard),
                "nodes": [link.node for link in shard.members],
                "seq": shard.last_seq,
                "commit": shard.commit,
                "waiting": len(shard.waiting),
                "reason": shard.reason or shard.stuck,
            }
            for shard in self.sequencer.shards
        ]
