"""Bytes shown as text: no control byte gets through, and nothing is lost."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtcp.shell.text import cell, cut, decoded, display_width, escape, for_people, number


@pytest.mark.parametrize(("data", "text"), [
    (b"plain", "plain"),
    ("Zoë 字".encode(), "Zoë 字"),
    (b"a\tb\nc\rd\\e", "a\\tb\\nc\\rd\\\\e"),
    (b"\x00\x1b[31m\x7f", "\\x00\\x1b[31m\\x7f"),
    (b"\xff\xc3", "\\xff\\xc3"),
    ("\x85\x9b".encode(), "\\xc2\\x85\\xc2\\x9b"),
])  # fmt: skip
def test_escape(data: bytes, text: str) -> None:
    """Text stays, controls (C1 too), backslashes and stray bytes become escapes."""
    assert escape(data) == text


def unescape(text: str) -> bytes:
    """The inverse of escape, as a script would write it."""
    names = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}

    def replace(match: re.Match[str]) -> str:
        return names[match[1]] if match[1] in names else chr(0xDC00 + int(match[1][1:], 16))

    text = re.sub(r"\\(x[0-9a-f]{2}|[ntr\\])", replace, text)
    # an escaped byte below 0x80 is no surrogate escape of Python's
    return b"".join(bytes([ord(c) - 0xDC00]) if 0xDC00 <= ord(c) <= 0xDCFF else c.encode("utf-8") for c in text)


@given(st.binary(max_size=60))
def test_escape_loses_nothing(data: bytes) -> None:
    """The bytes can be told from the text, and the text is one line without control characters."""
    text = escape(data)
    assert unescape(text) == data
    assert not re.search("[\x00-\x1f\x7f-\x9f]", text)


def test_for_people_keeps_lines() -> None:
    """A value on a terminal keeps newlines, tabs and backslashes; an escape sequence cannot act."""
    assert for_people(b"a\n\tb\\\x1b[2J\xff") == "a\n\tb\\\\x1b[2J\\xff"


@pytest.mark.parametrize(("text", "columns", "shown"), [
    ("abc", 3, "abc"), ("abcd", 3, "ab…"), ("字字字", 6, "字字字"), ("字字字", 5, "字字…"),
    ("字字字", 4, "字…"), ("", 3, ""),
])  # fmt: skip
def test_cut(text: str, columns: int, shown: str) -> None:
    """A text is cut to the columns that it takes, wide characters counted twice."""
    assert cut(text, columns) == shown
    assert display_width(shown) <= columns


def test_cells_and_numbers() -> None:
    """Members of answers have one text each."""
    assert [cell(v) for v in (None, True, False, 1, 0.5, b"a\n", "é", ["n1", "n2"], {"a": 1})] == [
        "-", "yes", "no", "1", "0.5", "a\\n", "é", "n1; n2", "a=1",
    ]
    assert [cell(v) for v in ("", b"", [], (), {}, [""])] == ["-"] * 6
    assert [number(v) for v in (60.0, 59.998, 0.0004, float("inf"))] == ["60", "59.998", "0", "inf"]


def test_decoded_is_for_json() -> None:
    """Names and values of an answer become text at any depth."""
    assert decoded({b"a": [b"\xff", {1: b"x"}], "n": None}) == {"a": ["\\xff", {"1": "x"}], "n": None}
