"""Requests: what is kept of each on its way through the sequencer, and where its answer goes.

Pure. A request on many keys becomes one op for each key; `Gather` is the sink of these ops, and answers the request
when it has heard from all of them.
"""

from __future__ import annotations

from typing import Any

from kvtcp.replication.shard_state import Sink


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
