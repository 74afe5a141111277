"""A server for the tests of the clients: one dict, the real codec, and a script of misbehaviour.

It answers every request of the message table from a plain dict, so that a test sees real results, and can be told per
operation what to do instead: hold an answer back, drop it, answer an error, close the connection before or after the
effect, write bytes that are not the protocol. With `shuffle` it answers in a random order after random pauses.

Every request that arrived is in `requests`, every chunk that one read of a socket brought in `reads`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, cast

from kvtcp.errors import AdminError, Code, KvtcpError, RequestError
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.messages import REQUESTS, make_cursor

Cell = tuple[bytes, int, float | None]  # value, revision, deadline on the monotonic clock
# A step takes the connection and the request and does something instead of executing it.
Step = Callable[["FakeConnection", list[Any]], None]

INFO = {"server": "fake 0.0", "version": 1, "cluster": "c-1", "shards": 64, "limits": {"key_bytes_max": 4096}}


def execute(connection: FakeConnection, message: list[Any]) -> None:
    """The ordinary step."""
    connection.answer(message, connection.server.run(message))


def drop(connection: FakeConnection, message: list[Any]) -> None:
    """Neither effect nor answer."""


def execute_silently(connection: FakeConnection, message: list[Any]) -> None:
    """The effect without the answer."""
    connection.server.run(message)


def close(connection: FakeConnection, message: list[Any]) -> None:
    """Drop the connection without effect and answer."""
    connection.transport.abort()


def close_after(connection: FakeConnection, message: list[Any]) -> None:
    """Drop the connection when everything written has been sent."""
    connection.transport.close()


def error(code: Code, text: str = "refused by the script", **details: Any) -> Step:
    """Answer an error, without effect."""
    return lambda connection, message: connection.answer(message, [int(code), text, details])


def garbage(data: bytes) -> Step:
    """Write these bytes."""
    return lambda connection, message: connection.transport.write(data)


def reply(*frame: Any) -> Step:
    """Answer `[id, *frame]`."""
    return lambda connection, message: connection.send([message[0], *frame])


def several(*steps: Step) -> Step:
    """One after the other."""

    def step(connection: FakeConnection, message: list[Any]) -> None:
        for one in steps:
            one(connection, message)

    return step


def later(pause_s: float, step: Step) -> Step:
    """Do this after a while."""

    def wait(connection: FakeConnection, message: list[Any]) -> None:
        asyncio.get_running_loop().call_later(pause_s, step, connection, message)

    return wait


class FakeServer:
    """`async with FakeServer() as server: ... server.url`."""

    def __init__(self) -> None:
        self.cells: dict[bytes, Cell] = {}
        self.rev = 0
        self.requests: list[list[Any]] = []
        self.reads: list[int] = []  # requests per read of a socket
        self.connections: list[FakeConnection] = []  # those that are open
        self.accepted = 0
        self.script: defaultdict[bytes, deque[Step]] = defaultdict(deque)
        self.held: list[tuple[FakeConnection, list[Any]]] = []  # kept back by `hold`
        self.shuffle: random.Random | None = None
        self.shuffle_s = 0.002
        self.port = 0
        self.empty = asyncio.Event()  # no connection is open
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"kvtcp://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; on the same port as before after a `stop`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: FakeConnection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.transport.abort()
        if self.connections:
            await self.empty.wait()

    def on(self, op: bytes, *steps: Step) -> None:
        """Do these, one per request of this operation, then execute again."""
        self.script[op].extend(steps)

    def hold(self, connection: FakeConnection, message: list[Any]) -> None:
        """A step: keep the request until `release`."""
        self.held.append((connection, message))

    def release(self) -> None:
        """Execute what was held."""
        held, self.held = self.held, []
        for connection, message in held:
            execute(connection, message)

    def seen(self, op: bytes) -> list[list[Any]]:
        """The requests of an operation that arrived."""
        return [message for message in self.requests if message[1] == op]

    # --- the store ------------------------------------------------------------------------------

    def run(self, message: list[Any]) -> list[Any]:
        """`[0, result]` or `[code, text, details]`."""
        op = message[1]
        try:
            args = REQUESTS[op].check(message)
            return [0, getattr(self, "do_" + op.decode())(*args)]
        except KvtcpError as refused:
            return [int(refused.code), refused.message, refused.details]

    def live(self, key: bytes) -> Cell | None:
        cell = self.cells.get(key)
        return None if cell is None or (cell[2] is not None and cell[2] <= time.monotonic()) else cell

    def store(self, key: bytes, value: bytes, ttl_ms: int | None, deadline: float | None = None) -> int:
        self.rev += 1
        if ttl_ms is not None:
            deadline = time.monotonic() + ttl_ms / 1000
        self.cells[key] = (value, self.rev, deadline)
        return self.rev

    def do_hello(self, version: int, name: str) -> dict[str, Any]:
        return INFO

    def do_get(self, key: bytes) -> list[Any] | None:
        cell = self.live(key)
        return None if cell is None else [cell[0], cell[1], ttl_ms_of(cell)]

    def do_put(self, key: bytes, value: bytes, ttl_ms: int | None, keep_ttl: bool) -> int:
        cell = self.live(key)
        return self.store(key, value, ttl_ms, cell[2] if keep_ttl and cell is not None else None)

    def do_add(self, key: bytes, value: bytes, ttl_ms: int | None) -> int:
        cell = self.live(key)
        if cell is not None:
            raise KvtcpError("the key exists", Code.EXISTS, {"key": key, "rev": cell[1]})
        return self.store(key, value, ttl_ms)

    def do_delete(self, key: bytes, if_value: bytes | None, if_rev: int | None) -> bool:
        cell = self.live(key)
        if cell is None or (if_value is not None and cell[0] != if_value) or (if_rev is not None and cell[1] != if_rev):
            return False
        del self.cells[key]
        return True

    def do_cas(self, key: bytes, value: bytes, if_value: bytes | None, if_rev: int | None) -> int:
        cell = self.live(key)
        rev = 0 if cell is None else cell[1]
        if (if_rev is not None and if_rev != rev) or (if_value is not None and (cell is None or cell[0] != if_value)):
            raise KvtcpError("the condition is false", Code.MISMATCH, {"key": key, "rev": rev})
        return self.store(key, value, None, None if cell is None else cell[2])

    def do_incr(self, key: bytes, by: int) -> int:
        cell = self.live(key)
        try:
            total = (0 if cell is None else int(cell[0])) + by
        except ValueError:
            raise RequestError("the value is not a number", Code.NOT_A_NUMBER) from None
        self.store(key, str(total).encode(), None, None if cell is None else cell[2])
        return total

    def do_exists(self, key: bytes) -> bool:
        return self.live(key) is not None

    def do_expire(self, key: bytes, ttl_ms: int) -> bool:
        cell = self.live(key)
        if cell is not None:
            self.store(key, cell[0], ttl_ms)
        return cell is not None

    def do_persist(self, key: bytes) -> bool:
        cell = self.live(key)
        if cell is None or cell[2] is None:
            return False
        self.store(key, cell[0], None)
        return True

    def do_ttl(self, key: bytes) -> int | None:
        cell = self.live(key)
        if cell is None:
            return None
        return -1 if cell[2] is None else ttl_ms_of(cell)

    def each(self, op: bytes, items: list[Any]) -> list[Any]:
        """An m-request: each item as a request of its own, which the script of `op` may answer with an error."""
        results = []
        for item in items:
            steps = self.script[op + b" item"]
            results.append(steps.popleft() if steps else None)  # type: ignore[arg-type]
            if results[-1] is None:
                answer = self.run([0, op, *(item if isinstance(item, list) else [item])])
                results[-1] = answer[1] if answer[0] == 0 else answer
        return results

    def do_mget(self, keys: list[bytes]) -> list[Any]:
        return self.each(b"get", keys)

    def do_mdelete(self, keys: list[bytes]) -> list[Any]:
        return self.each(b"delete", keys)

    def do_mput(self, items: list[list[Any]]) -> list[Any]:
        return self.each(b"put", [[*i[:2], {b"ttl_ms": i[2]}] if len(i) == 3 else i for i in items])

    def range(self, lower: bytes, upper: bytes | None) -> Iterator[bytes]:
        return (k for k in sorted(self.cells) if k >= lower and (upper is None or k < upper) and self.live(k))

    def do_scan(self, lower: bytes, upper: bytes | None, limit: int, reverse: bool, keys_only: bool) -> list[Any]:
        keys = list(self.range(lower, upper))
        if reverse:
            keys.reverse()
        page = keys[: min(limit, 7)]  # short pages, as the real one may give
        cells = [(k, self.cells[k]) for k in page]
        rows = [[k, None if keys_only else c[0], c[1], ttl_ms_of(c)] for k, c in cells]
        return [rows, make_cursor(page[-1], reverse) if len(keys) > len(page) else None]

    def do_count(self, lower: bytes, upper: bytes | None) -> int:
        return len(list(self.range(lower, upper)))

    def do_status(self) -> dict[str, Any]:
        return {"state": b"ready", "shards": {"ready": 64}, "blob": b"\xff"}

    def do_nodes(self) -> list[Any]:
        return [{"id": b"n1", "address": "127.0.0.1:5000"}]

    def do_shards(self) -> list[Any]:
        return [{"shard": 0, "replicas": [b"n1"]}]

    def do_backup(self, name: str | None) -> dict[str, Any]:
        return {"name": name or "b-1", "keys": len(self.cells)}

    def do_restore(self, name: str, mode: str, prefix: bytes, dry_run: bool) -> dict[str, Any]:
        return {"name": name, "mode": mode, "prefix": prefix, "dry_run": dry_run}

    def do_node_add(self, host: str, port: int) -> dict[str, Any]:
        return {"node": b"n4", "address": f"{host}:{port}"}

    def do_node_undrain(self, node: str) -> dict[str, Any]:
        """Nothing moves back by itself."""
        return {"node": node}

    def do_node_drain(self, node: str) -> dict[str, Any]:
        return {"node": node, "shards": 21}

    def do_node_remove(self, node: str) -> dict[str, Any]:
        raise AdminError(f"{node} still holds 21 shards: drain it first", details={"node": node})

    def do_node_forget(self, node: str) -> dict[str, Any]:
        return {"node": node}

    def do_rebalance(self, dry_run: bool) -> dict[str, Any]:
        return {"moves": [[5, b"n1", b"n4"], [6, b"n2", b"n4"]], "left": 0 if dry_run else 2}

    def do_shard_accept_loss(self, shard: int) -> dict[str, Any]:
        return {"shard": shard, "from": b"n2"}


def ttl_ms_of(cell: Cell) -> int | None:
    """Milliseconds to live, None without a deadline."""
    return None if cell[2] is None else max(1, round((cell[2] - time.monotonic()) * 1000))


class FakeConnection(asyncio.Protocol):
    """One client."""

    transport: asyncio.Transport

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.decoder = FrameDecoder()
        self.encoder = FrameEncoder()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self.server.connections.append(self)
        self.server.empty.clear()
        self.server.accepted += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.remove(self)
        if not self.server.connections:
            self.server.empty.set()

    def data_received(self, data: bytes) -> None:
        messages = self.decoder.feed(data)
        self.server.reads.append(len(messages))
        for message in messages:
            self.server.requests.append(message)
            steps = self.server.script[message[1]]
            step = steps.popleft() if steps else execute
            if self.server.shuffle is None or message[1] == b"hello":
                step(self, message)
            else:
                pause_s = self.server.shuffle.random() * self.server.shuffle_s
                asyncio.get_running_loop().call_later(pause_s, step, self, message)

    def answer(self, message: list[Any], outcome: list[Any]) -> None:
        """Answer a request."""
        self.send([message[0], *outcome])

    def send(self, frame: Any) -> None:
        """Write one frame."""
        if not self.transport.is_closing():
            self.transport.write(self.encoder.encode(frame))
