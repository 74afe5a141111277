"""The `catchup` suite: how soon a node that was away is up to date again, and what clients notice of it.

`run` returns a list of results and prints nothing; a result is a dict:

    target      "before" | "missed writes" | "emptied node" | "load"
    workload    "back in sync" | "put p50" | "put p99" | "longest put" | "answered" | "capacity, put 50x16" | ...
    unit        "s" | "ms" | "share" | "ops/s"
    median, min, max, runs      over the runs

A cluster of three nodes, RF 3, `sync`, whose nodes are started here; its keys have 16 bytes, its values 64. The
capacity of puts is found by a closed loop; then an open loop at LOAD of it, timed from the intended send, goes on all
the time. A node is killed (SIGKILL) and stays away until so many writes were acknowledged without it, or its data
directory is emptied meanwhile; *back in sync* is the time from its start (process, recovery and all) until `status`
finds nothing wrong. Latencies are of the puts that were due in that time; "before" are those of a quiet time of at most
QUIET_S. A put that is refused, or whose outcome is unknown, counts with its time and not as answered.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from typing import Any, Final

import uvloop

import kvtcp
from bench.load.clients import key_of
from bench.load.cluster import Cluster
from bench.measure import Options, Result, make_row
from bench.suites.failover import wait_whole
from kvtcp.errors import KvtcpError

CONNECTIONS: Final = 50
DEPTH: Final = 16
VALUE: Final = b"v" * 64
LOAD: Final = 0.3
QUIET_S: Final = 10.0
NODE: Final = "n2"
AWAY_S_MAX: Final = 300.0
SYNC_S_MAX: Final = 600.0
TITLE = "Catch-up: three nodes, RF 3, sync; a node was away"


class OpenLoop:
    """Puts at a rate until stopped, each timed from when it should have been sent."""

    def __init__(self, clients: list[Any], keys: int, rate: float, seed: int) -> None:
        self.clients = clients
        self.keys = keys
        self.rate = rate
        self.random = random.Random(seed)
        self.acknowledged = 0
        self.calls: list[tuple[float, float, bool]] = []  # due, ms, answered
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = False

    async def run(self) -> None:
        """Until `stop`."""
        loop = asyncio.get_running_loop()
        began, number = loop.time(), 0
        while not self._stop:
            due = int((loop.time() - began) * self.rate) + 1
            while number < due:
                task = loop.create_task(self._one(number, began + number / self.rate))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                number += 1
            await asyncio.sleep(0.001)
        await asyncio.gather(*self._tasks)

    def stop(self) -> None:
        """Send nothing more."""
        self._stop = True

    async def _one(self, number: int, due: float) -> None:
        is_answered = True
        try:
            client = self.clients[number % len(self.clients)]
            await client.put(key_of(self.random.randrange(self.keys)), VALUE)
            self.acknowledged += 1
        except KvtcpError:
            is_answered = False
        now = asyncio.get_running_loop().time()
        self.calls.append((due, (now - due) * 1000, is_answered))

    def figures(self, begin: float, end: float) -> dict[str, float]:
        """Of the puts that were due between two times of the loop."""
        calls = [(ms, answered) for due, ms, answered in self.calls if begin <= due <= end]
        latencies = sorted(ms for ms, _ in calls)
        count = len(latencies)
        assert count, "puts are due all the time"
        return {
            "put p50, ms": latencies[count // 2],
            "put p99, ms": latencies[min(count - 1, int(count * 0.99))],
            "longest put, ms": latencies[-1],
            "answered, share": sum(answered for _, answered in calls) / count,
        }


class Suite:
    """One cluster, filled."""

    def __init__(self, cluster: Cluster, clients: list[Any], keys: int, seed: int) -> None:
        self.cluster = cluster
        self.clients = clients
        self.keys = keys
        self.seed = seed
        self.figures: dict[str, list[dict[str, float]]] = {}

    async def fill(self) -> None:
        """Every key is there."""
        for first in range(0, self.keys, 100_000):
            numbers = range(first, min(first + 100_000, self.keys))
            await self.clients[0].put_many([(key_of(number), VALUE) for number in numbers], timeout=60)

    async def capacity(self, count: int) -> float:
        """Puts a second in a closed loop."""

        async def worker(number: int) -> None:
            randrange = random.Random(self.seed * 1000 + number).randrange
            for _ in range(count // (CONNECTIONS * DEPTH)):
                await self.clients[number % CONNECTIONS].put(key_of(randrange(self.keys)), VALUE)

        began = time.perf_counter()
        await asyncio.gather(*map(worker, range(CONNECTIONS * DEPTH)))
        return count / (time.perf_counter() - began)

    async def away(self, load: OpenLoop, writes: int, is_emptied: bool) -> dict[str, float]:
        """The node is killed, misses so many writes, comes back, and is up to date in the end."""
        loop = asyncio.get_running_loop()
        self.cluster.kill_node(NODE)
        killed, wanted = loop.time(), load.acknowledged + writes
        while load.acknowledged < wanted:
            if loop.time() > killed + AWAY_S_MAX:
                raise TimeoutError(f"in {AWAY_S_MAX:.0f} s without {NODE}, {writes} writes were not acknowledged")
            await asyncio.sleep(0.01)
        began = loop.time()
        starting = asyncio.to_thread(self.cluster.start_node, NODE, is_emptied)
        await starting
        ready = loop.time()
        await wait_whole(self.clients[0], SYNC_S_MAX)
        ended = loop.time()
        return {
            "away, s": began - killed,
            "process ready, s": ready - began,
            "back in sync, s": ended - began,
            **load.figures(began, ended),
            "longest put when it was killed, ms": load.figures(killed - 0.1, killed + 3.0)["longest put, ms"],
        }

    async def run(self, rate: float, missed: int, number: int) -> None:
        """One run: a quiet time, a node that missed writes, one that has nothing."""
        load = OpenLoop(self.clients, self.keys, rate, self.seed + number)
        loop = asyncio.get_running_loop()
        gc.collect()
        gc.disable()  # a pause of this client is no latency of the servers
        task = asyncio.ensure_future(load.run())
        try:
            await asyncio.sleep(1.0)
            began = loop.time()
            await asyncio.sleep(QUIET_S)
            self._add("before", load.figures(began, loop.time()))
            self._add("missed writes", await self.away(load, missed, is_emptied=False))
            await asyncio.sleep(2.0)
            self._add("emptied node", await self.away(load, int(rate), is_emptied=True))
        finally:
            load.stop()
            await task
            gc.enable()

    def _add(self, target: str, figures: dict[str, float]) -> None:
        self.figures.setdefault(target, []).append(figures)

    def results(self) -> list[Result]:
        """All figures."""
        found: list[Result] = []
        for target, rows in self.figures.items():
            for name in rows[0]:
                workload, _, unit = name.rpartition(", ")
                values = [row[name] for row in rows]
                found.append(make_row(target, workload, unit, values))
        return found


async def _run(cluster: Cluster, keys: int, missed: int, runs: int, seed: int) -> list[Result]:
    clients = [await kvtcp.connect(cluster.url, timeout=5.0) for _ in range(CONNECTIONS)]
    suite = Suite(cluster, clients, keys, seed)
    await suite.fill()
    await suite.capacity(20_000)  # warms up
    capacities = [await suite.capacity(40_000) for _ in range(3)]
    rate = statistics.median(capacities) * LOAD
    suite.figures["load"] = [{"capacity, put 50x16, ops/s": each, "open loop, ops/s": rate} for each in capacities]
    for number in range(runs):
        await suite.run(rate, missed, number)
    for client in clients:
        await client.close()
    return suite.results()


def run(keys: int = 1_000_000, missed: int = 100_000, runs: int = 3, seed: int = 1) -> list[Result]:
    """The results; takes about five minutes with the defaults."""
    with Cluster(3, 3, "sync", own_nodes=True) as cluster:
        return uvloop.run(_run(cluster, keys, missed, runs, seed))


def measure(options: Options) -> list[Result]:
    """A node that missed writes, and one that has nothing."""
    missed = options.size(50_000, 10_000)
    return run(options.keys_or(300_000, 50_000), missed, options.runs_or(2), options.seed)
