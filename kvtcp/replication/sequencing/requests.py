"""Requests: the shapes of what the path of requests keeps for each of them, and where their answers go.

Pure. Ops are lists, not objects, and one list is all that a request costs in the sequencer (making an instance costs
five times as much):

    write  [WRITE, sink, token, result]                                            sink None = answered already
    read   [op, sink, token, shard, last number queued before it, key]             sink None = answered already
    part   [PART, multi read, attempt, index]
    call   [CALL, function]                                                        of a control item: called once with
                                                                                   its result, or LINK_LOST; None = was

Simplification: a sink must not raise. Its methods only append to buffers, and an exception from one of them is a
defect after which the state of the sequencer is not to be trusted: whoever runs it ends the process.
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
ITEM_OVERHEAD_BYTES: Final = 32  # what an item counts in a window beyond its key and value

NUMBER: Final = object()  # result of a write that is its own number (put)
AWAITED: Final = object()  # result that has not arrived
LOST: Final = object()  # result that died with a link: the entry is applied, nobody knows any more what it gave
UNANSWERED: Final = object()  # result that has not arrived of a write that is committed
LINK_LOST: Final = object()  # what a call gets instead of a result

# unsequenced: (deadline_ms, bytes, op, key, args or None for a read, sink, token)
Waiting = tuple[int, int, int, bytes, Any, Any, Any]
# an answer: (commit it waits for, order, deadline_ms, sink or None for a multi read, token or multi read, result)
Held = tuple[int, int, int, Any, Any, Any]


class Sink(Protocol):
    """Where answers go."""

    def reply(self, token: Any, result: Any) -> None:
        """The request succeeded."""

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """The request ended with an error."""


class _Ignore:
    """Sink of the sequencer's own writes."""

    def reply(self, token: Any, result: Any) -> None:
        """Nobody waits for it."""

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """Nobody waits for it."""


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
        """The answer of key number `token`."""
        self.results[token] = result
        self.left -= 1
        if not self.left:
            self.sink.reply(self.token, self.results)

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """The error of key number `token`: an array in its place."""
        self.reply(token, [code, message, details])
