"""What the tests of running servers share: both event loops, a raw client, a healthy one, conditions with deadlines.

The raw client speaks frames but checks nothing, so that a test can say anything on the wire. The healthy client reads
and writes all the while that others misbehave: it is what "other clients do not notice" means.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import msgpack
import pytest
import uvloop

import kvtcp
from kvtcp.constants import LINK_FRAME_BYTES_MAX, PROTOCOL_VERSION
from kvtcp.coordinator.server import CoordinatorServer
from kvtcp.node.server import NodeServer
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.link import LINK_VERSION
from kvtcp.testing.local_cluster import LocalCluster

WAIT_S = 30.0  # deadline of every condition, generous: the machine may be busy

# for the modules that take the fixture below: the hook that replaces it would parametrize the tests of all modules
BOTH_LOOPS = pytest.mark.filterwarnings('ignore:Overriding the "event_loop_policy" fixture')


@pytest.fixture(params=["uvloop", "asyncio"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Runs the test once on each event loop."""
    if request.param == "uvloop":
        return uvloop.EventLoopPolicy()
    return asyncio.DefaultEventLoopPolicy()


async def until(condition: Callable[[], Any], what: str = "the condition", wait_s: float = WAIT_S) -> Any:
    """Wait until `condition()` is true; returns it. AssertionError at the deadline."""
    deadline = time.monotonic() + wait_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {wait_s} s"
        await asyncio.sleep(0.002)
    return value


def pack(message: Any) -> bytes:
    """A frame."""
    return FrameEncoder(LINK_FRAME_BYTES_MAX).encode(message)


class Wire:
    """A TCP connection that sends whatever it is told, and decodes the frames that come back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._decoder = FrameDecoder(LINK_FRAME_BYTES_MAX)
        self._messages: list[Any] = []
        self._id = 0

    @classmethod
    async def open(cls, address: tuple[str, int], hello: bool = True) -> Self:
        """Connect; with `hello` as a client that was accepted."""
        wire = cls(*await asyncio.open_connection(*address))
        if hello:
            answer = await wire.ask("hello", PROTOCOL_VERSION, "test")
            assert answer[1] == 0, answer
        return wire

    def send(self, *messages: Any) -> None:
        """Write frames."""
        self.writer.write(b"".join(pack(message) for message in messages))

    def write(self, data: bytes) -> None:
        """Write bytes."""
        self.writer.write(data)

    async def receive(self) -> Any:
        """The next message; EOFError when the server closed the connection."""
        async with asyncio.timeout(WAIT_S):
            while not self._messages:
                data = await self.reader.read(1 << 16)
                if not data:
                    raise EOFError
                self._messages = self._decoder.feed(data)
        return self._messages.pop(0)

    async def ask(self, op: str, *args: Any) -> Any:
        """The answer `[id, code, ...]` to one request."""
        self._id += 1
        self.send([self._id, op, *args])
        answer = await self.receive()
        assert answer[0] == self._id, answer
        return answer

    async def closed(self) -> bytes:
        """Wait until the server closed the connection; returns what came before."""
        async with asyncio.timeout(WAIT_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    async def close(self) -> None:
        """Close."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Healthy:
    """A client with nothing to complain about; `rounds` counts what it has checked."""

    def __init__(self) -> None:
        self.rounds = 0


@contextlib.asynccontextmanager
async def healthy(cluster: LocalCluster) -> AsyncIterator[Healthy]:
    """A client that writes and reads all the time; any error of it, or silence for seconds, fails the test."""
    state = Healthy()
    stop = asyncio.Event()

    async def work() -> None:
        async with kvtcp.connect(cluster.url, timeout=8.0) as kv:
            while not stop.is_set():
                key = f"healthy-{state.rounds % 50}"
                await kv.put(key, str(state.rounds))
                assert await kv.get(key) == str(state.rounds).encode()
                assert await kv.incr("healthy-count") == state.rounds + 1
                state.rounds += 1
                await asyncio.sleep(0.001)

    task = asyncio.get_running_loop().create_task(work())
    try:
        await until(lambda: state.rounds or task.done(), "the healthy client's first round")
        yield state
        before = state.rounds
        await until(lambda: state.rounds > before + 1 or task.done(), "a round of the healthy client after it all")
    finally:
        stop.set()
        await task


def link_hello(running: LocalCluster, to: str, **changed: Any) -> dict[str, Any]:
    """A HELLO as the coordinator of `running` would say it next to node `to`."""
    coordinator = running.coordinator
    return {
        "version": LINK_VERSION, "cluster": coordinator.map.cluster, "secret": coordinator.secret,
        "epoch": coordinator.map.epoch, "coordinator": coordinator.map.owner, "link": link_number(coordinator, to) + 1,
        "node": to, "durability": coordinator.controller.durability, "map": coordinator.map.to_json(),
        "map_version": coordinator.map.version, "heard_version": 0, "shards": coordinator.map.shards_of(to), **changed,
    }  # fmt: skip


def link_number(coordinator: CoordinatorServer, node: str) -> int:
    """How many HELLOs a node was sent in this epoch: 1 as long as its first link lasts."""
    return coordinator.controller._hellos.get(node, (0, 0))[0]


def cut_link(coordinator: CoordinatorServer, node: str) -> None:
    """Break the connection to a node; the link dials again by itself."""
    connection = coordinator.links[node].connection
    assert connection is not None, "the link is up"
    connection.abort()


def bad_shards(coordinator: CoordinatorServer, node: str) -> dict[int, str]:
    """The shards whose copy on a node is bad, and why."""
    link = coordinator.sequencer.links[node]
    return {shard.number: shard.bad[link] for shard in link.shards if link in shard.bad}


async def linked(coordinator: CoordinatorServer, nodes: int) -> None:
    """Wait until so many nodes are linked."""
    await until(
        lambda: sum(link.progress.connected for link in coordinator.links.values()) == nodes, f"{nodes} linked nodes"
    )


async def kill_node(cluster: LocalCluster, node: str) -> None:
    """The node is gone with all it had; its port refuses."""
    server = cluster.nodes[node]
    for connection in list(server.connections):
        connection.abort()
    await server.close()
    await until(lambda: not cluster.coordinator.links[node].progress.connected, "the lost link")


async def restart_empty(cluster: LocalCluster, node: str) -> NodeServer:
    """A new process would have nothing but the identity: same id, same port, no data."""
    old = cluster.nodes[node]
    server = NodeServer(node, cluster=old.cluster, secret=old.secret)
    await server.start(*old.address)
    cluster.nodes[node] = server
    return server


def keys_of_shards(cluster: LocalCluster, per_shard: int = 1, prefix: str = "k") -> list[str]:
    """Keys that cover every shard, `per_shard` each."""
    wanted = dict.fromkeys(range(cluster.shards), per_shard)
    keys, n = [], 0
    while wanted:
        key = f"{prefix}{n}"
        number = shard_of(key.encode(), cluster.shards)
        n += 1
        if number in wanted:
            keys.append(key)
            wanted[number] -= 1
            if not wanted[number]:
                del wanted[number]
    return keys


def unpack(frame: bytes) -> Any:
    """The message of one frame."""
    return msgpack.unpackb(frame[5:], raw=True)
