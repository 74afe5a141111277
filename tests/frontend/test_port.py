"""The client port: the first byte of a connection says which session it gets, and no session knows another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

import kvtcp
from kvtcp.frontend.clients import FOR_TOTAL
from kvtcp.frontend.port import NewConnection, Port
from kvtcp.frontend.resp.session import RespSession
from kvtcp.testing.local_cluster import LocalCluster
from tests.frontend.resp.test_session import connect
from tests.frontend.test_connection import Clock, RecordingTransport, Session
from tests.fuzz.resp import array
from tests.processes.raw_client import BOTH_LOOPS, event_loop_policy, until

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    """Two nodes with both copies."""
    async with LocalCluster(2, shards=8) as running:
        yield running


async def test_the_first_byte_decides(cluster: LocalCluster) -> None:
    """On one port a frame begins kvtcp's protocol, everything else that of Redis; both see the same bytes."""
    value = bytes(range(256)) * 10 + b"\r\n"
    async with await connect(cluster) as wire, kvtcp.connect(cluster.url, timeout=10) as kv:
        wire.write(array(b"SET", b"a\0\xff", value))
        assert await wire.replies(1) == ["OK"]
        assert await kv.get(b"a\0\xff") == value
        await kv.put("b", value, ttl=100)
        wire.write(array(b"GET", b"b") + array(b"TTL", b"b") + array(b"EXISTS", b"a\0\xff"))
        assert await wire.replies(3) == [value, 100, 1]
        assert await kv.incr("n", 5) == 5 and await wire.do("incrby n 2") == 7 and await kv.get("n") == b"7"
        await wire.do("expire n 50")
        ttl = await kv.ttl("n")
        assert ttl is not None and 45 < ttl <= 50
        assert [key async for key, _ in kv.scan()] == await wire.do("keys *")


async def test_without_the_face(caplog: pytest.LogCaptureFixture) -> None:
    """`--no-resp`: one line that says so, a closed connection, a warning in the log, and a count."""
    async with LocalCluster(1, shards=4, resp=False) as cluster:
        async with await connect(cluster) as wire:
            wire.write(array(b"PING"))
            assert (await wire.closed()).startswith(b"-ERR this port speaks the kvtcp protocol")
        assert cluster.coordinator.clients.protocol_errors == 1 and "first byte is 0x2a" in caplog.text


async def test_a_connection_before_its_first_byte(cluster: LocalCluster) -> None:
    """It is a client like all others, and then a session takes its place."""
    async with await connect(cluster) as wire:
        (connection,) = await until(lambda: cluster.coordinator.clients.sessions, "the connection")
        assert isinstance(connection, NewConnection) and connection.peer.startswith("127.0.0.1:")
        assert await wire.do("ping") == "PONG"
        (session,) = cluster.coordinator.clients.sessions
        assert isinstance(session, RespSession) and session.pipeline.state.peer == connection.peer


class Reader(Session):
    """Keeps what it is given."""

    data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data


async def test_reasons_to_pause_are_kept() -> None:
    """The session continues the connection as it was left; the byte that was looked at is its first one."""
    clients: Any = Clock()
    port = Port(clients, lambda: None, lambda requests: None, None, None)  # type: ignore[arg-type]
    port.sessions_by_byte[ord("x")] = lambda: Reader(clients)
    connection, transport = port.connection(), RecordingTransport()
    connection.connection_made(transport)
    connection.pause(FOR_TOTAL)
    connection.data_received(b"xyz")
    (session,) = clients.sessions
    assert session.data == b"xyz" and transport.protocol is session
    session.resume(FOR_TOTAL)
    assert transport.is_read
