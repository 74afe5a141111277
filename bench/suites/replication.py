"""The `replication` suite: what copies and durability cost, 1 to 3 copies in each mode, by redis-benchmark.

All nine clusters (three nodes each) are up together and take turns in random order; 50 connections, depth 1 and 16. CPU
time per operation is by role: one coordinator, all nodes together. The floor is the uvloop echo at the same depth.
"""

from __future__ import annotations

from bench.measure import Options, Result
from bench.peers.servers import KvtcpResp
from bench.suites.peers import Group

TITLE = "Replication: copies and durability, three nodes, redis-benchmark"
FACTORS = (1, 2, 3)
MODES = ("memory", "os", "sync")
DEPTHS = (1, 16)


def measure(options: Options) -> list[Result]:
    """All copies in all modes; quick: the cheapest and the dearest."""
    kinds = [(factor, mode) for factor in FACTORS for mode in MODES]
    if options.quick:
        kinds = [(1, "memory"), (3, "sync")]
    with Group(options) as group:
        for factor, mode in kinds:
            group.resp(f"kvtcp RF {factor} {mode}", lambda factor=factor, mode=mode: KvtcpResp(factor, mode), DEPTHS)
        group.echo(DEPTHS)
        return group.run(options.runs_or(5))
