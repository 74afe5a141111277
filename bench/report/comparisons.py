"""What is compared with what, and how it came out: the sentences of the report about peers.

Pure. `COMPARED` names for each row of ours the rows beside it; every workload that both have is a comparison, as a
factor that is above 1 where kvtcp is better, whatever the unit. Nothing is left out because it came out badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.measure import HIGHER_IS_BETTER, Ratio, Result, ratio

# suite -> (ours, theirs, what to know about it)
COMPARED: dict[str, tuple[tuple[str, str, str], ...]] = {
    "peers": (
        ("kvtcp RF 1 memory", "twemproxy + 3 redis", "a proxy before three servers, as here; nothing is kept"),
        ("kvtcp RF 1 memory", "redis", "one process, no hop; nothing is kept"),
        ("kvtcp RF 3 memory", "redis + 2 asynchronous replicas", "kvtcp answers after all copies, redis before"),
        ("kvtcp RF 1 sync", "redis appendfsync always", "on one disk"),
        ("kvtcp RF 3 sync", "etcd, 3 members", "on three disks"),
        ("kvtcp RF 3 sync", "pysyncobj, 3 nodes with journal", "its journal is never synced"),
        ("kvtcp RF 3 os", "pysyncobj, 3 nodes with journal", "in the page cache on both sides"),
    ),
    "btree": (
        ("kvtcp index", "BTrees.OOBTree", "the index also keeps revision and deadline"),
        ("kvtcp index", "SortedDict", "the index also keeps revision and deadline"),
        ("kvtcp index", "lmdb, no sync", "lmdb is in a file, not synced"),
        ("kvtcp table", "BTrees.OOBTree", "the table also makes the log entry and its chain"),
    ),
    "memory": (("kvtcp RF 1", "redis", ""), ("kvtcp RF 1", "memcached", "")),
    "recovery": (("kvtcp", "redis", ""),),
}


class Comparison(NamedTuple):
    """Above 1: ours is better."""

    suite: str
    ours: str
    theirs: str
    workload: str
    factor: Ratio
    note: str


def better(ours: Result, theirs: Result) -> Ratio:
    """How many times better ours is: of rates ours / theirs, of times and sizes theirs / ours."""
    return ratio(ours, theirs) if ours["unit"] in HIGHER_IS_BETTER else ratio(theirs, ours)


def compare(results: Sequence[Result]) -> list[Comparison]:
    """All comparisons that were measured."""
    rows = {(row.get("suite"), row["target"], row["workload"]): row for row in results}
    found = []
    for suite, pairs in COMPARED.items():
        workloads = dict.fromkeys(row["workload"] for row in results if row.get("suite") == suite)
        for ours, theirs, note in pairs:
            for workload in workloads:
                mine, other = rows.get((suite, ours, workload)), rows.get((suite, theirs, workload))
                if mine is not None and other is not None:
                    found.append(Comparison(suite, ours, theirs, workload, better(mine, other), note))
    return found


def not_better(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Where the peer is as good or better, the worst first."""
    return sorted((each for each in comparisons if each.factor.median <= 1.0), key=lambda each: each.factor.median)


def rows_of(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Header and cells of a table."""
    rows = [["", "times better", "min-max", "mind"]]
    for suite, ours, theirs, workload, factor, note in comparisons:
        name = f"{suite}: {ours}, {workload} / {theirs}"
        rows.append([name, f"{factor.median:.2f}", f"{factor.low:.2f}-{factor.high:.2f}", note])
    return rows
