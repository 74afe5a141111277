"""status, nodes and shards as tables for people: units, the columns that fit, and sentences that are not cut.

Pure. The answers of the server are maps whose keys change with its version: a key that is missing is left out, one that
is not known here is shown under its own name. Only the table form is made here; all others pass the maps through.

A column of which every cell is empty is not shown. Where the terminal is too narrow for the rest, the columns with the
highest rank go first, and a line below names them. Sentences (`reason`, `degraded`) are no cells: they stand below the
table, wrapped at words.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvtcp.shell.text import cell, decoded, display_width, number

Row = Mapping[str, Any]
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_GAP_COLUMNS: Final = 2  # between two columns of a table
_SENTENCE_COLUMNS_MIN: Final = 8  # a sentence is wrapped to no less
_UNKNOWN_RANK: Final = 90


@dataclass(frozen=True)
class Column:
    """One column: its heading, a function that shows a row in it (empty = nothing), and the keys of rows that it shows.

    Columns with the highest rank are the first to go on a narrow terminal; those of rank 0 stay.
    """

    heading: str
    rank: int
    show: Callable[[Row], str]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """A table, and the lines below it."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


# --- numbers with units -----------------------------------------------------------------------------


def count_text(value: Any) -> str:
    """A number with its thousands set off; anything else as a cell."""
    return f"{value:,}" if type(value) is int else cell(value)


def bytes_text(value: Any) -> str:
    """Bytes in the largest unit that leaves at least 1, with three digits."""
    if type(value) not in (int, float):
        return cell(value)
    size, unit = float(value), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 or abs(size) >= 100 else f"{size:.1f} {_UNITS[unit]}"


def duration_text(value: Any) -> str:
    """Seconds as days, hours, minutes and seconds, the two largest of them."""
    if type(value) not in (int, float) or not math.isfinite(value):
        return cell(value)
    if value < 60:
        return f"{number(float(value))} s"
    parts = []
    left = int(value)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])


def with_unit(key: str, value: Any) -> str:
    """The value of a key as a cell; the unit is the end of the key."""
    if value is None or isinstance(value, bool):
        return cell(value)
    if key.endswith("_bytes_s"):
        return f"{bytes_text(value)}/s"
    if key.endswith(("_bytes", "bytes")):
        return bytes_text(value)
    if key.endswith("_ms"):
        return f"{number(float(value))} ms" if type(value) in (int, float) else cell(value)
    if key.endswith("_s"):
        return duration_text(value)
    return cell(value)


# --- columns ----------------------------------------------------------------------------------------


def _plain(key: str, rank: int, heading: str = "", show: Callable[[Any], str] = cell) -> Column:
    """A column for one key."""

    def text(row: Row) -> str:
        value = row.get(key)
        return "" if _is_empty(value) else show(value)

    return Column(heading or key, rank, text, (key,))


def _measured(key: str, rank: int, heading: str) -> Column:
    """A column for a key whose end is its unit."""
    return _plain(key, rank, heading, lambda value: with_unit(key, value))


def _pair(items_key: str, bytes_key: str, rank: int, heading: str) -> Column:
    """A column for a number of items and their bytes; zero bytes are shown only without a number of items."""

    def text(row: Row) -> str:
        items, size = row.get(items_key), row.get(bytes_key)
        shown = "" if _is_empty(items) else count_text(items)
        if _is_empty(size) or (size == 0 and shown):
            return shown
        return f"{shown}, {bytes_text(size)}" if shown else bytes_text(size)

    return Column(heading, rank, text, (items_key, bytes_key))


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == b"" or value == [] or value == {}


def _names(value: Any) -> str:
    """A list of nodes, close together."""
    return " ".join(map(cell, value)) if isinstance(value, list | tuple) else cell(value)


def _wanted(row: Row) -> str:
    """The nodes that are to hold a shard; `=` if they are those that hold it."""
    wanted, insync = row.get("wanted"), row.get("insync")
    if _is_empty(wanted):
        return ""
    if isinstance(wanted, list) and isinstance(insync, list) and sorted(map(cell, wanted)) == sorted(map(cell, insync)):
        return "="
    return _names(wanted)


def _members(row: Row) -> str:
    """The nodes that hold a shard, of rows without an in-sync set."""
    return "" if "insync" in row or _is_empty(row.get("nodes")) else _names(row["nodes"])


def _learners(row: Row) -> str:
    """The nodes whose copies are being brought up to date, and their progress."""
    learners = row.get("learners")
    if not isinstance(learners, list):
        return "" if _is_empty(learners) else cell(learners)
    return "; ".join(_learner(learner) for learner in learners)


def _learner(learner: Any) -> str:
    if not isinstance(learner, Mapping):
        return cell(learner)
    parts = [cell(learner[key]) for key in ("node", "phase") if not _is_empty(learner.get(key))]
    if not _is_empty(learner.get("entries_left")):
        parts.append(f"{count_text(learner['entries_left'])} left")
    if learner.get("keys"):
        parts.append(f"({count_text(learner['keys'])} keys)")
    return " ".join(parts)


NODE_COLUMNS: Final = (
    _plain("node", 0),
    _plain("state", 0),
    _plain("address", 4),
    _plain("member_of", 1),
    _plain("wanted", 2),
    _pair("lag_entries", "lag_bytes", 3, "lag"),
    _plain("learning", 5),
    _measured("learn_rate_bytes_s", 6, "learn_rate"),
    _measured("sync_p99_ms", 7, "sync_p99"),
    _measured("loop_lag_ms", 8, "loop_lag"),
    _plain("operations", 10, show=count_text),
    _measured("memory_bytes", 9, "memory"),
    _plain("restarts", 11),
    _plain("shards", 13),
    _plain("first_of", 12),
    _pair("outstanding", "outstanding_bytes", 14, "outstanding"),
    _plain("pid", 15),
)
SHARD_COLUMNS: Final = (
    _plain("shard", 0),
    _plain("state", 0),
    Column("nodes", 1, _members, ("nodes",)),
    _plain("insync", 1, show=_names),
    Column("wanted", 2, _wanted, ("wanted",)),
    _pair("lag_entries", "lag_bytes", 3, "lag"),
    _plain("commit", 5),
    _plain("seq", 7),
    _plain("epoch", 8),
    _plain("waiting", 6),
    Column("learners", 4, _learners, ("learners",)),
)


def _fitting(columns: Sequence[Column], rows: Sequence[Row], width: int | None) -> View:
    """The table of these columns and of all other keys of the rows, as far as it fits."""
    known = {key for column in columns for key in column.keys} | {"reason"}
    others = dict.fromkeys(key for row in rows for key in row if key not in known)
    every = [*columns, *(_measured(key, _UNKNOWN_RANK, key) for key in others)]
    cells = {column: [column.show(row) or "-" for row in rows] for column in every}
    shown = [column for column in every if any(text != "-" for text in cells[column])]
    hidden: list[Column] = []
    widths = {column: max(map(display_width, [column.heading, *cells[column]])) for column in shown}
    while width is not None and sum(widths[c] for c in shown) + _GAP_COLUMNS * (len(shown) - 1) > width:
        last = max(reversed(shown), key=lambda column: column.rank)
        if last.rank == 0:
            break
        shown.remove(last)
        hidden.append(last)
    names = [column.heading for column in every if column in hidden]
    notes = wrapped(f"not shown here: {', '.join(names)} (-o json has everything)", width) if names else []
    lines = [tuple(cells[column][index] for column in shown) for index in range(len(rows))]
    return View(tuple(column.heading for column in shown), lines, notes)


def wrapped(text: str, width: int | None, indent: str = "  ") -> list[str]:
    """A sentence in lines of at most `width` columns, broken at spaces only; the second and later ones indented."""
    if width is None:
        return [text]
    return textwrap.wrap(
        text, max(width, _SENTENCE_COLUMNS_MIN), subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


# --- the answers ------------------------------------------------------------------------------------


def nodes_view(nodes: Sequence[Row], width: int | None) -> View:
    """The table of `nodes`, with the reasons and the number in each state below it."""
    rows = [decoded(dict(row)) for row in nodes]
    view = _fitting(NODE_COLUMNS, rows, width)
    reasons = [f"{cell(row.get('node'))}: {cell(row['reason'])}" for row in rows if not _is_empty(row.get("reason"))]
    notes = [line for text in reasons for line in wrapped(text, width)]
    return View(view.header, view.rows, [*notes, *_summary(rows, "node", width), *view.notes])


def shards_view(shards: Sequence[Row], width: int | None) -> View:
    """The table of `shards`, with each reason once below it, for all shards that share it."""
    rows = [decoded(dict(row)) for row in shards]
    view = _fitting(SHARD_COLUMNS, rows, width)
    same: dict[str, list[Any]] = {}
    for row in rows:
        if not _is_empty(row.get("reason")):
            same.setdefault(cell(row["reason"]), []).append(row.get("shard"))
    reasons = [f"shard{'s' if len(n) > 1 else ''} {_ranges(n)}: {text}" for text, n in same.items()]
    notes = [line for text in reasons for line in wrapped(text, width)]
    summary = _summary(rows, "shard", width) if len(rows) > 1 else []
    return View(view.header, view.rows, [*notes, *summary, *view.notes])


def status_rows(status: Row, width: int | None) -> list[tuple[str, str]]:
    """Names and values of `status`. Faults come last, next to the prompt, a sentence a line."""
    fields = decoded(dict(status))
    sentences = fields.pop("degraded", None)
    counters = fields.get("counters")
    if isinstance(counters, Mapping):  # the same number is not shown twice
        fields = {name: value for name, value in fields.items() if name not in counters or counters[name] != value}
    rows = list(_flat(fields))
    if sentences is None:
        return rows
    if not isinstance(sentences, list) or not sentences:
        return [*rows, ("degraded", cell(sentences))]
    left = None
    if width is not None:
        left = width - max(display_width(name) for name, _ in [*rows, ("degraded", "")]) - _GAP_COLUMNS
    lines = [line for sentence in sentences for line in wrapped(cell(sentence), left)]
    return [*rows, *zip(["degraded"] + [""] * (len(lines) - 1), lines, strict=True)]


def _flat(fields: Row, above: str = "") -> Iterable[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, with_unit(name, value)


def _summary(rows: Sequence[Row], noun: str, width: int | None) -> list[str]:
    """The number of rows in each state, the most frequent first; nothing if no row has a state."""
    states = Counter(cell(row["state"]) for row in rows if not _is_empty(row.get("state")))
    if not states:
        return []
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return wrapped(f"{len(rows)} {noun}{'' if len(rows) == 1 else 's'}: {counts}", width)


def _ranges(numbers: Sequence[Any]) -> str:
    """Numbers with runs of them as `7-9`."""
    runs: list[list[Any]] = []
    for value in numbers:
        if runs and type(value) is int and type(runs[-1][-1]) is int and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value])
    return ", ".join("-".join(map(cell, run)) for run in runs)
