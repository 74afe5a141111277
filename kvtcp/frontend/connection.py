"""Client connections: how much one of them may make the coordinator hold, in any protocol.

I/O shell, the base of all sessions. A client's socket is not read while its own limits are reached
(CLIENT_OUTPUT_BYTES_MAX of answers it has not read, CLIENT_OUTSTANDING_MAX requests or CLIENT_INPUT_BYTES_MAX bytes not
answered) or while the server holds BUFFERED_BYTES_MAX for all clients together (clients.py); others do not notice.

Simplification: `input_bytes` is no sum over requests. It grows with every read and shrinks, once per flush, by the
share of the outstanding requests that were answered, as if all were of one size. That saves bookkeeping on every
request, and a write that waits long for a missing node does not keep later requests on the account. The bytes of such
writes are bounded by the windows of the links.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvtcp.constants import CLIENT_INPUT_BYTES_MAX, CLIENT_OUTPUT_BYTES_MAX, CLIENT_OUTSTANDING_MAX, FRAME_WAIT_MS
from kvtcp.errors import ProtocolError
from kvtcp.frontend.clients import FOR_OUTPUT, FOR_OUTSTANDING, Clients
from kvtcp.runtime.transport import Connection


class ClientConnection(Connection):
    """A client connection with limits. Subclasses count `outstanding`, call `begin` before they handle a read, and
    `bytes_read` after it. `requests_read` is called with the number of requests that a read made complete."""

    outstanding = 0  # requests read and not answered, without the long ones

    def __init__(self, clients: Clients, begin: Callable[[], None], requests_read: Callable[[int], None]) -> None:
        super().__init__(asyncio.get_running_loop())
        self.clients = clients
        self.begin = begin
        self._requests_read = requests_read
        self.long = 0  # requests that take their time (backup, restore) and are not answered
        self.input_bytes = 0  # bytes of outstanding requests, about
        self._asked = 0  # outstanding requests as of the last flush, and those read since
        self.unread_bytes = 0  # answers in the transport's buffer, as of the last flush or tick
        self._paused_for = 0  # the reasons for not reading it now
        self._accounted_bytes = 0  # `held_bytes` as `clients` has counted it
        self._half_closed = False  # the client will send nothing more
        self._frame_since_ms = 0  # monotonic time since when a request is unfinished, 0 = none

    @property
    def unfinished_bytes(self) -> int:
        """Bytes held of a request that is not complete."""
        raise AssertionError("a session has to count them")

    @property
    def held_bytes(self) -> int:
        """Bytes this session makes the server hold: an unfinished request and unread answers."""
        return self.unfinished_bytes + self.unread_bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=CLIENT_OUTPUT_BYTES_MAX)
        self.clients.session_opened(self)

    def take_over(self, other: ClientConnection) -> None:
        """Continue the connection of `other`, which saw its first bytes."""
        assert other.transport is not None, "it was made"
        self.clients.session_closed(other)
        self._paused_for = other._paused_for
        other.transport.set_protocol(self)
        self.connection_made(other.transport)

    def protocol_error(self, error: ProtocolError) -> None:
        super().protocol_error(error)
        self.clients.protocol_errors += 1

    def bytes_read(self, is_whole: bool, complete: int) -> None:
        """Account for a read: whether all its bytes belong to complete requests, and how many became complete."""
        self.clients.requests += complete
        if is_whole:
            self._frame_since_ms = 0
        else:
            self.account()
            if complete or not self._frame_since_ms:
                self._frame_since_ms = self.clients.now_ms()
        if self.outstanding > CLIENT_OUTSTANDING_MAX or (
            self.input_bytes > CLIENT_INPUT_BYTES_MAX and self.outstanding
        ):
            self.pause(FOR_OUTSTANDING)
        self._requests_read(complete)

    def eof_received(self) -> bool:
        """Answer the requests from before the half-close, then close."""
        self._half_closed = True
        if self.outstanding or self.long:
            return True
        self.flush()  # the answers of this tick
        return False

    def closed(self, reason: str) -> None:
        self.clients.account(-self._accounted_bytes)
        self._accounted_bytes = self.unread_bytes = 0
        self.clients.session_closed(self)

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
            self.input_bytes = max(share_bytes, self.unfinished_bytes)
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
        """Close; the transport sends its buffer first."""
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
        """End the pause for `reason`; read on if it was the last one."""
        if not self._paused_for & reason:
            return
        self._paused_for &= ~reason
        if self._frame_since_ms:
            self._frame_since_ms = self.clients.now_ms()  # it could not be finished meanwhile
        if not self._paused_for and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def check_unread(self) -> None:
        """Measure the unread answers again: no event comes when the client reads them."""
        if self.unread_bytes and self.transport is not None:
            self.unread_bytes = self.transport.get_write_buffer_size()
            self.account()

    def account(self) -> None:
        """Put the bytes that this session holds on the account of all clients."""
        held_bytes = self.held_bytes
        difference_bytes = held_bytes - self._accounted_bytes
        self._accounted_bytes = held_bytes
        if self.transport is not None:
            self.clients.account(difference_bytes)

    def frame_is_late(self, now_ms: int) -> bool:
        """Whether a frame was begun long ago and is still not complete."""
        return bool(self._frame_since_ms) and not self._paused_for and now_ms - self._frame_since_ms > FRAME_WAIT_MS
