"""Connections that are made to a node.

I/O shell between the transport and the node's core. The first frame says what a connection is: HELLO makes it a link to
a coordinator, whose frames the core takes from then on; ASK is answered once; after GIVE it belongs to a
DonationStream, until the copy has left. What one read brought is handed over in one call, and answered with one write.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from kvtcp.constants import LINK_FRAME_BYTES_MAX, LINK_WRITE_BUFFER_BYTES
from kvtcp.errors import ProtocolError
from kvtcp.node.core import CoordinatorLink, NodeCore
from kvtcp.node.donor import Donations, DonationStream
from kvtcp.protocol.link import ASK, GIVE, HELLO
from kvtcp.runtime.transport import FramedConnection


class NodeParts(Protocol):
    """The parts of a node that its connections use."""

    loop: asyncio.AbstractEventLoop
    core: NodeCore
    donations: Donations
    connections: set[NodeConnection]  # those that are open


class NodeConnection(FramedConnection):
    """The node's end of a connection."""

    def __init__(self, server: NodeParts) -> None:
        super().__init__(server.loop, LINK_FRAME_BYTES_MAX)
        self.link = CoordinatorLink(self)
        self.stream: DonationStream | None = None  # another node pulls a copy
        self._server = server
        self._core = server.core

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=LINK_WRITE_BUFFER_BYTES)
        self._server.connections.add(self)

    def messages_received(self, messages: list[Any]) -> None:
        while messages and not self.link.accepted:
            self._first_frame(messages[0])
            messages = messages[1:]
        if messages:
            self._core.received(self.link, messages)

    def _first_frame(self, message: Any) -> None:
        if type(message) is not list or not message:
            raise ProtocolError("a frame of a link is an array [kind, ...]")
        if self.stream is not None:
            raise ProtocolError("a node that pulls a copy says nothing after GIVE")
        if message[0] == HELLO and len(message) == 2:
            self._core.hello(self.link, message[1])
        elif message[0] == ASK and len(message) == 2:
            self._core.ask(self, message[1])
        elif message[0] == GIVE and len(message) == 2:
            self._give(message[1])
        else:
            raise ProtocolError("the first frame of a link is HELLO with the cluster's secret")

    def _give(self, fields: Any) -> None:
        given = self._core.give(self, fields)
        if given is not None:
            directory, generation = fields[b"directory"], fields[b"generation"]
            self.stream = self._server.donations.send(self, *given, directory, generation)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport is not None:
            self.transport.resume_reading()
            if self.stream is not None:
                self.stream.resumed()
            else:
                self._core.run(self.link)

    def closed(self, reason: str) -> None:
        if self.stream is not None:
            self.stream.abort(f"the connection was lost: {reason}")
        self._server.connections.discard(self)
        self._core.closed(self.link, reason)
