"""Requests: the shapes of ops on the path of requests, and the sinks of their answers.

Pure. Ops are lists, not objects, and one list is all that a request costs in the sequencer (making an instance costs
five times as much):

    write  [WRITE, sink, token, result]                                            sink None = answered already
    read   [op, sink, token, shard, last number queued before it, key]             sink None = answered already
    part   [PART, multi read, attempt, index]
    call   [CALL, function]                                                        of a control item: called once with
                                                                                   its result, or LINK_LOST; None = was

Simplification: a sink must not raise. Its methods only append to buffers; an exception from one is a defect after which
the state of the sequencer is not to be trusted, so the process ends.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from kvtcp.protocol.operations import (
    ADD,
    APPEND,
    CAS,
    COPY,
    INCR,
    INCR_DECIMAL,
    PUT,
    PUT_ALL,
    RENAME,
    SETBIT,
    SETRANGE,
    STORE,
    TRANSACTION,
)

WRITE: Final = 0
PART: Final = -1
CALL: Final = -3  # -2 is ANSWERED, see link.py
# writes that a node short of disk space cannot take
GROWING: Final = frozenset(
    {PUT, ADD, CAS, INCR, STORE, APPEND, SETRANGE, SETBIT, INCR_DECIMAL, RENAME, COPY, PUT_ALL, TRANSACTION}
)
ITEM_OVERHEAD_BYTES: Final = 32  # size of an item in a window beyond its key and value

NUMBER: Final = object()  # result of a write that is its own number (put)
AWAITED: Final = object()  # result that has not arrived
LOST: Final = object()  # result that died with a link: the entry is applied, and no node knows its result any more
UNANSWERED: Final = object()  # result that has not arrived of a write that is committed
LINK_LOST: Final = object()  # stands for the result of a call whose link was lost

# unsequenced: (deadline_ms, bytes, op, key, args or None for a read, sink, token)
Waiting = tuple[int, int, int, bytes, Any, Any, Any]
# an answer: (commit it waits for, order, deadline_ms, sink or None for a multi read, token or multi read, result)
Held = tuple[int, int, int, Any, Any, Any]


class Sink(Protocol):
    """Takes the answers of requests."""

    def reply(self, token: Any, result: Any) -> None:
        """Take the result of a request."""

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """Take the error of a request."""


class _Ignore:
    """Sink of the sequencer's own writes."""

    def reply(self, token: Any, result: Any) -> None:
        """Drop the result."""

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """Drop the error."""


IGNORE: Final = _Ignore()


class Gather:
    """The answers of one request's keys, in order; replies once when the last one is here."""

    __slots__ = ("left", "results", "sink", "token")

    def __init__(self, sink: Sink, token: Any, count: int) -> None:
        self.sink = sink
        self.token = token
        self.results: list[Any] = [None] * count
        self.left = count

    def reply(self, token: Any, result: Any) -> None:
        """Take the answer of key number `token`."""
        self.results[token] = result
        self.left -= 1
        if not self.left:
            self.sink.reply(self.token, self.results)

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """Take the error of key number `token`, as an array in its place."""
        self.reply(token, [code, message, details])
