"""The client's side of one connection: request ids, the table of calls without an answer, deadlines, errors.

Pure: bytes and times come in, bytes and completions go out. `kvtcp.client.channel` puts it on a socket.

A call is `[id, op, ...args]`. From `request` until its answer or the end of the connection its id is in the table and
is given to no other call, **even if the caller is gone**: one that was cancelled or ran out of time leaves an
abandoned id behind, and the late answer finds that id and is dropped. So an answer can never reach a later call.

A call without an answer ends with one of these errors:

    |                  | not handed to the socket | a read               | any other       |
    |------------------|--------------------------|----------------------|-----------------|
    | connection lost  | Unavailable              | Unavailable          | OutcomeUnknown  |
    | wrong protocol   | Unavailable              | ProtocolError        | OutcomeUnknown  |
    | out of time      | -                        | Unavailable          | OutcomeUnknown  |

Deadlines: the id of a call is in the set of its tick (CLIENT_TICK_MS) until the call ends; a sweep expires the sets of
the ticks that have passed. So no call needs a timer or a heap entry.

`waiter` is the object that the adapter completes (a future); this module only hands it back. An abandoned call has
none. The adapter may also forget a waiter on its own (a cancelled future) and ignore its completion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from kvtcp.constants import CLIENT_SILENCE_MS, CLIENT_TICK_MS, REQUEST_ID_MAX
from kvtcp.errors import Code, KvtcpError, OutcomeUnknown, ProtocolError, Unavailable, error_from_wire
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.messages import REQUESTS, Kind, Message

W = TypeVar("W")
OnProgress = Callable[[Any], None]

TICKS_PER_S: Final = 1000 / CLIENT_TICK_MS
SILENCE_S: Final = CLIENT_SILENCE_MS / 1000


class Call(Generic[W]):
    """A request without its answer. `id` is in exactly one set, `due`, until the call ends or is abandoned."""

    __slots__ = ("due", "frame_bytes", "op", "progress", "timeout_s", "waiter")

    def __init__(
        self, op: bytes, waiter: W | None, timeout_s: float, frame_bytes: int, due: set[int],
        progress: OnProgress | None,
    ) -> None:  # fmt: skip
        self.op = op
        self.waiter = waiter  # None: abandoned, its answer is dropped
        self.timeout_s = timeout_s
        self.frame_bytes = frame_bytes
        self.due = due  # ids whose time ends in the same tick
        self.progress = progress


# waiter, result, error: the error counts when it is not None
Completion = tuple[W, Any, Exception | None]


class ConnectionCore(Generic[W]):
    """The calls of one connection. After `failure` is set or `lost` was called it takes no more requests."""

    def __init__(self) -> None:
        self._encode = FrameEncoder().encode
        self._decoder = FrameDecoder()
        self._calls: dict[int, Call[W]] = {}  # every id that must not be reused
        self._last_id = 0
        self._frames: list[bytes] = []  # requests not yet taken by take_output
        self._unsent: list[int] = []  # their ids
        self._due: dict[int, set[int]] = {}  # tick -> ids whose time ends in it
        self._heard_at = 0.0  # when bytes last came
        self._silent_since: float | None = None  # nothing heard since then, and a call ran out of time meanwhile
        self._ended = False
        self.outstanding_bytes = 0  # of the requests in the table whose time has not run out
        self.failure: ProtocolError | None = None  # why the connection must be closed
        self.next_due: float | None = None  # `expire` has nothing to do before this time

    @property
    def outstanding(self) -> int:
        """Ids in use: calls that wait and calls that were abandoned."""
        return len(self._calls)

    def request(
        self, message: Message, waiter: W, began: float, timeout_s: float, progress: OnProgress | None = None
    ) -> None:
        """Put a call into the table and its frame into the output; `message[0]` becomes its id.

        Its time ends `timeout_s` after `began`, which is in the past when the request is sent for the second time.
        Raises RequestError (TOO_LARGE), and then nothing has changed.
        """
        assert not self._ended and self.failure is None, "the connection has ended"
        calls = self._calls
        call_id = self._last_id + 1
        while call_id in calls or call_id > REQUEST_ID_MAX:
            call_id = call_id + 1 if call_id < REQUEST_ID_MAX else 1
        message[0] = call_id
        frame = self._encode(message)
        self._last_id = call_id
        frame_bytes = len(frame)
        self.outstanding_bytes += frame_bytes
        due = self._due_set(began + timeout_s)
        due.add(call_id)
        calls[call_id] = Call(message[1], waiter, timeout_s, frame_bytes, due, progress)
        self._frames.append(frame)
        self._unsent.append(call_id)

    def take_output(self) -> bytes:
        """The frames of all requests since the last time; from here on they count as sent."""
        output = b"".join(self._frames) if len(self._frames) != 1 else self._frames[0]
        self._frames.clear()
        self._unsent.clear()
        return output

    def receive(self, data: bytes, now: float) -> list[Completion[W]]:
        """The calls that `data` completes. Sets `failure` if `data` is not an answer to one of the requests."""
        assert not self._ended and self.failure is None, "the connection has ended"
        self._heard_at = now
        self._silent_since = None
        done: list[Completion[W]] = []
        calls = self._calls
        try:
            for message in self._decoder.feed(data):
                if type(message) is not list or not 3 <= len(message) <= 4 or type(message[0]) is not int:
                    raise ProtocolError("an answer is an array [id, code, result]")
                call_id = message[0]
                call = calls.pop(call_id, None)
                if call is None:
                    raise ProtocolError(f"an answer to request {call_id}, which is not outstanding")
                code = message[1]
                if code == 0 and type(code) is int:
                    if call.waiter is not None:
                        done.append((call.waiter, message[2], None))
                elif code == 1 and type(code) is int:
                    calls[call_id] = call
                    self._on_progress(call_id, call, message[2], now, done)
                    continue
                elif type(code) is int:
                    if call.waiter is not None:
                        error = error_from_wire(code, message[2], message[3] if len(message) == 4 else None)
                        done.append((call.waiter, None, error))
                else:
                    calls[call_id] = call
                    raise ProtocolError(f"the code of the answer to request {call_id} is not an integer")
                self.outstanding_bytes -= call.frame_bytes
                call.due.discard(call_id)
        except ProtocolError as failure:
            self.failure = failure
        return done

    def expire(self, now: float) -> list[Completion[W]]:
        """The calls whose time has run out by `now`; their ids stay reserved. Sets `next_due`."""
        done: list[Completion[W]] = []
        tick = int(now * TICKS_PER_S)
        for passed in sorted(t for t in self._due if t <= tick):
            for call_id in self._due.pop(passed):
                call = self._calls[call_id]
                if self._silent_since is None:
                    self._silent_since = max(self._heard_at, now - call.timeout_s)
                if call.waiter is not None:
                    done.append((call.waiter, None, _out_of_time(call)))
                    call.waiter = None
                # the caller is gone, so other calls get its room; bytes that are not sent yet count for the socket
                self.outstanding_bytes -= call.frame_bytes
                call.frame_bytes = 0
        self._due = {t: ids for t, ids in self._due.items() if ids}
        self.next_due = min(self._due) / TICKS_PER_S if self._due else None
        return done

    def is_silent(self, now: float) -> bool:
        """Whether the connection is to be given up: calls ran out of time, and nothing was heard for SILENCE_S."""
        return self._silent_since is not None and now - self._silent_since >= SILENCE_S

    def lost(self, reason: str) -> list[Completion[W]]:
        """End the connection; returns the errors of all waiting calls (see the table above)."""
        self._ended = True
        unsent = set(self._unsent)
        done: list[Completion[W]] = [
            (call.waiter, None, _without_connection(call, call_id in unsent, reason, self.failure))
            for call_id, call in self._calls.items()
            if call.waiter is not None
        ]
        for container in (self._calls, self._due, self._frames, self._unsent):
            container.clear()
        self.outstanding_bytes = 0
        self.next_due = None
        return done

    def _due_set(self, deadline: float) -> set[int]:
        tick = int(deadline * TICKS_PER_S) + 1
        due = self._due.get(tick)
        if due is None:
            due = self._due[tick] = set()
            at = tick / TICKS_PER_S
            if self.next_due is None or at < self.next_due:
                self.next_due = at
        return due

    def _on_progress(self, call_id: int, call: Call[W], fields: Any, now: float, done: list[Completion[W]]) -> None:
        """Take a progress frame: the time of the call starts again, and its callback is called."""
        if call.waiter is None:
            return
        call.due.discard(call_id)
        call.due = self._due_set(now + call.timeout_s)
        call.due.add(call_id)
        if call.progress is not None:
            try:
                call.progress(fields)
            except Exception as error:
                # the caller's own code failed: the caller gets the error, other calls of the connection never notice
                done.append((call.waiter, None, error))
                call.waiter = None


def show_seconds(timeout_s: float) -> str:
    """Return a duration for a sentence: three digits of it, or all of its whole seconds."""
    return f"{timeout_s:.3g} s" if timeout_s < 1000 else f"{timeout_s:.0f} s"


def _out_of_time(call: Call[Any]) -> KvtcpError:
    time = show_seconds(call.timeout_s)
    kind = REQUESTS[call.op].kind
    if kind is Kind.READ:
        return Unavailable(f"no answer within {time}", Code.UNREACHABLE, {"timeout_s": call.timeout_s})
    return OutcomeUnknown(
        f"the request was sent and had no {'progress' if kind is Kind.LONG else 'answer'} within {time};"
        " whether it was executed is not known",
        details={"timeout_s": call.timeout_s},
    )


def _without_connection(call: Call[Any], unsent: bool, reason: str, failure: ProtocolError | None) -> KvtcpError:
    error: KvtcpError
    if unsent:
        error = Unavailable(f"{reason}; the request was not sent", Code.UNREACHABLE)
    elif REQUESTS[call.op].kind is not Kind.READ:
        error = OutcomeUnknown(f"{reason} after the request was sent; whether it was executed is not known")
    elif failure is not None:
        error = ProtocolError(f"{reason}: {failure.message}", failure.code)
    else:
        error = Unavailable(f"{reason} before the answer came", Code.UNREACHABLE)
    error.__cause__ = failure
    return error
