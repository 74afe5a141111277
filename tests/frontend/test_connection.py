"""Limits of client connections, on a transport that records what is done to it, with a clock that the test sets."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import CLIENT_INPUT_BYTES_MAX, CLIENT_OUTPUT_BYTES_MAX, CLIENT_OUTSTANDING_MAX, FRAME_WAIT_MS
from kvtcp.frontend.clients import FOR_OUTPUT, FOR_OUTSTANDING, FOR_STOP, FOR_TOTAL, Clients
from kvtcp.frontend.connection import ClientConnection
from tests.runtime.test_transport import FakeTransport


class RecordingTransport(FakeTransport):
    """Has a write buffer that the test sets, and says when it is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.buffered_bytes = 0
        self.is_read = True
        self.high = 0
        self.protocol: Any = None

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high or 0

    def get_write_buffer_size(self) -> int:
        return self.buffered_bytes

    def pause_reading(self) -> None:
        assert self.is_read, "it is paused once"
        self.is_read = False

    def resume_reading(self) -> None:
        assert not self.is_read, "it is resumed once"
        self.is_read = True


class Clock(Clients):
    """Clients whose time, and what waits for nodes, is set by the test."""

    def __init__(self) -> None:
        super().__init__(lambda: self.time_ms, lambda: self.waiting_bytes)
        self.time_ms = 1_000
        self.waiting_bytes = 0


class Session(ClientConnection):
    """One whose requests are answered by the test."""

    def __init__(self, clients: Clients | None = None) -> None:
        self.complete: list[int] = []  # requests of each read
        super().__init__(clients or Clock(), lambda: None, self.complete.append)
        self.begun_bytes = 0

    @property
    def unfinished_bytes(self) -> int:
        return self.begun_bytes

    def ask(self, requests: int, size: int) -> None:
        """A read of the socket brought so many whole requests."""
        self.input_bytes += size
        self.outstanding += requests
        self._asked += requests
        self.bytes_read(True, requests)

    def answer(self, requests: int) -> None:
        """They are answered in this tick."""
        self.outstanding -= requests
        self.flush()


@pytest.fixture
async def session() -> Session:
    """A connection that was made."""
    made = Session()
    made.connection_made(RecordingTransport())
    return made


def transport(session: Session) -> RecordingTransport:
    """Where it writes to."""
    assert isinstance(session.transport, RecordingTransport)
    return session.transport


async def test_a_connection_is_made(session: Session) -> None:
    """It is one of the clients, and the transport knows the cap."""
    assert session.clients.sessions == {session}
    assert transport(session).high == CLIENT_OUTPUT_BYTES_MAX


async def test_reasons_add_up(session: Session) -> None:
    """The socket is read when the last reason is gone; stopping is never over."""
    for reason in (FOR_OUTPUT, FOR_TOTAL, FOR_TOTAL):
        session.pause(reason)
    session.resume(FOR_OUTPUT)
    session.resume(FOR_OUTSTANDING)
    assert not transport(session).is_read
    session.resume(FOR_TOTAL)
    assert transport(session).is_read
    session.pause(FOR_STOP)
    session.pause_writing()
    session.resume_writing()
    assert not transport(session).is_read


async def test_outstanding_requests(session: Session) -> None:
    """Over the cap it is not read, until half of them are answered."""
    session.ask(CLIENT_OUTSTANDING_MAX, 1000)
    assert transport(session).is_read
    session.ask(1, 10)
    assert not transport(session).is_read
    session.answer(CLIENT_OUTSTANDING_MAX // 2)
    assert not transport(session).is_read
    session.answer(1)
    assert transport(session).is_read
    session.answer(session.outstanding)
    assert session.input_bytes == 0
    assert session.complete == [CLIENT_OUTSTANDING_MAX, 1] and session.clients.requests == CLIENT_OUTSTANDING_MAX + 1


async def test_bytes_of_outstanding_requests(session: Session) -> None:
    """Over the cap it is not read, until their share is below it; one request of any size is let through."""
    session.ask(2, CLIENT_INPUT_BYTES_MAX + 10)
    assert not transport(session).is_read
    session.answer(1)
    assert transport(session).is_read and session.input_bytes == CLIENT_INPUT_BYTES_MAX // 2 + 5
    session.answer(1)
    session.input_bytes = CLIENT_INPUT_BYTES_MAX * 2
    session.bytes_read(False, 0)
    assert transport(session).is_read, "nothing is outstanding: the rest of it has to come in"


async def test_what_is_held_is_told(session: Session) -> None:
    """An unfinished request and unread answers are on the account of all clients, and off it at the end."""
    clients: Any = session.clients
    session.begun_bytes = 700
    session.bytes_read(False, 0)
    assert clients.held_bytes == 700 == session.held_bytes
    transport(session).buffered_bytes = 5_000
    session.flush()
    assert clients.held_bytes == 5_700
    session.begun_bytes = 0
    transport(session).buffered_bytes = 1_000
    session.resume_writing()
    assert clients.held_bytes == 1_000
    session.connection_lost(None)
    assert clients.held_bytes == 0 and not clients.sessions
    session.begun_bytes = 9
    session.account()
    session.flush()
    assert clients.held_bytes == 0, "a connection that is gone holds nothing"


async def test_what_was_read_silently_is_off_the_account(session: Session) -> None:
    """Nobody is told when a client reads the last of what was written: the server looks, with every tick."""
    clients: Any = session.clients
    transport(session).buffered_bytes = 5_000
    session.flush()
    transport(session).buffered_bytes = 0
    assert clients.held_bytes == 5_000
    session.check_unread()
    assert clients.held_bytes == 0 == session.unread_bytes
    session.connection_lost(None)
    session.check_unread()


async def test_late_frames(session: Session) -> None:
    """A request that was begun must become complete in time; the time begins anew with each, and with a pause."""
    clients: Any = session.clients
    session.begun_bytes = 3
    session.bytes_read(False, 0)
    clients.time_ms += FRAME_WAIT_MS
    session.bytes_read(False, 0)
    assert not session.frame_is_late(clients.time_ms) and session.frame_is_late(clients.time_ms + 1)
    session.pause(FOR_TOTAL)
    assert not session.frame_is_late(clients.time_ms + 1)
    session.resume(FOR_TOTAL)
    assert not session.frame_is_late(clients.time_ms + 1)
    clients.time_ms += FRAME_WAIT_MS
    session.bytes_read(False, 1)
    assert not session.frame_is_late(clients.time_ms + 1), "another request became complete"
    session.bytes_read(True, 1)
    assert not session.frame_is_late(clients.time_ms + 10 * FRAME_WAIT_MS)


async def test_half_close(session: Session) -> None:
    """Without anything outstanding the connection ends, else when all of it is answered."""
    session.out.append(b"last")
    assert session.eof_received() is False and transport(session).calls[0] == b"last"
    other = Session()
    other.connection_made(RecordingTransport())
    other.ask(2, 10)
    assert other.eof_received() is True
    other.answer(1)
    assert not transport(other).closing
    other.long, other.outstanding = 1, 0
    other.flush()
    assert not transport(other).closing, "a long request is open"
    other.long = 0
    other.flush()
    assert transport(other).closing
