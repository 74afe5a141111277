"""Sessions of Redis clients on real sockets: order, caps, endings, and what they may not do to others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

import kvtcp
from kvtcp.constants import (
    ARRAY_ITEMS_MAX,
    CLIENT_OUTPUT_BYTES_MAX,
    CLIENT_OUTSTANDING_MAX,
    MIB,
    RESP_KEYS_MAX,
    VALUE_BYTES_MAX,
)
from kvtcp.frontend import clients as clients_module
from kvtcp.frontend import connection
from kvtcp.frontend.resp.pipeline import TURN_BYTES_MAX
from kvtcp.frontend.resp.session import RespSession
from kvtcp.testing.local_cluster import LocalCluster
from tests.fuzz.resp import array
from tests.fuzz.resp_sockets import attack
from tests.processes.raw_client import BOTH_LOOPS, Wire, event_loop_policy, healthy, until
from tests.support.resp_tools import Error, parse

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS

INPUTS = 600  # of the fuzzer on live sockets; `make fuzz` sends 20,000


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    """Two nodes with both copies; at the end everything is checked and nobody is left behind."""
    async with LocalCluster(2, shards=8) as running:
        yield running
        await until(lambda: not running.coordinator.clients.sessions, "the end of all sessions")
        running.coordinator.sequencer.check()
        assert not running.coordinator.failed.done()
        assert running.coordinator.clients.held_bytes == 0
        assert running.coordinator.status.degraded() == []


class Redis(Wire):
    """A raw client of the Redis protocol."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self.data = b""

    async def replies(self, count: int) -> list[Any]:
        """The next replies, as many as were asked for and not one more."""
        async with asyncio.timeout(30):
            while True:
                try:
                    found = parse(self.data)
                except (ValueError, IndexError, AssertionError):
                    found = []
                if len(found) >= count:
                    break
                data = await self.reader.read(1 << 20)
                if not data:
                    raise EOFError(self.data[-200:])
                self.data += data
        assert len(found) == count, found[count:]
        self.data = b""
        return found

    async def do(self, command: str) -> Any:
        """One command and its reply."""
        self.write(command.encode() + b"\r\n")
        return (await self.replies(1))[0]


async def connect(cluster: LocalCluster) -> Redis:
    """A raw client."""
    return await Redis.open(cluster.coordinator.address, hello=False)


async def session_of(cluster: LocalCluster) -> RespSession:
    """The only session of a Redis client."""

    def found() -> RespSession | None:
        return next((s for s in cluster.coordinator.clients.sessions if isinstance(s, RespSession)), None)

    session: RespSession = await until(found, "a session")
    return session


# --- order and transactions -------------------------------------------------------------------------------


async def test_pipeline_in_order(cluster: LocalCluster) -> None:
    """Thousands of commands of every kind in one write: the replies are in their order."""
    commands, expected = [], []
    for n in range(3000):
        key = b"k%d" % (n % 50)
        commands += [array(b"SET", key, b"%d" % n), array(b"GET", key), array(b"INCR", key), b"ping\r\n"]
        expected += ["OK", b"%d" % n, n + 1, "PONG"]
        if n % 100 == 0:
            commands.append(array(b"DBSIZE") + array(b"MGET", key, b"none") + array(b"NOSUCH"))
            expected += [min(n + 1, 50), [b"%d" % (n + 1), None], None]
    async with await connect(cluster) as wire:
        wire.write(b"".join(commands))
        replies = await wire.replies(len(expected))
        assert [None if type(reply) is Error else reply for reply in replies] == expected
        session = await session_of(cluster)
        await until(lambda: session._paused_for == 0 and session.input_bytes == 0, "reading again")


async def test_counters_of_many_clients(cluster: LocalCluster) -> None:
    """Optimistic increments by WATCH and EXEC: none is lost, whatever the interleaving."""

    async def work() -> None:
        async with await connect(cluster) as wire:
            done = 0
            while done < 20:
                await wire.do("watch n")
                value = int(await wire.do("get n") or 0)
                wire.write(b"multi\r\nset n %d\r\nexec\r\n" % (value + 1))
                done += (await wire.replies(3))[2] == ["OK"]

    await asyncio.gather(*(work() for _ in range(5)))
    async with await connect(cluster) as wire:
        assert await wire.do("get n") == b"100"


async def test_the_largest_transaction(cluster: LocalCluster) -> None:
    """As many keys as a transaction may have, watched ones too, in one item of a link: nodes take it. One that is
    larger is refused, and no link breaks."""
    hellos = dict(cluster.coordinator.controller._hellos)
    async with healthy(cluster), await connect(cluster) as wire:
        keys = [b"{a}%d" % n for n in range(RESP_KEYS_MAX)]
        half = keys[: RESP_KEYS_MAX // 2]
        wire.write(array(b"MSET", *[part for key in keys for part in (key, b"v")]))
        assert await wire.replies(1) == ["OK"]
        for low in range(0, 10_000, 1_000):  # a thousand reads at once find room, on a slow machine too
            wire.write(array(b"WATCH", *keys[low : low + 1_000]))
            assert await wire.replies(1) == ["OK"]
        wire.write(b"multi\r\n")
        wire.write(array(b"DEL", *half))
        wire.write(array(b"MSETNX", *[part for key in half for part in (key, b"w")]) + b"exec\r\n")
        assert await wire.replies(4) == ["OK", "QUEUED", "QUEUED", [RESP_KEYS_MAX // 2, 1]]
        wire.write(b"multi\r\n" + b"".join(array(b"DEL", *keys[:8000]) for _ in range(ARRAY_ITEMS_MAX // 8000 + 1)))
        wire.write(b"exec\r\nget {a}1\r\n")
        replies = await wire.replies(ARRAY_ITEMS_MAX // 8000 + 4)
        assert replies[-2].startswith("EXECABORT") and replies[-1] == b"w"
    assert cluster.coordinator.controller._hellos == hellos, "every link is the first one still"


async def test_largest_values(cluster: LocalCluster) -> None:
    """A value of 8 MiB, with line breaks, there and back; one byte more ends the connection with a sentence."""
    value = b"\r\n" * (VALUE_BYTES_MAX // 2)
    async with await connect(cluster) as wire:
        wire.write(array(b"SET", b"a", value) + array(b"STRLEN", b"a") + array(b"GET", b"a"))
        assert await wire.replies(3) == ["OK", VALUE_BYTES_MAX, value]
        wire.write(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$%d\r\n" % (VALUE_BYTES_MAX + 1))
        assert await wire.closed() == b"-ERR Protocol error: invalid bulk length\r\n"


# --- endings ----------------------------------------------------------------------------------------------


async def test_browsers(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    """What a browser can be made to send ends the connection, is logged and counted, and nothing behind it happens."""
    async with await connect(cluster) as wire:
        wire.write(b"watch b\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nset a 1\r\n")
        await wire.closed()
    assert "reason=HOST: is no command" in caplog.text and cluster.coordinator.clients.protocol_errors == 1
    async with await connect(cluster) as wire:
        assert await wire.do("get a") is None


async def test_protocol_errors(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    """What came before is answered, then the error, then the end; it is logged and counted once."""
    async with await connect(cluster) as wire:
        wire.write(b"set a 1\r\nwatch a\r\nget a\r\n*1\r\n:5\r\n")
        wire.write(b"get a\r\n")
        assert parse(await wire.closed()) == ["OK", "OK", b"1", "ERR Protocol error: expected '$', got ':'"]
    assert cluster.coordinator.clients.protocol_errors == 1 and caplog.text.count("event=protocol-error") == 1


@pytest.mark.parametrize("data", [b"", b"set a 1\r\nkeys *\r\nwatch a\r\nget a\r\n", b"ping\r\n", b"*1\r\n$4\r\nPI"])
async def test_half_close(cluster: LocalCluster, data: bytes) -> None:
    """A client that sends nothing more gets all its replies, then the end, as `printf ... | nc` needs it."""
    async with await connect(cluster) as wire:
        wire.write(data)
        wire.writer.write_eof()
        assert len(parse(await wire.closed())) == data.count(b"\n") * (not data.startswith(b"*"))


async def test_a_client_that_vanishes(cluster: LocalCluster) -> None:
    """In the midst of KEYS, of a pipeline and of a transaction: what it held is off the account."""
    async with kvtcp.connect(cluster.url, timeout=10) as kv:
        await kv.put_many({f"key-{n}": "v" * 100 for n in range(5000)})
        clients = cluster.coordinator.clients
        queued = b"multi\r\n" + b"set a 1\r\n" * 500
        for data in (b"keys *\r\n" * 50, b"mget key-1 key-2\r\n" * 500, queued, b"watch a\r\n"):
            wire = await connect(cluster)
            wire.write(data)
            session = await session_of(cluster)
            await until(lambda session=session: session.pipeline.state.last_command != "NULL", "the first command")
            wire.writer.transport.abort()
            await until(lambda session=session: session not in clients.sessions, "the end of the session")
            await until(lambda: not clients.held_bytes, "the account without it")
        assert await kv.count() >= 5000


async def test_a_command_never_finished(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that was begun and never finished closes its connection, at whatever byte it stopped."""
    monkeypatch.setattr(connection, "FRAME_WAIT_MS", 60)
    async with await connect(cluster) as idle:
        assert await idle.do("ping") == "PONG"
        for data in (b"*", b"*2\r\n", b"*2\r\n$3\r\nGE", b"*2\r\n$3\r\nGET\r\n", b"ge"):
            async with await connect(cluster) as wire:
                wire.write(data)
                assert await wire.closed() == b""
        assert await idle.do("ping") == "PONG", "a connection without a command under way may be idle"
    assert caplog.text.count("its frame was never finished") == 5


# --- caps -------------------------------------------------------------------------------------------------


async def test_unread_replies(cluster: LocalCluster) -> None:
    """Who does not read its replies is not read any more; others do not notice; then all of them come."""
    value = b"v" * 100_000
    async with healthy(cluster), await connect(cluster) as wire:
        wire.write(array(b"SET", b"a", value))
        await wire.replies(1)
        session = await session_of(cluster)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(40):
            wire.write(array(b"GET", b"a") * 10)
        await until(lambda: session._paused_for & connection.FOR_OUTPUT, "the pause")
        assert session.unread_bytes > CLIENT_OUTPUT_BYTES_MAX or session.held_bytes
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await wire.replies(400) == [value] * 400
        await until(lambda: session._paused_for == 0, "reading again")


async def test_replies_made_at_once_are_bounded(cluster: LocalCluster) -> None:
    """Thousands of COMMANDs in one read of a client that does not read: what the server holds stays near the cap."""
    count = 5000
    async with healthy(cluster), await connect(cluster) as wire:
        await wire.do("ping")
        session = await session_of(cluster)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.write(b"command\r\n" * count)
        await until(lambda: session.write_paused and session.pipeline.held, "a full buffer")
        ticks, slots = cluster.coordinator._ticks, session.outstanding
        await until(lambda: cluster.coordinator._ticks > ticks + 2, "two ticks")
        assert session.outstanding == slots, "nothing more is made"
        assert session.held_bytes < CLIENT_OUTPUT_BYTES_MAX + 2 * TURN_BYTES_MAX
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        size = 0
        async with asyncio.timeout(60):
            while session.outstanding or session.unread_bytes:
                with suppress(TimeoutError):  # what was read last may have been all
                    size += len(await asyncio.wait_for(wire.reader.read(1 << 20), 0.2))
        assert size > count * 1000
        await until(lambda: session._paused_for == 0, "reading again")


async def test_outstanding_commands(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the cap of unanswered commands a client is not read; every reply comes, in order, and it is read again."""
    assert CLIENT_OUTSTANDING_MAX == 16_384
    monkeypatch.setattr(connection, "CLIENT_OUTSTANDING_MAX", 10)
    pauses: list[int] = []
    pause = RespSession.pause

    def counted(self: RespSession, reason: int) -> None:
        pauses.append(reason)
        pause(self, reason)

    monkeypatch.setattr(RespSession, "pause", counted)
    async with await connect(cluster) as wire:
        for round_ in range(3):
            wire.write(b"incr a\r\n" * 500)
            assert await wire.replies(500) == list(range(round_ * 500 + 1, round_ * 500 + 501))
        session = await session_of(cluster)
        assert connection.FOR_OUTSTANDING in pauses
        await until(lambda: session._paused_for == 0, "reading again")
        assert session.outstanding == 0 and session.input_bytes == 0


async def test_replies_behind_a_slow_one(cluster: LocalCluster) -> None:
    """Large replies that wait for an earlier one count as unread: the client is not read until that one comes."""
    async with await connect(cluster) as wire, await connect(cluster) as other:
        wire.write(array(b"SET", b"large", b"v" * 100_000))
        await wire.replies(1)
        session = await session_of(cluster)
        session.pipeline.slots.append([None])  # a command whose answer does not come
        wire.write(array(b"GET", b"large") * 30)
        await until(lambda: session._paused_for & connection.FOR_OUTPUT, "the pause")
        assert session.pipeline.large_bytes > CLIENT_OUTPUT_BYTES_MAX and session.held_bytes > CLIENT_OUTPUT_BYTES_MAX
        assert cluster.coordinator.clients.held_bytes >= session.held_bytes
        assert await other.do("ping") == "PONG"
        session.pipeline.fill(session.pipeline.slots[0], b"+SLOW\r\n")
        assert (await wire.replies(31))[0] == "SLOW"
        await until(lambda: session._paused_for == 0, "reading again")


async def test_the_total_cap(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unfinished commands, queued transactions and gathered keys of all clients together: the client that holds most is
    closed, and others go on."""
    monkeypatch.setattr(clients_module, "BUFFERED_BYTES_MAX", 4 * MIB)
    async with healthy(cluster), await connect(cluster) as small:
        assert await small.do("set a 1") == "OK"
        greedy = [
            [array(b"MULTI"), *[array(b"SET", b"a", b"v" * MIB)] * 5],
            [array(b"MULTI"), *[array(b"ECHO", b"v" * MIB)] * 5],
            [b"*2\r\n$3\r\nGET\r\n$%d\r\n" % (6 * MIB), b"v" * 5 * MIB],
        ]
        for pieces in greedy:
            caplog.clear()
            async with await connect(cluster) as wire:
                wire.write(b"".join(pieces))
                await wire.closed()
            assert "and this client holds most of them" in caplog.text
            assert await small.do("get a") == b"1"


async def test_many_unfinished_commands_are_counted(cluster: LocalCluster) -> None:
    """Arguments of no byte cost memory all the same."""
    async with await connect(cluster) as wire:
        wire.write(b"*60001\r\n" + b"$0\r\n\r\n" * 60_000)
        session = await session_of(cluster)
        await until(lambda: session.held_bytes > 60_000 * 40, "what they cost")
        await until(lambda: cluster.coordinator.clients.held_bytes == session.held_bytes, "the account")


# --- fuzz -------------------------------------------------------------------------------------------------


async def test_random_streams(cluster: LocalCluster) -> None:
    """Hundreds of connections with random streams: the server is up, within its caps, and a healthy client beside them
    notices nothing."""
    await attack(cluster, INPUTS, random.SystemRandom().randrange(2**32))
