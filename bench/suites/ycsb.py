"""The `ycsb` suite: the six core workloads of the Yahoo! Cloud Serving Benchmark; three nodes, three copies, `sync`.

    A  50 % read, 50 % update         zipfian          D  95 % read, 5 % insert        latest
    B  95 % read, 5 % update          zipfian          E  95 % scan (1-100), 5 % insert   zipfian
    C  100 % read                     zipfian          F  50 % read, 50 % read-modify-write     zipfian

(B. F. Cooper et al., "Benchmarking cloud serving systems with YCSB", 2010.) Keys of 16 bytes, values of 128, zipfian
0.99, two client processes with 50 connections and depth 16 together. The closed loop finds the capacity; open loops at
50, 70 and 85 % of its median, timed from the intended send, give the latency. Every read is checked against its key,
and in the end the keys are counted: what was loaded and what was inserted.

The floor is the same client against a server that only echoes: reads of workload C cost the client that much.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

import uvloop

import kvtcp
from bench.load import clients as load
from bench.load.clients import Job, Outcome, run_load
from bench.load.cluster import Cluster, EchoPeer
from bench.measure import Options, Result, make_row, usage_s, with_floor

TITLE = "YCSB: three nodes, three copies, sync; own client in two processes"
WORKLOADS: dict[str, tuple[dict[str, float], str]] = {
    "A": ({"get": 0.5, "put": 0.5}, "zipfian"),
    "B": ({"get": 0.95, "put": 0.05}, "zipfian"),
    "C": ({"get": 1.0}, "zipfian"),
    "D": ({"get": 0.95, "insert": 0.05}, "latest"),
    "E": ({"scan": 0.95, "insert": 0.05}, "zipfian"),
    "F": ({"get": 0.5, "rmw": 0.5}, "zipfian"),
}
LOADS = (0.5, 0.7, 0.85)
OPERATIONS = {"E": (15_000, 800)}
OPERATIONS_OTHER = (60_000, 4_000)
OPEN_S = (4.0, 1.0)


class Ycsb:
    """One cluster, loaded once."""

    def __init__(self, cluster: Cluster, options: Options, keys: int) -> None:
        self.cluster, self.options, self.keys = cluster, options, keys
        self.next_insert = keys
        self.inserted = 0
        self.runs = 0

    def run(self, name: str, operations: int, rate: float | None) -> tuple[Outcome, dict[str, float]]:
        """One run of a workload; the outcome and CPU time per operation by role. Raises AssertionError if a call
        failed."""
        mix, distribution = WORKLOADS[name]
        self.runs += 1
        job = Job(
            url=self.cluster.url, mix=mix, distribution=distribution, keys=self.keys, first_insert=self.next_insert,
            operations=operations, connections=50, depth=16, rate=rate, seed=self.options.seed * 10_000 + self.runs,
        )  # fmt: skip
        before: dict[str, float] = {}
        outcome = run_load(job, before=lambda: before.update(usage_s(self.cluster.roles())))
        after = usage_s(self.cluster.roles())
        if outcome.failed:
            raise AssertionError(f"workload {name}: {outcome.failed} of {operations} calls had no result")
        self.next_insert += 2 * operations  # more than the numbers that were used
        self.inserted += outcome.inserted
        cpu_us = {role: (after[role] - before[role]) / operations * 1e6 for role in before}
        return outcome, {**cpu_us, "client": outcome.client_cpu_s / operations * 1e6}

    def verify(self) -> None:
        """All keys are there, and no other."""
        found = load.count_keys(self.cluster.url)
        if found != self.keys + self.inserted:
            raise AssertionError(f"{found} keys, not the {self.keys} that were loaded and {self.inserted} inserted")


def _row(name: str, workload: str, unit: str, runs: list[tuple[Outcome, dict[str, float]]], **more: Any) -> Result:
    """A row of rates; the latencies are the medians of the runs'."""
    figures = [outcome.histogram.figures() for outcome, _ in runs]
    more.update({each: statistics.median(figure[each] for figure in figures) for each in figures[0]})
    more["cpu_us"] = {role: statistics.median(cpu[role] for _, cpu in runs) for role in runs[0][1]}
    values = [outcome.rate for outcome, _ in runs] if unit == "ops/s" else [figure["p99_ms"] for figure in figures]
    return make_row(f"YCSB {name}", workload, unit, values, durability="sync x3", **more)


def _closed(ycsb: Ycsb, options: Options) -> list[Result]:
    chooser = random.Random(options.seed)
    names = list(WORKLOADS)
    found: dict[str, list[tuple[Outcome, dict[str, float]]]] = {name: [] for name in names}
    for _ in range(options.runs_or(5)):
        for name in chooser.sample(names, len(names)):
            found[name].append(ycsb.run(name, options.size(*OPERATIONS.get(name, OPERATIONS_OTHER)), None))
    return [_row(name, "closed loop", "ops/s", runs) for name, runs in found.items()]


def _open(ycsb: Ycsb, options: Options, capacities: dict[str, float]) -> list[Result]:
    """Latencies at shares of the capacity; the rows are of p99."""
    chooser = random.Random(options.seed)
    kinds = [(name, share) for name in WORKLOADS for share in LOADS]
    if options.quick:
        kinds = [("A", 0.5)]
    found: dict[tuple[str, float], list[tuple[Outcome, dict[str, float]]]] = {kind: [] for kind in kinds}
    seconds = OPEN_S[1] if options.quick else OPEN_S[0]
    for _ in range(min(3, options.runs_or(3))):
        for name, share in chooser.sample(kinds, len(kinds)):
            rate = capacities[name] * share
            found[name, share].append(ycsb.run(name, int(rate * seconds), rate))
    return [
        _row(name, f"p99, open loop at {share:.0%}", "ms", runs, rate=capacities[name] * share)
        for (name, share), runs in found.items()
    ]


def _echo_rate(options: Options) -> float:
    """Reads a second of the same client processes against the echo."""
    with EchoPeer() as echo:
        rates = []
        for run in range(options.runs_or(3)):
            job = Job(url=echo.url, mix={"probe": 1.0}, operations=options.size(*OPERATIONS_OTHER), connections=50,
                      seed=run)  # fmt: skip
            rates.append(run_load(job).rate)
        return statistics.median(rates)


async def _warm(url: str, keys: int) -> None:
    async with kvtcp.connect(url, timeout=60.0) as kv:
        await kv.get_many([load.key_of(number) for number in range(min(keys, 20_000))])


def measure(options: Options) -> list[Result]:
    """Closed loops, then open loops, then the count."""
    keys = options.keys_or(1_000_000, 20_000)
    echo = _echo_rate(options)
    with Cluster(3, 3, "sync") as cluster:
        load.fill(cluster.url, keys)
        uvloop.run(_warm(cluster.url, keys))
        ycsb = Ycsb(cluster, options, keys)
        closed = _closed(ycsb, options)
        capacities = {row["target"].removeprefix("YCSB "): row["median"] for row in closed}
        rows = closed + _open(ycsb, options, capacities)
        ycsb.verify()
    return [with_floor(row, "the same client against an echo", echo) if row["unit"] == "ops/s" else row for row in rows]
