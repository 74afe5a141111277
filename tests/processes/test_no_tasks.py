"""The servers make no task and no future for an operation: counted over thousands of operations of every kind.

The cluster runs on an event loop of its own, in its own thread, so that whatever that loop makes was made by a server.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

import kvtcp
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes.raw_client import Wire

OPERATIONS = 10_000
LOOPS: dict[str, type[asyncio.AbstractEventLoop]] = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.Loop}


def counting_loop(kind: type[asyncio.AbstractEventLoop]) -> Any:
    """A loop that counts the tasks and futures it makes in `made`."""

    class CountingLoop(kind):  # type: ignore[valid-type, misc]
        made = 0

        def create_task(self, *args: Any, **kwargs: Any) -> Any:
            self.made += 1
            return super().create_task(*args, **kwargs)

        def create_future(self) -> Any:
            self.made += 1
            return super().create_future()

    return CountingLoop()


@pytest.fixture(params=sorted(LOOPS))
def server_loop(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The loop of the servers, running in its thread."""
    loop = counting_loop(LOOPS[request.param])
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    assert not thread.is_alive()
    loop.close()


async def every_operation(kv: Any, n: int) -> int:
    """One of each kind of data operation on keys of its own; returns how many that were."""
    key = f"key-{n}"
    entry_rev = await kv.put(key, "1", ttl=1000)
    await kv.add(f"new-{n}", "x")
    await kv.cas(key, "2", if_rev=entry_rev)
    await asyncio.gather(
        kv.incr(key), kv.get(key), kv.get_entry("missing"), kv.exists(key), kv.ttl(key), kv.expire(key, 500),
        kv.persist(key), kv.count(prefix="key-"), kv.put_many({f"m{n}": "1", f"l{n}": "2"}),
        kv.get_many([key, "missing"]), kv.delete(f"new-{n}"), kv.delete_many([f"m{n}", f"l{n}"]),
    )  # fmt: skip
    async for _ in kv.scan(prefix=key, limit=3):
        pass
    for refused in (kv.add(key, "y"), kv.cas(key, "z", if_value="no"), kv.incr(key, 2**62)):
        try:
            await refused
        except kvtcp.KvtcpError:
            continue
    return 19


async def redis_operations(wire: Wire, n: int) -> int:
    """Pipelined commands of the Redis protocol, also such that wait or are refused; returns how many that were."""
    key = b"redis-%d" % n
    commands = [
        b"set %b 1", b"get %b", b"incr %b", b"mget %b none", b"mset %b 2 other 3", b"expire %b 500", b"ttl %b",
        b"append %b x", b"incr %b", b"nosuch %b", b"watch %b", b"multi", b"set %b 5", b"get %b", b"exec", b"scan 0",
        b"keys %b", b"dbsize", b"del %b other", b"command count",
    ]  # fmt: skip
    lines = [command.replace(b"%b", key) + b"\r\n" for command in commands]
    wire.write(b"".join(lines) * 10 + b"echo end\r\n")
    async with asyncio.timeout(30):
        await wire.reader.readuntil(b"$3\r\nend\r\n")
    return 10 * len(lines) + 1


async def test_no_task_and_no_future_per_operation(server_loop: Any) -> None:
    """Ten thousand operations of every data kind, failing ones among them, and as many commands of the Redis protocol:
    no task, no future on the servers."""

    def on_server(work: Callable[[], Any]) -> Any:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), server_loop))

    async def make() -> LocalCluster:
        return await LocalCluster(3).start()

    cluster = await on_server(make)
    try:
        async with kvtcp.connect(cluster.url, timeout=10) as kv:
            await every_operation(kv, 0)
            made_before, done, n = server_loop.made, 0, 1
            operations_before = cluster.coordinator.clients.requests
            while done < OPERATIONS:
                done += sum(await asyncio.gather(*(every_operation(kv, n + i) for i in range(50))))
                n += 50
            async with await Wire.open(cluster.coordinator.address, hello=False) as wire:
                redis_done = 0
                while redis_done < OPERATIONS:
                    redis_done += await redis_operations(wire, redis_done)
            done += redis_done
            made = server_loop.made - made_before
            assert cluster.coordinator.clients.requests - operations_before >= OPERATIONS
            # the bound of stamps is moved every 5 s, which is a change of the map and makes some
            assert made < done // 200, f"{made} tasks and futures for {done} operations"
            # the counter counts: a backup is administration, and makes some
            await kv.backup("counted")
            assert server_loop.made > made_before
    finally:
        await on_server(cluster.close)
