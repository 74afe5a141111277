"""Statistics of the benchmarks: quantiles, histograms, ratios, floors, turns, CPU time; the operations of a load."""

import os
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.load.clients import Job, Zipfian, generate, key_of, scatter, value_of


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100)], ids=lambda value: str(value)
)
def test_quantiles_are_of_the_nearest_rank(share: float, expected: float) -> None:
    """Of the numbers 1 to 100."""
    assert measure.quantile(range(1, 101), share) == expected


def test_a_quantile_of_nothing_is_refused() -> None:
    """It has no value."""
    with pytest.raises(ValueError, match="no values"):
        measure.quantile([], 0.5)
    with pytest.raises(ValueError, match="no values"):
        measure.Histogram().quantile(0.5)


def test_a_histogram_is_as_exact_as_its_buckets() -> None:
    """Each quantile of random latencies is within a bucket of the true one, also when two histograms are merged."""
    rng = random.Random(7)
    values = [rng.lognormvariate(0, 2) for _ in range(5_000)]
    one, other = measure.Histogram(), measure.Histogram()
    for number, value in enumerate(values):
        (one if number % 3 else other).add(value)
    one.merge(other)
    assert one.total == len(values)
    values.sort()
    for share in (0.5, 0.9, 0.99, 0.999, 1.0):
        assert one.quantile(share) == pytest.approx(measure.quantile(values, share), rel=0.021)
    assert set(one.figures()) == {"p50_ms", "p99_ms", "p999_ms", "max_ms"}


def test_a_row_has_median_and_range() -> None:
    """Over the runs."""
    row = measure.make_row("kvtcp", "get", "ops/s", [3, 1, 2], depth=16)
    assert (row["median"], row["min"], row["max"], row["runs"], row["depth"]) == (2, 1, 3, [3, 1, 2], 16)
    with pytest.raises(ValueError, match="kvtcp, get: no figures"):
        measure.make_row("kvtcp", "get", "ops/s", [])


def test_ratios_are_of_the_same_run() -> None:
    """A slow moment that meets both sides does not change the ratio."""
    above, below = measure.make_row("a", "w", "ops/s", [20, 2, 22]), measure.make_row("b", "w", "ops/s", [10, 1, 10])
    assert measure.ratio(above, below) == (2, 2, 2.2, 3)


def test_ratios_of_different_numbers_of_runs_have_the_widest_range() -> None:
    """They have no run in common."""
    above, below = measure.make_row("a", "w", "ops/s", [20, 30]), measure.make_row("b", "w", "ops/s", [10, 5, 20])
    assert measure.ratio(above, below) == (2.5, 1, 6, 2)


def test_efficiency_is_floor_by_actual_as_times() -> None:
    """Half the rate and twice the time are both 0.5."""
    assert measure.with_floor(measure.make_row("a", "w", "ops/s", [50]), "echo", 100)["efficiency"] == 0.5
    assert measure.with_floor(measure.make_row("a", "w", "ms", [0.4]), "fdatasync", 0.2)["efficiency"] == 0.5


def test_find_needs_suite_target_and_workload() -> None:
    """Rows of other suites with the same name are others."""
    row = measure.make_row
    rows = [{"suite": "x", **row("a", "w", "s", [1])}, {"suite": "y", **row("a", "w", "s", [2])}]
    assert measure.find(rows, "y", "a", "w") == rows[1]
    assert measure.find(rows, None, "a", "w") == rows[0]
    assert measure.find(rows, "y", "a", "v") is None


def test_cpu_time_of_roles_is_added_run_by_run() -> None:
    """Rows without CPU times are passed over."""
    with_cpu = measure.make_row("a", "w", "ops/s", [1, 1], cpu_runs=[{"x": 1, "y": 2}, {"x": 3, "y": 4}])
    rows = [with_cpu, measure.make_row("b", "w", "s", [1])]
    assert [row["runs"] for row in measure.cpu_rows(rows, ("x", "y"), "CPU")] == [[3, 7]]


class Recorder:
    """A workload that writes down what is called."""

    workload, unit = "w", "ops/s"

    def __init__(self, target: str, calls: list[tuple[str, str, int]]) -> None:
        self.target, self.calls = target, calls
        self.more: dict[str, Any] = {"durability": "memory"}

    def prepare(self) -> None:
        """Once."""
        self.calls.append((self.target, "prepare", -9))

    def generate(self, run: int) -> int:
        """The plan is the number of the run."""
        self.calls.append((self.target, "generate", run))
        return run

    def execute(self, plan: int) -> measure.Sample:
        """A rate that tells the run."""
        self.calls.append((self.target, "execute", plan))
        return measure.Sample(float(plan), {"server": plan * 2.0}, {"p99_ms": plan * 3.0})

    def verify(self, plan: int) -> None:
        """After each."""
        self.calls.append((self.target, "verify", plan))


def test_workloads_take_turns_in_four_phases() -> None:
    """All are prepared first; every run has each once; the warm-up is not in the figures; the seed repeats it."""
    stories = []
    for _ in range(2):
        calls: list[tuple[str, str, int]] = []
        rows = measure.interleave([Recorder(name, calls) for name in "abc"], 5, seed=3)
        assert [step for _, step, _ in calls[:3]] == ["prepare"] * 3
        rest = calls[3:]
        for place in range(0, len(rest), 3):
            assert [step for _, step, _ in rest[place : place + 3]] == ["generate", "execute", "verify"]
        orders = [[rest[run * 9 + turn * 3][0] for turn in range(3)] for run in range(6)]
        assert all(sorted(order) == ["a", "b", "c"] for order in orders)
        assert len({tuple(order) for order in orders}) > 1
        assert [row["runs"] for row in rows] == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 3
        assert rows[0]["cpu_us"] == {"server": 4.0} and rows[0]["p99_ms"] == 6.0 and rows[0]["durability"] == "memory"
        stories.append(calls)
    assert stories[0] == stories[1]


def test_cpu_time_counts_all_threads() -> None:
    """Of this process and of another: what a second thread spends is in it."""
    script = (
        "import hashlib, sys, threading, time\n"
        "stop = threading.Event()\n"
        "def spend():\n"
        "    while time.thread_time() < 0.3: hashlib.sha256(b'x' * 1_000_000).digest()\n"
        "    print('spent', flush=True)\n"
        "    stop.wait()\n"
        "threading.Thread(target=spend, daemon=True).start()\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"spent\n"
        assert measure.cpu_s(child.pid) >= 0.3
    finally:
        child.kill()
        child.communicate()
    before = measure.cpu_s(os.getpid())
    thread = threading.Thread(target=lambda: sum(range(1_000_000)))
    thread.start()
    thread.join()
    assert measure.cpu_s(os.getpid()) > before


def test_options_choose_sizes_and_keep_what_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    """What is not measured is said loudly."""
    options = measure.Options(quick=True, keys=7)
    assert (options.size(100, 1), options.runs_or(5), options.keys_or(100, 1)) == (1, 1, 7)
    assert measure.Options(runs=3).runs_or(5) == 3 and measure.Options().keys_or(100, 1) == 100
    options.skip("redis", "it is not installed")
    assert options.skipped == [{"target": "redis", "why": "it is not installed"}]
    assert "NOT MEASURED: redis: it is not installed" in capsys.readouterr().err


def test_compiled_modules_are_named(tmp_path: Path) -> None:
    """By the extensions that stand beside the sources."""
    (tmp_path / "kvtcp" / "frontend" / "resp").mkdir(parents=True)
    for name in ("frontend/resp/parser.cpython-311-x86_64-linux-gnu.so", "frontend/resp/parser.py", "errors.py"):
        (tmp_path / "kvtcp" / name).touch()
    assert measure.compiled_modules(tmp_path) == ["kvtcp/frontend/resp/parser"]


def test_zipfian_ranks_fall_as_they_should() -> None:
    """Rank 0 has its share, ranks are in range, and a tenth of the keys gets most draws."""
    zipfian, rng = Zipfian(1_000), random.Random(1)
    counts = Counter(zipfian.draw(rng.random()) for _ in range(20_000))
    assert min(counts) == 0 and max(counts) < 1_000
    expected = 20_000 / sum(1 / rank**0.99 for rank in range(1, 1_001))
    assert counts[0] == pytest.approx(expected, rel=0.1)
    assert sum(count for rank, count in counts.items() if rank < 100) > 0.6 * 20_000


def test_scattering_changes_no_key_count() -> None:
    """Every rank has a key of its own, where the number of keys and the factor have no common divisor."""
    assert len({scatter(rank, 10_000) for rank in range(10_000)}) == 10_000


def test_the_operations_of_a_job_are_repeatable_and_of_its_mix() -> None:
    """The same job twice gives the same; another process other ones."""
    job = Job(mix={"get": 0.5, "put": 0.3, "scan": 0.2}, distribution="zipfian", keys=1_000, operations=4_000)
    plan = generate(job)
    assert plan == generate(job)
    assert plan != generate(Job(**{**job.__dict__, "process": 1}))
    kinds = Counter(kind for kind, _, _ in plan)
    assert kinds["get"] == pytest.approx(2_000, rel=0.1) and kinds["scan"] == pytest.approx(800, rel=0.15)
    assert all(0 <= number < 1_000 for _, number, _ in plan)
    assert all((1 <= rows <= 100) == (kind == "scan") for kind, _, rows in plan)


def test_inserts_of_processes_do_not_meet() -> None:
    """Each takes its own numbers from `first_insert` on; `latest` reads what this process inserted, or was loaded."""
    mix = {"get": 0.5, "insert": 0.5}
    jobs = [Job(mix=mix, distribution="latest", keys=100, first_insert=500, operations=500, process=n, processes=2)
            for n in range(2)]  # fmt: skip
    inserted = []
    for job in jobs:
        own: list[int] = []
        for kind, number, _ in generate(job):
            if kind == "insert":
                own.append(number)
            else:
                assert number < 100 or number in own, f"a get of {number}, which this process has not inserted before"
        assert own == list(range(500 + job.process, 500 + job.process + 2 * len(own), 2))
        inserted.append(set(own))
    assert not inserted[0] & inserted[1]


def test_values_name_their_keys() -> None:
    """So that an answer for another key is noticed."""
    assert key_of(7) == b"key:000000000007"
    assert value_of(7, 20) == b"000000000007vvvvvvvv"
