"""Transport: the asyncio.Protocol under every connection of the servers. The only place that touches sockets for data.

It sits between uvloop (or asyncio) and the pure cores: bytes become messages by the decoder, frames collect in a list
and leave with one `write` per flush (uvloop writes at once on every call, so each call is a system call).

Invariants: callbacks are ordinary methods, no task and no future is made for an operation; after `close` nothing more
is delivered; a protocol error is logged with its reason and closes this connection only.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from kvtcp.constants import FRAME_BYTES_MAX
from kvtcp.errors import ProtocolError
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder

log = logging.getLogger("kvtcp.transport")


class Connection(asyncio.Protocol):
    """One TCP connection. Subclasses override `data_received` and `closed`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.transport: asyncio.Transport | None = None  # None before it is made and after it is lost
        self.peer = "?"  # for logs
        self.out: list[bytes] = []  # what is to be sent, since the last flush
        self.write_paused = False  # the transport's buffer is over its high-water mark

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]
        name = transport.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "local")

    def protocol_error(self, error: ProtocolError) -> None:
        """The peer does not speak the protocol: log why, close."""
        log.warning("event=protocol-error peer=%s reason=%s", self.peer, error)
        self.close()

    def flush(self) -> None:
        """Write what was queued, with one call."""
        out = self.out
        if not out:
            return
        self.out = []  # first: writing may call back into us
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.write(out[0] if len(out) == 1 else b"".join(out))

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False

    def close(self) -> None:
        """Close after what was written has been sent."""
        if self.transport is not None:
            self.flush()
            self.transport.close()

    def abort(self) -> None:
        """Close at once; what was not sent yet is dropped."""
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.out = []
        self.closed("closed by the peer" if exc is None else str(exc) or type(exc).__name__)

    def closed(self, reason: str) -> None:
        """The connection is gone."""


class FramedConnection(Connection):
    """One that speaks frames. Subclasses override `messages_received`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        super().__init__(loop)
        self.decoder = FrameDecoder(frame_bytes_max)
        self.encoder = FrameEncoder(frame_bytes_max)

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        try:
            messages = self.decoder.feed(data)
            if messages:
                self.messages_received(messages)
        except ProtocolError as error:
            self.protocol_error(error)

    def messages_received(self, messages: list[Any]) -> None:
        """The messages of one read."""
        raise AssertionError("a connection has to say what it does with messages")

    def send(self, message: Any) -> None:
        """Queue one message; it leaves with the next `flush`. Raises RequestError if it is too large."""
        self.out.append(self.encoder.encode(message))
