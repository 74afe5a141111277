#!/usr/bin/env python3
"""The benchmark suite: how fast the ordered index is, a running cluster with its client, what durability costs, how
long clients wait when something dies, and how soon a node that was away is up to date.

    bench/run_bench.py [btree] [network] [durability] [failover] [catchup]
                       [--quick] [--json FILE] [--seed N] [--runs N] [--keys N]

Figures are medians over the runs with their minimum and maximum. Machines differ and are shared: compare the columns
of one run, not two runs. The ratios below a table are those of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SUITES = ("btree", "network", "durability", "failover", "catchup")
Result = dict[str, Any]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for package in ("msgpack", "uvloop", "BTrees", "sortedcontainers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cpu = "unknown"
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of the last minute before: what else the machine had to do
        "packages": versions,
    }


def number(value: float) -> str:
    """A figure in as many digits as mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(len(header))]
    lines = []
    for row in [header, *rows]:
        lines.append(
            "  ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        )
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def show_matrix(results: list[Result], column: str) -> str:
    """One line per workload, one column per structure or target: median (min-max)."""
    names = sorted({result[column] for result in results}, key=lambda name: (not name.startswith("kvtcp"), name))
    rows = []
    for workload, unit in dict.fromkeys((result["workload"], result["unit"]) for result in results):
        cells = [f"{workload}, {unit}"]
        for name in names:
            found = [r for r in results if (r["workload"], r["unit"], r[column]) == (workload, unit, name)]
            cells.append(
                f"{number(found[0]['median'])} ({number(found[0]['min'])}-{number(found[0]['max'])})" if found else "-"
            )
        rows.append(cells)
    return table(["", *names], rows)


def median_of(results: list[Result], column: str, name: str, workload: str) -> float | None:
    """The median of one cell, None if it was not measured."""
    return next((r["median"] for r in results if r[column] == name and r["workload"] == workload), None)


def ratios(results: list[Result], column: str, wanted: list[tuple[str, str, str, str]]) -> str:
    """Lines `what: ratio` for (workload, name, other workload, other name)."""
    lines = []
    for workload, name, other_workload, other in wanted:
        mine = median_of(results, column, name, workload)
        theirs = median_of(results, column, other, other_workload)
        if mine and theirs:
            lines.append(f"{workload}: {name} / {other} = {mine / theirs:.2f}")
    return "\n".join(lines)


def run_btree(options: argparse.Namespace) -> tuple[list[Result], str]:
    """The btree suite and its report."""
    from bench import btree_suite

    keys = options.keys or (100_000 if options.quick else 1_000_000)
    results = btree_suite.run(keys, options.seed, options.runs or (1 if options.quick else 3))
    wanted = [
        ("get", "kvtcp table", "get", "BTrees.OOBTree"),
        ("get", "kvtcp table", "get", "SortedDict"),
        ("get same", "kvtcp table", "get same", "BTrees.OOBTree"),
        ("get same", "kvtcp table", "get same", "SortedDict"),
        ("insert", "kvtcp index", "insert", "BTrees.OOBTree"),
        ("mixed", "kvtcp index", "mixed", "BTrees.OOBTree"),
        ("scan", "kvtcp index", "scan", "BTrees.OOBTree"),
        ("delete", "kvtcp index", "delete", "BTrees.OOBTree"),
    ]
    report = f"B-tree, {keys:,} keys of 17 bytes\n\n{show_matrix(results, 'structure')}\n\n"
    return results, report + ratios(results, "structure", wanted)


def run_network(options: argparse.Namespace) -> tuple[list[Result], str]:
    """The network suite and its report."""
    from bench import network_suite

    keys = min(options.keys or 100_000, 1_000_000)
    operations = 20_000 if options.quick else 60_000
    results = network_suite.run(operations, keys, options.runs or (1 if options.quick else 5), options.seed)
    report = (
        f"Network, 3 nodes, 16-byte keys, 128-byte values, one client process\n\n{show_matrix(results, 'target')}\n\n"
    )
    rows = [
        [
            f"{result['target']}, {result['workload']}",
            *(f"{result['cpu_us'].get(role, 0):.1f}" for role in ("coordinator", "nodes", "client")),
        ]
        for result in results
    ]
    report += "CPU time, us per operation\n\n" + table(["", "coordinator", "nodes", "client"], rows) + "\n\n"
    wanted = [(f"get depth {depth}", "kvtcp RF 1", f"get depth {depth}", "echo peer") for depth in (1, 16, 64)]
    return results, report + ratios(results, "target", wanted)


def run_durability(options: argparse.Namespace) -> tuple[list[Result], str]:
    """The durability suite and its report."""
    from bench import durability_suite

    runs = options.runs or (1 if options.quick else 5)
    if options.quick:
        results = durability_suite.run(16_000, 50_000, 200_000, 3.0, runs, options.seed)
    else:
        results = durability_suite.run(runs=runs, recovery_keys=options.keys or 1_000_000, seed=options.seed)
    rows = [
        [
            f"{result['target']}: {result['workload']}, {result['unit']}",
            f"{number(result['median'])} ({number(result['min'])}-{number(result['max'])})",
            *(f"{result['cpu_us'][role]:.1f}" if "cpu_us" in result else "" for role in ("coordinator", "nodes")),
        ]
        for result in results
    ]
    report = "Durability: modes never share a cluster; puts of 128 bytes\n\n"
    return results, report + table(["", "median (min-max)", "CPU-us coordinator", "CPU-us nodes"], rows)


def show_list(results: list[Result]) -> str:
    """One line per figure."""
    rows = [
        [
            f"{result['target']}: {result['workload']}, {result['unit']}",
            number(result["median"]), number(result["min"]), number(result["max"]),
        ]
        for result in results
    ]  # fmt: skip
    return table(["", "median", "min", "max"], rows)


def run_failover(options: argparse.Namespace) -> tuple[list[Result], str]:
    """The failover suite and its report."""
    from bench import failover_suite

    events = options.runs or (3 if options.quick else 20)
    results = failover_suite.run(events, options.seed)
    report = f"Failover, 3 nodes, RF 3, sync, {events} events each; no acknowledged write was lost or doubled\n\n"
    return results, report + show_list(results)


def run_catchup(options: argparse.Namespace) -> tuple[list[Result], str]:
    """The catch-up suite and its report."""
    from bench import catchup_suite

    keys = options.keys or (50_000 if options.quick else 1_000_000)
    missed = 10_000 if options.quick else 100_000
    results = catchup_suite.run(keys, missed, options.runs or (1 if options.quick else 3), options.seed)
    report = f"Catch-up, 3 nodes, RF 3, sync, {keys:,} keys of 16 bytes with 64, {missed:,} writes missed\n\n"
    return results, report + show_list(results)


def main() -> int:
    """Run the chosen suites, print their tables, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{' '.join(SUITES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small and short: an indication, no measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure with versions and machine")
    parser.add_argument("--seed", type=int, default=1, help="of keys and order (default: %(default)s)")
    parser.add_argument(
        "--runs",
        type=int,
        help="how often everything is measured (default: btree and catchup 3, failover 20, others 5)",
    )
    parser.add_argument(
        "--keys", type=int, help="of btree, restarts and catchup (default: 1,000,000) or network (100,000)"
    )
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"unknown suite {sorted(unknown)[0]!r}; there are {', '.join(SUITES)}")
    about = machine()
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    cores = f"{about['cores']} cores, load {about['load']:.1f}"
    print(f"kvtcp {about['commit']}, Python {about['python']}, {about['cpu']}, {cores}, {packages}")
    if options.quick:
        print("quick: an indication only")
    runners = {
        "btree": run_btree, "network": run_network, "durability": run_durability, "failover": run_failover,
        "catchup": run_catchup,
    }  # fmt: skip
    everything: list[Result] = []
    for suite in SUITES:
        if options.suites and suite not in options.suites:
            continue
        results, report = runners[suite](options)
        everything += [{"suite": suite, **result} for result in results]
        print(f"\n{report}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": about, "seed": options.seed, "results": everything}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
