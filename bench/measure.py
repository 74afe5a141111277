"""What all suites share: rows of figures, their statistics, workloads that take turns, CPU time by role, the machine.

A *row* is a dict: target, workload, unit, and over the runs `median`, `min`, `max`, `runs`; where it applies also
`cpu_us` (CPU time per operation by role), `p50_ms`, `p99_ms`, `p999_ms`, `max_ms` (medians of each run's), `durability`
(the class, see below), `floor` (name and value in the row's unit) and `efficiency` (floor / actual as times, so 1 is
the floor itself and 0.5 takes twice as long).

A *workload* has four phases. `prepare` once, before everything: start and fill. `generate` before each run, off the
clock: what will be asked, from a seed. `execute`, timed. `verify` after each run: raises AssertionError if something
that was answered is wrong. `interleave` runs several of them, each run in a new random order, so that a busy moment of
a shared machine meets all of them. Ratios are of the same run (`ratio`); their median is what is reported.

Durability classes, never in one chart: `memory` (nothing is kept), `memory x3` (answered when all copies have it in
memory), `async x3` (answered before the copies have it), `os` and `os x3` (in the page cache: survives the process),
`sync` (on the disk), `sync x3` (on three disks).
"""

from __future__ import annotations

import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("msgpack", "uvloop", "BTrees", "sortedcontainers", "lmdb", "pysyncobj", "matplotlib")
HIGHER_IS_BETTER = ("ops/s", "keys/s", "rows/s", "k/s", "MB/s", "share")
Result = dict[str, Any]


@dataclass
class Options:
    """What a suite is asked for. `quick`: small and short, an indication."""

    quick: bool = False
    seed: int = 1
    runs: int | None = None
    keys: int | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)  # what was not measured, and why
    failed: list[str] = field(default_factory=list)  # suites, and parts of them, that ended with an error

    def runs_or(self, full: int, quick: int = 1) -> int:
        """How often everything is measured."""
        return self.runs or (quick if self.quick else full)

    def size(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full

    def keys_or(self, full: int, quick: int) -> int:
        """Number of keys."""
        return self.keys or self.size(full, quick)

    def skip(self, target: str, why: str) -> None:
        """Say loudly that something is not measured, and keep it for the report."""
        self.skipped.append({"target": target, "why": why})
        print(f"\n*** NOT MEASURED: {target}: {why}\n", file=sys.stderr, flush=True)


# --- statistics -------------------------------------------------------------------------------------------


def quantile(ascending: Sequence[float], share: float) -> float:
    """The value that `share` of the others are not above; nearest rank."""
    if not ascending:
        raise ValueError("no values")
    return ascending[min(len(ascending) - 1, max(0, math.ceil(len(ascending) * share) - 1))]


class Histogram:
    """Counts of latencies in buckets that are 2 % wide, so that those of several processes can be added."""

    BASE = 1.02
    SMALLEST_MS = 0.001

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: dict[int, int] = dict(counts or {})
        self._log_base = math.log(self.BASE)

    def add(self, ms: float) -> None:
        """Count one."""
        bucket = int(math.log(max(ms, self.SMALLEST_MS) / self.SMALLEST_MS) / self._log_base)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1

    def merge(self, other: Histogram) -> None:
        """Take over the counts of another one."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(self.counts.values())

    def quantile(self, share: float) -> float:
        """Milliseconds, the middle of the bucket. Raises ValueError if nothing was counted."""
        left = max(1, math.ceil(self.total * share))
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return self.SMALLEST_MS * self.BASE ** (bucket + 0.5)
        raise ValueError("no values")

    def figures(self) -> dict[str, float]:
        """As in a row."""
        shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999, "max_ms": 1.0}
        return {name: self.quantile(share) for name, share in shares.items()}


def make_row(target: str, workload: str, unit: str, values: Iterable[float], **more: Any) -> Result:
    """A row over the runs."""
    runs = list(values)
    if not runs:
        raise ValueError(f"{target}, {workload}: no figures")
    return {
        "target": target, "workload": workload, "unit": unit, "median": statistics.median(runs), "min": min(runs),
        "max": max(runs), "runs": runs, **more,
    }  # fmt: skip


def find(results: Iterable[Result], suite: str | None, target: str, workload: str) -> Result | None:
    """The row of this name, None if it was not measured."""
    for row in results:
        if suite in (None, row.get("suite")) and row["workload"] == workload and row["target"] == target:
            return row
    return None


class Ratio(NamedTuple):
    """Median and range of a ratio over the runs."""

    median: float
    low: float
    high: float
    runs: int


def ratio(above: Result, below: Result) -> Ratio:
    """above / below. Run by run if both have as many runs (they took turns); else of the medians, with the widest range
    that their ranges allow."""
    if len(above["runs"]) == len(below["runs"]):
        values = [a / b for a, b in zip(above["runs"], below["runs"], strict=True)]
        return Ratio(statistics.median(values), min(values), max(values), len(values))
    return Ratio(
        above["median"] / below["median"], above["min"] / below["max"], above["max"] / below["min"],
        min(len(above["runs"]), len(below["runs"])),
    )  # fmt: skip


def with_floor(row: Result, name: str, value: float) -> Result:
    """The row with a floor in its unit beside it, and the efficiency: of a rate actual / floor, of a time the other way
    round."""
    higher = row["unit"] in HIGHER_IS_BETTER
    efficiency = row["median"] / value if higher else value / row["median"]
    return {**row, "floor": {"name": name, "value": value}, "efficiency": efficiency}


# --- CPU --------------------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """CPU time of a process, all its threads that live, user and system, seconds; of `os.getpid()` also of those that
    ended. Raises OSError if it is gone."""
    if pid == os.getpid():
        return time.process_time()
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total_ns += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            continue  # a thread that ended meanwhile
    return total_ns / 1e9


def children_cpu_s() -> float:
    """CPU time of the child processes that ended and were waited for, seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def usage_s(roles: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """CPU time so far by role, given the pids of each."""
    return {role: sum(cpu_s(pid) for pid in pids) for role, pids in roles.items()}


def resident_bytes(pid: int) -> int:
    """Memory of a process that is not swapped out."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- runs -------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What one run of a workload gave."""

    value: float  # in the unit of the workload
    cpu_us: dict[str, float] = {}  # per operation, by role
    latency: dict[str, float] = {}  # p50_ms, ...


class Workload(Protocol):
    """See the module's text."""

    target: str
    workload: str
    unit: str
    more: dict[str, Any]  # of the row: durability, ...

    def prepare(self) -> None: ...

    def generate(self, run: int) -> Any: ...

    def execute(self, plan: Any) -> Sample: ...

    def verify(self, plan: Any) -> None: ...


def interleave(
    workloads: Sequence[Workload], runs: int, seed: int, warmups: int = 1,
    on_run: Callable[[Workload, int], None] | None = None,
) -> list[Result]:  # fmt: skip
    """Prepare all, run all in a new random order each time, and make a row of each."""
    for each in workloads:
        each.prepare()
    samples: list[list[Sample]] = [[] for _ in workloads]
    chooser = random.Random(seed)
    for run in range(-warmups, runs):
        for number in chooser.sample(range(len(workloads)), len(workloads)):
            each = workloads[number]
            if on_run is not None:
                on_run(each, run)
            plan = each.generate(run)
            sample = each.execute(plan)
            each.verify(plan)
            if run >= 0:  # the others warm up
                samples[number].append(sample)
    return [row_of(each, rows) for each, rows in zip(workloads, samples, strict=True)]


def row_of(workload: Workload, samples: Sequence[Sample]) -> Result:
    """The row of all runs of a workload."""
    more: dict[str, Any] = dict(workload.more)
    if samples[0].cpu_us:
        more["cpu_us"] = {role: statistics.median(s.cpu_us[role] for s in samples) for role in samples[0].cpu_us}
        more["cpu_runs"] = [sample.cpu_us for sample in samples]
    for name in samples[0].latency:
        more[name] = statistics.median(sample.latency[name] for sample in samples)
    return make_row(workload.target, workload.workload, workload.unit, [s.value for s in samples], **more)


def cpu_rows(results: Iterable[Result], roles: Sequence[str], workload: str) -> list[Result]:
    """Rows of the CPU time of these roles together, made from rows that have them run by run in `cpu_runs`."""
    rows = []
    for row in results:
        if "cpu_runs" in row:
            values = [sum(run[role] for role in roles if role in run) for run in row["cpu_runs"]]
            rows.append(make_row(row["target"], workload, "us/op", values))
    return rows


# --- the machine ------------------------------------------------------------------------------------------


def commit_of(root: Path = ROOT) -> str:
    """The commit of a checkout, with `-dirty` if files were changed, or "unknown"."""
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def compiled_modules(root: Path = ROOT) -> list[str]:
    """Modules of a checkout that run compiled, since their extension stands beside the source."""
    files = (root / "kvtcp").rglob("*.so")
    return sorted({str(file.parent.relative_to(root) / file.name.partition(".")[0]) for file in files})


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cpu = "unknown"
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_of(),
        "compiled": compiled_modules(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of the last minute before: what else the machine had to do
        "packages": versions,
    }
