"""Links: the coordinator's end of the FIFO connections to the nodes.

I/O shell around Link. One NodeLink per node keeps one connection: it dials with back-off, says HELLO, hands the
report to its owner, then writes batches and passes results on to the sequencer. The dialling is a task (it is a control
path); batches and results are moved by callbacks alone.

A link can be half-open: the other side, or the way to it, is gone without a sign. As every node answers heartbeats,
a link on which nothing moves for LINK_SILENCE_MS is closed and dialled again, which loses nothing: what was kept is
sent again. It moves if anything comes from the node, or if the node's kernel takes what was sent, so that a large
value on a slow line is no silence.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import random
import struct
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kvtcp.constants import (
    BACKOFF_MAX_MS,
    BACKOFF_MIN_MS,
    HEARTBEAT_MS,
    LINK_FRAME_BYTES_MAX,
    LINK_SILENCE_MS,
    LINK_WRITE_BUFFER_BYTES,
    RECOVER_WAIT_MS,
)
from kvtcp.errors import ProtocolError
from kvtcp.protocol.link import (
    BACKUP,
    REFUSED,
    REPORT,
    RESULTS,
    SPACE,
    STATS,
    STOP,
    Report,
    parse_report,
)
from kvtcp.replication.controller import Controller
from kvtcp.replication.sequencing.link import Link, LinkError
from kvtcp.runtime.process import StartTask
from kvtcp.runtime.transport import FramedConnection

log = logging.getLogger("kvtcp.link")


class LinkOwner(Protocol):
    """What links need besides the controller: what they dial with, and a place for their news."""

    secret: str
    local_sockets: Mapping[str, Path]  # node -> its Unix socket, of those that run on this machine

    def begin(self) -> None:
        """Begin a turn: something was read."""

    def node_reported(self, link: NodeLink, report: Report) -> None:
        """A node answered HELLO: from now on batches flow."""

    def node_progressed(self) -> None:
        """The controller got a frame of a node that changes what it decides next: let it act."""

    def node_lost(self, node: str, reason: str) -> None:
        """The link of a node that had reported is gone, or one could not be made."""

    def file_done(self, node: str, name: bytes, report: Any, error: bytes | None, /) -> None:
        """A node finished its file of a backup, or failed to."""


class LinkConnection(FramedConnection):
    """One connection of a link."""

    def __init__(self, link: NodeLink) -> None:
        super().__init__(asyncio.get_running_loop(), LINK_FRAME_BYTES_MAX)
        self.link = link
        self._owner = link.owner
        self._sequencer = link.controller.sequencer
        self.answered: asyncio.Future[Report] = self.loop.create_future()  # the report
        self.lost = asyncio.Event()
        self.live = False  # the report was accepted: batches flow
        self.moved_ms = 0  # monotonic time at which the node's kernel was seen to take something last
        self.untaken_bytes = 0  # written and not taken by the node's kernel, as of the last look
        self.given_up = ""  # why this side ended the connection; empty = it did not

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=LINK_WRITE_BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        if self.link.closing:
            return  # the node was removed: the controller does not know it any more
        self._owner.begin()
        self._sequencer.heard(self.link.node)
        super().data_received(data)

    def messages_received(self, messages: list[Any]) -> None:
        for message in messages:
            if type(message) is not list or not message:
                raise ProtocolError("a frame of a link is an array [kind, ...]")
            if self.live and self._received(message):
                continue
            kind = message[0]
            if kind == REPORT and len(message) == 2:
                report = parse_report(message[1])
                self.link.space = report.space
                if not self.answered.done():
                    self.answered.set_result(report)
            elif kind == STATS and len(message) == 2 and type(message[1]) is dict:
                self.link.stats = {
                    name.decode("utf-8", "replace"): value for name, value in message[1].items() if type(name) is bytes
                }
            elif kind == SPACE and len(message) == 2 and message[1] in (0, 1, 2):
                self.link.space = message[1]
            elif kind == BACKUP and len(message) == 4 and type(message[1]) is bytes:
                self._owner.file_done(self.link.node, *message[1:])
            elif kind == REFUSED and tuple(map(type, message)) == _REFUSED_TYPES:
                self.link.refused = message[2].decode("utf-8", "replace")
                self.link.controller.refused(self.link.node, message[1], self.link.refused)
                self._refuse(f"refused: {self.link.refused}")
            else:
                raise ProtocolError("not a frame of a kvtcp node")

    def _received(self, message: list[Any]) -> bool:
        """Whether this is a frame for the controller. Raises ProtocolError if it cannot be true."""
        try:
            if not self.link.controller.receive(self.link.node, message):
                return False
        except LinkError as error:
            raise ProtocolError(str(error)) from error
        if message[0] == SPACE:
            self.link.space = message[1]
        elif message[0] != RESULTS:
            self._owner.node_progressed()
        return True

    def protocol_error(self, error: ProtocolError) -> None:
        super().protocol_error(error)
        if not self.answered.done():
            self.answered.set_exception(ConnectionError(f"not a node of kvtcp: {error}"))

    def _refuse(self, reason: str) -> None:
        if not self.answered.done():
            self.answered.set_exception(ConnectionError(reason))
        self.close()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.link.write_batches()

    def look_at_untaken(self, now_ms: int) -> None:
        """Look whether the node's kernel takes what was written."""
        if self.transport is None:
            return
        untaken_bytes = self.transport.get_write_buffer_size() + _unacknowledged_bytes(self.transport)
        if untaken_bytes < self.untaken_bytes:
            self.moved_ms = now_ms
        self.untaken_bytes = untaken_bytes

    def closed(self, reason: str) -> None:
        reason = self.given_up or reason
        if not self.answered.done():
            self.answered.set_exception(ConnectionError(reason))
            self.answered.exception()  # looked at: `run` may not be waiting any more
        self.lost.set()
        is_current = self.link.connection is self
        if is_current:
            self.link.connection = None
        if self.live:
            self.live = False
            self.link.connection_lost(reason)


class NodeLink:
    """The link to one node: dials, and dials again."""

    def __init__(self, node: str, controller: Controller, owner: LinkOwner) -> None:
        self.node = node
        self.controller = controller
        self.owner = owner
        self.task: asyncio.Task[None] | None = None  # of `run`
        self.stats: dict[str, Any] = {}  # what the node says of itself once a second
        self.progress: Link = controller.sequencer.links[node]
        self.connection: LinkConnection | None = None
        self.refused = ""  # what the node said when it refused the last HELLO, for people; empty = it did not
        self.report: Report | None = None  # the last one
        self.space = 0  # how short of disk space the node says it is, as in the SPACE frame
        self.closing = False  # the server stops, or the node was removed: a lost connection is no event

    @property
    def address(self) -> tuple[str, int]:
        """Where the node listens. Raises ConnectionError if the map does not name it any more: the controller is about
        to have this link removed."""
        address = self.controller.map.nodes.get(self.node)
        if address is None:
            raise ConnectionError("the node left the cluster")
        return address

    def start(self, start_task: StartTask) -> None:
        """Dial, in a task that runs until `end`."""
        self.task = start_task(self.run(), f"link to {self.node}")

    async def run(self) -> None:
        """Keep the link up until cancelled."""
        backoff_ms = BACKOFF_MIN_MS
        while True:
            connection = LinkConnection(self)
            try:
                await self._connect(connection)
                backoff_ms = BACKOFF_MIN_MS
                await connection.lost.wait()
            except (OSError, TimeoutError, UnicodeError) as error:  # UnicodeError: of a name that cannot be one
                refused = isinstance(error, ConnectionRefusedError)
                reason = "connection refused" if refused else str(error) or "no answer in time"
                self.owner.node_lost(self.node, reason)
                log.debug("event=link-failed node=%s reason=%s", self.node, reason)
                connection.abort()
                await asyncio.sleep(backoff_ms / 1000 * random.uniform(0.5, 1.0))
                backoff_ms = min(backoff_ms * 2, BACKOFF_MAX_MS // 10)
            except asyncio.CancelledError:
                self.close()
                connection.close()
                raise

    async def _connect(self, connection: LinkConnection) -> None:
        async with asyncio.timeout(RECOVER_WAIT_MS / 1000):
            if not await self._connect_locally(connection):
                await connection.loop.create_connection(lambda: connection, *self.address)
        connection.send(self.controller.hello(self.node, self.owner.secret))
        connection.flush()
        async with asyncio.timeout(LINK_SILENCE_MS / 1000):  # what the node has must be durable first
            report = await connection.answered
        if connection.lost.is_set():
            raise ConnectionError("the connection was lost after the report")
        self.refused = self.controller.mismatch(report)
        if self.refused:
            raise ConnectionError(f"not used: {self.refused}")
        self.report = report
        self.connection = connection
        self.owner.node_reported(self, report)

    async def _connect_locally(self, connection: LinkConnection) -> bool:
        """Connect to the Unix socket of a node that runs on this machine, if there is one."""
        path = self.owner.local_sockets.get(self.node)
        if path is None:
            return False
        try:
            await connection.loop.create_unix_connection(lambda: connection, str(path))
        except OSError:  # it has none, or does not run; its port tells
            return False
        return True

    def write_batches(self) -> None:
        """Write the outgoing batches as far as the transport takes them."""
        connection = self.connection
        if connection is None or not connection.live:
            return
        if self.progress.outgoing and not connection.write_paused:
            for frame in self.controller.batch_frames(self.progress):
                connection.send(frame)
            connection.flush()

    def heartbeat(self) -> None:
        """An empty batch on an idle link: the node looks for expired keys, and a dead link is noticed."""
        connection = self.connection
        if connection is not None and connection.live and not connection.write_paused:
            connection.send(self.controller.heartbeat(self.progress))
            connection.flush()

    def watch_silence(self, now_ms: int, excused: bool) -> None:
        """Once a tick: give the connection up if nothing moves on it. `excused`: not now, but count from now on."""
        connection = self.connection
        if connection is None or not connection.live or connection.given_up:
            return
        if excused:
            connection.moved_ms = now_ms
        if now_ms - self.progress.heard_ms < HEARTBEAT_MS:
            return
        connection.look_at_untaken(now_ms)
        silent_ms = now_ms - max(self.progress.heard_ms, connection.moved_ms)
        if silent_ms >= LINK_SILENCE_MS:
            connection.given_up = f"nothing came or went for {silent_ms} ms"
            connection.abort()

    def connection_lost(self, reason: str) -> None:
        """Report the loss of the live connection."""
        if self.closing:
            return
        self.owner.node_lost(self.node, f"connection lost: {reason}")

    def give_up(self, reason: str) -> None:
        """Close the connection; it is dialled again."""
        if self.connection is not None:
            self.connection.given_up = reason
            self.connection.abort()

    def end(self) -> None:
        """Stop dialling: the node does not belong to the cluster any more."""
        self.closing = True
        if self.task is not None:
            self.task.cancel()

    def stop_node(self) -> bool:
        """Ask the node to stop its process; false if there is no connection to ask on."""
        connection = self.connection
        if connection is None or connection.transport is None or connection.transport.is_closing():
            return False
        connection.send((STOP,))
        connection.flush()
        return True

    def close(self) -> None:
        """Close the connection for good."""
        self.closing = True
        if self.connection is not None:
            self.connection.close()


def _unacknowledged_bytes(transport: asyncio.Transport) -> int:
    """What the kernel has of this connection and the peer's kernel has not acknowledged; 0 where it does not tell."""
    sock = transport.get_extra_info("socket")
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int(struct.unpack("i", answer)[0])


_REFUSED_TYPES = (int, bytes, bytes, int, int)
