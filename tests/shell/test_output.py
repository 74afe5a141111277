"""Tables: widths, cuts, pages, with and without rich."""

import io
import sys
from collections.abc import AsyncIterator

import pytest

from kvtcp.client.requests import Entry
from kvtcp.shell.output import PAGE_ITEMS, Output, in_pages, json_line, ttl_ms_of


def written(output: Output) -> str:
    """What an output has written."""
    assert isinstance(output.stdout, io.BytesIO), "a buffer in memory"
    return output.stdout.getvalue().decode()


def make(form: str = "table", *, columns: int | None = None, is_terminal: bool = False) -> Output:
    """An output in memory."""
    return Output(io.BytesIO(), form, is_terminal=is_terminal, columns=columns)


def test_the_value_takes_what_the_line_has_left() -> None:
    """The last column is cut to the terminal, wide characters counted twice; no line is wider."""
    output = make(columns=40)
    pairs = output.pairs()
    pairs.page([Entry(b"a" * 10, b"v" * 100, 1, None), Entry("字".encode() * 3, "字".encode() * 30, 22, 1.5)])
    pairs.finish()
    assert written(output).splitlines() == [
        "key         rev  ttl  value",
        "----------  ---  ---  ------------------",
        "aaaaaaaaaa  1    -    " + "v" * 17 + "…",
        "字字字      22   1.5  " + "字" * 8 + "…",
        "2 pairs",
    ]


def test_a_key_is_never_cut() -> None:
    """A key that is wider than half the terminal pushes the rest of its own line, and no other one."""
    output = make(columns=40)
    pairs = output.pairs()
    pairs.page([Entry(b"a" * 21, b"v" * 100, 1, None), Entry(b"b" * 50, b"v" * 100, 1, None)])
    pairs.page([Entry(b"c", b"v" * 30, 1, None)])
    assert written(output).splitlines()[2:] == [
        "a" * 21 + "  1    -    vvvvvvv…",
        "b" * 50 + "  1    -    vvvvvvv…",
        "c  1  -  " + "v" * 30,
    ]
    output = make(columns=20)
    keys = output.keys()
    keys.page([b"k" * 50])
    assert written(output).splitlines()[2:] == ["k" * 50]


def test_every_page_has_its_own_widths() -> None:
    """A table of a stream has one header, and each page is as wide as its own cells, on a terminal or not."""
    for columns in (40, None):
        output = make(columns=columns)
        pairs = output.pairs()
        pairs.page([Entry(b"12345", b"v", 1, None)])
        pairs.page([Entry(b"a" * 10, b"v", 1000, None), Entry(b"b", b"w", 2, None)])
        pairs.finish()
        assert written(output).splitlines()[2:] == [
            "12345  1    -    v",
            "a" * 10 + "  1000  -  v",
            "b" + " " * 9 + "  2     -  w",
            "3 pairs",
        ]


def test_help_is_whole() -> None:
    """Sentences of help are never cut."""
    output = make(columns=20)
    output.texts(("usage", "what it does"), [("get K", "a sentence of many words"), ("scan " * 5, "another")])
    assert written(output).splitlines()[2:] == ["get K       a sentence of many words", "scan " * 5 + "  another"]


def test_middle_columns_give_way_last() -> None:
    """In a table of several wide columns the last is cut first, then those between; the first stays."""
    output = make(columns=40)
    output.rows([{"node": "n1", "address": "a" * 30, "state": "s" * 30}])
    assert written(output).splitlines()[2] == "n1    " + "a" * 23 + "…  sssssss…"


def test_rich_draws_on_a_terminal() -> None:
    """With rich a terminal gets the same columns with a styled header, and markup in values is only text."""
    pytest.importorskip("rich")
    output = make(columns=60, is_terminal=True)
    pairs = output.pairs()
    pairs.page([Entry(b"[bold]k", b":smile: [red]v\x1b[2J", 1, None)])
    pairs.page([Entry(b"k2", b"v" * 100, 2, 0.5)])
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
    assert [ttl_ms_of(Entry(b"k", b"", 1, ttl)) for ttl in (None, 0.0, 0.0004, 1.5)] == [None, 1, 1, 1500]


def test_bytes_members_of_objects() -> None:
    """A member that is not UTF-8 is base64 under its name with _b64."""
    assert json_line({"key": b"a", "rev": 1}) == '{"key": "a", "rev": 1}'
    assert json_line({"key": b"\xff", "deleted": True}) == '{"key_b64": "/w==", "deleted": true}'


@pytest.mark.parametrize("count", [0, 1, PAGE_ITEMS - 1, PAGE_ITEMS, PAGE_ITEMS + 1, 2 * PAGE_ITEMS])
async def test_pages(count: int) -> None:
    """All items come, in order, in full pages up to the last, and no page is empty."""

    async def items() -> AsyncIterator[int]:
        for number in range(count):
            yield number

    pages = [page async for page in in_pages(items())]
    assert [number for page in pages for number in page] == list(range(count))
    assert all(len(page) == PAGE_ITEMS for page in pages[:-1]) and all(pages)
