"""RESP sessions: the coordinator's end of connections of Redis clients, telnet and `nc`.

I/O shell around a parser and a `RespClient`. Bytes become commands, replies leave in order with one write per tick. The
caps are those of every session (caps.py); replies that wait for an earlier one count as unread.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from kvtcp.constants import CLIENT_OUTPUT_BYTES_MAX
from kvtcp.resp.client import RespClient
from kvtcp.resp.door import Door
from kvtcp.resp.parser import RespParser
from kvtcp.server.caps import FOR_OUTPUT, CappedConnection

if TYPE_CHECKING:
    from kvtcp.server.coordinator import CoordinatorServer

log = logging.getLogger("kvtcp.session")


class RespSession(CappedConnection):
    """One connection. It takes over from a session that saw its first byte."""

    def __init__(self, server: CoordinatorServer, door: Door) -> None:
        super().__init__(server)
        self.door = door
        self.parser = RespParser()
        self.client = RespClient(door, door.next_client(), self.peer, self._wake)
        self._waits_for_room = False  # too much is held in replies that wait for an earlier one

    def take_over(self, transport: asyncio.Transport, paused_for: int) -> None:
        """The connection is made already."""
        self.connection_made(transport)
        self._paused_for = paused_for
        self.client.peer = self.peer

    @property
    def outstanding(self) -> int:  # type: ignore[override]
        """Commands without a reply."""
        return self.client.outstanding

    @property
    def unfinished_bytes(self) -> int:
        return self.parser.buffered_bytes + self.client.held_bytes

    def data_received(self, data: bytes) -> None:
        client = self.client
        if self.transport is None or self.transport.is_closing() or client.closing or self.parser.error:
            return
        self.server.begin()
        self.input_bytes += len(data)
        before = client.outstanding
        parser = self.parser
        commands = parser.feed(data)
        if commands:
            client.handle(commands)
            self.server.gateway.operations += len(commands)
        if parser.error and not client.closing:
            log.warning("event=protocol-error peer=%s reason=%s", self.peer, parser.error)
            self.server.protocol_errors += 1
            client.protocol_error(parser.error)
        if self._is_attack():
            return
        self._asked += client.outstanding - before
        self.took(not parser.buffered_bytes, len(commands))

    def _is_attack(self) -> bool:
        """Whether a browser was made to send this: then nothing more is said."""
        if self.client.suspicious:
            log.warning("event=protocol-error peer=%s reason=%s", self.peer, self.client.suspicious)
            self.server.protocol_errors += 1
            self.abort()
        return bool(self.client.suspicious)

    def _wake(self) -> None:
        """There are replies, or something to go on with."""
        self.server.dirty.append(self)
        self.server.begin()

    def flush(self) -> None:
        client = self.client
        self.out += client.take_output()
        if client.has_work:
            self.loop.call_soon(self._go_on)
        super().flush()
        if client.held_bytes or self._waits_for_room:
            self._look_for_room()
        if client.closing and not client.slots:
            self.close_now()

    def _look_for_room(self) -> None:
        """Replies that cannot be sent yet count like those that the client does not read."""
        self.account()
        if self.client.large_bytes > CLIENT_OUTPUT_BYTES_MAX:
            self._waits_for_room = True
            self.pause(FOR_OUTPUT)
        elif self._waits_for_room:
            self._waits_for_room = False
            if not self.write_paused:
                self.resume(FOR_OUTPUT)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.client.may_begin = False

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._waits_for_room:
            self.pause(FOR_OUTPUT)
        self.client.may_begin = True
        if self.client.has_work:
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self.transport is not None and not self.client.suspicious:
            self.server.begin()
            self.client.go_on()
            self._is_attack()

    def closed(self, reason: str) -> None:
        self.client.is_gone = True
        super().closed(reason)
