"""The driver of Redis's own tests: what the harness says is read right, and what went wrong is not counted as good."""

from pathlib import Path

import pytest

from tests.redis.suite import FILES, TABLE, Event, Run, SuiteError, Table, judge, make_plan, parse

OUTPUT = """\
[ready]: 4711
\x1b[1;37;49mTesting unit/type/incr\x1b[0m
[\x1b[0;33;49mskip\x1b[0m]: INCR (odd)
[\x1b[0;32;49mok\x1b[0m]: INCR over 32bit value (12 ms)
[\x1b[0;31;49merr\x1b[0m]: No negative zero in tests/unit/type/incr.tcl
Expected '0' to equal or match '-0'
[\x1b[0;36;49mignore\x1b[0m]: MOVE: Not supported on singledb
[1/1 \x1b[0;33;49mdone\x1b[0m]: unit/type/incr (0 seconds)
[\x1b[0;31;49mexception\x1b[0m]: Executing test client: ERR unknown command 'x'.
    while executing
"""


def test_what_the_harness_says() -> None:
    """Every test that is told of becomes an event, with the lines that explain a failure, and gets its outcome."""
    events = parse(OUTPUT)
    assert [event.kind for event in events] == ["skip", "ok", "err", "ignore", "exception"]
    assert judge("INCR over 32bit value", events) == ("passed", "")
    assert judge("No negative zero", events)[0] == "failed"
    assert judge("No negative zero", events)[1].startswith("Expected '0' to equal")
    assert judge("MOVE", events) == ("failed", "Redis leaves it out: Not supported on singledb")
    assert judge("INCR (odd)", events) == ("failed", "Executing test client: ERR unknown command 'x'.")


def test_a_test_that_did_not_run_has_not_passed() -> None:
    """Nothing said, a hang, another test's success, and one of two tests with one name that failed, are failures."""
    assert judge("a", []) == ("failed", "it did not run")
    assert judge("a", [Event("ok", "a b (1 ms)"), Event("ok", "b (1 ms)")])[0] == "failed"
    assert judge("a", [Event("TIMEOUT", "no end after 60 s")]) == ("failed", "no end after 60 s")
    assert judge("a", [Event("ok", "a (1 ms)"), Event("err", "a in tests/unit/x.tcl\nwhy")]) == ("failed", "why")


def test_the_plan() -> None:
    """Every test that is not skipped is run once, by itself with what it needs before it, or with its whole file."""
    file = FILES[0]
    table = Table({file: {"c": "a good reason"}}, {file: {"b": ["a"]}})
    tests = {file: ["a", "b", "b", "c"]}
    assert make_plan(tests, table, False) == [Run(file, ["a"], ["a"], []), Run(file, ["b"], ["a", "b"], [])]
    assert make_plan(tests, table, True) == [Run(file, ["a", "b"], [], ["c"])]


def test_rows_that_are_out_of_date(tmp_path: Path) -> None:
    """A row for a test or a file that does not exist, one without a reason, and one that stands twice, are told."""
    file = FILES[0]
    table = Table({file: {"a": "a good reason", "gone": "a good reason"}, "unit/x": {}}, {file: {"a": ["lost"]}})
    told = table.complaints({file: ["a", "b"]})
    assert [line.rpartition(" ")[2] for line in told] == ["gone", "lost", "run"]
    path = tmp_path / "table.json"
    path.write_text('{"skips": {"unit/scan": {"a": ""}}, "after": {}}')
    with pytest.raises(SuiteError, match="without a reason: a"):
        Table.read(path)
    path.write_text('{"skips": {"unit/scan": {"a": "one reason", "a": "another"}}, "after": {}}')
    with pytest.raises(SuiteError, match="twice in one file: a"):
        Table.read(path)


def test_the_table_can_be_read() -> None:
    """The project's own table has rows for the files that are run alone."""
    table = Table.read(TABLE)
    assert table.skips.keys() <= set(FILES)
    assert table.complaints({}) == []
