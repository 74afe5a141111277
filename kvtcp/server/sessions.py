"""Sessions: the coordinator's end of client connections that speak the protocol of kvtcp.

I/O shell. A session decodes requests for the gateway and is the sink of their answers, which leave with one write per
tick. Its caps are in caps.py. The first byte of a connection says which protocol it speaks: 0xCE begins a frame,
everything else is handed over to a session of the Redis protocol (resp_session.py).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from kvtcp.errors import Code, ProtocolError, RequestError
from kvtcp.protocol.framing import PREFIX_BYTE, PREFIX_CACHE_LENGTHS, PREFIXES
from kvtcp.server.caps import CappedConnection
from kvtcp.server.resp_session import RespSession
from kvtcp.server.transport import FramedConnection

if TYPE_CHECKING:
    from kvtcp.server.coordinator import CoordinatorServer

log = logging.getLogger("kvtcp.session")

FOREIGN_FACE: Final = b"-ERR this port speaks the kvtcp protocol (length-prefixed msgpack); use kvtcp-shell\r\n"


class ClientSession(CappedConnection, FramedConnection):
    """One client connection. Sink of its requests: `reply`, `fail`, `progress`."""

    def __init__(self, server: CoordinatorServer) -> None:
        FramedConnection.__init__(self, server.loop)
        self._begin_caps(server)
        self.greeted = False  # hello was accepted
        self.name = "?"  # what the client calls itself
        self.outstanding = 0
        self._began = False  # the first byte was looked at

    @property
    def unfinished_bytes(self) -> int:
        return self.decoder.buffered_bytes

    # --- connection ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if not self._began:
            self._began = True
            if data[0] != PREFIX_BYTE:
                self._other_face(data)
                return
        if self.transport is None or self.transport.is_closing():
            return
        self.server.begin()
        self.input_bytes += len(data)
        try:
            messages = self.decoder.feed(data)
            if messages:
                self.outstanding += len(messages)
                self._asked += len(messages)
                self.server.gateway.handle(self, messages)
        except ProtocolError as error:
            self.protocol_error(error)
            return
        self.took(not self.decoder.buffered_bytes, len(messages))

    def _other_face(self, data: bytes) -> None:
        """The first byte is none of a frame: a client of Redis, or somebody who types."""
        if self.server.door is not None and self.transport is not None:
            self.server.sessions.discard(self)
            session = RespSession(self.server, self.server.door)
            self.transport.set_protocol(session)
            session.take_over(self.transport, self._paused_for)
            session.data_received(data)
            return
        log.warning("event=protocol-error peer=%s reason=first byte is %#04x, not 0xce", self.peer, data[0])
        self.server.protocol_errors += 1
        self.out.append(FOREIGN_FACE)
        self.close()

    def protocol_error(self, error: ProtocolError) -> None:
        super().protocol_error(error)
        self.server.protocol_errors += 1

    # --- sink ---------------------------------------------------------------------------------------

    def reply(self, token: int, result: Any) -> None:
        """The answer of request `token`. On the data path: everything inline, 0.5 us with the packing."""
        out = self.out
        if not out:
            self.server.dirty.append(self)
        try:
            body = self.encoder.pack((token, 0, result))
            if len(body) < PREFIX_CACHE_LENGTHS:
                out.append(PREFIXES[len(body)] + body)
            else:
                out.append(self.encoder.prefix(body))
                out.append(body)
        except RequestError as error:
            self.outstanding += 1
            self.fail(token, error.code, error.message, error.details)
        self.outstanding -= 1

    def fail(self, token: int, code: int, message: str, details: dict[str, Any]) -> None:
        """The error of request `token`."""
        self._queue((token, int(code), message, details))
        self.outstanding -= 1

    def long_began(self) -> None:
        """A request of this client will take long: its caps are about the others."""
        self.outstanding -= 1
        self.long += 1

    def long_ends(self) -> None:
        """A request that took long is about to be answered."""
        self.long -= 1
        self.outstanding += 1

    def progress(self, token: int, progress: dict[str, Any]) -> None:
        """How far the long request `token` is."""
        self._queue((token, int(Code.PROGRESS), progress))

    def _queue(self, message: Any) -> None:
        if not self.out:
            self.server.dirty.append(self)
        self.send(message)
        self.server.begin()
