"""FramedConnection on a transport that records what is done to it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvtcp.constants import FRAME_BYTES_MAX, LINK_FRAME_BYTES_MAX
from kvtcp.errors import RequestError
from kvtcp.runtime.transport import FramedConnection
from tests.processes.raw_client import pack


class FakeTransport(asyncio.Transport):
    """Records calls."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 99)})
        self.calls: list[Any] = []
        self.closing = False

    def write(self, data: Any) -> None:
        self.calls.append(bytes(data))

    def close(self) -> None:
        self.calls.append("close")
        self.closing = True

    def abort(self) -> None:
        self.calls.append("abort")
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing


class Connection(FramedConnection):
    """Keeps what it is given."""

    def __init__(self, loop: asyncio.AbstractEventLoop, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        super().__init__(loop, frame_bytes_max)
        self.received: list[list[Any]] = []
        self.reasons: list[str] = []

    def messages_received(self, messages: list[Any]) -> None:
        self.received.append(messages)

    def closed(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture
async def connection() -> Connection:
    """A connection that was made."""
    made = Connection(asyncio.get_running_loop())
    made.connection_made(FakeTransport())
    return made


def calls(connection: Connection) -> list[Any]:
    """What was done to its transport."""
    transport = connection.transport
    assert isinstance(transport, FakeTransport)
    return transport.calls


async def test_one_write_per_flush(connection: Connection) -> None:
    """However many messages were sent, a flush is one write; without any there is none."""
    connection.flush()
    assert calls(connection) == []
    for n in range(5):
        connection.send([n])
    assert calls(connection) == [], "nothing leaves before the flush"
    connection.flush()
    connection.flush()
    assert calls(connection) == [b"".join(pack([n]) for n in range(5))]


async def test_messages_of_one_read_come_together(connection: Connection) -> None:
    """All messages of one read are delivered in one call; half a message waits for its rest."""
    data = pack([1]) + pack([2]) + pack([3])
    connection.data_received(data[:-2])
    connection.data_received(data[-2:])
    assert connection.received == [[[1], [2]], [[3]]]


async def test_protocol_error_closes(connection: Connection, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that are no frame close the connection with peer and reason in the log; what was sent before leaves."""
    connection.send([1])
    connection.data_received(b"GET /")
    assert calls(connection) == [pack([1]), "close"]
    assert "peer=127.0.0.1:99" in caplog.text and "does not start a frame" in caplog.text


async def test_nothing_is_delivered_after_close(connection: Connection) -> None:
    """What the transport may still bring after `close` or an error is not looked at, nor decoded."""
    connection.data_received(b"\xff")
    connection.data_received(pack([1]))
    assert connection.received == []
    connection.connection_lost(None)
    connection.data_received(pack([1]))
    assert connection.received == []


async def test_flush_after_close_writes_nothing(connection: Connection) -> None:
    """Answers that come after the connection was closed or lost are dropped, not kept."""
    connection.close()
    connection.send([1])
    connection.flush()
    assert calls(connection) == ["close"] and connection.out == []
    connection.connection_lost(OSError("reset"))
    connection.send([2])
    connection.flush()
    connection.close()
    connection.abort()
    assert connection.out == [] and connection.reasons == ["reset"]


async def test_write_pause_is_remembered(connection: Connection) -> None:
    """The high-water mark of the transport is seen in `write_paused`."""
    connection.pause_writing()
    assert connection.write_paused
    connection.resume_writing()
    assert not connection.write_paused


async def test_frame_limits() -> None:
    """The limit of a connection holds in both directions; links have twice that of clients."""
    small, large = Connection(asyncio.get_running_loop()), Connection(asyncio.get_running_loop(), LINK_FRAME_BYTES_MAX)
    for each in (small, large):
        each.connection_made(FakeTransport())
    message = [b"x" * FRAME_BYTES_MAX]
    with pytest.raises(RequestError):
        small.send(message)
    large.send(message)
    small.data_received(large.out[0][:100])
    assert calls(small) == ["close"]
    large.data_received(large.out[0])
    assert large.received == [[message]]
