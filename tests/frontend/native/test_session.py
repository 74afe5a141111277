"""Client sessions: their limits, what pauses and resumes their reading, and when they end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

import kvtcp
from kvtcp.errors import Code
from kvtcp.frontend import connection as caps
from kvtcp.frontend.clients import FOR_OUTSTANDING
from kvtcp.frontend.native.session import ClientSession
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes.raw_client import BOTH_LOOPS, Wire, event_loop_policy, until
from tests.support.learning_tools import deafen

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    """One node."""
    async with LocalCluster(1, shards=4) as running:
        yield running


async def session_of(cluster: LocalCluster) -> ClientSession:
    """The only session."""
    session: ClientSession = await until(lambda: next(iter(cluster.coordinator.clients.sessions), None), "a session")
    return session


async def test_outstanding_cap(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the cap of unanswered requests a client is not read; every answer comes, and then it is read again."""
    monkeypatch.setattr(caps, "CLIENT_OUTSTANDING_MAX", 10)
    pauses: list[int] = []
    pause = ClientSession.pause

    def counted(self: ClientSession, reason: int) -> None:
        pauses.append(reason)
        pause(self, reason)

    monkeypatch.setattr(ClientSession, "pause", counted)
    async with await Wire.open(cluster.coordinator.address) as wire:
        session = await session_of(cluster)
        for _ in range(3):
            wire.send(*([n, "incr", "a", 1] for n in range(500)))
            assert {(await wire.receive())[0] for _ in range(500)} == set(range(500))
        assert FOR_OUTSTANDING in pauses
        await until(lambda: session._paused_for == 0, "reading again")
        assert session.outstanding == 0 and session.input_bytes == 0


async def test_a_write_that_waits_for_a_node_keeps_nothing_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with a write that cannot commit goes on reading as much as it likes: only what is open is counted."""
    monkeypatch.setattr(caps, "CLIENT_INPUT_BYTES_MAX", 100_000)
    key = "k" * 4000
    async with LocalCluster(2, shards=4) as cluster, await Wire.open(cluster.coordinator.address) as wire:
        assert (await wire.ask("put", key, "v"))[1] == 0
        deafen(cluster.nodes["n1"])
        wire.send([1_000_000, "incr", "stuck", 1])
        await until(lambda: cluster.coordinator.links["n1"].progress.items, "the write on its way")
        await cluster.kill_node("n1")
        for _ in range(50):
            wire.send(*([n, "get", key] for n in range(4)))
            assert sorted([(await wire.receive())[:2] for _ in range(4)]) == [[n, 0] for n in range(4)]
        session = await session_of(cluster)
        assert session.outstanding == 1 and session.input_bytes < 20_000


async def test_reply_that_is_too_large(cluster: LocalCluster) -> None:
    """An answer over the limit of a frame becomes TOO_LARGE, and the counts of the session stay right."""
    async with await Wire.open(cluster.coordinator.address) as wire:
        session = await session_of(cluster)
        cluster.coordinator.begin()
        session.outstanding += 1
        session.reply(7, b"x" * (17 << 20))
        assert session.outstanding == 0
        answer = await wire.receive()
        assert answer[:2] == [7, Code.TOO_LARGE] and answer[3][b"bytes_max"] == 16 << 20


async def test_client_that_left_is_answered_to_nobody(cluster: LocalCluster) -> None:
    """Requests of a client that vanished are executed, their answers are dropped, nothing is kept."""
    async with kvtcp.connect(cluster.url) as kv:
        wire = await Wire.open(cluster.coordinator.address)
        before = set(cluster.coordinator.clients.sessions)
        session = await until(lambda: next((s for s in before if s.name == "test"), None))
        link = cluster.coordinator.links["n1"].connection
        assert link is not None
        link.pause_writing()
        wire.send(*([n, "incr", "left", 1] for n in range(50)))
        await until(lambda: session.outstanding == 50, "the requests")
        wire.writer.transport.abort()
        await until(lambda: session._half_closed or session.transport is None, "the news that it is gone")
        link.resume_writing()
        await until(lambda: not session.outstanding, "the answers")
        await until(lambda: session not in cluster.coordinator.clients.sessions, "the end of the session")
        assert await kv.get("left") == b"50"
        assert session.out == [] and session.held_bytes == 0


async def test_long_requests_do_not_count(cluster: LocalCluster) -> None:
    """A long request is neither outstanding nor forgotten: a half-closed client still gets its answer."""
    async with await Wire.open(cluster.coordinator.address) as wire:
        session = await session_of(cluster)
        session.outstanding += 1
        session.long_began()
        assert (session.outstanding, session.long) == (0, 1)
        wire.writer.write_eof()
        await until(lambda: session._half_closed, "the end of what it sends")
        cluster.coordinator.begin()
        ticks = cluster.coordinator._ticks
        await until(lambda: cluster.coordinator._ticks > ticks + 1, "two ticks")
        assert session in cluster.coordinator.clients.sessions
        cluster.coordinator.begin()
        session.progress(3, {"done": 1})
        session.long_ends()
        session.reply(3, "done")
        assert await wire.receive() == [3, Code.PROGRESS, {b"done": 1}]
        assert await wire.receive() == [3, 0, b"done"]
        assert await wire.closed() == b""


async def test_errors_keep_their_order(cluster: LocalCluster) -> None:
    """What is wrong in a pipeline is answered beside the good requests, each id exactly once."""
    async with await Wire.open(cluster.coordinator.address) as wire:
        requests: list[list[Any]] = [[n, "put", f"k{n}", "v"] if n % 3 else [n, "put", ""] for n in range(300)]
        wire.send(*requests)
        answers = [await wire.receive() for _ in requests]
        assert sorted(answer[0] for answer in answers) == list(range(300))
        assert all((answer[1] == 0) == bool(answer[0] % 3) for answer in answers)


async def test_an_idle_client_that_has_read_everything_holds_nothing(cluster: LocalCluster) -> None:
    """Also if it read the rest long after the last answer was written: or many of them would keep everybody out."""
    async with await Wire.open(cluster.coordinator.address) as wire:
        session = await session_of(cluster)
        await wire.ask("put", "large", b"v" * 900_000)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.send(*([number, "get", "large"] for number in range(10)))
        await until(lambda: session.unread_bytes and not session.outstanding, "unread answers")
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(10):
            await wire.receive()
        await until(lambda: session.held_bytes == 0 == cluster.coordinator.clients.held_bytes, "nothing is held")
