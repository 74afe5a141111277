"""Redis's own tests against a kvtcp coordinator: `make redis-suite`, or `python -m tests.redis.suite --help`.

The tests are those of Debian's source package of Redis 7.0, unchanged, in Redis's own Tcl harness, which can be told of
a server that is not its own: `./runtest --host H --port P --singledb --single FILE --only TEST`. Needs tclsh, and
apt-get for the first run. Every test of FILES runs by itself after a FLUSHALL: a test that meets a command that is not
there ends its whole file, and would take the others with it. A test that needs what an earlier one left behind runs
together with it (`after` in the table). `--in-order` runs whole files on one connection instead, as Redis does.

The table, skips.json, has for every test that is not run the reason. The run fails for a test that neither
passes nor is in the table, for a row of the table without a test, and for a test that Redis leaves out by itself on
such a server ("ignore") without a row that says so. Tests in blocks that Redis leaves out as a whole on such servers
(`external:skip`: they read its log and its AOF) have no names here and are not counted.

Without --host, `--jobs` coordinators with one node each are started and share the tests. With --host and --all it runs
everything, also what is in the table: the way to see what a redis-server passes, in order 306 of them (7.0.15, with
--enable-debug-command yes). --ignore-encoding is the harness's own: OBJECT ENCODING is not asked, as it tells how
Redis lays a value out in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.processes.cluster import ROOT, ProcessCluster

FILES: Final = (
    "unit/type/string", "unit/type/incr", "unit/expire", "unit/keyspace", "unit/scan", "unit/protocol", "unit/multi",
)  # fmt: skip
TABLE: Final = ROOT / "tests" / "redis" / "skips.json"
CACHE: Final = ROOT / ".redis-suite"
VERSION: Final = "7.0.15"
SUITE: Final = "bookworm"
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
NOBODY: Final = "no test has this name"
TEST_S_MAX: Final = 60.0
FILE_S_MAX: Final = 300.0
HANGS_MAX: Final = 3  # runs without an end, after which the others are not tried
HARNESS_PORT: Final = 29_000  # of the harness's own sockets; every worker has 64 from here
COLOR = re.compile(r"\x1b\[[0-9;]*m")
EVENT = re.compile(r"^\[(ok|err|skip|ignore|exception|TIMEOUT)\]: (.*)$")
TOOK = re.compile(r" \(\d+ ms\)$")

Address = tuple[str, int]


class SuiteError(Exception):
    """The suite cannot run, or its table is wrong: a sentence for the terminal."""


@dataclass(frozen=True)
class Table:
    """What is known about the tests, by file and name."""

    skips: dict[str, dict[str, str]]  # why it is not run
    after: dict[str, dict[str, list[str]]]  # which earlier tests run with it

    @staticmethod
    def read(path: Path) -> Table:
        """From its file. Raises SuiteError for a row without a reason, and for one that stands twice."""

        def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
            twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            if twice:
                raise SuiteError(f"{path.name}: twice in one file: {', '.join(twice)}")
            return dict(pairs)

        rows = json.loads(path.read_text(), object_pairs_hook=unique)
        table = Table(rows["skips"], rows["after"])
        silent = [test for tests in table.skips.values() for test, reason in tests.items() if len(reason) < 5]
        if silent:
            raise SuiteError(f"{path.name}: without a reason: {', '.join(silent)}")
        return table

    def complaints(self, tests: dict[str, list[str]]) -> list[str]:
        """Rows that name no test of the files of `tests`, which has all names of each."""
        gone = set()
        for file, names in tests.items():
            after = self.after.get(file, {})
            named = {*self.skips.get(file, ()), *after, *(test for earlier in after.values() for test in earlier)}
            gone |= {f"{file}: {TABLE.name} names a test that does not exist: {test}" for test in named - {*names}}
        gone |= {f"{file}: {TABLE.name} names a file that is not run" for file in {*self.skips, *self.after} - {*FILES}}
        return sorted(gone)


@dataclass(frozen=True)
class Event:
    """One line of the harness about a test, with the lines below it."""

    kind: str  # ok, err, skip, ignore, exception, TIMEOUT
    text: str


@dataclass(frozen=True)
class Run:
    """One run of the harness."""

    file: str
    tests: list[str]  # that are judged by it
    only: list[str]  # that it is told to run; empty: all but those of `skip`
    skip: list[str]


@dataclass(frozen=True)
class Result:
    """How one test went, or several of one name in one file."""

    file: str
    test: str
    outcome: str  # passed, failed, skipped
    reason: str


def parse(output: str) -> list[Event]:
    """What a run of the harness says about its tests."""
    events: list[Event] = []
    for line in COLOR.sub("", output).splitlines():
        found = EVENT.match(line)
        if found:
            events.append(Event(found[1], found[2]))
        elif events and events[-1].kind in ("err", "exception", "TIMEOUT") and line.strip():
            events[-1] = Event(events[-1].kind, f"{events[-1].text}\n{line}")
    return events


def judge(test: str, events: list[Event]) -> tuple[str, str]:
    """Outcome and reason of a test, from a run that it had to be part of."""
    for event in events:
        if event.kind == "err" and event.text.startswith(f"{test} in tests/"):
            return "failed", "\n".join(event.text.splitlines()[1:4])
        if event.kind == "ignore" and event.text.startswith(f"{test}: "):
            return "failed", f"Redis leaves it out: {event.text.removeprefix(f'{test}: ')}"
    if any(event.kind == "ok" and TOOK.sub("", event.text) == test for event in events):
        return "passed", ""
    ends = [event.text.splitlines()[0] for event in events if event.kind in ("exception", "TIMEOUT")]
    return "failed", ends[0] if ends else "it did not run"


class Harness:
    """Redis's runtest in a source tree, for the server at one address."""

    def __init__(self, tree: Path, address: Address, worker: int) -> None:
        self.tree = tree
        self.address = address
        self.base_port = HARNESS_PORT + 64 * worker

    def run(self, run: Run) -> list[Event]:
        """Run tests of a file; a run without an end gives a TIMEOUT."""
        command = [
            "./runtest", "--host", self.address[0], "--port", str(self.address[1]), "--singledb", "--ignore-encoding",
            "--baseport", str(self.base_port), "--clients", "1", "--single", run.file,
        ]  # fmt: skip
        if not run.only:
            command.append("--durable")  # an error ends its test, not the file
        for option, names in (("--only", run.only), ("--skiptest", run.skip)):
            for name in names:
                command += [option, name]
        # a group of its own: it starts tclsh, which starts another one
        process = subprocess.Popen(
            command, cwd=self.tree, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            process_group=0,
        )  # fmt: skip
        limit_s = TEST_S_MAX if run.only else FILE_S_MAX
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return [Event("TIMEOUT", f"no end after {limit_s:.0f} s")]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        events = parse(output.decode(errors="replace"))
        if not events:
            raise SuiteError(f"{' '.join(command)} said nothing of use:\n{output.decode(errors='replace')}")
        return events

    def tests(self, file: str) -> list[str]:
        """The names of all tests of a file, in order; a name may come twice."""
        events = self.run(Run(file, [], [NOBODY], []))
        for event in events:
            if event.kind not in ("skip", "ignore"):
                raise SuiteError(f"{file} cannot be read with this server: {event.text.splitlines()[0]}")
        return [event.text for event in events if event.kind == "skip"]


def run_all(harnesses: list[Harness], plan: list[Run]) -> list[Result]:
    """Do every run on a harness that is free; the results of all their tests."""
    free: queue.Queue[Harness] = queue.Queue()
    for harness in harnesses:
        free.put(harness)
    hangs: list[Run] = []

    def do(run: Run) -> list[Result]:
        if len(hangs) >= HANGS_MAX:
            return [Result(run.file, test, "failed", "not tried: too many runs had no end") for test in run.tests]
        harness = free.get()
        try:
            events = harness.run(run)
        finally:
            free.put(harness)
        if any(event.kind == "TIMEOUT" for event in events):
            hangs.append(run)
        return [Result(run.file, test, *judge(test, events)) for test in run.tests]

    with ThreadPoolExecutor(len(harnesses)) as pool:
        return [result for results in pool.map(do, plan) for result in results]


def make_plan(tests: dict[str, list[str]], table: Table, in_order: bool) -> list[Run]:
    """The runs of all tests that the table does not skip."""
    plan = []
    for file, names in tests.items():
        skips = table.skips.get(file, {})
        wanted = [test for test in dict.fromkeys(names) if test not in skips]
        if in_order:
            plan.append(Run(file, wanted, [], list(skips)))
        else:
            after = table.after.get(file, {})
            plan += [Run(file, [test], [*after.get(test, ()), test], []) for test in wanted]
    return plan


def report(tests: dict[str, list[str]], results: list[Result]) -> bool:
    """Print the counts of every file, and everything that failed; whether nothing did."""
    total: Counter[str] = Counter()
    for file, names in tests.items():
        if not names:
            continue  # others were asked for
        times = Counter(names)
        here = [result for result in results if result.file == file]
        counts: Counter[str] = Counter()
        for result in here:
            counts[result.outcome] += times[result.test]
        total += counts
        print(f"{file}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
        for result in here:
            if result.outcome == "failed":
                print(f"  FAILED {result.test}: " + "\n    ".join(result.reason.splitlines()))
    print(f"redis suite: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return not total["failed"]


def run_suite(options: argparse.Namespace, harnesses: list[Harness], table: Table) -> int:
    """List the tests, run them, tell the result; the exit code."""
    began = time.monotonic()
    tests = {file: harnesses[0].tests(file) for file in FILES if not options.file or file in options.file}
    complaints = [] if options.all else table.complaints(tests)
    if options.test:
        tests = {file: [test for test in names if test in options.test] for file, names in tests.items()}
        if not any(tests.values()):
            raise SuiteError(f"no test has the name {' or '.join(options.test)}")
    skipped = [
        Result(file, test, "skipped", table.skips[file][test])
        for file, names in tests.items()
        for test in dict.fromkeys(names)
        if test in table.skips.get(file, {})
    ]
    results = skipped + run_all(harnesses, make_plan(tests, table, options.in_order))
    is_good = report(tests, results) and not complaints
    for complaint in complaints:
        print(f"FAILED {complaint}")
    print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([vars(result) for result in results], indent=1) + "\n")
    return 0 if is_good else 1


def fetch(cache: Path) -> Path:
    """The source tree with Redis's tests, from Debian if it is not there yet.

    Everything apt-get needs for it lies in the cache: the system's own lists are not touched, and root is not needed.
    """
    tree = cache / f"redis-{VERSION}"
    if (tree / "runtest").exists():
        return tree
    (cache / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    site = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    mirror = site[0] if site else "http://deb.debian.org/debian"
    (cache / "sources.list").write_text(f"deb-src [signed-by={KEYRING}] {mirror} {SUITE} main\n")
    settings = {
        "Dir::Etc::sourcelist": cache / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": cache / "lists", "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": "",
        "APT::Sandbox::User": "root",
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "source", "--download-only", "redis"], check=True, cwd=cache)
    with tempfile.TemporaryDirectory(dir=cache) as fresh, tarfile.open(cache / f"redis_{VERSION}.orig.tar.gz") as tar:
        wanted = [m for m in tar.getmembers() if m.name.split("/")[1:2] in (["tests"], ["runtest"])]
        tar.extractall(fresh, wanted)
        (Path(fresh) / tree.name).rename(tree)
    shutil.rmtree(cache / "lists")
    return tree


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit code: 1 for a test that failed, 2 if the suite could not run."""
    parser = argparse.ArgumentParser(prog="redis_suite", description="Redis's own tests against a kvtcp coordinator.")
    parser.add_argument("--host", help="of a server that runs already (default: start some)")
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--jobs", type=int, default=2, help="servers to start, if none is given")
    parser.add_argument("--file", action="append", choices=FILES, help="only this file; may be repeated")
    parser.add_argument("--test", action="append", help="only the test of this name; may be repeated")
    parser.add_argument("--all", action="store_true", help="run also what the table skips")
    parser.add_argument("--in-order", action="store_true", help="whole files on one connection, as Redis runs them")
    parser.add_argument("--json", type=Path, help="write the result of every test to this file")
    parser.add_argument("--source", type=Path, help="unpacked source of Redis (default: fetch it)")
    options = parser.parse_args(argv)
    try:
        if shutil.which("tclsh") is None:
            raise SuiteError("tclsh is missing: apt-get install tcl")
        table = Table.read(TABLE)
        if options.all:
            table = Table({}, table.after)
        tree = options.source or fetch(CACHE)
        with contextlib.ExitStack() as stack:
            if options.host:
                return run_suite(options, [Harness(tree, (options.host, options.port), 0)], table)
            harnesses = []
            for worker in range(options.jobs):
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtcp-redis-suite-")))
                cluster = stack.enter_context(contextlib.closing(ProcessCluster(directory, nodes=1)))
                cluster.start("--replication-factor", 1, "--durability", "memory", "--log-level", "warning")
                host, _, port = cluster.url.removeprefix("kvtcp://").partition(":")
                harnesses.append(Harness(tree, (host, int(port)), worker))
            return run_suite(options, harnesses, table)
    except (SuiteError, subprocess.CalledProcessError) as error:
        print(f"redis suite: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
