"""RESP sessions: the coordinator's end of connections of Redis clients, telnet and `nc`.

I/O shell around a parser and a `Pipeline`. Bytes become commands, replies leave in order with one write per tick. The
limits are those of every client connection (frontend/connection.py); replies that wait for an earlier one count as
unread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvtcp.constants import CLIENT_OUTPUT_BYTES_MAX
from kvtcp.frontend.clients import FOR_OUTPUT, Clients
from kvtcp.frontend.connection import ClientConnection
from kvtcp.frontend.resp.parser import RespParser
from kvtcp.frontend.resp.pipeline import Pipeline
from kvtcp.frontend.resp.service import RespService

log = logging.getLogger("kvtcp.session")


class RespSession(ClientConnection):
    """One client connection."""

    def __init__(
        self, clients: Clients, begin: Callable[[], None], requests_read: Callable[[int], None], service: RespService
    ) -> None:
        super().__init__(clients, begin, requests_read)
        self.parser = RespParser()
        self.pipeline = Pipeline(service, self.peer, self._wake)
        self._waits_for_room = False  # too much is held in replies that wait for an earlier one

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.pipeline.state.peer = self.peer

    @property
    def outstanding(self) -> int:  # type: ignore[override]
        """Commands without a reply."""
        return self.pipeline.outstanding

    @property
    def unfinished_bytes(self) -> int:
        return self.parser.buffered_bytes + self.pipeline.held_bytes

    def data_received(self, data: bytes) -> None:
        pipeline = self.pipeline
        if self.transport is None or self.transport.is_closing() or pipeline.closing or self.parser.error:
            return
        self.begin()
        self.input_bytes += len(data)
        before = pipeline.outstanding
        parser = self.parser
        commands = parser.feed(data)
        if commands:
            pipeline.handle(commands)
        if parser.error and not pipeline.closing:
            log.warning("event=protocol-error peer=%s reason=%s", self.peer, parser.error)
            self.clients.protocol_errors += 1
            pipeline.protocol_error(parser.error)
        if self._is_attack():
            return
        self._asked += pipeline.outstanding - before
        self.bytes_read(not parser.buffered_bytes, len(commands))

    def _is_attack(self) -> bool:
        """Whether a browser was made to send these commands: then nothing is answered."""
        if self.pipeline.suspicious:
            log.warning("event=protocol-error peer=%s reason=%s", self.peer, self.pipeline.suspicious)
            self.clients.protocol_errors += 1
            self.abort()
        return bool(self.pipeline.suspicious)

    def _wake(self) -> None:
        """Have replies sent, or commands resumed, at the end of this turn."""
        self.clients.dirty.append(self)
        self.begin()

    def flush(self) -> None:
        pipeline = self.pipeline
        self.out += pipeline.take_output()
        if pipeline.has_work:
            self.loop.call_soon(self._resume_commands)
        super().flush()
        if pipeline.held_bytes or self._waits_for_room:
            self._check_room()
        if pipeline.closing and not pipeline.slots:
            self.close_now()

    def _check_room(self) -> None:
        """Count replies that cannot be sent yet like those that the client does not read."""
        self.account()
        if self.pipeline.large_bytes > CLIENT_OUTPUT_BYTES_MAX:
            self._waits_for_room = True
            self.pause(FOR_OUTPUT)
        elif self._waits_for_room:
            self._waits_for_room = False
            if not self.write_paused:
                self.resume(FOR_OUTPUT)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.pipeline.may_begin = False

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._waits_for_room:
            self.pause(FOR_OUTPUT)
        self.pipeline.may_begin = True
        if self.pipeline.has_work:
            self.loop.call_soon(self._resume_commands)

    def _resume_commands(self) -> None:
        if self.transport is not None and not self.pipeline.suspicious:
            self.begin()
            self.pipeline.resume()
            self._is_attack()

    def closed(self, reason: str) -> None:
        self.pipeline.is_gone = True
        super().closed(reason)
