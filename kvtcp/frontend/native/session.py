"""Sessions: the coordinator's end of client connections that speak the protocol of kvtcp.

I/O shell. A session decodes requests for the handler and is the sink of their answers, which leave with one write per
tick. Its limits are those of every client connection (frontend/connection.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtcp.errors import Code, ProtocolError, RequestError
from kvtcp.frontend.clients import Clients
from kvtcp.frontend.connection import ClientConnection
from kvtcp.frontend.native.handler import RequestHandler
from kvtcp.protocol.framing import PREFIX_CACHE_LENGTHS, PREFIXES, FrameDecoder, FrameEncoder


class ClientSession(ClientConnection):
    """One client connection. Sink of its requests: `reply`, `fail`, `progress`."""

    def __init__(
        self, clients: Clients, begin: Callable[[], None], requests_read: Callable[[int], None], handler: RequestHandler
    ) -> None:
        super().__init__(clients, begin, requests_read)
        self.handler = handler
        self.decoder = FrameDecoder()
        self.encoder = FrameEncoder()
        self.greeted = False  # hello was accepted
        self.name = "?"  # of the client, given by hello

    @property
    def unfinished_bytes(self) -> int:
        return self.decoder.buffered_bytes

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        self.begin()
        self.input_bytes += len(data)
        try:
            messages = self.decoder.feed(data)
            if messages:
                self.outstanding += len(messages)
                self._asked += len(messages)
                self.handler.handle(self, messages)
        except ProtocolError as error:
            self.protocol_error(error)
            return
        self.bytes_read(not self.decoder.buffered_bytes, len(messages))

    # --- sink ---------------------------------------------------------------------------------------

    def reply(self, token: int, result: Any) -> None:
        """Queue the answer of request `token`. On the data path: everything inline, 0.5 us with the packing."""
        out = self.out
        if not out:
            self.clients.dirty.append(self)
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
        """Queue the error of request `token`."""
        self._queue((token, int(code), message, details))
        self.outstanding -= 1

    def long_began(self) -> None:
        """Exempt a request that will take long from the limit on outstanding ones."""
        self.outstanding -= 1
        self.long += 1

    def long_ends(self) -> None:
        """Count such a request again, before its answer."""
        self.long -= 1
        self.outstanding += 1

    def progress(self, token: int, progress: dict[str, Any]) -> None:
        """Queue how far the long request `token` is."""
        self._queue((token, int(Code.PROGRESS), progress))

    def _queue(self, message: Any) -> None:
        if not self.out:
            self.clients.dirty.append(self)
        self.out.append(self.encoder.encode(message))
        self.begin()
