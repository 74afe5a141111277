"""All clients together: how many there may be, what they may make the coordinator hold, and how they end.

test_bad_input.py and resp/test_session.py run the same rules on real sockets.
"""

from __future__ import annotations

import asyncio

import pytest

from kvtcp.constants import FRAME_WAIT_MS, MIB, WRITE_WAIT_MS
from kvtcp.frontend import clients as module
from tests.frontend.test_connection import Clock, RecordingTransport, Session, transport

LIMIT = 16 * MIB


@pytest.fixture
async def clients(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Without connections."""
    monkeypatch.setattr(module, "BUFFERED_BYTES_MAX", LIMIT)
    return Clock()


def opened(clients: Clock, held_bytes: int = 0) -> Session:
    """A connection that began a request of so many bytes."""
    session = Session(clients)
    session.connection_made(RecordingTransport())
    session.begun_bytes = held_bytes
    session.bytes_read(not held_bytes, 0)
    return session


async def test_one_too_many(clients: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed; when another one is gone there is room again."""
    monkeypatch.setattr(module, "CLIENT_CONNECTIONS_MAX", 2)
    first, second, third = (opened(clients) for _ in range(3))
    assert [transport(session).closing for session in (first, second, third)] == [False, False, True]
    third.connection_lost(None)
    first.connection_lost(None)
    assert not transport(opened(clients)).closing and len(clients.sessions) == 2


async def test_the_greediest_is_closed(clients: Clock) -> None:
    """Over the total the session that holds most is closed at once, and the others are read as before."""
    small, greedy = opened(clients, MIB), opened(clients, LIMIT - MIB)
    assert not clients.is_over_total
    other = opened(clients, 1)
    assert clients.is_over_total is False and transport(greedy).closing, "without it there is room enough"
    greedy.connection_lost(None)
    clients.tick()
    assert clients.buffered_bytes == MIB + 1 == clients.held_bytes
    assert transport(small).is_read and transport(other).is_read and transport(opened(clients)).is_read


async def test_waiting_requests_pause_all(clients: Clock) -> None:
    """What waits for nodes counts, and goes by itself: clients are read again then, and those that hold much are closed
    only if it does not."""
    holder = opened(clients, LIMIT * 3 // 4)
    clients.waiting_bytes = LIMIT // 2
    clients.tick()
    late = opened(clients)
    assert clients.is_over_total and not transport(holder).is_read and not transport(late).is_read
    clients.time_ms += WRITE_WAIT_MS
    clients.tick()
    assert not transport(holder).closing
    clients.waiting_bytes = 0
    clients.time_ms += 1
    clients.tick()
    assert transport(holder).closing and not clients.is_over_total and transport(late).is_read


async def test_late_frames_are_closed(clients: Clock) -> None:
    """A request that is not finished in time ends its connection, and no other."""
    late, other = opened(clients, 5), opened(clients)
    clients.time_ms += FRAME_WAIT_MS + 1
    clients.tick()
    assert transport(late).closing and not transport(other).closing


async def test_drain(clients: Clock) -> None:
    """No client is read any more; it ends when all answers are sent, or when the time is over."""
    session = opened(clients)
    session.outstanding = 1
    draining = asyncio.ensure_future(clients.drain(1_000))
    await asyncio.sleep(0)
    assert not transport(session).is_read and not draining.done()
    session.answer(1)
    await draining
    session.outstanding = 1
    await clients.drain(0)


async def test_ends(clients: Clock) -> None:
    """Closing sends what is queued first, aborting does not."""
    first = opened(clients)
    first.out.append(b"answer")
    clients.dirty.append(first)
    clients.flush()
    assert transport(first).calls == [b"answer"] and not clients.dirty
    first.out.append(b"last")
    clients.close()
    clients.abort()
    assert transport(first).calls == [b"answer", b"last", "close", "abort"]
