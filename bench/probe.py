"""A short measurement of one checkout, for `bench.check`: `python -m bench.probe [--seed N]` prints JSON.

    {"package": where kvtcp was imported from, "figures": {name: [value, unit]}}

About fifteen seconds. What a checkout cannot do yet (an older one may not speak RESP) is told on stderr and left out.
Figures that are CPU time (us) are steadier than rates when other things run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import kvtcp
from bench.load import clients as load
from bench.load.clients import Job, run_load
from bench.load.cluster import Cluster
from bench.measure import cpu_s, resident_bytes, usage_s

KEYS = 50_000
OPERATIONS = 24_000
RESP_REQUESTS = 100_000
REPEATED = 5  # of what takes a tenth of a second
Figures = dict[str, tuple[float, str]]


def tree(seed: int) -> Figures:
    """The index of a shard."""
    from kvtcp.storage.shard.index import Index

    rng = random.Random(seed)
    numbers = rng.sample(range(KEYS * 10), KEYS)
    keys = [load.key_of(number) for number in numbers]
    others = [load.key_of(number) for number in rng.sample(numbers, KEYS)]
    index = Index()
    figures: Figures = {}

    def timed(name: str, count: int, step: Callable[[], None]) -> None:
        began = time.process_time()
        step()
        figures[name] = ((time.process_time() - began) / count * 1e6, "us")

    def insert() -> None:
        for rev, key in enumerate(keys, 1):
            index.set(key, (b"v", rev, None))
        index.merge()

    def get() -> None:
        for key in others:
            index.get(key)

    def scan() -> None:
        for key in others[:200]:
            index.cells_of(index.slice(key, None, 1_000))

    timed("tree insert", KEYS, insert)
    timed("tree get", KEYS, get)
    timed("tree scan, a row", 200_000, scan)
    return figures


def codec(seed: int) -> Figures:
    """Frames of requests."""
    from kvtcp.protocol.framing import FrameDecoder, FrameEncoder

    messages = [[number, b"put", load.key_of(number), b"v" * 128] for number in range(64)]
    encode, decoder = FrameEncoder().encode, FrameDecoder()
    data = b"".join(map(encode, messages))
    began = time.process_time()
    for _ in range(1_500):
        b"".join(map(encode, messages))
    middle = time.process_time()
    for _ in range(1_500):
        decoder.feed(data)
    ended = time.process_time()
    count = 1_500 * 64
    return {"encode": ((middle - began) / count * 1e6, "us"), "decode": ((ended - middle) / count * 1e6, "us")}


def served(seed: int) -> Figures:
    """One copy in memory and three on disk, under our own client; resident memory."""
    figures: Figures = {}
    for factor, mode in ((1, "memory"), (3, "sync")):
        name = f"RF {factor} {mode}"
        with Cluster(3, factor, mode) as cluster:
            before = sum(map(resident_bytes, cluster.node_pids()))
            load.fill(cluster.url, KEYS)
            grown = sum(map(resident_bytes, cluster.node_pids())) - before
            figures[f"{name}, resident"] = (grown / KEYS / factor, "bytes/key")
            for kind in ("put", "get"):
                figures |= _load(cluster, name, kind, seed)
            if factor == 1:
                figures |= _resp(cluster, name)
    return figures


def _load(cluster: Cluster, name: str, kind: str, seed: int) -> Figures:
    job = Job(url=cluster.url, mix={kind: 1.0}, keys=KEYS, operations=OPERATIONS, connections=50, seed=seed)
    before: dict[str, float] = {}
    outcome = run_load(job, before=lambda: before.update(usage_s(cluster.roles())))
    if outcome.failed:
        raise AssertionError(f"{outcome.failed} calls of {kind} had no result")
    return {
        f"{name}, {kind}": (outcome.rate, "ops/s"), **_cpu(cluster, before, f"{name}, {kind}", OPERATIONS)
    }  # fmt: skip


def _cpu(cluster: Cluster, before: dict[str, float], name: str, operations: int) -> Figures:
    """CPU time per operation by role, of so many since `before`."""
    after = usage_s(cluster.roles())
    return {f"{name}, CPU of {role}": ((after[role] - before[role]) / operations * 1e6, "us") for role in before}


def _resp(cluster: Cluster, name: str) -> Figures:
    from bench.load.resp import redis_benchmark, speaks_resp
    from bench.peers.servers import BENCHMARK, PeerMissing, program

    try:
        program(BENCHMARK)
    except PeerMissing as error:
        print(f"probe: {error}", file=sys.stderr)
        return {}
    if not speaks_resp(cluster.port):
        print("probe: this checkout does not speak RESP", file=sys.stderr)
        return {}
    figures: Figures = {}
    for test in ("set", "get"):
        before = usage_s(cluster.roles())
        redis_benchmark(cluster.port, test, 16, RESP_REQUESTS, 128, KEYS)
        figures |= _cpu(cluster, before, f"{name}, RESP {test}", RESP_REQUESTS)
    return figures


def scan(seed: int) -> Figures:
    """Pages through the coordinator."""
    import uvloop

    async def rows(url: str) -> float:
        async with kvtcp.connect(url, timeout=60.0) as kv:
            began = time.perf_counter()
            found = sum([len(page) async for page in kv.scan_pages()])
            if found != KEYS:
                raise AssertionError(f"the scan returned {found} of {KEYS} rows")
            return found / (time.perf_counter() - began)

    with Cluster(3, 3) as cluster:
        load.fill(cluster.url, KEYS)
        before = usage_s(cluster.roles())
        return {"scan, pages": (uvloop.run(rows(cluster.url)), "rows/s"), **_cpu(cluster, before, "scan, pages", KEYS)}


def restart(seed: int) -> Figures:
    """From the log."""
    from bench.suites.recovery import make_node, node

    with tempfile.TemporaryDirectory(prefix="kvtcp-bench-") as directory:
        make_node(Path(directory) / "n1", KEYS)
        with node(Path(directory) / "n1") as (process, took_s):
            used_us = cpu_s(process.pid) / KEYS * 1e6
        return {"restart from the log": (took_s, "s"), "restart from the log, CPU of nodes": (used_us, "us")}


def best_of(part: Callable[[int], Figures], seed: int) -> Figures:
    """The least of a few: what lies above it is not the code's."""
    repeated = [part(seed + number) for number in range(REPEATED)]
    return {name: (min(each[name][0] for each in repeated), unit) for name, (_, unit) in repeated[0].items()}


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    figures: Figures = {}
    for part in (tree, codec, served, scan, restart):
        try:
            figures |= best_of(part, seed) if part in (tree, codec) else part(seed)
        except (ImportError, AttributeError, TypeError) as error:
            print(f"probe: {part.__name__} cannot be measured in this checkout: {error}", file=sys.stderr)
    print(json.dumps({"package": kvtcp.__file__, "figures": figures}))


if __name__ == "__main__":
    main()
