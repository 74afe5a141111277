"""The `durability` suite: what keeping data costs, in CPU, and in latency while snapshots run.

`run` returns a list of results and prints nothing; a result is a dict:

    target      "RF 1 memory" | "RF 1 os" | "RF 1 sync" | "RF 3 ..." | "no snapshots" | "snapshots"
    workload    "put 50x16" | "open loop put p50" ... "p99.9" | "p99 / without" | ...
    unit        "ops/s" | "ms" | "ratio" | "1/s"
    median, min, max, runs      over the runs
    cpu_us      {"coordinator", "nodes", "client"}: CPU per operation, of the closed loop only

**Cost**: closed loop, 50 connections with 16 coroutines each in one client process, puts of 128 bytes under 16-byte
keys; the clusters of all modes are up during the suite and take turns in random order.

**Snapshots**: `sync`, RF 3, 200,000 keys. The capacity is found by a closed loop; then an open loop at half of it,
timed from the intended send, with no snapshot, and with snapshots of all shards of all nodes one after the other all
the time. The two take turns.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import uvloop

import kvtcp
from bench.load.clients import key_of
from bench.load.cluster import Cluster
from bench.measure import Options, Result, cpu_s, make_row, with_floor
from bench.suites.floors import fdatasync_ms

CONNECTIONS = 50
DEPTH = 16
VALUE = b"v" * 128
MODES = ("memory", "os", "sync")
TITLE = "Durability: modes never share a cluster; puts of 128 bytes by our own client"


# --- cost -------------------------------------------------------------------------------------------------


class Target:
    """A cluster with its connections."""

    def __init__(self, name: str, cluster: Cluster, clients: list[Any], node_pids: list[int]) -> None:
        self.name = name
        self.cluster = cluster
        self.clients = clients
        self.node_pids = node_pids

    @classmethod
    async def open(cls, name: str, cluster: Cluster) -> Target:
        """Connect."""
        clients = [await kvtcp.connect(cluster.url, timeout=60) for _ in range(CONNECTIONS)]
        return cls(name, cluster, clients, [node["pid"] for node in await clients[0].nodes()])

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by role."""
        return {
            "coordinator": cpu_s(self.cluster.coordinator_pid),
            "nodes": sum(cpu_s(pid) for pid in self.node_pids),
            "client": cpu_s(os.getpid()),
        }

    async def put(self, count: int, keys: int, seed: int) -> dict[str, float]:
        """`count` puts in a closed loop: rate, and CPU-us per operation by role."""

        async def worker(number: int) -> None:
            client = self.clients[number % CONNECTIONS]
            randrange = random.Random(seed * 1000 + number).randrange
            for _ in range(count // (CONNECTIONS * DEPTH)):
                await client.put(key_of(randrange(keys)), VALUE)

        before, began = self.cpu(), time.perf_counter()
        await asyncio.gather(*map(worker, range(CONNECTIONS * DEPTH)))
        took_s = time.perf_counter() - began
        after = self.cpu()
        return {"rate": count / took_s, **{role: (after[role] - before[role]) / count * 1e6 for role in before}}

    async def close(self) -> None:
        """Disconnect."""
        for client in self.clients:
            await client.close()


async def _cost(clusters: dict[str, Cluster], count: int, keys: int, runs: int, seed: int) -> list[Result]:
    targets = [await Target.open(name, cluster) for name, cluster in clusters.items()]
    figures: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
    chooser = random.Random(seed)
    for run in range(runs + 1):
        for target in chooser.sample(targets, len(targets)):
            row = await target.put(count, keys, seed + run)
            if run:  # the first one warms up
                figures[target.name].append(row)
    for target in targets:
        await target.close()
    results = []
    for name, rows in figures.items():
        cpu_us = {role: statistics.median(row[role] for row in rows) for role in ("coordinator", "nodes", "client")}
        results.append(make_row(name, "put 50x16", "ops/s", [row["rate"] for row in rows], cpu_us=cpu_us))
    for factor in (1, 3):
        for mode in ("os", "sync"):
            pairs = zip(figures[f"RF {factor} {mode}"], figures[f"RF {factor} memory"], strict=True)
            ratios = [(a["coordinator"] + a["nodes"]) / (b["coordinator"] + b["nodes"]) for a, b in pairs]
            results.append(make_row(f"RF {factor} {mode}", "server CPU per put / memory", "ratio", ratios))
    return results


# --- snapshots --------------------------------------------------------------------------------------------


async def _open_loop(clients: list[Any], rate: float, seconds: float, keys: int, seed: int) -> list[float]:
    """Puts at this rate, each timed from when it should have been sent; latencies in ms, ascending."""
    loop = asyncio.get_running_loop()
    rng = random.Random(seed)
    count = int(rate * seconds)
    latencies: list[float] = []
    gc.collect()
    gc.disable()  # a pause of this client is no latency of the servers
    tasks: set[asyncio.Task[None]] = set()
    began = loop.time()

    async def one(number: int) -> None:
        await clients[number % len(clients)].put(key_of(rng.randrange(keys)), VALUE)
        latencies.append((loop.time() - began - number / rate) * 1000)

    number = 0
    while number < count:
        due = min(count, int((loop.time() - began) * rate) + 1)
        while number < due:
            task = loop.create_task(one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)
    gc.enable()
    return sorted(latencies)


async def _snapshotting(pids: list[int], stop: asyncio.Event) -> int:
    """Snapshots all the time; how many rounds were asked for."""
    rounds = 0
    while not stop.is_set():
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        rounds += 1
        try:
            await asyncio.wait_for(stop.wait(), 0.5)
        except TimeoutError:
            continue
    return rounds


def _snapshot_everything(pids: list[int], directory: Path) -> None:
    """Every node has one segment of log, and nothing is being snapshotted."""
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    until = time.monotonic() + 120
    while any(sum(1 for _ in log.iterdir()) > 1 for log in directory.rglob("log")) or any(directory.rglob("*.tmp")):
        if time.monotonic() > until:
            raise TimeoutError("the snapshots were not finished in two minutes")
        time.sleep(0.2)


def _published(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*.snapshot")}


async def _latency(cluster: Cluster, keys: int, seconds: float, runs: int, seed: int) -> list[Result]:
    target = await Target.open("latency", cluster)
    await target.clients[0].put_many([(key_of(number), VALUE) for number in range(keys)])
    await target.put(20_000, keys, seed)
    capacity = statistics.median([(await target.put(40_000, keys, seed + n))["rate"] for n in range(3)])
    figures: dict[tuple[str, str], list[float]] = {}
    shares = []
    chooser = random.Random(seed)
    for run in range(runs):
        for with_snapshots in chooser.sample((False, True), 2):
            # so that the log is too short for snapshots of its own accord
            await asyncio.to_thread(_snapshot_everything, target.node_pids, cluster.data)
            before = _published(cluster.data)
            stop = asyncio.Event()
            task = asyncio.ensure_future(_snapshotting(target.node_pids, stop)) if with_snapshots else None
            latencies = await _open_loop(target.clients, capacity / 2, seconds, keys, seed + run)
            if task is not None:
                stop.set()
                await task
                shares.append(len(_published(cluster.data) - before) / seconds)
            name = "snapshots" if with_snapshots else "no snapshots"
            for quantile in (0.5, 0.99, 0.999):
                value = latencies[min(len(latencies) - 1, int(len(latencies) * quantile))]
                figures.setdefault((name, f"open loop put p{quantile * 100:g}"), []).append(value)
    await target.close()
    results = [make_row(name, workload, "ms", values) for (name, workload), values in figures.items()]
    p99 = "open loop put p99"
    ratios = [a / b for a, b in zip(figures["snapshots", p99], figures["no snapshots", p99], strict=True)]
    results.append(make_row("snapshots", "p99 / without", "ratio", ratios))
    results.append(make_row("snapshots", "files published in a second", "1/s", shares))
    results.append(make_row("no snapshots", "capacity, put 50x16", "ops/s", [capacity]))
    return results


def run(
    operations: int = 48_000, keys: int = 200_000, seconds: float = 10.0, runs: int = 5, seed: int = 1
) -> list[Result]:
    """The results; takes about four minutes with the defaults."""
    results: list[Result] = []
    clusters = {f"RF {factor} {mode}": Cluster(3, factor, mode) for factor in (1, 3) for mode in MODES}
    try:
        results += uvloop.run(_cost(clusters, operations, min(keys, 100_000), runs, seed))
    finally:
        for cluster in clusters.values():
            cluster.stop()
    with Cluster(3, 3, "sync") as cluster:
        results += uvloop.run(_latency(cluster, keys, seconds, runs, seed))
    return results


def measure(options: Options) -> list[Result]:
    """Cost and snapshots, with the disk's own time beside the latencies."""
    if options.quick:
        rows = run(16_000, 50_000, 3.0, options.runs_or(1), options.seed)
    else:
        rows = run(keys=options.keys_or(200_000, 200_000), runs=options.runs_or(5), seed=options.seed)
    syncs = [fdatasync_ms() for _ in range(options.runs_or(5))]
    p50, p99 = (statistics.median(values) for values in zip(*syncs, strict=True))
    floors = {"open loop put p50": ("fdatasync p50", p50), "open loop put p99": ("fdatasync p99", p99)}
    return [with_floor(row, *floors[row["workload"]]) if row["workload"] in floors else row for row in rows]
