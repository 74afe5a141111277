"""Tables: widths, cuts, pages, with and without rich."""

import io
import sys

import pytest
from shell_fakes import FakeEntry

from kvtcp.shell.output import Output, json_line, ttl_ms_of


def written(output: Output) -> str:
    """What an output has written."""
    assert isinstance(output.stdout, io.BytesIO), "a buffer in memory"
    return output.stdout.getvalue().decode()


def make(form: str = "table", *, columns: int | None = None, is_terminal: bool = False) -> Output:
    """An output in memory."""
    return Output(io.BytesIO(), form, is_terminal=is_terminal, columns=columns)


def test_the_value_gives_way_on_a_narrow_terminal() -> None:
    """The last column is cut first, then the key; no line is wider than the terminal."""
    output = make(columns=40)
    pairs = output.pairs()
    pairs.page([FakeEntry(b"a" * 10, b"v" * 100, 1, None), FakeEntry("字".encode() * 3, "字".encode() * 30, 22, 1.5)])
    pairs.finish()
    assert written(output).splitlines() == [
        "key         rev  ttl  value",
        "----------  ---  ---  ------------------",
        "aaaaaaaaaa  1    -    " + "v" * 17 + "…",
        "字字字      22   1.5  " + "字" * 8 + "…",
        "2 pairs",
    ]
    output = make(columns=32)
    pairs = output.pairs()
    pairs.page([FakeEntry(b"a" * 50, b"v" * 100, 1, None)])
    assert written(output).splitlines()[2] == "a" * 11 + "…  1    -    vvvvvvv…"


def test_later_pages_keep_the_widths_of_the_first() -> None:
    """A table of a stream has one header; a longer cell of a later page is cut on a terminal, whole elsewhere."""
    for columns, expected in ((40, "aaaa…"), (None, "a" * 10)):
        output = make(columns=columns)
        keys = output.keys()
        keys.page([b"12345"])
        keys.page([b"a" * 10])
        keys.finish()
        assert written(output).splitlines() == ["key", "-----", "12345", expected, "2 keys"]


def test_rich_draws_on_a_terminal() -> None:
    """With rich a terminal gets the same columns with a styled header, and markup in values is only text."""
    pytest.importorskip("rich")
    output = make(columns=60, is_terminal=True)
    pairs = output.pairs()
    pairs.page([FakeEntry(b"[bold]k", b":smile: [red]v\x1b[2J", 1, None)])
    pairs.page([FakeEntry(b"k2", b"v" * 100, 2, 0.5)])
    pairs.finish()
    text = written(output)
    assert "\x1b[1;36mkey" in text and "[bold]k" in text and ":smile: [red]v\\x1b[2J" in text and "\x1b[2J" not in text
    assert text.count("key") == 1 and text.endswith("2 pairs\n")


def test_without_rich_a_terminal_gets_plain_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich is an extra: without it the columns are aligned all the same."""
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    output = make(columns=60, is_terminal=True)
    output.rows([{"node": "n1", "up": True}, {"node": "n2", "lag": 1.5}])
    assert written(output) == "node  up   lag\n----  ---  ---\nn1    yes  -\nn2    -    1.5\n"


def test_deadlines_are_never_zero() -> None:
    """ttl_ms of an entry about to expire is 1: an import refuses 0, and None would make it live for ever."""
    assert [ttl_ms_of(FakeEntry(b"k", b"", 1, ttl)) for ttl in (None, 0.0, 0.0004, 1.5)] == [None, 1, 1, 1500]


def test_bytes_members_of_objects() -> None:
    """A member that is not UTF-8 is base64 under its name with _b64."""
    assert json_line({"key": b"a", "rev": 1}) == '{"key": "a", "rev": 1}'
    assert json_line({"key": b"\xff", "deleted": True}) == '{"key_b64": "/w==", "deleted": true}'
