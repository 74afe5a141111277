"""The targets: what is measured, what must be reached, what would be splendid; and verdicts on measured rows.

Pure. One table, `TARGETS`. A target is a ratio of two rows of one run (see `bench.measure`: median over the runs,
interleaved, at least five of them), or an absolute figure where `below` is None. `is_higher_better` tells which way is
good. Values are 64 bytes unless said; "depth" is redis-benchmark's pipeline with 50 connections.

Where the two sides do not give the same durability it stands in `how`; kvtcp then gives more than the peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.measure import Ratio, Result, find, ratio

RUNS_MIN = 5


class Cell(NamedTuple):
    """The name of a row."""

    suite: str
    target: str
    workload: str


@dataclass(frozen=True)
class Target:
    """One line of the table."""

    name: str
    above: Cell
    below: Cell | None
    goal: float
    stretch: float
    how: str
    is_higher_better: bool = True
    unit: str = ""  # of an absolute figure


class Verdict(NamedTuple):
    """A target with what was measured. `text`: "stretch", "met", "missed", or "not measured"."""

    target: Target
    measured: Ratio | None
    text: str


_BENCHMARK = "redis-benchmark -c 50 -d 64 -r 100000 -P depth, kvtcp on its main port"
_RF1, _RF3 = "kvtcp RF 1 memory", "kvtcp RF 3 memory"
_TWEMPROXY, _REDIS, _ASYNC = "twemproxy + 3 redis", "redis", "redis + 2 asynchronous replicas"
_ETCD = "put 1 KiB, 1,000 outstanding"


def _peer(name: str, above: str, below: str, workload: str, goal: float, stretch: float, how: str) -> Target:
    return Target(name, Cell("peers", above, workload), Cell("peers", below, workload), goal, stretch, how)


def _served(depth: int, test: str, goal: float, stretch: float, below: str = _TWEMPROXY) -> Target:
    name = f"RF 1 memory, {test} depth {depth} / {below}"
    how = f"{_BENCHMARK}; {'nutcracker before 3 redis-servers' if below == _TWEMPROXY else 'one redis-server'}"
    return _peer(name, _RF1, below, f"{test} depth {depth}", goal, stretch, how)


def _tree(workload: str, goal: float, stretch: float, structure: str = "kvtcp index") -> Target:
    return Target(
        f"tree, {workload} / BTrees.OOBTree", Cell("btree", structure, workload),
        Cell("btree", "BTrees.OOBTree", workload), goal, stretch,
        f"1 M keys of 17 bytes; {structure}, which also keeps revision and deadline",
    )  # fmt: skip


TARGETS: tuple[Target, ...] = (
    _served(16, "SET", 1.0, 2.0),
    _served(16, "GET", 1.25, 2.0),
    _served(64, "SET", 1.3, 2.5),
    _served(64, "GET", 1.5, 2.5),
    _served(1, "SET", 0.72, 1.1),
    _served(1, "GET", 0.72, 1.1),
    _served(16, "SET", 0.43, 1.0, _REDIS),
    _served(16, "GET", 0.48, 1.0, _REDIS),
    _peer(f"RF 3 memory, SET depth 16 / {_ASYNC}", _RF3, _ASYNC, "SET depth 16", 0.52, 1.0,
          f"{_BENCHMARK}; kvtcp answers after all three copies, redis before its replicas have it"),
    _peer("RF 3 sync, 1 KiB / etcd, 3 members", "kvtcp RF 3 sync", "etcd, 3 members", _ETCD, 10, 25,
          "redis-benchmark -c 50 -P 20 -d 1024 / etcdctl check perf --load xl: both 1,000 outstanding, 3 disks"),
    _peer("RF 1 sync, SET depth 16 / redis appendfsync always", "kvtcp RF 1 sync", "redis appendfsync always",
          "SET depth 16", 0.42, 1.0, _BENCHMARK),
    _peer("RF 3 sync, SET depth 16 / pysyncobj, 3 nodes with journal", "kvtcp RF 3 sync",
          "pysyncobj, 3 nodes with journal", "SET depth 16", 8, 20,
          "800 outstanding; pysyncobj's leader makes the load itself, and its journal is never synced"),
    _tree("get", 3, 4, "kvtcp table"),
    _tree("insert", 1.2, 1.5),
    _tree("scan", 1.0, 2.0),
    _tree("mixed", 1.0, 2.0),
    Target("scan through the coordinator, RF 3 / the same pages from memory", Cell("scan", "kvtcp RF 3", "pages"),
           Cell("scan", "client", "decoding the same pages from memory"), 0.3, 0.7,
           "page iterator of our client, pages of 1,000, values of 128 bytes"),
    Target("resident bytes per key and copy / redis", Cell("memory", "kvtcp RF 1", "memory"),
           Cell("memory", "redis", "memory"), 2.0, 1.3, "1 M keys of 16 bytes with 128; growth of the nodes", False),
    Target("restart from snapshots, 1 M keys", Cell("recovery", "kvtcp", "restart from snapshots"), None, 4.0, 2.0,
           "one node, keys of 16 bytes with 128; start of the process to its ready line", False, "s"),
    Target("restart from the log, 1 M keys", Cell("recovery", "kvtcp", "restart from log"), None, 10.0, 6.0,
           "one node, keys of 16 bytes with 128; start of the process to its ready line", False, "s"),
    Target("CPU per operation, 10^7 / 10^4 keys", Cell("scale", "10,000,000 keys", "SET and GET, CPU"),
           Cell("scale", "10,000 keys", "SET and GET, CPU"), 1.5, 1.2,
           "coordinator and nodes, RF 1 memory, depth 16, mean of SET and GET", False),
    Target("CPU of the coordinator, 8 / 3 nodes", Cell("scale", "8 nodes", "SET and GET, CPU"),
           Cell("scale", "3 nodes", "SET and GET, CPU"), 1.2, 1.05, "RF 3 memory, depth 16, mean of SET and GET",
           False),
    Target("p99 while snapshots run / without", Cell("durability", "snapshots", "open loop put p99"),
           Cell("durability", "no snapshots", "open loop put p99"), 2.0, 1.2,
           "RF 3 sync, open loop at half of the capacity, timed from the intended send", False),
)  # fmt: skip


def judge(target: Target, results: Sequence[Result]) -> Verdict:
    """What these rows say about a target."""
    above = find(results, *target.above)
    below = find(results, *target.below) if target.below is not None else None
    if above is None or (target.below is not None and below is None):
        return Verdict(target, None, "not measured")
    if below is None:
        measured = Ratio(above["median"], above["min"], above["max"], len(above["runs"]))
    else:
        measured = ratio(above, below)
    return Verdict(target, measured, _word(target, measured.median))


def _word(target: Target, value: float) -> str:
    sign = 1 if target.is_higher_better else -1
    if sign * value >= sign * target.stretch:
        return "stretch"
    return "met" if sign * value >= sign * target.goal else "missed"


def judge_all(results: Sequence[Result]) -> list[Verdict]:
    """All targets in the order of the table."""
    return [judge(target, results) for target in TARGETS]


def rows_of(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Header and cells of the table."""
    rows = [["target", "goal", "stretch", "measured", "min-max", "runs", "verdict"]]
    for target, measured, text in verdicts:
        unit = f" {target.unit}" if target.unit else ""
        sign = "" if target.is_higher_better else "<= "
        cells = [target.name, f"{sign}{target.goal:g}{unit}", f"{sign}{target.stretch:g}{unit}"]
        if measured is None:
            rows.append([*cells, "-", "-", "-", text])
            continue
        few = " (few)" if measured.runs < RUNS_MIN else ""
        rows.append([
            *cells, f"{measured.median:.2f}{unit}", f"{measured.low:.2f}-{measured.high:.2f}",
            f"{measured.runs}{few}", text,
        ])  # fmt: skip
    return rows
