"""A cluster in a dict, and the streams of a shell in memory: what the tests of the shell share."""

from __future__ import annotations

import asyncio
import io
import math
import shlex
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from kvtcp.client.administration import LossAccepted, Move, NodeChange, Rebalance
from kvtcp.client.aio import AsyncClient
from kvtcp.client.channel import ServerInfo
from kvtcp.client.requests import Entry
from kvtcp.errors import Code, KeyExists, Mismatch, RequestError, show_bytes
from kvtcp.protocol.messages import check_key, check_value, prefix_bounds
from kvtcp.shell.context import Streams
from kvtcp.shell.main import main


class FakeClient(AsyncClient[bytes]):
    """The calls of the client over a dict; time stands still. `failure` is raised by the next call, once."""

    info = ServerInfo("kvtcp", 1, "c-1", 64, {})

    def __init__(self) -> None:
        self.cells: dict[bytes, Entry[bytes]] = {}
        self.rev = 0
        self.failure: BaseException | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.closed = 0
        self.opened: list[tuple[str, float]] = []
        self.hangs = False  # a call waits for ever
        self.is_hanging = threading.Event()  # one does
        self.in_flight = 0  # put_many that have not ended
        self.in_flight_max = 0

    async def connect(self, address: str, timeout_s: float) -> FakeClient:
        """What main is given instead of the real connect."""
        self.opened.append((address, timeout_s))
        await self._enter()
        return self

    async def close(self) -> None:
        self.closed += 1

    async def _enter(self) -> None:
        await asyncio.sleep(0)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if self.hangs:
            self.is_hanging.set()
            while True:  # turns of the loop: a signal that comes just before select() begins does not end it
                await asyncio.sleep(0.05)

    def _set(self, key: bytes, value: bytes, ttl: float | None) -> int:
        self.rev += 1
        self.cells[check_key(key)] = Entry(key, check_value(value, key), self.rev, ttl)
        return self.rev

    async def put(self, key: bytes, value: bytes, *, ttl: float | None = None) -> int:
        await self._enter()
        return self._set(key, value, ttl)

    async def add(self, key: bytes, value: bytes, *, ttl: float | None = None) -> int:
        await self._enter()
        if key in self.cells:
            raise KeyExists(f"the key {show_bytes(key)} exists", Code.EXISTS, {"key": key})
        return self._set(key, value, ttl)

    async def get_entry(self, key: bytes) -> Entry[bytes] | None:
        await self._enter()
        return self.cells.get(key)

    async def delete(self, key: bytes, *, if_value: bytes | None = None) -> bool:
        await self._enter()
        cell = self.cells.get(key)
        if cell is None or (if_value is not None and cell.value != if_value):
            return False
        del self.cells[key]
        return True

    async def exists(self, key: bytes) -> bool:
        await self._enter()
        return key in self.cells

    async def cas(self, key: bytes, value: bytes, *, if_value: bytes | None = None) -> int:
        await self._enter()
        cell = self.cells.get(key)
        if cell is None or cell.value != if_value:
            rev = 0 if cell is None else cell.rev
            raise Mismatch(f"the key {show_bytes(key)} has revision {rev}", Code.MISMATCH, {"key": key, "rev": rev})
        return self._set(key, value, cell.ttl)

    async def incr(self, key: bytes, by: int = 1) -> int:
        await self._enter()
        cell = self.cells.get(key)
        try:
            total = by + (0 if cell is None else int(cell.value))
        except ValueError:
            raise RequestError(f"the value of {show_bytes(key)} is not a number", Code.NOT_A_NUMBER) from None
        self._set(key, str(total).encode(), None if cell is None else cell.ttl)
        return total

    async def expire(self, key: bytes, seconds: float) -> bool:
        await self._enter()
        cell = self.cells.get(key)
        if cell is None:
            return False
        self._set(key, cell.value, seconds)
        return True

    async def persist(self, key: bytes) -> bool:
        await self._enter()
        cell = self.cells.get(key)
        if cell is None or cell.ttl is None:
            return False
        self._set(key, cell.value, None)
        return True

    async def ttl(self, key: bytes) -> float | None:
        await self._enter()
        cell = self.cells.get(key)
        return None if cell is None else math.inf if cell.ttl is None else cell.ttl

    def _select(
        self, prefix: bytes | None, start: bytes | None, end: bytes | None, limit: int | None, reverse: bool
    ) -> list[Entry[bytes]]:
        low, high = prefix_bounds(prefix) if prefix else (b"", None)
        low = max(low, start or b"")
        keys = [k for k in self.cells if k >= low and (high is None or k < high) and (end is None or k < end)]
        return [self.cells[k] for k in sorted(keys, reverse=reverse)[:limit]]

    async def scan_entries(
        self, *, prefix: bytes | None = None, start: bytes | None = None, end: bytes | None = None,
        limit: int | None = None, reverse: bool = False,
    ) -> AsyncIterator[Entry[bytes]]:  # fmt: skip
        await self._enter()
        for entry in self._select(prefix, start, end, limit, reverse):
            yield entry

    async def scan_keys(
        self, *, prefix: bytes | None = None, start: bytes | None = None, end: bytes | None = None,
        limit: int | None = None, reverse: bool = False,
    ) -> AsyncIterator[bytes]:  # fmt: skip
        await self._enter()
        for entry in self._select(prefix, start, end, limit, reverse):
            yield entry.key

    async def count(self, *, prefix: bytes | None = None) -> int:
        await self._enter()
        return len(self._select(prefix, None, None, None, False))

    async def put_many(self, items: Sequence[tuple[bytes, bytes, float | None]]) -> list[int]:
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            for _ in range(5):  # an answer takes a few turns of the loop, as a real one does
                await self._enter()
            self.calls.append(("put_many", len(items)))
            return [self._set(*item) for item in items]
        finally:
            self.in_flight -= 1

    async def delete_many(self, keys: Iterable[bytes]) -> list[bool]:
        await self._enter()
        return [self.cells.pop(key, None) is not None for key in keys]

    async def status(self) -> dict[str, Any]:
        await self._enter()
        return {"version": "0.1.0", "keys": len(self.cells), "ready": True, "memory": {"rss_bytes": 7, "peak": None}}

    async def nodes(self) -> list[dict[str, Any]]:
        await self._enter()
        return [
            {"node": "n1", "address": "127.0.0.1:5000", "up": True, "lag_ms": 0.5},
            {"node": "n2", "address": "127.0.0.1:5001", "up": False, "lag_ms": None},
        ]

    async def shards(self) -> list[dict[str, Any]]:
        await self._enter()
        return [{"shard": n, "in_sync": ["n1", "n2"], "keys": n * 10} for n in range(self.info.shards)]

    async def backup(self, name: str | None = None, *, progress: Any = None) -> dict[str, Any]:
        await self._enter()
        if progress is not None:
            progress({"files_done": 1, "files": 2})
        return {"name": name or "2026-01-01T00-00-00", "keys": len(self.cells)}

    async def restore(
        self, name: str, mode: str = "merge", *, prefix: bytes | None = None, dry_run: bool = False,
        progress: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        await self._enter()
        return {"name": name, "mode": mode, "prefix": prefix or b"", "dry_run": dry_run}

    async def node_add(self, host: str, port: int) -> NodeChange:
        await self._enter()
        self.calls.append(("node_add", host, port))
        return NodeChange("n4")

    async def node_undrain(self, node: str) -> NodeChange:
        """See AsyncClient."""
        self.calls.append(("node_undrain", node))
        return NodeChange(node)

    async def node_drain(self, node: str) -> NodeChange:
        await self._enter()
        self.calls.append(("node_drain", node))
        return NodeChange(node, 21)

    async def node_remove(self, node: str) -> NodeChange:
        await self._enter()
        self.calls.append(("node_remove", node))
        return NodeChange(node)

    async def node_forget(self, node: str) -> NodeChange:
        await self._enter()
        self.calls.append(("node_forget", node))
        return NodeChange(node, None, {"under_replicated": 3})

    async def rebalance(self, dry_run: bool = False) -> Rebalance:
        await self._enter()
        self.calls.append(("rebalance", dry_run))
        return Rebalance((Move(5, "n1", "n4"), Move(6, "n2", "n4")), 0 if dry_run else 2)

    async def shard_accept_loss(self, shard: int) -> LossAccepted:
        await self._enter()
        self.calls.append(("shard_accept_loss", shard))
        return LossAccepted(shard, {"from": "n2"})


class Moving(FakeClient):
    """A cluster whose shards move: each answer to `status` and `nodes` tells the next of `polls`, or raises it."""

    def __init__(self, *polls: int | BaseException) -> None:
        super().__init__()
        self.polls = list(polls)

    def _poll(self) -> int:
        poll = self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]
        if isinstance(poll, BaseException):
            raise poll
        return poll

    async def status(self) -> dict[str, Any]:
        await self._enter()
        return {"state": "ok", "moving": self._poll()}

    async def nodes(self) -> list[dict[str, Any]]:
        await self._enter()
        return [{"node": "n1", "member_of": self._poll()}, {"node": "n2", "member_of": 64}]


class Shell:
    """Runs the shell in this process over a FakeClient. `out` and `err` hold what the last run wrote."""

    def __init__(self, client: FakeClient | None = None) -> None:
        self.client = client or FakeClient()
        self.out = b""
        self.err = ""

    def streams(self, stdin: bytes = b"", *, terminal: bool = False) -> Streams:
        """Streams in memory."""
        return Streams(
            io.BytesIO(stdin), io.BytesIO(), io.StringIO(), stdout_is_terminal=terminal, stderr_is_terminal=terminal,
            columns=lambda: 80 if terminal else None,
        )  # fmt: skip

    def run(self, *arguments: str, stdin: bytes = b"", terminal: bool = False) -> int:
        """One call of the program; the exit code."""
        streams = self.streams(stdin, terminal=terminal)
        code = main(arguments, streams=streams, connect=self.client.connect)
        assert isinstance(streams.stdout, io.BytesIO) and isinstance(streams.stderr, io.StringIO), "memory streams"
        self.out, self.err = streams.stdout.getvalue(), streams.stderr.getvalue()
        return code

    def line(self, text: str) -> int:
        """As `run`, with a line that is cut as sh does."""
        return self.run(*shlex.split(text))
