"""The `scale` suite: what an operation costs with more keys, more nodes, more shards.

    keys      10^4 to 10^7 (quick: 10^5), one copy, three nodes: CPU time of all servers per operation
    nodes     1 to 8 with as many copies as there are nodes, at most 3: CPU time of the coordinator per operation
    shards    16 to 1,024 with three nodes and three copies: CPU time of all servers per operation

Mode `memory`, redis-benchmark with 50 connections and depth 16 on all of the keys; the clusters of a series are up
together and take turns. CPU time says more here than the rate: on a machine with fewer cores than processes the rate
only tells how these share them. "SET and GET" is the mean of the two in each run.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.load import clients
from bench.load.resp import VALUE_BYTES, RespWorkload
from bench.measure import Options, Result, cpu_rows, interleave, make_row
from bench.peers.servers import KvtcpResp
from bench.suites.peers import Group

TITLE = "Scale: CPU time per operation with more keys, nodes, shards"
KEYS = ((10_000, 100_000, 1_000_000, 10_000_000), (10_000, 100_000))
NODES = ((1, 2, 3, 5, 8), (3, 8))
SHARDS = ((16, 64, 256, 1_024), (16, 256))
SERIES_KEYS = 100_000
REQUESTS = (150_000, 20_000)
DEPTH = 16
BOTH = "SET and GET, CPU"


class Filled(RespWorkload):
    """As its parent, on keys that are there already."""

    def prepare(self) -> None:
        """The cluster was filled when it was started."""


def both(rows: list[Result], roles: tuple[str, ...]) -> list[Result]:
    """Rows of CPU time per operation, the mean of SET and GET of a target, run by run."""
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        pair = [cpu_rows([row], roles, BOTH)[0]["runs"] for row in rows if row["target"] == target]
        means = [sum(values) / len(values) for values in zip(*pair, strict=True)]
        found.append(make_row(target, BOTH, "us/op", means))
    return found


def series(
    options: Options, roles: tuple[str, ...], targets: dict[str, tuple[Callable[[], KvtcpResp], int]]
) -> list[Result]:
    """Clusters by name, each with its number of keys: their rates and CPU times."""
    with Group(options) as group:
        workloads = []
        for name, (make, keys) in targets.items():
            cluster = group.start(name, make)
            if cluster is None:
                continue
            clients.fill(cluster.cluster.url, keys, VALUE_BYTES)
            workloads += [
                Filled(name, cluster.port, cluster.roles, test, DEPTH, options.size(*REQUESTS), cluster.durability,
                       keys=keys)
                for test in ("set", "get")
            ]  # fmt: skip
        rows = interleave(workloads, options.runs_or(5), options.seed) if workloads else []
        return rows + both(rows, roles)


def measure(options: Options) -> list[Result]:
    """The three series."""
    size = 1 if options.quick else 0
    servers = ("coordinator", "nodes")
    by_keys = {f"{n:,} keys": ((lambda: KvtcpResp(1, "memory")), n) for n in KEYS[size]}
    by_nodes = {f"{n} nodes": ((lambda n=n: KvtcpResp(min(n, 3), "memory", n)), SERIES_KEYS) for n in NODES[size]}
    by_shards = {f"{n} shards": ((lambda n=n: KvtcpResp(3, "memory", 3, n)), SERIES_KEYS) for n in SHARDS[size]}
    return (
        series(options, servers, by_keys) + series(options, ("coordinator",), by_nodes)
        + series(options, servers, by_shards)
    )  # fmt: skip
