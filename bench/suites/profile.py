"""The `profile` suite: where each microsecond goes, by role.

A cluster whose coordinator and nodes run under the sampling profiler (see `bench.profiling`) is filled, then
redis-benchmark runs one test; CPU time per operation of each role, measured without regard to the samples, is divided
among the modules in proportion to them. A row has `modules` and `functions`, both name -> us per operation.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.load import clients
from bench.load.cluster import Cluster
from bench.load.resp import KEYS, VALUE_BYTES, redis_benchmark, speaks_resp
from bench.measure import Options, Result, make_row, usage_s
from bench.peers.servers import BENCHMARK, PeerMissing, program

TITLE = "Profile: where each microsecond goes, us per operation"
KINDS = ((1, "memory", "set"), (1, "memory", "get"), (3, "sync", "set"))
DEPTH = 16
REQUESTS = (400_000, 30_000)
FUNCTIONS = 15


def shares(functions: dict[str, int], total_us: float) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds per module and per function, the longest first, given the samples and the time of all."""
    samples = sum(functions.values())
    modules: Counter[str] = Counter()
    for name, count in functions.items():
        modules[name.partition(":")[0]] += count
    return (
        {name: count / samples * total_us for name, count in modules.most_common()},
        {name: count / samples * total_us for name, count in Counter(functions).most_common(FUNCTIONS)},
    )


def _profile(factor: int, mode: str, test: str, requests: int) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="kvtcp-bench-") as name:
        directory = Path(name)
        with Cluster(3, factor, mode, own_nodes=True, profile_into=directory) as cluster:
            if not speaks_resp(cluster.port):
                raise PeerMissing("this version of the coordinator does not speak RESP")
            clients.fill(cluster.url, KEYS, VALUE_BYTES)
            redis_benchmark(cluster.port, test, DEPTH, requests // 10)
            for pids in cluster.roles().values():
                for pid in pids:
                    os.kill(pid, signal.SIGUSR2)
            before = usage_s(cluster.roles())
            redis_benchmark(cluster.port, test, DEPTH, requests)
            after = usage_s(cluster.roles())
            roles = {role: (after[role] - before[role]) / requests * 1e6 for role in before}
        rows = []
        for role, total_us in roles.items():
            functions: Counter[str] = Counter()
            for file in directory.glob("coordinator.json" if role == "coordinator" else "n*.json"):
                functions.update(json.loads(file.read_text())["functions"])
            more: dict[str, Any] = dict(zip(("modules", "functions"), shares(functions, total_us), strict=True))
            target = f"RF {factor} {mode}, {test.upper()} depth {DEPTH}"
            rows.append(make_row(target, role, "us/op", [total_us], **more))
        return rows


def measure(options: Options) -> list[Result]:
    """One profile of each kind."""
    rows: list[Result] = []
    for factor, mode, test in KINDS[: options.size(len(KINDS), 1)]:
        try:
            program(BENCHMARK)
            rows += _profile(factor, mode, test, options.size(*REQUESTS))
        except PeerMissing as error:
            options.skip(f"profile of RF {factor} {mode}, {test}", str(error))
    return rows
