"""Clients: the client connections of a coordinator, and the bytes they make it hold together.

I/O shell, below the sessions of every protocol. Each connection limits itself (connection.py); here are the limits of
all of them: CLIENT_CONNECTIONS_MAX, and BUFFERED_BYTES_MAX for unfinished requests, unread answers and requests that
wait for nodes. Over the second no client is read; if that does not help, the sessions that hold most are closed, with
the reason in the log.

Invariants: `sessions` are the open connections; `held_bytes` is the sum of their bytes on the account; a session is
in `dirty` if it has something to send in this turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

from kvtcp.constants import BUFFERED_BYTES_MAX, CLIENT_CONNECTIONS_MAX, TICK_MS, WRITE_WAIT_MS

log = logging.getLogger("kvtcp.clients")

# reasons for not reading a client's socket; it is read when none is left
FOR_OUTPUT: Final = 1
FOR_OUTSTANDING: Final = 2
FOR_TOTAL: Final = 4
FOR_STOP: Final = 8  # the server stops: never resumed


class ConnectedClient(Protocol):
    """A connection as Clients sees it. ClientConnection describes the methods."""

    peer: str
    out: list[bytes]

    @property
    def outstanding(self) -> int: ...
    @property
    def held_bytes(self) -> int: ...

    def pause(self, reason: int) -> None: ...
    def resume(self, reason: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def check_unread(self) -> None: ...
    def frame_is_late(self, now_ms: int) -> bool: ...


class Clients:
    """One per coordinator. `now_ms` is monotonic; `waiting_bytes` returns the bytes of requests that wait for nodes."""

    def __init__(self, now_ms: Callable[[], int], waiting_bytes: Callable[[], int]) -> None:
        self.now_ms = now_ms
        self._waiting_bytes = waiting_bytes
        self.sessions: set[ConnectedClient] = set()
        self.dirty: list[ConnectedClient] = []  # with answers to flush at the end of this turn
        self.requests = 0  # complete ones that were read since the start
        self.protocol_errors = 0
        self.held_bytes = 0  # by the sessions, at any time
        self.buffered_bytes = 0  # by the sessions and by waiting requests, as of the last tick
        self.is_over_total = False  # no client is read because of the total
        self._over_since_ms = 0  # since when; meaningful while `is_over_total`

    # --- connections --------------------------------------------------------------------------------

    def session_opened(self, session: ConnectedClient) -> None:
        """Add a connection that was made, or refuse it."""
        self.sessions.add(session)
        if len(self.sessions) > CLIENT_CONNECTIONS_MAX:
            log.warning("event=session-refused peer=%s reason=%s connections", session.peer, CLIENT_CONNECTIONS_MAX)
            session.abort()
        elif self.is_over_total:
            session.pause(FOR_TOTAL)

    def session_closed(self, session: ConnectedClient) -> None:
        """Forget a connection that is gone; its requests are still executed."""
        self.sessions.discard(session)

    def flush(self) -> None:
        """Send the answers of this turn."""
        dirty, self.dirty = self.dirty, []
        for session in dirty:
            session.flush()

    def tick(self) -> None:
        """Close sessions with a late frame, and enforce the total; every TICK_MS."""
        now_ms = self.now_ms()
        for session in [s for s in self.sessions if s.frame_is_late(now_ms)]:
            log.warning("event=session-closed peer=%s reason=its frame was never finished", session.peer)
            session.abort()
        for session in list(self.sessions):
            session.check_unread()
        self._enforce_total()

    async def drain(self, wait_ms: int) -> None:
        """Read no new requests; return when the open ones are answered, or after `wait_ms`."""
        for session in self.sessions:
            session.pause(FOR_STOP)
        deadline_ms = self.now_ms() + wait_ms
        # polled: an event would have to be kept on the path of every answer
        while self.now_ms() < deadline_ms and any(s.outstanding or s.out for s in self.sessions):  # noqa: ASYNC110
            await asyncio.sleep(TICK_MS / 1000 / 5)

    def abort(self) -> None:
        """Close all connections at once: no client gets another answer."""
        for session in list(self.sessions):
            session.abort()

    def close(self) -> None:
        """Close all connections; answers that were written are sent."""
        for session in list(self.sessions):
            session.close()

    # --- the total ----------------------------------------------------------------------------------

    def account(self, difference_bytes: int) -> None:
        """Count the bytes by which a session's total changed. Enforced at once, as much can come within one tick."""
        self.held_bytes += difference_bytes
        if self.held_bytes > BUFFERED_BYTES_MAX:
            self._enforce_total()

    def _enforce_total(self) -> None:
        """Keep the bytes held for all clients under BUFFERED_BYTES_MAX.

        Over it no client is read any more. Requests that wait for nodes are gone after WRITE_WAIT_MS, but unfinished
        frames and unread answers may stay for ever, and would keep all clients out. The sessions that hold most of
        them are closed: at once if these bytes alone are over the limit, else when waiting did not help.
        """
        held = held_by_sessions = sum(session.held_bytes for session in self.sessions)
        held += self._waiting_bytes()
        self.buffered_bytes = held
        resume_bytes = BUFFERED_BYTES_MAX * 3 // 4
        if held > BUFFERED_BYTES_MAX and not self.is_over_total:
            self.is_over_total = True
            self._over_since_ms = self.now_ms()
            log.warning("event=over-total held_bytes=%s limit_bytes=%s", held, BUFFERED_BYTES_MAX)
            for session in self.sessions:
                session.pause(FOR_TOTAL)
        if not self.is_over_total:
            return
        late = self.now_ms() - self._over_since_ms > WRITE_WAIT_MS
        allowed_bytes = resume_bytes - 1 if late else BUFFERED_BYTES_MAX
        if held_by_sessions > allowed_bytes:
            for session in sorted(self.sessions, key=lambda session: session.held_bytes, reverse=True):
                log.warning(
                    "event=session-closed peer=%s reason=the server holds %s bytes for clients, the limit is %s, "
                    "and this client holds most of them (%s)",
                    session.peer, held, BUFFERED_BYTES_MAX, session.held_bytes,
                )  # fmt: skip
                held_by_sessions -= session.held_bytes
                held -= session.held_bytes
                session.abort()
                if held_by_sessions <= allowed_bytes:
                    break
        if held < resume_bytes:
            self.is_over_total = False
            for session in self.sessions:
                session.resume(FOR_TOTAL)
