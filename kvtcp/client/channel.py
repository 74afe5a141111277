"""The client's socket: one connection, kept alive and shared by all calls, and the rules for trying again.

`ChannelConnection` puts a `ConnectionCore` on asyncio: requests of one tick of the loop leave in one write, answers of
one read are completed in one go, a timer sweeps the deadlines. `Channel` owns at most one ChannelConnection and makes a
new one when it is needed.

- A call is tried again, after a pause drawn from 0 to a growing bound, only when it raised `Unavailable`: the server
  said so, or it was a read, or it never left this process. Other errors go to the caller at once. All tries and pauses
  of a call fit into its one timeout. A write that was refused after a wait is tried again only if there is time for
  another such wait (`may_repeat`); the items of an m-request that were refused alone follow the same rule.
- A connection is made by the first call that needs one; all calls share the attempt, and a caller that gives up does
  not stop it for the others. The first request on it is `hello`; its answer is `Channel.info`.
- A caller waits while the socket takes no more or CLIENT_OUTSTANDING_BYTES_MAX bytes are unanswered. Waiting callers
  are admitted in the order in which they came, before any later call.

The data path has no task, no timer and no StreamReader per call: one future, one entry in a table.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import socket
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, NamedTuple, cast

from kvtcp._version import __version__
from kvtcp.client.core import Completion, ConnectionCore, OnProgress, show_seconds
from kvtcp.client.url import Address
from kvtcp.constants import (
    CLIENT_BACKOFF_MAX_MS,
    CLIENT_BACKOFF_MIN_MS,
    CLIENT_CLOSE_MS,
    CLIENT_OUTSTANDING_BYTES_MAX,
    CLIENT_TICK_MS,
    CLIENT_TIMEOUT_MS,
    CLIENT_WRITE_BUFFER_BYTES,
    PROTOCOL_VERSION,
    TICK_MS,
    WRITE_WAIT_MS,
)
from kvtcp.errors import Code, KvtcpError, ProtocolError, RequestError, Unavailable
from kvtcp.protocol.messages import REQUESTS, Kind, Message

log = logging.getLogger(__name__)

TIMEOUT_S: Final = CLIENT_TIMEOUT_MS / 1000
TIMEOUT_S_MAX: Final = 1e8  # three years: a finite number that every loop's timer takes
NAME_DEFAULT: Final = f"kvtcp-python/{__version__}"
_LATE_S: Final = 2 * CLIENT_TICK_MS / 1000
_HANGS_UP: Final = "the server closed the connection at the first frame"
# the likely cause of a failure to connect
_HINTS: Final = {
    "connection refused": "is the cluster running?",
    _HANGS_UP: "that port does not speak to clients; is it a node's port?",
}
# a write that waits for a missing replica, or for room in a window, is refused by the server within this time
_REFUSED_LATE: Final = (Code.NOT_ENOUGH_REPLICAS, Code.OVERLOADED)
_REFUSAL_S: Final = (WRITE_WAIT_MS + 2 * TICK_MS) / 1000 + _LATE_S


class ServerInfo(NamedTuple):
    """The answer of the server to `hello`."""

    server: str  # its name and version
    version: int  # of the protocol
    cluster: str  # id of the cluster
    shards: int
    limits: dict[str, int]  # by name, as in the details of the errors they cause


def decode_tree(value: Any) -> Any:
    """Return an answer of the administration with text: bytes that are UTF-8 become str, recursively."""
    if type(value) is bytes:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if type(value) is list:
        return [decode_tree(item) for item in value]
    if type(value) is dict:
        return {decode_tree(name): decode_tree(item) for name, item in value.items()}
    return value


def backoff_s(failures: int, fraction: float) -> float:
    """The pause after `failures` failures: `fraction` (0..1, random) of a bound that doubles up to its maximum."""
    bound_ms = min(CLIENT_BACKOFF_MIN_MS * 2.0 ** min(failures - 1, 30), CLIENT_BACKOFF_MAX_MS)
    return fraction * bound_ms / 1000


def may_repeat(error: KvtcpError, op: bytes, remaining_s: float) -> bool:
    """Whether a request that ended with `error` may be sent again in the time that is left.

    A write that waited in vain for a replica or for room may be refused after the same wait again. Without time for
    that answer the call would end as "outcome unknown", although the write is known not to have been executed.
    """
    waits = error.code in _REFUSED_LATE and REQUESTS[op].kind in (Kind.WRITE, Kind.ADMIN)
    return isinstance(error, Unavailable) and remaining_s > (_REFUSAL_S if waits else 0)


class ChannelConnection(asyncio.Protocol):
    """One socket. `on_end` is called once, with the reason, when it takes no more requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[ChannelConnection, str], None]) -> None:
        self._loop = loop
        self._on_end = on_end
        self._core: ConnectionCore[asyncio.Future[Any]] = ConnectionCore()
        self._transport: asyncio.Transport | None = None
        self._flushing = False  # a flush is scheduled for this tick
        self._paused = False  # the socket's buffer is full
        self.ended = False  # no more requests are taken
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()  # callers that wait for room, oldest first
        self._granted_bytes = 0  # of requests that are admitted and not yet sent
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_at = 0.0  # time of `_sweep`, meaningful while it is not None
        self._postponed = False  # `_sweep` is the second one: it is held whether or not it is late
        self._closed: asyncio.Future[None] = loop.create_future()  # done when the socket is closed

    # --- for the channel ------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether `send` may be called now."""
        return not (self._queue or self.ended) and self._has_capacity()

    def send(
        self, message: Message, began: float, timeout_s: float, progress: OnProgress | None = None
    ) -> asyncio.Future[Any]:
        """The future of a call, whose time ends `timeout_s` after `began`. Raises RequestError (TOO_LARGE)."""
        future = self._loop.create_future()
        self._core.request(message, future, began, timeout_s, progress)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return future

    async def room(self, request_bytes: int) -> None:
        """Wait for room for a request of about `request_bytes`, or for the end. `send` must follow at once."""
        turn: asyncio.Future[None] = self._loop.create_future()
        waiting = (turn, request_bytes)
        self._queue.append(waiting)
        self._admit()
        try:
            await turn
        finally:
            if turn.cancelled():
                if waiting in self._queue:
                    self._queue.remove(waiting)
            else:
                self._granted_bytes -= request_bytes
            self._loop.call_soon(self._admit)  # for those behind a caller that gave up

    async def close(self, reason: str) -> None:
        """Send the queued requests, end all calls and close the socket."""
        self._flush()
        self._end(reason)
        if self._transport is not None:
            self._transport.close()
            try:
                await asyncio.wait_for(asyncio.shield(self._closed), CLIENT_CLOSE_MS / 1000)
            except TimeoutError:
                self._transport.abort()
                await self._closed

    def abort(self, reason: str) -> None:
        """End all calls and drop the socket."""
        self._end(reason)
        if self._transport is not None:
            self._transport.abort()

    def disown(self) -> None:
        """See `Channel.disown`. The descriptor's number stays taken, so nothing else can get it."""
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, sock.fileno())
            os.close(null)

    # --- asyncio.Protocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=CLIENT_WRITE_BUFFER_BYTES)
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        core = self._core
        self._complete(core.receive(data, monotonic()))
        if core.failure is not None:
            log.warning("closing the connection: %s", core.failure.message)
            self.abort("the server's answer is not this protocol")
        elif self._queue:
            self._admit()

    def connection_lost(self, exc: Exception | None) -> None:
        lost = "the server closed the connection" if exc is None else f"the connection was lost ({_reason(exc)})"
        self._end(lost)
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._admit()

    # --- inside ---------------------------------------------------------------------------------

    def _flush(self) -> None:
        self._flushing = False
        if self.ended:
            return
        assert self._transport is not None, "requests come after connection_made"
        if self._transport.is_closing():
            return  # connection_lost comes next, and these requests count as not sent
        output = self._core.take_output()
        if output:
            self._transport.write(output)
        self._arm()

    def _has_capacity(self) -> bool:
        used_bytes = self._core.outstanding_bytes + self._granted_bytes
        return used_bytes < CLIENT_OUTSTANDING_BYTES_MAX and not self._paused

    def _admit(self) -> None:
        """Admit waiting callers in order, as many as there is room for; all of them when the connection has ended."""
        while self._queue and (self.ended or self._has_capacity()):
            turn, request_bytes = self._queue.popleft()
            if not turn.done():
                self._granted_bytes += request_bytes
                turn.set_result(None)

    def _arm(self) -> None:
        next_due = self._core.next_due
        if next_due is None or (self._sweep is not None and self._sweep_at <= next_due):
            return
        if self._sweep is not None:
            self._sweep.cancel()
        self._sweep_at = next_due
        self._sweep = self._loop.call_later(max(next_due - monotonic(), 0.0), self._on_sweep)

    def _on_sweep(self) -> None:
        self._sweep = None
        if self.ended:
            return
        now = monotonic()
        if now - self._sweep_at > _LATE_S and not self._postponed:
            # The loop was blocked. Answers may be unread in the socket: read them before calls run out of time.
            self._postponed = True
            self._sweep_at = now
            self._sweep = self._loop.call_later(CLIENT_TICK_MS / 1000, self._on_sweep)
            return
        self._postponed = False
        self._complete(self._core.expire(now))
        if self._core.is_silent(now):
            self.abort("the server has been silent for too long, the connection was given up")
        else:
            self._arm()
            self._admit()

    def _complete(self, done: list[Completion[asyncio.Future[Any]]]) -> None:
        for future, result, error in done:
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
                future.exception()  # marks it as seen: a caller that is cancelled in this very tick will not see it

    def _end(self, reason: str) -> None:
        if self.ended:
            return
        self.ended = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self._complete(self._core.lost(reason))
        self._admit()
        self._on_end(self, reason)


class Channel:
    """Calls to one address, over one connection that is replaced when it is lost."""

    def __init__(self, address: Address, *, timeout_s: float = TIMEOUT_S, name: str = NAME_DEFAULT) -> None:
        self.address = address
        self.timeout_s = check_timeout(timeout_s)
        self.info: ServerInfo | None = None  # of the newest connection
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._connection: ChannelConnection | None = None  # said hello and has not ended
        self._attempt: asyncio.Task[None] | None = None  # the one attempt to connect that is under way
        self._connected_at = 0.0  # when `_connection` was made
        self._failures = 0  # attempts in a row that gave no lasting connection
        self._last_failure = ""  # the reason of the last of them
        self._random = random.Random()
        self._closed = False

    async def open(self) -> None:
        """Connect now. Raises Unavailable within the timeout, ProtocolError, RequestError (VERSION)."""
        await self._ready([], monotonic() + self.timeout_s, self.timeout_s)

    def pause_s(self, failures: int) -> float:
        """A random pause before the next attempt, after `failures` failed ones."""
        return backoff_s(failures, self._random.random())

    async def close(self) -> None:
        """End the connection and every call on it. May be repeated."""
        self._closed = True
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait({self._attempt})
        if self._connection is not None:
            await self._connection.close("the client was closed")

    def disown(self) -> None:
        """Replace the socket by /dev/null in a forked child, so that only the parent holds it open."""
        if self._connection is not None:
            self._connection.disown()

    async def call(self, message: Message, timeout_s: float | None = None, began: float | None = None) -> Any:
        """The result of a request; `message[0]` is overwritten with its id. Raises the errors of errors.py.

        The time runs from `began` (of the monotonic clock), None = now.
        """
        timeout_s = self.timeout_s if timeout_s is None else check_timeout(timeout_s)
        if began is None:
            began = monotonic()
        connection = self._connection
        if connection is None or not connection.has_room:
            return await self._persist(message, began, timeout_s)
        try:
            return await connection.send(message, began, timeout_s)
        except Unavailable as error:
            return await self._persist(message, began, timeout_s, error)

    async def call_long(self, message: Message, idle_s: float, progress: OnProgress | None) -> Any:
        """`call` for long administrative requests: sent within the usual timeout, then ended by `idle_s` of silence."""
        check_timeout(idle_s)
        return await self._persist(message, monotonic(), self.timeout_s, None, idle_s, progress)

    async def _persist(
        self, message: Message, began: float, timeout_s: float, error: Unavailable | None = None,
        idle_s: float | None = None, progress: OnProgress | None = None,
    ) -> Any:  # fmt: skip
        """Send a request, again while it is known not to have been executed, until the deadline."""
        deadline = began + timeout_s
        tries = 0
        while True:
            if error is not None:
                tries += 1
                pause_s = self.pause_s(tries)
                if self._closed or not may_repeat(error, message[1], deadline - monotonic() - pause_s):
                    raise error
                await asyncio.sleep(pause_s)
            connection = await self._ready(message, deadline, timeout_s, error)
            now = monotonic()
            if now >= deadline:
                raise error or self._unreachable(timeout_s)
            try:
                if idle_s is not None:
                    return await connection.send(message, now, idle_s, progress)
                return await connection.send(message, began, timeout_s)
            except Unavailable as refused:
                # the timeout of the last try says less than the cluster's refusal of the one before
                if error is None or refused.code != Code.UNREACHABLE or monotonic() < deadline:
                    error = refused

    async def _ready(
        self, message: Message, deadline: float, timeout_s: float, error: Unavailable | None = None
    ) -> ChannelConnection:
        """A connection with room for a request, made if need be."""
        while True:
            if self._closed:
                raise RuntimeError("the client is closed")
            connection = self._connection
            if connection is not None and connection.has_room:
                return connection
            remaining_s = deadline - monotonic()
            if remaining_s <= 0:
                raise error or self._unreachable(timeout_s)
            if connection is None:
                await self._connected(remaining_s)
                continue
            try:
                async with asyncio.timeout(remaining_s):
                    await connection.room(_size_bytes(message))
            except TimeoutError:
                raise error or Unavailable(
                    f"the connection took no more data within {show_seconds(timeout_s)}, nothing was sent",
                    Code.UNREACHABLE,
                ) from None
            if not connection.ended:
                return connection

    async def _connected(self, remaining_s: float) -> None:
        """Wait for an attempt to connect, at most `remaining_s`. Raises errors that another attempt cannot cure."""
        if self._attempt is None:
            self._attempt = self._loop.create_task(self._connect())
            self._attempt.add_done_callback(self._attempt_done)
        attempt = self._attempt
        done, _ = await asyncio.wait({attempt}, timeout=remaining_s)
        if done and not attempt.cancelled():
            attempt.result()

    def _attempt_done(self, attempt: asyncio.Task[None]) -> None:
        self._attempt = None
        if not attempt.cancelled():
            attempt.exception()  # waiting callers raise it; without a caller it must not be reported

    def _unreachable(self, timeout_s: float) -> Unavailable:
        failure = self._last_failure or "no answer"
        hint = _HINTS.get(failure, "")
        return Unavailable(
            f"no connection to {self.address.url} within {show_seconds(timeout_s)}: {failure}{hint and '; ' + hint}",
            Code.UNREACHABLE,
            {"address": self.address.url, "timeout_s": timeout_s},
        )

    async def _connect(self) -> None:
        """Make one attempt: pause, connect, say hello. Failures that may pass are remembered, others raised."""
        if self._failures:
            await asyncio.sleep(self.pause_s(self._failures))
        host, port = self.address
        connection: ChannelConnection | None = None
        try:
            async with asyncio.timeout(self.timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: ChannelConnection(self._loop, self._on_end), host, port
                )
                if connection.ended:
                    raise Unavailable("the server closed the connection", Code.UNREACHABLE)
                hello = [0, b"hello", PROTOCOL_VERSION, self._name]
                info = _server_info(await connection.send(hello, monotonic(), self.timeout_s))
        except (OSError, Unavailable) as error:
            self._failures += 1
            hung_up = connection is not None and connection.ended and getattr(error, "code", None) == Code.UNREACHABLE
            # one that spoke to clients before is being stopped or started
            self._last_failure = _HANGS_UP if hung_up and self.info is None else _reason(error)
            log.debug("no connection to %s: %s", self.address.url, self._last_failure)
            _drop(connection)
        except KvtcpError as error:
            self._failures += 1
            self._last_failure = str(error)
            _drop(connection)
            raise
        except BaseException:
            _drop(connection)
            raise
        else:
            if self.info is not None and self.info.cluster != info.cluster:
                log.warning("%s is now cluster %s, it was %s", self.address.url, info.cluster, self.info.cluster)
            self.info = info
            self._connection = connection
            self._connected_at = monotonic()
            if connection.ended:
                self._on_end(connection, "the server closed the connection after hello")

    def _on_end(self, connection: ChannelConnection, reason: str) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        # a connection that did not last is a failed attempt: otherwise a server that says hello and hangs up would be
        # called again without a pause
        lasted = monotonic() - self._connected_at >= CLIENT_BACKOFF_MAX_MS / 1000
        self._failures = 0 if lasted else self._failures + 1
        self._last_failure = reason


def _size_bytes(item: Any) -> int:
    """About how many bytes a request takes on the wire."""
    if type(item) is bytes:
        return len(item) + 5
    return 5 + sum(map(_size_bytes, item)) if type(item) is list else 9


def _reason(error: Exception) -> str:
    """Return why a connection was not made or was lost, in the system's words, without numbers and addresses."""
    if isinstance(error, socket.gaierror):
        return f"the host is not known ({error.strerror})"
    # for a name with several addresses the loops join the texts of several errors, and keep no numbers beside them
    numbers = re.findall(r"\[Errno (\d+)\]", str(error)) if isinstance(error, OSError) else []
    reasons = dict.fromkeys(os.strerror(int(number)).lower() for number in numbers)
    return ", ".join(reasons) or str(error) or "no answer"


def _drop(connection: ChannelConnection | None) -> None:
    if connection is not None:
        connection.abort("the attempt to connect failed")


def check_timeout(timeout_s: object) -> float:
    """Return a timeout in seconds. Raises RequestError: calls without an end are not offered."""
    if isinstance(timeout_s, (int, float)) and 0 < timeout_s <= TIMEOUT_S_MAX:
        return timeout_s
    raise RequestError(f"a timeout must be a number of seconds over 0 and up to {TIMEOUT_S_MAX:g}, not {timeout_s!r}")


def _server_info(answer: Any) -> ServerInfo:
    fields = decode_tree(answer)
    try:
        return ServerInfo(
            str(fields["server"]), int(fields["version"]), str(fields["cluster"]), int(fields["shards"]),
            dict(fields["limits"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the answer to hello is not the one of a kvtcp server: {error!r}") from error
