#!/usr/bin/env python3
"""The report: `bench/report/page.py [FILE] [--into docs/performance.md]` makes docs/performance.md and its charts in
docs/figures/ from the figures of a run, by default the newest full one in bench/results/.

Everything in the page comes from that file, from the tables in the code (`bench.report.targets`,
`bench.report.comparisons`) and from bench/tried.md, so a new measurement needs no editing. Without matplotlib the page
is made without charts, and says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from bench.measure import Result  # noqa: E402
from bench.report import comparisons, tables, targets  # noqa: E402

HEAD = """\
# Performance

How fast kvtcp is beside other stores on the same cores, what it costs, and where the time goes. This page is made by
`bench/report/page.py`; nothing in it is written by hand but "What was tried", which is `bench/tried.md`.

| to repeat it | |
|---|---|
| `make bench` | six figures in two minutes, an indication |
| `make bench-full` | everything, at most an hour, with verdicts; then this page from its figures |
| `make bench-check BASE=COMMIT` | what became slower by more than 10 % since a commit |
| `bench/run_bench.py SUITE...` | one suite |
"""
METHOD = """\
## How it is measured

Systems that are compared are up together and take turns in a new random order in each run, on the same cores, under the
same generator: redis-benchmark with the same options for everything that speaks RESP. Figures are medians over the
runs with minimum and maximum; ratios are of the same run. Every workload prepares, generates what it will ask off the
clock, executes, and verifies: marked keys must be overwritten, values must belong to their keys, keys are counted. Open
loops are timed from the intended send. CPU time is that of all threads of a process. *Efficiency* is floor / actual as
times: 1 would be the floor itself, which is what the machine and CPython need by themselves for the least that must be
done. Systems with different promises are never in one chart.
"""
PROFILE = """\
## Where each microsecond goes

CPU time per operation by a sampling profiler; what runs in C, and what the event loop does before it calls, counts for
the Python function beside it.
"""
EMPTY = """\
No full run is kept in `bench/results/` for this version yet: `make bench-full` makes one, and this page from it.
"""


def machine_text(about: dict[str, Any], took_s: dict[str, float], commits: dict[str, str]) -> str:
    """What it was measured on."""
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items() if number != "not installed")
    programs = ", ".join(f"{name} {number}" for name, number in about.get("programs", {}).items())
    compiled = about.get("compiled", [])
    how = f"{len(compiled)} modules compiled by mypyc" if compiled else "plain Python, nothing compiled"
    return (
        f"Measured {about['time'][:10]} at commit `{about['commit']}` ({how}): {about['cpu']}, {about['cores']} cores, "
        f"kernel {about['kernel']}, Python {about['python']}, {packages}; {programs}. Servers, peers and load "
        f"generator share these cores. The run took {sum(took_s.values()) / 60:.0f} minutes.\n"
        + "".join(
            f"\nThe suite {name} was measured again, at commit `{commit}`.\n"
            for name, commit in commits.items()
            if commit != about["commit"]
        )
    )


def section_targets(verdicts: Sequence[targets.Verdict]) -> str:
    """The table and how each is measured."""
    words = [each.text for each in verdicts]
    counts = {word: words.count(word) for word in ("stretch", "met", "missed", "not measured")}
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    how = "\n".join(f"- {target.name}: {target.how}" for target in targets.TARGETS)
    return f"## Targets\n\n{said}.\n\n{tables.markdown(targets.rows_of(verdicts))}\n\nHow each is measured:\n\n{how}\n"


def section_peers(results: Sequence[Result]) -> str:
    """All comparisons, those that came out badly first and plainly."""
    found = comparisons.compare(results)
    if not found:
        return "## Beside others\n\nNo peer was measured.\n"
    worse = comparisons.not_better(found)
    rest = [each for each in found if each.factor.median > 1.0]
    text = "## What is not better than a peer\n\n"
    text += tables.markdown(comparisons.rows_of(worse)) if worse else "Nothing that was measured."
    text += "\n\n## What is better than a peer\n\n"
    text += tables.markdown(comparisons.rows_of(rest)) if rest else "Nothing that was measured."
    return text + "\n"


def section_profile(results: Sequence[Result]) -> str:
    """Where each microsecond goes: modules by role, and the functions that take most."""
    rows = [row for row in results if "modules" in row]
    if not rows:
        return ""
    text = PROFILE
    for target in dict.fromkeys(row["target"] for row in rows):
        cells = [["", "us", "share"]]
        for row in rows:
            if row["target"] != target:
                continue
            cells.append([f"**{row['workload']}**", f"{row['median']:.2f}", ""])
            for name, spent in list(row["modules"].items())[:12]:
                inside = [function for function in row["functions"] if function.startswith(f"{name}:")]
                top = max(inside, key=row["functions"].get, default="")
                most = f" (most: {top.partition(':')[2]} {row['functions'][top]:.2f})" if top else ""
                cells.append([f"{name}{most}", f"{spent:.2f}", f"{spent / row['median']:.0%}"])
        text += f"\n### {target}\n\n{tables.markdown(cells)}\n"
    return text


def section_suites(results: Sequence[Result]) -> str:
    """The table of each suite."""
    from bench.run_bench import SUITES

    text = "## All figures\n"
    for suite, (module, _) in SUITES.items():
        rows = [row for row in results if row.get("suite") == suite and "modules" not in row]
        if rows:
            title = importlib.import_module(module).TITLE
            text += f"\n### {title}\n\n{tables.markdown(tables.of_suite(suite, rows))}\n"
    return text


def section_missing(run: dict[str, Any]) -> str:
    """What was not measured, and why."""
    lines = [f"- {each['target']}: {each['why']}" for each in run["skipped"]]
    lines += [f"- the suite `{name}` failed" for name in run["failed"]]
    return "## Not measured\n\n" + "\n".join(lines) + "\n" if lines else ""


def page(run: dict[str, Any] | None, charts: Sequence[str]) -> str:
    """The whole page. `charts`: paths relative to it."""
    if run is None:
        return f"{HEAD}\n{EMPTY}\n{METHOD}"
    results = run["results"]
    shown = "\n".join(f"![{Path(chart).stem}]({chart})\n" for chart in charts)
    parts = [
        HEAD, machine_text(run["machine"], run["took_s"], run.get("commits", {})),
        section_targets(targets.judge_all(results)), (ROOT / "bench" / "tried.md").read_text(),
        section_peers(results),
        f"## Charts\n\n{shown}" if charts else "", section_profile(results),
        section_missing(run), METHOD, section_suites(results),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def newest(directory: Path) -> Path | None:
    """The newest full run that is kept."""
    files = sorted(directory.glob("full-*.json"), key=lambda file: json.loads(file.read_text())["machine"]["time"])
    return files[-1] if files else None


def main() -> int:
    """Make page and charts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="figures (default: the newest full run in bench/results/)")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "performance.md", help="default: %(default)s")
    options = parser.parse_args()
    file = options.file or newest(ROOT / "bench" / "results")
    run = json.loads(file.read_text()) if file is not None else None
    if run is not None and run["quick"]:
        print(f"report: {file} is of a quick run: an indication, from which no page is made", file=sys.stderr)
        return 2
    charts: list[str] = []
    if run is not None and importlib.util.find_spec("matplotlib") is None:
        print("report: matplotlib is not installed (pip install '.[peers]'): no charts", file=sys.stderr)
    elif run is not None:
        from bench.report.charts import draw_all

        made = draw_all(run["results"], targets.judge_all(run["results"]), options.into.parent / "figures")
        charts = [str(each.relative_to(options.into.parent)) for each in made]
    options.into.write_text(page(run, charts))
    print(f"{options.into}: from {file or 'nothing yet'}, {len(charts)} charts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
