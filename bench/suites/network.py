"""The `network` suite: running clusters (RF 1 and RF 3, three nodes, real processes) under our own client.

`run` returns a list of results and prints nothing; a result is a dict:

    target      "kvtcp RF 1" | "kvtcp RF 3" | "echo peer"
    workload    "get depth 64", "put depth 16", "put_many", "get_many", ...
    unit        "ops/s" or "keys/s"
    median, min, max, runs      over the runs
    cpu_us      {"coordinator", "nodes", "client"}: CPU time per operation from the process accounts, median

Closed loop, one client process, one connection; depth = number of coroutines that each await one operation after
another. Keys are 16 bytes, values 128 bytes, drawn at random from the loaded ones. What a get returns is compared with
what was put. The targets are all up during the whole suite and take turns in random order, so a busy moment of the
machine meets all of them. The echo peer answers with a constant: it shows what the client itself can do.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

import kvtcp
from bench.load.clients import key_of
from bench.load.cluster import Cluster, EchoPeer
from bench.measure import Options, Result, cpu_s, make_row
from bench.suites.floors import beside

VALUE = b"v" * 128
DEPTHS = (1, 16, 64)
TITLE = "Network: our own client in one process on one connection; 16-byte keys, 128-byte values"


class Target:
    """Something to measure, with its client and the processes whose CPU time counts."""

    def __init__(self, name: str, client: Any, coordinator_pid: int | None, node_pids: list[int]) -> None:
        self.name = name
        self.client = client
        self.coordinator_pid = coordinator_pid
        self.node_pids = node_pids

    def cpu(self) -> dict[str, float]:
        """CPU seconds used so far, by role."""
        usage = {"client": cpu_s(os.getpid())}
        if self.coordinator_pid is not None:
            usage["coordinator"] = cpu_s(self.coordinator_pid)
            usage["nodes"] = sum(cpu_s(pid) for pid in self.node_pids)
        return usage


async def _single(target: Target, workload: str, depth: int, count: int, keys: int, seed: int) -> None:
    client = target.client
    check = target.coordinator_pid is not None

    async def worker(number: int) -> None:
        randrange = random.Random(seed * 1000 + number).randrange
        for _ in range(count // depth):
            key = key_of(randrange(keys))
            if workload == "get":
                value = await client.get(key)
                if check and value != VALUE:
                    raise AssertionError(f"get of {key!r} returned {value!r}")
            else:
                await client.put(key, VALUE)

    await asyncio.gather(*(worker(number) for number in range(depth)))


async def _put_many(target: Target, keys: int) -> None:
    await target.client.put_many([(key_of(number), VALUE) for number in range(keys)])


async def _get_many(target: Target, keys: int) -> None:
    values = await target.client.get_many([key_of(number) for number in range(keys)])
    if values != [VALUE] * keys:
        raise AssertionError("get_many returned other values than were put")


async def _measure(target: Target, count: int, work: Callable[[], Awaitable[None]]) -> dict[str, float]:
    before, started = target.cpu(), time.perf_counter()
    await work()
    elapsed_s = time.perf_counter() - started
    after = target.cpu()
    return {"rate": count / elapsed_s, **{role: (after[role] - before[role]) / count * 1e6 for role in before}}


def _plan(target: Target, operations: int, keys: int, seed: int) -> list[tuple[str, str, int, Callable[[], Any]]]:
    """(workload, unit, count, work) for one target."""
    plan: list[tuple[str, str, int, Callable[[], Any]]] = []
    if target.coordinator_pid is not None:
        plan.append(("put_many", "keys/s", keys, lambda: _put_many(target, keys)))
    for workload in ("get", "put") if target.coordinator_pid is not None else ("get",):
        for depth in DEPTHS:
            count = max(depth, operations * (1 if depth == 64 else 2 if depth == 16 else 1) // (8 if depth == 1 else 2))
            count -= count % depth

            def work(workload: str = workload, depth: int = depth, count: int = count) -> Any:
                return _single(target, workload, depth, count, keys, seed)

            plan.append((f"{workload} depth {depth}", "ops/s", count, work))
    if target.coordinator_pid is not None:
        plan.append(("get_many", "keys/s", keys, lambda: _get_many(target, keys)))
    return plan


async def _run(
    clusters: list[Cluster], echo: EchoPeer, operations: int, keys: int, runs: int, seed: int
) -> list[Result]:
    targets = []
    for cluster in clusters:
        client = await kvtcp.connect(cluster.url, timeout=60)
        pids = [node["pid"] for node in await client.nodes()]
        targets.append(Target(f"kvtcp RF {cluster.replication_factor}", client, cluster.coordinator_pid, pids))
    targets.append(Target("echo peer", await kvtcp.connect(echo.url, timeout=60), None, []))
    figures: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    chooser = random.Random(seed)
    for number in range(runs):
        plans = [(target, _plan(target, operations, keys, seed + number)) for target in targets]
        for step in range(max(len(plan) for _, plan in plans)):
            turn = [(target, plan[step]) for target, plan in plans if step < len(plan)]
            chooser.shuffle(turn)
            for target, (workload, unit, count, work) in turn:
                figures.setdefault((target.name, workload, unit), []).append(await _measure(target, count, work))
    for target in targets:
        await target.client.close()
    return [_result(*name, rows) for name, rows in figures.items()]


def _result(target: str, workload: str, unit: str, rows: list[dict[str, float]]) -> Result:
    rates = [row["rate"] for row in rows]
    roles = [role for role in ("coordinator", "nodes", "client") if role in rows[0]]
    cpu_us = {role: statistics.median(row[role] for row in rows) for role in roles}
    return make_row(target, workload, unit, rates, cpu_us=cpu_us)


def run(operations: int = 60_000, keys: int = 100_000, runs: int = 5, seed: int = 1) -> list[Result]:
    """The results; takes about a minute with the defaults."""
    with Cluster(3, 1) as one, Cluster(3, 3) as three, EchoPeer() as echo:
        return uvloop.run(_run([one, three], echo, operations, keys, runs, seed))


def measure(options: Options) -> list[Result]:
    """Both clusters, with the echo beside the gets."""
    rows = run(options.size(60_000, 20_000), options.keys_or(100_000, 20_000), options.runs_or(5), options.seed)
    return beside(rows, "echo peer")
