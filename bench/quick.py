"""Six figures in two minutes: what `make bench` prints. An indication: one run of small sizes, no verdicts.

tree, get / BTrees.OOBTree                          100,000 keys
SET and GET depth 16 / redis                        RF 1 memory, redis-benchmark (without redis: ops/s)
SET depth 16, RF 3 sync                             ops/s
scan through the coordinator / pages from memory    20,000 keys
restart from the log                                100,000 keys, s
longest stall of a writer when a node is killed     ms
"""

from __future__ import annotations

from typing import Any

from bench.measure import Options, Result, find, interleave, ratio
from bench.peers.servers import BENCHMARK, KvtcpResp, PeerMissing, Redis, program
from bench.report.tables import number
from bench.suites import btree
from bench.suites import recovery as recovery_suite
from bench.suites import scan as scan_suite
from bench.suites.peers import Group

KEYS = 100_000
Figure = tuple[str, str]


def ratio_text(results: list[Result], above: tuple[str, str], below: tuple[str, str]) -> str:
    """Median of a ratio of two rows, "not measured" if one is missing."""
    rows = [find(results, None, *name) for name in (above, below)]
    if rows[0] is None or rows[1] is None:
        return "not measured"
    return f"{ratio(rows[0], rows[1]).median:.2f}"


def _served(options: Options) -> tuple[list[Figure], list[Result]]:
    """The two figures of redis-benchmark."""
    names = ["SET / GET depth 16, RF 1 memory / redis", "SET depth 16, RF 3 sync, ops/s"]
    try:
        program(BENCHMARK)
    except PeerMissing as error:
        options.skip("redis-benchmark", str(error))
        return [(name, "not measured") for name in names], []
    with Group(options) as group:
        group.resp("kvtcp RF 1 memory", lambda: KvtcpResp(1, "memory"), (16,))
        group.resp("kvtcp RF 3 sync", lambda: KvtcpResp(3, "sync"), (16,), ("set",))
        group.resp(Redis.name, Redis, (16,))
        rows = interleave(group.workloads, 3, options.seed)
    ratios = [
        ratio_text(rows, ("kvtcp RF 1 memory", f"{test} depth 16"), ("redis", f"{test} depth 16"))
        for test in ("SET", "GET")
    ]
    sync = find(rows, None, "kvtcp RF 3 sync", "SET depth 16")
    return list(zip(names, [" / ".join(ratios), number(sync["median"]) if sync else "not measured"], strict=True)), rows


def _failover(options: Options) -> tuple[Figure, list[Result]]:
    """One kill of a node."""
    import uvloop

    import kvtcp
    from bench.load.cluster import Cluster
    from bench.suites.failover import Suite

    async def kill(cluster: Cluster) -> list[Result]:
        async with kvtcp.connect(cluster.url) as kv:
            suite = Suite(cluster, kv, options.seed)
            return await suite.target("kill -9 of a node", suite.kill_node, 2)

    with Cluster(3, 3, "sync") as cluster:
        rows: list[Result] = uvloop.run(kill(cluster))
    return ("longest stall of a writer when a node is killed, ms", number(rows[0]["max"])), rows


def six_figures(options: Options) -> tuple[list[Figure], list[Result]]:
    """Name and text of each, and the rows behind them."""
    everything: list[Result] = []

    def keep(suite: str, rows: list[Result]) -> list[Result]:
        everything.extend({"suite": suite, **row} for row in rows)
        return rows

    tree = keep("btree", btree.run(KEYS, options.seed, 1))
    figures = [("tree, get / BTrees.OOBTree", ratio_text(tree, ("kvtcp table", "get"), ("BTrees.OOBTree", "get")))]
    served, rows = _served(options)
    keep("peers", rows)
    figures += served
    scan = keep("scan", scan_suite.measure(options))
    floor: tuple[str, str] = ("client", scan_suite.FLOOR)
    figures.append(("scan, pages / from memory", ratio_text(scan, ("kvtcp RF 3", "pages"), floor)))
    recovery: list[Any] = keep("recovery", recovery_suite.measure(Options(True, options.seed, 1, KEYS)))
    restart = find(recovery, None, "kvtcp", "restart from log")
    took = number(restart["median"]) if restart else "not measured"
    figures.append((f"restart from the log, {KEYS:,} keys, s", took))
    stall, rows = _failover(options)
    keep("failover", rows)
    return [*figures, stall], everything
