"""Verdicts, comparisons, tables, the page and the command lines of the benchmarks."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import run_bench
from bench.measure import make_row
from bench.profiling import LOOP, name_of
from bench.report import comparisons, tables, targets
from bench.report import page as report
from bench.suites import peers
from bench.suites.failover import BIN_S, TIMELINE_S, fewest, timeline
from bench.suites.profile import shares

ROOT = Path(__file__).parent.parent.parent


def row_at(cell: targets.Cell, values: list[float], unit: str = "ops/s") -> dict[str, Any]:
    """A row of that name."""
    return {"suite": cell.suite, **make_row(cell.target, cell.workload, unit, values)}


def rows_for(target: targets.Target, value: float) -> list[dict[str, Any]]:
    """Rows that make a target this ratio."""
    rows = [row_at(target.above, [value * 10] * 5)]
    return [*rows, row_at(target.below, [10] * 5)] if target.below is not None else [row_at(target.above, [value] * 5)]


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_every_target_can_be_met_and_missed(target: targets.Target) -> None:
    """At its goal it is met, at its stretch goal that too, a little worse than the goal it is missed."""
    worse = 0.99 if target.is_higher_better else 1.01
    for value, text in ((target.goal, "met"), (target.stretch, "stretch"), (target.goal * worse, "missed")):
        assert targets.judge(target, rows_for(target, value)).text == text
    assert targets.judge(target, []).text == "not measured"
    assert targets.judge(target, rows_for(target, 1.0)[1:]).text == "not measured"


def test_targets_name_suites_that_exist_and_differ() -> None:
    """Each has its own name, its goal between nothing and its stretch goal, and says how it is measured."""
    assert len({target.name for target in targets.TARGETS}) == len(targets.TARGETS) == 23
    for target in targets.TARGETS:
        assert target.above.suite in run_bench.SUITES
        assert (target.goal < target.stretch) == target.is_higher_better, target.name
        assert target.how and (target.below is None) == bool(target.unit)


def test_the_table_of_targets_shows_few_runs() -> None:
    """A verdict from fewer than five runs is marked."""
    target = targets.TARGETS[0]
    assert target.below is not None
    rows = [row_at(target.above, [30, 40]), row_at(target.below, [20, 20])]
    lines = targets.rows_of([targets.judge(target, rows), targets.judge(target, [])])
    assert lines[1] == [target.name, "1", "2", "1.75", "1.50-2.00", "2 (few)", "met"]
    assert lines[2][3:] == ["-", "-", "-", "not measured"]


def test_comparisons_are_above_one_where_we_are_better() -> None:
    """More operations and fewer seconds are both better; what is not better is listed, the worst first."""
    rows = [
        {"suite": "peers", **make_row("kvtcp RF 1 memory", "SET depth 16", "ops/s", [30])},
        {"suite": "peers", **make_row("redis", "SET depth 16", "ops/s", [60])},
        {"suite": "recovery", **make_row("kvtcp", "restart from log", "s", [4])},
        {"suite": "recovery", **make_row("redis", "restart from log", "s", [1])},
        {"suite": "memory", **make_row("kvtcp RF 1", "memory", "bytes/key", [100])},
        {"suite": "memory", **make_row("redis", "memory", "bytes/key", [200])},
    ]
    found = comparisons.compare(rows)
    assert [(each.suite, each.factor.median) for each in found] == [("peers", 0.5), ("memory", 2.0), ("recovery", 0.25)]
    assert [each.suite for each in comparisons.not_better(found)] == ["recovery", "peers"]
    assert comparisons.rows_of(found)[1][:2] == ["peers: kvtcp RF 1 memory, SET depth 16 / redis", "0.50"]


def test_tables_have_columns_for_what_there_is() -> None:
    """A matrix puts kvtcp first and leaves gaps; a listing leaves out columns that nobody has."""
    rows = [
        make_row("dict", "get", "k/s", [9000]),
        make_row("kvtcp index", "get", "k/s", [4000, 6000], efficiency=0.5),
        make_row("kvtcp index", "scan", "k/s", [5]),
    ]
    assert tables.matrix(rows) == [
        ["", "kvtcp index", "dict", "efficiency"],
        ["get, k/s", "5,000 (4,000-6,000)", "9,000", "0.50"],
        ["scan, k/s", "5.00", "", ""],
    ]
    rows = [make_row("a", "w", "ms", [1.5], cpu_us={"nodes": 2.0}), make_row("b", "w", "ms", [15.55])]
    assert tables.listing(rows) == [
        ["", "median (min-max)", "CPU us, nodes"], ["a: w, ms", "1.50", "2.00"], ["b: w, ms", "15.6", ""]
    ]  # fmt: skip
    assert tables.text([["", "x"], ["long", "1"]]) == "      x\n----  -\nlong  1"
    assert tables.markdown([["", "x"], ["a|b", "1"]]) == "|  | x |\n|---|---:|\n| a\\|b | 1 |"


def a_run() -> dict[str, Any]:
    """Figures of a run that met some targets."""
    rows: list[dict[str, Any]] = []
    for number, target in enumerate(targets.TARGETS):
        rows += rows_for(target, target.goal * (0.5 if number % 5 == 0 else 1.0))
    parts = {"modules": {"storage.table": 3.0, "loop": 1.0}, "functions": {"storage.table:Table.apply": 2.5}}
    rows.append({"suite": "profile", **make_row("RF 1 memory, SET depth 16", "nodes", "us/op", [4.0], **parts)})
    about = {
        "time": "2030-01-02T03:04:05+00:00", "commit": "abc", "compiled": [], "cpu": "a processor",
        "cores": 2, "kernel": "6", "python": "3.11", "programs": {"etcd": "3"},
        "packages": {"msgpack": "1", "lmdb": "not installed"},
    }  # fmt: skip
    skipped = [{"target": "twemproxy", "why": "nutcracker is not installed"}]
    return {"machine": about, "took_s": {"peers": 90.0}, "skipped": skipped, "failed": ["ycsb"], "results": rows}


def test_the_page_says_what_is_missed_worse_and_missing() -> None:
    """Everything comes from the figures; nothing that came out badly is left out."""
    text = report.page(a_run(), ["figures/ratios.svg"])
    assert "at commit `abc`" in text and "lmdb" not in text.partition("## Targets")[0]
    assert "missed" in text and "![ratios](figures/ratios.svg)" in text
    worse = text.partition("## What is not better than a peer")[2].partition("## What is better")[0]
    assert "redis" in worse
    assert "| storage.table (most: Table.apply 2.50) | 3.00 | 75% |" in text
    assert "- twemproxy: nutcracker is not installed" in text and "- the suite `ycsb` failed" in text


def test_without_figures_the_page_says_so() -> None:
    """It names the way to get them."""
    assert "No full run is kept" in report.page(None, [])


def test_the_newest_run_is_taken(tmp_path: Path) -> None:
    """By the time in the file; quick and partial ones are others."""
    for name, time in (("full-b", "2030-01-02"), ("full-a", "2030-01-03"), ("quick-c", "2030-01-09")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"time": time}}))
    assert report.newest(tmp_path) == tmp_path / "full-a.json"
    assert report.newest(tmp_path / "none") is None


def test_a_quick_run_gives_no_page(tmp_path: Path) -> None:
    """It has no verdicts, so it must not look like a measurement."""
    file, page = tmp_path / "quick.json", tmp_path / "page.md"
    file.write_text(json.dumps({**a_run(), "quick": True}))
    command = [sys.executable, str(ROOT / "bench" / "report" / "page.py"), str(file), "--into", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is of a quick run" in done.stderr
    assert not page.exists()


def test_charts_are_drawn_and_keep_classes_apart(tmp_path: Path) -> None:
    """One file for each class of durability, the same bytes for the same figures."""
    pytest.importorskip("matplotlib")
    from bench.report.charts import draw_all

    rows = a_run()["results"]
    for target, durability in (("kvtcp RF 1 memory", "memory"), ("redis", "memory"), ("kvtcp RF 1 sync", "sync"),
                               ("redis appendfsync always", "sync")):  # fmt: skip
        for depth in (1, 16):
            more = {"durability": durability, "generator": "redis-benchmark", "depth": depth, "p99_ms": depth / 2,
                    "cpu_us": {"server": 2.0}}  # fmt: skip
            rows.append({"suite": "peers", **make_row(target, f"SET depth {depth}", "ops/s", [depth * 10], **more)})
    row = {**make_row("kill -9 of a node", "stall", "ms", [1]), "suite": "failover"}
    rows.append({**row, "timeline": {"begin_s": -0.5, "bin_s": 0.1, "answers": [5, 0, 5]}})
    verdicts = targets.judge_all(rows)
    files = draw_all(rows, verdicts, tmp_path / "one")
    assert {file.name for file in files} == {
        "ratios.svg", "throughput-memory.svg", "throughput-sync.svg", "cpu-memory.svg", "cpu-sync.svg", "failover.svg"
    }  # fmt: skip
    assert "appendfsync" not in (tmp_path / "one" / "cpu-memory.svg").read_text()
    again = draw_all(rows, verdicts, tmp_path / "two")
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]


def test_suites_are_chosen_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    """All if none is named; one that is not there is refused with those that are."""
    command = run_bench.parser()
    assert run_bench.chosen(command, []) == list(run_bench.SUITES)
    assert run_bench.chosen(command, ["scan", "btree"]) == ["btree", "scan"]
    with pytest.raises(SystemExit):
        run_bench.chosen(command, ["speed"])
    assert "unknown suite 'speed'; there are floors, btree" in capsys.readouterr().err


def test_a_full_run_fits_its_hour() -> None:
    """By the minutes that each suite is known to take."""
    assert sum(minutes for _, minutes in run_bench.SUITES.values()) <= run_bench.MINUTES_MAX


def test_figures_have_a_place() -> None:
    """Those of a quick run are not kept in git."""
    about: dict[str, Any] = {"commit": "abc", "compiled": []}
    names = list(run_bench.SUITES)
    assert run_bench.file_of(about, names, False).name == "full-abc.json"
    assert run_bench.file_of(about, ["btree", "scan"], False).name == "btree-scan-abc.json"
    assert run_bench.file_of(about, names, True).name == "quick-abc.json.tmp"
    assert run_bench.file_of({**about, "compiled": ["x"]}, names, False).name == "full-abc-compiled.json"


def test_a_suite_that_would_end_too_late_is_left_out_loudly(tmp_path: Path) -> None:
    """And a run from which a suite is missing says so at the end."""
    options = run_bench.Options()
    run = run_bench.Run(options, tmp_path / "figures.json", {"commit": "abc"})
    assert run_bench.full(run, ["peers"], 1.0) == 0
    assert options.skipped == [{"target": "peers", "why": "it takes 13 minutes, and they would end after 1"}]


def test_a_suite_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures and failures are replaced, those of others stay; the page says which commit they are of."""
    file = tmp_path / "figures.json"
    about = {"commit": "old", "compiled": ["x"], "time": "2026-01-01T00:00", "cpu": "c", "cores": 2, "kernel": "k",
             "python": "3", "packages": {}}  # fmt: skip
    rows = {"scan": 1.0, "peers": 2.0}
    suite = SimpleNamespace(TITLE="a suite")
    monkeypatch.setattr(run_bench.importlib, "import_module", lambda _: suite)

    def measured(name: str) -> Any:
        return lambda _: [make_row("kvtcp", name, "ops/s", [rows[name]] * 5)]

    first = run_bench.Run(run_bench.Options(), file, about)
    suite.measure = measured("scan")
    first.suite("scan")
    first.options.failed.append("peers, measure_etcd")
    suite.measure = measured("peers")
    first.suite("peers")
    rows["peers"] = 3.0
    second = run_bench.Run(run_bench.Options(), file, {**about, "commit": "new"})
    second.go_on(["peers"])
    second.suite("peers")
    kept = json.loads(file.read_text())
    assert [(row["suite"], row["median"]) for row in kept["results"]] == [("scan", 1.0), ("peers", 3.0)]
    assert kept["failed"] == [] and kept["machine"]["commit"] == "old"
    assert kept["commits"] == {"scan": "old", "peers": "new"}
    said = report.machine_text(kept["machine"], kept["took_s"], kept["commits"])
    assert "peers was measured again, at commit `new`" in said and "scan was" not in said
    with pytest.raises(ValueError, match="compiled"):
        run_bench.Run(run_bench.Options(), file, {**about, "compiled": []}).go_on(["peers"])


def test_a_group_of_peers_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the others are kept, and it is told."""
    for name in ("measure_memory", "measure_replicated", "measure_sync", "measure_pysyncobj"):
        monkeypatch.setattr(peers, name, lambda _, name=name: [{"workload": name}])
    monkeypatch.setattr(peers, "program", lambda _: "there")

    def measure_etcd(_: Any) -> Any:
        raise AssertionError("no writes")

    monkeypatch.setattr(peers, "measure_etcd", measure_etcd)
    options = run_bench.Options()
    assert len(peers.measure(options)) == 4 and options.failed == ["peers, measure_etcd"]


@pytest.mark.parametrize("program", ["run_bench.py", "report/page.py", "check.py"])
def test_the_programs_explain_themselves(program: str) -> None:
    """From anywhere, without an installation."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / program), "--help"], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage:")


def test_answers_around_an_event_are_counted_in_bins() -> None:
    """Only whole bins that were watched; of several events the fewest."""
    at = 100.0
    begin = at + TIMELINE_S[0]
    counts = timeline([begin, begin + BIN_S * 1.5, at - 99, at + 99], at, begin + BIN_S * 3.5)
    assert counts == [1, 1, 0]
    assert fewest([[3, 1], [2, 2, 5]]) == [2, 1, 5]


def test_time_is_divided_among_modules_by_samples() -> None:
    """The longest first."""
    modules, functions = shares({"a:f": 1, "a:g": 2, "b:h": 5}, 16.0)
    assert modules == {"b": 10.0, "a": 6.0} and next(iter(functions.items())) == ("b:h", 10.0)


def test_a_sample_counts_for_the_innermost_function_of_the_package() -> None:
    """What is called from outside of it is the loop's."""
    from kvtcp.protocol import hashing

    assert name_of(sys._getframe()) == LOOP
    frames: list[str] = []

    class Key(bytes):
        def __contains__(self, item: object) -> bool:
            frames.append(name_of(sys._getframe()))
            return False

    hashing.shard_of(Key(b"k"), 64)
    assert frames == ["protocol.hashing:shard_of"]
