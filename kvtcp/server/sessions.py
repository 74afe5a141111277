"""Sessions: the coordinator's end of client connections, and the caps on what they may make the server hold.

I/O shell. A session decodes requests for the gateway and is the sink of their answers, which leave with one write per
tick. A client's socket is not read while its own caps are reached (CLIENT_OUTPUT_BYTES_MAX of answers it has not read,
CLIENT_OUTSTANDING_MAX requests or CLIENT_INPUT_BYTES_MAX bytes not answered) or while the server holds
BUFFERED_BYTES_MAX for all clients together; others do not notice. If the total is still exceeded, the session that
holds most is closed, with the reason in the log (`CoordinatorServer._enforce_total`).

Simplification: `input_bytes` is no sum over requests. It grows with what is read and shrinks, once per flush, by the
share of the outstanding requests that were answered, as if all were of one size. That saves bookkeeping on every
request, and a write that waits for a missing node for long does not keep what came after it on the account. What such
writes hold is bounded where they are: by the windows of the links.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from kvtcp.constants import (
    CLIENT_INPUT_BYTES_MAX,
    CLIENT_OUTPUT_BYTES_MAX,
    CLIENT_OUTSTANDING_MAX,
    FRAME_WAIT_MS,
)
from kvtcp.errors import Code, ProtocolError, RequestError
from kvtcp.protocol.framing import PREFIX_BYTE, PREFIX_CACHE_LENGTHS, PREFIXES
from kvtcp.server.transport import FramedConnection

if TYPE_CHECKING:
    from kvtcp.server.coordinator import CoordinatorServer

log = logging.getLogger("kvtcp.session")

FOREIGN_FACE: Final = b"-ERR this port speaks the kvtcp protocol (length-prefixed msgpack); use kvtcp-shell\r\n"

# reasons for not reading a client's socket; it is read when none is left
FOR_OUTPUT: Final = 1
FOR_OUTSTANDING: Final = 2
FOR_TOTAL: Final = 4
FOR_STOP: Final = 8  # the server stops: never resumed


class ClientSession(FramedConnection):
    """One client connection. Sink of its requests: `reply`, `fail`, `progress`."""

    def __init__(self, server: CoordinatorServer) -> None:
        super().__init__(server.loop)
        self.server = server
        self.greeted = False  # hello was accepted
        self.name = "?"  # what the client calls itself
        self.outstanding = 0  # requests read and not answered, without the long ones
        self.long = 0  # requests that take their time (backup, restore) and are not answered
        self.input_bytes = 0  # bytes of what is outstanding, about
        self._asked = 0  # outstanding requests as of the last flush, and those read since
        self.unread_bytes = 0  # answers in the transport's buffer, as of the last flush
        self._paused_for = 0  # the reasons for not reading it now
        self._began = False  # the first byte was looked at
        self._accounted_bytes = 0  # `held_bytes` as the server has counted it
        self._half_closed = False  # the client will send nothing more
        self._frame_since_ms = 0  # monotonic time since when a frame is unfinished, 0 = none

    # --- connection ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=CLIENT_OUTPUT_BYTES_MAX)
        self.server.session_opened(self)

    def data_received(self, data: bytes) -> None:
        if not self._began:
            self._began = True
            if data[0] != PREFIX_BYTE:
                log.warning("event=protocol-error peer=%s reason=first byte is %#04x, not 0xce", self.peer, data[0])
                self.out.append(FOREIGN_FACE)
                self.close()
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
        if self.decoder.buffered_bytes:
            self.account()
            if messages or not self._frame_since_ms:
                self._frame_since_ms = self.server.now_ms()
        else:
            self._frame_since_ms = 0
        if self.outstanding > CLIENT_OUTSTANDING_MAX or (
            self.input_bytes > CLIENT_INPUT_BYTES_MAX and self.outstanding
        ):
            self.pause(FOR_OUTSTANDING)

    def eof_received(self) -> bool:
        """The client half-closed: what it asked for is still answered."""
        self._half_closed = True
        if self.outstanding or self.long:
            return True
        self.flush()  # what was answered in this tick
        return False

    def closed(self, reason: str) -> None:
        self.server.account(-self._accounted_bytes)
        self._accounted_bytes = self.unread_bytes = 0
        self.server.session_closed(self, reason)

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

    # --- caps ---------------------------------------------------------------------------------------

    def flush(self) -> None:
        super().flush()
        transport = self.transport
        if transport is None:
            return
        self.unread_bytes = transport.get_write_buffer_size()
        if self.unread_bytes or self._accounted_bytes:
            self.account()
        if self.outstanding < self._asked:
            share_bytes = self.input_bytes * self.outstanding // self._asked
            self.input_bytes = max(share_bytes, self.decoder.buffered_bytes)
        self._asked = self.outstanding
        if not self.outstanding and self._half_closed and not self.long:
            self.close_now()
            return
        if (
            self._paused_for & FOR_OUTSTANDING
            and self.outstanding <= CLIENT_OUTSTANDING_MAX // 2
            and (not self.outstanding or self.input_bytes <= CLIENT_INPUT_BYTES_MAX)
        ):
            self.resume(FOR_OUTSTANDING)

    def close_now(self) -> None:
        """Close; the transport sends what it has first."""
        if self.transport is not None:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.pause(FOR_OUTPUT)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport is not None:
            self.unread_bytes = self.transport.get_write_buffer_size()
            self.account()
        self.resume(FOR_OUTPUT)

    def pause(self, reason: int) -> None:
        """Stop reading the client's socket for `reason`."""
        if not self._paused_for and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
        self._paused_for |= reason

    def resume(self, reason: int) -> None:
        """`reason` is over; read on if it was the last one."""
        if not self._paused_for & reason:
            return
        self._paused_for &= ~reason
        if self._frame_since_ms:
            self._frame_since_ms = self.server.now_ms()  # it could not be finished meanwhile
        if not self._paused_for and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def account(self) -> None:
        """Tell the server how much this session makes it hold."""
        held_bytes = self.held_bytes
        difference_bytes = held_bytes - self._accounted_bytes
        self._accounted_bytes = held_bytes
        if self.transport is not None:
            self.server.account(difference_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes this session makes the server hold: an unfinished frame and unread answers."""
        return self.decoder.buffered_bytes + self.unread_bytes

    def frame_is_late(self, now_ms: int) -> bool:
        """Whether a frame was begun long ago and is still not complete."""
        return bool(self._frame_since_ms) and not self._paused_for and now_ms - self._frame_since_ms > FRAME_WAIT_MS
