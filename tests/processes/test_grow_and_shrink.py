"""Three nodes become five and three again, real processes under load, by the commands that an operator has."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import kvtcp
from kvtcp.errors import Unavailable
from kvtcp.storage.disk.snapshot import DIRECTORY as SNAPSHOTS
from kvtcp.storage.disk.store import read_store_manifest
from kvtcp.storage.files import OS_DISK
from tests.chaos.cluster import ChaosCluster, Shape
from tests.chaos.disks import read_map, read_members
from tests.processes.cluster import ROOT

SHARDS = 16
FACTOR = 3
KEYS = 400
WORKERS = 8
STEP_S = 60.0


async def shell(url: str, *words: str) -> Any:
    """What a command of the shell answers, as JSON."""
    command = [sys.executable, str(ROOT / "bin" / "kvtcp-shell"), url, "-o", "json", *words]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=STEP_S)
    assert done.returncode == 0, f"{words}: exit {done.returncode}: {done.stderr}"
    return json.loads(done.stdout)


class Load:
    """Clients that write and read keys of their own; any error but Unavailable ends them, and that is repeated."""

    def __init__(self, kv: Any, seed: int) -> None:
        self.kv = kv
        self.random = random.Random(seed)
        self.values: dict[str, str] = {}
        self.calls = 0
        self._stop = False

    async def fill(self) -> None:
        """Every key has a value."""
        self.values = {f"w{worker}-{n}": "0" for worker in range(WORKERS) for n in range(KEYS)}
        await self.kv.put_many(self.values)

    async def work(self, worker: int) -> None:
        """Until `stop`."""
        while not self._stop:
            key = f"w{worker}-{self.random.randrange(KEYS)}"
            if self.random.random() < 0.5:
                value = str(self.calls)
                await self._repeated(lambda key=key, value=value: self.kv.put(key, value))
                self.values[key] = value
            else:
                found = await self._repeated(lambda key=key: self.kv.get(key))
                assert found == self.values[key].encode(), f"{key} is {found!r}, not {self.values[key]}"
            self.calls += 1
            await asyncio.sleep(0.002)

    async def _repeated(self, call: Any) -> Any:
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.01)

    def stop(self) -> None:
        """No more calls."""
        self._stop = True


@asynccontextmanager
async def load_on(kv: Any, seed: int) -> AsyncIterator[Load]:
    """Clients at work; an error of one of them fails the test."""
    load = Load(kv, seed)
    await load.fill()
    workers = asyncio.gather(*map(load.work, range(WORKERS)))
    try:
        yield load
        calls = load.calls
        async with asyncio.timeout(STEP_S):
            while load.calls < calls + 100 and not workers.done():
                await asyncio.sleep(0.01)
    finally:
        load.stop()
        await workers


async def settled(kv: Any) -> None:
    """Wait until nothing is left to move and nothing is wrong."""
    status: dict[str, Any] = {}
    try:
        async with asyncio.timeout(STEP_S):
            while not status or status["state"] != "ok" or status["moving"] or status["learning"]:
                await asyncio.sleep(0.02)
                status = await kv.status()
    except TimeoutError:
        raise AssertionError(f"after {STEP_S} s: {status}") from None


async def held(kv: Any) -> dict[str, int]:
    """How many shards each node is a member of."""
    return {row["node"]: row["member_of"] for row in await kv.nodes()}


async def empty_disk(directory: Path) -> None:
    """Wait until a node has no copy of any shard on its disk either."""
    async with asyncio.timeout(STEP_S):
        while True:
            manifest = read_store_manifest(OS_DISK, directory)
            if manifest is not None and not manifest.shards and not OS_DISK.list(directory / SNAPSHOTS):
                return
            await asyncio.sleep(0.02)


@pytest.mark.slow
async def test_three_nodes_become_five_and_three(tmp_path: Path) -> None:
    """Shards spread evenly over new nodes and leave the drained ones; no client meets an error, no key is lost."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    cluster = ChaosCluster(tmp_path, Shape("linked", factor=FACTOR, shards=SHARDS))
    await cluster.start()
    try:
        async with kvtcp.connect(cluster.url) as kv, load_on(kv, seed) as load:
            for _ in range(2):
                node, port = await cluster.add_process()
                assert (await shell(cluster.url, "node", "add", f"127.0.0.1:{port}"))["node"] == node
            assert set(await held(kv)) == {"n1", "n2", "n3", "n4", "n5"}
            await shell(cluster.url, "rebalance", "wait")
            await settled(kv)
            counts = await held(kv)
            assert sum(counts.values()) == SHARDS * FACTOR, counts
            assert max(counts.values()) - min(counts.values()) <= 1, counts
            calls = load.calls
            gone = ("n2", "n4")  # one that was there first, and one that came
            for node in gone:
                await shell(cluster.url, "node", "drain", node, "wait")
                assert (await held(kv))[node] == 0
            await settled(kv)
            for node in gone:
                await empty_disk(cluster.directory_of(node))
                await shell(cluster.url, "node", "remove", node)
                await cluster.end_process(node)
            assert await held(kv) == {"n1": SHARDS, "n3": SHARDS, "n5": SHARDS}
            assert load.calls > calls, "clients were at work all the time"
        async with kvtcp.connect(cluster.url) as kv:
            found = {key.decode(): value.decode() async for key, value in kv.scan()}
        assert found == load.values, "every key has its last value"
        await cluster.stop()
        cluster_map = read_map(cluster.data)
        assert set(cluster_map["nodes"]) == {"n1", "n3", "n5"}
        versions, broken = read_members(cluster_map, cluster.directory_of)
        assert (versions, broken) == ([load.values], [])
    finally:
        await cluster.close()
