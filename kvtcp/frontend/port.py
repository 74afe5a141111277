"""The client port: which session a new connection gets, by the first byte that a client sends.

I/O shell above the sessions of all protocols, none of which knows another. 0xCE begins a frame of kvtcp. Any other byte
comes from a client of the Redis protocol, or a person who types; if that protocol is not served, the connection is
refused with a sentence. After the first bytes the connection is the session's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from kvtcp.errors import ProtocolError
from kvtcp.frontend.clients import Clients
from kvtcp.frontend.connection import ClientConnection
from kvtcp.frontend.native.handler import RequestHandler
from kvtcp.frontend.native.session import ClientSession
from kvtcp.frontend.resp.service import RespService
from kvtcp.frontend.resp.session import RespSession
from kvtcp.protocol.framing import PREFIX_BYTE

FOREIGN_FACE: Final = b"-ERR this port speaks the kvtcp protocol (length-prefixed msgpack); use kvtcp-shell\r\n"

MakeSession = Callable[[], ClientConnection]


class Port:
    """Make the protocol objects of the coordinator's listening socket. Without a service Redis clients are refused."""

    def __init__(
        self, clients: Clients, begin: Callable[[], None], requests_read: Callable[[int], None],
        handler: RequestHandler, service: RespService | None,
    ) -> None:  # fmt: skip
        self._clients = clients
        self.sessions_by_byte: dict[int, MakeSession] = {
            PREFIX_BYTE: partial(ClientSession, clients, begin, requests_read, handler)
        }
        self.other_session: MakeSession | None = None  # for every other first byte; None = refused
        if service is not None:
            self.other_session = partial(RespSession, clients, begin, requests_read, service)

    def connection(self) -> NewConnection:
        """Return the protocol object of an accepted connection."""
        return NewConnection(self._clients, self)


class NewConnection(ClientConnection):
    """A connection that has received nothing yet. It counts as a client like all others."""

    def __init__(self, clients: Clients, port: Port) -> None:
        super().__init__(clients, lambda: None, lambda requests: None)  # it reads no request itself
        self._port = port

    @property
    def unfinished_bytes(self) -> int:
        return 0

    def data_received(self, data: bytes) -> None:
        make_session = self._port.sessions_by_byte.get(data[0], self._port.other_session)
        if make_session is None:
            self.out.append(FOREIGN_FACE)
            self.protocol_error(ProtocolError(f"first byte is {data[0]:#04x}, not {PREFIX_BYTE:#04x}"))
            return
        session = make_session()
        session.take_over(self)
        session.data_received(data)
