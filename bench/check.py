#!/usr/bin/env python3
"""The guard against becoming slower: `bench/check.py [BASE [HEAD]] [--rounds N] [--limit SHARE]`.

Measures two commits with the same probe (`bench.probe` of this checkout) and tells every figure of HEAD that is worse
by more than the limit; then the exit code is 1. Each commit stands in a git worktree of its own in a temporary
directory, with the bench/ of this checkout laid over it, so that both are measured by the same code; their servers and
clients are their own. They take turns, in random order in each round; what counts is the median of the ratios of one
round. On a machine that does other things too, look at min-max, and measure again with more rounds.

With `--own` each commit is measured by its own bench/ instead. That happens by itself if a commit lacks a module of
kvtcp that the bench/ of this checkout imports: its modules have other names. Figures of the same name are compared, so
look whether the probes differ.

BASE is by default the last tag before HEAD, or HEAD~1 if there is none. `--compile` builds the compiled modules in one
or both of them first; `bench/check.py HEAD HEAD --compile head` shows what compiling is worth.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.measure import HIGHER_IS_BETTER, compiled_modules  # noqa: E402
from bench.report import tables  # noqa: E402 - the path comes first

LIMIT = 0.10
ROUNDS = 5
PROBE_S_MAX = 300.0
Figures = Mapping[str, Sequence[float | str]]  # name -> value, unit


class Change(NamedTuple):
    """A figure of both; `worse` is how many times worse HEAD is, 1 = the same."""

    name: str
    unit: str
    base: float
    head: float
    worse: float
    low: float
    high: float


def changes(rounds: Sequence[tuple[Figures, Figures]]) -> list[Change]:
    """Figures that every round has of both commits (base, head), the worst first."""
    found = []
    for name, (_, unit) in rounds[0][0].items():
        if not all(name in base and name in head for base, head in rounds):
            continue
        bases = [float(base[name][0]) for base, _ in rounds]
        heads = [float(head[name][0]) for _, head in rounds]
        if unit in HIGHER_IS_BETTER:
            ratios = [b / h for b, h in zip(bases, heads, strict=True)]
        else:
            ratios = [h / b for b, h in zip(bases, heads, strict=True)]
        found.append(Change(
            name, str(unit), statistics.median(bases), statistics.median(heads), statistics.median(ratios),
            min(ratios), max(ratios),
        ))  # fmt: skip
    return sorted(found, key=lambda change: -change.worse)


def only_one(rounds: Sequence[tuple[Figures, Figures]]) -> list[str]:
    """Names of figures that one of the commits does not have."""
    return sorted({name for base, head in rounds for name in set(base) ^ set(head)})


def rows_of(found: Sequence[Change], limit: float) -> list[list[str]]:
    """Header and cells of a table."""
    rows = [["", "base", "head", "times worse", "min-max", ""]]
    for name, unit, base, head, worse, low, high in found:
        word = "WORSE" if worse > 1 + limit else "better" if worse < 1 / (1 + limit) else ""
        rows.append([
            f"{name}, {unit}", tables.number(base), tables.number(head), f"{worse:.2f}", f"{low:.2f}-{high:.2f}", word,
        ])  # fmt: skip
    return rows


def git(*arguments: str) -> str:
    """What git prints. Raises CalledProcessError."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def default_base(head: str) -> str:
    """The last tag before a commit, or its parent."""
    try:
        return git("describe", "--tags", "--abbrev=0", f"{head}^")
    except subprocess.CalledProcessError:
        return f"{head}~1"


def compile_in(place: Path) -> None:
    """Build what the checkout's setup.py compiles. Raises RuntimeError if it compiles nothing."""
    environment = {**os.environ, "KVTCP_COMPILE": "1", "PYTHONPATH": str(place)}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=place, env=environment, check=True)
    if not compiled_modules(place):
        raise RuntimeError(f"setup.py of {place.name} compiles no module")


@contextmanager
def checkout(commit: str, place: Path) -> Iterator[Path]:
    """A worktree of a commit."""
    git("worktree", "add", "--detach", "--quiet", str(place), commit)
    try:
        yield place
    finally:
        git("worktree", "remove", "--force", str(place))


def lacking(place: Path, bench: Path = ROOT / "bench") -> list[str]:
    """Modules of kvtcp that `bench` imports and the checkout does not have."""
    names: set[str] = set()
    for file in bench.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(node.module)
            elif isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
    modules = {name: place.joinpath(*name.split(".")) for name in names if name.partition(".")[0] == "kvtcp"}
    return sorted(name for name, path in modules.items() if not (path.is_dir() or path.with_suffix(".py").is_file()))


def lay_over(places: Sequence[Path], bench: Path = ROOT / "bench") -> bool:
    """Give the checkouts the bench/ of this one, unless one of them lacks what it imports; whether they have it."""
    for place in places:
        if names := ", ".join(lacking(place, bench)):
            print(f"check: {place.name} has no {names}: each is measured by its own bench/", file=sys.stderr)
            return False
    for place in places:
        shutil.rmtree(place / "bench", ignore_errors=True)
        shutil.copytree(bench, place / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    return True


def probe(place: Path, seed: int) -> Figures:
    """The figures of a checkout. Raises RuntimeError if it fails, or measures another package."""
    environment = {**os.environ, "PYTHONPATH": str(place), "TMPDIR": str(place.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.probe", "--seed", str(seed)], cwd=place, env=environment, stdout=subprocess.PIPE,
        text=True, timeout=PROBE_S_MAX, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the probe failed in {place}; its reason is above")
    report = json.loads(done.stdout.splitlines()[-1])
    if not Path(report["package"]).is_relative_to(place):
        raise RuntimeError(f"the probe of {place} measured {report['package']}")
    figures: Figures = report["figures"]
    return figures


def run_rounds(base: Path, head: Path, rounds: int, seed: int) -> list[tuple[Figures, Figures]]:
    """Both checkouts in each round, in random order."""
    chooser = random.Random(seed)
    found = []
    for number in range(rounds):
        figures: dict[Path, Figures] = {}
        for place in chooser.sample([base, head], 2):
            print(f"round {number + 1} of {rounds}: {place.name}", file=sys.stderr, flush=True)
            figures[place] = probe(place, seed + number)
        found.append((figures[base], figures[head]))
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("base", nargs="?", help="a commit (default: the last tag before HEAD, or HEAD~1)")
    command.add_argument("head", nargs="?", default="HEAD", help="default: %(default)s")
    command.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    command.add_argument("--limit", type=float, default=LIMIT, help="share that is too much (default: %(default)s)")
    command.add_argument("--compile", choices=("base", "head", "both"), help="build compiled modules there first")
    command.add_argument("--own", action="store_true", help="measure each commit by its own bench/")
    command.add_argument("--seed", type=int, default=1, help="of keys and order (default: %(default)s)")
    return command


def main() -> int:
    """Measure both, print the table, fail if something is worse."""
    options = parser().parse_args()
    base = options.base or default_base(options.head)
    names = [git("rev-parse", "--short", name) for name in (base, options.head)]
    if git("status", "--porcelain", "--", "kvtcp", "bin"):
        print("check: changes that are not committed are not measured", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="kvtcp-bench-") as directory:
        places = [Path(directory) / side for side in ("base", "head")]
        with checkout(base, places[0]) as first, checkout(options.head, places[1]) as second:
            if not options.own:
                lay_over(places)
            for place in (first, second):
                if options.compile in (place.name, "both"):
                    compile_in(place)
            rounds = run_rounds(first, second, options.rounds, options.seed)
    found = changes(rounds)
    print(f"base {base} ({names[0]}), head {options.head} ({names[1]}), {options.rounds} rounds, seed {options.seed}\n")
    print(tables.text(rows_of(found, options.limit)))
    for name in only_one(rounds):
        print(f"not in both: {name}")
    worse = [change for change in found if change.worse > 1 + options.limit]
    print(f"\n{len(worse)} of {len(found)} figures are worse by more than {options.limit:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
