#!/usr/bin/env python3
"""The benchmark suite of kvtcp.

    bench/run_bench.py --quick              six figures in two minutes: an indication, without verdicts
    bench/run_bench.py                      all suites, at most an hour, then the table of targets with verdicts
    bench/run_bench.py SUITE ... [--quick]  only these, or a small form of them
                       [--json FILE [--again]] [--seed N] [--runs N] [--keys N] [--minutes N]

Figures are medians over the runs with their minimum and maximum; systems that are compared take turns. Machines differ
and are shared: compare the columns of one run, not two runs. All figures with versions, commit and machine are written
to bench/results/ after each suite; `bench/report/page.py` makes tables and charts of them. Something that is not
installed is passed over loudly; the peers come with `pip install '.[bench,peers]'` and `apt-get install redis-server
redis-tools nutcracker memcached etcd-server etcd-client`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.measure import Options, Result, machine  # noqa: E402
from bench.peers import servers  # noqa: E402 - the path comes first, so that a checkout needs no installation
from bench.report import tables, targets  # noqa: E402

# suite -> its module, and the minutes it takes in full on two cores; those that targets need come first
SUITES: dict[str, tuple[str, float]] = {
    "floors": ("bench.suites.floors", 0.5),
    "btree": ("bench.suites.btree", 9),
    "codec": ("bench.suites.codec", 0.5),
    "peers": ("bench.suites.peers", 13),
    "scan": ("bench.suites.scan", 1.5),
    "memory": ("bench.suites.memory", 4),
    "recovery": ("bench.suites.recovery", 3),
    "scale": ("bench.suites.scale", 5),
    "durability": ("bench.suites.durability", 4),
    "profile": ("bench.suites.profile", 1),
    "network": ("bench.suites.network", 1.5),
    "replication": ("bench.suites.replication", 4),
    "ycsb": ("bench.suites.ycsb", 5),
    "failover": ("bench.suites.failover", 4),
    "catchup": ("bench.suites.catchup", 3),
}
MINUTES_MAX = 60.0
RESULTS = ROOT / "bench" / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("suites", nargs="*", metavar="SUITE", help=f"{' '.join(SUITES)} (default: all)")
    command.add_argument("--quick", action="store_true", help="small and short: an indication, no measurement")
    command.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (default: bench/results/)")
    command.add_argument("--again", action="store_true", help="replace these suites in the file")
    command.add_argument("--seed", type=int, default=1, help="of keys and order (default: %(default)s)")
    command.add_argument("--runs", type=int, help="how often everything is measured (default: each suite its own)")
    command.add_argument("--keys", type=int, help="of the suites that have one size (default: each suite its own)")
    command.add_argument("--minutes", type=float, default=MINUTES_MAX, help="a suite that would end later is left out")
    return command


def chosen(command: argparse.ArgumentParser, names: list[str]) -> list[str]:
    """The suites in their order, all if none is named. Ends the program for one that is not there."""
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        command.error(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    return [name for name in SUITES if not names or name in names]


def file_of(about: dict[str, Any], names: list[str], quick: bool) -> Path:
    """Where the figures go if nobody says; those of --quick are not kept."""
    what = "quick" if quick else "-".join(names) if len(names) < len(SUITES) else "full"
    compiled = "-compiled" if about["compiled"] else ""
    return RESULTS / f"{what}-{about['commit']}{compiled}.json{'.tmp' if quick else ''}"


class Run:
    """What was measured so far, on disk after each suite."""

    def __init__(self, options: Options, file: Path, about: dict[str, Any]) -> None:
        self.options, self.file, self.about = options, file, about
        self._commit = about["commit"]
        self.results: list[Result] = []
        self.took_s: dict[str, float] = {}
        self.commits: dict[str, str] = {}  # suite -> what it was measured at

    def go_on(self, names: list[str]) -> None:
        """Keep what the file has of other suites than these, which are measured again. ValueError if what is compiled
        is not the same."""
        before = json.loads(self.file.read_text())
        if before["machine"]["compiled"] != self.about["compiled"]:
            raise ValueError("what is compiled now is not what was when the others were measured")
        self.about = before["machine"]
        self.results = [row for row in before["results"] if row["suite"] not in names]
        self.took_s = {name: took_s for name, took_s in before["took_s"].items() if name not in names}
        self.commits = {name: before.get("commits", {}).get(name, self.about["commit"]) for name in self.took_s}
        self.options.failed += [name for name in before["failed"] if name.partition(",")[0] not in names]
        self.options.skipped += before["skipped"]

    def save(self) -> None:
        """All of it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({
            "machine": self.about, "seed": self.options.seed, "quick": self.options.quick, "took_s": self.took_s,
            "skipped": self.options.skipped, "failed": self.options.failed, "commits": self.commits,
            "results": self.results,
        }, indent=1)  # fmt: skip
        self.file.write_text(text + "\n")

    def suite(self, name: str) -> None:
        """Run one, print its table. A suite that fails is told, and the others go on."""
        module = importlib.import_module(SUITES[name][0])
        began = time.monotonic()
        print(f"\n## {name}: {module.TITLE}\n", flush=True)
        try:
            rows = module.measure(self.options)
        except Exception:
            traceback.print_exc()
            self.options.failed.append(name)
            rows = []
        self.took_s[name] = time.monotonic() - began
        self.commits[name] = self._commit
        if rows:
            print(tables.text(tables.of_suite(name, rows)))
        print(f"\n({name} took {self.took_s[name]:.0f} s)", flush=True)
        self.results += [{"suite": name, **row} for row in rows]
        self.save()


def quick(run: Run) -> int:
    """The six figures."""
    from bench.quick import six_figures

    began = time.monotonic()
    figures, run.results = six_figures(run.options)
    print("\nAn indication only: one short run on a machine that may do other things. No verdicts.\n")
    print(tables.text([["", "measured"], *([name, value] for name, value in figures)]))
    print(f"\n({time.monotonic() - began:.0f} s)")
    run.save()
    return 0


def full(run: Run, names: list[str], minutes: float) -> int:
    """These suites; then the targets, unless it is the quick form."""
    began = time.monotonic()
    for name in names:
        needed = 0.0 if run.options.quick else SUITES[name][1]
        if (time.monotonic() - began) / 60 + needed > minutes:
            run.options.skip(name, f"it takes {needed:g} minutes, and they would end after {minutes:g}")
            continue
        run.suite(name)
    if run.options.quick:
        print("\nSmall sizes: an indication only, no verdicts.")
    else:
        verdicts = targets.judge_all(run.results)
        print(f"\n## Targets\n\n{tables.text(targets.rows_of(verdicts))}")
    for each in run.options.skipped:
        print(f"not measured: {each['target']}: {each['why']}")
    for name in run.options.failed:
        print(f"FAILED: {name}; see above")
    print(f"\nall figures: {run.file}")
    return 1 if run.options.failed else 0


def main() -> int:
    """Run what was chosen, print tables, keep the figures."""
    command = parser()
    options = command.parse_args()
    names = chosen(command, options.suites)
    about = {**machine(), "programs": servers.versions()}
    packages = ", ".join(f"{name} {number}" for name, number in {**about["packages"], **about["programs"]}.items())
    print(
        f"kvtcp {about['commit']}, {len(about['compiled'])} modules compiled, Python {about['python']}\n"
        f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}\n{packages}"
    )
    asked = Options(options.quick, options.seed, options.runs, options.keys)
    run = Run(asked, options.json or file_of(about, names, options.quick), about)
    if options.again:
        if not options.suites or options.quick or options.json is None or not options.json.exists():
            command.error("--again needs --json with a file that is there, and the names of the suites; not --quick")
        try:
            run.go_on(names)
        except ValueError as error:
            command.error(str(error))
    if options.quick and not options.suites:
        return quick(run)
    return full(run, names, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
