"""The charts of the report, as SVG files: made from rows, the same bytes for the same rows.

    ratios.svg                      each target that is a ratio, with min-max, its goal and its stretch goal
    throughput-CLASS.svg            ops/s against p99 at depth 1, 16, 64; a file for each class of durability
    cpu-CLASS.svg                   CPU time per operation by role at depth 16; a file for each class
    failover.svg                    answers around an event, of all events the fewest
    ycsb.svg                        p99 in open loops at shares of the capacity

Classes of durability are never in one chart: who keeps nothing is no competition for who syncs three disks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.measure import Result
from bench.report.targets import Verdict

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "kvtcp"
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["font.size"] = 9

from matplotlib import pyplot  # noqa: E402 - the backend comes first

TITLES = {
    "memory": "nothing is kept", "memory x3": "in memory of all three before it is answered",
    "async x3": "answered before the copies have it", "sync": "on one disk before it is answered",
    "os x3": "three copies in the page cache", "sync x3": "on three disks before it is answered",
}  # fmt: skip
VERDICT_COLORS = {"stretch": "#1a7f37", "met": "#4c9be8", "missed": "#cf5c36"}


def save(figure: Any, file: Path) -> Path:
    """Write and forget a figure."""
    figure.tight_layout()
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return file


def ratios(verdicts: Sequence[Verdict], directory: Path) -> Path | None:
    """Bars on a logarithmic axis."""
    shown = [each for each in verdicts if each.measured is not None and not each.target.unit][::-1]
    if not shown:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 0.34 * len(shown) + 1.2))
    for place, (target, measured, text) in enumerate(shown):
        axes.barh(place, measured.median, color=VERDICT_COLORS[text], height=0.6)
        axes.plot([measured.low, measured.high], [place, place], color="black", linewidth=1)
        axes.plot([target.goal], [place], marker="|", color="black", markersize=12)
        axes.plot([target.stretch], [place], marker="|", color="gray", markersize=12)
    axes.set_yticks(range(len(shown)))
    axes.set_yticklabels([
        target.name + ("" if target.is_higher_better else " (less is better)") for target, _, _ in shown
    ])  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("ratio, median with min-max; black mark: goal, gray: stretch goal; red: missed")
    return save(figure, directory / "ratios.svg")


def _of_class(results: Sequence[Result], name: str) -> list[Result]:
    return [row for row in results if row.get("suite") == "peers" and row.get("durability") == name]


def throughput(results: Sequence[Result], name: str, directory: Path) -> Path | None:
    """A line per system through its depths; SET on the left, GET on the right."""
    rows = [row for row in _of_class(results, name) if row.get("generator") == "redis-benchmark" and "p99_ms" in row]
    tests = [test for test in ("SET", "GET") if sum(row["workload"].startswith(test) for row in rows) > 1]
    if not tests:
        return None
    figure, all_axes = pyplot.subplots(1, len(tests), figsize=(4.6 * len(tests), 3.6), squeeze=False)
    for axes, test in zip(all_axes[0], tests, strict=True):
        for target in dict.fromkeys(row["target"] for row in rows):
            points = sorted(
                (row["depth"], row["median"] / 1000, row["p99_ms"])
                for row in rows
                if row["target"] == target and row["workload"].startswith(test)
            )
            if points:
                axes.plot([x for _, x, _ in points], [y for _, _, y in points], marker="o", label=target)
        axes.set_xlabel(f"{test}, thousand operations a second")
        axes.set_ylabel("p99, ms")
        axes.set_yscale("log")
        axes.legend(fontsize=7)
    figure.suptitle(f"50 connections, depth 1, 16, 64: {TITLES[name]}")
    return save(figure, directory / f"throughput-{name.replace(' ', '-')}.svg")


def cpu(results: Sequence[Result], name: str, directory: Path) -> Path | None:
    """Stacked bars: who spends how much for an operation."""
    rows = [row for row in _of_class(results, name) if "cpu_us" in row and re.search(r"depth 16$|KiB", row["workload"])]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(rows) + 1.2))
    labels = [f"{row['target']}, {row['workload']}" for row in rows]
    lefts = [0.0] * len(rows)
    for role in dict.fromkeys(role for row in rows for role in row["cpu_us"] if role != "client"):
        widths = [row["cpu_us"].get(role, 0.0) for row in rows]
        axes.barh(labels, widths, left=lefts, label=role, height=0.6)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of the servers, us per operation")
    axes.set_title(TITLES[name])
    axes.legend(fontsize=8)
    return save(figure, directory / f"cpu-{name.replace(' ', '-')}.svg")


def failover(results: Sequence[Result], directory: Path) -> Path | None:
    """A panel for each event."""
    rows = [row for row in results if "timeline" in row]
    if not rows:
        return None
    figure, all_axes = pyplot.subplots(len(rows), 1, figsize=(8, 1.5 * len(rows) + 0.5), sharex=True, squeeze=False)
    for axes, row in zip(all_axes[:, 0], rows, strict=True):
        line = row["timeline"]
        times = [line["begin_s"] + number * line["bin_s"] for number in range(len(line["answers"]))]
        axes.fill_between(times, [count / line["bin_s"] for count in line["answers"]], step="post", alpha=0.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(row["target"], fontsize=9, loc="left")
        axes.set_ylabel("answers / s")
    all_axes[-1, 0].set_xlabel("seconds since the event; the fewest answers of all events at each time")
    return save(figure, directory / "failover.svg")


def ycsb(results: Sequence[Result], directory: Path) -> Path | None:
    """A line for each workload."""
    rows = [row for row in results if row.get("suite") == "ycsb" and "rate" in row]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for target in dict.fromkeys(row["target"] for row in rows):
        points = sorted((row["rate"] / 1000, row["median"]) for row in rows if row["target"] == target)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=target)
    axes.set_xlabel("thousand operations a second (open loop at 50, 70, 85 % of the capacity)")
    axes.set_ylabel("p99 from the intended send, ms")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return save(figure, directory / "ycsb.svg")


def draw_all(results: Sequence[Result], verdicts: Sequence[Verdict], directory: Path) -> list[Path]:
    """All charts for which there are rows."""
    directory.mkdir(parents=True, exist_ok=True)
    made: list[Path | None] = [ratios(verdicts, directory)]
    by_class: tuple[Callable[[Sequence[Result], str, Path], Path | None], ...] = (throughput, cpu)
    made += [draw(results, name, directory) for draw in by_class for name in TITLES]
    made += [failover(results, directory), ycsb(results, directory)]
    return [file for file in made if file is not None]
