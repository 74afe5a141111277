"""Caps: what one client connection may make the coordinator hold, whatever protocol it speaks.

I/O shell, the base of both kinds of sessions. A client's socket is not read while its own caps are reached
(CLIENT_OUTPUT_BYTES_MAX of answers it has not read, CLIENT_OUTSTANDING_MAX requests or CLIENT_INPUT_BYTES_MAX bytes not
answered) or while the server holds BUFFERED_BYTES_MAX for all clients together; others do not notice. If the total is
still exceeded, the session that holds most is closed, with the reason in the log (`CoordinatorServer._enforce_total`).

Simplification: `input_bytes` is no sum over requests. It grows with what is read and shrinks, once per flush, by the
share of the outstanding requests that were answered, as if all were of one size. That saves bookkeeping on every
request, and a write that waits for a missing node for long does not keep what came after it on the account. What such
writes hold is bounded where they are: by the windows of the links.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from kvtcp.constants import (
    CLIENT_INPUT_BYTES_MAX,
    CLIENT_OUTPUT_BYTES_MAX,
    CLIENT_OUTSTANDING_MAX,
    FRAME_WAIT_MS,
)
from kvtcp.server.transport import Connection

if TYPE_CHECKING:
    from kvtcp.server.coordinator import CoordinatorServer

# reasons for not reading a client's socket; it is read when none is left
FOR_OUTPUT: Final = 1
FOR_OUTSTANDING: Final = 2
FOR_TOTAL: Final = 4
FOR_STOP: Final = 8  # the server stops: never resumed


class CappedConnection(Connection):
    """A client connection with caps. Subclasses count `outstanding`, and call `took` after every read."""

    outstanding: int  # requests read and not answered, without the long ones

    def __init__(self, server: CoordinatorServer) -> None:
        super().__init__(server.loop)
        self._begin_caps(server)

    def _begin_caps(self, server: CoordinatorServer) -> None:
        self.server = server
        self.long = 0  # requests that take their time (backup, restore) and are not answered
        self.input_bytes = 0  # bytes of what is outstanding, about
        self._asked = 0  # outstanding requests as of the last flush, and those read since
        self.unread_bytes = 0  # answers in the transport's buffer, as of the last flush or tick
        self._paused_for = 0  # the reasons for not reading it now
        self._accounted_bytes = 0  # `held_bytes` as the server has counted it
        self._half_closed = False  # the client will send nothing more
        self._frame_since_ms = 0  # monotonic time since when a request is unfinished, 0 = none

    @property
    def unfinished_bytes(self) -> int:
        """Bytes held of a request that is not complete."""
        raise AssertionError("a session says what it holds")

    @property
    def held_bytes(self) -> int:
        """Bytes this session makes the server hold: an unfinished request and unread answers."""
        return self.unfinished_bytes + self.unread_bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=CLIENT_OUTPUT_BYTES_MAX)
        self.server.session_opened(self)

    def took(self, is_whole: bool, complete: int) -> None:
        """Bytes were read: whether all of them belong to complete requests, and how many requests became complete."""
        if is_whole:
            self._frame_since_ms = 0
        else:
            self.account()
            if complete or not self._frame_since_ms:
                self._frame_since_ms = self.server.now_ms()
        if self.outstanding > CLIENT_OUTSTANDING_MAX or (
            self.input_bytes > CLIENT_INPUT_BYTES_MAX and self.outstanding
        ):
            self.pause(FOR_OUTSTANDING)
        self.server.took(complete)

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

    def look_at_unread(self) -> None:
        """How much the client has not read yet: nobody is told when it reads the rest."""
        if self.unread_bytes and self.transport is not None:
            self.unread_bytes = self.transport.get_write_buffer_size()
            self.account()

    def account(self) -> None:
        """Tell the server how much this session makes it hold."""
        held_bytes = self.held_bytes
        difference_bytes = held_bytes - self._accounted_bytes
        self._accounted_bytes = held_bytes
        if self.transport is not None:
            self.server.account(difference_bytes)

    def frame_is_late(self, now_ms: int) -> bool:
        """Whether a frame was begun long ago and is still not complete."""
        return bool(self._frame_since_ms) and not self._paused_for and now_ms - self._frame_since_ms > FRAME_WAIT_MS
