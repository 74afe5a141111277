"""The client port: which session a new connection gets, by the first byte that a client sends.

I/O shell above the sessions of all protocols, none of which knows another. 0xCE begins a frame of kvtcp; everything
else is a client of the Redis protocol, or a person who types, and is refused with a sentence if that is not served.
After the first bytes the connection is the session's alone, and nothing of this is called again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from kvtcp.errors import ProtocolError
from kvtcp.frontend.clients import Clients
from kvtcp.frontend.connection import ClientConnection
from kvtcp.frontend.native.gateway import RequestHandler
from kvtcp.frontend.native.session import ClientSession
from kvtcp.frontend.resp.service import RespService
from kvtcp.frontend.resp.session import RespSession
from kvtcp.protocol.framing import PREFIX_BYTE

FOREIGN_FACE: Final = b"-ERR this port speaks the kvtcp protocol (length-prefixed msgpack); use kvtcp-shell\r\n"

MakeSession = Callable[[], ClientConnection]


class Port:
    """Makes the protocol objects of the coordinator's listening socket. Without a service Redis clients are refused."""

    def __init__(
        self,
        clients: Clients,
        begin: Callable[[], None],
        requests_read: Callable[[int], None],
        gateway: RequestHandler,
        service: RespService | None,
    ) -> None:
        self._clients = clients
        self.sessions_by_byte: dict[int, MakeSession] = {
            PREFIX_BYTE: partial(ClientSession, clients, begin, requests_read, gateway)
        }
        self.other_session: MakeSession | None = None  # for every other first byte; None = refused
        if service is not None:
            self.other_session = partial(RespSession, clients, begin, requests_read, service)

    def connection(self) -> NewConnection:
        """The protocol object of a connection that is accepted."""
        return NewConnection(self._clients, self)


class NewConnection(ClientConnection):
    """A connection whose client has not said anything yet. It counts as a client like all others."""

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
