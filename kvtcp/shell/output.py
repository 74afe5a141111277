r"""Answers in the form that was asked for: table, plain, json, jsonl or raw.

A command chooses the kind of its answer (a scalar, one pair, a stream of pairs, a record, rows), this module writes it:

| form  | one value           | pairs                          | records and rows                |
|-------|---------------------|--------------------------------|---------------------------------|
| plain | value and newline   | `key<TAB>value`, \-escaped     | tab-separated, \-escaped        |
| table | safe for a terminal | aligned columns, one line each | aligned columns                 |
| json  | one object          | one array of objects           | one object, one array           |
| jsonl | one object a line   | one object a line              | one object a line               |
| raw   | the bytes alone     | the values alone               | as plain, without last newline  |

An object of a pair has `key`, `value`, `rev`, `ttl_ms` (`key_b64`, `value_b64` where the bytes are not UTF-8), see
kvtcp.jsonl. Streams are written page by page and never held as a whole: a table takes its widths from each page. If
rich is installed and stdout is a terminal, headings have its style; rich is imported then only.
"""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import IO, Any, BinaryIO, Final, Generic, TypeVar

from kvtcp.client.requests import Entry
from kvtcp.jsonl import encode_pair
from kvtcp.shell.text import cell, cut, decoded, display_width, escape, for_people, number

T = TypeVar("T")
S = TypeVar("S")
PAGE_ITEMS: Final = 500  # items handled at once: enough to pay for a system call, little enough to be smooth
FORMATS: Final = ("table", "plain", "json", "jsonl", "raw")
_COLUMN_MIN: Final = 8  # columns of a cut cell, at least
_GAP: Final = "  "


async def in_pages(items: AsyncIterator[T]) -> AsyncIterator[list[T]]:
    """The items of a stream in lists of PAGE_ITEMS, the last one shorter; no empty list."""
    page: list[T] = []
    async for item in items:
        page.append(item)
        if len(page) == PAGE_ITEMS:
            yield page
            page = []
    if page:
        yield page


def ttl_ms_of(entry: Entry[bytes]) -> int | None:
    """Milliseconds until the deadline of an entry, at least 1; None without deadline."""
    return None if entry.ttl is None else max(1, round(entry.ttl * 1000))


def pair_line(entry: Entry[bytes]) -> str:
    """The JSON object of an entry, as in exports."""
    return encode_pair(entry.key, entry.value, entry.rev, ttl_ms_of(entry))


def key_line(key: bytes) -> str:
    """The JSON object of a key alone."""
    return json_line({"key": key})


def json_line(fields: Mapping[str, Any]) -> str:
    """One JSON object on one line. A bytes member is text under its name, or base64 under `name_b64`."""
    members: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, bytes):
            try:
                members[name] = value.decode("utf-8")
            except UnicodeDecodeError:
                members[name + "_b64"] = base64.b64encode(value).decode("ascii")
        else:
            members[name] = decoded(value)
    return json.dumps(members, ensure_ascii=False)


class Output:
    """Write answers to `stdout` in one form."""

    def __init__(self, stdout: BinaryIO | IO[bytes], form: str, *, is_terminal: bool, columns: int | None) -> None:
        assert form in FORMATS, f"unknown form {form}"
        self.stdout = stdout
        self.form = form
        self.is_terminal = is_terminal  # decides whether headings have a style
        self.columns = columns  # columns to fit a table in, None = as wide as it gets

    def line(self, text: str) -> None:
        """One line of text as it stands."""
        self.stdout.write(text.encode("utf-8", "surrogateescape") + b"\n")

    def heading(self, text: str) -> None:
        """One line of text, in the style of a heading on a terminal for which rich has one."""
        if self.is_terminal:
            try:
                from rich.console import Console
                from rich.text import Text
            except ImportError:
                self.line(text)
                return
            console = Console(force_terminal=True, width=display_width(text) + 1, highlight=False)
            with console.capture() as capture:
                console.print(Text(text, style="bold cyan"), crop=False)
            self.stdout.write(capture.get().encode("utf-8", "surrogateescape"))
        else:
            self.line(text)

    def scalar(self, text: str, fields: Mapping[str, Any]) -> None:
        """A short answer: `text` for people and scripts, `fields` as an object."""
        if self.form in ("json", "jsonl"):
            self.line(json_line(fields))
        elif self.form == "raw":
            self.stdout.write(text.encode("utf-8"))
        else:
            self.line(text)

    def entry(self, entry: Entry[bytes]) -> None:
        """One value."""
        if self.form in ("json", "jsonl"):
            self.line(pair_line(entry))
        elif self.form == "raw":
            self.stdout.write(entry.value)
        elif self.form == "plain":
            self.stdout.write(entry.value + b"\n")
        else:
            self.line(for_people(entry.value))

    def pairs(self) -> PageWriter[Entry[bytes], Any]:
        """A stream of pairs."""
        if self.form == "table":
            # the value comes last, the column that is cut
            return _TableWriter(self, ("key", "rev", "ttl", "value"), _pair_row, "pair")
        if self.form == "json":
            return _ArrayWriter(self, pair_line)
        if self.form == "raw":
            return _RawWriter(self, lambda entry: entry.value)
        return _LineWriter(self, pair_line if self.form == "jsonl" else _pair_plain)

    def keys(self) -> PageWriter[bytes, Any]:
        """A stream of keys."""
        if self.form == "table":
            return _TableWriter(self, ("key",), lambda key: (escape(key),), "key")
        if self.form == "json":
            return _ArrayWriter(self, key_line)
        if self.form == "raw":
            return _RawWriter(self, lambda key: key)
        return _LineWriter(self, key_line if self.form == "jsonl" else escape)

    def record(self, fields: Mapping[str, Any]) -> None:
        """One map of names and values; a map inside is shown with dotted names."""
        if self.form == "json":
            self.line(json.dumps(decoded(fields), ensure_ascii=False, indent=2))
        elif self.form == "jsonl":
            self.line(json.dumps(decoded(fields), ensure_ascii=False))
        elif self.form == "table":
            self.table(("", ""), list(_flat(fields)), header_shown=False)
        else:
            self._plain_lines("\t".join(row) for row in _flat(fields))

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Maps of the same kind, one line each; columns in the order in which the names come first."""
        if self.form == "json":
            self.line(json.dumps(decoded(list(rows)), ensure_ascii=False, indent=2))
            return
        if self.form == "jsonl":
            for row in rows:
                self.line(json.dumps(decoded(row), ensure_ascii=False))
            return
        names = list(dict.fromkeys(str(decoded(name)) for row in rows for name in row))
        lines = [tuple(cell(decoded(dict(row)).get(name)) for name in names) for row in rows]
        if self.form == "table":
            self.table(names, lines)
        else:
            self._plain_lines("\t".join(line) for line in [tuple(names), *lines])

    def texts(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Help: aligned columns in table form, tab-separated lines without header otherwise."""
        if self.form == "table":
            RowTable(self, header, is_cut=False).rows(rows)
        else:
            for row in rows:
                self.line("\t".join(row))

    def _plain_lines(self, lines: Iterable[str]) -> None:
        text = "\n".join(lines)
        if self.form == "raw":
            self.stdout.write(text.encode("utf-8"))
        elif text:
            self.line(text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, header_shown: bool = True) -> None:
        """Aligned columns of cells that are text already; nothing if there are no rows."""
        if rows:
            RowTable(self, header, header_shown=header_shown).rows(rows)


def _flat(fields: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for name, value in fields.items():
        full = above + str(decoded(name))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, full + ".")
        else:
            yield full, cell(value)


def _pair_plain(entry: Entry[bytes]) -> str:
    return f"{escape(entry.key)}\t{escape(entry.value)}"


def _pair_row(entry: Entry[bytes]) -> tuple[str, ...]:
    return escape(entry.key), str(entry.rev), "-" if entry.ttl is None else number(entry.ttl), escape(entry.value)


class PageWriter(ABC, Generic[T, S]):
    """Write a stream: `page` for some items at a time, then `finish`. `show` makes text or bytes of one item."""

    def __init__(self, output: Output, show: Callable[[T], S]) -> None:
        self.output = output
        self._show = show

    @abstractmethod
    def page(self, items: Sequence[T]) -> None:
        """Write some items, at least one."""

    def finish(self) -> None:
        """End the stream."""


class _RawWriter(PageWriter[T, bytes]):
    """The bytes of the items, nothing between."""

    def page(self, items: Sequence[T]) -> None:
        self.output.stdout.write(b"".join(map(self._show, items)))


class _LineWriter(PageWriter[T, str]):
    """An item a line."""

    def page(self, items: Sequence[T]) -> None:
        self.output.line("\n".join(map(self._show, items)))
        self.output.stdout.flush()


class _ArrayWriter(PageWriter[T, str]):
    """One JSON array, an item a line."""

    _is_open = False  # the bracket has been written

    def page(self, items: Sequence[T]) -> None:
        opening = ",\n" if self._is_open else "[\n"
        self._is_open = True
        self.output.stdout.write((opening + ",\n".join(map(self._show, items))).encode("utf-8"))

    def finish(self) -> None:
        self.output.line("\n]" if self._is_open else "[]")


class _TableWriter(PageWriter[T, Sequence[str]]):
    """Aligned columns, and the number of items below."""

    def __init__(self, output: Output, header: Sequence[str], row: Callable[[T], Sequence[str]], noun: str) -> None:
        super().__init__(output, row)
        self._table = RowTable(output, header)
        self._noun = noun
        self._written = 0  # items so far

    def page(self, items: Sequence[T]) -> None:
        self._table.rows(list(map(self._show, items)))
        self._written += len(items)

    def finish(self) -> None:
        self.output.line(f"{self._written} {self._noun}{'' if self._written == 1 else 's'}")


class RowTable:
    """Aligned columns; on a terminal the last one is cut to the rest of its line.

    The first column, the key, is never cut: a key that is wider than its column pushes the rest of its line. Widths
    are those of the rows that are written together, so one wide page does not stretch the next.
    """

    def __init__(
        self, output: Output, header: Sequence[str], *, header_shown: bool = True, is_cut: bool = True
    ) -> None:
        self.output = output
        self.is_cut = is_cut  # False: a terminal wraps long lines
        self.header = tuple(header)
        self._header_due = header_shown  # False once it is written

    def rows(self, rows: Sequence[Sequence[str]]) -> None:
        """Write some rows; before the first ones the header."""
        header_shown, self._header_due = self._header_due, False
        widths = self._fit([self.header, *rows] if header_shown else rows)
        if header_shown:
            self.output.heading(self._aligned(self.header, widths))
            self.output.line(_GAP.join("-" * width for width in widths))
        self.output.line("\n".join(self._aligned(row, widths) for row in rows))

    def _fit(self, rows: Sequence[Sequence[str]]) -> list[int]:
        """Columns of each column: the widest cell, or less where a line would be wider than the terminal."""
        widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
        if self.output.columns is None or len(widths) == 1:
            return widths
        # one long key must not take the place of all other cells
        widths[0] = min(widths[0], max(display_width(self.header[0]), self.output.columns // 2))
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - self.output.columns
        for index in [len(widths) - 1, *range(1, len(widths) - 1)]:
            taken = min(max(0, excess), max(0, widths[index] - _COLUMN_MIN))
            widths[index] -= taken
            excess -= taken
        return widths

    def _aligned(self, row: Sequence[str], widths: Sequence[int]) -> str:
        line = ""
        for index, (text, width) in enumerate(zip(row, widths, strict=True)):
            shown = text
            if self.is_cut and self.output.columns is not None and index > 0:
                is_last = index == len(row) - 1
                shown = cut(text, max(_COLUMN_MIN, self.output.columns - display_width(line)) if is_last else width)
            line += shown + " " * (width - display_width(shown)) + _GAP
        return line.rstrip()
